//! The reference: what clients were told, and what that allows.
//!
//! Each block is a register. The reference keeps every state the register may be in: a value, and which of the writes that
//! were asked and not answered have taken effect. An answer keeps only the states that allow it; if none is left, the
//! history is not linearizable. It is strict over crashes: when a new epoch opens, an unanswered write of an older one has
//! taken effect by then or never will.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::record::{Age, Record};
use hearth_protocol::{Epoch, LeaseId};

use super::world::number;

/// What a block holds: the number of the write that made it, 0 at first.
pub type Value = u8;

/// At most two blocks.
pub const BLOCKS: usize = 2;

/// The values of all blocks.
pub type Bytes = [Value; BLOCKS];

/// One block's possible states.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Register {
    /// (value, bits of the pending writes that took effect).
    states: BTreeSet<(Value, u16)>,
    /// Writes without an answer, with the epoch they were asked in.
    pending: BTreeMap<Value, Epoch>,
    /// Values that may be the durable one: possible at the last acknowledged flush, or later.
    pub floor: BTreeSet<Value>,
    /// The same for flushes without an answer.
    flushes: BTreeMap<u8, BTreeSet<Value>>,
}

impl Default for Register {
    fn default() -> Self {
        Self {
            states: BTreeSet::from([(0, 0)]),
            pending: BTreeMap::new(),
            floor: BTreeSet::from([0]),
            flushes: BTreeMap::new(),
        }
    }
}

impl Register {
    fn close(&mut self) {
        let mut open: Vec<_> = self.states.iter().copied().collect();
        while let Some((_, taken)) = open.pop() {
            for write in self.pending.keys() {
                let bit = 1 << write;
                if taken & bit == 0 && self.states.insert((*write, taken | bit)) {
                    open.push((*write, taken | bit));
                }
            }
        }
    }

    /// Values it may have now.
    pub fn values(&self) -> BTreeSet<Value> {
        self.states.iter().map(|(value, _)| *value).collect()
    }

    fn write(&mut self, value: Value, epoch: Epoch) {
        self.pending.insert(value, epoch);
        self.close();
        self.floor.insert(value);
        for later in self.flushes.values_mut() {
            later.insert(value);
        }
    }

    /// Keeps the states that fulfil `allows`; `false` if there is none.
    fn keep(&mut self, allows: impl Fn(Value, u16) -> bool) -> bool {
        let left: BTreeSet<_> = self.states.iter().copied().filter(|(v, t)| allows(*v, *t)).collect();
        if left.is_empty() {
            return false;
        }
        self.states = left;
        true
    }

    fn forget(&mut self, write: Value) {
        self.pending.remove(&write);
        self.states = self.states.iter().map(|(v, t)| (*v, t & !(1 << write))).collect();
        self.close();
    }
}

/// What a client asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Asked {
    Write { blocks: [bool; BLOCKS] },
    Read { block: usize },
    Flush,
}

/// Properties that can be violated, by name.
pub const VIOLATIONS: [&str; 6] = [ONE_WRITER, LINEARIZABLE, ON_EVERY_MEMBER, DURABLE, ONE_ANSWER, OUTSIDE];
pub const ONE_WRITER: &str = "one writer per epoch, none of an older one";
pub const LINEARIZABLE: &str = "reads and writes of a block are linearizable";
pub const ON_EVERY_MEMBER: &str = "an acknowledged write is on every member of the newest set";
pub const DURABLE: &str = "a flushed write is durable on every member of the newest set";
pub const ONE_ANSWER: &str = "an operation is answered once";
pub const OUTSIDE: &str = "a node outside the set serves no read";

/// Things that must happen in some run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reached {
    TookOver,
    WroteAfterTakeover,
    WroteAfterShrink,
    Joined,
    HandedOver,
    TookAgain,
    WayBack,
    AllLost,
    Frozen,
    Read,
    Flushed,
    Dropped,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ghost {
    pub blocks: [Register; BLOCKS],
    /// Operations without an answer.
    asked: BTreeMap<u8, (Asked, Epoch)>,
    /// Who acknowledged in each epoch.
    writers: BTreeMap<Epoch, (usize, LeaseId)>,
    /// The highest epoch that opened.
    opened: Epoch,
    /// The newest record that ever counted.
    pub newest: Arc<Record>,
    /// The record that the last opened epoch has in force.
    pub in_force: Arc<Record>,
    /// The record that the last granted epoch replaced.
    pub replaced: Arc<Record>,
    /// Nodes that lost power with marked blocks since these were last made equal.
    pub lossy: u8,
    /// Whether the last set change in force left somebody out.
    shrunk: bool,
    /// Whether the log lost its end.
    pub lost_tail: bool,
    violated: u8,
    reached: u16,
}

impl Ghost {
    pub fn new(record: &Arc<Record>, owner: usize) -> Self {
        Self {
            blocks: Default::default(),
            asked: BTreeMap::new(),
            writers: BTreeMap::from([(record.epoch(), (owner, record.grant().1))]),
            opened: record.epoch(),
            newest: record.clone(),
            in_force: record.clone(),
            replaced: record.clone(),
            lossy: 0,
            shrunk: false,
            lost_tail: false,
            violated: 0,
            reached: 0,
        }
    }

    pub fn violate(&mut self, name: &str) {
        let bit = VIOLATIONS
            .iter()
            .position(|known| *known == name)
            .expect("a known name");
        self.violated |= 1 << bit;
    }

    pub fn holds(&self, name: &str) -> bool {
        let bit = VIOLATIONS
            .iter()
            .position(|known| *known == name)
            .expect("a known name");
        self.violated & (1 << bit) == 0
    }

    pub fn reach(&mut self, what: Reached) {
        self.reached |= 1 << what as u16;
    }

    pub fn has_reached(&self, what: Reached) -> bool {
        self.reached & (1 << what as u16) != 0
    }

    /// A client asks.
    pub fn ask(&mut self, op: u8, asked: Asked, epoch: Epoch) {
        self.asked.insert(op, (asked, epoch));
        match asked {
            Asked::Write { blocks } => {
                for (block, _) in blocks.iter().enumerate().filter(|(_, touched)| **touched) {
                    self.blocks[block].write(op, epoch);
                }
            }
            Asked::Flush => {
                for register in &mut self.blocks {
                    let now = register.values();
                    register.flushes.insert(op, now);
                }
            }
            Asked::Read { .. } => {}
        }
    }

    /// An owner answers: done; a read with these bytes of that node.
    pub fn acknowledge(&mut self, op: u8, by: (usize, Epoch, LeaseId), served_by: usize, bytes: Bytes) {
        let (node, epoch, lease) = by;
        let Some((asked, _)) = self.asked.remove(&op) else {
            return self.violate(ONE_ANSWER);
        };
        let known = self.writers.entry(epoch).or_insert((node, lease));
        if *known != (node, lease) || epoch < self.opened {
            self.violate(ONE_WRITER);
        }
        let mut possible = true;
        match asked {
            Asked::Write { blocks } => {
                for (block, _) in blocks.iter().enumerate().filter(|(_, touched)| **touched) {
                    let register = &mut self.blocks[block];
                    possible &= register.keep(|_, taken| taken & (1 << op) != 0);
                    register.forget(op);
                }
                if self.in_force.epoch() > self.replaced.epoch() {
                    self.reach(Reached::WroteAfterTakeover);
                }
                if self.shrunk {
                    self.reach(Reached::WroteAfterShrink);
                }
            }
            Asked::Read { block } => {
                self.reach(Reached::Read);
                let got = bytes[block];
                let inside = self.in_force.members().iter().any(|node| number(node) == served_by);
                if !inside {
                    self.violate(OUTSIDE);
                }
                let register = &mut self.blocks[block];
                possible &= register.keep(|value, _| value == got);
                register.close();
            }
            Asked::Flush => {
                self.reach(Reached::Flushed);
                for register in &mut self.blocks {
                    if let Some(floor) = register.flushes.remove(&op) {
                        register.floor = floor;
                    }
                }
            }
        }
        if !possible {
            self.violate(LINEARIZABLE);
        }
    }

    /// An owner answers: not done, or not known to be. A write may still take effect.
    pub fn deny(&mut self, op: u8) {
        if self.asked.remove(&op).is_none() {
            self.violate(ONE_ANSWER);
        }
        for register in &mut self.blocks {
            register.flushes.remove(&op);
        }
    }

    /// A change counts in the log.
    pub fn counted(&mut self, old: &Arc<Record>, new: &Arc<Record>) {
        if new.age(&self.newest) == Age::Newer {
            self.newest = new.clone();
        }
        if new.epoch() != old.epoch() {
            self.replaced = old.clone();
        }
    }

    /// A set change is in force.
    pub fn set_changed(&mut self, record: Arc<Record>) {
        self.shrunk = record.members().len() < self.in_force.members().len();
        self.in_force = record;
    }

    /// An epoch opens.
    pub fn open(&mut self, node: usize, record: &Arc<Record>, all_lost: bool) {
        let epoch = record.epoch();
        // An epoch that opens behind a newer one finds every member fenced; what counts is that it answers nothing.
        if epoch < self.opened {
            return;
        }
        self.opened = epoch;
        let known = *self.writers.entry(epoch).or_insert((node, record.grant().1));
        if known != (node, record.grant().1) {
            self.violate(ONE_WRITER);
        }
        for register in &mut self.blocks {
            let old: Vec<Value> = register
                .pending
                .iter()
                .filter(|(_, asked)| **asked < epoch)
                .map(|(write, _)| *write)
                .collect();
            if all_lost {
                let floor: Vec<_> = register.floor.iter().map(|value| (*value, 0)).collect();
                register.states.extend(floor);
                register.close();
            }
            for write in old {
                register.forget(write);
            }
            // What was in doubt is equal and durable before it opens.
            register.floor = register.values();
        }
        if self.newest.age(record) != Age::Newer {
            self.newest = record.clone();
        }
        self.in_force = record.clone();
        self.shrunk = false;
        self.reach(Reached::TookOver);
        if all_lost {
            self.reach(Reached::AllLost);
        }
    }
}
