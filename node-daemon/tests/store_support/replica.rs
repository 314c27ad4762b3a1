//! A replica as the store's tests use it.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use hearth_node::store::fault::{Arm, Failure, Faults, Site, Verdict};
use hearth_node::store::{NewReplica, Store, StoreError};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{MemberVolume, NoPeers, Volume};
use hearth_protocol::record::{Extent, Record, Run, Stamp};
use hearth_protocol::{BlockIndex, Epoch, ImageId, Incarnation, LayerId, LeaseId, SetVersion};
use hearth_replication::member::Durable;

use super::open;

pub const IMAGE: ImageId = ImageId(0x11);
pub const LAYER: LayerId = LayerId(0x22);

/// How the tests' replica is made.
pub fn new_replica(size: u64, block_size: u64, durable: Option<Durable>) -> NewReplica {
    NewReplica {
        image: IMAGE,
        name: "p/shared".parse().unwrap(),
        size,
        block_size,
        layer: LAYER,
        durable,
    }
}

/// What a member keeps under an epoch.
pub fn durable(epoch: u64) -> Durable {
    let stamp = Stamp {
        epoch: Epoch(epoch),
        lease: LeaseId(epoch.into()),
        set_version: SetVersion(epoch),
    };
    let run = Run {
        first: BlockIndex(0),
        members: ["a", "b"].map(|node| node.parse().unwrap()).into(),
        joiners: BTreeSet::new(),
    };
    Durable {
        record: Some(Arc::new(Record::new(stamp, vec![run]).unwrap())),
        sealed: (epoch % 2 == 1).then_some((Epoch(epoch), LeaseId(epoch.into()))),
    }
}

pub fn tier() -> Arc<RamTier> {
    RamTier::new(TierOptions {
        capacity_bytes: 512 << 10,
        front_percent: 50,
        lock: false,
    })
    .unwrap()
}

pub fn attach_member(store: &Arc<Store>) -> Result<MemberVolume, StoreError> {
    Volume::attach_member(store.clone(), tier(), IMAGE, Arc::new(NoPeers))
}

/// A store with the replica, both open.
pub struct Node {
    pub store: Arc<Store>,
    pub member: MemberVolume,
}

impl Node {
    /// Makes the replica if it is not there.
    pub fn start(dir: &Path, incarnation: u128, shape: (u64, u64), faults: Faults) -> Self {
        let store = open(dir, incarnation, faults);
        store.create_replica(&new_replica(shape.0, shape.1, None)).unwrap();
        let member = attach_member(&store).unwrap();
        Self { store, member }
    }

    /// Marks blocks, both ends included, under the store's life.
    pub fn mark(&self, first: u64, last: u64) -> Result<(), hearth_node::disk::DiskError> {
        self.member
            .marks
            .before_write(extent(first, last), self.member.incarnation)
    }

    pub fn unmark(&self, blocks: impl IntoIterator<Item = u64>) {
        self.member.marks.unmark(&set(blocks));
    }

    /// Regions found when it was opened, by their first blocks, with the life that marked them first.
    pub fn found(&self, blocks_per_region: u64) -> Vec<(u64, u128)> {
        let marks = self.member.marks.found();
        let first = marks.iter().filter(|(block, _)| block.0 % blocks_per_region == 0);
        first
            .map(|(block, Incarnation(life))| (block.0 / blocks_per_region, *life))
            .collect()
    }

    /// Ends as the death of the daemon does.
    pub fn die(self) {
        let Self { store, member } = self;
        drop(member);
        while Arc::strong_count(&store) > 1 {
            std::thread::yield_now();
        }
    }
}

pub fn extent(first: u64, last: u64) -> Extent {
    Extent {
        first: BlockIndex(first),
        last: BlockIndex(last),
    }
}

pub fn set(blocks: impl IntoIterator<Item = u64>) -> BTreeSet<BlockIndex> {
    blocks.into_iter().map(BlockIndex).collect()
}

/// Faults that can be put in place later; all of them count.
#[derive(Clone, Default)]
pub struct Arms(Arc<Mutex<Vec<Arm>>>);

impl Arms {
    pub fn faults(&self) -> Faults {
        let arms = self.clone();
        Faults::hook(move |call| {
            let arms = arms.0.lock().unwrap();
            arms.iter()
                .try_fold(Verdict::Go, |verdict, arm| match arm.answer(call)? {
                    Verdict::Go => Ok(verdict),
                    short => Ok(short),
                })
        })
    }

    pub fn set(&self, arms: impl IntoIterator<Item = (Site, Failure)>) {
        let arms = arms
            .into_iter()
            .map(|(site, failure)| Arm::new(site, failure, 0, false));
        *self.0.lock().unwrap() = arms.collect();
    }
}
