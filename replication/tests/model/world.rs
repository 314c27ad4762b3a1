//! Three nodes, their disks and clocks, the log and what is under way between them. The machines are the production ones;
//! this file carries out what they ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Incarnation, LeaseId, NodeId};
use hearth_replication::aggregate::{Aggregate, Change};
use hearth_replication::handover::{Held, Incoming};
use hearth_replication::member::{self, Durable, Marks, Member};
use hearth_replication::owner::{self, OpId, Owner};
use hearth_replication::record::Record;
use hearth_replication::request::{Answer, Extent, Nodes, Refusal, Request, RequestId, Stamp, Standing, Work};
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
        let run = hearth_replication::record::Run {
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
                owner: (at == 0).then(|| Owner::open(name(0), config.rules, record.clone(), stores)),
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

    fn post(&mut self, message: Message) {
        self.messages.insert(Arc::new(message));
    }

    pub fn now(&self, at: usize) -> BootMs {
        BootMs(u64::from(self.nodes[at].clock) * TICK_MS)
    }

    // -- members ------------------------------------------------------------------------------------------------

    pub fn member(&mut self, config: &Config, at: usize, input: member::Input, stamp: Option<Stamp>, bytes: Bytes) {
        let out = self.node(at).member.step(input);
        for output in out {
            self.member_wants(config, at, output, stamp, bytes);
        }
    }

    fn member_wants(&mut self, config: &Config, at: usize, output: member::Output, stamp: Option<Stamp>, bytes: Bytes) {
        match output {
            member::Output::Perform { from, id, work, mark } => {
                let stamp = stamp.expect("a request has a stamp");
                if mark && let Work::Write { extent, .. } = &work {
                    let store = self.nodes[at].member.store();
                    for block in extent.blocks() {
                        self.node(at).disk.marks.entry(block).or_insert(store);
                    }
                }
                match work {
                    Work::Write { extent, .. } => {
                        let job = Job {
                            from,
                            id,
                            stamp,
                            extent,
                            bytes,
                        };
                        if config.async_writes {
                            self.node(at).jobs.push(job);
                        } else {
                            self.carry_out(config, at, job, true);
                        }
                    }
                    Work::Read(_) => {
                        let got = std::array::from_fn(|block| self.nodes[at].disk.cells[block].now);
                        let ended = member::Input::Finished { from, id, ok: true };
                        self.member(config, at, ended, Some(stamp), got);
                    }
                    Work::Flush { .. } => {
                        for cell in &mut self.node(at).disk.cells {
                            cell.stable = cell.now;
                            cell.cached.clear();
                        }
                        let ended = member::Input::Finished { from, id, ok: true };
                        self.member(config, at, ended, Some(stamp), bytes);
                    }
                    Work::Renew { .. } => {}
                }
            }
            member::Output::Persist(durable) => {
                if config.async_persist {
                    self.node(at).persisting = Some(durable);
                } else {
                    self.node(at).disk.durable = durable;
                    self.member(config, at, member::Input::Persisted { ok: true }, None, bytes);
                }
            }
            member::Output::Unmark(blocks) => {
                self.node(at).disk.marks.retain(|block, _| !blocks.contains(block));
            }
            member::Output::Answer { to, id, answer } => {
                let stamp = stamp.expect("an answer has a stamp");
                let to = number(&to);
                if to == at || config.quick {
                    self.answer(config, at, to, id, stamp, answer, bytes);
                } else {
                    self.post(Message::Answer {
                        from: at,
                        to,
                        id,
                        stamp,
                        answer,
                        bytes,
                    });
                }
            }
            member::Output::Raised { to, standing } => {
                let (from, to) = (at, number(&to));
                if to == at || config.quick {
                    self.raised(config, at, to, standing);
                } else {
                    self.post(Message::Raised { from, to, standing });
                }
            }
            member::Output::NotRaised { to, refusal } => {
                let (from, to) = (at, number(&to));
                if to == at || config.quick {
                    self.not_raised(config, at, to, refusal);
                } else {
                    self.post(Message::NotRaised { from, to, refusal });
                }
            }
            member::Output::Told { to, standing } => {
                let to = number(&to);
                self.takeover(
                    config,
                    to,
                    takeover::Input::Told {
                        from: name(at),
                        standing,
                    },
                    bytes,
                );
            }
            member::Output::Fenced(epoch) => self.owner(config, at, owner::Input::Fenced(epoch), bytes),
            member::Output::Forget => {
                let life = self.nodes[at].disk.life;
                self.node(at).disk = Disk {
                    life,
                    ..Disk::default()
                };
                self.ghost().reach(Reached::Dropped);
            }
            member::Output::Sealed(ok) => self.owner(config, at, owner::Input::SealedHere(ok), bytes),
        }
    }

    /// A write reaches the disk, or the disk fails.
    pub fn carry_out(&mut self, config: &Config, at: usize, job: Job, ok: bool) {
        if ok {
            self.apply(at, &job);
        } else {
            self.node(at).disk.failed = true;
        }
        let (from, id) = (job.from, job.id);
        let ended = member::Input::Finished { from, id, ok };
        self.member(config, at, ended, Some(job.stamp), job.bytes);
    }

    pub fn apply(&mut self, at: usize, job: &Job) {
        for block in job.extent.blocks() {
            let block = block.0 as usize;
            let cell = &mut self.node(at).disk.cells[block];
            cell.now = job.bytes[block];
            cell.cached.insert(job.bytes[block]);
        }
    }

    // -- owners and takeovers -----------------------------------------------------------------------------------

    pub fn owner(&mut self, config: &Config, at: usize, input: owner::Input, brought: Bytes) {
        let now = self.now(at);
        let served_by = match &input {
            owner::Input::Answered { from, .. } => number(from),
            _ => at,
        };
        let Some(owner) = &mut self.node(at).owner else { return };
        let force = owner.record().clone();
        let grant = force.grant();
        let out = owner.step(now, input);
        let record = owner.record().clone();
        if owner.ended().is_some() {
            self.node(at).owner = None;
        }
        if record != force && self.ghost.in_force.grant() == grant {
            self.ghost().set_changed(record);
        }
        for output in out {
            match output {
                owner::Output::Send { op, to, request } => {
                    let bytes = op.map_or(brought, |op| [op.0 as Value; BLOCKS]);
                    self.send(config, at, number(&to), request, bytes);
                }
                owner::Output::Publish(change) => {
                    self.post(Message::Publish(change));
                }
                owner::Output::Raise { to, record, over } => self.raise(config, at, number(&to), record, over),
                owner::Output::Acknowledge(op) => {
                    let by = (at, grant.0, grant.1);
                    self.ghost().acknowledge(op.0 as u8, by, served_by, brought);
                }
                owner::Output::Deny { op, .. } => self.ghost().deny(op.0 as u8),
                owner::Output::Joined(node) => {
                    self.ghost().lossy &= !(1 << number(&node));
                    self.ghost().reach(Reached::Joined);
                }
                owner::Output::NotChanged { .. } => {}
                owner::Output::DropCopy { node, stamp } => {
                    let to = number(&node);
                    self.post(Message::Drop { to, stamp });
                }
                owner::Output::SealHere(grant) => {
                    self.member(config, at, member::Input::Seal { grant }, None, brought);
                }
                owner::Output::Sealed { stamp, stores } => {
                    if let Some(to) = config.destination {
                        self.post(Message::Sealed { to, stamp, stores });
                    }
                }
            }
        }
    }

    pub fn takeover(&mut self, config: &Config, at: usize, input: takeover::Input, brought: Bytes) {
        let now = self.now(at);
        let Some(takeover) = &mut self.node(at).takeover else {
            return;
        };
        let out = takeover.step(now, input);
        for output in out {
            match output {
                takeover::Output::Publish(change) => {
                    self.post(Message::Publish(change));
                }
                takeover::Output::Raise { to, record, over } => self.raise(config, at, number(&to), record, over),
                takeover::Output::Send { to, request } => self.send(config, at, number(&to), request, brought),
                takeover::Output::Opened(owner) => {
                    let record = owner.record().clone();
                    let lost = |node: &NodeId| self.ghost.lossy & (1 << number(node)) != 0;
                    let all_lost = self.ghost.replaced.members().iter().all(lost);
                    for member in record.members() {
                        self.ghost().lossy &= !(1 << number(&member));
                    }
                    if self.nodes[at].incoming.is_some() {
                        self.ghost().reach(Reached::HandedOver);
                    }
                    if self.nodes[at].disk.durable.sealed.is_some() {
                        self.ghost().reach(Reached::WayBack);
                    }
                    self.ghost().open(at, &record, all_lost);
                    let node = self.node(at);
                    node.owner = Some(*owner);
                    node.takeover = None;
                    node.incoming = None;
                    if matches!(config.time, Time::Jumps) {
                        self.renew_at_once(config, at);
                    }
                }
                takeover::Output::GivenUp(_) => self.node(at).takeover = None,
            }
        }
    }

    fn send(&mut self, config: &Config, from: usize, to: usize, request: Request, bytes: Bytes) {
        if from == to {
            self.request(config, from, to, request, bytes);
        } else {
            self.post(Message::Request {
                from,
                to,
                request,
                bytes,
            });
        }
    }

    fn request(&mut self, config: &Config, from: usize, to: usize, request: Request, bytes: Bytes) {
        let stamp = Some(request.stamp);
        let from = name(from);
        self.member(config, to, member::Input::Request { from, request }, stamp, bytes);
    }

    fn raise(&mut self, config: &Config, from: usize, to: usize, record: Arc<Record>, over: Stamp) {
        if from == to {
            let from = name(from);
            let raise = member::Input::Raise { from, record, over };
            self.member(config, to, raise, None, [0; BLOCKS]);
        } else {
            self.post(Message::Raise { from, to, record, over });
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a message's parts")]
    fn answer(
        &mut self,
        config: &Config,
        from: usize,
        to: usize,
        id: RequestId,
        stamp: Stamp,
        answer: Answer,
        bytes: Bytes,
    ) {
        let from = name(from);
        let input = takeover::Input::Answered {
            from: from.clone(),
            id,
            stamp,
            answer: answer.clone(),
        };
        self.takeover(config, to, input, bytes);
        let input = owner::Input::Answered {
            from,
            id,
            stamp,
            answer,
        };
        self.owner(config, to, input, bytes);
    }

    fn raised(&mut self, config: &Config, from: usize, to: usize, standing: Standing) {
        let from = name(from);
        let input = takeover::Input::Raised {
            from: from.clone(),
            standing: standing.clone(),
        };
        self.takeover(config, to, input, [0; BLOCKS]);
        self.owner(config, to, owner::Input::Raised { from, standing }, [0; BLOCKS]);
    }

    fn not_raised(&mut self, config: &Config, from: usize, to: usize, refusal: Refusal) {
        let from = name(from);
        let input = takeover::Input::NotRaised {
            from: from.clone(),
            refusal: refusal.clone(),
        };
        self.takeover(config, to, input, [0; BLOCKS]);
        self.owner(config, to, owner::Input::NotRaised { from, refusal }, [0; BLOCKS]);
    }

    /// Every other node that is up renews the read lease.
    pub fn renew_at_once(&mut self, config: &Config, at: usize) {
        let before = self.messages.clone();
        self.owner(config, at, owner::Input::Renew, [0; BLOCKS]);
        let asked: Vec<Arc<Message>> = self.messages.difference(&before).cloned().collect();
        for message in asked {
            let Message::Request { to, request, .. } = &*message else {
                continue;
            };
            self.messages.remove(&message);
            let answer = match self.nodes[*to].member.admits(request) {
                Ok(()) => Answer::Granted { sent: self.now(at) },
                Err(refusal) => Answer::Refused(refusal),
            };
            self.answer(config, *to, at, request.id, request.stamp, answer, [0; BLOCKS]);
        }
    }

    // -- the network and the log --------------------------------------------------------------------------------

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
            Message::NotRaised { from, to, refusal } => self.not_raised(config, from, to, refusal),
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
                let Some(incoming) = &node.incoming else { return };
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

    /// The answers of some nodes arrive.
    pub fn hear(&mut self, config: &Config, at: usize, reached: u8) {
        for other in (0..3).filter(|other| reached & (1 << other) != 0) {
            self.member(config, other, member::Input::Ask { from: name(at) }, None, [0; BLOCKS]);
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
}

impl World {
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
