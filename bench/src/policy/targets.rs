//! Whether the targets of POLICY.md are met, line by line.

use std::fmt::Write;

use super::table::below_ratio;
use super::trace::Trace;
use super::work::{Spread, Work};
use super::{Outcome, Policy, Row, SIZES_PERCENT};

/// Least hit ratios at 64 KiB and 10 % of RAM: what the trace's name contains, without and with prefetch.
const HIT_PERCENT: [(&str, f64, f64); 3] = [
    ("cloudphysics", 62.0, 85.0),
    ("host_pg_web_boot", 53.0, 77.0),
    ("arc_P", 77.5, 83.0),
];

/// How far under LRU any cell may lie, in points.
const UNDER_LRU_MAX: f64 = 0.5;

/// Most bytes of bookkeeping for a resident block.
const RESIDENT_BYTES_MAX: u64 = 40;

/// Most time of the scheduler for a reported block, nanoseconds.
const SCHEDULER_NS_MAX: f64 = 1_000.0;

/// Most time of the node for an access, nanoseconds.
const NODE_NS_MAX: f64 = 200.0;

/// Most points between the hit ratio that the shadows predict and the one achieved.
const PREDICTED_OFF_MAX: f64 = 2.0;

/// Verdicts so far.
#[derive(Default)]
pub struct Targets {
    lines: Vec<(String, f64, String, bool)>,
}

fn row(rows: &[Row], policy: Policy) -> &[Outcome] {
    let found = rows.iter().find(|(p, _)| *p == policy);
    found.map_or(&[], |(_, outcomes)| outcomes)
}

impl Targets {
    fn add(&mut self, what: String, got: f64, limit: f64, at_least: bool) {
        let met = if at_least { got >= limit } else { got <= limit };
        let sign = if at_least { "≥" } else { "≤" };
        self.lines.push((what, got, format!("{sign} {limit}"), met));
    }

    /// Judges one trace at one block size.
    pub fn look(&mut self, trace: &Trace, rows: &[Row], work: Work) {
        let lru = row(rows, Policy::Lru);
        let without = row(rows, Policy::Hearth { ahead: false });
        let with = row(rows, Policy::Hearth { ahead: true });
        let of = format!("{}, {} KiB", trace.name, (1u64 << trace.block_log) >> 10);
        if let Some((_, demand, ahead)) = HIT_PERCENT.iter().find(|(name, ..)| trace.name.contains(name))
            && trace.block_log == 16
        {
            self.add(
                format!("{of}, 10 %: hit ratio without prefetch"),
                without[2].percent(),
                *demand,
                true,
            );
            self.add(
                format!("{of}, 10 %: hit ratio with prefetch"),
                with[2].percent(),
                *ahead,
                true,
            );
        }
        for (name, ours) in [("without prefetch", without), ("with prefetch", with)] {
            let over = ours.iter().zip(lru).map(|(a, b)| a.percent() - b.percent());
            let least = over.zip(SIZES_PERCENT).min_by(|a, b| a.0.total_cmp(&b.0));
            if let Some((over, size)) = least {
                self.add(
                    format!("{of}: points over LRU {name}, least of all sizes ({size} %)"),
                    over,
                    -UNDER_LRU_MAX,
                    true,
                );
            }
        }
        let below_max = if trace.name.contains("cloudphysics") { 1.15 } else { 1.3 };
        let ratios = with.iter().zip(without).map(|(a, b)| below_ratio(a, b));
        let most = ratios.zip(SIZES_PERCENT).max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((ratio, size)) = most {
            self.add(
                format!("{of}: blocks read below, × without prefetch, most of all sizes ({size} %)"),
                ratio,
                below_max,
                false,
            );
        }
        let off = without.iter().map(|o| (o.predicted_percent() - o.percent()).abs());
        let most = off.zip(SIZES_PERCENT).max_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((off, size)) = most {
            self.add(
                format!("{of}: points between predicted and achieved, most of all sizes ({size} %)"),
                off,
                PREDICTED_OFF_MAX,
                false,
            );
        }
        // Copies of larger blocks take longer than the work, and vary by more.
        if trace.block_log == 12 {
            let Spread { least, middle, most } = work.node;
            let what = format!(
                "{of}, 10 %: node, ns of work per access ({least:.0} to {most:.0}; copying: {:.0} ns more)",
                work.copying.middle
            );
            self.add(what, middle, NODE_NS_MAX, false);
        }
        let Spread { least, middle, most } = work.scheduler;
        let what = format!("{of}, 10 %: scheduler, ns per reported block ({least:.0} to {most:.0})");
        self.add(what, middle, SCHEDULER_NS_MAX, false);
        if let Some(played) = with[2].played {
            let bytes = played.resident_bytes as f64;
            self.add(
                format!("{of}, 10 %: bytes of bookkeeping per resident block"),
                bytes,
                RESIDENT_BYTES_MAX as f64,
                false,
            );
        }
    }

    /// The verdicts as Markdown.
    pub fn text(&self) -> String {
        let mut text = String::from("\n## Targets\n\n| | measured | target | |\n|---|---:|---:|---|\n");
        for (what, got, limit, met) in &self.lines {
            let verdict = if *met { "met" } else { "**missed**" };
            let _ = writeln!(text, "| {what} | {got:.2} | {limit} | {verdict} |");
        }
        text
    }
}
