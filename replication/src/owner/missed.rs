//! What a node that left the set has missed, so that it is synced by copying only that when it joins again.
//!
//! Invariant: while an entry of a node stands, every block that was written since the node was last known to have it is in
//! the entry: writes under way when it was given up, and all that were sent since. What the node itself may have lost or has
//! too much of is in its own marks. It is in memory only: behind a takeover everything is copied.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::record::{Extent, Record};
use hearth_protocol::{BlockIndex, NodeId};

use super::Owner;
use super::ops::{Kind, Op};
use crate::mutants::Mutant;
use crate::resync::{Join, Stage};

/// Nodes with an entry; more than may be away at once in a set of usual size.
const NODES_MAX: usize = 8;

/// Blocks of one entry, some megabytes of memory; a node that missed more is copied to in full.
const BLOCKS_MAX: usize = 65_536;

/// What one node has missed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Missed {
    /// The record in force when it was given up.
    pub(super) base: Arc<Record>,
    pub(super) blocks: BTreeSet<BlockIndex>,
}

impl Owner {
    /// A node failed and is to leave the set.
    pub(super) fn give_up(&mut self, node: NodeId) {
        if self.record.members().contains(&node) && !self.missed.contains_key(&node) && self.missed.len() < NODES_MAX {
            let writes = self.ops.values().filter(|op| matches!(op.kind, Kind::Write { .. }));
            let under_way = writes.filter(|op| op.started && !op.done.contains(&node));
            let blocks = under_way.filter_map(Op::extent).flat_map(Extent::blocks).collect();
            let base = self.record.clone();
            self.missed.insert(node.clone(), Missed { base, blocks });
        }
        self.gone.insert(node);
    }

    /// Blocks are written.
    pub(super) fn misses(&mut self, extent: Extent) {
        if self.rules.breaks(Mutant::WritesUnmissed) {
            return;
        }
        self.missed.retain(|_, missed| {
            missed.blocks.extend(extent.blocks());
            missed.blocks.len() <= BLOCKS_MAX
        });
    }

    /// Once a joining node gets all writes, what it has missed is what there is to copy.
    pub(super) fn take_missed(&mut self, join: &mut Join) {
        if join.stage() == Stage::Adding
            && join.gets_all(&self.record)
            && let Some(Missed { base, blocks }) = self.missed.remove(join.node())
        {
            join.missed(base, blocks, self.rules);
        }
    }
}
