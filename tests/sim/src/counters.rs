//! How often each thing happened, so that a fault or a state that is never reached shows.

use std::collections::BTreeMap;
use std::fmt;

use crate::plan::Fault;

/// States that some seed has to reach.
pub const STATES: &[&str] = &[
    "takeover opened",
    "opened after all copies lost power",
    "set shrunk",
    "node joined",
    "part of an image joined",
    "node joined again with what changed",
    "member left",
    "copies compared",
    "copy deleted",
    "handed over",
    "hand-over tried again",
    "source took its image back",
    "destination gave up what the log had decided",
    "destination gave up and waits for the next seal",
    "handed over after the destination gave up",
    "sealed",
    "map of several runs",
    "write acknowledged",
    "durable write acknowledged",
    "read acknowledged",
    "flush acknowledged",
    "read through to the source",
    "flush at a destination",
    "operation held until open",
    "stopped owner continued behind another one",
    "late request refused",
    "torn write",
    "void change in the log",
    "rolled back and recovered",
    "scheduler leads",
    "scheduler leads no more",
    "scheduler started from a snapshot",
    "scheduler started from nothing",
    "scheduler published again what was in doubt",
    "leader gave up a tick that the log lost",
    "digests equal",
    "void command in the log",
    "command of an ended term left alone",
    "said twice in the log",
    "image detached",
    "repair ordered",
    "repair begun",
    "repair refused: not the owner at that epoch",
    "repaired by policy",
    "log replayed",
    "given up: Overtaken",
    "given up: MemberLost",
    "given up: NoMember",
    "given up: InDoubt",
    "given up: RolledBack",
    "ended: Deposed",
    "ended: Sealed",
    "ended: NoMember",
    "not changed: JoinerFailed",
    "not changed: Busy",
    "not changed: Map",
    "refused: EpochEnded",
    "refused: SetChanged",
    "refused: Fenced",
    "refused: StoreChanged",
    "refused: DiskFailed",
];

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Runs.
    pub seeds: u64,
    /// Simulated time.
    pub simulated_us: u64,
    /// The longest time from the last fault until everything was well, where the operator replaced lost copies.
    pub healing_us_max: u64,
    /// The same where the scheduler's policy did.
    pub repairing_us_max: u64,
    /// Steps of sessions.
    pub steps: u64,
    /// Each thing by name.
    pub counts: BTreeMap<String, u64>,
}

impl Counters {
    /// Something happened.
    pub fn count(&mut self, what: &str) {
        match self.counts.get_mut(what) {
            Some(count) => *count += 1,
            None => {
                self.counts.insert(what.to_owned(), 1);
            }
        }
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Counters) {
        self.seeds += other.seeds;
        self.simulated_us += other.simulated_us;
        self.healing_us_max = self.healing_us_max.max(other.healing_us_max);
        self.repairing_us_max = self.repairing_us_max.max(other.repairing_us_max);
        self.steps += other.steps;
        for (what, count) in &other.counts {
            *self.counts.entry(what.clone()).or_default() += count;
        }
    }

    /// Faults and states that never happened.
    pub fn missing(&self) -> Vec<&'static str> {
        let faults = Fault::ALL.iter().map(|(_, name)| *name);
        faults
            .chain(STATES.iter().copied())
            .filter(|what| !self.counts.contains_key(*what))
            .collect()
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.simulated_us as f64 / 3.6e9;
        let healing = self.healing_us_max as f64 / 1e6;
        let repairing = self.repairing_us_max as f64 / 1e6;
        writeln!(
            f,
            "{} seeds, {hours:.1} simulated hours, {} steps",
            self.seeds, self.steps
        )?;
        writeln!(
            f,
            "well again {healing:.1} s after the last fault at the latest, {repairing:.1} s where the policy repairs"
        )?;
        for (what, count) in &self.counts {
            writeln!(f, "  {count:>9}  {what}")?;
        }
        Ok(())
    }
}
