//! A measurement as Markdown: what was run, where and when, then the tables. Printed, and kept in a file if asked.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

fn first_line(program: &str, words: &[&str]) -> Option<String> {
    let out = Command::new(program).args(words).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Some(text.lines().next()?.trim().to_owned()).filter(|_| out.status.success())
}

/// Commit, date, length and machine of a run, in one sentence.
pub fn circumstances(command: &str, took: Duration) -> String {
    let commit = first_line("git", &["describe", "--always", "--dirty", "--abbrev=12"]);
    let model = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let date = first_line("date", &["-u", "+%Y-%m-%d %H:%M UTC"]);
    let known = |text: Option<String>| text.unwrap_or_else(|| "unknown".into());
    format!(
        "`{command}`, commit {}, {}, in {:.0} s; {} cores of {}, Linux {}, load at the end {}.",
        known(commit),
        known(date),
        took.as_secs_f64(),
        std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        known(model),
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg").split(' ').next().unwrap_or_default(),
    )
}

/// Prints a report and writes it to `out`.
///
/// # Errors
/// The file that cannot be written.
pub fn publish(text: &str, out: Option<&Path>) -> Result<()> {
    print!("{text}");
    let Some(path) = out else { return Ok(()) };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// Values of one quantity over several rounds.
#[derive(Debug, Clone)]
pub struct Spread(Vec<f64>);

impl Spread {
    /// Of at least one value.
    pub fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    /// The target and whether the median reaches it, for behind the figures: ` (target ≥ 2: met)`.
    pub fn at_least(&self, target: f64) -> String {
        verdict("≥", target, self.median() >= target)
    }

    /// The same for a target that is not to be passed.
    pub fn at_most(&self, target: f64) -> String {
        verdict("≤", target, self.median() <= target)
    }
}

fn verdict(sign: &str, target: f64, met: bool) -> String {
    let word = if met { "met" } else { "missed" };
    format!(" (target {sign} {target}: {word})")
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let digits = if self.median() >= 100.0 { 0 } else { 2 };
        let (least, most) = (self.0[0], self.0[self.0.len() - 1]);
        write!(f, "{least:.digits$} / {:.digits$} / {most:.digits$}", self.median())
    }
}

/// A table that grows row by row.
pub struct Table(String);

impl Table {
    /// An empty one under a heading.
    pub fn new(heading: &str, columns: &[&str]) -> Self {
        let mut text = format!("\n## {heading}\n\n| {} |\n|", columns.join(" | "));
        for _ in columns {
            text.push_str("---|");
        }
        text.push('\n');
        Self(text)
    }

    /// Adds a row.
    pub fn row(&mut self, cells: &[String]) {
        let _ = writeln!(self.0, "| {} |", cells.join(" | "));
    }

    /// Adds a line below the rows.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.0, "\n{text}");
    }

    /// The Markdown.
    pub fn finish(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_least_median_most() {
        assert_eq!(Spread::new(vec![3.0, 1.0, 2.0]).to_string(), "1.00 / 2.00 / 3.00");
        assert_eq!(Spread::new(vec![300.4, 100.0, 200.0]).to_string(), "100 / 200 / 300");
    }

    #[test]
    fn the_median_decides() {
        let spread = Spread::new(vec![1.0, 2.0, 9.0]);
        assert_eq!(spread.at_least(2.0), " (target ≥ 2: met)");
        assert_eq!(spread.at_least(2.5), " (target ≥ 2.5: missed)");
        assert_eq!(spread.at_most(1.5), " (target ≤ 1.5: missed)");
    }
}
