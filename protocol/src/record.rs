//! The record: epoch, lease, set version and location map, durable on every member. What a node may do follows from it.
//!
//! Invariants: the first run begins at block 0, runs ascend, neighbours differ, each run has at least one member, nobody
//! is member and joiner of one run, and there are at most [`RUNS_MAX`] runs.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::ids::{LeaseId, NodeId};
use crate::units::{BlockIndex, Epoch, SetVersion};

/// Runs of one location map.
pub const RUNS_MAX: usize = 4_096;

/// A set of nodes, ascending by id.
pub type Nodes = BTreeSet<NodeId>;

/// What a record is known by in requests; a member compares it with its durable record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// The epoch.
    pub epoch: Epoch,
    /// The lease that the epoch was granted to.
    pub lease: LeaseId,
    /// The location map's version.
    pub set_version: SetVersion,
}

/// A run of blocks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The first block.
    pub first: BlockIndex,
    /// The last block.
    pub last: BlockIndex,
}

impl Extent {
    /// One block.
    pub const fn block(block: BlockIndex) -> Self {
        Self {
            first: block,
            last: block,
        }
    }

    /// Whether both share a block.
    pub fn overlaps(self, other: Extent) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The blocks, ascending.
    pub fn blocks(self) -> impl Iterator<Item = BlockIndex> {
        (self.first.0..=self.last.0).map(BlockIndex)
    }
}

/// Blocks from `first` up to the next run, held by the same nodes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Run {
    /// The first block.
    pub first: BlockIndex,
    /// Nodes that hold every acknowledged write to these blocks.
    pub members: Nodes,
    /// Nodes that get all writes and are being synced.
    pub joiners: Nodes,
}

/// Why a location map is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Block 0 is in no run, or runs do not ascend.
    #[error("the location map's runs do not begin at block 0 and ascend: the record is damaged, take another member's")]
    Order,
    /// A run would have no member.
    #[error("block {first} and those behind it would have no copy left: add a location and wait until it is in sync")]
    LastCopy {
        /// The run.
        first: BlockIndex,
    },
    /// A node cannot be both.
    #[error("node {node} is member and joiner of block {first}: the record is damaged, take another member's")]
    Both {
        /// The run.
        first: BlockIndex,
        /// The node.
        node: NodeId,
    },
    /// Too many runs.
    #[error("the location map would have {runs} runs, {RUNS_MAX} is the limit: change locations of larger extents")]
    Runs {
        /// How many.
        runs: usize,
    },
}

/// How old a record is, seen from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    /// The same record.
    Same,
    /// A newer one.
    Newer,
    /// An older one.
    Older,
    /// Neither: one epoch with two leases, or one stamp with two maps. The log gave out something twice.
    Conflict,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Record {
    stamp: Stamp,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Unchecked {
    stamp: Stamp,
    runs: Vec<Run>,
}

impl TryFrom<Unchecked> for Record {
    type Error = RecordError;

    fn try_from(from: Unchecked) -> Result<Self, RecordError> {
        Self::new(from.stamp, from.runs)
    }
}

impl Record {
    /// Checks the runs and merges equal neighbours.
    ///
    /// # Errors
    /// The runs break an invariant of the module.
    pub fn new(stamp: Stamp, runs: Vec<Run>) -> Result<Self, RecordError> {
        if runs.first().is_none_or(|run| run.first != BlockIndex(0)) {
            return Err(RecordError::Order);
        }
        let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
        for run in runs {
            if run.members.is_empty() {
                return Err(RecordError::LastCopy { first: run.first });
            }
            if let Some(node) = run.members.intersection(&run.joiners).next() {
                return Err(RecordError::Both {
                    first: run.first,
                    node: node.clone(),
                });
            }
            match merged.last() {
                Some(last) if last.first >= run.first => return Err(RecordError::Order),
                Some(last) if last.members == run.members && last.joiners == run.joiners => {}
                _ => merged.push(run),
            }
        }
        if merged.len() > RUNS_MAX {
            return Err(RecordError::Runs { runs: merged.len() });
        }
        Ok(Self { stamp, runs: merged })
    }

    /// What requests under this record carry.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// The epoch.
    pub fn epoch(&self) -> Epoch {
        self.stamp.epoch
    }

    /// The epoch and the lease it was granted to.
    pub fn grant(&self) -> (Epoch, LeaseId) {
        (self.stamp.epoch, self.stamp.lease)
    }

    /// The runs, ascending.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// How old this record is, seen from `other`.
    pub fn age(&self, other: &Record) -> Age {
        let (mine, its) = (self.stamp, other.stamp);
        match mine.epoch.cmp(&its.epoch) {
            Ordering::Less => Age::Older,
            Ordering::Greater => Age::Newer,
            Ordering::Equal if mine.lease != its.lease => Age::Conflict,
            Ordering::Equal => match mine.set_version.cmp(&its.set_version) {
                Ordering::Less => Age::Older,
                Ordering::Greater => Age::Newer,
                Ordering::Equal if self == other => Age::Same,
                Ordering::Equal => Age::Conflict,
            },
        }
    }

    /// The runs that an extent touches.
    pub fn touched(&self, extent: Extent) -> impl Iterator<Item = &Run> {
        let from = self.runs.partition_point(|run| run.first <= extent.first) - 1;
        self.runs[from..].iter().take_while(move |run| run.first <= extent.last)
    }

    /// The members of the runs that an extent touches.
    pub fn members_of(&self, extent: Extent) -> Nodes {
        self.touched(extent).flat_map(|run| run.members.clone()).collect()
    }

    /// Members and joiners of the runs that an extent touches.
    pub fn targets_of(&self, extent: Extent) -> Nodes {
        self.touched(extent)
            .flat_map(|run| run.members.union(&run.joiners).cloned())
            .collect()
    }

    /// The members of any run.
    pub fn members(&self) -> Nodes {
        self.runs.iter().flat_map(|run| run.members.clone()).collect()
    }

    /// Members and joiners of any run.
    pub fn everyone(&self) -> Nodes {
        self.runs
            .iter()
            .flat_map(|run| run.members.union(&run.joiners).cloned())
            .collect()
    }

    /// Whether the node is a member of every run that the extent touches.
    pub fn holds(&self, node: &NodeId, extent: Extent) -> bool {
        self.touched(extent).all(|run| run.members.contains(node))
    }

    /// Whether the node is member or joiner of a run that the extent touches.
    pub fn concerns(&self, node: &NodeId, extent: Extent) -> bool {
        self.touched(extent)
            .any(|run| run.members.contains(node) || run.joiners.contains(node))
    }

    /// The next set version without some nodes.
    ///
    /// # Errors
    /// A run would have no member.
    pub fn without(&self, nodes: &Nodes) -> Result<Self, RecordError> {
        let runs = self.runs.iter().map(|run| Run {
            first: run.first,
            members: &run.members - nodes,
            joiners: &run.joiners - nodes,
        });
        Self::new(self.next_set(), runs.collect())
    }

    /// The next set version with a joiner of an extent. Where the node is a member nothing changes.
    ///
    /// # Errors
    /// Too many runs.
    pub fn with_joiner(&self, node: &NodeId, extent: Extent) -> Result<Self, RecordError> {
        self.edit(extent, |run| {
            if !run.members.contains(node) {
                run.joiners.insert(node.clone());
            }
        })
    }

    /// The next set version in which a joiner of an extent is a member of it.
    ///
    /// # Errors
    /// Too many runs.
    pub fn with_member(&self, node: &NodeId, extent: Extent) -> Result<Self, RecordError> {
        self.edit(extent, |run| {
            if run.joiners.remove(node) {
                run.members.insert(node.clone());
            }
        })
    }

    /// The next epoch under another lease: of each run, the members among `nodes`; joiners are dropped.
    ///
    /// # Errors
    /// A run would have no member.
    pub fn granted(&self, lease: LeaseId, nodes: &Nodes) -> Result<Self, RecordError> {
        let stamp = Stamp {
            epoch: self.stamp.epoch.next(),
            lease,
            set_version: self.stamp.set_version.next(),
        };
        let runs = self.runs.iter().map(|run| Run {
            first: run.first,
            members: &run.members & nodes,
            joiners: Nodes::new(),
        });
        Self::new(stamp, runs.collect())
    }

    fn next_set(&self) -> Stamp {
        Stamp {
            set_version: self.stamp.set_version.next(),
            ..self.stamp
        }
    }

    /// The next set version with runs split at the extent's borders and changed within.
    fn edit(&self, extent: Extent, change: impl Fn(&mut Run)) -> Result<Self, RecordError> {
        let mut runs: Vec<Run> = Vec::new();
        for (at, run) in self.runs.iter().enumerate() {
            let end = self.runs.get(at + 1).map(|next| next.first);
            let behind = BlockIndex(extent.last.0.saturating_add(1));
            let within = |block: BlockIndex| block > run.first && end.is_none_or(|end| block < end);
            let mut starts = vec![run.first];
            starts.extend([extent.first, behind].into_iter().filter(|block| within(*block)));
            starts.dedup();
            for first in starts {
                let mut piece = Run { first, ..run.clone() };
                if first >= extent.first && first <= extent.last {
                    change(&mut piece);
                }
                runs.push(piece);
            }
        }
        Self::new(self.next_set(), runs)
    }
}
