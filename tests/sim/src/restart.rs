//! Schedulers start, from a snapshot of their state or from nothing, and die; wherever two of them have folded the same part
//! of the log, their states are compared.

use hearth_protocol::{SchedulerId, Seq};

use crate::event::Event;
use crate::lead::TAKEOVER_US;
use crate::scheduler::{Process, Step};
use crate::world::World;

impl World {
    /// A scheduler starts, from a snapshot of its state or from nothing.
    pub fn scheduler_starts(&mut self, scheduler: usize) -> Result<(), String> {
        if self.schedulers[scheduler].process.is_some() {
            return Ok(());
        }
        // Its event log is refused now and then, and filled again from the stream.
        let empty = self.chance.happens(100);
        let forgets = empty || self.chance.happens(300);
        let snapshot_ticks = self.plan.snapshot_ticks;
        let here = &mut self.schedulers[scheduler];
        if empty {
            here.kept = 0;
        }
        if forgets {
            here.snapshot = None;
        }
        here.starts += 1;
        here.stopped = None;
        let (id, kept) = (here.id.clone(), here.kept);
        let mut process = Process::new(here.starts, here.snapshot.as_ref())?;
        let from = process.read;
        if from > 0 {
            let digest = self.digests.get(&Seq(from as u64)).copied();
            if digest != Some(process.state.digest()) {
                return Err(format!("{id}: the snapshot at {from} is not the state at that place"));
            }
            self.counters.count("scheduler started from a snapshot");
        } else if kept > 0 {
            self.counters.count("scheduler started from nothing");
        }
        for at in from..kept {
            let entry = self.log.entries[at].clone();
            let step = process.take(&id, &entry, snapshot_ticks)?;
            self.compare(&id, process.read, &step)?;
        }
        // Of the heat stream's backlog as much as is ever kept.
        process.heard = self.heard.len().saturating_sub(60 * self.nodes.len());
        // Who led last and is gone for sure is not waited for.
        let at_once = process.state.leader().is_none_or(|leader| *leader == id);
        process.due_us = self.now_us + if at_once { 1 } else { TAKEOVER_US };
        let (life, due_us) = (process.life, process.due_us);
        self.note(|| format!("{id} starts at {from}, its log ends at {kept}"));
        self.schedulers[scheduler].process = Some(process);
        self.at(due_us, Event::Acts { scheduler, life });
        self.after(1, Event::Ingests { scheduler, life });
        Ok(())
    }

    /// A scheduler dies.
    pub fn scheduler_dies(&mut self, scheduler: usize) {
        let here = &mut self.schedulers[scheduler];
        here.process = None;
        here.stopped = None;
        let id = here.id.clone();
        self.note(|| format!("{id} dies"));
    }

    /// Two folds of one prefix give one state.
    pub fn compare(&mut self, id: &SchedulerId, read: usize, step: &Step) -> Result<(), String> {
        let Some((digest, _)) = step.digests else {
            return Ok(());
        };
        match self.digests.insert(Seq(read as u64), digest) {
            Some(other) if other != digest => Err(format!("{id}: another state behind {read} than folded before")),
            Some(_) => {
                self.counters.count("digests equal");
                Ok(())
            }
            None => Ok(()),
        }
    }
}
