//! The numbers of one demo run, and the one line of JSON that they end in. Nothing here is a constant that could be
//! taken for a measurement: what was set says so in its name.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Block reads of some images, as the node daemons counted them into the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reads {
    /// Answered from RAM.
    pub hits: u64,
    /// Not.
    pub misses: u64,
}

impl Reads {
    /// Sums the heat events among `lines` of the log, for the images with these ids.
    pub fn of(lines: &[Value], images: &BTreeSet<String>) -> Self {
        let mut sum = Self::default();
        for line in lines.iter().filter(|line| line["kind"] == "heat_folded") {
            for image in line["event"]["images"].as_array().into_iter().flatten() {
                if image["image"].as_str().is_some_and(|id| images.contains(id)) {
                    sum.hits += image["ram_hits"].as_u64().unwrap_or(0);
                    sum.misses += image["ram_misses"].as_u64().unwrap_or(0);
                }
            }
        }
        sum
    }

    /// Share answered from RAM, 0 to 1.
    ///
    /// # Errors
    /// There were no reads: a ratio of nothing is no result.
    pub fn hit_ratio(&self) -> Result<f64> {
        let all = self.hits + self.misses;
        ensure!(all > 0, "no block read of the guests is in the log for this phase");
        Ok(self.hits as f64 / all as f64)
    }
}

/// What the guests measured over a phase.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Latency {
    /// Median of a read, microseconds.
    pub p50_us: f64,
    /// 99th percentile of a read, microseconds.
    pub p99_us: f64,
    /// 4 KiB reads of all guests.
    pub reads: u64,
    /// 4 KiB writes of all guests.
    pub writes: u64,
}

/// One measured phase.
#[derive(Debug, Clone, Copy)]
pub struct Phase {
    /// From the log.
    pub reads: Reads,
    /// From the guests.
    pub latency: Latency,
    /// Reads that reached the throttled disk, where they can be counted.
    pub device_reads: Option<u64>,
}

/// Everything that the last line says.
#[derive(Debug)]
pub struct Figures {
    /// `hearth status` at the end.
    pub view: Value,
    /// Guests whose workload ran.
    pub guests_booted: usize,
    /// `kvm` or `tcg`.
    pub accelerator: &'static str,
    /// How images reached the guests: `device` or `socket`.
    pub export: &'static str,
    /// Scheduler off.
    pub before: Phase,
    /// Scheduler on.
    pub after: Phase,
    /// RAM tiers of the nodes with guests, bytes in all.
    pub ram_tier_bytes_set: u64,
    /// What the guests touch, bytes in all.
    pub guests_touch_bytes: u64,
    /// Guests that migrated, and an image that lost a replica.
    pub moves: Value,
    /// The disk's limit, if it could be set.
    pub disk_read_iops_set: Option<u64>,
    /// Events in the log.
    pub events_logged: u64,
    /// Whether chain, contiguity and every decision were derived again.
    pub log_verified: bool,
    /// Whether a replay from nothing came to every digest that the leader recorded.
    pub replay_same: bool,
    /// Seconds from start to end.
    pub wall_s: f64,
}

impl Figures {
    /// The last line.
    ///
    /// # Errors
    /// The cluster's view lacks a number, or a phase had no reads.
    pub fn line(&self) -> Result<Value> {
        let nodes = self.view["nodes"].as_array().context("the view lists no nodes")?;
        let sum = |key: &str| -> Result<u64> {
            nodes
                .iter()
                .map(|node| node[key].as_u64().with_context(|| format!("a node's view lacks {key}")))
                .sum()
        };
        let sources: BTreeSet<_> = nodes.iter().filter_map(|node| node["heat_source"].as_str()).collect();
        let total = |key: &str| -> Result<u64> {
            self.view["totals"][key]
                .as_u64()
                .with_context(|| format!("the view's totals lack {key}"))
        };
        Ok(json!({
            "heat_source": sources.into_iter().collect::<Vec<_>>().join("+"),
            "guests_booted": self.guests_booted,
            "accelerator": self.accelerator,
            "export": self.export,
            "probe_events": sum("probe_events_total")?,
            "probe_lost": sum("probe_lost_total")?,
            "blocks_promoted": total("blocks_promoted")?,
            "blocks_demoted": total("blocks_demoted")?,
            "read_hit_ratio_before": rounded(self.before.reads.hit_ratio()?),
            "read_hit_ratio_after": rounded(self.after.reads.hit_ratio()?),
            "guest_read_p50_us_before": self.before.latency.p50_us,
            "guest_read_p50_us_after": self.after.latency.p50_us,
            "guest_read_p99_us_before": self.before.latency.p99_us,
            "guest_read_p99_us_after": self.after.latency.p99_us,
            "guest_reads_before": self.before.latency.reads,
            "guest_reads_after": self.after.latency.reads,
            "device_reads_before": self.before.device_reads,
            "device_reads_after": self.after.device_reads,
            "ram_tier_bytes_set": self.ram_tier_bytes_set,
            "guests_touch_bytes": self.guests_touch_bytes,
            "moves": self.moves,
            "disk_read_iops_set": self.disk_read_iops_set,
            "events_logged": self.events_logged,
            "log_verified": self.log_verified,
            "replay_same": self.replay_same,
            "wall_s": rounded(self.wall_s),
        }))
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1_000.0).round() / 1_000.0
}

/// Bytes of the blocks that these images' guests touched, by the heat events among `lines` of the log. A block that
/// two guests touch counts twice: each node keeps its own.
pub fn touched_bytes(lines: &[Value], images: &BTreeSet<String>, block_bytes: u64) -> u64 {
    let mut touched = BTreeSet::new();
    for line in lines.iter().filter(|line| line["kind"] == "heat_folded") {
        for image in line["event"]["images"].as_array().into_iter().flatten() {
            let Some(id) = image["image"].as_str().filter(|id| images.contains(*id)) else {
                continue;
            };
            for layer in image["layers"].as_array().into_iter().flatten() {
                let blocks = layer["blocks"].as_array().into_iter().flatten();
                touched.extend(blocks.filter_map(|heat| Some((id, heat["block"].as_u64()?))));
            }
        }
    }
    touched.len() as u64 * block_bytes
}

/// The block that a command in a line of the log promotes first.
pub fn first_promoted(line: &Value) -> Option<u64> {
    line["event"]["order"]["Promote"]["blocks"][0]["block"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_are_summed_over_the_images_asked_for() {
        let heat = |image: &str, hits: u64, misses: u64| {
            json!({ "seq": 7, "kind": "heat_folded", "event": { "images": [
                { "image": image, "ram_hits": hits, "ram_misses": misses },
            ] } })
        };
        let lines = [
            heat("a", 3, 1),
            json!({ "kind": "ticked", "event": {} }),
            heat("b", 5, 5),
            heat("c", 100, 0),
        ];
        let images = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let reads = Reads::of(&lines, &images);
        assert_eq!(reads, Reads { hits: 8, misses: 6 });
        assert!((reads.hit_ratio().unwrap() - 8.0 / 14.0).abs() < 1e-9);
        assert!(Reads::default().hit_ratio().is_err());
    }

    #[test]
    fn a_touched_block_counts_once_per_image() {
        let heat = |image: &str, blocks: &[u64]| {
            let blocks: Vec<_> = blocks
                .iter()
                .map(|block| json!({ "block": block, "reads": 1 }))
                .collect();
            json!({ "kind": "heat_folded", "event": { "images": [{ "image": image, "layers": [{ "blocks": blocks }] }] } })
        };
        let lines = [heat("a", &[1, 2]), heat("a", &[2, 3]), heat("b", &[1]), heat("c", &[9])];
        let images = BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        assert_eq!(touched_bytes(&lines, &images, 10), 40);
    }
}
