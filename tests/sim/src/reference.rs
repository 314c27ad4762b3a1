//! The reference: what clients of one image were told, and what that allows.
//!
//! Each block is a register with every state it may be in: a value, and which of the unanswered writes have taken effect. An
//! answer keeps only the states that allow it; if none is left, the history is not linearizable. It is strict over
//! takeovers: when an epoch opens, an unanswered write of an older one has taken effect by then or never will, so a write
//! that was never acknowledged may be there or not, but does not flicker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::record::{Extent, Record};
use hearth_protocol::{Epoch, LeaseId, NodeId};
use hearth_replication::owner::{Ask, OpId};

use crate::disk::Value;

/// Unanswered writes of one block; more are not asked, so that the states stay few.
pub const PENDING_MAX: usize = 4;

/// One block.
#[derive(Debug, Clone)]
struct Register {
    states: BTreeSet<(Value, BTreeSet<Value>)>,
    /// Writes without an answer, with the epoch they were asked in.
    pending: BTreeMap<Value, Epoch>,
    /// Values that may be the durable one: possible at the last acknowledged flush, or later.
    floor: BTreeSet<Value>,
    /// The same for flushes without an answer.
    flushes: BTreeMap<OpId, BTreeSet<Value>>,
}

impl Register {
    fn close(&mut self) {
        let mut open: Vec<_> = self.states.iter().cloned().collect();
        while let Some((_, taken)) = open.pop() {
            for write in self.pending.keys().filter(|write| !taken.contains(write)) {
                let mut taken = taken.clone();
                taken.insert(*write);
                if self.states.insert((*write, taken.clone())) {
                    open.push((*write, taken));
                }
            }
        }
    }

    fn values(&self) -> BTreeSet<Value> {
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

    fn keep(&mut self, allows: impl Fn(Value, &BTreeSet<Value>) -> bool) -> bool {
        let left: BTreeSet<_> = self
            .states
            .iter()
            .filter(|(value, taken)| allows(*value, taken))
            .cloned()
            .collect();
        if left.is_empty() {
            return false;
        }
        self.states = left;
        true
    }

    fn forget(&mut self, write: Value) {
        self.pending.remove(&write);
        let states = std::mem::take(&mut self.states);
        self.states = states
            .into_iter()
            .map(|(value, mut taken)| {
                taken.remove(&write);
                (value, taken)
            })
            .collect();
        self.close();
    }
}

/// Who answers.
#[derive(Debug, Clone)]
pub struct By {
    /// The node.
    pub node: NodeId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its lease.
    pub lease: LeaseId,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Reference {
    blocks: Vec<Register>,
    asked: BTreeMap<OpId, Ask>,
    writers: BTreeMap<Epoch, (NodeId, LeaseId)>,
    /// The newest epoch that opened.
    opened: Epoch,
    /// Of each epoch, the record that its grant replaced in the log.
    replaced: BTreeMap<Epoch, Arc<Record>>,
    /// Of each node, the blocks whose acknowledged writes it may have lost with its power.
    lossy: BTreeMap<NodeId, BTreeSet<u64>>,
}

impl Reference {
    /// An image of so many blocks, each 0.
    pub fn new(blocks: u64) -> Self {
        let register = Register {
            states: BTreeSet::from([(0, BTreeSet::new())]),
            pending: BTreeMap::new(),
            floor: BTreeSet::from([0]),
            flushes: BTreeMap::new(),
        };
        Self {
            blocks: vec![register; blocks as usize],
            asked: BTreeMap::new(),
            writers: BTreeMap::new(),
            opened: Epoch(0),
            replaced: BTreeMap::new(),
            lossy: BTreeMap::new(),
        }
    }

    fn of(&mut self, extent: Extent) -> impl Iterator<Item = &mut Register> {
        self.blocks[extent.first.0 as usize..=extent.last.0 as usize].iter_mut()
    }

    /// Whether a write may be asked without too many being unanswered.
    pub fn takes(&self, extent: Extent) -> bool {
        let blocks = &self.blocks[extent.first.0 as usize..=extent.last.0 as usize];
        blocks.iter().all(|register| register.pending.len() < PENDING_MAX)
    }

    /// How many operations wait for an answer.
    pub fn waiting(&self) -> usize {
        self.asked.len()
    }

    /// A client asks at a node that serves under an epoch.
    pub fn ask(&mut self, op: OpId, ask: Ask, epoch: Epoch) {
        self.asked.insert(op, ask);
        match ask {
            Ask::Write { extent, .. } => {
                for register in self.of(extent) {
                    register.write(op.0 as Value, epoch);
                }
            }
            Ask::Flush => {
                for register in &mut self.blocks {
                    let now = register.values();
                    register.flushes.insert(op, now);
                }
            }
            Ask::Read(_) => {}
        }
    }

    /// An operation is answered: done.
    ///
    /// # Errors
    /// It must not be, or not so.
    pub fn acknowledge(&mut self, op: OpId, by: &By, found: &[Value]) -> Result<(), String> {
        let ask = self
            .asked
            .remove(&op)
            .ok_or_else(|| format!("{op:?} is answered twice"))?;
        let known = self.writers.entry(by.epoch).or_insert((by.node.clone(), by.lease));
        if *known != (by.node.clone(), by.lease) {
            return Err(format!(
                "{by:?} answers {op:?}, but {known:?} answered under that epoch"
            ));
        }
        if by.epoch < self.opened {
            return Err(format!("{by:?} answers {op:?}, but epoch {} has opened", self.opened));
        }
        match ask {
            Ask::Write { extent, fua } => {
                let value = op.0 as Value;
                for (block, register) in extent.blocks().zip(self.of(extent)) {
                    if !register.keep(|_, taken| taken.contains(&value)) {
                        return Err(format!(
                            "block {block}: {op:?} is acknowledged and cannot have taken effect"
                        ));
                    }
                    register.forget(value);
                    if fua {
                        register.floor = register.values();
                    }
                }
            }
            Ask::Read(extent) => {
                for ((block, register), found) in extent.blocks().zip(self.of(extent)).zip(found) {
                    let possible = register.values();
                    if !register.keep(|value, _| value == *found) {
                        return Err(format!("block {block}: {op:?} read {found}, possible is {possible:?}"));
                    }
                    register.close();
                }
            }
            Ask::Flush => {
                for register in &mut self.blocks {
                    if let Some(floor) = register.flushes.remove(&op) {
                        register.floor = floor;
                    }
                }
            }
        }
        Ok(())
    }

    /// An operation is answered: not done, or not known to be. A write may still take effect, until another epoch opens.
    ///
    /// # Errors
    /// It was answered before.
    pub fn deny(&mut self, op: OpId) -> Result<(), String> {
        self.asked
            .remove(&op)
            .ok_or_else(|| format!("{op:?} is answered twice"))?;
        for register in &mut self.blocks {
            register.flushes.remove(&op);
        }
        Ok(())
    }

    /// A grant counts in the log.
    pub fn granted(&mut self, epoch: Epoch, over: Arc<Record>) {
        self.replaced.insert(epoch, over);
    }

    /// A node lost power with blocks marked.
    pub fn lost_power(&mut self, node: &NodeId) {
        let all = (0..self.blocks.len() as u64).collect();
        self.lossy.insert(node.clone(), all);
    }

    /// A node has every acknowledged write to an extent, again.
    pub fn has(&mut self, node: &NodeId, extent: Extent) {
        if let Some(lossy) = self.lossy.get_mut(node) {
            lossy.retain(|block| !(extent.first.0..=extent.last.0).contains(block));
        }
    }

    fn all_lost(&self, record: &Record, block: u64) -> bool {
        let members = record.members_of(Extent::block(hearth_protocol::BlockIndex(block)));
        let lossy = |node| self.lossy.get(node).is_some_and(|lossy| lossy.contains(&block));
        members.iter().all(lossy)
    }

    /// An epoch opens. A guest that goes on over a hand-over is told of nothing, so nothing may be missing. Says whether
    /// unflushed writes may be missing.
    ///
    /// # Errors
    /// Another node opened it.
    pub fn open(&mut self, by: &By, record: &Record, guest_goes_on: bool) -> Result<bool, String> {
        // An epoch that opens behind a newer one finds every member fenced; what counts is that it answers nothing.
        if by.epoch < self.opened {
            return Ok(false);
        }
        self.opened = by.epoch;
        let known = self.writers.entry(by.epoch).or_insert((by.node.clone(), by.lease));
        if *known != (by.node.clone(), by.lease) {
            return Err(format!("{by:?} opens, but {known:?} has the epoch"));
        }
        let over = self.replaced.get(&by.epoch).cloned();
        let over = over.ok_or_else(|| format!("{by:?} opens, but the log did not grant it"))?;
        let mut any = false;
        for block in 0..self.blocks.len() as u64 {
            let may_miss = !guest_goes_on && self.all_lost(&over, block);
            any |= may_miss;
            let register = &mut self.blocks[block as usize];
            if may_miss {
                let floor = register.floor.iter().map(|value| (*value, BTreeSet::new()));
                register.states.extend(floor);
                register.close();
            }
            let old: Vec<Value> = register
                .pending
                .iter()
                .filter(|(_, asked)| **asked < by.epoch)
                .map(|(write, _)| *write)
                .collect();
            for write in old {
                register.forget(write);
            }
            // What was in doubt is equal and durable before it opens.
            register.floor = register.values();
        }
        let end = hearth_protocol::BlockIndex(u64::MAX);
        for (at, run) in record.runs().iter().enumerate() {
            let behind = record.runs().get(at + 1).map(|next| next.first.0 - 1);
            let last = behind.map_or(end, hearth_protocol::BlockIndex);
            for node in &run.members {
                self.has(node, Extent { first: run.first, last });
            }
        }
        Ok(any)
    }

    /// Checks one member's block.
    ///
    /// # Errors
    /// It does not have what clients may count on.
    pub fn check(&self, node: &NodeId, block: u64, now: Value, stable: Value) -> Result<(), String> {
        let register = &self.blocks[block as usize];
        let lossy = self.lossy.get(node).is_some_and(|lossy| lossy.contains(&block));
        let possible = if lossy {
            register.floor.clone()
        } else {
            register.values()
        };
        if !possible.contains(&now) {
            return Err(format!(
                "block {block}: member {node} has {now}, possible is {possible:?}"
            ));
        }
        if !register.floor.contains(&stable) {
            let floor = &register.floor;
            return Err(format!(
                "block {block}: member {node} has {stable} for certain, flushed is {floor:?}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::BlockIndex;
    use hearth_protocol::SetVersion;
    use hearth_protocol::aggregate::Aggregate;

    use super::*;

    const BLOCK: Extent = Extent {
        first: BlockIndex(0),
        last: BlockIndex(0),
    };
    const WRITE: Ask = Ask::Write {
        extent: BLOCK,
        fua: false,
    };

    fn by(node: &str, epoch: u64) -> By {
        By {
            node: node.parse().unwrap(),
            epoch: Epoch(epoch),
            lease: LeaseId(u128::from(epoch)),
        }
    }

    fn record() -> Arc<Record> {
        let members = ["a", "b"].map(|node| node.parse().unwrap());
        Aggregate::new(SetVersion(1), members.into()).unwrap().record
    }

    /// An image of one block, served by `a` under epoch 1.
    fn served() -> Reference {
        let mut reference = Reference::new(1);
        reference.granted(Epoch(1), record());
        reference.open(&by("a", 1), &record(), false).unwrap();
        reference
    }

    fn is_wrong<T: std::fmt::Debug>(said: Result<T, String>, why: &str) {
        let wrong = said.unwrap_err();
        assert!(wrong.contains(why), "{wrong}");
    }

    #[test]
    fn an_acknowledged_write_is_read_and_an_unanswered_one_does_not_flicker() {
        let mut image = served();
        let a = by("a", 1);
        image.ask(OpId(1), WRITE, Epoch(1));
        image.acknowledge(OpId(1), &a, &[]).unwrap();
        image.ask(OpId(2), Ask::Read(BLOCK), Epoch(1));
        is_wrong(image.clone().acknowledge(OpId(2), &a, &[0]), "read 0, possible is {1}");
        image.acknowledge(OpId(2), &a, &[1]).unwrap();
        // Nobody knows whether it took effect, until it is read.
        image.ask(OpId(3), WRITE, Epoch(1));
        image.deny(OpId(3)).unwrap();
        for (op, found) in [(4, 1), (5, 3)] {
            image.ask(OpId(op), Ask::Read(BLOCK), Epoch(1));
            image.acknowledge(OpId(op), &a, &[found]).unwrap();
        }
        image.ask(OpId(6), Ask::Read(BLOCK), Epoch(1));
        is_wrong(image.acknowledge(OpId(6), &a, &[1]), "read 1, possible is {3}");
    }

    #[test]
    fn an_epoch_has_one_writer_and_none_answers_behind_a_newer_one() {
        let mut image = served();
        for op in [1, 2, 3] {
            image.ask(OpId(op), WRITE, Epoch(1));
        }
        is_wrong(
            image.clone().acknowledge(OpId(1), &by("b", 1), &[]),
            "answered under that epoch",
        );
        let other_lease = By {
            lease: LeaseId(7),
            ..by("a", 1)
        };
        is_wrong(
            image.clone().acknowledge(OpId(1), &other_lease, &[]),
            "answered under that epoch",
        );
        is_wrong(image.clone().open(&by("b", 1), &record(), false), "has the epoch");
        is_wrong(
            image.clone().open(&by("b", 2), &record(), false),
            "the log did not grant it",
        );
        image.granted(Epoch(2), record());
        image.open(&by("b", 2), &record(), false).unwrap();
        is_wrong(image.acknowledge(OpId(1), &by("a", 1), &[]), "epoch 2 has opened");
    }

    #[test]
    fn a_member_has_what_was_acknowledged_and_keeps_what_was_flushed() {
        let mut image = served();
        let (a, node) = (by("a", 1), "b".parse().unwrap());
        image.ask(OpId(1), WRITE, Epoch(1));
        image.acknowledge(OpId(1), &a, &[]).unwrap();
        is_wrong(image.check(&node, 0, 0, 0), "has 0, possible is {1}");
        image.check(&node, 0, 1, 0).unwrap();
        image.ask(OpId(2), Ask::Flush, Epoch(1));
        image.acknowledge(OpId(2), &a, &[]).unwrap();
        is_wrong(image.check(&node, 0, 1, 0), "has 0 for certain, flushed is {1}");
    }
}
