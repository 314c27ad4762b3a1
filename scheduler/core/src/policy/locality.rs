//! The locality policy: a replica follows the VM. Where a guest's disk is served by a node that does not hold all of it,
//! every read crosses the network; that node gets a replica, and the one it replaces is dropped once the new one is in sync.
//!
//! The guest has to have been there for a while ([`SETTLED_TICKS`]): who passes through gets nothing copied. The replica
//! that goes is the one that is missed least, so that as many fault domains as before have one, or more: first one on a
//! node that drains, then one in a fault domain with others (the guest's node counted), then the one on which the most
//! lies. Nothing moves while something is degraded that can be repaired; a guest that goes to and fro trips the breaker.

use super::moves::{Because, Look, Movable};
use crate::moves::Rule;
use crate::place::shares;

/// Ticks that a guest's disk has to be served where it is not held, before a replica follows.
pub const SETTLED_TICKS: u64 = 10;

/// Orders the moves that are due while there is room: who waits longest first.
pub(super) fn decide(look: &mut Look<'_>) {
    let facts = look.facts;
    if facts.moves.is_off(Rule::Locality, facts.tick) {
        return;
    }
    let mut away: Vec<_> = facts.moves.away.iter().collect();
    away.sort_by_key(|(id, at)| (at.tick, **id));
    for (id, at) in away {
        let waited = facts.tick.0.saturating_sub(at.tick.0);
        if waited < SETTLED_TICKS || !look.has_room() || !look.may_be_automatic(Rule::Locality, *id) {
            continue;
        }
        let image = facts.catalog.images.get(id);
        let Some(movable) = image.and_then(|image| Movable::of(facts, *id, image)) else {
            continue;
        };
        let owner = &movable.image.node;
        let held = look.held();
        let ranked = movable.others().map(|node| {
            let others = movable.others().filter(|other| *other != node).chain([owner]);
            let together = shares(facts.fault_domain(node), others.map(|other| facts.fault_domain(other)));
            let bytes = held.get(node).copied().unwrap_or(0);
            (facts.drains(node), together, bytes, node)
        });
        let Some((.., from)) = ranked.max() else { continue };
        let Some(target) = look.target_at(movable, from, owner) else {
            continue;
        };
        let because = Because {
            rule: Rule::Locality,
            numbers: vec![
                ("served_here_ticks", waited),
                ("members_in_fault_domain", target.together),
                ("gain", 1),
            ],
            rests_on: [at.seq].into(),
        };
        look.begin(movable, from, target, because);
    }
}
