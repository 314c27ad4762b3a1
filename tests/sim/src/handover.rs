//! Hand-overs: a guest moves to another node, and who moves it tries until its disk is there.
//!
//! The source is asked again and again, and has the image back where the destination does not take it in time, as the node
//! daemon does it. What the log has decided is the destination's alone: nobody helps it, so a hand-over that comes to no
//! end shows.

use hearth_replication::session::Input;

use crate::event::Event;
use crate::node::Phase;
use crate::plan::Fault;
use crate::world::World;

/// How long a destination may take to own what was sealed for it, before the source has it back.
const HAND_OVER_WITHIN_US: u64 = 5_000_000;

/// How long a hand-over is tried while other things are moved too, before it is called off.
const PATIENCE_US: u64 = 40_000_000;

/// A guest that moves.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// To which node.
    to: usize,
    since_us: u64,
    /// When the source is asked next, or has the image back.
    next_us: u64,
    /// Whose image it was at the last try.
    source: Option<usize>,
}

impl World {
    /// A guest begins to move.
    pub fn begins_migration(&mut self, image: usize, to: usize) -> Result<(), String> {
        let Some((Phase::Detached | Phase::Ended | Phase::Stalled, _)) = self.phase(to, image) else {
            return Ok(());
        };
        let lease = self.lease();
        let now_us = self.now_us;
        let next_us = now_us + self.chance.within(10_000, 2_000_000);
        self.images[image].operator.migration = Some(Migration {
            to,
            since_us: now_us,
            next_us,
            source: None,
        });
        if let Some(shell) = self.shell(to, image) {
            shell.guest_goes_on = true;
            shell.gave_up = false;
            shell.enter(Phase::Incoming, now_us);
        }
        self.step(to, image, Input::Incoming { lease }, None)
    }

    /// Whether the log has the image handed over to a node that still waits for it: then it takes it alone.
    pub fn is_handed(&self, image: usize) -> bool {
        let Some(migration) = self.images[image].operator.migration else {
            return false;
        };
        let owner = self.log.now[image].owner.as_ref();
        let waits = |(phase, _)| phase == Phase::Incoming;
        owner == Some(&self.nodes[migration.to].id) && self.phase(migration.to, image).is_some_and(waits)
    }

    /// Looks at a hand-over while `owner` serves the image.
    pub fn hands_over(&mut self, image: usize, owner: usize) -> Result<(), String> {
        let Some(mut migration) = self.images[image].operator.migration else {
            return Ok(());
        };
        let Some((phase, _)) = self.phase(migration.to, image) else {
            return Ok(());
        };
        if phase != Phase::Incoming {
            self.images[image].operator.migration = None;
            return Ok(());
        }
        if !self.healed && self.now_us > migration.since_us + PATIENCE_US {
            self.images[image].operator.migration = None;
            return self.step(migration.to, image, Input::Seal { to: None }, None);
        }
        if migration.next_us > self.now_us {
            return Ok(());
        }
        if migration.source.is_some() {
            self.counters.count("hand-over tried again");
        }
        migration.next_us = self.now_us + HAND_OVER_WITHIN_US;
        migration.source = Some(owner);
        self.images[image].operator.migration = Some(migration);
        if self.plan.faults.contains(&Fault::HandOver) && !self.healed && self.chance.happens(500) {
            let us = self.chance.delay(2_000, 1_500_000, 400);
            let (source, destination) = (owner, migration.to);
            self.after(us, Event::Disturbs { source, destination });
        }
        let to = Some(self.nodes[migration.to].id.clone());
        self.step(owner, image, Input::Seal { to }, None)
    }

    /// Nobody serves the image: says whether that is left to a hand-over.
    pub fn takes_back(&mut self, image: usize) -> Result<bool, String> {
        let Some(migration) = self.images[image].operator.migration else {
            return Ok(false);
        };
        let phase = self.phase(migration.to, image).map(|(phase, _)| phase);
        if phase.is_some_and(|phase| phase != Phase::Incoming) {
            self.images[image].operator.migration = None;
            return Ok(false);
        }
        if self.is_handed(image) {
            return Ok(self.healed);
        }
        let Some(source) = migration.source.filter(|_| migration.next_us <= self.now_us) else {
            return Ok(migration.source.is_some());
        };
        let sealed = matches!(self.phase(source, image), Some((Phase::Ended | Phase::Stalled, _)));
        if sealed && self.log.now[image].owner.as_ref() == Some(&self.nodes[source].id) {
            self.counters.count("source took its image back");
            self.takes(source, image)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Something goes wrong in the midst of a hand-over.
    pub fn disturbs(&mut self, source: usize, destination: usize) {
        if self.healed {
            return;
        }
        let us = self.chance.delay(1_000_000, 12_000_000, 300);
        let (forth, back) = ((source, destination), (destination, source));
        let ways = match self.chance.below(4) {
            0 => vec![forth, back],
            1 => vec![forth],
            2 => vec![back],
            _ => Vec::new(),
        };
        for (from, to) in &ways {
            self.cuts(*from, *to, us);
        }
        if ways.is_empty() {
            self.nodes[destination].log_cut = true;
            self.after(us, Event::Reaches { node: destination });
        }
        self.counters.count("f19 hand-over disturbed");
        self.note(|| format!("fault: hand-over of n{source} to n{destination} disturbed: {ways:?}"));
    }
}
