//! One image's protocol on one node: its copy, if it holds one, and what it is to the image's clients, with every timer and
//! every repetition. Who drives it moves bytes and messages, and calls it again when a wake-up is due.
//!
//! Invariants:
//! - What a node says to itself never leaves the session, and passes the same gate as what others say.
//! - Everything that may be lost is asked again, or given up, within a stated time; nothing else is sent twice.
//! - What waits is bounded: operations that an image not yet open holds, and one entry per request under way.
//!
//! It decides nothing that the machines decide: it is the post between [`Member`], [`Owner`], [`Takeover`] and
//! [`Incoming`]. A takeover that gives up is begun again by whoever drives it, under a new lease. Only the destination of a
//! hand-over goes on by itself: its guest has nobody else.

mod copy;
mod roles;
mod timers;
mod waits;
mod words;

use std::collections::VecDeque;
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::Record;
use hearth_protocol::{LeaseId, NodeId};

use self::waits::{Asking, Waits};
pub use self::words::{Input, Message, Output, Replica};
use crate::handover::{HELD_WRITES_MAX, Held, Incoming};
use crate::member::{self, Member};
use crate::mutants::{Mutant, Rules};
use crate::owner::{self, Ask, Check, Denial, OpId, Owner};
use crate::request::{Bytes, Reply, Standing};
use crate::takeover::{self, Mode, Setback, Takeover};
use crate::time::{BootMs, TAKE_AGAIN_MS};

/// What this node is to the image's clients.
#[derive(Debug, Clone)]
enum Role {
    /// Not attached.
    Detached,
    /// The destination of a hand-over that does not take over now.
    Incoming(Incoming),
    /// With what it is again if it gives up, at the destination of a hand-over.
    Taking(Box<Takeover>, Option<Incoming>),
    /// A takeover gave up: what clients ask is held.
    Stalled,
    Owning(Box<Owner>),
    Ended(Denial),
}

/// Something between the machines of this node.
enum Inner {
    Member(member::Input, Bytes),
    Reply { from: NodeId, reply: Reply },
    Owner(owner::Input),
    Takeover(takeover::Input),
}

/// One step.
struct Step {
    now: BootMs,
    todo: VecDeque<Inner>,
    out: Vec<Output>,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Session {
    me: NodeId,
    rules: Rules,
    member: Option<Member>,
    log: Aggregate,
    /// The log ends before what this node has seen.
    frozen: bool,
    role: Role,
    /// Operations that wait for the image to open, in their order.
    held: VecDeque<(OpId, Ask)>,
    /// The destination of the hand-over being prepared.
    destination: Option<NodeId>,
    waits: Waits,
    wake_at: Option<BootMs>,
}

impl Session {
    /// A session as the disk and the log have it; without a replica, this node holds no copy.
    pub fn new(me: NodeId, rules: Rules, replica: Option<Replica>, log: Aggregate) -> Self {
        let mut session = Self {
            me,
            rules,
            member: None,
            log,
            frozen: false,
            role: Role::Detached,
            held: VecDeque::new(),
            destination: None,
            waits: Waits::default(),
            wake_at: None,
        };
        session.member = replica.map(|replica| session.made(replica));
        session
    }

    fn made(&self, replica: Replica) -> Member {
        let Replica {
            store,
            durable,
            marks,
            failed,
        } = replica;
        Member::new(self.me.clone(), self.rules, store, durable, marks, failed)
    }

    /// When [`Input::Tick`] is due at the latest, on this node's boot-time clock.
    pub fn wake_at(&self) -> Option<BootMs> {
        self.wake_at
    }

    /// Whether clients' operations are carried out.
    pub fn is_open(&self) -> bool {
        self.owner().is_some_and(Owner::is_open)
    }

    /// Whether this node waits as the destination of a hand-over.
    pub fn is_incoming(&self) -> bool {
        matches!(self.role, Role::Incoming(_))
    }

    /// The owner, while this node is the image's.
    pub fn owner(&self) -> Option<&Owner> {
        match &self.role {
            Role::Owning(owner) => Some(owner),
            _ => None,
        }
    }

    /// The record in force here: the owner's, else the one that is durable with the copy.
    pub fn record(&self) -> Option<&Arc<Record>> {
        let durable = || self.member.as_ref().and_then(Member::record);
        self.owner().map(Owner::record).or_else(durable)
    }

    /// See [`Owner::answers_until`]; `None` also while this node is not the owner.
    pub fn answers_until(&self) -> Option<BootMs> {
        self.owner().and_then(Owner::answers_until)
    }

    /// Where this node's copy stands, if it holds one.
    pub fn standing(&self) -> Option<Standing> {
        self.member.as_ref().map(Member::standing)
    }

    /// Whether this node holds a copy, and its disk did not fail. Asked with every step, so it counts nothing.
    pub fn has_sound_copy(&self) -> bool {
        self.member.as_ref().is_some_and(|member| !member.has_failed())
    }

    /// What counts in the log, as far as it was read here.
    pub fn aggregate(&self) -> &Aggregate {
        &self.log
    }

    /// Takes an input; `now` is this node's boot-time clock.
    pub fn step(&mut self, now: BootMs, input: Input) -> Vec<Output> {
        self.overslept(now);
        let mut step = Step {
            now,
            todo: VecDeque::new(),
            out: Vec::new(),
        };
        self.take(input, &mut step);
        loop {
            while let Some(inner) = step.todo.pop_front() {
                match inner {
                    Inner::Member(input, bytes) => self.copy(input, bytes, &mut step),
                    Inner::Reply { from, reply } => self.reply(from, reply, &mut step),
                    Inner::Owner(input) => self.own(input, &mut step),
                    Inner::Takeover(input) => self.take_over(input, &mut step),
                }
            }
            self.fire(&mut step);
            if step.todo.is_empty() {
                break;
            }
        }
        self.wake_at = self.due();
        step.out
    }

    fn take(&mut self, input: Input, step: &mut Step) {
        let none = Bytes::None;
        match input {
            Input::Client { op, ask } => self.client(op, ask, step),
            Input::Check { op, check } => self.check(op, check, step),
            Input::Peer { from, message } => self.peer(from, message, step),
            Input::Lost(node) => {
                self.waits.renew_soon(step.now);
                if self.waits.waits_for(&node) {
                    self.fail(node, step);
                }
            }
            Input::Finished { from, id, ok } => {
                let finished = member::Input::Finished { from, id, ok };
                step.todo.push_back(Inner::Member(finished, none));
            }
            Input::Hashed { from, id, hashes } => {
                let hashed = member::Input::Hashed { from, id, hashes };
                step.todo.push_back(Inner::Member(hashed, none));
            }
            Input::NoRoom { from, id } => {
                let refused = member::Input::NoRoom { from, id };
                step.todo.push_back(Inner::Member(refused, none));
            }
            Input::Persisted { ok } => {
                step.todo
                    .push_back(Inner::Member(member::Input::Persisted { ok }, none));
            }
            Input::Logged(change) => self.logged(&change, step),
            Input::RolledBack => {
                self.frozen = true;
                if matches!(self.role, Role::Taking(..)) {
                    self.gave_up(Setback::RolledBack { node: self.me.clone() }, step);
                }
                step.todo.push_back(Inner::Owner(owner::Input::RolledBack));
            }
            Input::Rebased(log) => {
                self.frozen = false;
                self.log = log;
                step.todo
                    .push_back(Inner::Owner(owner::Input::Rebased(self.log.clone())));
                self.committed(step);
            }
            Input::Take { lease } => self.takes(lease, Mode::Fault, step),
            Input::Force { lease } => self.takes(lease, Mode::Forced, step),
            Input::Incoming { lease } => {
                if !matches!(self.role, Role::Owning(_) | Role::Taking(..)) {
                    self.waits.take_again = None;
                    self.role = Role::Incoming(Incoming::new(self.me.clone(), self.rules, lease));
                }
            }
            Input::Prepare(replica) => {
                let works = |member: &Member| {
                    let standing = member.standing();
                    standing.record.is_some() && !standing.failed
                };
                if !self.member.as_ref().is_some_and(works) {
                    self.member = Some(self.made(replica));
                }
            }
            Input::Unprepare => {
                let is_bare = self.member.as_ref().is_some_and(|member| member.record().is_none());
                if is_bare && matches!(self.role, Role::Detached | Role::Ended(_)) {
                    self.member = None;
                    step.out.push(Output::Forget);
                }
            }
            Input::Join {
                node,
                extent,
                end,
                blocks,
                allowed,
            } => match &self.role {
                Role::Owning(_) => {
                    let join = owner::Input::Join {
                        node,
                        extent,
                        end,
                        blocks,
                        allowed,
                    };
                    step.todo.push_back(Inner::Owner(join));
                }
                _ => self.not_changed(node, step),
            },
            Input::Allow { node, blocks } => {
                step.todo.push_back(Inner::Owner(owner::Input::Allow { node, blocks }));
            }
            // What a joiner that failed leaves behind is the same.
            Input::Cancel(node) => match &self.role {
                Role::Owning(owner) if owner.may_cancel(&node) => {
                    step.todo.push_back(Inner::Owner(owner::Input::MemberFailed(node)));
                }
                _ => {}
            },
            Input::Pause(paused) => step.todo.push_back(Inner::Owner(owner::Input::Pause(paused))),
            Input::Leave(node) => match &self.role {
                Role::Owning(_) => step.todo.push_back(Inner::Owner(owner::Input::Leave(node))),
                _ => self.not_changed(node, step),
            },
            Input::Seal { to } => self.seal(to, step),
            Input::Tick => {}
        }
    }

    fn takes(&mut self, lease: LeaseId, mode: Mode, step: &mut Step) {
        if !matches!(self.role, Role::Owning(_) | Role::Taking(_, None)) {
            let (me, log) = (self.me.clone(), self.log.clone());
            self.begin(Takeover::new(me, self.rules, lease, mode, log), None, step);
        }
    }

    fn not_changed(&self, node: NodeId, step: &mut Step) {
        let denial = match &self.role {
            Role::Ended(denial) => denial.clone(),
            _ => Denial::Detached,
        };
        step.out.push(Output::NotChanged { node, denial });
    }

    fn check(&self, op: OpId, check: Check, step: &mut Step) {
        let denial = match &self.role {
            Role::Owning(_) => return step.todo.push_back(Inner::Owner(owner::Input::Check { op, check })),
            Role::Ended(denial) => denial.clone(),
            Role::Detached | Role::Incoming(_) | Role::Taking(..) | Role::Stalled => Denial::Detached,
        };
        step.out.push(Output::Deny { op, denial });
    }

    fn client(&mut self, op: OpId, ask: Ask, step: &mut Step) {
        let mut denial = None;
        match &mut self.role {
            Role::Owning(_) => {
                let client = owner::Input::Client { op, ask };
                return step.todo.push_back(Inner::Owner(client));
            }
            Role::Detached => denial = Some(Denial::Detached),
            Role::Ended(why) => denial = Some(why.clone()),
            Role::Incoming(incoming) => {
                // What this node's clients have not written needs no flush; the source's clients flush there. What they
                // wrote before, while a takeover was tried here, is held too.
                if ask == Ask::Flush && self.held.is_empty() {
                    let bytes = Bytes::None;
                    return step.out.push(Output::Acknowledge { op, bytes });
                }
                if let (Ask::Read(_), Some(owner)) = (ask, self.log.owner.as_ref().filter(|owner| **owner != self.me)) {
                    let owner = owner.clone();
                    return step.out.push(Output::ReadThrough { op, owner });
                }
                match incoming.write(&self.log) {
                    Ok(Held::Waits) => {}
                    Ok(Held::Begins(takeover)) => {
                        let incoming = incoming.clone();
                        self.begin(*takeover, Some(incoming), step);
                    }
                    Err(_) => denial = Some(Denial::Full),
                }
            }
            Role::Taking(..) | Role::Stalled => {}
        }
        if self.held.len() >= HELD_WRITES_MAX as usize {
            denial = denial.or(Some(Denial::Full));
        }
        match denial {
            Some(denial) => step.out.push(Output::Deny { op, denial }),
            None => self.held.push_back((op, ask)),
        }
    }

    fn peer(&mut self, from: NodeId, message: Message, step: &mut Step) {
        let none = Bytes::None;
        let inner = match message {
            Message::Request(request) => Inner::Member(member::Input::Request { from, request }, Bytes::OfRequest),
            Message::Raise { record, over } => Inner::Member(member::Input::Raise { from, record, over }, none),
            Message::Ask(lease) => Inner::Member(member::Input::Ask { from, lease }, none),
            Message::Drop { stamp } => Inner::Member(member::Input::Drop { stamp }, none),
            Message::Answer { id, stamp, answer } => Inner::Reply {
                from,
                reply: Reply::Answered { id, stamp, answer },
            },
            Message::Raised(standing) => Inner::Reply {
                from,
                reply: Reply::Raised(standing),
            },
            Message::NotRaised { stamp, refusal } => Inner::Reply {
                from,
                reply: Reply::NotRaised { stamp, refusal },
            },
            Message::Told { lease, standing } => return self.told(from, lease, standing, step),
            Message::Sealed { stamp, stores } => {
                // A log that is not read so far yet is waited for: the source says it again.
                if let Role::Incoming(incoming) = &mut self.role
                    && self.log.record.stamp() == stamp
                    && !self.frozen
                    && let Ok(takeover) = incoming.sealed((stamp.epoch, stamp.lease), stores, &self.log)
                {
                    let incoming = incoming.clone();
                    self.begin(takeover, Some(incoming), step);
                }
                return;
            }
        };
        step.todo.push_back(inner);
    }

    fn logged(&mut self, change: &Change, step: &mut Step) {
        if !self.frozen && self.log.judge(change).is_ok() {
            self.committed(step);
        }
    }

    /// The log has a record that counts.
    fn committed(&mut self, step: &mut Step) {
        let record = self.log.record.clone();
        let over = |change: &Change| change.from != record.stamp();
        if self.waits.publish.as_ref().is_some_and(|(change, _)| over(change)) {
            self.waits.publish = None;
        }
        let handed = |grant| grant != record.grant();
        let grant = self.waits.handing.as_ref().map(|handing| handing.stamp);
        if grant.is_some_and(|stamp| handed((stamp.epoch, stamp.lease))) {
            self.waits.handing = None;
        }
        match std::mem::replace(&mut self.role, Role::Detached) {
            // Nothing is published yet, so a set change of the owner before is no rival.
            Role::Taking(takeover, incoming) if takeover.is_asking() && !takeover.is_rivalled(&record) => {
                self.begin(takeover.over(self.log.clone()), incoming, step);
            }
            role => self.role = role,
        }
        if let Role::Incoming(incoming) = &self.role {
            // What a takeover that gave up had published may arrive in the log behind that.
            let decided = incoming.is_decided(&self.log);
            let at = self.waits.take_again.unwrap_or(step.now);
            self.waits.take_again = decided.then_some(at);
        }
        step.todo
            .push_back(Inner::Takeover(takeover::Input::Committed(record.clone())));
        step.todo.push_back(Inner::Owner(owner::Input::Committed(record)));
    }

    fn begin(&mut self, takeover: Takeover, incoming: Option<Incoming>, step: &mut Step) {
        self.waits.clear();
        self.waits.handing = None;
        let mut left = self.log.record.everyone();
        if takeover.is_forced() {
            // This node, which need not be in the set, and those that may know more than it does.
            left.insert(self.me.clone());
            let known = self.member.as_ref().and_then(Member::record);
            left.extend(known.into_iter().flat_map(|record| record.everyone()));
        }
        self.waits.asking = Some(Asking {
            lease: takeover.lease(),
            since: step.now,
            again: step.now,
            left,
            ahead: false,
        });
        self.role = Role::Taking(Box::new(takeover), incoming);
        if self.frozen {
            self.gave_up(Setback::RolledBack { node: self.me.clone() }, step);
        }
    }

    /// A destination is one again. Once the log has decided for it nobody else brings the image up, so it takes over anew,
    /// unless its guest would lose what was acknowledged to it.
    fn gave_up(&mut self, setback: Setback, step: &mut Step) {
        self.waits.clear();
        let lost = matches!(setback, Setback::Gap { .. });
        step.out.push(Output::GivenUp(setback));
        let Role::Taking(_, Some(incoming)) = std::mem::replace(&mut self.role, Role::Stalled) else {
            return;
        };
        if self.rules.breaks(Mutant::DestinationDeaf) {
            return;
        }
        let decided = incoming.is_decided(&self.log);
        self.role = Role::Incoming(incoming);
        if decided && lost {
            self.ended(Denial::NoMember, step);
        } else if decided {
            self.waits.take_again = Some(step.now.after(TAKE_AGAIN_MS));
        }
    }

    /// Takes over again at a destination.
    fn take_again(&mut self, step: &mut Step) {
        self.waits.take_again = None;
        if let Role::Incoming(incoming) = &mut self.role
            && let Some(takeover) = incoming.again(&self.log)
        {
            let incoming = incoming.clone();
            self.begin(takeover, Some(incoming), step);
        }
    }

    fn ended(&mut self, denial: Denial, step: &mut Step) {
        for (op, _) in std::mem::take(&mut self.held) {
            let denial = denial.clone();
            step.out.push(Output::Deny { op, denial });
        }
        self.waits.clear();
        step.out.push(Output::Ended(denial.clone()));
        self.role = Role::Ended(denial);
    }

    fn seal(&mut self, to: Option<NodeId>, step: &mut Step) {
        match &self.role {
            Role::Owning(_) => {
                self.destination = to;
                step.todo.push_back(Inner::Owner(owner::Input::Seal));
            }
            Role::Incoming(_) | Role::Taking(..) | Role::Stalled => self.ended(Denial::Detached, step),
            Role::Detached | Role::Ended(_) => {}
        }
    }

    /// A node is taken to have failed.
    fn fail(&mut self, node: NodeId, step: &mut Step) {
        self.waits.forget(&node);
        let inner = match &self.role {
            Role::Owning(_) => Inner::Owner(owner::Input::MemberFailed(node)),
            Role::Taking(..) => Inner::Takeover(takeover::Input::MemberFailed(node)),
            _ => return,
        };
        step.todo.push_back(inner);
    }
}
