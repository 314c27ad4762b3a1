//! Why a block is where it is: the chain from heat events over the rule and its numbers to the command and its result,
//! and the times it was considered and lost.
//!
//! [`Why`] watches a fold ([`crate::replay::Replayer`] or a live one) and keeps what concerns one block of one image,
//! in whatever layer of the image's stack the block was at the time. Heat of the same block that other images of the
//! same layer earned counts too, and says whose it is.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hearth_protocol::command::{Alternative, LostNode, Order, Outcome, Resident};
use hearth_protocol::event::HeatFolded;
use hearth_protocol::record::Extent;
use hearth_protocol::{
    BlockIndex, Command, CommandId, Event, HeatScore, ImageId, ImageName, LayerId, NodeId, Seq, TickNo, WallMs,
};
use serde::{Deserialize, Serialize};

use self::names::Names;
use crate::blocks::Place;
use crate::state::{Applied, Judged, State};

mod names;
mod text;

pub use text::number_text;

/// Heat events kept, newest; older ones are counted.
pub const HEAT_KEPT_MAX: usize = 512;

/// Decisions and lost considerations kept, newest.
pub const DECISIONS_KEPT_MAX: usize = 128;

/// Which image a question is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhyImage {
    /// By id.
    Id(ImageId),
    /// By the name it has when the fold comes to it.
    Name(ImageName),
}

/// One heat event that counted the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatEvidence {
    /// Its log position.
    pub seq: Seq,
    /// The last tick before it, and that tick's time.
    pub tick: TickNo,
    /// See `tick`.
    pub time: WallMs,
    /// The node that reported.
    pub node: NodeId,
    /// The layer the block was in.
    pub layer: LayerId,
    /// The image that was read; another one than asked about if they share the layer.
    pub image: ImageId,
    /// Reads in the window.
    pub reads: u32,
    /// Writes in the window.
    pub writes: u32,
    /// Bursts in the window.
    pub bursts: u32,
    /// Samples that the window lost; then it made the block no candidate.
    pub lost: u64,
    /// The block's score after it.
    pub score: HeatScore,
}

/// One command that named the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionEvidence {
    /// Its log position.
    pub seq: Seq,
    /// The tick that decided it, and that tick's time.
    pub tick: TickNo,
    /// See `tick`.
    pub time: WallMs,
    /// Its id.
    pub command: CommandId,
    /// The node.
    pub node: NodeId,
    /// `promote`, `demote`, `replicate` or `drop`.
    pub verb: String,
    /// The layer.
    pub layer: LayerId,
    /// The block's score when decided; 0 for a replicate, which rests on no heat.
    pub score: HeatScore,
    /// The node that a replicate gives a replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<NodeId>,
    /// The node whose replica goes: at once for a drop, once the new one is in sync for a replicate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<NodeId>,
    /// The resident it displaced, if the region was full.
    pub displaces: Option<Resident>,
    /// The newest heat event it rests on, for a promotion.
    pub heat_seq: Option<Seq>,
    /// The rule.
    pub rule: String,
    /// Version of the policy.
    pub policy_version: u64,
    /// The rule's numbers, as in [`hearth_protocol::Reason`].
    pub numbers: Vec<(String, u64)>,
    /// All log positions the command rests on.
    pub rests_on: Vec<Seq>,
    /// What the decision of that tick did not choose.
    pub lost: Vec<Alternative>,
    /// Nodes that the decision did not choose.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost_nodes: Vec<LostNode>,
    /// How it ended for this block.
    pub result: Option<ResultEvidence>,
}

/// How a command ended for the block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultEvidence {
    /// Log position of the answer.
    pub seq: Seq,
    /// `done`, `skipped` or `refused`.
    pub how: String,
    /// The node's words, if it skipped or refused.
    pub why: String,
    /// Microseconds the whole command took.
    pub took_us: u64,
}

/// A promotion that considered the block and chose others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostEvidence {
    /// Log position of the command that won.
    pub seq: Seq,
    /// That command.
    pub command: CommandId,
    /// The block's score then.
    pub score: HeatScore,
    /// Why it lost.
    pub why: String,
}

/// Where the block is on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WherePlaced {
    /// The node.
    pub node: NodeId,
    /// The layer.
    pub layer: LayerId,
    /// `disk`, `ordered_in`, `ram`, `ordered_out`, `in_doubt` or `resting`.
    pub place: String,
    /// The score now.
    pub score: HeatScore,
    /// The newest heat event without losses that counted it; 0 for none.
    pub heat_seq: Seq,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhyReport {
    /// The image.
    pub image: ImageId,
    /// Its name.
    pub name: ImageName,
    /// The block.
    pub block: BlockIndex,
    /// The log position the answer holds for, its tick and time.
    pub seq: Seq,
    /// See `seq`.
    pub tick: TickNo,
    /// See `seq`.
    pub time: WallMs,
    /// One sentence.
    pub verdict: String,
    /// The last tick without automatic moves of its replicas, because one went in a circle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moves_paused_until: Option<TickNo>,
    /// Policy version and threshold in force.
    pub policy_version: u64,
    /// The score from which a block is a candidate.
    pub threshold: HeatScore,
    /// Where the block is, on every node that knows it.
    pub places: Vec<WherePlaced>,
    /// Heat events, oldest first, at most [`HEAT_KEPT_MAX`].
    pub heat: Vec<HeatEvidence>,
    /// All heat events, those not kept included.
    pub heat_total: u64,
    /// Commands that named it, oldest first, at most [`DECISIONS_KEPT_MAX`].
    pub decisions: Vec<DecisionEvidence>,
    /// Decisions it lost, oldest first, at most [`DECISIONS_KEPT_MAX`].
    pub lost: Vec<LostEvidence>,
    /// Log positions of reports that a copy left RAM without an order, because a write made it stale.
    pub dropped: Vec<(Seq, NodeId)>,
    /// The names of the images above, where the log has them.
    pub image_names: BTreeMap<ImageId, String>,
    /// What the layers above are, where the log says so: a snapshot, the top or a lower layer of an image.
    pub layer_names: BTreeMap<LayerId, String>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyError {
    /// No image of that name or id in the log so far.
    #[error("no image {0} in the log at this position: hearth image list shows the images")]
    NoImage(String),
    /// The block is past the image's end.
    #[error("image {name} has blocks 0 to {last}, there is no block {block}")]
    NoBlock {
        /// The image.
        name: ImageName,
        /// Its last block.
        last: u64,
        /// The block asked about.
        block: BlockIndex,
    },
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Why {
    image: WhyImage,
    block: BlockIndex,
    found: Option<ImageId>,
    /// Every layer that was in the image's stack.
    layers: BTreeSet<LayerId>,
    heat: VecDeque<HeatEvidence>,
    heat_total: u64,
    decisions: VecDeque<DecisionEvidence>,
    lost: VecDeque<LostEvidence>,
    dropped: Vec<(Seq, NodeId)>,
    /// What the newest decision of one rule, node and tick did not choose: its first command carries it for all.
    not_chosen: Option<(String, NodeId, TickNo, Vec<Alternative>)>,
    /// Of all images and layers: other ones' heat and blocks are told of, too.
    names: Names,
}

fn push<T>(list: &mut VecDeque<T>, one: T, max: usize) {
    if list.len() == max {
        list.pop_front();
    }
    list.push_back(one);
}

impl Why {
    /// Asks about one block.
    pub fn new(image: WhyImage, block: BlockIndex) -> Self {
        Self {
            found: match &image {
                WhyImage::Id(id) => Some(*id),
                WhyImage::Name(_) => None,
            },
            image,
            block,
            layers: BTreeSet::new(),
            heat: VecDeque::new(),
            heat_total: 0,
            decisions: VecDeque::new(),
            lost: VecDeque::new(),
            dropped: Vec::new(),
            not_chosen: None,
            names: Names::default(),
        }
    }

    /// Watches one folded event; `after` is the state with the event in it.
    pub fn observe(&mut self, seq: Seq, event: &Event, applied: Applied, after: &State) {
        if applied.judged != Judged::Valid {
            return;
        }
        self.names.learn(event);
        match event {
            Event::ImageCreated(_) | Event::SnapshotTaken { .. } | Event::ImageResized { .. } => self.look_up(after),
            Event::HeatFolded(heat) => self.heat(seq, heat, after),
            Event::CommandGiven(command) => self.command(seq, command, after),
            Event::CommandFinished { command, outcome, .. } => self.result(seq, *command, outcome),
            _ => {}
        }
    }

    fn look_up(&mut self, state: &State) {
        if let WhyImage::Name(name) = &self.image
            && let Some(id) = state.image_by_name(name)
            && self.found != Some(id)
        {
            // The name went to another image: what was seen concerns the one before.
            *self = Self {
                found: Some(id),
                names: std::mem::take(&mut self.names),
                ..Self::new(WhyImage::Name(name.clone()), self.block)
            };
        }
        if let Some(layers) = self.found.and_then(|id| state.layers(id)) {
            self.layers.extend(layers);
        }
    }

    fn heat(&mut self, seq: Seq, heat: &HeatFolded, after: &State) {
        for (layer, blocks) in &heat.dropped {
            if self.layers.contains(layer) && blocks.contains(&self.block) {
                self.dropped.push((seq, heat.node.clone()));
            }
        }
        for image in &heat.images {
            for layer in image.layers.iter().filter(|l| self.layers.contains(&l.layer)) {
                let record = layer
                    .blocks
                    .iter()
                    .map_while(Result::ok)
                    .find(|record| record.block >= self.block)
                    .filter(|record| record.block == self.block);
                let Some(record) = record else {
                    continue;
                };
                self.heat_total += 1;
                let evidence = HeatEvidence {
                    seq,
                    tick: after.tick(),
                    time: after.time(),
                    node: heat.node.clone(),
                    layer: layer.layer,
                    image: image.image,
                    reads: record.reads,
                    writes: record.writes,
                    bursts: record.bursts,
                    lost: image.omitted.lost,
                    score: after.block(&heat.node, layer.layer, self.block).1,
                };
                push(&mut self.heat, evidence, HEAT_KEPT_MAX);
            }
        }
    }

    fn command(&mut self, seq: Seq, command: &Command, after: &State) {
        let reason = &command.reason;
        if !reason.lost.is_empty() {
            let key = (reason.rule.clone(), command.node.clone(), command.tick);
            self.not_chosen = Some((key.0, key.1, key.2, reason.lost.clone()));
        }
        let in_layer = self.layers.contains(&command.order.layer());
        let named = match &command.order {
            Order::Promote { blocks, .. } => blocks
                .iter()
                .find(|p| p.block == self.block)
                .map(|p| (p.score, p.displaces, Some(p.heat_seq))),
            Order::Demote { blocks, .. } => blocks
                .iter()
                .find(|d| d.block == self.block)
                .map(|d| (d.score, None, None)),
            Order::Replicate { blocks, .. } => blocks
                .is_none_or(|extent| extent.overlaps(Extent::block(self.block)))
                .then_some((HeatScore(0), None, None)),
            Order::Drop { .. } => Some((HeatScore(0), None, None)),
        };
        let (to, from) = match &command.order {
            Order::Replicate { to, replaces, .. } => (Some(to.clone()), replaces.clone()),
            Order::Drop { from, .. } => (None, Some(from.clone())),
            Order::Promote { .. } | Order::Demote { .. } => (None, None),
        };
        if let Some((score, displaces, heat_seq)) = named.filter(|_| in_layer) {
            let evidence = DecisionEvidence {
                seq,
                tick: command.tick,
                time: after.time(),
                command: command.id,
                node: command.node.clone(),
                verb: command.order.verb().into(),
                layer: command.order.layer(),
                score,
                to,
                from,
                displaces,
                heat_seq,
                rule: command.reason.rule.clone(),
                policy_version: command.reason.policy_version,
                numbers: command.reason.numbers.clone(),
                rests_on: command.reason.rests_on.clone(),
                lost: match &self.not_chosen {
                    Some((rule, node, tick, lost))
                        if (rule, node, *tick) == (&reason.rule, &command.node, command.tick) =>
                    {
                        lost.clone()
                    }
                    _ => Vec::new(),
                },
                lost_nodes: command.reason.lost_nodes.clone(),
                result: None,
            };
            push(&mut self.decisions, evidence, DECISIONS_KEPT_MAX);
        }
        // What a demotion did not choose kept its place: no loss.
        let promotes = matches!(command.order, Order::Promote { .. });
        for lost in command.reason.lost.iter().filter(|_| promotes) {
            if lost.block == self.block && self.layers.contains(&lost.layer) {
                let evidence = LostEvidence {
                    seq,
                    command: command.id,
                    score: lost.score,
                    why: lost.why.clone(),
                };
                push(&mut self.lost, evidence, DECISIONS_KEPT_MAX);
            }
        }
    }

    fn result(&mut self, seq: Seq, id: CommandId, outcome: &Outcome) {
        let block = self.block;
        let Some(decision) = self.decisions.iter_mut().rev().find(|d| d.command == id) else {
            return;
        };
        let (how, why, took_us) = match outcome {
            // It has begun; the record says how it goes on.
            Outcome::Done { took_us, .. } if decision.to.is_some() || decision.from.is_some() => {
                ("done", String::new(), *took_us)
            }
            Outcome::Done {
                done, skipped, took_us, ..
            } => match skipped.iter().find(|(b, _)| *b == block) {
                Some((_, why)) => ("skipped", why.clone(), *took_us),
                None if done.contains(&block) => ("done", String::new(), *took_us),
                None => ("skipped", "not named in the answer".into(), *took_us),
            },
            Outcome::Refused { why } => ("refused", why.clone(), 0),
        };
        decision.result.get_or_insert(ResultEvidence {
            seq,
            how: how.into(),
            why,
            took_us,
        });
    }

    /// The answer, as of the last event folded into `state`.
    ///
    /// # Errors
    /// [`WhyError`] if the image or the block does not exist there.
    pub fn answer(&self, state: &State) -> Result<WhyReport, WhyError> {
        let facts = &state.data.facts;
        let asked = || match &self.image {
            WhyImage::Id(id) => id.to_string(),
            WhyImage::Name(name) => name.to_string(),
        };
        let id = self.found.ok_or_else(|| WhyError::NoImage(asked()))?;
        let image = facts
            .catalog
            .images
            .get(&id)
            .ok_or_else(|| WhyError::NoImage(asked()))?;
        if self.block.0 >= image.blocks() {
            return Err(WhyError::NoBlock {
                name: image.name.clone(),
                last: image.blocks().saturating_sub(1),
                block: self.block,
            });
        }
        let mut places = Vec::new();
        for (node, blocks) in &state.data.blocks {
            for layer in &image.layers {
                if let Some(cell) = blocks.cell(*layer, self.block) {
                    places.push(WherePlaced {
                        node: node.clone(),
                        layer: *layer,
                        place: place_word(cell.place).into(),
                        score: facts.clock.score(cell.weight),
                        heat_seq: cell.heat_seq,
                    });
                }
            }
        }
        let mut report = WhyReport {
            image: id,
            name: image.name.clone(),
            block: self.block,
            seq: facts.seq,
            tick: facts.tick,
            time: facts.time,
            verdict: String::new(),
            moves_paused_until: facts
                .moves
                .breakers
                .get(&id)
                .map(|breaker| breaker.until)
                .filter(|until| *until >= facts.tick),
            policy_version: facts.policy_version,
            threshold: facts.clock.score(facts.floor),
            places,
            heat: self.heat.iter().cloned().collect(),
            heat_total: self.heat_total,
            decisions: self.decisions.iter().cloned().collect(),
            lost: self.lost.iter().cloned().collect(),
            dropped: self.dropped.clone(),
            image_names: BTreeMap::new(),
            layer_names: BTreeMap::new(),
        };
        report.image_names = self.names.of_images(&report.images());
        report.layer_names = self.names.of_layers(&report.layers());
        report.verdict = verdict(&report, state);
        Ok(report)
    }
}

fn place_word(place: Place) -> &'static str {
    match place {
        Place::Out => "disk",
        Place::Arriving => "ordered_in",
        Place::Resident => "ram",
        Place::Leaving => "ordered_out",
        Place::Doubtful => "in_doubt",
        Place::Resting => "resting",
    }
}

/// One sentence: where the block is, and the nearest cause.
fn verdict(report: &WhyReport, state: &State) -> String {
    let threshold = report.threshold.bursts_text();
    let newest = report.decisions.iter().rev().find(|d| d.to.is_none());
    if let Some(place) = report
        .places
        .iter()
        .find(|p| p.place == "ram" || p.place == "ordered_out")
    {
        let promoted = report
            .decisions
            .iter()
            .rev()
            .find(|d| d.verb == "promote" && d.node == place.node && d.layer == place.layer);
        return match promoted {
            Some(d) => format!(
                "in RAM on {}: {} at seq {} with a score of {}",
                place.node,
                d.rule,
                d.seq,
                d.score.bursts_text()
            ),
            None => format!(
                "in RAM on {}, by a command before the part of the log that was read",
                place.node
            ),
        };
    }
    if let Some(place) = report.places.iter().find(|p| p.place == "ordered_in") {
        return format!("ordered into RAM on {}, no answer yet", place.node);
    }
    if let Some(place) = report.places.iter().find(|p| p.place == "in_doubt") {
        return format!("in doubt on {}: its last command expired without an answer", place.node);
    }
    if let Some(place) = report.places.iter().find(|p| p.place == "resting") {
        let cause = newest
            .and_then(|d| d.result.as_ref())
            .filter(|r| r.how != "done")
            .map_or("a write dropped its copy".into(), |r| {
                format!("the node {} it: {}", r.how, r.why)
            });
        return format!("on disk on {}, resting for some ticks: {cause}", place.node);
    }
    let Some(best) = report.places.iter().max_by_key(|p| p.score) else {
        return match report.heat_total {
            0 => "on disk: no heat event ever counted a read of it".into(),
            _ => format!("on disk: its heat has decayed to nothing (threshold {threshold} bursts)"),
        };
    };
    let score = best.score.bursts_text();
    if !state.policy().1.enabled {
        return format!("on disk with a score of {score}: the tier policy is switched off");
    }
    if best.heat_seq.0 == 0 {
        return format!("on disk with a score of {score}: every window that counted it lost samples");
    }
    if best.score < report.threshold {
        let before = newest.filter(|d| d.verb == "demote").map_or(String::new(), |d| {
            format!("; {} took it out of RAM at seq {}", d.rule, d.seq)
        });
        return format!("on disk with a score of {score}, under the threshold of {threshold} bursts{before}");
    }
    match report.lost.last() {
        Some(lost) => format!(
            "on disk with a score of {score}, over the threshold of {threshold}: it lost at seq {} ({})",
            lost.seq, lost.why
        ),
        None => format!(
            "on disk with a score of {score}, over the threshold of {threshold}: hotter blocks went first, or its layer \
             cannot be read there now"
        ),
    }
}
