//! Changes of the set: propose, see committed, have every member record it, then in force.
//!
//! Invariant: at most one change is proposed and not decided, and it replaces the last one that the log is known to have.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::NodeId;

use super::ops::Kind;
use super::{Denial, Output, Owner, Phase};
use crate::request::{Nodes, RequestId, Standing};
use crate::resync::{Stage, Todo};
use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::{Age, Record, RecordError};

impl Owner {
    pub(super) fn committed(&mut self, record: Arc<Record>, out: &mut Vec<Output>) {
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

    /// The log was recovered. A log that does not know this owner's record lost it for good: sets stay as they are.
    pub(super) fn rebased(&mut self, log: &Aggregate, out: &mut Vec<Output>) {
        if log.knows(&self.committed) {
            self.frozen = false;
            self.committed(log.record.clone(), out);
        } else if log.record.epoch() > self.record.epoch() {
            self.end(Denial::Deposed, out);
        }
    }

    pub(super) fn raised(&mut self, from: NodeId, standing: &Standing) {
        if standing.record.as_ref() != Some(&self.committed) {
            return;
        }
        // A node that joins further blocks is a member of others, and what it held of those counts from before.
        let joins = self
            .join
            .as_ref()
            .is_some_and(|join| *join.node() == from && join.stage() == Stage::Adding);
        if joins && !self.record.everyone().contains(&from) {
            self.stores.insert(from.clone(), standing.store);
        }
        if joins && let Some(join) = &mut self.join {
            join.told(standing);
        }
        let began = *self.stores.entry(from.clone()).or_insert(standing.store);
        if began != standing.store {
            self.give_up(from);
            return;
        }
        self.raised.insert(from);
    }

    pub(super) fn cannot_change(&self) -> Option<Denial> {
        match &self.phase {
            Phase::Ended(denial) => Some(denial.clone()),
            _ if self.frozen => Some(Denial::RolledBack),
            Phase::Draining | Phase::Sealing => Some(Denial::Busy),
            Phase::Open if self.join.is_some() || self.leaving.is_some() || self.is_changing() => Some(Denial::Busy),
            Phase::Open => None,
        }
    }

    pub(super) fn leave(&mut self, node: NodeId, out: &mut Vec<Output>) {
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

    pub(super) fn propose(&mut self, to: Record, out: &mut Vec<Output>) {
        let to = Arc::new(to);
        self.proposed = Some(to.clone());
        out.push(Output::Publish(Change {
            by: self.me.clone(),
            from: self.committed.stamp(),
            to,
            stale: None,
        }));
    }

    /// Puts the committed record in force once all its nodes have it.
    pub(super) fn install(&mut self, out: &mut Vec<Output>) {
        if self.committed == self.record {
            return;
        }
        let failed_joiners = &self.gone - &self.committed.members();
        let needed = &self.committed.everyone() - &failed_joiners;
        if !needed.is_subset(&self.raised) {
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
                Kind::Read(_) | Kind::Copy { .. } | Kind::Compare { .. } | Kind::Rewrite { .. } => op.restart(),
                Kind::Write { .. } | Kind::Flush { .. } if op.started => self.send_all(id, out),
                Kind::Write { .. } | Kind::Flush { .. } => {}
            }
        }
    }

    /// Proposes the set without the nodes that failed.
    pub(super) fn shrink(&mut self, out: &mut Vec<Output>) {
        if self.gone.is_empty() {
            return;
        }
        let gone = &self.gone;
        self.ops
            .retain(|_, op| !matches!(&op.kind, Kind::Copy { to, .. } if gone.contains(to)));
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

    pub(super) fn resync(&mut self, out: &mut Vec<Output>) {
        let Some(mut join) = self
            .join
            .take_if(|_| self.committed == self.record && self.proposed.is_none())
        else {
            return;
        };
        self.take_missed(&mut join);
        loop {
            let under_way = self.ops.values().filter(|op| op.client.is_none()).count();
            match join.todo(&self.record, self.rules, under_way) {
                Ok(Todo::Joined) => return out.push(Output::Joined(join.node().clone())),
                Ok(Todo::Copy(extent)) => {
                    let to = join.node().clone();
                    self.add(None, Kind::Copy { extent, to, from: None });
                    continue;
                }
                Ok(Todo::Wait) => {}
                Ok(Todo::Propose(_)) if self.frozen => {}
                Ok(Todo::Propose(to)) => self.propose(to, out),
                Ok(Todo::Flush) => self.add(None, Kind::Flush { keep: BTreeSet::new() }),
                Err(error) => {
                    return out.push(Output::NotChanged {
                        node: join.node().clone(),
                        denial: Denial::Map(error.to_string()),
                    });
                }
            }
            break;
        }
        self.join = Some(join);
    }
}
