//! The table as Markdown.

use std::fmt::Write;
use std::time::Duration;

use super::trace::Trace;
use super::{Outcome, Policy, SIZES_PERCENT};
use crate::report;

/// One trace at one block size.
pub fn section(text: &mut String, trace: &Trace, rows: &[(Policy, Vec<Outcome>)]) {
    let _ = writeln!(
        text,
        "\n## {}, {} KiB blocks\n\n{} requests, {} block reads, footprint {} blocks. Block reads found in RAM, in %.\n",
        trace.name,
        (1u64 << trace.block_log) >> 10,
        trace.requests.len(),
        trace.reads,
        trace.blocks
    );
    let _ = write!(text, "| RAM in % of the footprint |");
    for percent in SIZES_PERCENT {
        let _ = write!(text, " {percent} |");
    }
    let _ = writeln!(text, "\n|---|{}", "---:|".repeat(SIZES_PERCENT.len()));
    for (policy, outcomes) in rows {
        let _ = write!(text, "| {} |", policy.name());
        for outcome in outcomes {
            let _ = write!(text, " {:.1} |", outcome.percent());
        }
        text.push('\n');
    }
    if let Some((_, without)) = rows.iter().find(|(p, _)| *p == (Policy::Hearth { ahead: false })) {
        text.push_str("| Hearth without prefetch, as its shadows predict it |");
        for outcome in without {
            let _ = write!(text, " {:.1} |", outcome.predicted_percent());
        }
        text.push('\n');
    }
    reads_below(text, rows);
}

/// Reads below of the production code, with prefetch beside without.
fn reads_below(text: &mut String, rows: &[(Policy, Vec<Outcome>)]) {
    let of = |ahead| rows.iter().find(|(policy, _)| *policy == Policy::Hearth { ahead });
    let (Some((_, with)), Some((_, without))) = (of(true), of(false)) else {
        return;
    };
    let _ = write!(text, "| Hearth: blocks read below, × those without prefetch |");
    for (with, without) in with.iter().zip(without) {
        let _ = write!(text, " {:.2} |", below_ratio(with, without));
    }
    text.push('\n');
}

/// Blocks read below with prefetch in those without.
pub fn below_ratio(with: &Outcome, without: &Outcome) -> f64 {
    let of = |outcome: &Outcome| outcome.played.map_or(0, |p| p.backing);
    of(with) as f64 / of(without).max(1) as f64
}

/// Puts the head before the sections: what was run, where, when.
pub fn whole(targets: &str, sections: &str, took: Duration) -> String {
    let circumstances = report::circumstances("cargo xtask bench policy", took);
    format!("# Decision quality\n\n{circumstances}\n{NOTES}{targets}{sections}")
}

const NOTES: &str = "
Hearth is the production code: the node's RAM tier with its shadows and prefetchers, and the scheduler's fold and
decisions once a second of the trace's time; a read ahead arrives 5 ms late. The peers let in what is written, which
costs them no read: that is how the published figures were counted. Hearth does not; a write is only remembered.

Node work is measured in a run of its own, on one thread: every call that the read and write paths make to the tier and
the prefetchers, with shadows, evictions and the bookkeeping of fills, but no scheduler, and reads ahead are granted
but not done. Copying the same units into memory of the same size is measured beside it and taken off. The scheduler's
time is that of a scheduler which is given all that it heard in one run, one piece after the other, and nothing else.
Both are the middle of five runs, with the least and the most.
";
