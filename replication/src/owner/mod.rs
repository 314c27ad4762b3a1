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

mod check;
mod missed;
mod ops;
mod room;
mod set;
mod words;

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Incarnation, NodeId};

use self::missed::Missed;
use self::ops::Op;
pub use self::words::{Ask, Check, Denial, Input, OpId, Output};
use crate::mutants::{Mutant, Rules};
use crate::request::{Answer, Bytes, Nodes, Refusal, Reply, Request, RequestId, Stamp, Work};
use crate::resync::Join;
use crate::time::{BootMs, READ_LEASE_MS};
use hearth_protocol::record::Record;

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
    /// What nodes that left in this session have missed.
    missed: BTreeMap<NodeId, Missed>,
    leaving: Option<NodeId>,
    join: Option<Join>,
    ops: BTreeMap<RequestId, Op>,
    next: RequestId,
    frozen: bool,
    phase: Phase,
}

impl Owner {
    /// An owner whose record every member has, each with the given life of its store. It numbers its requests from `first`,
    /// behind those of the takeover under the same record.
    pub fn open(
        me: NodeId,
        rules: Rules,
        record: Arc<Record>,
        stores: BTreeMap<NodeId, Incarnation>,
        first: RequestId,
    ) -> Self {
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
            missed: BTreeMap::new(),
            leaving: None,
            join: None,
            ops: BTreeMap::new(),
            next: first,
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

    /// The block that is copied next to a joining node, if one is copied to.
    pub fn copied_up_to(&self) -> Option<BlockIndex> {
        self.join.as_ref().map(Join::copied_up_to)
    }

    /// The members that a write to the whole image would need.
    pub fn needed(&self) -> Nodes {
        self.that_count().flat_map(Record::members).collect()
    }

    /// Whether every run keeps a member if this node fails too. The last one is waited for, however long it takes.
    pub fn spares(&self, node: &NodeId) -> bool {
        let stays = |other: &NodeId| other != node && !self.gone.contains(other);
        let runs = self.committed.runs();
        runs.iter().all(|run| run.members.iter().any(stays))
    }

    /// Whether a client waits.
    pub fn is_busy(&self) -> bool {
        self.ops.values().any(|op| op.client.is_some())
    }

    /// The join under way.
    pub fn join(&self) -> Option<&Join> {
        self.join.as_ref()
    }

    /// Whether a node joins and holds nothing yet that counts, by any record that may count.
    pub fn may_cancel(&self, node: &NodeId) -> bool {
        let joins = self.join.as_ref().is_some_and(|join| join.node() == node);
        joins && !self.needed().contains(node)
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
        let members = self.that_count().flat_map(Record::runs).flat_map(|run| &run.members);
        members.filter(|node| **node != self.me).map(until).min()
    }

    /// The members whose read lease is missing: nothing is answered until they renew it or have left the set.
    pub fn unleased(&self, now: BootMs) -> Nodes {
        let held = |node: &NodeId| {
            self.leases
                .get(node)
                .is_some_and(|sent| now < sent.after(READ_LEASE_MS))
        };
        self.remotes().into_iter().filter(|node| !held(node)).collect()
    }

    /// Takes an input; `now` is this node's boot-time clock.
    pub fn step(&mut self, now: BootMs, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Client { op, ask } => self.client(op, ask, &mut out),
            Input::Check { op, check } => self.check(op, check, &mut out),
            Input::Reply { from, reply } => self.reply(now, from, reply, &mut out),
            Input::MemberFailed(node) => {
                self.give_up(node);
            }
            Input::Committed(record) => self.committed(record, &mut out),
            Input::Fenced(epoch) if epoch > self.record.epoch() => self.end(Denial::Deposed, &mut out),
            Input::Fenced(_) => {}
            Input::RolledBack => self.frozen = true,
            Input::Rebased(log) => self.rebased(&log, &mut out),
            Input::Renew => self.renew(now, &mut out),
            Input::Join {
                node,
                extent,
                end,
                blocks,
                allowed,
            } => {
                let denial = self.cannot_change();
                if let Some(denial) = denial {
                    out.push(Output::NotChanged { node, denial });
                } else {
                    self.gone.remove(&node);
                    self.join = Some(Join::new(node, extent, end, blocks, allowed));
                }
            }
            Input::Allow { node, blocks } => {
                if let Some(join) = self.join.as_mut().filter(|join| *join.node() == node) {
                    join.allow(blocks);
                }
            }
            Input::Pause(paused) => {
                if let Some(join) = &mut self.join {
                    join.pause(paused);
                }
            }
            Input::Leave(node) => self.leave(node, &mut out),
            Input::Seal => {
                if self.phase == Phase::Open {
                    // Copies under way are waited for: what overlaps them must not begin before.
                    self.phase = Phase::Draining;
                    self.join = None;
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

    fn reply(&mut self, now: BootMs, from: NodeId, reply: Reply, out: &mut Vec<Output>) {
        match reply {
            Reply::Answered { id, stamp, answer } => {
                let session = (stamp.epoch, stamp.lease) == self.record.grant();
                if session && !matches!(self.phase, Phase::Ended(_)) {
                    self.answered(now, from, id, stamp, answer, out);
                }
            }
            Reply::Raised(standing) => self.raised(from, &standing),
            Reply::NotRaised { stamp, .. } if stamp != self.committed.stamp() => {}
            Reply::NotRaised { refusal, .. } => match refusal {
                Refusal::EpochEnded { .. } | Refusal::OtherLease { .. } => self.end(Denial::Deposed, out),
                Refusal::Fenced { .. } | Refusal::SetChanged { .. } => {}
                _ => {
                    self.give_up(from);
                }
            },
        }
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
            Answer::Hashed(hashes) => self.hashed(from, id, stamp, hashes),
            Answer::Failed => {
                self.give_up(from);
            }
            Answer::NoRoom => self.no_room(from, id, stamp),
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
                        self.give_up(from);
                    }
                }
            },
        }
    }

    fn renew(&mut self, now: BootMs, out: &mut Vec<Output>) {
        for to in self.remotes() {
            let request = Request {
                id: RequestId(0),
                stamp: self.record.stamp(),
                store: self.store_of(&to),
                work: Work::Renew { sent: now },
            };
            let bytes = Bytes::None;
            out.push(Output::Send { to, request, bytes });
        }
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

    /// Every record that may count, each once. Asked with every step, so it makes no sets.
    fn that_count(&self) -> impl Iterator<Item = &Record> {
        let late = self.rules.breaks(Mutant::JoinCountsLate);
        let committed = (!late && !Arc::ptr_eq(&self.committed, &self.record)).then_some(&self.committed);
        let proposed = self.proposed.as_ref().filter(|_| !late);
        let records = [Some(&self.record), committed, proposed];
        records.into_iter().flatten().map(Arc::as_ref)
    }

    fn remotes(&self) -> Nodes {
        let mut remotes = self.needed();
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
        self.refuse(out);
        self.acknowledge(now, out);
        self.start(now, out);
        let idle = self.ops.is_empty() && !self.is_changing();
        if self.phase == Phase::Draining && idle && self.gone.is_disjoint(&self.record.everyone()) {
            self.phase = Phase::Sealing;
            out.push(Output::SealHere(self.record.grant()));
        }
    }
}
