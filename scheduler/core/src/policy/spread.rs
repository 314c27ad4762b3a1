//! The spread policy: where two replicas of an image share a fault domain and a node elsewhere is free, one moves there.
//!
//! So it comes to be after a hand-over or a takeover, when racks are named, or when nodes of a new fault domain join: the
//! owner's node stays, and the others end in as many other fault domains as there are. It moves only what is strictly
//! better after, one replica at a time.

use super::moves::{Because, Look, Movable};
use crate::moves::Rule;

/// Orders the first such move there is.
pub(super) fn decide(look: &mut Look<'_>) {
    let facts = look.facts;
    if facts.moves.is_off(Rule::Spread, facts.tick) {
        return;
    }
    for (id, image) in &facts.catalog.images {
        let is_crowded = |movable: &Movable<'_>| movable.others().any(|node| movable.together(facts, node, node) > 0);
        let Some(movable) = Movable::of(facts, *id, image).filter(is_crowded) else {
            continue;
        };
        if !look.has_room() || !look.may_be_automatic(Rule::Spread, *id) {
            continue;
        }
        // The most crowded one, of these the one on which the most lies.
        let held = look.held();
        let crowded = movable.others().map(|node| {
            let bytes = held.get(node).copied().unwrap_or(0);
            (movable.together(facts, node, node), bytes, node)
        });
        let Some((before, _, from)) = crowded.max() else {
            continue;
        };
        let Some(target) = look
            .target(movable, from, true)
            .filter(|target| target.together < before)
        else {
            continue;
        };
        let marked = [from, target.to]
            .into_iter()
            .filter_map(|node| facts.marks.domains.get(node));
        let because = Because {
            rule: Rule::Spread,
            numbers: vec![
                ("replicas_in_one_domain", before + 1),
                ("members_in_fault_domain", target.together),
                ("gain", before - target.together),
            ],
            rests_on: marked.map(|domain| domain.at.seq).collect(),
        };
        return look.begin(movable, from, target, because);
    }
}
