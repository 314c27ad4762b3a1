//! What has to be so when faults are over: every image served by one node, with all its copies, in sync and equal, every
//! operation and command answered, one leader, and all schedulers with the state that the log gives.

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::limits::TICK_MS;
use hearth_protocol::record::Extent;
use hearth_protocol::{BlockIndex, Event, ImageId, Message, NodeId, Order, Seq};
use hearth_replication::owner::Ask;
use scheduler_core::State;
use scheduler_core::policy::repair::{GRACE_TICKS, GRACE_TICKS_LAST, REST_TICKS, REST_TICKS_MAX};
use scheduler_core::replay::{Replayer, Until};

use crate::log::Entry;
use crate::node::Phase;
use crate::world::World;

/// Simulated time in which everything has to be well again after the last fault: several takeovers one after another, each
/// with a member to be given up, and copies of all blocks.
const HEALED_US: u64 = 180_000_000;

/// A tick is late after this: some reads of the log and publishes that take their longest.
const TICK_LATE_US: u64 = 3_000_000;

/// Entries that a scheduler may not have read yet: those of some seconds.
const BEHIND_MAX: usize = 60;

/// Of a thousand logs, how many are replayed from their bytes, with every decision derived again.
const REPLAYED: u64 = 250;

impl World {
    /// What is not well in a healed world, for a report.
    pub fn unwell(&self) -> String {
        let images =
            (0..self.images.len()).filter_map(|image| Some(format!("image {image} {}; ", self.complaint(image)?)));
        images.chain(self.leaderless()).collect()
    }

    /// What is not well with the schedulers.
    fn leaderless(&self) -> Option<String> {
        let current = self.log.facts().validity().term();
        let all = self.schedulers.iter().filter_map(|scheduler| scheduler.running());
        let leading = all.filter(|process| process.leads() == Some(current)).count();
        let others = self
            .schedulers
            .iter()
            .filter_map(|scheduler| scheduler.running()?.leads());
        let others = others.filter(|term| *term != current).count();
        if (leading, others) != (1, 0) {
            return Some(format!("{leading} schedulers lead term {current}, {others} others; "));
        }
        if self.now_us > self.ticked_us + TICK_LATE_US {
            return Some(format!("no tick since {} s; ", self.ticked_us / 1_000_000));
        }
        for scheduler in &self.schedulers {
            let read = scheduler.running().map_or(0, |process| process.read);
            if read + BEHIND_MAX < self.log.len {
                return Some(format!("{} has read {read} of {}; ", scheduler.id, self.log.len));
            }
        }
        for node in &self.nodes {
            let open = node.running().and_then(|daemon| daemon.facts.open.first());
            if let Some((seq, command)) = open {
                return Some(format!(
                    "{} does not answer the command at {seq}: {:?}; ",
                    node.id, command.order
                ));
            }
        }
        None
    }

    /// The orders to replicate that count, in the order given.
    pub fn replications(&self) -> Vec<(ImageId, NodeId)> {
        let of = |entry: &Arc<Entry>| match &entry.event {
            Event::CommandGiven(command) if entry.counts => match &command.order {
                Order::Replicate { image, to, .. } => Some((*image, to.clone())),
                _ => None,
            },
            _ => None,
        };
        self.log.entries.iter().filter_map(of).collect()
    }

    /// How long everything may take to be well: what takeovers and copies need and, where the policy replaces copies, its
    /// grace time and the rests after the orders that were given so far, each twice as long as the one before.
    pub fn healed_within_us(&self) -> u64 {
        if !self.plan.by_policy {
            return HEALED_US;
        }
        let mut orders: BTreeMap<_, u32> = BTreeMap::new();
        for order in self.replications() {
            *orders.entry(order).or_default() += 1;
        }
        let rest = |time: u32| REST_TICKS.saturating_mul(2u64.saturating_pow(time)).min(REST_TICKS_MAX);
        let rests = orders.values().map(|times| (0..*times).map(rest).sum());
        let rests: u64 = rests.max().unwrap_or(0);
        let grace = if self.plan.copies == 2 {
            GRACE_TICKS_LAST
        } else {
            GRACE_TICKS
        };
        // What is read when all is quiet may find flipped bits: then a copy is lost once more.
        HEALED_US + (grace * (1 + self.lost_healed) + rests) * TICK_MS * 1_000
    }

    /// All schedulers fold one log into one state, and everything that they did follows from it.
    ///
    /// # Errors
    /// It is not so.
    fn replays(&mut self) -> Result<(), String> {
        let mut fresh = State::default();
        for (at, entry) in self.log.entries.iter().enumerate() {
            fresh.apply(Seq(at as u64 + 1), &entry.envelope, &entry.event);
        }
        fresh.audit()?;
        let digest = fresh.digest();
        for scheduler in &self.schedulers {
            let Some(process) = scheduler.running() else { continue };
            let mut state = process.state.clone();
            for (at, entry) in self.log.entries.iter().enumerate().skip(process.read) {
                state.apply(Seq(at as u64 + 1), &entry.envelope, &entry.event);
            }
            if state.digest() != digest || state.decisions_digest() != fresh.decisions_digest() {
                return Err(format!("{}: its state is not what the log gives", scheduler.id));
            }
        }
        if !self.chance.happens(REPLAYED) {
            return Ok(());
        }
        let mut replayer = Replayer::new(Until::End);
        for (at, entry) in self.log.entries.iter().enumerate() {
            let message = Message::encode(&entry.envelope, &entry.event);
            replayer.step(Seq(at as u64 + 1), &message);
        }
        let (state, report) = replayer.finish();
        if state.digest() != digest || !report.is_sound() || report.foreign > 0 {
            return Err(format!("the replay differs: {report:?}"));
        }
        self.counters.count("log replayed");
        Ok(())
    }

    fn complaint(&self, image: usize) -> Option<String> {
        let record = &self.log.now[image].record;
        let open = self.in_phase(image, &[Phase::Open]);
        let served = |node: &usize| {
            let shell = self.nodes[*node].running().map(|daemon| &daemon.shells[image]);
            shell.is_some_and(|shell| shell.session.is_open() && shell.session.record() == Some(record))
        };
        let phases: Vec<_> = (0..self.nodes.len()).map(|node| self.phase(node, image)).collect();
        if open.len() != 1 || !open.iter().all(served) {
            return Some(format!(
                "is not served by one node under {}: {phases:?}",
                crate::text::text(record)
            ));
        }
        if self.images[image].operator.migration.is_some() {
            return Some("has a hand-over that does not end".into());
        }
        if self.thin(record).is_some() || record.runs().iter().any(|run| !run.joiners.is_empty()) {
            return Some(format!(
                "has too few copies or an unfinished one: {}",
                crate::text::text(record)
            ));
        }
        let held = |node: &crate::node::Node| {
            node.daemon
                .iter()
                .map(|daemon| daemon.shells[image].held.len())
                .sum::<usize>()
        };
        let held: usize = self.nodes.iter().map(held).sum();
        let waiting = self.images[image].reference.waiting();
        if held + waiting > 0 {
            return Some(format!("{held} held and {waiting} sent operations are not answered"));
        }
        None
    }

    /// Whether everything is well: then every block is read, everything flushed, and all copies are compared.
    ///
    /// # Errors
    /// Copies differ.
    pub fn is_settled(&mut self) -> Result<bool, String> {
        if self.leaderless().is_some() {
            return Ok(false);
        }
        for image in 0..self.images.len() {
            if self.complaint(image).is_some() {
                return Ok(false);
            }
            if !self.images[image].operator.read_back {
                self.images[image].operator.read_back = true;
                let Some(node) = self.in_phase(image, &[Phase::Open]).first().copied() else {
                    return Ok(false);
                };
                for block in 0..self.plan.blocks {
                    self.asks(node, image, Ask::Read(Extent::block(BlockIndex(block))))?;
                }
                self.asks(node, image, Ask::Flush)?;
                return Ok(false);
            }
        }
        for image in 0..self.images.len() {
            let record = self.log.now[image].record.clone();
            for block in 0..self.plan.blocks {
                let values: Vec<_> = record
                    .members_of(Extent::block(BlockIndex(block)))
                    .iter()
                    .map(|id| {
                        self.nodes[self.number(id)].disks[image]
                            .as_ref()
                            .map(|disk| disk.stable(block))
                    })
                    .collect();
                if values.windows(2).any(|two| two[0] != two[1]) || values.iter().any(|value| value.is_none()) {
                    return Err(format!(
                        "i{image}: copies of block {block} differ: {values:?} of {}",
                        crate::text::text(&record)
                    ));
                }
            }
        }
        self.replays()?;
        Ok(true)
    }
}
