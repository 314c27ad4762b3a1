//! The repair policy: an image that has fewer replicas than wanted gets a new one, once a grace time is over.
//!
//! A node that is away for less than the grace time moves nothing: its replica only needs what it missed. After that the
//! image's owner is told to begin one replica, on the node that the rule for new images would choose ([`crate::place()`]):
//! the fewest members in its fault domain, then the one that serves the guest, then one that was a member lately and may still hold most of it, then the one
//! on which the fewest bytes lie, then the lowest id.
//!
//! It moves little at a time, because a storm of copies is what kills the nodes that are left: no more than
//! [`IN_FLIGHT_MAX`] in the cluster and one to a node. It does not fight a node that comes and goes: each order to put one
//! image on one node doubles the rest before the next. It gives one image one joiner at a time, and does nothing while it
//! does not know who is there. Where a member is needed most goes first.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::command::{LostNode, Order, Reason};
use hearth_protocol::limits::{ABSENT_AFTER_TICKS, ALTERNATIVES_MAX};
use hearth_protocol::record::{Extent, Record};
use hearth_protocol::{BlockIndex, ByteLen, Command, ImageId, NodeId, TickNo};

use crate::catalog::{Image, Replicas};
use crate::orders::{COMMAND_TICKS, command_id};
use crate::place::{held, shares};
use crate::repairs::{At, Short};
use crate::state::Facts;

/// The rule name that its commands carry.
pub const REPLICATE: &str = "repair/replicate";

/// Version of the numbers below, which commands carry; it grows when one of them changes.
pub const VERSION: u64 = 2;

/// Ticks before a lost member is replaced: a node that restarts, also with a new kernel, is back before.
pub const GRACE_TICKS: u64 = 600;

/// Ticks before it is replaced where one member is left: a daemon that restarts is back before, and the next failure
/// would cost the image.
pub const GRACE_TICKS_LAST: u64 = 30;

/// Replicas being made in the cluster at once: the copies of a failed node's images must not slow all the others down.
pub const IN_FLIGHT_MAX: usize = 4;

/// Ticks after an order to put a replica on a node, or its refusal, in which the node is not asked again.
pub const REST_TICKS: u64 = 60;

/// The rest doubles with each order up to this, an hour: a node that comes and goes costs some 30 orders a day and image.
pub const REST_TICKS_MAX: u64 = 3_600;

/// Ticks for which an order counts towards the next rest: longer than the longest rest, so that the rests do not begin
/// anew while a node still comes and goes.
pub const TRIED_KEPT_TICKS: u64 = 2 * REST_TICKS_MAX;

/// Ticks after the owner's answer in which the joiner must show in the image's record.
pub const JOIN_TICKS: u64 = 60;

/// Ticks after an owner's epoch began, or its daemon started anew, in which it is told nothing: it does not serve the image
/// yet, and what it refuses for that would count against the node that was to get the replica.
pub const OWNER_TICKS: u64 = 10;

/// Where the repair of a degraded image stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Some node is being synced.
    Joining,
    /// The owner was told to begin.
    Ordered(NodeId),
    /// Nobody serves it, so nobody can copy it.
    Detached,
    /// Its owner is not there.
    OwnerAbsent,
    /// Its owner has only just begun.
    OwnerBegins,
    /// The grace time runs for so many more ticks.
    Grace(u64),
    /// A replica is due.
    Due,
}

/// The grace time of an image, and since when it runs. There are two clocks, a long one since the first member went and a
/// short one since one is left: what ends first counts. Where an operator asked for more, nobody is waited for.
fn grace(short: &Short) -> (u64, At) {
    if short.asked {
        return (0, short.since);
    }
    let ends = |(ticks, at): &(u64, At)| at.tick.0.saturating_add(*ticks);
    let long = (GRACE_TICKS, short.since);
    let last = (GRACE_TICKS_LAST, short.fell);
    if short.fewest <= 1 && ends(&last) <= ends(&long) {
        last
    } else {
        long
    }
}

/// See [`Standing`].
pub(crate) fn standing(facts: &Facts, id: ImageId, image: &Image, short: &Short) -> Standing {
    if facts.repairs.joining.contains_key(&id) {
        return Standing::Joining;
    }
    if let Some(ordered) = facts.repairs.on_its_way(id, facts.tick) {
        return Standing::Ordered(ordered.to.clone());
    }
    if !image.attached {
        return Standing::Detached;
    }
    if !is_present(facts, &image.node) {
        return Standing::OwnerAbsent;
    }
    let (ticks, at) = grace(short);
    match ticks.saturating_sub(facts.tick.0.saturating_sub(at.tick.0)) {
        0 if facts.tick < short.owner_ready => Standing::OwnerBegins,
        0 => Standing::Due,
        left => Standing::Grace(left),
    }
}

pub(super) fn is_present(facts: &Facts, node: &NodeId) -> bool {
    facts.nodes.get(node).is_some_and(|known| facts.present(known))
}

/// Copies that are being made now.
pub(super) struct InFlight<'a> {
    images: BTreeSet<ImageId>,
    targets: BTreeSet<&'a NodeId>,
}

impl<'a> InFlight<'a> {
    /// Copies of repairs and of moves alike.
    pub(super) fn of(facts: &'a Facts) -> Self {
        let mut all = Self {
            images: BTreeSet::new(),
            targets: BTreeSet::new(),
        };
        for (id, ordered) in &facts.repairs.ordered {
            if ordered.until >= facts.tick {
                all.images.insert(*id);
                all.targets.insert(&ordered.to);
            }
        }
        for (id, joiners) in &facts.repairs.joining {
            // Without its owner, or with a joiner that is gone, nothing is copied.
            let owner = facts.catalog.images.get(id).filter(|image| image.attached);
            if !owner.is_some_and(|image| is_present(facts, &image.node)) {
                continue;
            }
            for joiner in joiners.iter().filter(|joiner| is_present(facts, joiner)) {
                all.images.insert(*id);
                all.targets.insert(joiner);
            }
        }
        all
    }

    /// One more begins.
    pub(super) fn add(&mut self, image: ImageId, to: &'a NodeId) {
        self.images.insert(image);
        self.targets.insert(to);
    }

    pub(super) fn count(&self) -> usize {
        self.images.len()
    }

    /// Whether a node is being given a replica.
    pub(super) fn takes(&self, node: &NodeId) -> bool {
        self.targets.contains(node)
    }
}

/// Decides image by image: the fewest members first, then the longest without, then the lowest id.
pub(crate) fn decide(facts: &Facts) -> Vec<Command> {
    let mut commands = Vec::new();
    let is_known_who_is_there = facts.tick.0 > facts.repairs.led_since.0.saturating_add(ABSENT_AFTER_TICKS);
    if facts.repairs.short.is_empty() || facts.validity.leader().is_none() || !is_known_who_is_there {
        return commands;
    }
    let mut in_flight = InFlight::of(facts);
    if in_flight.images.len() >= IN_FLIGHT_MAX {
        return commands;
    }
    let due = facts.repairs.short.iter().filter_map(|(id, short)| {
        let image = facts.catalog.images.get(id)?;
        let is_due = standing(facts, *id, image, short) == Standing::Due;
        is_due.then_some((short.fewest, short.since.tick, *id, short, image))
    });
    let mut due: Vec<_> = due.collect();
    due.sort_by_key(|(fewest, since, id, ..)| (*fewest, *since, *id));
    let mut places = Places::of(facts);
    for (.., id, short, image) in due {
        if in_flight.images.len() >= IN_FLIGHT_MAX {
            break;
        }
        let locations = facts.validity.image(id).and_then(|known| known.locations.as_ref());
        let (Some(locations), Some(replicas)) = (locations, &image.replicas) else {
            continue;
        };
        let wanted = Wanted {
            id,
            image,
            replicas,
            short,
            record: &locations.record,
        };
        if let Some((to, command)) = wanted.decide(facts, &mut places, &in_flight) {
            in_flight.add(id, to);
            commands.push(command);
        }
    }
    commands
}

/// The nodes that can take a replica, and what lies on all.
struct Places<'a> {
    present: Vec<(&'a NodeId, &'a str)>,
    /// Counted when the first replica is placed: it costs a pass over all images.
    held: Option<BTreeMap<&'a NodeId, u64>>,
}

impl<'a> Places<'a> {
    fn of(facts: &'a Facts) -> Self {
        Self {
            present: facts.takers().collect(),
            held: None,
        }
    }
}

/// Members in its fault domain, whether the guest is elsewhere, whether it never was a member, bytes on it, id: the least is
/// the best.
type Rank<'a> = (u64, bool, bool, u64, &'a NodeId);

/// One image that needs a replica.
struct Wanted<'a> {
    id: ImageId,
    image: &'a Image,
    replicas: &'a Replicas,
    short: &'a Short,
    record: &'a Record,
}

impl<'a> Wanted<'a> {
    fn decide(
        &self,
        facts: &'a Facts,
        places: &mut Places<'a>,
        in_flight: &InFlight<'_>,
    ) -> Option<(&'a NodeId, Command)> {
        let layer = *self.image.layers.first()?;
        // Of several runs one at a time: the first of those with the fewest.
        let at = self
            .record
            .runs()
            .iter()
            .position(|run| run.members.len() as u64 == self.short.fewest)?;
        let run = &self.record.runs()[at];
        let blocks = (self.record.runs().len() > 1).then(|| Extent {
            first: run.first,
            last: match self.record.runs().get(at + 1) {
                Some(next) => BlockIndex(next.first.0 - 1),
                None => BlockIndex(self.image.blocks().saturating_sub(1).max(run.first.0)),
            },
        });
        let rests = |node: &NodeId| facts.repairs.rests(self.id, node, facts.tick);
        let others = || places.present.iter().filter(|(node, _)| !run.members.contains(*node));
        let is_free = |node: &NodeId| !in_flight.targets.contains(node) && !rests(node);
        if !others().any(|(node, _)| is_free(node)) {
            return None;
        }
        let held = places.held.get_or_insert_with(|| held(facts));
        let domains = || run.members.iter().map(|node| facts.fault_domain(node));
        let mut free: Vec<Rank<'a>> = Vec::new();
        let mut lost: Vec<(&'a NodeId, &str)> = Vec::new();
        for (node, domain) in places.present.iter().filter(|(node, _)| !run.members.contains(*node)) {
            if rests(node) {
                lost.push((*node, "tried_lately"));
            } else if in_flight.targets.contains(node) {
                lost.push((*node, "takes_another_replica"));
            } else {
                let bytes = held.get(node).copied().unwrap_or(0);
                free.push((
                    shares(domain, domains()),
                    **node != self.image.node,
                    !self.short.lost.contains(*node),
                    bytes,
                    *node,
                ));
            }
        }
        free.sort_unstable();
        let best = *free.first()?;
        let mut told: Vec<(&NodeId, &str)> = free[1..].iter().map(|rank| (rank.4, why_lost(&best, rank))).collect();
        told.extend(lost);
        let away = facts.nodes.iter().filter_map(|(id, node)| match facts.present(node) {
            false => Some((id, "absent")),
            true => facts.drains(id).then_some((id, "draining")),
        });
        told.extend(away);
        told.retain(|(node, _)| !run.members.contains(*node));
        // Who had the replica that is missing is asked after first.
        told.sort_by_key(|(node, _)| !self.short.lost.contains(*node));
        told.truncate(ALTERNATIVES_MAX);
        let bytes = blocks.map_or(self.image.size, |extent| {
            let count = (extent.last.0 - extent.first.0).saturating_add(1);
            ByteLen(count.saturating_mul(self.image.block_size.0).min(self.image.size.0))
        });
        let (grace_ticks, grace_from) = grace(self.short);
        let numbers = [
            ("members", self.short.fewest),
            ("wanted", self.replicas.wanted),
            ("degraded_at_ms", grace_from.time.0),
            ("degraded_ticks", facts.tick.0.saturating_sub(grace_from.tick.0)),
            ("grace_ticks", grace_ticks),
            ("members_in_fault_domain", best.0),
            ("in_flight", in_flight.images.len() as u64),
        ];
        let rests_on = BTreeSet::from([self.short.since.seq, self.short.fell.seq]);
        let (term, tick) = (facts.validity.term(), facts.tick);
        let command = Command {
            id: command_id("hearth repair", term, tick, &[&self.id.0.to_be_bytes()]),
            node: self.image.node.clone(),
            term,
            tick,
            expires: TickNo(tick.0.saturating_add(COMMAND_TICKS)),
            order: Order::Replicate {
                layer,
                image: self.id,
                epoch: self.image.epoch,
                set_version: self.image.set_version,
                to: best.4.clone(),
                blocks,
                bytes,
                replaces: None,
            },
            reason: Reason {
                rule: REPLICATE.into(),
                policy_version: VERSION,
                numbers: numbers.map(|(name, value)| (name.into(), value)).into(),
                rests_on: rests_on.into_iter().collect(),
                lost: Vec::new(),
                lost_nodes: told
                    .into_iter()
                    .map(|(node, why)| LostNode {
                        node: node.clone(),
                        why: why.into(),
                    })
                    .collect(),
            },
        };
        Some((best.4, command))
    }
}

fn why_lost(best: &Rank<'_>, other: &Rank<'_>) -> &'static str {
    if other.0 > best.0 {
        "same_fault_domain"
    } else if other.1 != best.1 {
        "not_the_guests"
    } else if other.2 != best.2 {
        "never_held_it"
    } else if other.3 > best.3 {
        "fuller"
    } else {
        "higher_id"
    }
}

/// Whether some node could take a replica of a degraded image, now or after its rest.
pub(crate) fn has_place(facts: &Facts, image: &Image) -> bool {
    let members = image.replicas.as_ref().map(|replicas| &replicas.members);
    facts
        .takers()
        .any(|(id, _)| members.is_some_and(|members| !members.contains(id)))
}
