//! Writes for which a member's disk has no room.
//!
//! Invariant: a write is refused for want of room only where each block that it could not change has a single copy, in a
//! set that is in force and that nobody joins. So no two copies differ by it, now or after a takeover. A full member beside
//! another one leaves the set like one that failed, and may join again: its disk is sound.

use super::ops::Kind;
use super::{Denial, Output, Owner};
use crate::mutants::Mutant;
use crate::request::{Bytes, Extent, Nodes, RequestId, Stamp};
use hearth_protocol::NodeId;

impl Owner {
    pub(super) fn no_room(&mut self, from: NodeId, id: RequestId, stamp: Stamp) {
        let Some(op) = self.ops.get(&id) else { return };
        // As with every answer: only that to the last repetition counts.
        if op.sent.get(&from) != Some(&stamp.set_version) {
            return;
        }
        let holds_alone = match op.kind {
            Kind::Write { extent, .. } => self.holds_alone(&from, extent),
            _ => false,
        };
        if self.rules.breaks(Mutant::FullMemberKept)
            && let Some(op) = self.ops.get_mut(&id)
        {
            op.done.insert(from);
        } else if !holds_alone || self.spares(&from) {
            self.give_up(from);
        } else if let Some(op) = self.ops.get_mut(&id) {
            op.full.insert(from);
        }
    }

    /// Whether a member has the only copy left of each block of an extent that it holds.
    fn holds_alone(&self, node: &NodeId, extent: Extent) -> bool {
        let left = |members: &Nodes| members.iter().all(|other| other == node || self.gone.contains(other));
        let holds = self.record.members_of(extent).contains(node);
        let mut runs = self.record.touched(extent).filter(|run| run.members.contains(node));
        holds && runs.all(|run| left(&run.members))
    }

    /// Refuses what the last copies have no room for.
    pub(super) fn refuse(&mut self, out: &mut Vec<Output>) {
        let full: Vec<(RequestId, Extent)> = self
            .ops
            .iter()
            .filter(|(_, op)| !op.full.is_empty())
            .filter_map(|(id, op)| Some((*id, op.extent()?)))
            .collect();
        for (id, extent) in full {
            // A node that joins would have what the set has not.
            let joiners = &self.record.targets_of(extent) - &self.record.members_of(extent);
            let mut joining = &joiners - &self.gone;
            joining.extend(self.join.iter().map(|join| join.node().clone()));
            if !joining.is_empty() {
                joining.into_iter().for_each(|node| self.give_up(node));
                self.shrink(out);
            }
            let settled = !self.is_changing() && self.gone.is_disjoint(&self.record.everyone());
            let answered = self.ops.get(&id).is_some_and(|op| {
                let targets = self.record.targets_of(extent);
                targets
                    .iter()
                    .all(|node| op.done.contains(node) || op.full.contains(node))
            });
            if !settled || !answered {
                continue;
            }
            self.misses(extent);
            if let Some(op) = self.ops.remove(&id).and_then(|op| op.client) {
                let (denial, bytes) = (Denial::NoRoom, Bytes::None);
                out.push(if self.rules.breaks(Mutant::FullAcknowledged) {
                    Output::Acknowledge { op, bytes }
                } else {
                    Output::Deny { op, denial }
                });
            }
        }
    }
}
