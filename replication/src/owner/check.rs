//! The copies of blocks: compared while the guest goes on, and written anew from one of them.
//!
//! Invariants:
//! - A comparison overlaps no write and no rewriting, so members in sync differ by nothing but what their disks changed by
//!   themselves.
//! - What is written anew was read under the same lock, and overlaps no read either. So a client reads the same before, during
//!   and after, and a write of a client is never undone.
//! - Both begin anew under a newer record, and name only members that did not fail.

use super::ops::{Kind, Op};
use super::words::Check;
use super::{Denial, OpId, Output, Owner};
use crate::request::{Bytes, Extent, Hashes, Nodes, RequestId, Stamp, Work};
use hearth_protocol::NodeId;

impl Owner {
    pub(super) fn check(&mut self, op: OpId, check: Check, out: &mut Vec<Output>) {
        if let Some(denial) = self.why_closed() {
            return out.push(Output::Deny { op, denial });
        }
        let kind = match check {
            Check::Compare(extent) => Kind::Compare {
                extent,
                hashes: [].into(),
            },
            Check::Rewrite { extent, from, to } => Kind::Rewrite {
                extent,
                from,
                to,
                reading: true,
            },
        };
        self.add(Some(op), kind);
    }

    /// The members that hold all of an extent and did not fail.
    fn copies(&self, extent: Extent) -> Nodes {
        let members = self.record.members_of(extent);
        let sound = |node: &NodeId| self.record.holds(node, extent) && !self.gone.contains(node);
        members.into_iter().filter(sound).collect()
    }

    /// Asks the members for what they have, or the one whose copy counts for its bytes.
    pub(super) fn start_check(&mut self, id: RequestId, out: &mut Vec<Output>) {
        let Some(op) = self.ops.get(&id) else { return };
        let asked = match &op.kind {
            Kind::Compare { extent, .. } => (self.copies(*extent), Work::Hash(*extent)),
            Kind::Rewrite { extent, from, .. } if self.copies(*extent).contains(from) => {
                (Nodes::from([from.clone()]), Work::Read(*extent))
            }
            Kind::Rewrite { extent, from, .. } if self.gone.contains(from) && self.record.holds(from, *extent) => {
                return;
            }
            _ => {
                let op = self.ops.remove(&id).and_then(|op| op.client);
                let denial = Denial::CopyGone;
                return out.extend(op.map(|op| Output::Deny { op, denial }));
            }
        };
        let (nodes, work) = asked;
        if let Some(op) = self.ops.get_mut(&id) {
            op.started = true;
        }
        for to in nodes {
            self.send(id, to, work.clone(), Bytes::None, out);
        }
    }

    /// A member told what it has.
    pub(super) fn hashed(&mut self, from: NodeId, id: RequestId, stamp: Stamp, told: Hashes) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        if op.sent.get(&from) != Some(&stamp.set_version) {
            return;
        }
        if let Kind::Compare { hashes, .. } = &mut op.kind {
            hashes.insert(from.clone(), told);
            op.done.insert(from);
        }
    }

    /// The copy that counts was read: it goes to the others.
    pub(super) fn rewrite(&mut self, id: RequestId, read: NodeId, out: &mut Vec<Output>) {
        let Some(op) = self.ops.get_mut(&id) else { return };
        let Kind::Rewrite {
            extent, to, reading, ..
        } = &mut op.kind
        else {
            return;
        };
        *reading = false;
        let (extent, mut to) = (*extent, to.clone());
        op.sent.clear();
        // A number goes to another node once. This node's own copy may have been read in RAM, so its disk is written too.
        if read != self.me {
            to.remove(&read);
        }
        for to in &to & &self.copies(extent) {
            let work = Work::Write { extent, fua: false };
            let from = read.clone();
            self.send(id, to, work, Bytes::OfAnswer { from, id }, out);
        }
    }

    /// Whether everybody who was asked has answered. One that failed meanwhile is waited for: the next record has it begin
    /// anew without that one.
    pub(super) fn has_been_checked(&self, op: &Op) -> bool {
        let reads = matches!(op.kind, Kind::Rewrite { reading: true, .. });
        !reads && op.sent.keys().all(|node| op.done.contains(node))
    }
}
