//! A model of what a disk holds after the power failed: what was synced is there; of what was not, anything.
//!
//! The recorder sees every call that the store makes ([`hearth_node::store::fault`]) and keeps files and directories
//! apart, as a file system does: a name is durable when its directory was synced, bytes when their file was.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hearth_node::store::fault::{Action, Call, Faults, Verdict};

use super::SECTOR;

type Id = usize;

/// One change, or a sync.
#[derive(Debug, Clone)]
enum Op {
    Write {
        file: Id,
        offset: u64,
        bytes: Vec<u8>,
        durable: bool,
    },
    Zero {
        file: Id,
        offset: u64,
        length: u64,
    },
    SetLen {
        file: Id,
        len: u64,
    },
    Link {
        dir: Id,
        name: String,
        node: Id,
    },
    Unlink {
        dir: Id,
        name: String,
    },
    Rename {
        dir: Id,
        from: String,
        to: String,
        node: Id,
    },
    Sync {
        node: Id,
    },
}

impl Op {
    /// What a sync must be of to make it durable.
    fn held_by(&self) -> Option<Id> {
        match self {
            Op::Write { durable: true, .. } | Op::Sync { .. } => None,
            Op::Write { file, .. } | Op::Zero { file, .. } | Op::SetLen { file, .. } => Some(*file),
            Op::Link { dir, .. } | Op::Unlink { dir, .. } | Op::Rename { dir, .. } => Some(*dir),
        }
    }
}

#[derive(Default)]
struct Recording {
    root: PathBuf,
    ops: Vec<Op>,
    /// Files and directories so far; number 0 is the store's directory.
    is_dir: Vec<bool>,
    /// Names as they are now.
    names: BTreeMap<PathBuf, Id>,
}

impl Recording {
    fn node(&mut self, is_dir: bool) -> Id {
        self.is_dir.push(is_dir);
        self.is_dir.len() - 1
    }

    fn place(&self, path: &Path) -> (Id, String) {
        let dir = self.names[path.parent().unwrap()];
        (dir, path.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn make(&mut self, path: &Path, is_dir: bool) {
        if let Some(&file) = self.names.get(path) {
            if !is_dir {
                self.ops.push(Op::SetLen { file, len: 0 });
            }
            return;
        }
        let node = self.node(is_dir);
        let (dir, name) = self.place(path);
        self.names.insert(path.to_owned(), node);
        self.ops.push(Op::Link { dir, name, node });
    }

    fn see(&mut self, call: &Call<'_>) {
        let path = call.path;
        match call.action {
            Action::Write { offset, bytes, durable } => {
                let (file, bytes) = (self.names[path], bytes.to_vec());
                self.ops.push(Op::Write {
                    file,
                    offset,
                    bytes,
                    durable,
                });
            }
            Action::Zero { offset, length } => self.ops.push(Op::Zero {
                file: self.names[path],
                offset,
                length,
            }),
            Action::SetLen(len) => self.ops.push(Op::SetLen {
                file: self.names[path],
                len,
            }),
            Action::Sync => self.ops.push(Op::Sync { node: self.names[path] }),
            Action::Create => self.make(path, false),
            Action::CreateDir => self.make(path, true),
            Action::Rename { to } => {
                let node = self.names.remove(path).unwrap();
                let ((dir, from), (_, to_name)) = (self.place(path), self.place(to));
                self.names.insert(to.to_owned(), node);
                self.ops.push(Op::Rename {
                    dir,
                    from,
                    to: to_name,
                    node,
                });
            }
            Action::Remove => {
                // What is deepest goes first.
                let gone: Vec<_> = self
                    .names
                    .keys()
                    .filter(|p| p.starts_with(path))
                    .cloned()
                    .rev()
                    .collect();
                for path in gone {
                    let (dir, name) = self.place(&path);
                    self.names.remove(&path);
                    self.ops.push(Op::Unlink { dir, name });
                }
            }
            Action::Read | Action::Reserve | Action::Moment => {}
        }
    }
}

/// Records what a store does from its first opening on.
#[derive(Clone)]
pub struct Recorder(Arc<Mutex<Recording>>);

impl Recorder {
    /// For a store in `root`, which is empty.
    pub fn new(root: &Path) -> Self {
        let mut recording = Recording {
            root: root.to_owned(),
            ..Recording::default()
        };
        let node = recording.node(true);
        recording.names.insert(root.to_owned(), node);
        Self(Arc::new(Mutex::new(recording)))
    }

    pub fn faults(&self) -> Faults {
        let recorder = self.clone();
        Faults::hook(move |call| {
            let mut recording = recorder.0.lock().unwrap();
            if call.path.starts_with(&recording.root) {
                recording.see(call);
            }
            Ok(Verdict::Go)
        })
    }

    /// Calls so far: a moment at which the power may fail.
    pub fn moment(&self) -> usize {
        self.0.lock().unwrap().ops.len()
    }

    /// Every state in which a power loss at `moment` may leave the disk, as far as `thorough` goes: nothing of what
    /// was not synced, all of it, each prefix of it with its last write torn at every sector, each part alone, each
    /// part missing, and some at random.
    pub fn states(&self, moment: usize, thorough: bool, mut visit: impl FnMut(Disk)) {
        let recording = self.0.lock().unwrap();
        let ops = &recording.ops[..moment];
        let pending: Vec<usize> = (0..moment)
            .filter(|i| {
                ops[*i].held_by().is_some_and(|held| {
                    !ops[*i..]
                        .iter()
                        .any(|op| matches!(op, Op::Sync { node } if *node == held))
                })
            })
            .collect();
        let is_pending = |i: usize| pending.binary_search(&i).ok();
        let state = |keep: &dyn Fn(usize) -> Keep| {
            let mut disk = Disk::new(&recording.is_dir);
            for (i, op) in ops.iter().enumerate() {
                disk.apply(op, is_pending(i).map_or(Keep::All, keep));
            }
            disk
        };
        visit(state(&|_| Keep::Nothing));
        visit(state(&|_| Keep::All));
        visit(state(&|_| Keep::Zeros));
        for n in 0..pending.len() {
            visit(state(&|i| if i == n { Keep::All } else { Keep::Nothing }));
            visit(state(&|i| if i == n { Keep::Nothing } else { Keep::All }));
            visit(state(&|i| if i <= n { Keep::All } else { Keep::Nothing }));
            let Op::Write { bytes, .. } = &ops[pending[n]] else {
                continue;
            };
            let sectors = bytes.len().div_ceil(SECTOR);
            for sector in 1..sectors {
                if !thorough && sector > 3 && sector + 3 < sectors {
                    continue;
                }
                let torn = sector * SECTOR;
                visit(state(&|i| match i.cmp(&n) {
                    std::cmp::Ordering::Less => Keep::All,
                    std::cmp::Ordering::Equal => Keep::First(torn),
                    std::cmp::Ordering::Greater => Keep::Nothing,
                }));
            }
        }
        for round in 0..if thorough { 24 } else { 2 } {
            let seed = (moment as u64) << 8 | round;
            visit(state(&|i| {
                let mut hasher = DefaultHasher::new();
                (seed, i).hash(&mut hasher);
                let r = hasher.finish();
                match r % 5 {
                    0 | 1 => Keep::All,
                    2 | 3 => Keep::Nothing,
                    _ => Keep::Some(r),
                }
            }));
        }
    }
}

/// What is left of a change that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    All,
    Nothing,
    /// The first bytes of a write.
    First(usize),
    /// Sectors of a write at random.
    Some(u64),
    /// The file's length without its bytes.
    Zeros,
}

/// What is on the disk.
#[derive(Hash)]
pub struct Disk {
    files: Vec<Vec<u8>>,
    dirs: Vec<Option<BTreeMap<String, Id>>>,
}

impl Disk {
    fn new(is_dir: &[bool]) -> Self {
        Self {
            files: vec![Vec::new(); is_dir.len()],
            dirs: is_dir.iter().map(|d| d.then(BTreeMap::new)).collect(),
        }
    }

    fn write(&mut self, file: Id, offset: u64, bytes: &[u8]) {
        let (data, offset) = (&mut self.files[file], offset as usize);
        if data.len() < offset + bytes.len() {
            data.resize(offset + bytes.len(), 0);
        }
        data[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn apply(&mut self, op: &Op, keep: Keep) {
        match (op, keep) {
            (
                Op::Write {
                    file, offset, bytes, ..
                },
                keep,
            ) => match keep {
                Keep::All => self.write(*file, *offset, bytes),
                Keep::First(n) => self.write(*file, *offset, &bytes[..n]),
                Keep::Some(seed) => {
                    for (i, part) in bytes.chunks(SECTOR).enumerate() {
                        if seed >> (i % 64) & 1 == 1 {
                            self.write(*file, offset + (i * SECTOR) as u64, part);
                        }
                    }
                }
                Keep::Zeros => {
                    let end = *offset as usize + bytes.len();
                    if self.files[*file].len() < end {
                        self.files[*file].resize(end, 0);
                    }
                }
                Keep::Nothing => {}
            },
            (_, Keep::Nothing | Keep::Zeros) | (Op::Sync { .. }, _) => {}
            (Op::Zero { file, offset, length }, _) => {
                let data = &mut self.files[*file];
                let end = ((offset + length) as usize).min(data.len());
                let start = (*offset as usize).min(end);
                data[start..end].fill(0);
            }
            (Op::SetLen { file, len }, _) => self.files[*file].resize(*len as usize, 0),
            (Op::Link { dir, name, node }, _) => {
                self.dir(*dir).insert(name.clone(), *node);
            }
            (Op::Unlink { dir, name }, _) => {
                self.dir(*dir).remove(name);
            }
            (Op::Rename { dir, from, to, node }, _) => {
                self.dir(*dir).remove(from);
                self.dir(*dir).insert(to.clone(), *node);
            }
        }
    }

    fn dir(&mut self, dir: Id) -> &mut BTreeMap<String, Id> {
        self.dirs[dir].as_mut().expect("it is a directory")
    }

    /// Equal disks have equal digests.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }

    /// Puts it into a folder, holes as holes.
    pub fn write_to(&self, folder: &Path) {
        self.write_dir(0, folder);
    }

    fn write_dir(&self, dir: Id, folder: &Path) {
        for (name, node) in self.dirs[dir].as_ref().unwrap() {
            let path = folder.join(name);
            if self.dirs[*node].is_some() {
                fs::create_dir(&path).unwrap();
                self.write_dir(*node, &path);
            } else {
                let file = fs::File::create(&path).unwrap();
                file.set_len(self.files[*node].len() as u64).unwrap();
                for (i, page) in self.files[*node].chunks(4096).enumerate() {
                    if page.iter().any(|b| *b != 0) {
                        file.write_all_at(page, i as u64 * 4096).unwrap();
                    }
                }
            }
        }
    }
}
