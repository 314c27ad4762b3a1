//! The power fails at every moment of a replica's life: it opens, with the record that was last put there, and every block
//! whose write began and that was not unmarked since is among the marks found, under the life that marked it first. At
//! every moment the daemon dies as well: then all that was written is there too.
//!
//! The short form takes one in some states of each moment; `HEARTH_TEST_LONG=1` takes all of them, each write torn at
//! every 512 bytes.

mod store_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hearth_node::disk::Disk as _;
use hearth_node::store::fault::{Faults, Site, Verdict};
use hearth_node::store::{REGION_BYTES, Store, StoreError};
use hearth_protocol::Incarnation;
use store_support::powerloss::{Disk, Recorder};
use store_support::replica::{IMAGE, LAYER, Node, attach_member, durable, new_replica, set};
use store_support::{fast_dir, long, open};

/// Of how many states of one moment the short form takes one.
const ONE_IN: u64 = 12;

/// What was promised, or done to memory alone, between two moments.
#[derive(Debug, Clone)]
enum What {
    Made(u64),
    Put(u64),
    Marked(u64, u64),
    Unmarked(BTreeSet<u64>),
    /// The first 4,096 bytes of a block.
    Written(u64, u8),
    Flushed,
    /// In order, after a flush.
    Closed,
    Forgotten,
}

struct Story {
    recorder: Recorder,
    /// With the moments at which the call began and at which it returned.
    done: Vec<(usize, usize, What)>,
    /// Moments at which a file of marks got its name.
    renamed: Arc<Mutex<Vec<usize>>>,
    dir: tempfile::TempDir,
}

impl Story {
    fn new() -> Self {
        let dir = fast_dir();
        Self {
            recorder: Recorder::new(dir.path()),
            done: Vec::new(),
            renamed: Arc::default(),
            dir,
        }
    }

    /// Records everything but the length of the data file, which is long and empty.
    fn faults(&self) -> Faults {
        let (recorder, inner) = (self.recorder.clone(), self.recorder.faults());
        let renamed = self.renamed.clone();
        Faults::hook(move |call| {
            if call.site == Site::MarksRename {
                renamed.lock().unwrap().push(recorder.moment());
            }
            match call.site {
                Site::DataSize => Ok(Verdict::Go),
                _ => inner.at(call.site, call.path, call.action),
            }
        })
    }

    fn does(&mut self, what: What, call: impl FnOnce()) {
        let from = self.recorder.moment();
        call();
        self.done.push((from, self.recorder.moment(), what));
    }

    fn mark(&mut self, node: &Node, first: u64, last: u64) {
        self.does(What::Marked(first, last), || node.mark(first, last).unwrap());
    }

    fn unmark(&mut self, node: &Node, blocks: impl IntoIterator<Item = u64>) {
        let blocks: BTreeSet<u64> = blocks.into_iter().collect();
        self.does(What::Unmarked(blocks.clone()), || {
            node.member.marks.unmark(&set(blocks));
        });
    }

    fn write(&mut self, node: &Node, block: u64, value: u8) {
        self.mark(node, block, block);
        self.does(What::Written(block, value), || {
            let at = block * node.member.volume.block_size_bytes();
            node.member.volume.write(at, &[value; 4096], false).unwrap();
        });
    }

    fn flush(&mut self, node: &Node) {
        self.does(What::Flushed, || node.member.volume.flush().unwrap());
    }

    fn put(&mut self, store: &Store, epoch: u64) {
        self.does(What::Put(epoch), || {
            store.put_durable(IMAGE, &durable(epoch)).unwrap();
        });
    }

    fn close(&mut self, node: Node) {
        self.does(What::Closed, || node.member.volume.detach().unwrap());
        node.die();
    }
}

/// What a power loss at a moment may leave.
#[derive(Default)]
struct Legal {
    must_be: bool,
    may_be: bool,
    epochs: BTreeSet<u64>,
    marked: BTreeSet<u64>,
    /// Blocks that were ever marked and may be so still, their regions at least.
    ever: BTreeSet<u64>,
    written: BTreeMap<u64, u8>,
    flushed: BTreeMap<u64, u8>,
    /// A block that is being written.
    writing: Option<u64>,
}

fn legal(done: &[(usize, usize, What)], moment: usize) -> Legal {
    let mut legal = Legal::default();
    for (from, until, what) in done.iter().filter(|(from, until, _)| *from < moment || from == until) {
        if *from > moment {
            continue;
        }
        let kept = *until <= moment;
        match what {
            What::Made(epoch) => {
                legal = Legal {
                    must_be: kept,
                    may_be: true,
                    epochs: [*epoch].into(),
                    ..Legal::default()
                };
            }
            What::Put(epoch) => {
                if kept {
                    legal.epochs.clear();
                }
                legal.epochs.insert(*epoch);
            }
            What::Marked(first, last) => {
                legal.ever.extend(*first..=*last);
                if kept {
                    legal.marked.extend(*first..=*last);
                }
            }
            What::Unmarked(blocks) => legal.marked.retain(|block| !blocks.contains(block)),
            What::Written(block, value) => {
                if kept {
                    legal.written.insert(*block, *value);
                } else {
                    legal.writing = Some(*block);
                }
            }
            What::Flushed | What::Closed => {
                if kept {
                    legal.flushed.clone_from(&legal.written);
                }
                if kept && matches!(what, What::Closed) {
                    legal.ever.clone_from(&legal.marked);
                }
            }
            What::Forgotten => {
                legal.must_be = false;
                legal.may_be = !kept;
            }
        }
    }
    legal
}

/// What the replica of a story is.
#[derive(Clone, Copy)]
struct Shape {
    size: u64,
    blocks_per_region: u64,
}

/// Opens what the death of the daemon (life 1) or of the machine left; says what is wrong with it.
fn check(dir: &Path, legal: &Legal, life: u128, shape: Shape) -> Result<(), String> {
    let Shape {
        size,
        blocks_per_region,
    } = shape;
    let data = dir.join("layers").join(LAYER.to_string()).join("data");
    if data.exists() {
        fs::File::options()
            .write(true)
            .open(&data)
            .unwrap()
            .set_len(size)
            .unwrap();
    }
    let store = open(dir, life, Faults::default());
    let member = match attach_member(&store) {
        Ok(member) => member,
        Err(StoreError::NoImage(_)) if !legal.must_be => {
            // Nothing of it is in the way of a new one.
            let new = new_replica(size, REGION_BYTES / blocks_per_region, None);
            let layers = fs::read_dir(dir.join("layers")).unwrap().count();
            let images = fs::read_dir(dir.join("images")).unwrap().count();
            if layers + images > 0 {
                return Err(format!("{layers} layers and {images} images are left over"));
            }
            store
                .create_replica(&new)
                .map_err(|err| format!("making it anew: {err}"))?;
            let member = attach_member(&store).map_err(|err| format!("opening a new one: {err}"))?;
            return if member.marks.found().is_empty() && !member.failed {
                Ok(())
            } else {
                Err("a new one begins with old marks".into())
            };
        }
        Err(err) => return Err(err.to_string()),
    };
    if !legal.may_be {
        return Err("it came back after it was forgotten".into());
    }
    if member.failed {
        return Err("it calls itself failed".into());
    }
    if !legal.epochs.iter().any(|epoch| durable(*epoch) == member.durable) {
        return Err(format!("it has {:?}, of {:?}", member.durable, legal.epochs));
    }
    let found = member.marks.found();
    if let Some(block) = legal
        .marked
        .iter()
        .find(|block| !found.keys().any(|found| found.0 == **block))
    {
        return Err(format!("block {block} is not marked any more"));
    }
    let regions: BTreeSet<u64> = legal.ever.iter().map(|block| block / blocks_per_region).collect();
    if let Some(block) = found
        .keys()
        .find(|block| !regions.contains(&(block.0 / blocks_per_region)))
    {
        return Err(format!("block {block} is marked and was not written"));
    }
    if found.values().any(|life| *life != Incarnation(1)) {
        return Err(format!("marks have another life: {found:?}"));
    }
    for (block, written) in &legal.written {
        let is_marked = found.keys().any(|found| found.0 == *block);
        let value = match life {
            1 if legal.writing == Some(*block) => continue,
            1 => *written,
            _ if is_marked => continue,
            _ => legal.flushed.get(block).copied().unwrap_or_default(),
        };
        let mut got = [0; 4096];
        let at = block * member.volume.block_size_bytes();
        member.volume.read(at, &mut got).map_err(|err| err.to_string())?;
        if got != [value; 4096] {
            return Err(format!(
                "block {block} has {} and not {value}, and no mark says so",
                got[0]
            ));
        }
    }
    // The daemon dies before anything was made equal: all of it is still known.
    let next = member.incarnation;
    drop(member);
    let again = attach_member(&store).map_err(|err| format!("opening it again: {err}"))?;
    if again.marks.found() != found || again.incarnation != next {
        return Err("opened once more, it has other marks".into());
    }
    Ok(())
}

/// Plays power losses and deaths of the daemon at these moments.
fn play(story: &Story, moments: impl IntoIterator<Item = usize>, shape: Shape) -> usize {
    let mut checked = 0;
    for moment in moments {
        let legal = legal(&story.done, moment);
        let mut n = 0;
        story.recorder.states(moment, long(), |disk: Disk| {
            n += 1;
            if !long() && n > 3 && !(n + moment as u64).is_multiple_of(ONE_IN) {
                return;
            }
            // The second state has everything that was handed to the kernel.
            let lives: &[u128] = if n == 2 { &[1, 2] } else { &[2] };
            for &life in lives {
                let dir = fast_dir();
                disk.write_to(dir.path());
                checked += 1;
                if let Err(why) = check(dir.path(), &legal, life, shape) {
                    let last = story.done.iter().rev().find(|(from, ..)| *from < moment);
                    panic!("dead at moment {moment}, state {n}, opened in life {life}, last {last:?}: {why}");
                }
            }
        });
    }
    println!("{checked} states opened");
    checked
}

#[test]
fn a_replica_keeps_its_record_and_its_marks_over_every_power_loss() {
    const BLOCK: u64 = 64 << 10;
    const SIZE: u64 = REGION_BYTES + BLOCK;
    let mut story = Story::new();
    let store = open(story.dir.path(), 1, story.faults());
    let open_node = || Node {
        store: store.clone(),
        member: attach_member(&store).unwrap(),
    };
    let made = |epoch| {
        store
            .create_replica(&new_replica(SIZE, BLOCK, Some(durable(epoch))))
            .unwrap();
    };
    story.does(What::Made(1), || made(1));
    let node = open_node();
    story.put(&store, 2);
    story.write(&node, 0, 1);
    story.write(&node, 64, 2);
    story.flush(&node);
    story.unmark(&node, [0]);
    story.put(&store, 3);
    // Its region is marked still, and the block is marked again.
    story.write(&node, 0, 3);
    story.write(&node, 1, 4);
    story.flush(&node);
    story.unmark(&node, [0, 1, 64]);
    story.write(&node, 2, 5);
    story.write(&node, 0, 6);
    story.flush(&node);
    story.unmark(&node, [0]);
    // Block 2 is not everywhere.
    close_in_order(&mut story, node, &store);
    let node = open_node();
    story.write(&node, 64, 7);
    story.flush(&node);
    story.unmark(&node, 0..=64);
    close_in_order(&mut story, node, &store);
    story.put(&store, 4);
    let node = open_node();
    story.write(&node, 3, 8);
    drop(node);
    story.does(What::Forgotten, || store.forget_replica(IMAGE).unwrap());
    story.does(What::Made(6), || made(6));
    let node = open_node();
    story.write(&node, 0, 9);
    let moments = story.recorder.moment();
    let shape = Shape {
        size: SIZE,
        blocks_per_region: REGION_BYTES / BLOCK,
    };
    let checked = play(&story, 0..=moments, shape);
    drop(node);
    assert!(moments > 80 && checked > 300, "{moments} moments, {checked} states");
}

/// The store stays open, unlike in [`Story::close`].
fn close_in_order(story: &mut Story, node: Node, store: &Arc<Store>) {
    story.does(What::Closed, || node.member.volume.detach().unwrap());
    drop(node);
    assert!(store.image(IMAGE).unwrap().clean);
}

#[test]
fn marks_survive_the_unmarking_of_others_and_the_shortening_of_their_file() {
    const REGIONS: u64 = 300;
    const KEPT: u64 = 256;
    const SIZE: u64 = REGIONS * REGION_BYTES;
    let mut story = Story::new();
    let node = {
        let store = open(story.dir.path(), 1, story.faults());
        story.does(What::Made(1), || {
            store
                .create_replica(&new_replica(SIZE, REGION_BYTES, Some(durable(1))))
                .unwrap();
        });
        let member = attach_member(&store).unwrap();
        Node { store, member }
    };
    story.renamed.lock().unwrap().clear();
    let begin = story.recorder.moment();
    story.mark(&node, 0, KEPT - 1);
    story.unmark(&node, (0..KEPT).filter(|block| *block != 7));
    // Each of these unmarks others; some come back.
    story.mark(&node, 260, 264);
    story.mark(&node, 0, 3);
    story.unmark(&node, [260, 262, 0, 1]);
    story.mark(&node, 270, 299);
    story.mark(&node, 1, 30);
    let evicted = story.recorder.moment();
    story.unmark(&node, (0..REGIONS).filter(|block| *block != 7 && *block != 299));
    let mut round = 0;
    while story.renamed.lock().unwrap().is_empty() {
        let block = (31 + round) % 290;
        story.mark(&node, block, block);
        story.unmark(
            &node,
            [block].into_iter().filter(|block| *block != 7 && block % 50 != 0),
        );
        round += 1;
        assert!(round < 5_000, "the file is never shortened");
    }
    let shortened = story.renamed.lock().unwrap()[0];
    story.mark(&node, 295, 296);
    story.mark(&node, 120, 121);
    story.flush(&node);
    story.unmark(&node, 0..REGIONS);
    story.close(node);
    let last = story.recorder.moment();
    let shape = Shape {
        size: SIZE,
        blocks_per_region: 1,
    };
    let checked = play(&story, (begin..=evicted).chain(shortened - 12..=last), shape);
    assert!(checked > 150, "{checked} states");
}
