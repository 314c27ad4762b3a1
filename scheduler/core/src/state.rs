//! The cluster as the log tells it: one struct, one total function that folds an event into it.
//!
//! Invariants: equal log prefixes give equal states, on any machine; a void or repeated event changes nothing but
//! counters and its publisher's number; nothing here fails.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::command::{Command, Order, Outcome};
use hearth_protocol::event::{HeatFolded, NodeJoined};
use hearth_protocol::heat::{LatencySummary, TierUse};
use hearth_protocol::limits::{ABSENT_AFTER_TICKS, TICK_MS};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::publishers::{Arrival, Publishers};
use hearth_protocol::validity::{self, Validity, Verdict};
use hearth_protocol::view::Totals;
use hearth_protocol::{
    BlockIndex, ByteLen, CommandId, Envelope, Event, HeatScore, ImageId, ImageName, Incarnation, LayerId, NodeId,
    SchedulerId, Seq, Term, TickNo, WallMs,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::blocks::{HeatAt, NodeBlocks, Place};
use crate::catalog::{Catalog, LastWindow};
use crate::decay::{DecayClock, Weight, shifted};
use crate::marks::Marks;
use crate::moves::Moves;
use crate::mutants;
use crate::orders::{Given, Orders};
use crate::repairs::{At, Repairs};

/// Blocks tracked in the whole cluster, some 1.1 GiB at most; each node has an equal share of it.
pub const TRACKED_BLOCKS_MAX: u64 = 1 << 24;

/// Blocks tracked on one node at most, however few nodes there are: 64 GiB of 64 KiB blocks.
pub const TRACKED_BLOCKS_PER_NODE_MAX: u64 = 1 << 20;

/// Ticks between two recorded digests.
pub const DIGEST_EVERY_TICKS: u64 = 10;

/// Longest step of the heat clock, in milliseconds (a day): one wrong wall clock must not cool everything for ever.
const STEP_MS_MAX: u64 = 86_400_000;

/// What [`State::apply`] did with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Whether it counted.
    pub judged: Judged,
    /// Events of the same publisher incarnation that are missing before this one.
    pub gap: u64,
    /// It was a valid tick: if this scheduler leads, it decides now.
    pub decide: bool,
    /// The digests are due after this event ([`DIGEST_EVERY_TICKS`]): replicas compare them, the leader records them.
    pub digest: bool,
}

/// The verdict on an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    /// It counts.
    Valid,
    /// It is kept and not applied, for this reason.
    Void(&'static str),
    /// Its publisher incarnation already delivered this number; ignored.
    Repeat,
    /// Its log position was applied before; nothing changed at all.
    Behind,
}

/// What is known of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Node {
    pub joined: NodeJoined,
    pub left: bool,
    pub last_report: TickNo,
    /// Highest report folded of this incarnation.
    pub report_seq: u64,
    pub tier: TierUse,
    pub probe_events_total: u64,
    pub probe_lost_total: u64,
    pub disk_read: LatencySummary,
    /// The last tick whose window lost samples there.
    pub lost_at: Option<TickNo>,
}

impl Node {
    /// Bytes that the main region holds at most: as the node last reported, else as it said when it joined.
    pub(crate) fn main_capacity(&self) -> u64 {
        if self.tier.capacity.0 > 0 {
            self.tier.main_capacity.0
        } else {
            self.joined.main.0
        }
    }
}

/// Counters that are no part of [`Totals`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Odd {
    /// Packs that could not be read.
    pub damaged_packs: u64,
    /// Records of unknown nodes, images or layers, or past an image's end.
    pub foreign_records: u64,
    /// Events that were missing before others of their publisher, and came late or never.
    pub publisher_gaps: u64,
    /// Answers to commands that nobody remembers.
    pub foreign_answers: u64,
    /// Blocks forgotten for want of room.
    pub forgotten_blocks: u64,
}

/// Everything but the blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub seq: Seq,
    pub time: WallMs,
    pub tick: TickNo,
    pub validity: Validity,
    pub publishers: Publishers,
    pub policy_version: u64,
    pub policy: TierPolicy,
    pub clock: DecayClock,
    /// What a candidate weighs at least: the threshold as of the tick before, so that heat folded since then is not
    /// first decayed by the very tick that judges it.
    pub floor: Weight,
    /// Milliseconds of event time that the last tick stands for.
    pub tick_ms: u64,
    pub nodes: BTreeMap<NodeId, Node>,
    pub catalog: Catalog,
    pub orders: Orders,
    pub totals: Totals,
    pub odd: Odd,
    /// The node that the newest command was given to: the next decision begins after it.
    pub commanded_last: Option<NodeId>,
    /// blake3 chain over all valid commands.
    #[serde(with = "serde_bytes")]
    pub decisions: [u8; 32],
    #[serde(default, skip_serializing_if = "Repairs::is_none")]
    pub repairs: Repairs,
    #[serde(default, skip_serializing_if = "Marks::is_none")]
    pub marks: Marks,
    #[serde(default, skip_serializing_if = "Moves::is_none")]
    pub moves: Moves,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Data {
    pub facts: Facts,
    pub blocks: BTreeMap<NodeId, NodeBlocks>,
}

/// The cluster at one log position. Its encoding is a snapshot: reading it back gives an equal state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub(crate) data: Data,
}

impl Default for State {
    fn default() -> Self {
        let policy = TierPolicy::default();
        Self {
            data: Data {
                facts: Facts {
                    seq: Seq(0),
                    time: WallMs(0),
                    tick: TickNo(0),
                    validity: Validity::default(),
                    publishers: Publishers::default(),
                    policy_version: 0,
                    clock: DecayClock::new(policy.half_life_s),
                    floor: DecayClock::new(policy.half_life_s).weight(HeatScore::whole(policy.threshold_bursts)),
                    policy,
                    tick_ms: TICK_MS,
                    nodes: BTreeMap::new(),
                    catalog: Catalog::default(),
                    orders: Orders::default(),
                    totals: Totals::default(),
                    odd: Odd::default(),
                    commanded_last: None,
                    decisions: [0; 32],
                    repairs: Repairs::default(),
                    marks: Marks::default(),
                    moves: Moves::default(),
                },
                blocks: BTreeMap::new(),
            },
        }
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.data.serialize(s)
    }
}

impl<'de> Deserialize<'de> for State {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut state = Self {
            data: Data::deserialize(d)?,
        };
        let floor = state.data.facts.floor;
        state.data.blocks.values_mut().for_each(|b| b.rebuild(floor));
        Ok(state)
    }
}

impl Facts {
    /// What the promotion threshold weighs now.
    fn threshold(&self) -> Weight {
        self.clock.weight(HeatScore::whole(self.policy.threshold_bursts))
    }

    /// When an event at this position came to be.
    pub(crate) fn now(&self, seq: Seq) -> At {
        At {
            seq,
            tick: self.tick,
            time: self.time,
        }
    }

    /// Whether a node reported lately and did not leave.
    pub(crate) fn present(&self, node: &Node) -> bool {
        !node.left && self.tick.0.saturating_sub(node.last_report.0) <= ABSENT_AFTER_TICKS
    }
}

impl State {
    /// Folds the next event of the log. Total: whatever the log holds, it is judged, counted, and applied or not.
    pub fn apply(&mut self, seq: Seq, envelope: &Envelope, event: &Event) -> Applied {
        let facts = &mut self.data.facts;
        let ignored = |judged| Applied {
            judged,
            gap: 0,
            decide: false,
            digest: false,
        };
        if seq <= facts.seq {
            return ignored(Judged::Behind);
        }
        facts.seq = seq;
        facts.totals.events += 1;
        let gap = match facts.publishers.arrive(envelope) {
            Arrival::Repeat if !mutants::is_on("duplicate-applied") => {
                facts.totals.repeats += 1;
                return ignored(Judged::Repeat);
            }
            Arrival::Gap { missing } => missing,
            Arrival::Next | Arrival::Late | Arrival::Repeat => 0,
        };
        facts.odd.publisher_gaps = facts.odd.publisher_gaps.saturating_add(gap);
        let void = match facts.validity.judge(&envelope.publisher, event) {
            Verdict::Void(why) => Some(why),
            Verdict::Valid => match event {
                Event::PolicySet { policy, .. } if policy.check().is_err() => {
                    Some("the policy breaks the rules for its numbers")
                }
                other if validity::marked(other).is_some_and(|node| !facts.nodes.contains_key(node)) => {
                    Some(validity::NO_SUCH_NODE)
                }
                _ => None,
            },
        };
        if let Some(why) = void.filter(|_| !mutants::is_on("void-applied")) {
            facts.totals.void += 1;
            return Applied {
                gap,
                ..ignored(Judged::Void(why))
            };
        }
        self.fold(seq, envelope, event);
        let ticked = matches!(event, Event::Ticked { .. });
        Applied {
            judged: Judged::Valid,
            gap,
            decide: ticked,
            digest: ticked && self.data.facts.tick.0.is_multiple_of(DIGEST_EVERY_TICKS),
        }
    }

    fn fold(&mut self, seq: Seq, envelope: &Envelope, event: &Event) {
        let Data { facts, blocks } = &mut self.data;
        match event {
            Event::ImageCreated(created) => facts.catalog.created(created),
            Event::ImageAttached(attached) => {
                if let (Some(top), Some(on)) = (facts.catalog.attached(attached), blocks.get_mut(&attached.node)) {
                    on.layer_out(top);
                }
            }
            Event::LocationsChanged { image, change } => {
                let at = facts.now(seq);
                let before = facts.catalog.images.get(image).map(|i| (i.epoch, i.replicas.clone()));
                if let (Some(top), Some(on)) = (facts.catalog.located(*image, change), blocks.get_mut(&change.by)) {
                    on.layer_out(top);
                }
                if let (Some((epoch, Some(before))), Some(after)) = (before, facts.catalog.images.get(image)) {
                    let new_owner = epoch != after.epoch;
                    if new_owner {
                        facts.moves.owner_changed(*image);
                    }
                    if let Some(replicas) = &after.replicas {
                        facts.repairs.located(*image, &before, replicas, new_owner, at);
                        facts.moves.located(*image, after, &change.to, at);
                    }
                }
            }
            Event::ImageDetached { image, .. } => {
                facts.catalog.detached(*image);
                facts.moves.detached(*image);
            }
            Event::SnapshotTaken {
                image,
                name,
                sealed,
                top,
            } => facts.catalog.snapshot_taken(*image, name, *sealed, *top),
            Event::ImageResized {
                image,
                size,
                sealed,
                top,
            } => facts.catalog.resized(*image, *size, *sealed, *top),
            Event::ReplicasSet { image, wanted } => {
                let at = facts.now(seq);
                let replicas = facts.catalog.images.get_mut(image).and_then(|i| i.replicas.as_mut());
                if let Some(replicas) = replicas {
                    replicas.wanted = *wanted;
                    facts.repairs.wanted(*image, replicas, at);
                    facts.moves.wanted(*image, replicas, at);
                }
            }
            Event::NodeDrainSet { node, draining, .. } => facts.marks.drain(node, *draining, facts.now(seq)),
            Event::FaultDomainSet { node, fault_domain, .. } => facts.marks.place(node, fault_domain, facts.now(seq)),
            Event::ImageExported { .. } | Event::CopiesChecked(_) => {}
            Event::SnapshotDeleted { image, name } => facts.catalog.snapshot_deleted(*image, name),
            Event::ImageDeleted { image } => {
                facts.repairs.deleted(*image);
                facts.moves.deleted(*image);
                for layer in facts.catalog.deleted(*image) {
                    blocks.values_mut().for_each(|b| b.forget_layer(layer));
                }
            }
            Event::LayerSealed { layer, node, .. } => facts.catalog.sealed(*layer, node),
            Event::LayerDropped { layer, node } => facts.catalog.dropped(*layer, node),
            Event::NodeJoined(joined) => self.joined(joined),
            Event::NodeLeft { node } => {
                if let Some(node) = facts.nodes.get_mut(node) {
                    node.left = true;
                }
            }
            Event::CommandFinished { command, node, outcome } => {
                let live = facts
                    .nodes
                    .get(node)
                    .is_some_and(|n| n.joined.incarnation == envelope.incarnation);
                match facts.orders.finish(seq, *command, node, outcome) {
                    Some(given) => self.finished(*command, &given, outcome, live),
                    None => facts.odd.foreign_answers += 1,
                }
            }
            Event::TermStarted { .. } => {
                if facts.catalog.has_replicas() {
                    facts.repairs.led_since = facts.tick;
                }
            }
            Event::DigestRecorded { .. } | Event::LogRecovered { .. } | Event::LossAccepted { .. } => {}
            Event::Ticked { tick, time, .. } => self.ticked(*tick, *time),
            Event::HeatFolded(heat) => self.heat_folded(seq, heat),
            Event::PolicySet { version, policy, .. } => self.policy_set(*version, policy),
            Event::CommandGiven(command) => self.command_given(seq, command),
        }
    }

    fn joined(&mut self, joined: &NodeJoined) {
        let Data { facts, blocks } = &mut self.data;
        facts.catalog.joined(&joined.node, &joined.layers);
        let restarted = facts
            .nodes
            .get(&joined.node)
            .is_none_or(|n| n.joined.incarnation != joined.incarnation);
        if restarted {
            facts.orders.node_restarted(&joined.node);
            for (id, _) in facts
                .catalog
                .images
                .iter()
                .filter(|(_, image)| image.node == joined.node)
            {
                facts.repairs.owner_restarted(*id, facts.tick);
            }
            if let Some(blocks) = blocks.get_mut(&joined.node) {
                blocks.all_out();
            }
        }
        if restarted && facts.catalog.has_replicas() {
            facts.moves.came.insert(joined.node.clone(), facts.tick);
        }
        let report_seq = match facts.nodes.get(&joined.node) {
            Some(known) if !restarted => known.report_seq,
            _ => 0,
        };
        facts.nodes.insert(
            joined.node.clone(),
            Node {
                joined: joined.clone(),
                left: false,
                last_report: facts.tick,
                report_seq,
                tier: TierUse::default(),
                probe_events_total: 0,
                probe_lost_total: 0,
                disk_read: LatencySummary::default(),
                lost_at: None,
            },
        );
    }

    fn ticked(&mut self, tick: TickNo, time: WallMs) {
        let Data { facts, blocks } = &mut self.data;
        // A wall clock that stood still or went back still means that a tick passed.
        let step = match time.0.checked_sub(facts.time.0) {
            Some(step) if step > 0 && facts.time.0 > 0 => step.min(STEP_MS_MAX),
            _ => TICK_MS,
        };
        facts.tick = tick;
        facts.time = time;
        facts.tick_ms = step.min(TICK_MS);
        let threshold = facts.threshold();
        let shift = facts.clock.advance(step);
        facts.moves.ticked(tick, &facts.catalog.images);
        facts.floor = shift.map_or(threshold, |bits| shifted(threshold, bits)).max(1);
        let floor = facts.floor;
        for (node, blocks) in blocks.iter_mut() {
            match shift {
                Some(bits) => blocks.shift(bits, floor),
                None => blocks.raise_floor(floor),
            }
            blocks.wake(tick.0);
            debug_assert!(facts.nodes.contains_key(node), "blocks belong to a known node");
        }
        for given in facts.orders.expire(tick) {
            let Some(blocks) = blocks.get_mut(&given.node) else {
                continue;
            };
            for block in given.blocks {
                let waits = if given.promote { Place::Arriving } else { Place::Leaving };
                blocks.place_if(given.layer, block, |p| p == waits, Place::Doubtful);
            }
        }
    }

    fn policy_set(&mut self, version: u64, policy: &TierPolicy) {
        let Data { facts, blocks } = &mut self.data;
        let before = facts.clock;
        let half_life_changed = facts.policy.half_life_s != policy.half_life_s;
        facts.policy_version = version;
        facts.policy = policy.clone();
        if half_life_changed {
            facts.clock.restart(policy.half_life_s);
        }
        facts.floor = facts.threshold();
        let floor = facts.floor;
        for blocks in blocks.values_mut() {
            if half_life_changed {
                blocks.restart(&before, floor);
            } else {
                blocks.rebuild(floor);
            }
        }
    }

    fn heat_folded(&mut self, seq: Seq, heat: &HeatFolded) {
        let Data { facts, blocks } = &mut self.data;
        let (tick, floor) = (facts.tick, facts.floor);
        let share = TRACKED_BLOCKS_MAX / (facts.nodes.len() as u64).max(1);
        let Some(node) = facts.nodes.get_mut(&heat.node) else {
            facts.odd.foreign_records += heat.images.len() as u64;
            return;
        };
        if node.joined.incarnation != heat.incarnation {
            // A report of a process that is gone: its RAM is gone too, and its heat is too old to matter.
            facts.odd.foreign_records += heat.images.len() as u64;
            return;
        }
        if heat.reports.0 <= node.report_seq {
            facts.totals.repeats += 1;
            return;
        }
        let was_away = node.left || tick.0.saturating_sub(node.last_report.0) > ABSENT_AFTER_TICKS;
        if was_away && facts.catalog.has_replicas() {
            facts.moves.came.insert(heat.node.clone(), tick);
        }
        facts.totals.report_gaps = facts.totals.report_gaps.saturating_add(heat.gap);
        node.report_seq = heat.reports.1.max(heat.reports.0);
        node.last_report = tick;
        node.left = false;
        node.tier = heat.tier;
        node.probe_events_total = heat.probe_events_total;
        node.probe_lost_total = heat.probe_lost_total;
        node.disk_read = heat
            .disks
            .iter()
            .map(|d| d.read_latency)
            .max_by_key(|l| (l.p99_us, l.max_us, l.count))
            .unwrap_or_default();
        let on = blocks.entry(heat.node.clone()).or_default();
        on.ensure_floor(floor);
        for (layer, dropped) in &heat.dropped {
            for block in dropped {
                on.dropped(*layer, *block, tick.0);
            }
        }
        let reports = (node.report_seq - heat.reports.0).saturating_add(1);
        for image_heat in &heat.images {
            let Some(image) = facts.catalog.images.get_mut(&image_heat.image) else {
                facts.odd.foreign_records += 1;
                continue;
            };
            if image_heat.omitted.lost > 0 {
                node.lost_at = Some(tick);
            }
            let mut last = LastWindow {
                origin: Some(image_heat.origin),
                tick: tick.0,
                reports,
                reads: image_heat.omitted.reads,
                writes: image_heat.omitted.writes,
                ram_hits: image_heat.ram_hits,
                ram_misses: image_heat.ram_misses,
                lost: image_heat.omitted.lost,
                read_latency: image_heat.read_latency,
                write_latency: image_heat.write_latency,
            };
            let end = BlockIndex(image.blocks());
            for layer_heat in &image_heat.layers {
                let Some(layer) = facts.catalog.layers.get(&layer_heat.layer) else {
                    facts.odd.foreign_records += 1;
                    continue;
                };
                let Ok(mut records) = layer_heat.blocks.unpack() else {
                    facts.odd.damaged_packs += 1;
                    continue;
                };
                let inside = records.partition_point(|r| r.block < end);
                facts.odd.foreign_records += (records.len() - inside) as u64;
                records.truncate(inside);
                for record in &records {
                    last.reads = last.reads.saturating_add(u64::from(record.reads));
                    last.writes = last.writes.saturating_add(u64::from(record.writes));
                }
                let at = HeatAt {
                    clock: &facts.clock,
                    layer: layer_heat.layer,
                    block_bytes: layer.block_size.0,
                    seq,
                    reports,
                    clean: image_heat.omitted.lost == 0 || mutants::is_on("lost-uncounted"),
                };
                on.fold(at, &records);
            }
            image.last = last;
        }
        facts.odd.forgotten_blocks += on.forget_coldest(share.min(TRACKED_BLOCKS_PER_NODE_MAX));
    }

    fn command_given(&mut self, seq: Seq, command: &Command) {
        let Data { facts, blocks } = &mut self.data;
        let layer = command.order.layer();
        let known = blocks.get(&command.node).and_then(|b| b.layers.get(&layer));
        // A layer that is gone keeps its block size where copies of it are left.
        let block_bytes = known
            .map(|b| b.block_bytes)
            .or_else(|| facts.catalog.layers.get(&layer).map(|l| l.block_size.0));
        facts.decisions = crate::digest::chain_decision(&facts.decisions, command);
        let new = facts.orders.give(seq, facts.time, command, block_bytes.unwrap_or(0));
        if let Order::Replicate { image, .. } | Order::Drop { image, .. } = &command.order {
            let at = facts.now(seq);
            if let Some(known) = facts.catalog.images.get(image).filter(|_| new) {
                if let Order::Replicate { to, .. } = &command.order {
                    facts.repairs.given(*image, command, to, facts.tick);
                }
                if let Some(replicas) = &known.replicas {
                    facts.moves.given(*image, command, replicas, at);
                }
            }
            return;
        }
        facts.commanded_last = Some(command.node.clone());
        let Some(block_bytes) = block_bytes.filter(|_| new && facts.nodes.contains_key(&command.node)) else {
            return;
        };
        let floor = facts.floor;
        let given = &facts.orders.given[&command.id];
        let on = blocks.entry(command.node.clone()).or_default();
        on.ensure_floor(floor);
        for block in &given.blocks {
            if given.promote {
                let place = on.cell(layer, *block).map_or(Place::Out, |c| c.place);
                if matches!(place, Place::Out | Place::Resting | Place::Doubtful) {
                    on.place(layer, block_bytes, *block, Place::Arriving);
                }
            } else {
                let held = |p| matches!(p, Place::Resident | Place::Doubtful);
                on.place_if(layer, *block, held, Place::Leaving);
            }
        }
    }

    fn finished(&mut self, id: CommandId, given: &Given, outcome: &Outcome, live: bool) {
        let Data { facts, blocks } = &mut self.data;
        if let Some(image) = given.replicates {
            facts.repairs.finished(image, id, outcome, facts.tick);
            facts.moves.finished(image, id, outcome, facts.tick);
            return;
        }
        if let Outcome::Done { done, skipped, .. } = outcome {
            let totals = &mut facts.totals;
            let moved = if given.promote {
                &mut totals.blocks_promoted
            } else {
                &mut totals.blocks_demoted
            };
            *moved += done.len() as u64;
            totals.blocks_skipped += skipped.len() as u64;
        }
        // What an earlier process did to its RAM is gone with it.
        let Some(on) = blocks.get_mut(&given.node).filter(|_| live && given.block_bytes > 0) else {
            return;
        };
        let tick = facts.tick.0;
        let gone = !facts.catalog.layers.contains_key(&given.layer);
        let (done, skipped): (BTreeSet<BlockIndex>, BTreeSet<BlockIndex>) = match outcome {
            Outcome::Done { done, skipped, .. } => (
                done.iter().copied().collect(),
                skipped.iter().map(|(block, _)| *block).collect(),
            ),
            Outcome::Refused { .. } => Default::default(),
        };
        for block in &given.blocks {
            if given.promote {
                let place = on.cell(given.layer, *block).map_or(Place::Out, |c| c.place);
                if !done.contains(block) {
                    on.skipped(given.layer, *block, tick);
                } else if matches!(place, Place::Arriving | Place::Out | Place::Doubtful) {
                    on.arrived(given.layer, given.block_bytes, *block);
                }
            } else if done.contains(block) || skipped.contains(block) || gone {
                // A demotion skips what it does not find in the main region. A node that does not know the layer any
                // more has no copy of it either.
                let held = |p| matches!(p, Place::Leaving | Place::Doubtful | Place::Resident);
                on.place_if(given.layer, *block, held, Place::Out);
            } else {
                on.stays(given.layer, *block, tick);
            }
        }
    }

    /// The state as bytes that every later build reads, self-describing: MessagePack with field names.
    ///
    /// # Panics
    /// Never: a state always encodes.
    pub fn encode(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("a state always encodes")
    }

    /// Reads what [`State::encode`] wrote. Whether it is the state of a log is for its digest to say.
    ///
    /// # Errors
    /// The decoder's complaint.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        rmp_serde::from_slice(bytes).map_err(|error| error.to_string())
    }

    /// The digest of the state: blake3 of its canonical encoding. Costs a pass over everything: some 25 bytes per
    /// tracked block at about 1 GB/s, and the encoding of nodes, images and commands.
    pub fn digest(&self) -> [u8; 32] {
        crate::digest::state(&self.data)
    }

    /// The digest of all valid commands in the log so far, each chained to the ones before it.
    pub fn decisions_digest(&self) -> [u8; 32] {
        self.data.facts.decisions
    }

    /// The commands that the policies want now. Called after a valid tick; the order is fixed.
    pub fn decide(&self) -> Vec<Command> {
        let mut commands = crate::policy::tier::decide(&self.data);
        let repairs = crate::policy::repair::decide(&self.data.facts);
        let moves = crate::policy::moves::decide(&self.data.facts, &repairs);
        commands.extend(repairs.into_iter().chain(moves));
        if mutants::is_on("hash-order") {
            return mutants::in_hash_order(commands);
        }
        commands
    }

    /// The last log position applied.
    pub fn seq(&self) -> Seq {
        self.data.facts.seq
    }

    /// Time of the last tick.
    pub fn time(&self) -> WallMs {
        self.data.facts.time
    }

    /// The highest term won.
    pub fn term(&self) -> Term {
        self.data.facts.validity.term()
    }

    /// The last tick.
    pub fn tick(&self) -> TickNo {
        self.data.facts.tick
    }

    /// Who won the highest term.
    pub fn leader(&self) -> Option<&SchedulerId> {
        self.data.facts.validity.leader()
    }

    /// The policy in force and its version; version 0 is the built-in default.
    pub fn policy(&self) -> (u64, &TierPolicy) {
        (self.data.facts.policy_version, &self.data.facts.policy)
    }

    /// Where the folding of a node's heat reports stands: its process start and the highest report folded (0 for
    /// none). A new leader goes on from there. `None` for a node that never joined.
    pub fn folded_reports(&self, node: &NodeId) -> Option<(Incarnation, u64)> {
        self.data
            .facts
            .nodes
            .get(node)
            .map(|n| (n.joined.incarnation, n.report_seq))
    }

    /// Whether a node of that id ever joined.
    pub fn knows_node(&self, node: &NodeId) -> bool {
        self.data.facts.nodes.contains_key(node)
    }

    /// The image of that name.
    pub fn image_by_name(&self, name: &ImageName) -> Option<ImageId> {
        self.data.facts.validity.by_name(name)
    }

    /// The layer stack of an image, top first.
    pub fn layers(&self, image: ImageId) -> Option<&[LayerId]> {
        self.data.facts.catalog.images.get(&image).map(|i| i.layers.as_slice())
    }

    /// Counters since the log began.
    pub fn totals(&self) -> Totals {
        self.data.facts.totals
    }

    /// Whether a block is in the main region of a node, and its score there now.
    pub fn block(&self, node: &NodeId, layer: LayerId, block: BlockIndex) -> (bool, HeatScore) {
        match self.data.blocks.get(node).and_then(|b| b.cell(layer, block)) {
            Some(cell) => (
                matches!(cell.place, Place::Resident | Place::Leaving),
                self.data.facts.clock.score(cell.weight),
            ),
            None => (false, HeatScore(0)),
        }
    }

    /// Blocks with heat or a place in RAM, on all nodes.
    pub fn tracked_blocks(&self) -> u64 {
        self.data.blocks.values().map(|b| b.tracked).sum()
    }

    /// Bytes of a node's main region as the log tells them: resident, and ordered in without an answer yet.
    pub fn main_bytes(&self, node: &NodeId) -> (ByteLen, ByteLen) {
        self.data.blocks.get(node).map_or((ByteLen(0), ByteLen(0)), |b| {
            (ByteLen(b.resident_bytes), ByteLen(b.arriving_bytes))
        })
    }
}
