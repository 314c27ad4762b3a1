//! Three nodes, their disks and clocks, the log and what is under way between them. The machines are the production ones;
//! this file carries out what they ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, Incarnation, LeaseId, NodeId};
use hearth_replication::handover::{Held, Incoming};
use hearth_replication::member::{self, Durable, Marks, Member};
use hearth_replication::owner::{self, OpId, Owner};
use hearth_replication::request::{Answer, Extent, Nodes, Refusal, Request, RequestId, Stamp, Standing};
use hearth_replication::takeover::{self, Takeover};
use hearth_replication::time::BootMs;

use super::config::{Budget, Config, Time};
use super::ghost::{Asked, BLOCKS, Bytes, Ghost, Reached, Value};

/// A tick of the clocks: T/4.
pub const TICK_MS: u64 = 750;

/// The nodes' names.
pub const NAMES: [&str; 3] = ["a", "b", "c"];

pub fn name(node: usize) -> NodeId {
    NAMES[node].parse().expect("a node's name")
}

pub fn number(node: &NodeId) -> usize {
    usize::from(node.as_str().as_bytes()[0] - b'a')
}

/// One block of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Cell {
    /// What a read finds.
    pub now: Value,
    /// What a power loss may leave: what was flushed, and everything written since.
    pub stable: Value,
    pub cached: BTreeSet<Value>,
}

/// What survives the daemon.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Disk {
    pub cells: [Cell; BLOCKS],
    pub durable: Durable,
    pub marks: Marks,
    pub failed: bool,
    /// Counts power losses.
    pub life: u8,
}

/// An admitted write on its way to the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Job {
    pub from: NodeId,
    pub id: RequestId,
    pub stamp: Stamp,
    pub extent: Extent,
    pub bytes: Bytes,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    pub clock: u8,
    pub disk: Disk,
    pub member: Member,
    pub jobs: Vec<Job>,
    pub persisting: Option<Durable>,
    pub owner: Option<Owner>,
    pub takeover: Option<Takeover>,
    pub incoming: Option<Incoming>,
    /// How much of the log it has read, the last entry of that, and what follows from it.
    pub read: usize,
    pub last: Option<Change>,
    pub aggregate: Aggregate,
    pub frozen: bool,
}

/// Something between two nodes, or on its way to the log. What is never delivered is lost: so partitions, one-way or both
/// ways, are runs in which some messages wait.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Message {
    Request {
        from: usize,
        to: usize,
        request: Request,
        bytes: Bytes,
    },
    Answer {
        from: usize,
        to: usize,
        id: RequestId,
        stamp: Stamp,
        answer: Answer,
        bytes: Bytes,
    },
    Raise {
        from: usize,
        to: usize,
        record: Arc<Record>,
        over: Stamp,
    },
    Raised {
        from: usize,
        to: usize,
        standing: Standing,
    },
    NotRaised {
        from: usize,
        to: usize,
        stamp: Stamp,
        refusal: Refusal,
    },
    Publish(Change),
    Sealed {
        to: usize,
        stamp: Stamp,
        stores: BTreeMap<NodeId, Incarnation>,
    },
    Drop {
        to: usize,
        stamp: Stamp,
    },
}

impl Message {
    pub fn to(&self) -> Option<usize> {
        match self {
            Message::Request { to, .. }
            | Message::Answer { to, .. }
            | Message::Raise { to, .. }
            | Message::Raised { to, .. }
            | Message::NotRaised { to, .. }
            | Message::Sealed { to, .. }
            | Message::Drop { to, .. } => Some(*to),
            Message::Publish(_) => None,
        }
    }
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub nodes: [Arc<Node>; 3],
    pub log: Vec<Change>,
    /// What the log as it is says.
    pub aggregate: Aggregate,
    pub messages: BTreeSet<Arc<Message>>,
    pub left: Budget,
    /// Values of client writes are their operations' numbers.
    pub ops: u8,
    pub leases: u8,
    pub ghost: Arc<Ghost>,
}

fn grant_lease(number: u8) -> LeaseId {
    LeaseId(u128::from(number))
}

pub fn extent(blocks: [bool; BLOCKS]) -> Extent {
    let first = blocks.iter().position(|touched| *touched).unwrap_or(0) as u64;
    let last = blocks.iter().rposition(|touched| *touched).unwrap_or(0) as u64;
    Extent {
        first: BlockIndex(first),
        last: BlockIndex(last),
    }
}

/// All blocks of the image.
pub const WHOLE: Extent = Extent {
    first: BlockIndex(0),
    last: BlockIndex(u64::MAX),
};

impl World {
    pub fn new(config: &Config) -> Self {
        let members: Nodes = (0..3)
            .filter(|node| config.members & (1 << node) != 0)
            .map(name)
            .collect();
        let stamp = Stamp {
            epoch: hearth_protocol::Epoch(1),
            lease: grant_lease(1),
            set_version: hearth_protocol::SetVersion(1),
        };
        let run = hearth_protocol::record::Run {
            first: BlockIndex(0),
            members: members.clone(),
            joiners: Nodes::new(),
        };
        let record = Arc::new(Record::new(stamp, vec![run]).expect("a record"));
        let aggregate = Aggregate {
            record: record.clone(),
            owner: Some(name(0)),
            ended: BTreeMap::new(),
        };
        let node = |at: usize| {
            let holds = members.contains(&name(at));
            let durable = Durable {
                record: holds.then(|| record.clone()),
                sealed: None,
            };
            let disk = Disk {
                durable: durable.clone(),
                ..Disk::default()
            };
            let stores = members.iter().map(|node| (node.clone(), Incarnation(0))).collect();
            Arc::new(Node {
                clock: 0,
                member: Member::new(name(at), config.rules, Incarnation(0), durable, Marks::new(), false),
                disk,
                jobs: Vec::new(),
                persisting: None,
                owner: (at == 0).then(|| Owner::open(name(0), config.rules, record.clone(), stores, RequestId(1))),
                takeover: None,
                incoming: (config.destination == Some(at))
                    .then(|| Incoming::new(name(at), config.rules, grant_lease(10))),
                read: 0,
                last: None,
                aggregate: aggregate.clone(),
                frozen: false,
            })
        };
        let mut world = World {
            nodes: [node(0), node(1), node(2)],
            log: Vec::new(),
            aggregate,
            messages: BTreeSet::new(),
            left: config.budget,
            ops: 0,
            leases: 1,
            ghost: Arc::new(Ghost::new(&record, 0)),
        };
        if matches!(config.time, Time::Jumps) {
            world.renew_at_once(config, 0);
        }
        world
    }

    pub fn node(&mut self, at: usize) -> &mut Node {
        Arc::make_mut(&mut self.nodes[at])
    }

    pub fn ghost(&mut self) -> &mut Ghost {
        Arc::make_mut(&mut self.ghost)
    }

    pub fn post(&mut self, message: Message) {
        self.messages.insert(Arc::new(message));
    }

    pub fn now(&self, at: usize) -> BootMs {
        BootMs(u64::from(self.nodes[at].clock) * TICK_MS)
    }

    pub fn deliver(&mut self, config: &Config, message: Message) {
        match message {
            Message::Request {
                from,
                to,
                request,
                bytes,
            } => self.request(config, from, to, request, bytes),
            Message::Answer {
                from,
                to,
                id,
                stamp,
                answer,
                bytes,
            } => self.answer(config, from, to, id, stamp, answer, bytes),
            Message::Raise { from, to, record, over } => {
                let from = name(from);
                let raise = member::Input::Raise { from, record, over };
                self.member(config, to, raise, None, [0; BLOCKS]);
            }
            Message::Raised { from, to, standing } => self.raised(config, from, to, standing),
            Message::NotRaised {
                from,
                to,
                stamp,
                refusal,
            } => self.not_raised(config, from, to, stamp, refusal),
            Message::Publish(change) => {
                let before = self.aggregate.record.clone();
                if self.aggregate.judge(&change).is_ok() {
                    let after = self.aggregate.record.clone();
                    self.ghost().counted(&before, &after);
                    self.log.push(change);
                }
            }
            Message::Sealed { to, stamp, stores } => {
                self.follow(config, to);
                let node = self.node(to);
                let Some(incoming) = &mut node.incoming else { return };
                let sealed = (stamp.epoch, stamp.lease);
                if let Ok(takeover) = incoming.sealed(sealed, stores, &node.aggregate)
                    && !node.frozen
                {
                    node.takeover = Some(takeover);
                }
            }
            Message::Drop { to, stamp } => {
                self.member(config, to, member::Input::Drop { stamp }, None, [0; BLOCKS]);
            }
        }
    }

    /// Nodes that have recorded something that the log lost.
    pub fn witnesses(&self) -> Nodes {
        let lost = |at: &usize| {
            let record = self.nodes[*at].disk.durable.record.as_ref();
            record.is_some_and(|record| !self.aggregate.knows(record))
        };
        (0..3).filter(lost).map(name).collect()
    }

    /// Whether a node has something to read in the log, or to notice.
    pub fn is_behind(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        !node.frozen && (node.read != self.log.len() || node.last.as_ref() != self.log.last())
    }

    /// A node reads the log to its end, or notices that it lost what this node has read.
    pub fn follow(&mut self, config: &Config, at: usize) {
        if !self.is_behind(at) {
            return;
        }
        let read = self.nodes[at].read;
        let seen = self.log.get(..read).map(|prefix| prefix.last());
        if seen != Some(self.nodes[at].last.as_ref()) {
            let node = self.node(at);
            node.frozen = true;
            node.takeover = None;
            self.ghost().reach(Reached::Frozen);
            return self.owner(config, at, owner::Input::RolledBack, [0; BLOCKS]);
        }
        let news = self.log[read..].to_vec();
        let node = self.node(at);
        node.read += news.len();
        node.last = news.last().cloned();
        for change in news {
            if self.node(at).aggregate.judge(&change).is_ok() {
                let record = self.nodes[at].aggregate.record.clone();
                self.takeover(config, at, takeover::Input::Committed(record.clone()), [0; BLOCKS]);
                self.owner(config, at, owner::Input::Committed(record), [0; BLOCKS]);
            }
        }
    }

    /// The log forgets its last entry.
    pub fn lose_tail(&mut self, config: &Config) {
        self.log.pop();
        self.ghost().lost_tail = true;
        self.aggregate = World::new(config).aggregate;
        for change in &self.log {
            self.aggregate.judge(change).expect("only what counts is kept");
        }
    }

    /// Clients ask at a node.
    pub fn ask(&mut self, config: &Config, at: usize, asked: Asked) {
        self.ops += 1;
        let op = self.ops;
        let Some(owner) = &self.nodes[at].owner else { return };
        let epoch = owner.record().epoch();
        self.ghost().ask(op, asked, epoch);
        let ask = match asked {
            Asked::Write { blocks } => owner::Ask::Write {
                extent: extent(blocks),
                fua: false,
            },
            Asked::Read { block } => owner::Ask::Read(Extent::block(BlockIndex(block as u64))),
            Asked::Flush => owner::Ask::Flush,
        };
        let op = OpId(u64::from(op));
        self.owner(config, at, owner::Input::Client { op, ask }, [0; BLOCKS]);
    }

    /// A node begins to take over with the answers of some nodes.
    pub fn begin_takeover(&mut self, config: &Config, at: usize, reached: u8) {
        self.follow(config, at);
        if self.nodes[at].frozen {
            return;
        }
        self.leases += 1;
        let lease = grant_lease(self.leases);
        let log = self.nodes[at].aggregate.clone();
        let takeover = Takeover::new(name(at), config.rules, lease, takeover::Mode::Fault, log);
        self.node(at).takeover = Some(takeover);
        self.hear(config, at, reached);
    }

    /// The takeover of a destination that the log has decided for gave up, and another one begins.
    pub fn take_again(&mut self, config: &Config, at: usize, reached: u8) {
        let log = self.nodes[at].aggregate.clone();
        let incoming = &mut self.node(at).incoming;
        if let Some(takeover) = incoming.as_mut().and_then(|incoming| incoming.again(&log)) {
            self.ghost().reach(Reached::TookAgain);
            self.node(at).takeover = Some(takeover);
            self.hear(config, at, reached);
        }
    }

    /// The answers of some nodes arrive.
    pub fn hear(&mut self, config: &Config, at: usize, reached: u8) {
        for other in (0..3).filter(|other| reached & (1 << other) != 0) {
            let (from, lease) = (name(at), LeaseId(0));
            self.member(config, other, member::Input::Ask { from, lease }, None, [0; BLOCKS]);
        }
        self.takeover(config, at, takeover::Input::Reached, [0; BLOCKS]);
    }

    /// A node's daemon dies and starts again. A node that stays down is one that gets no messages.
    pub fn kill(&mut self, config: &Config, at: usize, finish_jobs: bool) {
        let jobs = std::mem::take(&mut self.node(at).jobs);
        if finish_jobs {
            for job in &jobs {
                self.apply(at, job);
            }
        }
        let node = self.node(at);
        if let Some(durable) = node.persisting.take()
            && finish_jobs
        {
            node.disk.durable = durable;
        }
        node.owner = None;
        node.takeover = None;
        node.incoming = None;
        self.messages.retain(|message| message.to() != Some(at));
        self.start(config, at);
    }

    /// The power fails: of each block one of the values that were not flushed, or the flushed one, stays.
    pub fn lose_power(&mut self, config: &Config, at: usize, choice: usize) {
        let node = self.node(at);
        node.disk.life += 1;
        let mut choice = choice;
        for cell in &mut node.disk.cells {
            let options: Vec<Value> = [cell.stable].into_iter().chain(cell.cached.iter().copied()).collect();
            cell.now = options[choice % options.len()];
            choice /= options.len();
            cell.stable = cell.now;
            cell.cached.clear();
        }
        if !node.disk.marks.is_empty() {
            self.ghost().lossy |= 1 << at;
        }
        self.start(config, at);
    }

    /// How many outcomes a power loss of a node has.
    pub fn outcomes(&self, at: usize) -> usize {
        let cells = &self.nodes[at].disk.cells;
        cells.iter().map(|cell| 1 + cell.cached.len()).product()
    }

    fn start(&mut self, config: &Config, at: usize) {
        let node = self.node(at);
        let disk = &node.disk;
        let (store, durable, marks) = (
            Incarnation(u128::from(disk.life)),
            disk.durable.clone(),
            disk.marks.clone(),
        );
        node.member = Member::new(name(at), config.rules, store, durable, marks, disk.failed);
    }

    /// Changes reach the log, and everybody reads it, at once.
    pub fn settle_log(&mut self, config: &Config) {
        loop {
            let change = self
                .messages
                .iter()
                .find(|message| matches!(***message, Message::Publish(_)))
                .cloned();
            if let Some(change) = change {
                self.messages.remove(&change);
                self.deliver(config, Message::clone(&change));
            } else if let Some(at) = (0..3).find(|at| self.is_behind(*at)) {
                self.follow(config, at);
            } else {
                return;
            }
        }
    }

    /// A client writes at the destination of a hand-over.
    pub fn incoming_write(&mut self, config: &Config, at: usize) {
        self.follow(config, at);
        let node = self.node(at);
        let log = node.aggregate.clone();
        if let Some(incoming) = &mut node.incoming
            && let Ok(Held::Begins(takeover)) = incoming.write(&log)
            && node.takeover.is_none()
        {
            node.takeover = Some(*takeover);
        }
    }
}
