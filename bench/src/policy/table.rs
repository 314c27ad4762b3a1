//! The table as Markdown.

use std::fmt::Write;
use std::process::Command;
use std::time::Duration;

use super::trace::Trace;
use super::{Outcome, Policy, SIZES_PERCENT, seconds};

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

fn first_line(program: &str, words: &[&str]) -> Option<String> {
    let out = Command::new(program)
        .args(words)
        .output()
        .ok()
        .filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&out.stdout).lines().next()?.trim().to_owned())
}

/// Puts the head before the sections: what was run, where, when.
pub fn whole(sections: &str, took: Duration) -> String {
    let commit = first_line("git", &["describe", "--always", "--dirty", "--abbrev=12"]);
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let date = first_line("date", &["-u", "+%Y-%m-%d %H:%M UTC"]);
    let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
    format!(
        "# Decision quality\n\n`cargo xtask bench policy`, commit {}, {}, in {}; {} cores of {}, Linux {}.\n{sections}",
        known(commit),
        known(date),
        seconds(took),
        std::thread::available_parallelism().map_or(1, |n| n.get()),
        known(model),
        kernel.trim(),
    )
}
