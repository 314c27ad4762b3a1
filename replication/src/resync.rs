//! How a node that joins comes in sync, seen from the owner (rule 7).
//!
//! Writes go to the joining node as soon as the record that names it is in force. Then the blocks are copied, some at once,
//! each copy while no write overlaps it. Then everybody flushes: the joining node what it was given, and the members what they never
//! marked while there was only one copy. Only then the joining node is proposed as a member.
//!
//! A join that is paused begins no more copies. It stays a joiner, so that nothing written meanwhile has to be copied again.
//!
//! A node that was a member in this session before is copied only what it has missed, and what it has marked itself.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::{BlockIndex, NodeId};

use crate::mutants::{Mutant, Rules};
use crate::request::{Extent, Standing};
use hearth_protocol::record::{Record, RecordError};

/// Copies under way at once: while one is read another is written, and clients' writes wait for few of them.
pub const COPIES_MAX: usize = 4;

/// How far a node has joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The record that names it as a joiner is not in force yet.
    Adding,
    /// Blocks are copied, those from this one on are still to be begun.
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
    /// Copy these blocks from a member that holds all of them.
    Copy(Extent),
    /// Wait until what is under way has ended.
    Wait,
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
    /// Blocks of one copy.
    blocks: u64,
    /// Blocks that may still be copied for now; `None`: all.
    allowed: Option<u64>,
    stage: Stage,
    /// The record that the node had before it joined, and the blocks it has marked.
    told: Option<(Arc<Record>, BTreeSet<BlockIndex>)>,
    changed: Option<Changed>,
    /// Nothing more is copied for now; writes go to the node all the same.
    paused: bool,
}

/// What is to be copied to a node that was a member in this session before.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Changed {
    /// The records that say where it was one: its own, and the one in force when it left.
    member_by: [Arc<Record>; 2],
    /// There, these blocks.
    blocks: BTreeSet<BlockIndex>,
}

impl Join {
    /// A node that is to join an extent of an image whose last block is `end`, by copies of so many blocks; no further ones
    /// than allowed are begun.
    pub fn new(node: NodeId, mut extent: Extent, end: BlockIndex, blocks: u64, allowed: Option<u64>) -> Self {
        // The last run reaches beyond the image's end. Cut there, it would leave blocks that no write ever touches, and
        // whose members could never leave.
        if extent.last >= end {
            extent.last = BlockIndex(u64::MAX);
        }
        Self {
            node,
            extent,
            end,
            blocks: blocks.max(1),
            allowed,
            stage: Stage::Adding,
            told: None,
            changed: None,
            paused: false,
        }
    }

    /// The node has recorded that it joins.
    pub fn told(&mut self, standing: &Standing) {
        let before = standing.before.clone();
        self.told = before.map(|before| (before, standing.doubt.clone()));
    }

    /// It left in this session, and has missed these blocks since. Where it was a member, by its own record of this session
    /// and by the one in force when it left, only these are copied, and those that it has marked itself: what it wrote and
    /// others did not, and what it may have lost with its power.
    pub fn missed(&mut self, base: Arc<Record>, mut blocks: BTreeSet<BlockIndex>, rules: Rules) {
        let Some((before, marked)) = self.told.take() else {
            return;
        };
        if before.grant() == base.grant() {
            if !rules.breaks(Mutant::MarkedUncopied) {
                blocks.extend(marked);
            }
            let member_by = [before, base];
            self.changed = Some(Changed { member_by, blocks });
        }
    }

    /// Begins no more copies, or goes on with them.
    pub fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Whether no more copies are begun.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether only what changed is copied, as far as the node was a member.
    pub fn copies_changes(&self) -> bool {
        self.changed.is_some()
    }

    /// Whether all writes to the extent go to the node.
    pub fn gets_all(&self, record: &Record) -> bool {
        record.touched(self.extent).all(|run| self.gets_writes(run))
    }

    /// So many blocks more may be copied, whatever was left; `None`: all.
    pub fn allow(&mut self, blocks: Option<u64>) {
        self.allowed = blocks;
    }

    /// Which node.
    pub fn node(&self) -> &NodeId {
        &self.node
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The block that is to be copied next.
    pub fn copied_up_to(&self) -> BlockIndex {
        match self.stage {
            Stage::Adding => self.extent.first,
            Stage::Copying(block) => block,
            Stage::Flushing | Stage::Promoting => self.extent.last.min(self.end).next(),
        }
    }

    /// What to do next, given the record in force and how much for this node is under way.
    ///
    /// # Errors
    /// The location map would have too many runs.
    pub fn todo(&mut self, record: &Record, rules: Rules, under_way: usize) -> Result<Todo, RecordError> {
        if self.stage == Stage::Adding && self.gets_all(record) {
            self.stage = Stage::Copying(self.extent.first);
        }
        if let Stage::Copying(from) = self.stage {
            match self.next(record, from) {
                Some(copy) if under_way < COPIES_MAX && self.allowed != Some(0) && !self.paused => {
                    let blocks = copy.last.0 - copy.first.0 + 1;
                    self.allowed = self.allowed.map(|allowed| allowed.saturating_sub(blocks));
                    self.stage = Stage::Copying(copy.last.next());
                    return Ok(Todo::Copy(copy));
                }
                None if under_way == 0 => self.stage = Stage::Flushing,
                _ => {}
            }
        }
        if under_way > 0 {
            return Ok(Todo::Wait);
        }
        match self.stage {
            Stage::Adding => record.with_joiner(&self.node, self.extent).map(Todo::Propose),
            Stage::Copying(_) => Ok(Todo::Wait),
            Stage::Flushing if !rules.breaks(Mutant::JoinBeforeFlush) => Ok(Todo::Flush),
            Stage::Flushing | Stage::Promoting if record.holds(&self.node, self.extent) => Ok(Todo::Joined),
            Stage::Flushing | Stage::Promoting => record.with_member(&self.node, self.extent).map(Todo::Propose),
        }
    }

    /// The next blocks to copy: of one run, so that one member holds all of them.
    fn next(&self, record: &Record, from: BlockIndex) -> Option<Extent> {
        let last = self.extent.last.min(self.end);
        if from > last {
            return None;
        }
        let left = Extent { first: from, last };
        let mut runs = record.touched(left).peekable();
        while let Some(run) = runs.next() {
            let behind = runs.peek().map(|next| BlockIndex(next.first.0 - 1));
            if !run.joiners.contains(&self.node) {
                continue;
            }
            let first = run.first.max(from);
            let last = last.min(behind.unwrap_or(last));
            let first = match self.unchanged(Extent { first, last }) {
                None => first,
                Some(changed) => match changed.range(first..=last).next() {
                    Some(block) => *block,
                    None => continue,
                },
            };
            let mut end = BlockIndex(first.0.saturating_add(self.blocks - 1)).min(last);
            if let Some(changed) = self.unchanged(Extent { first, last }) {
                let gap = |block: &BlockIndex| !changed.contains(block);
                let next = Extent { first, last: end }.blocks().find(gap);
                end = next.map_or(end, |gap| BlockIndex(gap.0 - 1));
            }
            return Some(Extent { first, last: end });
        }
        None
    }

    /// The blocks to copy of an extent in which the node was a member; `None` if all of it is to be copied.
    fn unchanged(&self, extent: Extent) -> Option<&BTreeSet<BlockIndex>> {
        let changed = self.changed.as_ref()?;
        let held = changed.member_by.iter().all(|record| record.holds(&self.node, extent));
        held.then_some(&changed.blocks)
    }

    fn gets_writes(&self, run: &hearth_protocol::record::Run) -> bool {
        run.joiners.contains(&self.node) || run.members.contains(&self.node)
    }

    /// Everybody has flushed.
    pub fn flushed(&mut self) {
        self.stage = Stage::Promoting;
    }
}
