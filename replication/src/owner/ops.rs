//! Operations under way: clients' reads, writes and flushes, and the copies and the flush for a joining node.
//!
//! Invariant: of two that overlap, one of them a write or a copy and the other a write, the later one is not sent before
//! the earlier one is answered.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::{BlockIndex, NodeId, SetVersion};

use super::{Ask, Denial, OpId, Output, Owner, Phase};
use crate::mutants::Mutant;
use crate::request::{Bytes, Extent, Hashes, Nodes, Request, RequestId, Stamp, Work};
use crate::time::BootMs;
use hearth_protocol::record::Record;

/// Every block that an image can have.
const EVERYTHING: Extent = Extent {
    first: BlockIndex(0),
    last: BlockIndex(u64::MAX),
};

/// What stands behind an operation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Read(Extent),
    Write {
        extent: Extent,
        fua: bool,
    },
    Flush {
        keep: BTreeSet<BlockIndex>,
    },
    /// Blocks on their way to a joining node; `from` while they are read.
    Copy {
        extent: Extent,
        to: NodeId,
        from: Option<NodeId>,
    },
    /// What members have of blocks, as far as they told.
    Compare {
        extent: Extent,
        hashes: BTreeMap<NodeId, Hashes>,
    },
    /// Blocks on their way to members; `reading` until `from` was read.
    Rewrite {
        extent: Extent,
        from: NodeId,
        to: Nodes,
        reading: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Op {
    pub(super) client: Option<OpId>,
    pub(super) kind: Kind,
    pub(super) started: bool,
    /// Who was sent it, under which set version.
    pub(super) sent: BTreeMap<NodeId, SetVersion>,
    pub(super) done: Nodes,
    /// Who has no room for it and is no node that may leave.
    pub(super) full: Nodes,
}

impl Op {
    pub(super) fn extent(&self) -> Option<Extent> {
        match &self.kind {
            Kind::Read(extent)
            | Kind::Write { extent, .. }
            | Kind::Copy { extent, .. }
            | Kind::Compare { extent, .. }
            | Kind::Rewrite { extent, .. } => Some(*extent),
            Kind::Flush { .. } => None,
        }
    }

    pub(super) fn restart(&mut self) {
        self.started = false;
        self.sent.clear();
        self.done.clear();
        self.full.clear();
        match &mut self.kind {
            Kind::Copy { from, .. } => *from = None,
            Kind::Compare { hashes, .. } => hashes.clear(),
            Kind::Rewrite { reading, .. } => *reading = true,
            Kind::Read(_) | Kind::Write { .. } | Kind::Flush { .. } => {}
        }
    }
}

impl Owner {
    /// Why no operation is taken any more, if so.
    pub(super) fn why_closed(&self) -> Option<Denial> {
        match &self.phase {
            Phase::Open => None,
            Phase::Ended(denial) => Some(denial.clone()),
            Phase::Draining | Phase::Sealing => Some(Denial::Sealed {
                epoch: self.record.epoch(),
            }),
        }
    }

    pub(super) fn client(&mut self, op: OpId, ask: Ask, out: &mut Vec<Output>) {
        if let Some(denial) = self.why_closed() {
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

    pub(super) fn add(&mut self, client: Option<OpId>, kind: Kind) {
        let op = Op {
            client,
            kind,
            started: false,
            sent: BTreeMap::new(),
            done: Nodes::new(),
            full: Nodes::new(),
        };
        self.ops.insert(self.next, op);
        self.next = RequestId(self.next.0 + 1);
    }

    pub(super) fn done(&mut self, now: BootMs, from: NodeId, id: RequestId, stamp: Stamp, out: &mut Vec<Output>) {
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
                let bytes = Bytes::OfAnswer { from, id };
                out.extend(op.client.map(|op| Output::Acknowledge { op, bytes }));
                self.ops.remove(&id);
            }
            // The bytes may be older than what a new owner has acknowledged: they are read again under a lease.
            Kind::Read(_) => op.restart(),
            Kind::Copy {
                extent,
                to,
                from: source,
            } if source.is_some() && self.join.is_some() => {
                *source = None;
                let (extent, to) = (*extent, to.clone());
                let work = Work::Write { extent, fua: false };
                self.send(id, to, work, Bytes::OfAnswer { from, id }, out);
            }
            Kind::Copy { .. } => {
                self.ops.remove(&id);
            }
            Kind::Rewrite { reading: true, .. } => self.rewrite(id, from, out),
            Kind::Write { .. } | Kind::Flush { .. } | Kind::Rewrite { .. } => {
                op.done.insert(from);
            }
            Kind::Compare { .. } => {}
        }
    }

    pub(super) fn send(&mut self, id: RequestId, to: NodeId, work: Work, bytes: Bytes, out: &mut Vec<Output>) {
        let stamp = self.record.stamp();
        if let Some(op) = self.ops.get_mut(&id) {
            op.sent.insert(to.clone(), stamp.set_version);
            op.full.remove(&to);
        }
        let store = self.store_of(&to);
        let request = Request { id, stamp, store, work };
        out.push(Output::Send { to, request, bytes });
    }

    /// Answers writes and flushes that everybody has.
    pub(super) fn acknowledge(&mut self, now: BootMs, out: &mut Vec<Output>) {
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
                Some(client) if matches!(op.kind, Kind::Compare { .. }) => {
                    if let Kind::Compare { hashes, .. } = op.kind {
                        out.push(Output::Compared { op: client, hashes });
                    }
                }
                Some(op) => {
                    let bytes = Bytes::None;
                    out.push(Output::Acknowledge { op, bytes });
                }
                None => {
                    if let Some(join) = &mut self.join {
                        join.flushed();
                    }
                    self.resync(out);
                }
            }
        }
    }

    pub(super) fn has_everywhere(&self, op: &Op) -> bool {
        let extent = match &op.kind {
            Kind::Write { extent, .. } => *extent,
            Kind::Flush { .. } => EVERYTHING,
            Kind::Compare { .. } | Kind::Rewrite { .. } => return self.has_been_checked(op),
            Kind::Read(_) | Kind::Copy { .. } => return false,
        };
        let early = self.rules.breaks(Mutant::AckBeforeSetDurable);
        let has = |node: &NodeId| op.done.contains(node);
        let is_gone = |node: &NodeId| self.gone.contains(node);
        let members = |record: &Record| {
            let mut members = record.touched(extent).flat_map(|run| &run.members);
            members.all(|node| has(node) || (early && is_gone(node)))
        };
        let mut joiners = self.record.touched(extent).flat_map(|run| &run.joiners);
        self.that_count().all(members) && joiners.all(|node| has(node) || is_gone(node))
    }

    /// Sends what waits and may go.
    pub(super) fn start(&mut self, now: BootMs, out: &mut Vec<Output>) {
        // Between two records a member may have either: what is sent now would be refused by some.
        if self.committed != self.record {
            return;
        }
        if self.rules.breaks(Mutant::LogAwaited) && self.proposed.is_some() {
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
            let client = op.client;
            if matches!(op.kind, Kind::Compare { .. } | Kind::Rewrite { .. }) {
                self.start_check(id, out);
                continue;
            }
            let moves = matches!(op.kind, Kind::Read(_) | Kind::Copy { .. });
            let source = if moves { self.source(op) } else { None };
            let split = reads && op.extent().is_some_and(|extent| !self.is_held(extent));
            let writing: Vec<Extent> = match op.kind {
                Kind::Flush { .. } => self.writing(),
                _ => Vec::new(),
            };
            let Some(op) = self.ops.get_mut(&id) else { continue };
            let source = match (&op.kind, source) {
                (Kind::Read(_) | Kind::Copy { .. }, Some(source)) => source,
                (Kind::Read(_), None) if split => {
                    self.ops.remove(&id);
                    let denial = Denial::Split;
                    out.extend(client.map(|op| Output::Deny { op, denial }));
                    continue;
                }
                // Whoever holds it has failed: the next set says what becomes of it.
                (Kind::Read(_) | Kind::Copy { .. }, None) => continue,
                (_, _) => self.me.clone(),
            };
            op.started = true;
            match &mut op.kind {
                Kind::Read(extent) => {
                    let work = Work::Read(*extent);
                    let bytes = client.map_or(Bytes::None, Bytes::OfClient);
                    self.send(id, source, work, bytes, out);
                }
                Kind::Copy { extent, from, .. } => {
                    *from = Some(source.clone());
                    let work = Work::Read(*extent);
                    self.send(id, source, work, Bytes::None, out);
                }
                Kind::Write { .. } => self.send_all(id, out),
                Kind::Flush { keep } => {
                    keep.extend(writing.into_iter().flat_map(Extent::blocks));
                    self.send_all(id, out);
                }
                Kind::Compare { .. } | Kind::Rewrite { .. } => {}
            }
        }
    }

    /// What writes under way change.
    fn writing(&self) -> Vec<Extent> {
        let started = self.ops.values().filter(|op| op.started);
        let writes = started.filter(|op| matches!(op.kind, Kind::Write { .. } | Kind::Rewrite { .. }));
        writes.filter_map(Op::extent).collect()
    }

    /// Whether an earlier operation that overlaps is not finished.
    pub(super) fn is_behind_another(&self, id: RequestId, op: &Op) -> bool {
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
                (Kind::Write { .. } | Kind::Rewrite { .. }, _) | (_, Kind::Write { .. } | Kind::Rewrite { .. }) => true,
                _ => false,
            }
        })
    }

    /// Whether a member of the set holds all of an extent, failed or not.
    fn is_held(&self, extent: Extent) -> bool {
        let members = self.record.members_of(extent);
        members.iter().any(|node| self.record.holds(node, extent))
    }

    /// The member to read from: this node, else the first that did not fail.
    pub(super) fn source(&self, op: &Op) -> Option<NodeId> {
        let extent = op.extent()?;
        let holds = |node: &&NodeId| self.record.holds(node, extent) && !self.gone.contains(node);
        let members = self.record.members_of(extent);
        let me = members.get(&self.me).filter(holds);
        me.or_else(|| members.iter().find(holds)).cloned()
    }

    /// Sends a write or a flush to everybody who does not have it.
    pub(super) fn send_all(&mut self, id: RequestId, out: &mut Vec<Output>) {
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
            Kind::Read(_) | Kind::Copy { .. } | Kind::Compare { .. } | Kind::Rewrite { .. } => return,
        };
        if let Kind::Write { extent, .. } = op.kind {
            self.misses(extent);
        }
        let Some(op) = self.ops.get(&id) else { return };
        let bytes = match (&op.kind, op.client) {
            (Kind::Write { .. }, Some(op)) => Bytes::OfClient(op),
            _ => Bytes::None,
        };
        for to in &(&targets - &op.done) - &self.gone {
            self.send(id, to, work.clone(), bytes.clone(), out);
        }
    }
}
