//! The cluster as people see it, derived from the state: live, paused and replayed screens are the same.

use std::collections::BTreeMap;

use hearth_protocol::chain::hex;
use hearth_protocol::limits::{ABSENT_AFTER_TICKS, DEGRADED_IN_VIEW_MAX, TICK_MS};
use hearth_protocol::record::Nodes;
use hearth_protocol::view::{
    ClusterView, DecisionView, DrainView, HealthItem, HeatCell, ImageHeatView, ImageView, MoveAccount, NodeView,
    ReplicasView,
};
use hearth_protocol::{BlockIndex, ByteLen, HeatScore, ImageId, NodeId};

use crate::blocks::Place;
use crate::catalog::{Image, Replicas};
use crate::moves::{Account, Rule};
use crate::place::held;
use crate::policy::repair::{Standing, has_place, standing};
use crate::repairs::Short;
use crate::state::{Facts, State};
use crate::stop::draining;

/// Ticks for which a loss of samples stays a health item.
const LOSS_SHOWN_TICKS: u64 = 60;

/// The whole cluster. Its digest is computed: [`State::digest`] says what that costs.
pub fn view(state: &State) -> ClusterView {
    let facts = &state.data.facts;
    let mut attached: BTreeMap<_, u64> = BTreeMap::new();
    for image in facts.catalog.images.values().filter(|i| i.attached) {
        *attached.entry(&image.node).or_default() += 1;
    }
    let (held, drains) = (held(facts), draining(facts));
    let nodes = facts
        .nodes
        .iter()
        .map(|(id, node)| {
            let mut tier = node.tier;
            if tier.capacity.0 == 0 {
                tier.capacity = node.joined.ram;
                tier.main_capacity = node.joined.main;
                tier.front_capacity = ByteLen(node.joined.ram.0.saturating_sub(node.joined.main.0));
            }
            NodeView {
                id: id.clone(),
                present: facts.present(node),
                last_report: node.last_report,
                fault_domain: facts.fault_domain(id).to_owned(),
                tier,
                heat_source: node.joined.heat_source.clone(),
                probe_events_total: node.probe_events_total,
                probe_lost_total: node.probe_lost_total,
                in_flight: ByteLen(state.data.blocks.get(id).map_or(0, |b| b.arriving_bytes)),
                images: attached.get(id).copied().unwrap_or(0),
                disk_read: node.disk_read,
                held: ByteLen(held.get(id).copied().unwrap_or(0)),
                drain: drains.get(id).copied(),
            }
        })
        .collect();
    let mut images: Vec<ImageView> = facts
        .catalog
        .images
        .iter()
        .map(|(id, image)| image_view(state, *id, image))
        .collect();
    images.sort_by(|a, b| a.name.cmp(&b.name));
    let decisions = facts
        .orders
        .shown
        .iter()
        .map(|shown| {
            let images = facts
                .catalog
                .layers
                .get(&shown.command.order.layer())
                .map_or(Vec::new(), |layer| {
                    let mut names: Vec<_> = layer
                        .images
                        .iter()
                        .filter_map(|i| facts.catalog.images.get(i).map(|i| i.name.clone()))
                        .collect();
                    names.sort();
                    names
                });
            let mut view = DecisionView::new(
                shown.seq,
                shown.time,
                shown.command.clone(),
                images,
                shown.ended.clone(),
                shown.expired,
            );
            // What is kept for people was cut before; its counts were not.
            view.blocks = shown.blocks;
            view.done_skipped = shown.done_skipped;
            view
        })
        .collect();
    ClusterView {
        seq: facts.seq,
        time: facts.time,
        term: state.term(),
        leader: state.leader().cloned(),
        tick: facts.tick,
        digest: hex(&state.digest()),
        nodes,
        images,
        decisions,
        health: health(facts),
        policy: (facts.policy_version, facts.policy.clone()),
        totals: facts.totals,
        moves: move_accounts(facts),
    }
}

fn move_accounts(facts: &Facts) -> Vec<MoveAccount> {
    let of = |(rule, account): (&Rule, &Account)| MoveAccount {
        rule: rule.name().into(),
        done: account.done,
        failed: account.failed,
        bytes: ByteLen(account.bytes),
        predicted: account.predicted,
        realised: account.realised,
        off_until: facts.moves.is_off(*rule, facts.tick).then_some(account.off_until),
    };
    facts.moves.ledger.iter().map(of).collect()
}

/// Ticks for which a report speaks for the present: nodes and leader count their seconds each by itself, so every now
/// and then a tick passes between two reports.
const FRESH_TICKS: u64 = 2;

fn image_view(state: &State, id: ImageId, image: &Image) -> ImageView {
    let facts = &state.data.facts;
    let (mut tracked_blocks, mut resident_blocks) = (0, 0);
    if let Some(blocks) = state.data.blocks.get(&image.node) {
        for layer in image.layers.iter().filter_map(|l| blocks.layers.get(l)) {
            tracked_blocks += layer.cells.len() as u64;
            resident_blocks += layer.resident;
        }
    }
    let last = &image.last;
    // Rates of a window that is over are history, not the present.
    let fresh = image.attached && facts.tick.0.saturating_sub(last.tick) <= FRESH_TICKS;
    let per_s = |count: u64| {
        if fresh {
            count.saturating_mul(1_000) / last.reports.saturating_mul(TICK_MS).max(1)
        } else {
            0
        }
    };
    let touched = last.ram_hits.saturating_add(last.ram_misses);
    ImageView {
        id,
        name: image.name.clone(),
        size: image.size,
        block_size: image.block_size,
        node: image.node.clone(),
        attached: image.attached,
        epoch: image.epoch,
        parent: image.parent.clone(),
        snapshots: image.snapshots.clone(),
        origin: last.origin,
        reads_per_s: per_s(last.reads),
        writes_per_s: per_s(last.writes),
        hit_permille: (fresh && touched > 0)
            .then(|| u64::try_from(u128::from(last.ram_hits) * 1_000 / u128::from(touched)).unwrap_or(1_000)),
        read_latency: if fresh { last.read_latency } else { Default::default() },
        write_latency: if fresh { last.write_latency } else { Default::default() },
        tracked_blocks,
        resident_blocks,
        replicas: image
            .replicas
            .as_ref()
            .map_or_else(ReplicasView::default, |replicas| ReplicasView {
                wanted: replicas.wanted,
                in_sync: replicas.fewest,
                members: replicas.members.clone(),
                joiners: replicas.joiners.clone(),
            }),
    }
}

/// Heat and tiers of one image's blocks on its own node; `None` if there is no such image. A block that lies in a
/// sealed layer shows what all clones on that node made of it.
pub fn image_heat(state: &State, image: ImageId) -> Option<ImageHeatView> {
    let facts = &state.data.facts;
    let known = facts.catalog.images.get(&image)?;
    let end = BlockIndex(known.blocks());
    let mut cells: BTreeMap<BlockIndex, HeatCell> = BTreeMap::new();
    if let Some(blocks) = state.data.blocks.get(&known.node) {
        for layer in known.layers.iter().filter_map(|l| blocks.layers.get(l)) {
            for (block, cell) in layer.cells.range(..end) {
                let ram = matches!(cell.place, Place::Resident | Place::Leaving);
                let score = facts.clock.score(cell.weight);
                if score.0 == 0 && !ram {
                    continue;
                }
                let entry = cells.entry(*block).or_insert(HeatCell {
                    block: *block,
                    score: HeatScore(0),
                    ram: false,
                });
                entry.score = entry.score.max(score);
                entry.ram |= ram;
            }
        }
    }
    let view = ImageHeatView {
        image,
        blocks: known.blocks(),
        block_size: known.block_size,
        cells: cells.into_values().collect(),
        omitted: 0,
    };
    Some(view.cut())
}

/// Images with fewer replicas than wanted, those with the fewest first.
fn degraded(facts: &Facts, add: &mut impl FnMut(&str, bool, String, String)) {
    let short = facts.repairs.short.iter().filter_map(|(id, short)| {
        let image = facts.catalog.images.get(id)?;
        Some((short.fewest, &image.name, *id, short, image, image.replicas.as_ref()?))
    });
    let mut short: Vec<_> = short.collect();
    short.sort_by_key(|(fewest, name, ..)| (*fewest, *name));
    for (fewest, name, id, short, image, replicas) in short.iter().take(DEGRADED_IN_VIEW_MAX) {
        let risk = if *fewest == 1 {
            "; the next failure can lose it"
        } else {
            ""
        };
        let (wanted, since) = (replicas.wanted, short.since.tick);
        add(
            "DEGRADED",
            *fewest == 1,
            format!("image {name} has {fewest} of {wanted} replicas since tick {since}{risk}"),
            degraded_fix(facts, *id, image, replicas, short),
        );
    }
    let more = short.len().saturating_sub(DEGRADED_IN_VIEW_MAX);
    if more > 0 {
        add(
            "DEGRADED",
            false,
            format!("{more} more images have fewer replicas than wanted"),
            "hearth image list shows them all".into(),
        );
    }
}

fn degraded_fix(facts: &Facts, id: ImageId, image: &Image, replicas: &Replicas, short: &Short) -> String {
    let name = &image.name;
    let list = |nodes: &Nodes| nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    match standing(facts, id, image, short) {
        Standing::Joining => format!("nothing: {} is being synced", list(&replicas.joiners)),
        Standing::Ordered(to) => format!("nothing: {} was told to begin a replica on {to}", image.node),
        Standing::Detached => {
            format!("hearth image attach {name}: a replica is made only while the image is served")
        }
        Standing::OwnerAbsent => format!(
            "start hearth-node on {}, which owns the image, or hearth image attach {name} --takeover on another node",
            image.node
        ),
        Standing::Due | Standing::OwnerBegins | Standing::Grace(_) if !has_place(facts, image) => {
            match short.lost.is_empty() {
                true => "add a node: none of those that are present is free to take a replica".into(),
                false => format!(
                    "start hearth-node on {}, or add a node: none is free to take a replica",
                    list(&short.lost)
                ),
            }
        }
        Standing::Grace(ticks) if short.lost.is_empty() => {
            format!("nothing: a replica on another node begins in {ticks} ticks")
        }
        Standing::Grace(ticks) => format!(
            "start hearth-node on {}; else a replica on another node begins in {ticks} ticks",
            list(&short.lost)
        ),
        Standing::OwnerBegins => format!("nothing: {} begins to serve it, then a replica begins", image.node),
        Standing::Due => "nothing: a replica begins once others are done, or nodes that were tried have rested".into(),
    }
}

/// Images that were moved in a circle, and rules whose moves did not last.
fn moves(facts: &Facts, add: &mut impl FnMut(&str, bool, String, String)) {
    let broken = facts
        .moves
        .breakers
        .iter()
        .filter(|(id, _)| facts.moves.is_broken(**id, facts.tick));
    let broken: Vec<_> = broken
        .filter_map(|(id, breaker)| Some((&facts.catalog.images.get(id)?.name, breaker)))
        .collect();
    for (name, breaker) in broken.iter().take(DEGRADED_IN_VIEW_MAX) {
        add(
            "MOVES_PAUSED",
            false,
            format!(
                "a replica of image {name} was ordered back at tick {} to a node that it had been moved off: no automatic \
                 moves of it until tick {}",
                breaker.at.tick, breaker.until
            ),
            format!("hearth why {name}:0 shows the moves; nodes that come and go are often behind it"),
        );
    }
    let more = broken.len().saturating_sub(DEGRADED_IN_VIEW_MAX);
    if more > 0 {
        add(
            "MOVES_PAUSED",
            false,
            format!("replicas of {more} more images were moved in circles"),
            "hearth log list --kind command_given shows the moves".into(),
        );
    }
    for account in move_accounts(facts) {
        if let Some(until) = account.off_until {
            let rule = &account.rule;
            add(
                "MOVES_OFF",
                false,
                format!("the rule {rule} is off until tick {until}: its last moves did not last"),
                format!("hearth log list --kind command_given shows them; {rule} goes on by itself"),
            );
        }
    }
}

fn drain_words(facts: &Facts, node: &NodeId, view: &DrainView) -> (String, String) {
    let since = view.since;
    if view.is_done() {
        return (
            format!("node {node} drains since tick {since} and holds nothing any more"),
            format!("stop it, or hearth node undrain {node}"),
        );
    }
    let DrainView {
        replicas, owned, alone, ..
    } = view;
    let message = format!(
        "node {node} drains since tick {since}: {replicas} replicas to move, {owned} images owned there or by nobody, \
         {alone} without a copy elsewhere"
    );
    let fix = if *owned > 0 || *alone > 0 {
        format!("hearth node ok-to-stop {node} says what to do for each image")
    } else if facts.takers().next().is_none() {
        "add a node: none of those that are there can take a replica".into()
    } else {
        "nothing: they are moved a few at a time".into()
    };
    (message, fix)
}

/// What is wrong, errors before warnings, then by code and text.
fn health(facts: &Facts) -> Vec<HealthItem> {
    let mut items = Vec::new();
    let mut add = |code: &str, error: bool, message: String, fix: String| {
        items.push(HealthItem::new(code, error, message, fix));
    };
    if facts.validity.leader().is_none() {
        add(
            "NO_LEADER",
            true,
            "no scheduler has won a term: nothing is promoted or demoted; images are served on".into(),
            "start hearth-scheduler, or look into its output if it runs; it says why it does not lead".into(),
        );
    }
    if !facts.policy.enabled {
        add(
            "POLICY_OFF",
            false,
            "the tier policy is switched off: the main regions stay as they are".into(),
            "hearth policy set enabled=true".into(),
        );
    }
    for (id, node) in &facts.nodes {
        if node.left {
            add(
                "NODE_LEFT",
                false,
                format!("node {id} stopped in order; it gets no commands"),
                format!("start hearth-node on {id} if it is to come back"),
            );
        } else if !facts.present(node) {
            add(
                "NODE_ABSENT",
                true,
                format!(
                    "node {id} has not reported since tick {} (now {}, absent after {ABSENT_AFTER_TICKS})",
                    node.last_report, facts.tick
                ),
                format!(
                    "hearth node show {id}; if it does not answer, start hearth-node on {id} or look into its output"
                ),
            );
        }
        if let Some(at) = node.lost_at
            && facts.tick.0.saturating_sub(at.0) <= LOSS_SHOWN_TICKS
        {
            add(
                "HEAT_LOST",
                false,
                format!(
                    "node {id}: probes lost block counts at tick {at} ({} since its daemon started); such heat moves \
                     nothing by itself",
                    node.probe_lost_total
                ),
                format!("hearth node show {id}; start its daemon with a larger heat map"),
            );
        }
    }
    degraded(facts, &mut add);
    for (node, view) in draining(facts) {
        let (message, fix) = drain_words(facts, node, &view);
        add("NODE_DRAINING", false, message, fix);
    }
    moves(facts, &mut add);
    if facts.odd.damaged_packs > 0 {
        add(
            "HEAT_DAMAGED",
            false,
            format!(
                "{} heat packs could not be read and were left out",
                facts.odd.damaged_packs
            ),
            "hearth log list --kind heat_folded; upgrade the scheduler if the nodes are newer".into(),
        );
    }
    if facts.odd.publisher_gaps > 0 {
        add(
            "EVENTS_MISSING",
            false,
            format!("{} events never arrived or came late", facts.odd.publisher_gaps),
            "hearth log verify".into(),
        );
    }
    HealthItem::sort(&mut items);
    items
}
