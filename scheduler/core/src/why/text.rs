//! An explanation as text, with names where the log has them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use hearth_protocol::{HeatScore, ImageId, LayerId, Seq};

use super::{DecisionEvidence, WhyReport};

impl WhyReport {
    /// The images that the report speaks of.
    pub(super) fn images(&self) -> BTreeSet<ImageId> {
        self.heat.iter().map(|heat| heat.image).chain([self.image]).collect()
    }

    /// The layers that the report speaks of.
    pub(super) fn layers(&self) -> BTreeSet<LayerId> {
        let decided = self.decisions.iter().flat_map(|decision| {
            let victim = decision.displaces.map(|victim| victim.layer);
            let lost = decision.lost.iter().map(|lost| lost.layer);
            lost.chain(victim).chain([decision.layer])
        });
        let placed = self.places.iter().map(|place| place.layer);
        let heat = self.heat.iter().map(|heat| heat.layer);
        decided.chain(placed).chain(heat).collect()
    }

    fn image_name(&self, id: ImageId) -> String {
        self.image_names.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    fn layer_name(&self, id: LayerId) -> String {
        self.layer_names.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }

    fn decision_text(&self, decision: &DecisionEvidence) -> String {
        let numbers: Vec<String> = decision
            .numbers
            .iter()
            .map(|(name, value)| number_text(name, *value))
            .collect();
        let mut text = format!(
            "rule     {} of policy version {}: {}\n",
            decision.rule,
            decision.policy_version,
            numbers.join(", ")
        );
        let seqs: Vec<String> = decision.rests_on.iter().map(Seq::to_string).collect();
        if !seqs.is_empty() {
            text += &format!("rests on seq {}\n", seqs.join(", "));
        }
        text += &format!(
            "command  seq {} {} {} on {} at tick {}, ",
            decision.seq, decision.verb, decision.command, decision.node, decision.tick
        );
        text += &match (&decision.to, &decision.from) {
            (None, None) => format!("score {}", decision.score.bursts_text()),
            (Some(to), None) => format!("a replica for {to}"),
            (Some(to), Some(from)) => format!("a replica for {to}, which is to replace the one on {from}"),
            (None, Some(from)) => format!("the replica on {from} goes"),
        };
        if let Some(victim) = &decision.displaces {
            text += &format!(
                ", in place of block {} of layer {} with score {}",
                victim.block,
                self.layer_name(victim.layer),
                victim.score.bursts_text()
            );
        }
        text.push('\n');
        for lost in &decision.lost {
            text += &format!(
                "  instead of block {} of layer {}, score {}: {}\n",
                lost.block,
                self.layer_name(lost.layer),
                lost.score.bursts_text(),
                lost.why
            );
        }
        for lost in &decision.lost_nodes {
            text += &format!("  instead of node {}: {}\n", lost.node, lost.why);
        }
        text
    }
}

impl fmt::Display for WhyReport {
    /// The whole chain as text, one line per event, in the order of the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} block {} at seq {}, tick {}",
            self.name, self.block, self.seq, self.tick
        )?;
        writeln!(f, "{}", self.verdict)?;
        if let Some(until) = self.moves_paused_until {
            writeln!(
                f,
                "paused   no automatic moves of its replicas until tick {until}: one was ordered back to a node that it had \
                 been moved off"
            )?;
        }
        for place in &self.places {
            writeln!(
                f,
                "place    {} on {}, layer {}, score {}",
                place.place,
                place.node,
                self.layer_name(place.layer),
                place.score.bursts_text()
            )?;
        }
        let hidden = self.heat_total - self.heat.len() as u64;
        if hidden > 0 {
            writeln!(f, "heat     {hidden} older events not shown")?;
        }
        let mut lines: BTreeMap<(Seq, u8), String> = BTreeMap::new();
        for heat in &self.heat {
            let sibling = if heat.image == self.image {
                String::new()
            } else {
                format!(" by image {}", self.image_name(heat.image))
            };
            let lost = if heat.lost == 0 {
                String::new()
            } else {
                format!(", window lost {} samples", heat.lost)
            };
            let line = format!(
                "heat     seq {} on {}: {} reads, {} writes in {} bursts{sibling}{lost}, score {}\n",
                heat.seq,
                heat.node,
                heat.reads,
                heat.writes,
                heat.bursts,
                heat.score.bursts_text()
            );
            lines.entry((heat.seq, 0)).or_default().push_str(&line);
        }
        for (seq, node) in &self.dropped {
            let line = format!("dropped  seq {seq} on {node}: a write made the copy in RAM stale\n");
            lines.entry((*seq, 1)).or_default().push_str(&line);
        }
        for lost in &self.lost {
            let line = format!(
                "lost     seq {}: {}, score {}, to promote {}\n",
                lost.seq,
                lost.why,
                lost.score.bursts_text(),
                lost.command
            );
            lines.entry((lost.seq, 2)).or_default().push_str(&line);
        }
        for decision in &self.decisions {
            lines
                .entry((decision.seq, 3))
                .or_default()
                .push_str(&self.decision_text(decision));
            if let Some(result) = &decision.result {
                let why = if result.why.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", result.why)
                };
                let line = format!(
                    "result   seq {}: {}{why}, the command took {} us\n",
                    result.seq, result.how, result.took_us
                );
                lines.entry((result.seq, 4)).or_default().push_str(&line);
            }
        }
        lines.values().try_for_each(|line| f.write_str(line))
    }
}

/// One number of a reason for people: scores are fixed point.
pub fn number_text(name: &str, value: u64) -> String {
    if name.ends_with("_score") {
        format!("{name} {}", HeatScore(value).bursts_text())
    } else {
        format!("{name} {value}")
    }
}
