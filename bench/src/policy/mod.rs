//! Hit ratios over recorded block traces: the RAM tier beside the policies it is compared with.
//!
//! As POLICY.md counts them: of all block reads (a request touches one or more blocks) the share that finds its block
//! in RAM, for RAM of a few percent of the trace's footprint. The peers let in what was written as well as what was
//! read, because that is what the published figures were counted with.

mod list;
mod peers;
mod table;
mod trace;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::report;
use peers::Cache;
use trace::Trace;

/// RAM in percent of the footprint.
const SIZES_PERCENT: [usize; 4] = [1, 5, 10, 20];

/// Logarithms of the block sizes: 64 KiB and 4 KiB.
const BLOCK_LOGS: [u32; 2] = [16, 12];

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Folder of `.vbt.zst` traces
    #[arg(long, env = "HEARTH_TRACES", default_value = "../shared/traces")]
    traces: PathBuf,
    /// Only traces whose names contain this
    #[arg(long)]
    only: Option<String>,
    /// File to write the table to, besides standard output
    #[arg(long)]
    out: Option<PathBuf>,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Lru,
    Arc,
    S3Fifo,
    WTinyLfu,
    Lirs,
    Belady,
}

const POLICIES: [Policy; 6] = [
    Policy::Lru,
    Policy::Arc,
    Policy::S3Fifo,
    Policy::WTinyLfu,
    Policy::Lirs,
    Policy::Belady,
];

impl Policy {
    fn name(self) -> &'static str {
        match self {
            Policy::Lru => "LRU",
            Policy::Arc => "ARC",
            Policy::S3Fifo => "S3-FIFO",
            Policy::WTinyLfu => "W-TinyLFU",
            Policy::Lirs => "LIRS",
            Policy::Belady => "Belady, demand",
        }
    }
}

/// What one policy did with one trace at one size.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    hits: u64,
    reads: u64,
}

impl Outcome {
    fn percent(&self) -> f64 {
        100.0 * self.hits as f64 / self.reads.max(1) as f64
    }
}

/// Blocks that RAM holds.
fn room(trace: &Trace, percent: usize) -> usize {
    (trace.blocks * percent / 100).max(4)
}

fn peer(trace: &Trace, room: usize, policy: Policy) -> Outcome {
    let blocks = trace.blocks;
    let mut cache: Box<dyn Cache> = match policy {
        Policy::Lru => Box::new(peers::Lru::new(room, blocks)),
        Policy::Arc => Box::new(peers::Arc::new(room, blocks)),
        Policy::S3Fifo => Box::new(peers::S3Fifo::new(room, blocks)),
        Policy::WTinyLfu => Box::new(peers::WTinyLfu::new(room, blocks)),
        Policy::Lirs => Box::new(peers::Lirs::new(room, blocks)),
        Policy::Belady => Box::new(peers::Belady::new(room, blocks, trace.accesses.iter().map(|a| a.0))),
    };
    let mut hits = 0;
    for (block, read) in &trace.accesses {
        hits += u64::from(cache.access(*block) && *read);
    }
    Outcome {
        hits,
        reads: trace.reads,
    }
}

/// The traces of a folder, by name.
fn traces(options: &Options) -> Result<Vec<(String, PathBuf)>> {
    let dir = &options.traces;
    let entries = std::fs::read_dir(dir).with_context(|| {
        format!(
            "no traces: cannot list {}; name their folder with --traces or HEARTH_TRACES",
            dir.display()
        )
    })?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(name) = name.strip_suffix(".vbt.zst")
            && options.only.as_ref().is_none_or(|only| name.contains(only))
        {
            found.push((name.to_owned(), path));
        }
    }
    ensure!(
        !found.is_empty(),
        "no traces: {} holds no .vbt.zst file that is asked for; name another folder with --traces or HEARTH_TRACES",
        dir.display()
    );
    found.sort();
    Ok(found)
}

/// Runs everything and prints the table.
///
/// # Errors
/// The traces cannot be read, or the table cannot be written.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let mut text = String::new();
    for (name, path) in traces(options)? {
        let requests = Trace::read(&path)?;
        for log in BLOCK_LOGS {
            let trace = Trace::new(&name, &requests, log);
            eprintln!("{name}, {} KiB blocks", (1 << log) >> 10);
            let rows = rows(&trace);
            table::section(&mut text, &trace, &rows);
        }
    }
    let text = table::whole(&text, started.elapsed());
    report::publish(&text, options.out.as_deref())
}

/// All policies at all sizes, in parallel; a row per policy with an outcome per size.
fn rows(trace: &Trace) -> Vec<(Policy, Vec<Outcome>)> {
    let cells: Vec<_> = POLICIES
        .iter()
        .flat_map(|policy| SIZES_PERCENT.map(|percent| (*policy, percent)))
        .collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(vec![None; cells.len()]);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((policy, percent)) = cells.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
                    let outcome = peer(trace, room(trace, percent), policy);
                    let at = cells.iter().position(|c| *c == (policy, percent));
                    done.lock().expect("results lock")[at.expect("a cell of the list")] = Some(outcome);
                }
            });
        }
    });
    let mut outcomes = done.into_inner().expect("results lock").into_iter();
    POLICIES
        .iter()
        .map(|policy| {
            let row = outcomes.by_ref().take(SIZES_PERCENT.len());
            (*policy, row.map(|o| o.expect("every cell was run")).collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays numbered blocks and returns the hits as a string of `x` and `.`.
    fn check(mut cache: impl Cache, accesses: &[u32], expect: &str) {
        let got: String = accesses
            .iter()
            .map(|b| if cache.access(*b) { 'x' } else { '.' })
            .collect();
        assert_eq!(got, expect);
    }

    const LOOP: [u32; 9] = [0, 1, 2, 0, 1, 2, 0, 1, 2];

    /// A loop of three blocks over two: LRU never hits; Belady keeps one block each round.
    #[test]
    fn peers_do_what_was_worked_out_by_hand() {
        check(peers::Lru::new(2, 3), &LOOP, ".........");
        check(peers::Lru::new(2, 3), &[0, 1, 0, 2, 0, 1], "..x.x.");
        check(peers::Belady::new(2, 3, LOOP.into_iter()), &LOOP, "...x.x.x.");
        // Block 0 was used twice and is in T2: the one-touch blocks push each other out of T1 only.
        check(peers::Arc::new(3, 8), &[0, 0, 1, 2, 3, 4, 0], ".x....x");
        // Four one-touch blocks leave over the small queue; 0 returns from the ghost queue into the main one and
        // stays through four more.
        check(
            peers::S3Fifo::new(4, 16),
            &[0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 0],
            "..........x",
        );
        // 0 and 1 are frequent: what passes the window once does not displace them.
        check(
            peers::WTinyLfu::new(3, 16),
            &[0, 0, 1, 1, 0, 1, 2, 3, 4, 5, 0, 1],
            ".x.xxx....xx",
        );
        // 0 to 2 fill the LIR blocks; a scan goes through the two HIR places.
        check(
            peers::Lirs::new(5, 16),
            &[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2],
            "........xxx",
        );
    }
}
