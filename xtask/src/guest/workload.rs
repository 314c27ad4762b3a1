//! The program that a guest runs: page-sized reads and writes with skew on one file, past the guest's page cache, with
//! every byte that comes back checked.
//!
//! It is compiled alone and linked statically, so it uses the standard library only. It is driven over the guest's
//! console: one command per line in, one line of JSON after a marker out.
//!
//! `workload make FILE MIB` fills the file; `workload serve FILE` obeys the console.
//!
//! Every page says which page it is and how often it was written, and the rest of it follows from these two. Each
//! page has one thread that may touch it, and that thread remembers the count: so a lost write, a write to the wrong
//! place and a torn one are all seen.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, Write as _};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Bytes of one access.
const PAGE_BYTES: usize = 4096;
/// First word of every page.
const MAGIC: u64 = 0x4845_4152_5448_5047;
/// `O_DIRECT`, as the standard library has no name for it.
const O_DIRECT: i32 = if cfg!(target_arch = "aarch64") {
    0o200_000
} else {
    0o40_000
};
/// Latencies kept per thread: bounded memory however long a phase is. Later ones are counted, not kept.
const SAMPLES_MAX: usize = 1 << 20;
/// An access that takes longer is told by itself, with when it began.
const STALL_MS: u64 = 100;
/// Stalls told of one thread; later ones only show in the longest access.
const STALLS_MAX: usize = 256;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        [_, "make", file, mib] => mib
            .parse()
            .map_err(|e| io::Error::other(format!("{mib:?} is no number of MiB: {e}")))
            .and_then(|mib: u64| make(file, mib)),
        [_, "serve", file] => serve(file),
        _ => Err(io::Error::other("use: workload make FILE MIB | workload serve FILE")),
    };
    if let Err(error) = result {
        println!("HEARTH-GUEST-FAILED {error}");
        std::process::exit(1);
    }
}

/// A stream of numbers from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`, which is small against 2^64.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// At least 0, below 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Writes what page `page` holds after `count` writes.
fn fill(buf: &mut [u8], page: u64, count: u64) {
    let key = mix(page ^ count.rotate_left(32) ^ MAGIC);
    for (i, word) in buf.chunks_exact_mut(8).enumerate() {
        let value = match i {
            0 => MAGIC,
            1 => page,
            2 => count,
            _ => mix(key.wrapping_add(i as u64)),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn make(path: &str, mib: u64) -> io::Result<()> {
    let mut out = io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut buf = vec![0; PAGE_BYTES];
    for page in 0..mib * (1 << 20) / PAGE_BYTES as u64 {
        fill(&mut buf, page, 0);
        out.write_all(&buf)?;
    }
    out.flush()
}

/// What a phase does.
#[derive(Debug, Clone, PartialEq)]
struct Phase {
    /// Echoed in the answer.
    name: String,
    /// Ends after this, or
    seconds: f64,
    /// after this many accesses of all threads.
    ops_max: u64,
    /// Chooses which blocks are hot, and in which order they come.
    seed: u64,
    /// Exponent of the Zipf law, in thousandths; 0 is uniform.
    skew_permille: u64,
    /// Pages that are hot together, as KiB.
    block_kib: u64,
    /// First so many MiB of the file that are used; 0 for all.
    span_mib: u64,
    /// Writes among 1,000 accesses.
    write_permille: u64,
    /// Threads, each with one access under way.
    depth: u64,
    /// Pause of a thread after each access.
    pause_us: u64,
}

impl Phase {
    /// Reads `name=before seconds=10 …`; what is not named keeps its default.
    fn parse(text: &str) -> Result<Self, String> {
        let mut phase = Self {
            name: "run".into(),
            seconds: 10.0,
            ops_max: u64::MAX,
            seed: 1,
            skew_permille: 1100,
            block_kib: 64,
            span_mib: 0,
            write_permille: 100,
            depth: 1,
            pause_us: 0,
        };
        for word in text.split_whitespace() {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| format!("{word:?} is not key=value"))?;
            let number = || value.parse::<u64>().map_err(|e| format!("{word:?}: {e}"));
            match key {
                "name" if value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => phase.name = value.into(),
                "seconds" => phase.seconds = value.parse().map_err(|e| format!("{word:?}: {e}"))?,
                "ops_max" => phase.ops_max = number()?,
                "seed" => phase.seed = number()?,
                "skew_permille" => phase.skew_permille = number()?,
                "block_kib" => phase.block_kib = number()?,
                "span_mib" => phase.span_mib = number()?,
                "write_permille" => phase.write_permille = number()?,
                "depth" => phase.depth = number()?,
                "pause_us" => phase.pause_us = number()?,
                _ => return Err(format!("unknown setting {word:?}")),
            }
        }
        let pages_per_block = phase.block_kib * 1024 / PAGE_BYTES as u64;
        if !(0.0..=86_400.0).contains(&phase.seconds) || phase.write_permille > 1000 || pages_per_block == 0 {
            return Err(format!("out of range: {phase:?}"));
        }
        if phase.depth == 0 || phase.depth > pages_per_block {
            return Err(format!(
                "depth {} is not between 1 and the {pages_per_block} pages of a block",
                phase.depth
            ));
        }
        Ok(phase)
    }
}

/// Blocks of a file, drawn by a Zipf law over a shuffled order.
struct Zipf {
    /// Up to which fraction each rank reaches.
    reach: Vec<f64>,
    /// The block of each rank.
    block: Vec<u64>,
}

impl Zipf {
    fn new(blocks: u64, skew_permille: u64, seed: u64) -> Self {
        let exponent = skew_permille as f64 / 1000.0;
        let mut sum = 0.0;
        let mut reach: Vec<f64> = (1..=blocks)
            .map(|rank| {
                sum += (rank as f64).powf(-exponent);
                sum
            })
            .collect();
        reach.iter_mut().for_each(|r| *r /= sum);
        let mut block: Vec<u64> = (0..blocks).collect();
        let mut random = Random(seed);
        for i in (1..block.len()).rev() {
            block.swap(i, random.below(i as u64 + 1) as usize);
        }
        Self { reach, block }
    }

    fn draw(&self, random: &mut Random) -> u64 {
        let at = random.fraction();
        let rank = self.reach.partition_point(|r| *r <= at);
        self.block[rank.min(self.block.len() - 1)]
    }
}

/// What one thread did in a phase.
#[derive(Default)]
struct Tally {
    reads: u64,
    writes: u64,
    corrupt: u64,
    errors: u64,
    /// The first failure, in words.
    first: Option<String>,
    /// Nanoseconds.
    read_ns: Vec<u64>,
    write_ns: Vec<u64>,
    longest_ns: u64,
    /// Milliseconds from the phase's beginning to the access's, and that it took.
    stalls: Vec<(u64, u64)>,
}

impl Tally {
    fn failed(&mut self, what: String) {
        self.first.get_or_insert(what);
    }
}

/// The file, and how often each page was written by this process.
struct Pages {
    path: String,
    pages: u64,
    /// By page modulo the phase's depth no two threads meet, so the lock is never waited for in an access.
    counts: Vec<Mutex<u64>>,
}

impl Pages {
    fn open(path: &str) -> io::Result<Self> {
        let pages = std::fs::metadata(path)?.len() / PAGE_BYTES as u64;
        Ok(Self {
            path: path.into(),
            pages,
            counts: (0..pages).map(|_| Mutex::new(0)).collect(),
        })
    }

    fn run_thread(&self, phase: &Phase, zipf: &Zipf, thread: u64, since: Instant, until: Instant) -> io::Result<Tally> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(O_DIRECT)
            .open(&self.path)?;
        let mut space = vec![0u8; 2 * PAGE_BYTES];
        let start = space.as_ptr().align_offset(PAGE_BYTES);
        let buf = &mut space[start..start + PAGE_BYTES];
        let mut expected = vec![0u8; PAGE_BYTES];
        let mut random = Random(mix(phase.seed ^ thread.rotate_left(40)) ^ mix(phase.name.len() as u64));
        let pages_per_block = phase.block_kib * 1024 / PAGE_BYTES as u64;
        let mut tally = Tally::default();
        for _ in 0..phase.ops_max.div_ceil(phase.depth) {
            let page = zipf.draw(&mut random) * pages_per_block
                + random.below(pages_per_block / phase.depth) * phase.depth
                + thread;
            let mut count = self.counts[page as usize].lock().unwrap_or_else(|e| e.into_inner());
            let offset = page * PAGE_BYTES as u64;
            let writes = random.below(1000) < phase.write_permille;
            if writes {
                fill(buf, page, *count + 1);
            }
            let began = Instant::now();
            let done = if writes {
                file.write_all_at(buf, offset)
            } else {
                file.read_exact_at(buf, offset)
            };
            let took_ns = began.elapsed().as_nanos() as u64;
            let (ops, samples) = if writes {
                (&mut tally.writes, &mut tally.write_ns)
            } else {
                (&mut tally.reads, &mut tally.read_ns)
            };
            *ops += 1;
            if samples.len() < SAMPLES_MAX {
                samples.push(took_ns);
            }
            tally.longest_ns = tally.longest_ns.max(took_ns);
            if took_ns > STALL_MS * 1_000_000 && tally.stalls.len() < STALLS_MAX {
                let at_ms = (began - since).as_millis() as u64;
                tally.stalls.push((at_ms, took_ns / 1_000_000));
            }
            match done {
                Err(e) => {
                    tally.errors += 1;
                    tally.failed(format!("page {page}: {e}"));
                }
                Ok(()) if writes => *count += 1,
                Ok(()) => {
                    fill(&mut expected, page, *count);
                    if *buf != *expected {
                        tally.corrupt += 1;
                        tally.failed(format!("page {page} does not hold its write number {count}"));
                    }
                }
            }
            if began + Duration::from_nanos(took_ns) >= until {
                break;
            }
            if phase.pause_us > 0 {
                std::thread::sleep(Duration::from_micros(phase.pause_us));
            }
        }
        file.sync_data()?;
        Ok(tally)
    }

    /// Runs a phase to its end; its result as JSON.
    fn run(&self, phase: &Phase) -> io::Result<String> {
        let pages_per_block = phase.block_kib * 1024 / PAGE_BYTES as u64;
        let span = match phase.span_mib {
            0 => self.pages,
            mib => self.pages.min(mib * (1 << 20) / PAGE_BYTES as u64),
        };
        if span < pages_per_block {
            return Err(io::Error::other("the file is smaller than one block of the phase"));
        }
        let zipf = Zipf::new(span / pages_per_block, phase.skew_permille, phase.seed);
        let began = Instant::now();
        let until = began + Duration::from_secs_f64(phase.seconds);
        let tallies = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..phase.depth)
                .map(|t| {
                    scope.spawn({
                        let zipf = &zipf;
                        move || self.run_thread(phase, zipf, t, began, until)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|t| {
                    t.join()
                        .unwrap_or_else(|_| Err(io::Error::other("a thread of the workload panicked")))
                })
                .collect::<io::Result<Vec<Tally>>>()
        })?;
        let wall_ms = began.elapsed().as_millis();
        let mut all = Tally::default();
        for mut tally in tallies {
            all.reads += tally.reads;
            all.writes += tally.writes;
            all.corrupt += tally.corrupt;
            all.errors += tally.errors;
            all.read_ns.append(&mut tally.read_ns);
            all.write_ns.append(&mut tally.write_ns);
            all.first = all.first.or(tally.first);
            all.longest_ns = all.longest_ns.max(tally.longest_ns);
            all.stalls.append(&mut tally.stalls);
        }
        let mut json = String::new();
        let _ = write!(
            json,
            "{{\"name\":\"{}\",\"reads\":{},\"writes\":{},\"errors\":{},\"corrupt\":{},\"wall_ms\":{wall_ms}",
            phase.name, all.reads, all.writes, all.errors, all.corrupt
        );
        for (what, samples) in [("read", &mut all.read_ns), ("write", &mut all.write_ns)] {
            samples.sort_unstable();
            for (label, permille) in [("p50", 500), ("p99", 990)] {
                let _ = write!(
                    json,
                    ",\"{what}_{label}_us\":{:.1}",
                    quantile(samples, permille) as f64 / 1000.0
                );
            }
        }
        all.stalls.sort_unstable();
        let stalls: Vec<String> = all.stalls.iter().map(|(at, took)| format!("[{at},{took}]")).collect();
        let _ = write!(
            json,
            ",\"longest_ms\":{},\"stalls\":[{}]",
            all.longest_ns / 1_000_000,
            stalls.join(",")
        );
        // Only digits, letters and spaces of our own texts, but an error's text is the system's.
        let first = all.first.unwrap_or_default().replace(['"', '\\'], "'");
        let _ = write!(json, ",\"first_failure\":\"{first}\"}}");
        Ok(json)
    }
}

/// The smallest sample that at least `permille` of 1,000 do not exceed; 0 if there is none.
fn quantile(sorted: &[u64], permille: usize) -> u64 {
    let rank = (sorted.len() * permille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0)
}

fn serve(path: &str) -> io::Result<()> {
    let pages = Pages::open(path)?;
    let up = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let boot_ms = up.split(' ').next().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0) * 1000.0;
    println!(
        "HEARTH-GUEST-READY {{\"boot_ms\":{boot_ms:.0},\"pages\":{}}}",
        pages.pages
    );
    for line in io::stdin().lock().lines() {
        let line = line?;
        match line.trim().split_once(' ').unwrap_or((line.trim(), "")) {
            ("run", settings) => {
                let outcome = Phase::parse(settings).and_then(|phase| pages.run(&phase).map_err(|e| e.to_string()));
                match outcome {
                    Ok(json) => println!("HEARTH-GUEST-PHASE {json}"),
                    Err(error) => println!("HEARTH-GUEST-FAILED {error}"),
                }
            }
            ("stop", _) => break,
            ("", _) => {}
            _ => println!("HEARTH-GUEST-FAILED unknown command; use run or stop"),
        }
    }
    println!("HEARTH-GUEST-STOPPING");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_checked() {
        let phase = Phase::parse("name=after seconds=0.5 write_permille=0 depth=4 pause_us=9").unwrap();
        assert_eq!(
            (phase.name.as_str(), phase.write_permille, phase.depth, phase.pause_us),
            ("after", 0, 4, 9)
        );
        for bad in [
            "colour=red",
            "depth=0",
            "depth=17",
            "seconds=-1",
            "write_permille=1001",
            "name=a\"b",
            "seed",
        ] {
            assert!(Phase::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_skewed_draw_prefers_few_blocks_and_reaches_many() {
        let zipf = Zipf::new(1000, 1100, 7);
        let mut random = Random(1);
        let mut hits = vec![0u32; 1000];
        (0..100_000).for_each(|_| hits[zipf.draw(&mut random) as usize] += 1);
        let reached = hits.iter().filter(|h| **h > 0).count();
        hits.sort_unstable_by(|a, b| b.cmp(a));
        let top: u32 = hits[..100].iter().sum();
        assert!(top > 70_000 && reached > 900, "{top} {reached}");
    }

    #[test]
    fn quantiles_are_samples() {
        assert_eq!(quantile(&[], 500), 0);
        assert_eq!(quantile(&[5], 990), 5);
        let all: Vec<u64> = (1..=100).collect();
        assert_eq!((quantile(&all, 500), quantile(&all, 990)), (50, 99));
    }
}
