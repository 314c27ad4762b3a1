//! The node that writes an image: it sends writes to every member, answers its clients, and changes the set.
//!
//! Invariants:
//! - A write or a flush is acknowledged when every member of the touched runs has it: members of the record in force, of
//!   one that is committed and not in force everywhere, and of one that is proposed and may be committed already.
//! - A record is in force when all its members have it durably. Until then a failed member is waited for.
//! - Nothing is answered unless every remote member of these records has renewed its read lease within T.
//! - Operations that overlap, one of them a write, run one after the other; a copy to a joining node counts as a write.
//!
//! It is not the export: an operation's bytes are with whoever drives it. It is made by a takeover that has opened.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};

use crate::aggregate::Change;
use crate::mutants::{Mutant, Rules};
use crate::record::{Age, Record, RecordError};
use crate::request::{Answer, Extent, Nodes, Refusal, Request, RequestId, Stamp, Standing, Work};
use crate::resync::{Join, Stage, Todo};
use crate::time::{BootMs, READ_LEASE_MS};

/// A client's operation, numbered by the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ask {
    /// Read blocks.
    Read(Extent),
    /// Write blocks; with `fua`, durably.
    Write {
        /// Which blocks.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make every acknowledged write durable.
    Flush,
}

/// What happens to an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client asks.
    Client {
        /// Its operation's number.
        op: OpId,
        /// What.
        ask: Ask,
    },
    /// A member answered a request.
    Answered {
        /// Which member.
        from: NodeId,
        /// Which request.
        id: RequestId,
        /// The request's stamp.
        stamp: Stamp,
        /// How.
        answer: Answer,
    },
    /// A member's connection is lost, or it takes too long.
    MemberFailed(NodeId),
    /// The log's last record of this image that counts.
    Committed(Arc<Record>),
    /// A member recorded a set change.
    Raised {
        /// Which member.
        from: NodeId,
        /// Where it stands.
        standing: Standing,
    },
    /// A member did not record a set change.
    NotRaised {
        /// Which member.
        from: NodeId,
        /// Why.
        refusal: Refusal,
    },
    /// The member on this node stopped to admit epochs below this one.
    Fenced(Epoch),
    /// The log ends before what this node has seen.
    RolledBack,
    /// Time to renew the read leases.
    Renew,
    /// A node is to get a copy of an extent.
    Join {
        /// Which node.
        node: NodeId,
        /// Which blocks; may reach beyond the image's end.
        extent: Extent,
        /// The image's last block.
        end: BlockIndex,
    },
    /// A member's copy is to go.
    Leave(NodeId),
    /// The image is handed over: drain, then seal.
    Seal,
    /// The local member's answer to [`Output::SealHere`].
    SealedHere(bool),
}

/// What an owner wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send a request to a member, the local one included. A write carries the client's bytes or, where it is no client's,
    /// those that the answer which led to this brought.
    Send {
        /// The client's operation that it is part of.
        op: Option<OpId>,
        /// Which member.
        to: NodeId,
        /// What.
        request: Request,
    },
    /// Publish a change of the set, by compare-and-publish, until the log shows it or another one.
    Publish(Change),
    /// Have a member record a change that the log has. May be sent again.
    Raise {
        /// Which member.
        to: NodeId,
        /// What.
        record: Arc<Record>,
        /// The record that it replaces in the log.
        over: Stamp,
    },
    /// Answer a client: done. For a read, with the bytes of the member that answered last.
    Acknowledge(OpId),
    /// Answer a client: not done, or not known to be done.
    Deny {
        /// Which operation.
        op: OpId,
        /// Why.
        denial: Denial,
    },
    /// A node became a member.
    Joined(NodeId),
    /// A node does not join, or a member does not leave.
    NotChanged {
        /// Which node.
        node: NodeId,
        /// Why.
        denial: Denial,
    },
    /// The node's copy may be deleted, unless the node has a record at least this new.
    DropCopy {
        /// Which node.
        node: NodeId,
        /// The record without it.
        stamp: Stamp,
    },
    /// Have the local member seal.
    SealHere((Epoch, LeaseId)),
    /// Drained and durably sealed: the destination may take over with this.
    Sealed {
        /// The sealed record.
        stamp: Stamp,
        /// The lives of the members' stores in this session.
        stores: BTreeMap<NodeId, Incarnation>,
    },
}

/// Why a client is not served.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Denial {
    /// Another node owns the image.
    #[error("another node became the owner of this image: attach it where it is to run")]
    Deposed,
    /// The image was handed over.
    #[error("epoch {epoch} is sealed for a hand-over: attach the image again to serve it here")]
    Sealed {
        /// The epoch.
        epoch: Epoch,
    },
    /// No member is left that holds what was acknowledged.
    #[error(
        "every copy of some blocks failed or started anew since this session began, so acknowledged writes may be \
         missing: detach the image, check it, attach it again"
    )]
    NoMember,
    /// The last copy never goes.
    #[error("{0}")]
    Map(String),
    /// No member holds all of what is to be read.
    #[error("no member holds all these blocks: read them run by run")]
    Split,
    /// Another change is under way.
    #[error("another change of this image's locations is under way: ask again when it is done")]
    Busy,
    /// The log lost its end.
    #[error("the log ends before what this node has seen, so sets do not change: run `hearth log recover`")]
    RolledBack,
    /// The joining node failed.
    #[error("the node failed while it was synced: look at it, then add the location again")]
    JoinerFailed,
}

/// What stands behind an operation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Read(Extent),
    Write {
        extent: Extent,
        fua: bool,
    },
    Flush {
        keep: BTreeSet<BlockIndex>,
    },
    /// A block on its way to a joining node; `from` while it is read.
    Copy {
        block: BlockIndex,
        from: Option<NodeId>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Op {
    client: Option<OpId>,
    kind: Kind,
    started: bool,
    /// Who was sent it, under which set version.
    sent: BTreeMap<NodeId, SetVersion>,
    done: Nodes,
}

impl Op {
    fn extent(&self) -> Option<Extent> {
        match &self.kind {
            Kind::Read(extent) | Kind::Write { extent, .. } => Some(*extent),
            Kind::Copy { block, .. } => Some(Extent::block(*block)),
            Kind::Flush { .. } => None,
        }
    }

    fn restart(&mut self) {
        self.started = false;
        self.sent.clear();
        self.done.clear();
        if let Kind::Copy { from, .. } = &mut self.kind {
            *from = None;
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    Open,
    Draining,
    Sealing,
    Ended(Denial),
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    me: NodeId,
    rules: Rules,
    /// In force: every member has it durably.
    record: Arc<Record>,
    /// The last one that the log has under this lease.
    committed: Arc<Record>,
    /// One that the log may have.
    proposed: Option<Arc<Record>>,
    /// Who has recorded `committed`.
    raised: Nodes,
    stores: BTreeMap<NodeId, Incarnation>,
    leases: BTreeMap<NodeId, BootMs>,
    /// Nodes that failed in this session and are to leave the set.
    gone: Nodes,
    leaving: Option<NodeId>,
    join: Option<Join>,
    ops: BTreeMap<RequestId, Op>,
    next: RequestId,
    frozen: bool,
    phase: Phase,
}

impl Owner {
    /// An owner whose record every member has, each with the given life of its store.
    pub fn open(me: NodeId, rules: Rules, record: Arc<Record>, stores: BTreeMap<NodeId, Incarnation>) -> Self {
        Self {
            me,
            rules,
            committed: record.clone(),
            record,
            proposed: None,
            raised: Nodes::new(),
            stores,
            leases: BTreeMap::new(),
            gone: Nodes::new(),
            leaving: None,
            join: None,
            ops: BTreeMap::new(),
            next: RequestId(1),
            frozen: false,
            phase: Phase::Open,
        }
    }

    /// The record in force.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// Whether clients' operations are taken.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether the epoch ended here, and why.
    pub fn ended(&self) -> Option<&Denial> {
        match &self.phase {
            Phase::Ended(denial) => Some(denial),
            _ => None,
        }
    }

    /// The members that a write to the whole image would need.
    pub fn needed(&self) -> Nodes {
        self.counting(Record::members)
    }

    /// Whether a set change is proposed or not in force yet.
    pub fn is_changing(&self) -> bool {
        self.proposed.is_some() || self.committed != self.record
    }

    /// The life of a member's store that the session began with.
    pub fn store_of(&self, node: &NodeId) -> Incarnation {
        self.stores.get(node).copied().unwrap_or(Incarnation(0))
    }

    /// The reading of the clock from which nothing is answered unless leases are renewed; `None` while nobody else holds a
    /// copy. What is answered without asking this machine, such as a hit in RAM, is to respect it.
    pub fn answers_until(&self) -> Option<BootMs> {
        let until = |node| {
            self.leases
                .get(node)
                .map_or(BootMs(0), |sent| sent.after(READ_LEASE_MS))
        };
        self.remotes().iter().map(until).min()
    }

    /// Takes an input; `now` is this node's boot-time clock.
    pub fn step(&mut self, now: BootMs, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Client { op, ask } => self.client(op, ask, &mut out),
            Input::Answered {
                from,
                id,
                stamp,
                answer,
            } => {
                let session = (stamp.epoch, stamp.lease) == self.record.grant();
                if session && !matches!(self.phase, Phase::Ended(_)) {
                    self.answered(now, from, id, stamp, answer, &mut out);
                }
            }
            Input::MemberFailed(node) => {
                self.gone.insert(node);
            }
            Input::Committed(record) => self.committed(record, &mut out),
            Input::Raised { from, standing } => self.raised(from, &standing),
            Input::NotRaised { from, refusal } => match refusal {
                Refusal::EpochEnded { .. } | Refusal::OtherLease { .. } => self.end(Denial::Deposed, &mut out),
                Refusal::Fenced { .. } | Refusal::SetChanged { .. } => {}
                _ => {
                    self.gone.insert(from);
                }
            },
            Input::Fenced(epoch) if epoch > self.record.epoch() => self.end(Denial::Deposed, &mut out),
            Input::Fenced(_) => {}
            Input::RolledBack => self.frozen = true,
            Input::Renew => self.renew(now, &mut out),
            Input::Join { node, extent, end } => {
                let denial = self.cannot_change();
                if let Some(denial) = denial {
                    out.push(Output::NotChanged { node, denial });
                } else {
                    self.gone.remove(&node);
                    self.join = Some(Join::new(node, extent, end));
                }
            }
            Input::Leave(node) => self.leave(node, &mut out),
            Input::Seal => {
                if self.phase == Phase::Open {
                    self.phase = Phase::Draining;
                    self.join = None;
                    self.ops.retain(|_, op| op.client.is_some());
                }
            }
            Input::SealedHere(ok) => {
                if self.phase == Phase::Sealing && ok {
                    out.push(Output::Sealed {
                        stamp: self.record.stamp(),
                        stores: self.stores.clone(),
                    });
                    let epoch = self.record.epoch();
                    self.end(Denial::Sealed { epoch }, &mut out);
                } else {
                    self.end(Denial::Deposed, &mut out);
                }
            }
        }
        self.go_on(now, &mut out);
        out
    }

    fn client(&mut self, op: OpId, ask: Ask, out: &mut Vec<Output>) {
        let denial = match &self.phase {
            Phase::Open => None,
            Phase::Ended(denial) => Some(denial.clone()),
            Phase::Draining | Phase::Sealing => Some(Denial::Sealed {
                epoch: self.record.epoch(),
            }),
        };
        if let Some(denial) = denial {
            return out.push(Output::Deny { op, denial });
        }
        self.add(
            Some(op),
            match ask {
                Ask::Read(extent) => Kind::Read(extent),
                Ask::Write { extent, fua } => Kind::Write { extent, fua },
                Ask::Flush => Kind::Flush { keep: BTreeSet::new() },
            },
        );
    }

    fn add(&mut self, client: Option<OpId>, kind: Kind) {
        let op = Op {
            client,
            kind,
            started: false,
            sent: BTreeMap::new(),
            done: Nodes::new(),
        };
        self.ops.insert(self.next, op);
        self.next = RequestId(self.next.0 + 1);
    }

    fn answered(
        &mut self,
        now: BootMs,
        from: NodeId,
        id: RequestId,
        stamp: Stamp,
        answer: Answer,
        out: &mut Vec<Output>,
    ) {
        match answer {
            Answer::Granted { sent } => {
                let lease = self.leases.entry(from).or_insert(sent);
                *lease = (*lease).max(sent);
            }
            Answer::Done => self.done(now, from, id, stamp, out),
            Answer::Failed => {
                self.gone.insert(from);
            }
            Answer::Refused(refusal) => match refusal {
                Refusal::EpochEnded { .. } | Refusal::OtherLease { .. } | Refusal::Sealed { .. } => {
                    self.end(Denial::Deposed, out);
                }
                // Sent again when the newer record is in force; a newer epoch will end this one.
                Refusal::SetChanged { .. } | Refusal::Fenced { .. } => {}
                Refusal::NoRecord
                | Refusal::GrantedOverOlder { .. }
                | Refusal::NotInstalled { .. }
                | Refusal::NotInSet
                | Refusal::StoreChanged
                | Refusal::DiskFailed => {
                    if stamp == self.record.stamp() {
                        self.gone.insert(from);
                    }
                }
            },
        }
    }

    fn done(&mut self, now: BootMs, from: NodeId, id: RequestId, stamp: Stamp, out: &mut Vec<Output>) {
        let leased = self.leased(now) || self.rules.breaks(Mutant::ReadWithoutLease);
        let Some(op) = self.ops.get_mut(&id) else {
            return;
        };
        // Once a request was repeated under a newer record, only the repetition's answer counts: the repetition is still
        // under way, and what overlaps it must not begin.
        let old_counts = self.rules.breaks(Mutant::OldAnswerCounts);
        if op.sent.get(&from) != Some(&stamp.set_version) && !old_counts {
            return;
        }
        match &mut op.kind {
            Kind::Read(_) if leased => {
                out.extend(op.client.map(Output::Acknowledge));
                self.ops.remove(&id);
            }
            // The bytes may be older than what a new owner has acknowledged: they are read again under a lease.
            Kind::Read(_) => op.restart(),
            Kind::Copy { block, from: source } if source.is_some() => {
                *source = None;
                let work = Work::Write {
                    extent: Extent::block(*block),
                    fua: false,
                };
                if let Some(node) = self.join.as_ref().map(|join| join.node().clone()) {
                    self.send(id, node, work, out);
                }
            }
            Kind::Copy { block, .. } => {
                if let Some(join) = &mut self.join {
                    join.copied(*block);
                }
                self.ops.remove(&id);
            }
            Kind::Write { .. } | Kind::Flush { .. } => {
                op.done.insert(from);
            }
        }
    }

    fn send(&mut self, id: RequestId, to: NodeId, work: Work, out: &mut Vec<Output>) {
        let stamp = self.record.stamp();
        let mut client = None;
        if let Some(op) = self.ops.get_mut(&id) {
            op.sent.insert(to.clone(), stamp.set_version);
            client = op.client;
        }
        let store = self.store_of(&to);
        let request = Request { id, stamp, store, work };
        out.push(Output::Send {
            op: client,
            to,
            request,
        });
    }

    fn committed(&mut self, record: Arc<Record>, out: &mut Vec<Output>) {
        match record.age(&self.committed) {
            Age::Same | Age::Older => {}
            Age::Conflict => self.frozen = true,
            Age::Newer if record.grant() != self.record.grant() => self.end(Denial::Deposed, out),
            Age::Newer => {
                self.proposed = None;
                self.raised.clear();
                for to in &record.everyone() - &self.gone {
                    let (record, over) = (record.clone(), self.committed.stamp());
                    out.push(Output::Raise { to, record, over });
                }
                self.committed = record;
            }
        }
    }

    fn raised(&mut self, from: NodeId, standing: &Standing) {
        if standing.record.as_ref() != Some(&self.committed) {
            return;
        }
        let began = *self.stores.entry(from.clone()).or_insert(standing.store);
        let joins = self.join.as_ref().is_some_and(|join| *join.node() == from);
        if joins && self.join.as_ref().is_some_and(|join| join.stage() == Stage::Adding) {
            self.stores.insert(from.clone(), standing.store);
        } else if began != standing.store {
            self.gone.insert(from);
            return;
        }
        self.raised.insert(from);
    }

    fn renew(&mut self, now: BootMs, out: &mut Vec<Output>) {
        for to in self.remotes() {
            let request = Request {
                id: RequestId(0),
                stamp: self.record.stamp(),
                store: self.store_of(&to),
                work: Work::Renew { sent: now },
            };
            out.push(Output::Send { op: None, to, request });
        }
    }

    fn cannot_change(&self) -> Option<Denial> {
        match &self.phase {
            Phase::Ended(denial) => Some(denial.clone()),
            _ if self.frozen => Some(Denial::RolledBack),
            Phase::Draining | Phase::Sealing => Some(Denial::Busy),
            Phase::Open if self.join.is_some() || self.leaving.is_some() || self.is_changing() => Some(Denial::Busy),
            Phase::Open => None,
        }
    }

    fn leave(&mut self, node: NodeId, out: &mut Vec<Output>) {
        let changed = match self.cannot_change() {
            Some(denial) => Err(denial),
            None => self
                .record
                .without(&Nodes::from([node.clone()]))
                .map_err(|error| Denial::Map(error.to_string())),
        };
        match changed {
            Ok(to) => {
                self.leaving = Some(node);
                self.propose(to, out);
            }
            Err(denial) => out.push(Output::NotChanged { node, denial }),
        }
    }

    fn propose(&mut self, to: Record, out: &mut Vec<Output>) {
        let to = Arc::new(to);
        self.proposed = Some(to.clone());
        out.push(Output::Publish(Change {
            by: self.me.clone(),
            from: self.committed.stamp(),
            to,
        }));
    }

    fn end(&mut self, denial: Denial, out: &mut Vec<Output>) {
        if matches!(self.phase, Phase::Ended(_)) {
            return;
        }
        for op in std::mem::take(&mut self.ops).into_values() {
            let denial = denial.clone();
            out.extend(op.client.map(|op| Output::Deny { op, denial }));
        }
        self.join = None;
        self.leaving = None;
        self.phase = Phase::Ended(denial);
    }

    /// Members of every record that may count.
    fn counting(&self, members: impl Fn(&Record) -> Nodes) -> Nodes {
        if self.rules.breaks(Mutant::JoinCountsLate) {
            return members(&self.record);
        }
        let mut all = members(&self.record);
        all.extend(members(&self.committed));
        all.extend(self.proposed.iter().flat_map(|record| members(record)));
        all
    }

    fn remotes(&self) -> Nodes {
        let mut remotes = self.counting(Record::members);
        remotes.remove(&self.me);
        remotes
    }

    fn leased(&self, now: BootMs) -> bool {
        self.answers_until().is_none_or(|until| now < until)
    }

    /// Everything that follows from what is known now.
    fn go_on(&mut self, now: BootMs, out: &mut Vec<Output>) {
        if matches!(self.phase, Phase::Ended(_)) {
            return;
        }
        self.install(out);
        self.shrink(out);
        self.resync(out);
        self.acknowledge(now, out);
        self.start(now, out);
        let idle = self.ops.is_empty() && !self.is_changing();
        if self.phase == Phase::Draining && idle && self.gone.is_disjoint(&self.record.everyone()) {
            self.phase = Phase::Sealing;
            out.push(Output::SealHere(self.record.grant()));
        }
    }

    /// Puts the committed record in force once all its nodes have it.
    fn install(&mut self, out: &mut Vec<Output>) {
        let failed_joiners = &self.gone - &self.committed.members();
        let needed = &self.committed.everyone() - &failed_joiners;
        if self.committed == self.record || !needed.is_subset(&self.raised) {
            return;
        }
        self.record = self.committed.clone();
        if let Some(node) = self.leaving.take_if(|node| !self.record.everyone().contains(node)) {
            let stamp = self.record.stamp();
            out.push(Output::DropCopy { node, stamp });
        }
        let ids: Vec<RequestId> = self.ops.keys().copied().collect();
        for id in ids {
            let Some(op) = self.ops.get_mut(&id) else { continue };
            match op.kind {
                Kind::Read(_) | Kind::Copy { .. } => op.restart(),
                Kind::Write { .. } | Kind::Flush { .. } if op.started => self.send_all(id, out),
                Kind::Write { .. } | Kind::Flush { .. } => {}
            }
        }
    }

    /// Proposes the set without the nodes that failed.
    fn shrink(&mut self, out: &mut Vec<Output>) {
        if let Some(join) = self.join.take_if(|join| self.gone.contains(join.node())) {
            self.ops.retain(|_, op| op.client.is_some());
            out.push(Output::NotChanged {
                node: join.node().clone(),
                denial: Denial::JoinerFailed,
            });
        }
        if self.frozen || self.proposed.is_some() || self.gone.is_disjoint(&self.committed.everyone()) {
            return;
        }
        match self.committed.without(&self.gone) {
            Ok(to) => self.propose(to, out),
            Err(RecordError::LastCopy { .. }) => self.end(Denial::NoMember, out),
            Err(_) => self.frozen = true,
        }
    }

    fn resync(&mut self, out: &mut Vec<Output>) {
        if self.is_changing() || self.ops.values().any(|op| op.client.is_none()) {
            return;
        }
        let Some(mut join) = self.join.take() else { return };
        match join.todo(&self.record, self.rules) {
            Ok(Todo::Joined) => return out.push(Output::Joined(join.node().clone())),
            Ok(Todo::Propose(_)) if self.frozen => {}
            Ok(Todo::Propose(to)) => self.propose(to, out),
            Ok(Todo::Copy(block)) => self.add(None, Kind::Copy { block, from: None }),
            Ok(Todo::Flush) => self.add(None, Kind::Flush { keep: BTreeSet::new() }),
            Err(error) => {
                return out.push(Output::NotChanged {
                    node: join.node().clone(),
                    denial: Denial::Map(error.to_string()),
                });
            }
        }
        self.join = Some(join);
    }

    /// Answers writes and flushes that everybody has.
    fn acknowledge(&mut self, now: BootMs, out: &mut Vec<Output>) {
        let leased = self.leased(now) || self.rules.breaks(Mutant::AckWithoutLease);
        let finished: Vec<RequestId> = self
            .ops
            .iter()
            .filter(|(_, op)| op.started && self.has_everywhere(op) && (leased || op.client.is_none()))
            .map(|(id, _)| *id)
            .collect();
        for id in finished {
            let Some(op) = self.ops.remove(&id) else { continue };
            match op.client {
                Some(client) => out.push(Output::Acknowledge(client)),
                None => {
                    if let Some(join) = &mut self.join {
                        join.flushed();
                    }
                    self.resync(out);
                }
            }
        }
    }

    fn has_everywhere(&self, op: &Op) -> bool {
        let (mut needed, joiners) = match &op.kind {
            Kind::Write { extent, .. } => (
                self.counting(|record| record.members_of(*extent)),
                self.record.targets_of(*extent),
            ),
            Kind::Flush { .. } => (self.counting(Record::members), self.record.everyone()),
            Kind::Read(_) | Kind::Copy { .. } => return false,
        };
        needed.extend(&joiners - &self.gone);
        if self.rules.breaks(Mutant::AckBeforeSetDurable) {
            needed = &needed - &self.gone;
        }
        needed.is_subset(&op.done)
    }

    /// Sends what waits and may go.
    fn start(&mut self, now: BootMs, out: &mut Vec<Output>) {
        // Between two records a member may have either: what is sent now would be refused by some.
        if self.committed != self.record {
            return;
        }
        let leased = self.leased(now) || self.rules.breaks(Mutant::ReadWithoutLease);
        let waiting: Vec<RequestId> = self
            .ops
            .iter()
            .filter(|(_, op)| !op.started)
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            let Some(op) = self.ops.get(&id) else { continue };
            let reads = matches!(op.kind, Kind::Read(_));
            if self.is_behind_another(id, op) || (reads && !leased) {
                continue;
            }
            let source = self.source(op);
            let client = op.client;
            let writing: Vec<Extent> = self
                .ops
                .values()
                .filter(|op| op.started && matches!(op.kind, Kind::Write { .. }))
                .filter_map(Op::extent)
                .collect();
            let Some(op) = self.ops.get_mut(&id) else { continue };
            op.started = true;
            let source = match (&op.kind, source) {
                (_, Some(source)) => source,
                (Kind::Read(_), None) => {
                    self.ops.remove(&id);
                    let denial = Denial::Split;
                    out.extend(client.map(|op| Output::Deny { op, denial }));
                    continue;
                }
                (_, None) => self.me.clone(),
            };
            match &mut op.kind {
                Kind::Read(extent) => {
                    let work = Work::Read(*extent);
                    self.send(id, source, work, out);
                }
                Kind::Copy { block, from } => {
                    *from = Some(source.clone());
                    let work = Work::Read(Extent::block(*block));
                    self.send(id, source, work, out);
                }
                Kind::Write { .. } => self.send_all(id, out),
                Kind::Flush { keep } => {
                    keep.extend(writing.into_iter().flat_map(Extent::blocks));
                    self.send_all(id, out);
                }
            }
        }
    }

    /// Whether an earlier operation that overlaps is not finished.
    fn is_behind_another(&self, id: RequestId, op: &Op) -> bool {
        let Some(extent) = op.extent() else { return false };
        self.ops.range(..id).any(|(_, earlier)| {
            if !earlier.extent().is_some_and(|other| other.overlaps(extent)) {
                return false;
            }
            match (&earlier.kind, &op.kind) {
                (Kind::Copy { .. }, Kind::Write { .. }) | (Kind::Write { .. }, Kind::Copy { .. }) => {
                    !self.rules.breaks(Mutant::CopyUnlocked)
                }
                (Kind::Write { .. }, Kind::Read(_)) => !self.rules.breaks(Mutant::ReadOvertakesWrite),
                (Kind::Write { .. }, _) | (_, Kind::Write { .. }) => true,
                _ => false,
            }
        })
    }

    /// The member to read from: this node, else the first that did not fail.
    fn source(&self, op: &Op) -> Option<NodeId> {
        let extent = op.extent()?;
        let holds = |node: &&NodeId| self.record.holds(node, extent) && !self.gone.contains(node);
        let members = self.record.members_of(extent);
        let me = members.get(&self.me).filter(holds);
        me.or_else(|| members.iter().find(holds)).cloned()
    }

    /// Sends a write or a flush to everybody who does not have it.
    fn send_all(&mut self, id: RequestId, out: &mut Vec<Output>) {
        let Some(op) = self.ops.get(&id) else { return };
        let (targets, work) = match &op.kind {
            Kind::Write { extent, fua } => (
                self.record.targets_of(*extent),
                Work::Write {
                    extent: *extent,
                    fua: *fua,
                },
            ),
            Kind::Flush { keep } => (self.record.everyone(), Work::Flush { keep: keep.clone() }),
            Kind::Read(_) | Kind::Copy { .. } => return,
        };
        for to in &(&targets - &op.done) - &self.gone {
            self.send(id, to, work.clone(), out);
        }
    }
}
