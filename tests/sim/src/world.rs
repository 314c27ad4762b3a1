//! The world: nodes, network, log and images, and one queue of events in the order of simulated time.
//!
//! Everything that is left to chance is drawn from one stream, and nothing else differs between two runs of a seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::{Nodes, Record, Run};
use hearth_protocol::{BlockIndex, Epoch, LeaseId, NodeId, SetVersion};
use hearth_replication::member::Durable;
use hearth_replication::mutants::Rules;
use hearth_replication::owner::OpId;
use hearth_replication::request::{RequestId, Stamp};
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

/// How many of the last events a failure shows.
const TRACE_MAX: usize = 1_000;

/// Simulated time in which everything has to be well again after the last fault: several takeovers one after another, each
/// with a member to be given up, and copies of all blocks.
const HEALED_US: u64 = 180_000_000;

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
    /// The log.
    pub log: Log,
    /// The network.
    pub net: Net,
    /// What happened.
    pub counters: Counters,
    /// Faults are over.
    pub healed: bool,
    leases: u128,
    jobs: u64,
    trace: Option<VecDeque<String>>,
}

impl World {
    /// The world of a seed; with a trace of its last events if asked.
    pub fn new(seed: u64, rules: Rules, traced: bool) -> Self {
        let mut chance = Chance::new(seed);
        let plan = Plan::new(&mut chance);
        let ids: Vec<NodeId> = (0..plan.nodes)
            .map(|node| format!("n{node}").parse().expect("a node's name"))
            .collect();
        let first: Vec<Aggregate> = (0..plan.images).map(|_| first(&plan, &ids, &mut chance)).collect();
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
            log: Log::new(first),
            net: Net::default(),
            counters: Counters::default(),
            healed: false,
            leases: 1_000,
            jobs: 0,
            trace: traced.then(VecDeque::new),
            plan,
        };
        for node in 0..world.nodes.len() {
            world.after(0, Event::Starts { node });
        }
        for image in 0..world.images.len() {
            world.after(1_000, Event::Operator { image });
            world.after(500_000, Event::Client { image });
        }
        let fault = world.plan.fault_us;
        world.after(5_000_000 + fault, Event::Fault);
        let end = world.plan.end_us;
        world.after(end, Event::Heal);
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
                self.counters.healing_us_max = self.now_us - self.plan.end_us;
                return Ok(());
            }
            if self.now_us > self.plan.end_us + HEALED_US {
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
        LeaseId(self.leases)
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

    fn happens(&mut self, event: Event) -> Result<(), String> {
        let node = match &event {
            Event::Wake { node, life, .. }
            | Event::Lost { node, life, .. }
            | Event::Worked { node, life, .. }
            | Event::Persisted { node, life, .. }
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
            None => event,
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
            Event::Published { image, change } => self.published(image, change),
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
        for (from, to) in self.net.cut.clone() {
            self.heals(from, to);
        }
        self.after(500_000, Event::Settled);
        Ok(())
    }
}

/// The first record of an image, of one run or some.
fn first(plan: &Plan, ids: &[NodeId], chance: &mut Chance) -> Aggregate {
    let mut starts = BTreeSet::from([0]);
    if chance.happens(400) {
        starts.extend((0..2).map(|_| chance.below(plan.blocks)));
    }
    let runs = starts.into_iter().map(|first| {
        let mut members = Nodes::new();
        while members.len() < plan.copies {
            members.extend(chance.pick(ids));
        }
        Run {
            first: BlockIndex(first),
            members,
            joiners: Nodes::new(),
        }
    });
    let stamp = Stamp {
        epoch: Epoch(0),
        lease: LeaseId(0),
        set_version: SetVersion(1),
    };
    Aggregate {
        record: Arc::new(Record::new(stamp, runs.collect()).expect("a record")),
        owner: None,
        ended: BTreeMap::new(),
    }
}

/// What belongs to a step: the values that came with it, and from which request's answer or work.
pub type Came = Option<(NodeId, RequestId, Vec<Value>)>;

/// The number of a write in what it writes.
pub fn value(op: OpId) -> Value {
    op.0 as Value
}
