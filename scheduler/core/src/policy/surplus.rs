//! Which replicas are dropped: the old one of a move whose new one is in sync, one on a draining node where enough are left
//! without it, and those over the number that an operator set.
//!
//! Never the owner's, never one without which a block has fewer members in sync than wanted, and one of an image at a time.
//! A location that an operator added stays: the number of replicas is a least, until it is set.

use std::collections::BTreeSet;

use hearth_protocol::command::{LostNode, Order};
use hearth_protocol::limits::ALTERNATIVES_MAX;
use hearth_protocol::{Command, ImageId, NodeId, Seq};

use super::moves::{DROPS_MAX, LOOK_EVERY_TICKS, command, leaves, reason, record};
use super::repair::is_present;
use crate::catalog::{Image, Replicas};
use crate::moves::holds_all;
use crate::mutants;
use crate::place::shares;
use crate::state::Facts;

/// The rule name of a drop that ends a move.
pub const MOVED: &str = "move/drop";
/// The rule name of a drop from a draining node.
pub const DRAINED: &str = "drain/drop";
/// The rule name of a drop because fewer are wanted.
pub const FEWER: &str = "fewer/drop";

struct Choice<'a> {
    rule: &'static str,
    from: &'a NodeId,
    rests_on: BTreeSet<Seq>,
    lost: Vec<LostNode>,
}

/// What is dropped now: moves first, then draining nodes, then what is one too many.
pub(super) fn decide(facts: &Facts) -> Vec<Command> {
    let moved = facts.moves.under_way.iter().filter_map(|(id, one)| {
        let is_there = record(facts, *id).is_some_and(|record| holds_all(record, &one.to));
        let choice = Choice {
            rule: MOVED,
            from: &one.from,
            rests_on: [one.began.seq].into(),
            lost: Vec::new(),
        };
        is_there.then_some((*id, choice))
    });
    let fewer = facts
        .moves
        .surplus
        .iter()
        .filter_map(|(id, at)| Some((*id, least_missed(facts, *id, at.seq)?)));
    let choices = moved.chain(drained(facts)).chain(fewer);
    let mut images = BTreeSet::new();
    let commands = choices.filter_map(|(id, choice)| {
        let command = drop_now(facts, id, choice)?;
        images.insert(id).then_some(command)
    });
    commands.take(DROPS_MAX).collect()
}

/// Replicas on draining nodes without which there are enough.
fn drained(facts: &Facts) -> Vec<(ImageId, Choice<'_>)> {
    if facts.marks.draining.is_empty() || !facts.tick.0.is_multiple_of(LOOK_EVERY_TICKS) {
        return Vec::new();
    }
    let images = facts
        .catalog
        .images
        .iter()
        .filter(|(id, _)| !facts.moves.under_way.contains_key(id));
    let found = images.filter_map(|(id, image)| {
        let members = &image.replicas.as_ref()?.members;
        let mut draining = facts.marks.draining.iter().filter(|(node, _)| members.contains(*node));
        let (from, at) = draining.find(|(node, _)| **node != image.node)?;
        let choice = Choice {
            rule: DRAINED,
            from,
            rests_on: [at.seq].into(),
            lost: Vec::new(),
        };
        Some((*id, choice))
    });
    found.collect()
}

/// The member that is missed least: one that drains or is away, then one that shares its fault domain with the most
/// others, then the highest id.
fn least_missed(facts: &Facts, id: ImageId, since: Seq) -> Option<Choice<'_>> {
    let image = facts.catalog.images.get(&id)?;
    let members = &image.replicas.as_ref()?.members;
    let rank = |node: &NodeId| {
        let domains = members
            .iter()
            .filter(|other| *other != node)
            .map(|other| facts.fault_domain(other));
        let is_going = facts.drains(node) || !is_present(facts, node);
        (is_going, shares(facts.fault_domain(node), domains))
    };
    let mut ranked: Vec<_> = members
        .iter()
        .filter(|node| **node != image.node)
        .map(|node| (rank(node), node))
        .collect();
    ranked.sort_unstable();
    let (best, from) = ranked.pop()?;
    let lost = ranked.iter().rev().map(|((is_going, together), node)| LostNode {
        node: (*node).clone(),
        why: match (best.0 && !is_going, best.1 > *together) {
            (true, _) => "stays_there",
            (false, true) => "alone_in_fault_domain",
            (false, false) => "lower_id",
        }
        .into(),
    });
    let owner = LostNode {
        node: image.node.clone(),
        why: "owner".into(),
    };
    Some(Choice {
        rule: FEWER,
        from,
        rests_on: [since].into(),
        lost: lost.chain([owner]).take(ALTERNATIVES_MAX).collect(),
    })
}

/// The order, if nothing else is under way for the image and enough are left.
fn drop_now(facts: &Facts, id: ImageId, choice: Choice<'_>) -> Option<Command> {
    let image: &Image = facts.catalog.images.get(&id)?;
    let replicas: &Replicas = image.replicas.as_ref()?;
    let record = record(facts, id)?;
    let is_quiet = image.attached
        && is_present(facts, &image.node)
        && replicas.joiners.is_empty()
        && facts.repairs.on_its_way(id, facts.tick).is_none()
        && !facts.moves.dropping.contains_key(&id);
    let may_go = *choice.from != image.node
        && replicas.members.contains(choice.from)
        && (leaves(record, choice.from, replicas.wanted) || mutants::is_on("drop-unchecked"));
    if !is_quiet || !may_go {
        return None;
    }
    let order = Order::Drop {
        layer: *image.layers.first()?,
        image: id,
        epoch: image.epoch,
        set_version: image.set_version,
        from: choice.from.clone(),
        keep: replicas.wanted,
    };
    let numbers = vec![("members", replicas.fewest), ("wanted", replicas.wanted)];
    let reason = reason(choice.rule, numbers, choice.rests_on, choice.lost);
    Some(command(facts, id, image, order, reason))
}
