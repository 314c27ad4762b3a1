//! The drain policy: each image with a replica on a draining node has that one moved elsewhere, as placement would choose.
//!
//! What an operator drains first is emptied first. It moves only what another node owns: an image that is served on the
//! draining node needs its guest migrated, one that nobody serves has nobody who could copy it.

use super::moves::{Because, Look, Movable, leaves};
use crate::moves::Rule;

/// Orders moves off draining nodes while there is room.
pub(super) fn decide(look: &mut Look<'_>) {
    let facts = look.facts;
    let mut draining: Vec<_> = facts.marks.draining.iter().collect();
    draining.sort_by_key(|(node, at)| (at.seq, *node));
    for (from, at) in draining {
        for (id, image) in &facts.catalog.images {
            if !look.has_room() {
                return;
            }
            let Some(movable) = Movable::of(facts, *id, image) else {
                continue;
            };
            // Where enough are left without it, it is dropped.
            let is_there = movable.others().any(|node| node == from);
            if !is_there || leaves(movable.record, from, movable.replicas.wanted) {
                continue;
            }
            let Some(target) = look.target(movable, from, false) else {
                continue;
            };
            let because = Because {
                rule: Rule::Drain,
                numbers: vec![
                    ("draining_ticks", facts.tick.0.saturating_sub(at.tick.0)),
                    ("members_in_fault_domain", target.together),
                    ("gain", 1),
                ],
                rests_on: [at.seq].into(),
            };
            look.begin(movable, from, target, because);
        }
    }
}
