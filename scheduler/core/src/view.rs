//! The cluster as people see it, derived from the state: live, paused and replayed screens are the same.

use std::collections::BTreeMap;

use hearth_protocol::chain::hex;
use hearth_protocol::limits::{ABSENT_AFTER_TICKS, TICK_MS};
use hearth_protocol::view::{ClusterView, DecisionView, HealthItem, HeatCell, ImageHeatView, ImageView, NodeView};
use hearth_protocol::{BlockIndex, ByteLen, HeatScore, ImageId};

use crate::blocks::Place;
use crate::catalog::Image;
use crate::state::{Facts, State};

/// Ticks for which a loss of samples stays a health item.
const LOSS_SHOWN_TICKS: u64 = 60;

/// The whole cluster. Its digest is computed: [`State::digest`] says what that costs.
pub fn view(state: &State) -> ClusterView {
    let facts = &state.data.facts;
    let mut attached: BTreeMap<_, u64> = BTreeMap::new();
    for image in facts.catalog.images.values().filter(|i| i.attached) {
        *attached.entry(&image.node).or_default() += 1;
    }
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
                fault_domain: node.joined.fault_domain.clone(),
                tier,
                heat_source: node.joined.heat_source.clone(),
                probe_events_total: node.probe_events_total,
                probe_lost_total: node.probe_lost_total,
                in_flight: ByteLen(state.data.blocks.get(id).map_or(0, |b| b.arriving_bytes)),
                images: attached.get(id).copied().unwrap_or(0),
                disk_read: node.disk_read,
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
    }
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
