//! The rebalance policy: where far more lies on one node than on another, a replica moves from the one to the other.
//!
//! So a node that joined empty fills up, slowly. What lies on a node is the size of the images there, which says what may
//! come and not what is written. A move has to be worth it ([`IMBALANCE_BYTES_MIN`], [`IMBALANCE_PERMILLE`]), leaves
//! the fuller node the fuller one, and puts no replicas together that were apart.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use hearth_protocol::{ImageId, NodeId};

use super::moves::{Because, Look, Movable};
use crate::moves::Rule;

/// Bytes that lie on one node more than on another, under which nothing moves.
pub const IMBALANCE_BYTES_MIN: u64 = 10 << 30;

/// The same in parts per thousand of what lies on the fuller one.
pub const IMBALANCE_PERMILLE: u64 = 250;

/// Orders the move that is worth most: from the fullest node that has one to the emptiest node, of its images the largest.
pub(super) fn decide(look: &mut Look<'_>) {
    let facts = look.facts;
    if facts.moves.is_off(Rule::Rebalance, facts.tick) || !look.has_room() {
        return;
    }
    let held = look.held().clone();
    let bytes = |node: &NodeId| held.get(node).copied().unwrap_or(0);
    let steady: BTreeSet<&NodeId> = facts
        .takers()
        .map(|(node, _)| node)
        .filter(|node| look.is_steady(node))
        .collect();
    let Some((least, to)) = steady.iter().map(|node| (bytes(node), *node)).min() else {
        return;
    };
    let mut best: Option<(u64, u64, Reverse<ImageId>, &NodeId, Movable<'_>)> = None;
    for (id, image) in &facts.catalog.images {
        if image.size.0 == 0 || !look.may_be_automatic(Rule::Rebalance, *id) || facts.repairs.rests(*id, to, facts.tick)
        {
            continue;
        }
        let Some(movable) = Movable::of(facts, *id, image).filter(|movable| !movable.replicas.members.contains(to))
        else {
            continue;
        };
        for from in movable.others().filter(|node| steady.contains(*node)) {
            let most = bytes(from);
            let distance = most.saturating_sub(least);
            // More than half of the distance would only turn it round.
            let is_worth_it = distance >= IMBALANCE_BYTES_MIN.max(most / 1_000 * IMBALANCE_PERMILLE)
                && image.size.0 <= distance / 2
                && movable.together(facts, to, from) <= movable.together(facts, from, from);
            let key = (most, image.size.0, Reverse(*id), from);
            if is_worth_it && best.as_ref().is_none_or(|(a, b, c, d, _)| key > (*a, *b, *c, *d)) {
                best = Some((most, image.size.0, Reverse(*id), from, movable));
            }
        }
    }
    let Some((most, size, _, from, movable)) = best else {
        return;
    };
    let Some(target) = look.target_at(movable, from, to) else {
        return;
    };
    let because = Because {
        rule: Rule::Rebalance,
        numbers: vec![
            ("from_bytes", most),
            ("to_bytes", least),
            ("members_in_fault_domain", target.together),
            ("gain", 2 * size),
        ],
        rests_on: BTreeSet::new(),
    };
    look.begin(movable, from, target, because);
}
