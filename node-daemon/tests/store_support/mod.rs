//! What the store's tests share: a model of what each sector may hold, and libnbd as a client.

// Each test file uses its part of this.
#![allow(dead_code)]

pub mod powerloss;
pub mod replica;
pub mod replicate;

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::fault::Faults;
use hearth_node::store::{Store, StoreError, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{Epoch, Incarnation, LeaseId};

/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;

/// Time between fork and exec, with much room.
const CHILD_EXECS_WITHIN: Duration = Duration::from_secs(5);

/// A folder in RAM where there is one.
pub fn fast_dir() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        tempfile::tempdir_in(shm).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// Whether the long form of a run was asked for: `HEARTH_TEST_LONG=1`.
pub fn long() -> bool {
    std::env::var("HEARTH_TEST_LONG").as_deref() == Ok("1")
}

/// Opens a store. Its lock belongs to the open file, which a child that another test of this process starts shares
/// between its fork and its exec; so a store that was just closed may look open for that moment.
pub fn open(dir: &Path, incarnation: u128, faults: Faults) -> Arc<Store> {
    let began = Instant::now();
    loop {
        let options = StoreOptions {
            incarnation: Some(Incarnation(incarnation)),
            faults: faults.clone(),
        };
        match Store::open(dir, options) {
            Err(StoreError::InUse(_)) if began.elapsed() < CHILD_EXECS_WITHIN => std::thread::yield_now(),
            opened => return Arc::new(opened.unwrap()),
        }
    }
}

pub fn attach(store: &Arc<Store>, name: &str, epoch: u64) -> Arc<Volume> {
    let tier = RamTier::new(TierOptions {
        capacity_bytes: 512 << 10,
        front_percent: 50,
        lock: false,
    })
    .unwrap();
    let image = store.find(&name.parse().unwrap()).unwrap().id;
    Volume::attach(
        store.clone(),
        tier,
        image,
        Epoch(epoch),
        LeaseId(epoch.into()),
        Arc::new(NoPeers),
    )
    .unwrap()
}

/// Ends a volume and its store as the death of the daemon does.
pub fn die(volume: Arc<Volume>, store: Arc<Store>) {
    drop(volume);
    // Threads that read ahead may still hold it.
    while Arc::strong_count(&store) > 1 {
        std::thread::yield_now();
    }
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Write { fua: bool },
    Trim,
    Zero,
    Flush,
}

/// How a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NoSpace,
    Io,
    /// The image takes no more writes.
    Closed,
}

impl From<DiskError> for Refusal {
    fn from(err: DiskError) -> Self {
        match err {
            DiskError::NoSpace(_) => Refusal::NoSpace,
            DiskError::Io { .. } => Refusal::Io,
            DiskError::Poisoned(_) => Refusal::Closed,
            other => panic!("refused with {other}"),
        }
    }
}

/// Asks a volume itself.
pub fn ask(volume: &Volume, request: Request, at: u64, len: u64, value: u8) -> Result<(), Refusal> {
    let done = match request {
        Request::Write { fua } => volume.write(at, &vec![value; len as usize], fua),
        Request::Trim => volume.trim(at, len, false),
        Request::Zero => volume.write_zeroes(at, len, true, false),
        Request::Flush => volume.flush(),
    };
    Ok(done?)
}

pub fn read_all(volume: &Volume) -> Vec<u8> {
    let mut buf = vec![0; volume.size_bytes() as usize];
    volume.read(0, &mut buf).unwrap();
    buf
}

/// What each sector may hold: one value, or several where a request was refused or not flushed.
#[derive(Clone)]
pub struct Sectors(Vec<Vec<Box<[u8]>>>);

impl Sectors {
    pub fn of(bytes: &[u8]) -> Self {
        Self(bytes.chunks(SECTOR).map(|s| vec![s.into()]).collect())
    }

    fn touched(range: &Range<u64>) -> Range<usize> {
        (range.start / SECTOR as u64) as usize..(range.end as usize).div_ceil(SECTOR)
    }

    fn with(sector: usize, old: &[u8], range: &Range<u64>, value: u8) -> Box<[u8]> {
        let base = (sector * SECTOR) as u64;
        let mut new: Box<[u8]> = old.into();
        for (i, byte) in new.iter_mut().enumerate() {
            if range.contains(&(base + i as u64)) {
                *byte = value;
            }
        }
        new
    }

    /// The range has this value, whatever was there.
    pub fn set(&mut self, range: Range<u64>, value: u8) {
        for sector in Self::touched(&range) {
            let mut new: Vec<_> = self.0[sector]
                .iter()
                .map(|old| Self::with(sector, old, &range, value))
                .collect();
            new.sort_unstable();
            new.dedup();
            self.0[sector] = new;
        }
    }

    /// Each sector of the range may have this value.
    pub fn may(&mut self, range: Range<u64>, value: u8) {
        for sector in Self::touched(&range) {
            let new: Vec<_> = self.0[sector]
                .iter()
                .map(|old| Self::with(sector, old, &range, value))
                .collect();
            self.0[sector].extend(new);
            self.0[sector].sort_unstable();
            self.0[sector].dedup();
        }
    }

    /// Says where bytes are not what they may be.
    pub fn check(&self, got: &[u8]) -> Result<(), String> {
        for (sector, (got, may)) in got.chunks(SECTOR).zip(&self.0).enumerate() {
            if !may.iter().any(|m| **m == *got) {
                return Err(format!(
                    "sector {sector} begins with {:?} and may begin with {:?}",
                    &got[..8],
                    may.iter().map(|m| &m[..8]).collect::<Vec<_>>()
                ));
            }
        }
        Ok(())
    }
}

/// libnbd, driven line by line.
pub struct LibNbd {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

const SCRIPT: &str = r#"
import nbd, sys
h = None
for line in sys.stdin:
    word, *rest = line.split()
    try:
        if word == "connect":
            h = nbd.NBD()
            h.set_strict_mode(0)
            h.connect_uri(rest[0])
        elif word == "close":
            h.shutdown()
            h = None
        else:
            at, size, value = (int(w) for w in rest)
            if word == "write": h.pwrite(bytes([value]) * size, at)
            elif word == "fua": h.pwrite(bytes([value]) * size, at, nbd.CMD_FLAG_FUA)
            elif word == "trim": h.trim(size, at)
            elif word == "zero": h.zero(size, at, nbd.CMD_FLAG_NO_HOLE)
            elif word == "flush": h.flush()
            elif word == "read":
                got = h.pread(size, at)
                if got != bytes([value]) * size:
                    print("other bytes:", got[:8], flush=True)
                    continue
        print("ok", flush=True)
    except nbd.Error as e:
        print(e.errno or str(e), flush=True)
"#;

impl LibNbd {
    /// `None` where it is not installed.
    pub fn start() -> Option<Self> {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let input = child.stdin.take()?;
        let output = BufReader::new(child.stdout.take()?);
        Some(Self { child, input, output })
    }

    /// One line in, one line out.
    pub fn tell(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").expect("libnbd listens");
        let mut answer = String::new();
        self.output.read_line(&mut answer).expect("libnbd answers");
        answer.trim().to_owned()
    }

    pub fn connect(&mut self, socket: &Path, export: &str) -> bool {
        self.tell(&format!("connect nbd+unix:///{export}?socket={}", socket.display())) == "ok"
    }

    /// As [`ask`]; `Io` stands for any `EIO`.
    pub fn ask(&mut self, request: Request, at: u64, len: u64, value: u8) -> Result<(), Refusal> {
        let word = match request {
            Request::Write { fua: false } => "write",
            Request::Write { fua: true } => "fua",
            Request::Trim => "trim",
            Request::Zero => "zero",
            Request::Flush => "flush",
        };
        match self.tell(&format!("{word} {at} {len} {value}")).as_str() {
            "ok" => Ok(()),
            "EIO" => Err(Refusal::Io),
            "ENOSPC" => Err(Refusal::NoSpace),
            other => panic!("{word} was answered with {other}"),
        }
    }
}

impl Drop for LibNbd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file of this crate.
pub fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
