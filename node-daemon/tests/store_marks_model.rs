//! Intent marks against a model, over every crash, and with many writers at once.

mod store_support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hearth_node::store::REGION_BYTES;
use hearth_node::store::fault::{Failure, Faults, Site, Verdict};
use proptest::prelude::*;
use store_support::fast_dir;
use store_support::replica::{Arms, Node};

/// Two blocks in a region, and a last region of one.
const SMALL: (u64, u64) = (5 * REGION_BYTES + REGION_BYTES / 2, REGION_BYTES / 2);
const SMALL_BLOCKS: u64 = 11;

/// Many writers of regions that they share, more than stay marked, on a disk that is full now and then.
#[test]
fn whatever_many_writers_marked_is_found() {
    const WRITERS: u64 = 4;
    const BLOCKS: u64 = 1_200;
    let shape = (BLOCKS / 4 * REGION_BYTES, REGION_BYTES / 4);
    for seed in 0..3 {
        let dir = fast_dir();
        let calls = AtomicU64::new(seed * 7);
        let faults = Faults::hook(move |call| match call.site {
            Site::MarksAppend if calls.fetch_add(1, Ordering::SeqCst) % 23 == 22 => {
                Err(std::io::Error::from_raw_os_error(libc::ENOSPC))
            }
            _ => Ok(Verdict::Go),
        });
        let node = Arc::new(Node::start(dir.path(), 1, shape, faults));
        let writer = |writer: u64| {
            let node = node.clone();
            std::thread::spawn(move || {
                let mut marked: BTreeSet<u64> = BTreeSet::new();
                let mut random = seed * WRITERS + writer + 1;
                for _ in 0..4_000 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Each has a block of every region.
                    let block = random % (BLOCKS / WRITERS) * WRITERS + writer;
                    if random >> 32 & 7 != 0 {
                        if node.mark(block, block).is_ok() {
                            marked.insert(block);
                        }
                    } else {
                        let (gone, left): (BTreeSet<u64>, _) =
                            marked.into_iter().partition(|other| (other ^ block) & 64 == 0);
                        marked = left;
                        node.unmark(gone);
                    }
                }
                marked
            })
        };
        let threads: Vec<_> = (0..WRITERS).map(writer).collect();
        let marked: BTreeSet<u64> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        Arc::into_inner(node).expect("all writers ended").die();
        let node = Node::start(dir.path(), 1, shape, Faults::default());
        let found: BTreeSet<u64> = node.member.marks.found().keys().map(|block| block.0).collect();
        assert!(marked.is_subset(&found), "seed {seed}: lost {:?}", &marked - &found);
        assert!(!marked.is_empty(), "seed {seed}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Mark(u64, u64),
    /// Blocks by their bits.
    Unmark(u64),
    /// The next append meets a full disk.
    Full(u64, u64),
    Kill,
    PowerLoss,
    Close,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let extent = (0..SMALL_BLOCKS, 0..4u64).prop_map(|(first, more)| (first, (first + more).min(SMALL_BLOCKS - 1)));
    let step = prop_oneof![
        6 => extent.clone().prop_map(|(first, last)| Step::Mark(first, last)),
        5 => (0..1u64 << SMALL_BLOCKS).prop_map(Step::Unmark),
        1 => extent.prop_map(|(first, last)| Step::Full(first, last)),
        1 => Just(Step::Kill),
        1 => Just(Step::PowerLoss),
        1 => Just(Step::Close),
    ];
    prop::collection::vec(step, 1..40)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    under: u128,
    on_disk: Option<u128>,
    /// Which of its two blocks are marked.
    blocks: u64,
}

/// What marks must be, said as simply as it can be.
#[derive(Default)]
struct Model(BTreeMap<u64, Known>);

impl Model {
    /// Whether a mark needs the disk.
    fn mark(&mut self, first: u64, last: u64, now: u128) -> bool {
        let mut asks = false;
        for block in first..=last {
            let region = self.0.entry(block / 2).or_insert(Known {
                under: now,
                on_disk: None,
                blocks: 0,
            });
            if region.blocks == 0 && region.under != now {
                (region.under, region.on_disk) = (now, region.on_disk);
            }
            region.blocks |= 1 << (block % 2);
        }
        for region in first / 2..=last / 2 {
            let region = &self.0[&region];
            asks |= region.on_disk != Some(region.under);
        }
        asks
    }

    fn written(&mut self) {
        self.0
            .values_mut()
            .for_each(|region| region.on_disk = Some(region.under));
    }

    /// What is found after a crash; everything in those regions is marked then.
    fn reopen(&mut self) -> Vec<(u64, u128)> {
        self.0.retain(|_, region| region.on_disk.is_some());
        for (at, region) in &mut self.0 {
            region.under = region.on_disk.expect("others are gone");
            region.blocks = if *at == SMALL_BLOCKS / 2 { 1 } else { 3 };
        }
        self.0.iter().map(|(at, region)| (*at, region.under)).collect()
    }
}

fn play(steps: Vec<Step>) {
    let dir = fast_dir();
    let arms = Arms::default();
    let mut life = 1;
    let mut model = Model::default();
    let mut node = Node::start(dir.path(), life, SMALL, arms.faults());
    for step in steps {
        match step {
            Step::Mark(first, last) => {
                node.mark(first, last).unwrap();
                if model.mark(first, last, life) {
                    model.written();
                }
            }
            Step::Unmark(bits) => {
                node.unmark((0..SMALL_BLOCKS).filter(|block| bits >> block & 1 == 1));
                for (at, region) in &mut model.0 {
                    region.blocks &= !(bits >> (at * 2));
                }
            }
            Step::Full(first, last) => {
                arms.set([(Site::MarksAppend, Failure::ShortEnospc)]);
                let asks = model.mark(first, last, life);
                assert_eq!(node.mark(first, last).is_err(), asks);
                arms.set([]);
            }
            Step::Kill | Step::PowerLoss | Step::Close => {
                if matches!(step, Step::Close) {
                    node.member.volume.detach().unwrap();
                    model.0.retain(|_, region| region.blocks != 0);
                    model.written();
                }
                node.die();
                life += u128::from(matches!(step, Step::PowerLoss));
                node = Node::start(dir.path(), life, SMALL, arms.faults());
                assert_eq!(node.found(2), model.reopen());
            }
        }
    }
    node.die();
    let node = Node::start(dir.path(), life, SMALL, Faults::default());
    assert_eq!(node.found(2), model.reopen());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if store_support::long() { 2_000 } else { 150 }))]
    #[test]
    fn marks_are_what_the_model_says_over_every_crash(steps in steps()) {
        play(steps);
    }
}
