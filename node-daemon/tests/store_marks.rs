//! Intent marks of a replica: durable before their blocks change, one sync for many, never gone while a block is marked,
//! and with the life of the store under which they were set first.

mod store_support;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::fault::{Failure, Faults, Site, Verdict};
use hearth_node::store::{REGION_BYTES, StoreError};
use hearth_protocol::{BlockIndex, Incarnation};
use store_support::replica::{Arms, IMAGE, Node, attach_member, extent};
use store_support::{fast_dir, open};

/// Regions of one block each, more than the store keeps marked without need.
const LARGE: (u64, u64) = (300 * REGION_BYTES, REGION_BYTES);
/// Regions that are kept marked without need.
const KEPT: u64 = 256;
/// Two blocks in a region, and a last region of one.
const SMALL: (u64, u64) = (5 * REGION_BYTES + REGION_BYTES / 2, REGION_BYTES / 2);
const SMALL_BLOCKS: u64 = 11;

fn marks_path(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("images").join(IMAGE.to_string()).join("marks")
}

/// Counts calls of a site.
fn counting(site: Site) -> (Faults, Arc<AtomicU64>) {
    let calls = Arc::new(AtomicU64::new(0));
    let counter = calls.clone();
    let faults = Faults::hook(move |call| {
        counter.fetch_add(u64::from(call.site == site), Ordering::SeqCst);
        Ok(Verdict::Go)
    });
    (faults, calls)
}

#[test]
fn a_region_costs_one_sync_and_several_share_one() {
    let dir = fast_dir();
    let (faults, syncs) = counting(Site::MarksAppendSync);
    let node = Node::start(dir.path(), 1, SMALL, faults);
    let step = |node: &Node, first, last, expect| {
        let before = syncs.load(Ordering::SeqCst);
        node.mark(first, last).unwrap();
        assert_eq!(syncs.load(Ordering::SeqCst) - before, expect, "{first} to {last}");
    };
    step(&node, 0, 0, 1);
    step(&node, 0, 0, 0);
    step(&node, 1, 1, 0);
    step(&node, 1, 9, 1);
    step(&node, 0, 9, 0);
    // Not even when nothing in it is marked any more: the next write there is likely.
    node.unmark(0..SMALL_BLOCKS);
    step(&node, 0, 9, 0);
    assert!(matches!(node.mark(10, SMALL_BLOCKS), Err(DiskError::OutOfRange { .. })));
    node.die();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    let expect: Vec<_> = (0..10).collect();
    let found = node.member.marks.found();
    assert_eq!(found.keys().map(|block| block.0).collect::<Vec<_>>(), expect);
    assert!(found.values().all(|life| *life == Incarnation(1)));
}

/// Stops whoever syncs marks until told to go on.
struct Pause {
    node: Arc<Node>,
    reached: Receiver<()>,
    go_on: Sender<()>,
    syncs: Arc<AtomicU64>,
    _dir: tempfile::TempDir,
}

fn pause() -> Pause {
    let dir = fast_dir();
    let (reached_in, reached) = channel();
    let (go_on, go_on_out) = channel();
    let ends = Mutex::new((reached_in, go_on_out));
    let syncs = Arc::new(AtomicU64::new(0));
    let count = syncs.clone();
    let faults = Faults::hook(move |call| {
        if call.site == Site::MarksAppendSync && count.fetch_add(1, Ordering::SeqCst) > 0 {
            let ends = ends.lock().unwrap();
            ends.0.send(()).unwrap();
            ends.1.recv().unwrap();
        }
        Ok(Verdict::Go)
    });
    let node = Arc::new(Node::start(dir.path(), 1, SMALL, faults));
    // The first sync goes through: region 4 is marked.
    node.mark(8, 8).unwrap();
    Pause {
        node,
        reached,
        go_on,
        syncs,
        _dir: dir,
    }
}

#[test]
fn a_write_waits_for_the_mark_that_another_is_making_and_a_marked_one_waits_for_nobody() {
    let pause = pause();
    let (done, finished) = channel();
    let mark = |first: u64| {
        let (node, done) = (pause.node.clone(), done.clone());
        std::thread::spawn(move || {
            node.mark(first, first).unwrap();
            done.send(first).unwrap();
        })
    };
    let first = mark(0);
    pause.reached.recv().unwrap();
    // Region 0 is in the table and not on the disk.
    let second = mark(1);
    let marked = mark(9);
    assert_eq!(finished.recv_timeout(Duration::from_secs(60)), Ok(9));
    assert_eq!(
        finished.recv_timeout(Duration::from_millis(100)),
        Err(RecvTimeoutError::Timeout),
        "a block may change whose mark is not synced"
    );
    pause.go_on.send(()).unwrap();
    for thread in [first, second, marked] {
        thread.join().unwrap();
    }
    assert_eq!(pause.syncs.load(Ordering::SeqCst), 2);
}

#[test]
fn those_who_come_while_a_batch_is_synced_share_the_next_one() {
    let pause = pause();
    let mark = |first: u64| {
        let node = pause.node.clone();
        std::thread::spawn(move || node.mark(first, first).unwrap())
    };
    let mut threads = vec![mark(0)];
    pause.reached.recv().unwrap();
    threads.extend([2, 4, 6, 10].map(mark));
    while pause.node.member.marks.regions() < 6 {
        std::thread::yield_now();
    }
    pause.go_on.send(()).unwrap();
    pause.reached.recv().unwrap();
    pause.go_on.send(()).unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(pause.syncs.load(Ordering::SeqCst), 3);
}

#[test]
fn regions_are_unmarked_when_their_place_is_needed_and_never_while_a_block_is_marked() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    node.mark(0, KEPT - 1).unwrap();
    // All but one are everywhere; the first is written once more, so the second was not written for longest.
    node.unmark((0..KEPT).filter(|block| *block != 7));
    node.mark(0, 0).unwrap();
    node.unmark([0]);
    assert_eq!(node.member.marks.regions() as u64, KEPT);
    node.mark(280, 281).unwrap();
    assert_eq!(node.member.marks.regions() as u64, KEPT);
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    let found: BTreeSet<u64> = node.found(1).into_iter().map(|(region, _)| region).collect();
    let expect: BTreeSet<u64> = (0..KEPT).filter(|r| ![1, 2].contains(r)).chain([280, 281]).collect();
    assert_eq!(found, expect);

    // A guest that never flushes: everything stays marked, however much it is.
    for block in 0..300 {
        node.mark(block, block).unwrap();
    }
    assert_eq!(node.member.marks.regions(), 300);
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    assert_eq!(node.found(1).len(), 300);
    // Once that is everywhere, what is too much goes with the next new region.
    node.unmark(0..300);
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    node.unmark(0..300);
    node.member.volume.detach().unwrap();
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    assert_eq!(node.found(1), [], "closed in order");
}

#[test]
fn the_file_stays_short_however_much_is_written() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    let path = marks_path(&dir);
    node.mark(0, KEPT - 1).unwrap();
    node.unmark(0..KEPT);
    let mut longest = 0;
    let mut expect: Vec<u64> = (0..KEPT).collect();
    for round in 0..4_000 {
        let block = (KEPT + round) % 300;
        node.mark(block, block).unwrap();
        node.unmark([block]);
        if !expect.contains(&block) {
            expect.remove(0);
            expect.push(block);
        }
        longest = longest.max(fs::metadata(&path).unwrap().len());
    }
    assert!((32 << 10..=64 << 10).contains(&longest), "{longest} bytes");
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    expect.sort_unstable();
    let found: Vec<u64> = node.found(1).into_iter().map(|(region, _)| region).collect();
    assert_eq!(found, expect);
    assert!(fs::metadata(&path).unwrap().len() < 32 << 10);
}

#[test]
fn a_mark_keeps_the_life_under_which_its_region_was_marked_first() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    node.mark(0, 3).unwrap();
    node.die();
    // The daemon died, the machine did not.
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    assert_eq!(node.found(2), [(0, 1), (1, 1)]);
    node.die();
    // The machine died: region 0 is made equal, region 1 is not yet, and both are written again.
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    assert_eq!(node.found(2), [(0, 1), (1, 1)]);
    node.unmark([0, 1, 2]);
    node.mark(0, 2).unwrap();
    node.mark(4, 4).unwrap();
    node.die();
    // A death of the daemon alone does not make region 0 look as if the power had failed.
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    assert_eq!(node.found(2), [(0, 2), (1, 1), (2, 2)]);
    node.die();
    let node = Node::start(dir.path(), 3, SMALL, Faults::default());
    assert_eq!(node.found(2), [(0, 2), (1, 1), (2, 2)]);
}

#[test]
fn an_orderly_end_leaves_the_marks_of_blocks_that_are_not_everywhere_and_no_other() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    node.mark(0, 5).unwrap();
    node.unmark([0, 1, 2, 4, 5]);
    let marks = node.member.marks.clone();
    node.member.volume.detach().unwrap();
    assert!(matches!(
        marks.before_write(extent(0, 0), Incarnation(1)),
        Err(DiskError::ShuttingDown)
    ));
    node.die();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    assert_eq!(node.found(2), [(1, 1)]);
    assert!(node.member.volume.recovery().is_none());
    let stale = node.member.marks.clone();
    node.die();
    // Whoever still has the marks of a volume that is gone cannot mark past those of its successor.
    let _node = Node::start(dir.path(), 1, SMALL, Faults::default());
    stale.before_write(extent(8, 8), Incarnation(1)).unwrap_err();
}

#[test]
fn marks_that_cannot_be_written_refuse_the_write_and_leave_nothing_half() {
    let dir = fast_dir();
    let arms = Arms::default();
    let node = Node::start(dir.path(), 1, LARGE, arms.faults());
    // A table full of regions that nobody needs: the next batch unmarks some.
    node.mark(0, KEPT - 1).unwrap();
    node.unmark(0..KEPT);
    for (site, failure) in [
        (Site::MarksAppend, Failure::Enospc),
        (Site::MarksAppend, Failure::ShortEnospc),
        (Site::MarksAppend, Failure::ShortEio),
    ] {
        arms.set([(site, failure)]);
        let refused = node.mark(270, 275).unwrap_err();
        let full = failure != Failure::ShortEio;
        assert_eq!(matches!(refused, DiskError::NoSpace(_)), full, "{refused}");
        assert!(matches!(refused, DiskError::Io { .. }) != full, "{refused}");
    }
    // What failed is not on the disk: the next one of all this says it.
    let node_sees = |dir: &tempfile::TempDir| {
        let copy = fast_dir();
        copy_dir(dir.path(), copy.path());
        let node = Node::start(copy.path(), 1, LARGE, Faults::default());
        node.found(1).into_iter().map(|(region, _)| region).collect::<Vec<_>>()
    };
    assert_eq!(node_sees(&dir), (0..KEPT).collect::<Vec<_>>());
    node.mark(0, 0).unwrap();
    assert_eq!(
        node_sees(&dir),
        (7..KEPT)
            .chain([270, 271, 272, 273, 274, 275])
            .chain([0])
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );

    // Where it cannot be cut off, or a sync fails, the replica has failed.
    arms.set([(Site::MarksAppend, Failure::ShortEio), (Site::MarksCut, Failure::Eio)]);
    assert!(matches!(node.mark(290, 290), Err(DiskError::Poisoned(_))));
    assert!(matches!(node.mark(0, 0), Err(DiskError::Poisoned(_))));
    assert!(matches!(
        node.member.volume.write(0, &[1; 4096], false),
        Err(DiskError::Poisoned(_))
    ));
    arms.set([]);
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    assert!(node.member.failed);
    node.mark(0, 0).unwrap_err();
}

fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    for entry in fs::read_dir(from).unwrap() {
        let (path, to) = {
            let entry = entry.unwrap();
            (entry.path(), to.join(entry.file_name()))
        };
        if path.is_dir() {
            fs::create_dir(&to).unwrap();
            copy_dir(&path, &to);
        } else if path.ends_with("data") {
            let length = fs::metadata(&path).unwrap().len();
            fs::File::create(&to).unwrap().set_len(length).unwrap();
        } else {
            fs::copy(&path, &to).unwrap();
        }
    }
}

#[test]
fn a_failed_sync_of_marks_closes_the_replica_for_good() {
    for power_loss in [false, true] {
        let dir = fast_dir();
        let arms = Arms::default();
        let node = Node::start(dir.path(), 1, SMALL, arms.faults());
        node.mark(0, 0).unwrap();
        arms.set([(Site::MarksAppendSync, Failure::Eio)]);
        assert!(matches!(node.mark(4, 4), Err(DiskError::Poisoned(_))));
        // The next sync would succeed, and says nothing.
        assert!(matches!(node.mark(4, 4), Err(DiskError::Poisoned(_))));
        node.member.volume.detach().unwrap();
        node.die();
        for _ in 0..2 {
            let node = Node::start(dir.path(), if power_loss { 2 } else { 1 }, SMALL, Faults::default());
            assert!(node.member.failed, "power loss: {power_loss}");
            assert!(node.found(2).contains(&(0, 1)));
            node.member.volume.write(0, &[1; 4096], false).unwrap_err();
            node.member.volume.detach().unwrap();
            node.die();
        }
    }
}

#[test]
fn a_file_that_cannot_be_shortened_goes_on_and_is_shortened_later() {
    let dir = fast_dir();
    let arms = Arms::default();
    let node = Node::start(dir.path(), 1, LARGE, arms.faults());
    let path = marks_path(&dir);
    node.mark(0, KEPT - 1).unwrap();
    node.unmark(0..KEPT);
    let mut longest = 0;
    for round in 0..6_000 {
        if longest < 60 << 10 {
            arms.set([(Site::MarksSync, Failure::Enospc)]);
        }
        let block = (KEPT + round) % 300;
        node.mark(block, block).unwrap();
        node.unmark([block]);
        longest = longest.max(fs::metadata(&path).unwrap().len());
    }
    assert!(longest > 100 << 10, "{longest} bytes");
    assert!(fs::metadata(&path).unwrap().len() <= 64 << 10);
    node.die();
    let node = Node::start(dir.path(), 1, LARGE, Faults::default());
    assert_eq!(node.found(1).len() as u64, KEPT);
}

#[test]
fn a_damaged_file_is_named_and_a_torn_end_counts_for_nothing() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    node.mark(0, 0).unwrap();
    node.mark(4, 4).unwrap();
    node.die();
    // Opened again, so that these two are in the part that was written in one piece.
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    let path = marks_path(&dir);
    let whole = fs::metadata(&path).unwrap().len() as usize;
    node.mark(8, 8).unwrap();
    let good = fs::read(&path).unwrap();
    node.die();
    assert_eq!((whole, good.len()), (4 * 32, 6 * 32));
    let store = open(dir.path(), 2, Faults::default());
    let check = |bytes: &[u8], within: usize, what: &str| {
        fs::write(&path, bytes).unwrap();
        match attach_member(&store) {
            Err(StoreError::Damaged { path: named, .. }) => {
                assert!(within < whole && named == path, "{what}");
            }
            Err(err) => panic!("{what}: {err}"),
            Ok(member) => {
                assert!(within >= whole, "{what}: went unseen");
                let found: BTreeSet<u64> = member.marks.found().keys().map(|block| block.0).collect();
                let expect: BTreeSet<u64> = if bytes == good {
                    [0, 1, 4, 5, 8, 9].into()
                } else {
                    [0, 1, 4, 5].into()
                };
                assert_eq!(found, expect, "{what}");
            }
        }
    };
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 4;
        check(&bad, at, &format!("byte {at}"));
        check(&good[..at], at, &format!("cut to {at}"));
    }
    check(&good, good.len(), "as it was");
    fs::remove_file(&path).unwrap();
    let missing = attach_member(&store)
        .err()
        .expect("marks of a replica that was open are missing");
    assert!(
        missing.to_string().contains("marks is damaged: it is missing"),
        "{missing}"
    );
}

#[test]
fn a_region_takes_the_new_life_when_all_its_old_marks_are_made_anew() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SMALL, Faults::default());
    // Region 0 has blocks 0 and 1, region 1 has 2 and 3.
    node.mark(0, 2).unwrap();
    node.die();
    let lives = |node: &Node| -> Vec<(u64, u128)> {
        let found = node.member.marks.found();
        found.iter().map(|(block, life)| (block.0, life.0)).collect()
    };
    let anew = |node: &Node, blocks: &[u64], life: u128| {
        let blocks = blocks.iter().copied().map(BlockIndex).collect();
        node.member.marks.anew(&blocks, Incarnation(life))
    };
    let all_old = [(0, 1), (1, 1), (2, 1), (3, 1)];
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    assert_eq!(lives(&node), all_old);
    anew(&node, &[0], 2).unwrap();
    node.die();
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    assert_eq!(lives(&node), all_old, "one of its marks is still of the earlier life");
    // A block that goes altogether is no old mark any more either.
    anew(&node, &[0], 2).unwrap();
    node.unmark(1..2);
    anew(&node, &[0, 1], 2).unwrap();
    node.die();
    let node = Node::start(dir.path(), 2, SMALL, Faults::default());
    assert_eq!(lives(&node), [(0, 2), (1, 2), (2, 1), (3, 1)]);
    node.die();
    // What cannot be made durable is as before.
    for site in [Site::MarksWrite, Site::MarksRename] {
        let arms = Arms::default();
        let node = Node::start(dir.path(), 2, SMALL, arms.faults());
        arms.set([(site, Failure::Enospc)]);
        assert!(anew(&node, &[2, 3], 2).is_err(), "{site}");
        arms.set([]);
        node.die();
        let node = Node::start(dir.path(), 2, SMALL, Faults::default());
        assert_eq!(lives(&node), [(0, 2), (1, 2), (2, 1), (3, 1)], "{site}");
        node.die();
    }
}
