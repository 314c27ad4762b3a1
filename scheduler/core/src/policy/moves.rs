//! The policies that move replicas: off draining nodes, after their guests, out of crowded fault domains, from full nodes to empty ones; and
//! the drops that end a move, or follow when an image is to have fewer replicas.
//!
//! A move adds before it drops: the new member is in sync, and that set in the log, before the old one goes, and the owner
//! checks again that no block has fewer members than wanted. The owner's own copy never moves: its guest would have to
//! migrate first. Moves share repair's bound on copies under way and never take all of it, so that a repair is not kept
//! waiting by a drain. Of several reasons the one an operator gave goes first.
//!
//! Spreading and rebalancing are nobody's order, so they move one replica at a time, only while nothing is degraded that
//! could be repaired, and only to nodes that have been there for a while. An image whose replica returns to a node that it
//! was moved off lately is left alone for a doubling time, and a rule whose moves do not last is off for a day
//! (`crate::moves`). Neither keeps a drain or a repair from going on.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::command::{LostNode, Order, Reason};
use hearth_protocol::limits::{ABSENT_AFTER_TICKS, ALTERNATIVES_MAX};
use hearth_protocol::record::Record;
use hearth_protocol::{Command, ImageId, NodeId, Seq, TickNo};

use super::repair::{IN_FLIGHT_MAX, InFlight, has_place, is_present};
use super::{drain, locality, rebalance, spread, surplus};
use crate::catalog::{Image, Replicas};
use crate::moves::{Rule, holds_all};
use crate::orders::{COMMAND_TICKS, command_id};
use crate::place::{held, shares};
use crate::state::Facts;

/// Version of the numbers here and in the rules, which commands carry; it grows when one of them changes.
pub const VERSION: u64 = 1;

/// Copies of moves under way at once; the rest of [`IN_FLIGHT_MAX`] is left to repair.
pub const MOVES_MAX: usize = IN_FLIGHT_MAX / 2;

/// Ticks between two looks at what could move: each is a pass over all images.
pub const LOOK_EVERY_TICKS: u64 = 5;

/// Ticks that a node has to be there before replicas are moved to it without anybody's order: as long as a lost member is
/// waited for.
pub const STEADY_TICKS: u64 = super::repair::GRACE_TICKS;

/// Ticks after an answered order to drop before the same image's next one.
pub const DROP_REST_TICKS: u64 = 30;

/// Orders to drop in one tick.
pub const DROPS_MAX: usize = 16;

/// Ticks after which a move is scored: half an hour, in which a node that is not well shows it.
pub const SCORE_TICKS: u64 = 1_800;

/// Ticks for which it is remembered which node a replica was moved off: six hours. One that returns within them went in a
/// circle.
pub const CYCLE_TICKS: u64 = 21_600;

/// Ticks without automatic moves of an image whose replica went in a circle; doubles with each circle.
pub const BREAK_TICKS: u64 = 3_600;

/// The longest such time: a week.
pub const BREAK_TICKS_MAX: u64 = 7 * 86_400;

/// Moves of one rule in a row that did not last, after which the rule is off.
pub const LOSING_IN_ROW: u64 = 4;

/// Ticks for which a rule that lost is off: a day.
pub const OFF_TICKS: u64 = 86_400;

/// What a tick looks at, and what it may still begin.
pub(super) struct Look<'a> {
    pub facts: &'a Facts,
    in_flight: InFlight<'a>,
    /// Copies of moves that are under way.
    copying: usize,
    /// Bytes of the images that lie on each node, counted when first needed.
    held: Option<BTreeMap<&'a NodeId, u64>>,
    commands: Vec<Command>,
}

/// An image of which a replica could be moved now.
#[derive(Clone, Copy)]
pub(super) struct Movable<'a> {
    pub id: ImageId,
    pub image: &'a Image,
    pub replicas: &'a Replicas,
    pub record: &'a Record,
}

/// A place for a replica that moves.
pub(super) struct Target<'a> {
    pub to: &'a NodeId,
    /// Members other than the one that goes in its fault domain.
    pub together: u64,
    lost: Vec<Lost<'a>>,
}

/// Members in its fault domain, bytes on it, id: the least is the best.
type Free<'a> = (u64, u64, &'a NodeId);

/// A node that was not chosen, and why.
type Lost<'a> = (&'a NodeId, &'static str);

/// One of the free places, with what the others lost by.
fn target<'a>(to: &'a NodeId, free: &[Free<'a>], lost: Vec<Lost<'a>>) -> Option<Target<'a>> {
    let (together, on_it, _) = *free.iter().find(|(.., node)| *node == to)?;
    let others = free.iter().filter(|(.., node)| *node != to).map(|(with, bytes, node)| {
        let why = if *with > together {
            "same_fault_domain"
        } else if *bytes > on_it {
            "fuller"
        } else {
            "higher_id"
        };
        (*node, why)
    });
    Some(Target {
        to,
        together,
        lost: others.chain(lost).take(ALTERNATIVES_MAX).collect(),
    })
}

/// Why a replica moves.
pub(super) struct Because {
    pub rule: Rule,
    /// Names are those of a person who reads the reason; `gain` is what is scored.
    pub numbers: Vec<(&'static str, u64)>,
    pub rests_on: BTreeSet<Seq>,
}

/// Drops first, which free what moves have copied; then moves, behind the `repairs` of this tick.
pub(crate) fn decide(facts: &Facts, repairs: &[Command]) -> Vec<Command> {
    let is_known_who_is_there = facts.tick.0 > facts.repairs.led_since.0.saturating_add(ABSENT_AFTER_TICKS);
    if facts.validity.leader().is_none() || !is_known_who_is_there {
        return Vec::new();
    }
    let mut commands = surplus::decide(facts);
    if !facts.tick.0.is_multiple_of(LOOK_EVERY_TICKS) {
        return commands;
    }
    let mut in_flight = InFlight::of(facts);
    for command in repairs {
        if let Order::Replicate { image, to, .. } = &command.order
            && let Some((to, _)) = facts.nodes.get_key_value(to)
        {
            in_flight.add(*image, to);
        }
    }
    let copying = facts.moves.under_way.iter().filter(|(id, one)| {
        let replicas = facts.catalog.images.get(id).and_then(|image| image.replicas.as_ref());
        replicas.is_some_and(|replicas| !replicas.members.contains(&one.to) || replicas.joiners.contains(&one.to))
    });
    let mut look = Look {
        facts,
        copying: copying.count(),
        in_flight,
        held: None,
        commands: Vec::new(),
    };
    drain::decide(&mut look);
    let is_repairing = is_repairing(facts);
    if !is_repairing {
        locality::decide(&mut look);
    }
    let is_idle = look.copying == 0 && facts.moves.under_way.is_empty();
    if is_idle && !is_repairing {
        spread::decide(&mut look);
        if look.commands.is_empty() {
            rebalance::decide(&mut look);
        }
    }
    commands.append(&mut look.commands);
    commands
}

/// Whether some image is degraded and can be repaired, now or soon.
fn is_repairing(facts: &Facts) -> bool {
    facts.repairs.short.keys().any(|id| {
        let image = facts.catalog.images.get(id);
        image.is_some_and(|image| {
            let can = image.attached && is_present(facts, &image.node) && has_place(facts, image);
            can || facts.repairs.joining.contains_key(id)
        })
    })
}

/// The image's record, if it has replicas.
pub(super) fn record(facts: &Facts, id: ImageId) -> Option<&Record> {
    let known = facts.validity.image(id)?;
    known.locations.as_ref().map(|locations| &*locations.record)
}

/// Whether each run has at least so many members without a node.
pub(super) fn leaves(record: &Record, without: &NodeId, members: u64) -> bool {
    let mut left = record.runs().iter().map(|run| {
        let others = run.members.iter().filter(|member| *member != without);
        others.count() as u64
    });
    left.all(|left| left >= members.max(1))
}

impl<'a> Movable<'a> {
    /// The image, if it has replicas, somebody who can copy it, and nothing else under way.
    pub(super) fn of(facts: &'a Facts, id: ImageId, image: &'a Image) -> Option<Self> {
        let replicas = image.replicas.as_ref()?;
        let is_quiet = image.attached
            && replicas.joiners.is_empty()
            && replicas.fewest >= replicas.wanted
            && !facts.moves.under_way.contains_key(&id)
            && !facts.moves.surplus.contains_key(&id)
            && !facts.moves.dropping.contains_key(&id)
            && facts.repairs.on_its_way(id, facts.tick).is_none()
            && is_present(facts, &image.node);
        let record = record(facts, id).filter(|_| is_quiet)?;
        Some(Self {
            id,
            image,
            replicas,
            record,
        })
    }

    /// The members that may move: the owner's copy does not.
    pub(super) fn others(&self) -> impl Iterator<Item = &'a NodeId> {
        let owner = &self.image.node;
        self.replicas.members.iter().filter(move |node| *node != owner)
    }

    /// Members other than one in the same fault domain as a node.
    pub(super) fn together(&self, facts: &Facts, node: &NodeId, without: &NodeId) -> u64 {
        let others = self.replicas.members.iter().filter(|member| *member != without);
        shares(
            facts.fault_domain(node),
            others.map(|member| facts.fault_domain(member)),
        )
    }
}

impl<'a> Look<'a> {
    /// Whether another copy may begin.
    pub(super) fn has_room(&self) -> bool {
        self.copying < MOVES_MAX && self.in_flight.count() < IN_FLIGHT_MAX
    }

    /// Bytes of the images that lie on each node.
    pub(super) fn held(&mut self) -> &BTreeMap<&'a NodeId, u64> {
        let facts = self.facts;
        self.held.get_or_insert_with(|| held(facts))
    }

    /// Whether a node has been there for a while.
    pub(super) fn is_steady(&self, node: &NodeId) -> bool {
        let came = self.facts.moves.came.get(node);
        came.is_none_or(|came| self.facts.tick.0.saturating_sub(came.0) >= STEADY_TICKS)
    }

    /// Whether the image may be moved without anybody's order.
    pub(super) fn may_be_automatic(&self, rule: Rule, id: ImageId) -> bool {
        !self.facts.moves.is_off(rule, self.facts.tick) && !self.facts.moves.is_broken(id, self.facts.tick)
    }

    /// The best place for a replica that leaves a node: the fewest members in its fault domain, then the fewest bytes on
    /// it, then the lowest id.
    pub(super) fn target(&mut self, movable: Movable<'a>, from: &NodeId, steady_only: bool) -> Option<Target<'a>> {
        let (free, lost) = self.places(movable, from, steady_only);
        target(free.first()?.2, &free, lost)
    }

    /// A certain place for a replica that leaves a node, if it can take one now.
    pub(super) fn target_at(&mut self, movable: Movable<'a>, from: &NodeId, to: &'a NodeId) -> Option<Target<'a>> {
        let (free, lost) = self.places(movable, from, true);
        target(to, &free, lost)
    }

    /// The nodes that can take a replica that leaves a node, best first, and why the others cannot.
    fn places(&mut self, movable: Movable<'a>, from: &NodeId, steady_only: bool) -> (Vec<Free<'a>>, Vec<Lost<'a>>) {
        let facts = self.facts;
        self.held();
        let held = self.held.iter().flatten();
        let held: BTreeMap<&NodeId, u64> = held.map(|(node, bytes)| (*node, *bytes)).collect();
        let mut free = Vec::new();
        let mut lost = Vec::new();
        for node in facts.nodes.keys().filter(|node| !holds_all(movable.record, node)) {
            let why = if !is_present(facts, node) {
                "absent"
            } else if facts.drains(node) {
                "draining"
            } else if facts.repairs.rests(movable.id, node, facts.tick) {
                "tried_lately"
            } else if self.in_flight.takes(node) {
                "takes_another_replica"
            } else if steady_only && !self.is_steady(node) {
                "came_lately"
            } else {
                let bytes = held.get(node).copied().unwrap_or(0);
                free.push((movable.together(facts, node, from), bytes, node));
                continue;
            };
            lost.push((node, why));
        }
        free.sort_unstable();
        (free, lost)
    }

    /// Orders a move.
    pub(super) fn begin(&mut self, movable: Movable<'a>, from: &NodeId, target: Target<'a>, because: Because) {
        let Some(layer) = movable.image.layers.first() else {
            return;
        };
        let image = movable.image;
        let order = Order::Replicate {
            layer: *layer,
            image: movable.id,
            epoch: image.epoch,
            set_version: image.set_version,
            to: target.to.clone(),
            blocks: None,
            bytes: image.size,
            replaces: Some(from.clone()),
        };
        let mut numbers = because.numbers;
        numbers.push(("cost_bytes", image.size.0));
        numbers.push(("in_flight", self.in_flight.count() as u64));
        let lost = target.lost.iter().map(|(node, why)| LostNode {
            node: (*node).clone(),
            why: (*why).into(),
        });
        let reason = reason(because.rule.name(), numbers, because.rests_on, lost.collect());
        self.commands
            .push(command(self.facts, movable.id, image, order, reason));
        self.in_flight.add(movable.id, target.to);
        self.copying += 1;
    }
}

pub(super) fn reason(
    rule: &str,
    numbers: Vec<(&'static str, u64)>,
    rests_on: BTreeSet<Seq>,
    lost_nodes: Vec<LostNode>,
) -> Reason {
    Reason {
        rule: rule.into(),
        policy_version: VERSION,
        numbers: numbers.into_iter().map(|(name, value)| (name.into(), value)).collect(),
        rests_on: rests_on.into_iter().collect(),
        lost: Vec::new(),
        lost_nodes,
    }
}

/// An order to an image's owner.
pub(super) fn command(facts: &Facts, id: ImageId, image: &Image, order: Order, reason: Reason) -> Command {
    let (term, tick) = (facts.validity.term(), facts.tick);
    let label = format!("hearth {}", reason.rule);
    Command {
        id: command_id(&label, term, tick, &[&id.0.to_be_bytes()]),
        node: image.node.clone(),
        term,
        tick,
        expires: TickNo(tick.0.saturating_add(COMMAND_TICKS)),
        order,
        reason,
    }
}
