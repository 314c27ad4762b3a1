//! Hit ratios over recorded block traces: the RAM tier beside the policies it is compared with.
//!
//! As POLICY.md counts them: of all block reads (a request touches one or more blocks) the share that finds its block
//! in RAM, for RAM of a few percent of the trace's footprint. The peers let in what was written as well as what was
//! read, because that is what the published figures were counted with.

mod hearth;
mod list;
mod peers;
mod scheduler;
mod table;
mod targets;
mod trace;
mod work;

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::report;
use hearth::Played;
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
    /// The production code without prefetch, and with it.
    Hearth {
        ahead: bool,
    },
}

const POLICIES: [Policy; 8] = [
    Policy::Hearth { ahead: true },
    Policy::Hearth { ahead: false },
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
            Policy::Hearth { ahead: false } => "Hearth without prefetch",
            Policy::Hearth { ahead: true } => "**Hearth**",
        }
    }
}

/// A policy and what it did at each size.
type Row = (Policy, Vec<Outcome>);

/// What one policy did with one trace at one size.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    hits: u64,
    reads: u64,
    /// What else is known of a run of the production code.
    played: Option<Played>,
}

impl Outcome {
    fn percent(&self) -> f64 {
        100.0 * self.hits as f64 / self.reads.max(1) as f64
    }

    /// What the shadows said of it, in percent.
    fn predicted_percent(&self) -> f64 {
        let (reads, hits) = self.played.map_or((0, 0), |p| p.predicted);
        100.0 * hits as f64 / reads.max(1) as f64
    }
}

/// Blocks that RAM holds.
fn room(trace: &Trace, percent: usize) -> usize {
    (trace.blocks * percent / 100).max(4)
}

fn run_one(trace: &Trace, room: usize, policy: Policy) -> Result<Outcome> {
    let blocks = trace.blocks;
    let mut cache: Box<dyn Cache> = match policy {
        Policy::Lru => Box::new(peers::Lru::new(room, blocks)),
        Policy::Arc => Box::new(peers::Arc::new(room, blocks)),
        Policy::S3Fifo => Box::new(peers::S3Fifo::new(room, blocks)),
        Policy::WTinyLfu => Box::new(peers::WTinyLfu::new(room, blocks)),
        Policy::Lirs => Box::new(peers::Lirs::new(room, blocks)),
        Policy::Belady => Box::new(peers::Belady::new(room, blocks, trace.accesses.iter().map(|a| a.0))),
        Policy::Hearth { ahead } => {
            let played = hearth::play(trace, room, ahead, |_| ())?;
            return Ok(Outcome {
                hits: played.hits,
                reads: trace.reads,
                played: Some(played),
            });
        }
    };
    let mut hits = 0;
    for (block, read) in &trace.accesses {
        hits += u64::from(cache.access(*block) && *read);
    }
    Ok(Outcome {
        hits,
        reads: trace.reads,
        played: None,
    })
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
    let mut targets = targets::Targets::default();
    for (name, path) in traces(options)? {
        let requests = Trace::read(&path)?;
        for log in BLOCK_LOGS {
            let trace = Trace::new(&name, &requests, log);
            eprintln!("{name}, {} KiB blocks", (1 << log) >> 10);
            let rows = rows(&trace)?;
            let work = work::measure(&trace, room(&trace, SIZES_PERCENT[2]))?;
            table::section(&mut text, &trace, &rows);
            targets.look(&trace, &rows, work);
        }
    }
    let text = table::whole(&targets.text(), &text, started.elapsed());
    report::publish(&text, options.out.as_deref())
}

/// All policies at all sizes, in parallel; a row per policy with an outcome per size.
fn rows(trace: &Trace) -> Result<Vec<Row>> {
    let cells: Vec<_> = POLICIES
        .iter()
        .flat_map(|policy| SIZES_PERCENT.map(|percent| (*policy, percent)))
        .collect();
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<Option<Result<Outcome>>>> = Mutex::new(cells.iter().map(|_| None).collect());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((policy, percent)) = cells.get(at).copied() else {
                        return;
                    };
                    let outcome = run_one(trace, room(trace, percent), policy);
                    done.lock().expect("results lock")[at] = Some(outcome);
                }
            });
        }
    });
    let mut outcomes = done.into_inner().expect("results lock").into_iter();
    POLICIES
        .iter()
        .map(|policy| {
            let row = outcomes.by_ref().take(SIZES_PERCENT.len());
            let row: Result<_> = row.map(|o| o.expect("every cell was run")).collect();
            Ok((*policy, row?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use hearth_probes::source::Op;
    use hearth_probes::trace::TraceRequest;

    use super::*;

    /// Plays numbered blocks and returns the hits as a string of `x` and `.`.
    fn check(mut cache: impl Cache, accesses: &[u32], expect: &str) {
        let got: String = accesses
            .iter()
            .map(|b| if cache.access(*b) { 'x' } else { '.' })
            .collect();
        assert_eq!(got, expect);
    }

    /// Reads of 64 KiB blocks, one a tenth of a second.
    fn trace(blocks: impl Iterator<Item = u64>) -> Trace {
        let requests: Vec<_> = blocks
            .enumerate()
            .map(|(i, block)| TraceRequest {
                time_us: i as u64 * 100_000,
                offset: block << 16,
                length: 1 << 16,
                volume: 0,
                op: Op::Read,
            })
            .collect();
        Trace::new("made", &requests, 16)
    }

    /// What fits is read below once; a scan that never returns is read ahead, once enough was missed to
    /// risk it, and each block is read once.
    #[test]
    fn the_production_code_does_what_was_worked_out_by_hand() {
        let fits = trace((0..500).map(|i| i * 7 % 50 * 3));
        let played = hearth::play(&fits, 60, false, |_| ()).unwrap();
        assert_eq!((played.hits, played.backing), (450, 50));
        let scan = trace(0..2_000);
        let without = hearth::play(&scan, 200, false, |_| ()).unwrap();
        assert_eq!((without.hits, without.backing), (0, 2_000));
        let with = hearth::play(&scan, 200, true, |_| ()).unwrap();
        assert_eq!(with.backing, 2_000, "never past the end, and nothing twice");
        assert!(with.hits > 1_960, "{} of 2000 were read ahead", with.hits);
    }

    /// A boot of scattered blocks, again and again in one order, through RAM for a tenth of it.
    #[test]
    fn the_second_boot_is_replayed() {
        let boot = |i: u64| (i % 1_000) * 7_919 % 10_007;
        let trace = trace((0..4_000).map(boot));
        let alone = hearth::play(&trace, 100, false, |_| ()).unwrap();
        let played = hearth::play(&trace, 100, true, |_| ()).unwrap();
        let told = format!("{} of 3000 repeated reads hit, {} without", played.hits, alone.hits);
        assert!(played.hits > 1_500 && played.hits > 2 * alone.hits, "{told}");
        // POLICY.md: at most 1.15 times the reads that there would be without.
        assert!(played.backing <= 4_600, "{} blocks read for 4000", played.backing);
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
