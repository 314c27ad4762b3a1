//! The world: nodes, network, log and images, and one queue of events in the order of simulated time.
//!
//! Everything that is left to chance is drawn from one stream, and nothing else differs between two runs of a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::chain::Hash;
use hearth_protocol::{LeaseId, NodeId, Seq};
use hearth_replication::member::Durable;
use hearth_replication::mutants::Rules;
use hearth_replication::owner::OpId;
use hearth_replication::request::RequestId;
use hearth_replication::session::Input;

use crate::chance::Chance;
use crate::counters::Counters;
use crate::disk::{Disk, Value};
use crate::event::{Event, Timed};
use crate::log::Log;
use crate::net::Net;
use crate::node::{Clock, Node, Shell};
use crate::operator::Operator;
use crate::plan::Plan;
use crate::reference::Reference;
use crate::reports::Report;
use crate::scheduler::Scheduler;

/// How many of the last events a failure shows.
const TRACE_MAX: usize = 1_000;

/// For how long the node that comes and goes is there, and away.
const FLAPS_US: u64 = 20_000_000;

/// One image.
#[derive(Debug)]
pub struct Image {
    /// What its clients were told.
    pub reference: Reference,
    /// What looks after it.
    pub operator: Operator,
    /// Counts operations.
    pub ops: u64,
}

/// See the module.
pub struct World {
    /// Chance.
    pub chance: Chance,
    /// The time.
    pub now_us: u64,
    queue: BinaryHeap<Reverse<Timed>>,
    number: u64,
    /// What this seed does.
    pub plan: Plan,
    /// Which rules the machines keep.
    pub rules: Rules,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Images.
    pub images: Vec<Image>,
    /// Schedulers.
    pub schedulers: Vec<Scheduler>,
    /// The log.
    pub log: Log,
    /// The stream of heat reports.
    pub heard: Vec<Report>,
    /// The digest of the state at places in the log, as whoever came there first folded it.
    pub digests: BTreeMap<Seq, Hash>,
    /// When the last tick stood in the log.
    pub ticked_us: u64,
    /// The network.
    pub net: Net,
    /// What happened.
    pub counters: Counters,
    /// Faults are over.
    pub healed: bool,
    /// How often a set has lost a member since then.
    pub lost_healed: u64,
    leases: u128,
    jobs: u64,
    trace: Option<VecDeque<String>>,
}

impl World {
    /// The world of a seed; with a trace of its last events if asked.
    pub fn new(seed: u64, rules: Rules, traced: bool) -> Self {
        let mut chance = Chance::new(seed);
        let plan = Plan::new(&mut chance);
        Self::of(plan, chance, rules, traced)
    }

    /// The world of a plan.
    pub fn of(plan: Plan, mut chance: Chance, rules: Rules, traced: bool) -> Self {
        let ids: Vec<NodeId> = (0..plan.nodes)
            .map(|node| format!("n{node}").parse().expect("a node's name"))
            .collect();
        let log = crate::begins::log(&plan, &ids, &mut chance);
        let first: Vec<Aggregate> = log.now.clone();
        let node = |(at, id): (usize, &NodeId)| {
            let disk = |aggregate: &Aggregate| {
                let record = aggregate.record.clone();
                let holds = record.members().contains(id);
                let durable = Durable {
                    record: Some(record),
                    sealed: None,
                };
                holds.then(|| Disk::new(plan.blocks, 0, durable))
            };
            Node {
                id: ids[at].clone(),
                power: true,
                daemon: None,
                stopped: None,
                clock: Clock::new(0),
                boots: 1,
                starts: 0,
                disks: first.iter().map(disk).collect(),
                log_cut: false,
                seen: 0,
                full: false,
                failing: false,
            }
        };
        let image = |_| Image {
            reference: Reference::new(plan.blocks),
            operator: Operator::default(),
            ops: 0,
        };
        let mut world = Self {
            chance,
            now_us: 0,
            queue: BinaryHeap::new(),
            number: 0,
            rules,
            nodes: ids.iter().enumerate().map(node).collect(),
            images: (0..plan.images).map(image).collect(),
            schedulers: (0..plan.schedulers).map(Scheduler::new).collect(),
            log,
            heard: Vec::new(),
            digests: BTreeMap::new(),
            ticked_us: 0,
            net: Net::default(),
            counters: Counters::default(),
            healed: false,
            lost_healed: 0,
            leases: 1_000,
            jobs: 0,
            trace: traced.then(VecDeque::new),
            plan,
        };
        for node in 0..world.nodes.len() {
            world.after(0, Event::Starts { node });
        }
        for scheduler in 0..world.schedulers.len() {
            let us = world.chance.within(0, 1_000_000);
            world.after(us, Event::SchedulerStarts { scheduler });
        }
        for image in 0..world.images.len() {
            world.after(1_000, Event::Operator { image });
            world.after(500_000, Event::Client { image });
        }
        let fault = world.plan.fault_us;
        world.after(5_000_000 + fault, Event::Fault);
        let end = world.plan.end_us;
        world.after(end, Event::Heal);
        if world.plan.flaps {
            world.after(FLAPS_US, Event::Flaps);
        }
        world
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// What went wrong, with the last events.
    pub fn run(&mut self) -> Result<(), String> {
        while let Some(Reverse(next)) = self.queue.pop() {
            self.now_us = next.at_us;
            let settled = matches!(next.event, Event::Settled);
            self.happens(next.event)?;
            if settled && self.is_settled()? {
                self.counters.seeds += 1;
                self.counters.simulated_us += self.now_us;
                let took_us = self.now_us - self.plan.end_us;
                if self.plan.by_policy {
                    self.counters.repairing_us_max = took_us;
                } else {
                    self.counters.healing_us_max = took_us;
                }
                return Ok(());
            }
            if settled && self.now_us > self.plan.end_us + self.healed_within_us() {
                return Err(format!("nothing is well long after the last fault: {}", self.unwell()));
            }
        }
        Err("nothing happens any more".to_owned())
    }

    /// The last events.
    pub fn last_events(&self) -> String {
        let lines = self.trace.iter().flatten();
        lines.fold(String::new(), |all, line| all + line + "\n")
    }

    /// Something happens later.
    pub fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    /// Something happens at a time.
    pub fn at(&mut self, at_us: u64, event: Event) {
        self.number += 1;
        let number = self.number;
        self.queue.push(Reverse(Timed { at_us, number, event }));
    }

    /// Remembers a line, if asked to.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE_MAX {
                trace.pop_front();
            }
            trace.push_back(format!("{:>12.6} {}", self.now_us as f64 / 1e6, line()));
        }
    }

    /// A lease never used before.
    pub fn lease(&mut self) -> LeaseId {
        self.leases += 1;
        // Those that follow it are of the destination's further tries.
        LeaseId(self.leases << 32)
    }

    /// A number never used before.
    pub fn job(&mut self) -> u64 {
        self.jobs += 1;
        self.jobs
    }

    /// A node's number.
    pub fn number(&self, id: &NodeId) -> usize {
        let at = self.nodes.iter().position(|node| node.id == *id);
        at.expect("a node of this world")
    }

    /// A session's shell, if the node's daemon of that life runs.
    pub fn shell(&mut self, node: usize, image: usize) -> Option<&mut Shell> {
        Some(&mut self.nodes[node].daemon.as_mut()?.shells[image])
    }

    fn lives(&self, node: usize, life: u64) -> bool {
        self.nodes[node]
            .daemon
            .as_ref()
            .is_some_and(|daemon| daemon.life == life)
    }

    /// Whether what happens to a stopped daemon is kept for later.
    fn is_kept(&mut self, node: usize, event: Event) -> Option<Event> {
        match &mut self.nodes[node].stopped {
            Some(kept) => {
                kept.push(event);
                None
            }
            None => Some(event),
        }
    }

    /// What happens to a process of a scheduler that is gone is dropped, to a stopped one it is kept for later.
    fn is_for_scheduler(&mut self, event: Event) -> Option<Event> {
        let (scheduler, life) = match &event {
            Event::Ingests { scheduler, life }
            | Event::Acts { scheduler, life }
            | Event::Acked { scheduler, life, .. } => (*scheduler, *life),
            _ => return Some(event),
        };
        let here = &mut self.schedulers[scheduler];
        if here.process.as_ref().is_none_or(|process| process.life != life) {
            return None;
        }
        match &mut here.stopped {
            Some(kept) => {
                kept.push(event);
                None
            }
            None => Some(event),
        }
    }

    fn happens(&mut self, event: Event) -> Result<(), String> {
        let node = match &event {
            Event::Wake { node, life, .. }
            | Event::Lost { node, life, .. }
            | Event::Worked { node, life, .. }
            | Event::Persisted { node, life, .. }
            | Event::Tells { node, life, .. }
            | Event::Reports { node, life }
            | Event::Executes { node, life, .. }
            | Event::Reads { node, life } => {
                if !self.lives(*node, *life) {
                    return Ok(());
                }
                Some(*node)
            }
            Event::Arrives(letter) => Some(letter.ends().1).filter(|to| self.nodes[*to].daemon.is_some()),
            _ => None,
        };
        let event = match node {
            Some(node) => match self.is_kept(node, event) {
                Some(event) => event,
                None => return Ok(()),
            },
            None => match self.is_for_scheduler(event) {
                Some(event) => event,
                None => return Ok(()),
            },
        };
        match event {
            Event::Wake { node, image, .. } => {
                if let Some(shell) = self.shell(node, image) {
                    shell.wake_us = None;
                }
                self.step(node, image, Input::Tick, None)
            }
            Event::Arrives(letter) => self.arrives(letter),
            Event::Lost {
                node,
                image,
                peer,
                ends,
                ..
            } => {
                // Only now the client makes new connections.
                if ends {
                    self.net.broken.remove(&(image, node, peer));
                }
                let peer = self.nodes[peer].id.clone();
                self.step(node, image, Input::Lost(peer), None)
            }
            Event::TimesOut { key, life } => {
                let connection = self.net.connections.entry(key).or_default();
                if connection.life == life && !connection.stuck.is_empty() {
                    self.break_connection(key, 0);
                }
                Ok(())
            }
            Event::Worked { node, image, job, .. } => self.worked(node, image, job),
            Event::Persisted { node, image, .. } => self.persisted(node, image),
            Event::Tidy { node, image } => {
                if let Some(disk) = &mut self.nodes[node].disks[image] {
                    disk.tidy();
                }
                Ok(())
            }
            Event::Reads { node, .. } => self.reads(node),
            Event::Seen => {
                if !self.log.is_rolled_back() {
                    self.log.seen = self.log.len;
                }
                Ok(())
            }
            Event::Posted { envelope, fact } => self.posts(*envelope, *fact, None).map(drop),
            Event::Tells {
                node,
                life,
                envelope,
                fact,
            } => self.told(node, life, envelope, fact),
            Event::Reports { node, life } => {
                self.reports(node, life);
                Ok(())
            }
            Event::Executes {
                node, command, tick, ..
            } => self.executes(node, &command, tick),
            Event::SchedulerStarts { scheduler } => self.scheduler_starts(scheduler),
            Event::SchedulerContinues { scheduler } => {
                for event in self.schedulers[scheduler].stopped.take().into_iter().flatten() {
                    self.after(1, event);
                }
                Ok(())
            }
            Event::SchedulerReaches { scheduler } => {
                self.schedulers[scheduler].cut = false;
                Ok(())
            }
            Event::Ingests { scheduler, life } => self.ingests(scheduler, life),
            Event::Acts { scheduler, .. } => self.acts(scheduler),
            Event::PostedBy {
                envelope,
                out,
                answer,
                again,
            } => self.posted_by_scheduler(*envelope, *out, answer, again),
            Event::Acked {
                scheduler, out, result, ..
            } => self.acked(scheduler, &out, result),
            Event::Recovered => {
                if self.log.is_rolled_back() {
                    self.log.recover();
                    self.counters.count("rolled back and recovered");
                }
                Ok(())
            }
            Event::Client { image } => self.client(image),
            Event::Operator { image } => self.operate(image),
            Event::Fault => self.fault(),
            Event::Flaps => self.flaps(),
            Event::Continues { node } => {
                self.goes_on(node)?;
                for event in self.nodes[node].stopped.take().into_iter().flatten() {
                    self.after(1, event);
                }
                Ok(())
            }
            Event::Starts { node } => self.starts(node),
            Event::Heals { from, to } => {
                self.heals(from, to);
                Ok(())
            }
            Event::Disturbs { source, destination } => {
                self.disturbs(source, destination);
                Ok(())
            }
            Event::Reaches { node } => {
                self.nodes[node].log_cut = false;
                Ok(())
            }
            Event::HasRoom { node } => {
                self.nodes[node].full = false;
                Ok(())
            }
            Event::Heal => self.heal(),
            Event::Settled => {
                self.after(500_000, Event::Settled);
                Ok(())
            }
        }
    }

    fn flaps(&mut self) -> Result<(), String> {
        let node = self.nodes.len() - 1;
        if self.healed {
            return Ok(());
        }
        self.after(FLAPS_US, Event::Flaps);
        if self.nodes[node].daemon.is_some() {
            self.dies(node)
        } else {
            self.starts(node)
        }
    }

    fn heal(&mut self) -> Result<(), String> {
        self.note(|| "faults end".to_owned());
        self.healed = true;
        self.log.recover();
        for node in 0..self.nodes.len() {
            self.nodes[node].log_cut = false;
            self.nodes[node].full = false;
            self.nodes[node].failing = false;
            self.after(1, Event::Continues { node });
            self.after(1_000, Event::Starts { node });
        }
        for scheduler in 0..self.schedulers.len() {
            self.schedulers[scheduler].cut = false;
            self.after(1, Event::SchedulerContinues { scheduler });
            self.after(1_000, Event::SchedulerStarts { scheduler });
        }
        for (from, to) in self.net.cut.clone() {
            self.heals(from, to);
        }
        self.after(500_000, Event::Settled);
        Ok(())
    }
}

/// What belongs to a step: the values that came with it, and from which request's answer or work.
pub type Came = Option<(NodeId, RequestId, Vec<Value>)>;

/// The number of a write in what it writes.
pub fn value(op: OpId) -> Value {
    op.0 as Value
}
