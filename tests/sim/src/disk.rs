//! One node's copy of one image as it lies on its disk: a volatile cache over stable blocks, and what is durable beside it.
//!
//! A write reaches the cache, a flush the stable blocks. A power loss leaves of each block the stable value or any one that
//! was in the cache, block by block, so that a write over several blocks may be torn. Marks and the record are durable at
//! once, each at a moment of its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hearth_protocol::{BlockIndex, Incarnation, NodeId};
use hearth_replication::member::{Durable, Marks};
use hearth_replication::request::{Extent, RequestId, Work};
use hearth_replication::session::Replica;

use crate::chance::Chance;

/// What a block holds: the number of the write that made it, 0 at first.
pub type Value = u32;

/// What is in a new copy's blocks before anything is written there; nobody may ever read it.
pub const NOTHING: Value = Value::MAX;

/// One block.
#[derive(Debug, Clone)]
struct Cell {
    stable: Value,
    cached: VecDeque<Value>,
    /// How many values left the cache.
    drained: u64,
}

impl Cell {
    fn now(&self) -> Value {
        self.cached.back().copied().unwrap_or(self.stable)
    }
}

/// Something under way on the disk.
#[derive(Debug, Clone)]
pub struct Job {
    /// Who asked.
    pub from: NodeId,
    /// Which request.
    pub id: RequestId,
    /// What.
    pub work: Work,
    /// Mark the blocks first.
    pub mark: bool,
    /// What a write carries.
    pub values: Vec<Value>,
    /// Of a flush: marks to be made anew.
    pub anew: BTreeSet<BlockIndex>,
    /// Of a flush: how far each block's cache is to be drained; set when it begins.
    pub until: Vec<u64>,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Disk {
    cells: Vec<Cell>,
    /// The record.
    pub durable: Durable,
    marks: Marks,
    /// Marks that may go.
    unmarked: BTreeSet<BlockIndex>,
    /// It failed.
    pub failed: bool,
    /// Blocks whose checksum does not fit.
    pub flipped: BTreeSet<BlockIndex>,
    jobs: BTreeMap<u64, Job>,
    /// A record on its way.
    pub persisting: Option<Durable>,
}

impl Disk {
    /// A copy whose blocks all hold a value.
    pub fn new(blocks: u64, value: Value, durable: Durable) -> Self {
        let cell = Cell {
            stable: value,
            cached: VecDeque::new(),
            drained: 0,
        };
        Self {
            cells: vec![cell; blocks as usize],
            durable,
            marks: Marks::new(),
            unmarked: BTreeSet::new(),
            failed: false,
            flipped: BTreeSet::new(),
            jobs: BTreeMap::new(),
            persisting: None,
        }
    }

    /// What a daemon that starts finds.
    pub fn replica(&self, store: Incarnation) -> Replica {
        Replica {
            store,
            durable: self.durable.clone(),
            marks: self.marks.clone(),
            failed: self.failed,
        }
    }

    /// What a read of a block finds.
    pub fn now(&self, block: u64) -> Value {
        self.cells[block as usize].now()
    }

    /// What is left of a block for certain.
    pub fn stable(&self, block: u64) -> Value {
        self.cells[block as usize].stable
    }

    /// Whether nothing is under way.
    pub fn is_quiet(&self) -> bool {
        self.jobs.is_empty() && self.persisting.is_none()
    }

    /// Something under way.
    pub fn job(&self, number: u64) -> Option<&Job> {
        self.jobs.get(&number)
    }

    /// Whether it has marks.
    pub fn is_marked(&self) -> bool {
        !self.marks.is_empty()
    }

    /// The marks may go.
    pub fn unmark(&mut self, blocks: BTreeSet<BlockIndex>) {
        self.unmarked.extend(blocks);
    }

    /// The marks that may go do.
    pub fn tidy(&mut self) {
        for block in std::mem::take(&mut self.unmarked) {
            self.marks.remove(&block);
        }
    }

    /// Something begins.
    ///
    /// # Errors
    /// It is a write and overlaps with one under way.
    pub fn begin(&mut self, number: u64, mut job: Job) -> Result<(), String> {
        if let Work::Write { extent, .. } = &job.work {
            let overlaps =
                |other: &&Job| matches!(&other.work, Work::Write { extent: other, .. } if other.overlaps(*extent));
            if let Some(other) = self.jobs.values().find(overlaps) {
                return Err(format!(
                    "{:?} of {} {:?} begins while {:?} of {} {:?} is under way",
                    job.work, job.from, job.id, other.work, other.from, other.id
                ));
            }
        }
        if let Work::Flush { .. } = job.work {
            let until = |cell: &Cell| cell.drained + cell.cached.len() as u64;
            job.until = self.cells.iter().map(until).collect();
        }
        self.jobs.insert(number, job);
        Ok(())
    }

    /// Something ends; with what a read found if it worked.
    pub fn end(
        &mut self,
        number: u64,
        store: Incarnation,
        fails: bool,
        chance: &mut Chance,
    ) -> Option<(Job, Option<Vec<Value>>)> {
        let job = self.jobs.remove(&number)?;
        let mut found = Vec::new();
        let mut ok = !fails && !self.failed;
        match &job.work {
            Work::Read(extent) => {
                ok &= !self
                    .flipped
                    .iter()
                    .any(|block| (extent.first..=extent.last).contains(block));
                found = extent.blocks().map(|block| self.now(block.0)).collect();
            }
            Work::Hash(extent) => found = extent.blocks().map(|block| self.now(block.0)).collect(),
            Work::Write { extent, fua } => {
                self.mark(&job, *extent, store);
                self.write(&job.values, *extent, *fua && ok, (!ok).then_some(chance));
            }
            Work::Flush { .. } if ok => {
                for (cell, until) in self.cells.iter_mut().zip(&job.until) {
                    while cell.drained < *until {
                        cell.stable = cell.cached.pop_front().expect("a cached value");
                        cell.drained += 1;
                    }
                }
                for block in &job.anew {
                    self.marks.entry(*block).and_modify(|made| *made = store);
                }
            }
            _ => {}
        }
        self.failed |= !ok;
        Some((job, ok.then_some(found)))
    }

    fn mark(&mut self, job: &Job, extent: Extent, store: Incarnation) {
        if job.mark {
            for block in extent.blocks() {
                if self.unmarked.remove(&block) {
                    self.marks.remove(&block);
                }
                self.marks.entry(block).or_insert(store);
            }
        }
    }

    fn write(&mut self, values: &[Value], extent: Extent, fua: bool, mut torn: Option<&mut Chance>) {
        for (block, value) in extent.blocks().zip(values) {
            if torn.as_mut().is_some_and(|chance| chance.happens(500)) {
                continue;
            }
            let cell = &mut self.cells[block.0 as usize];
            cell.cached.push_back(*value);
            if fua {
                cell.drained += cell.cached.len() as u64;
                cell.stable = *value;
                cell.cached.clear();
            }
            self.flipped.remove(&block);
        }
    }

    /// The daemon died: what was under way has happened, in part or not at all.
    pub fn abandon(&mut self, store: Incarnation, chance: &mut Chance) {
        for (_, job) in std::mem::take(&mut self.jobs) {
            let Work::Write { extent, .. } = job.work else { continue };
            if chance.happens(300) {
                continue;
            }
            self.mark(&job, extent, store);
            match chance.below(3) {
                0 => {}
                1 => self.write(&job.values, extent, false, Some(chance)),
                _ => self.write(&job.values, extent, false, None),
            }
        }
        if let Some(durable) = self.persisting.take()
            && chance.happens(500)
        {
            self.durable = durable;
        }
        if chance.happens(500) {
            self.tidy();
        }
        self.unmarked.clear();
    }

    /// The power failed, after [`Disk::abandon`].
    pub fn lose_power(&mut self, chance: &mut Chance) {
        for cell in &mut self.cells {
            let left = chance.index(cell.cached.len() + 1);
            if left > 0 {
                cell.stable = cell.cached[left - 1];
            }
            cell.drained += cell.cached.len() as u64;
            cell.cached.clear();
        }
    }
}
