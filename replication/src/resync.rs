//! How a node that joins comes in sync, seen from the owner (rule 7).
//!
//! Writes go to the joining node as soon as the record that names it is in force. Then block after block is copied, each
//! while no write overlaps it. Then everybody flushes: the joining node what it was given, and the members what they never
//! marked while there was only one copy. Only then the joining node is proposed as a member.

use hearth_protocol::{BlockIndex, NodeId};

use crate::mutants::{Mutant, Rules};
use crate::request::Extent;
use hearth_protocol::record::{Record, RecordError};

/// How far a node has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The record that names it as a joiner is not in force yet.
    Adding,
    /// This block is to be copied next.
    Copying(BlockIndex),
    /// Every block is copied; a flush is to make it durable.
    Flushing,
    /// It is to become a member.
    Promoting,
}

/// What the owner has to do for a joining node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Todo {
    /// Propose this record.
    Propose(Record),
    /// Copy this block from a member.
    Copy(BlockIndex),
    /// Flush everywhere.
    Flush,
    /// It is a member.
    Joined,
}

/// One node that joins an extent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Join {
    node: NodeId,
    extent: Extent,
    end: BlockIndex,
    stage: Stage,
}

impl Join {
    /// A node that is to join an extent of an image whose last block is `end`.
    pub fn new(node: NodeId, extent: Extent, end: BlockIndex) -> Self {
        Self {
            node,
            extent,
            end,
            stage: Stage::Adding,
        }
    }

    /// Which node.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// What to do next, given the record in force and that nothing for this node is under way.
    ///
    /// # Errors
    /// The location map would have too many runs.
    pub fn todo(&mut self, record: &Record, rules: Rules) -> Result<Todo, RecordError> {
        if self.stage == Stage::Adding && record.touched(self.extent).all(|run| self.gets_writes(run)) {
            self.stage = Stage::Copying(self.extent.first);
        }
        match self.stage {
            Stage::Adding => record.with_joiner(&self.node, self.extent).map(Todo::Propose),
            Stage::Copying(block) => Ok(Todo::Copy(block)),
            Stage::Flushing if !rules.breaks(Mutant::JoinBeforeFlush) => Ok(Todo::Flush),
            Stage::Flushing | Stage::Promoting if record.holds(&self.node, self.extent) => Ok(Todo::Joined),
            Stage::Flushing | Stage::Promoting => record.with_member(&self.node, self.extent).map(Todo::Propose),
        }
    }

    fn gets_writes(&self, run: &hearth_protocol::record::Run) -> bool {
        run.joiners.contains(&self.node) || run.members.contains(&self.node)
    }

    /// The block was copied.
    pub fn copied(&mut self, block: BlockIndex) {
        self.stage = if block < self.extent.last.min(self.end) {
            Stage::Copying(block.next())
        } else {
            Stage::Flushing
        };
    }

    /// Everybody has flushed.
    pub fn flushed(&mut self) {
        self.stage = Stage::Promoting;
    }
}
