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
}

/// Puts the head before the sections: what was run, where, when.
pub fn whole(sections: &str, took: Duration) -> String {
    let circumstances = report::circumstances("cargo xtask bench policy", took);
    format!("# Decision quality\n\n{circumstances}\n{sections}")
}
