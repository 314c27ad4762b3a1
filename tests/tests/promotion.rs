//! Promotion, measured: the same skewed reads over an image four times the RAM tier, with the scheduler's policy off and
//! on, on a disk that the kernel holds to a thousand reads a second; and what it must keep to: a hot block is in RAM
//! within two ticks, and the tier never outgrows its size.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use hearth_tests::fio::{self, Measured, READ_BYTES, Target};
use hearth_tests::memory::MemoryLimit;
use serde_json::Value;
use xtask::cluster::{ClusterSpec, Hearth};
use xtask::throttle::Throttle;
use xtask::wait;

/// RAM tier of the node.
const RAM_BYTES: u64 = 32 << 20;

/// What the skewed reads go over.
const LOAD_BYTES: u64 = 4 * RAM_BYTES;

/// Blocks after that which nobody reads until they are to become hot.
const SPARE_BYTES: u64 = 1 << 20;

/// What the node daemon may take besides its RAM tier: code, threads, buffers, NATS, and the maps and ring buffers of
/// the probes, which the kernel counts to whoever made them.
const OVERHEAD_BYTES: u64 = 128 << 20;

/// Reads per second that the store's disk allows.
const DISK_READ_IOPS: u64 = 1_000;

const BLOCK_BYTES: u64 = 64 << 10;

/// Reads of one pass: some four seconds of the throttled disk.
const READS: u64 = 12_000;

/// Passes of a measured run: what a tier holds when one begins moves its hit ratio by two points either way.
const PASSES: u64 = 3;

/// Requests at once, as a guest's disk queue has them.
const DEPTH: u64 = 16;

/// How fast popularity falls with rank; at 0.95 the hundred hottest of 32,768 pages draw two fifths of the reads.
const SKEW: &str = "zipf:0.95";

/// Ticks with the scheduler on before it is measured, at least.
const WARM_TICKS: u64 = 8;

/// Blocks that become hot at the same time.
const HOT_BLOCKS: u64 = 4;

/// From the report that puts a block over the threshold to the block in RAM.
const PROMOTED_WITHIN_TICKS: usize = 2;

/// Time for what takes a few ticks on an idle machine.
const WITHIN: Duration = Duration::from_secs(60);

const IMAGE: &str = "tests/promotion";

#[test]
fn promotion_comes_within_two_ticks_keeps_to_its_memory_and_does_not_hurt() -> Result<()> {
    // Made first, so dropped last: groups are removed when nothing runs in them any more.
    let scratch = tempfile::tempdir()?;
    let limits = MemoryLimit::new(RAM_BYTES + OVERHEAD_BYTES)
        .and_then(|memory| Ok((memory, Throttle::new(scratch.path(), DISK_READ_IOPS)?)));
    let Some((memory, throttle)) = hearth_tests::or_skip(limits) else {
        return Ok(());
    };
    let spec = ClusterSpec {
        ram_bytes: RAM_BYTES,
        under: Some(scratch.path().to_owned()),
        node_groups: vec![memory.group().to_owned()],
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let hearth = cluster.hearth().clone();
    let target = image(&hearth, scratch.path())?;
    if !fio::can_read(&target) {
        hearth_tests::skip("fio is missing, or lacks the engine for this export");
        return Ok(());
    }
    throttle.add(cluster.node(0).pid())?;

    become_hot(&hearth, &target)?;

    set_policy(&hearth, "enabled=false")?;
    // The node's own front is warm in both runs.
    load(&target)?;
    let off = run(&hearth, &target, &throttle)?;
    set_policy(&hearth, "enabled=true")?;
    let enabled_at = tick(&hearth)?;
    wait::until("the scheduler's promotions to come to rest", WITHIN, || {
        load(&target)?;
        let view = hearth.json(&["status"])?;
        let ticked = view["tick"].as_u64().context("the view has no tick")?;
        Ok((ticked >= enabled_at + WARM_TICKS && view["nodes"][0]["in_flight"] == 0).then_some(()))
    })?;
    let warm_ticks = tick(&hearth)? - enabled_at;
    let on = run(&hearth, &target, &throttle)?;

    eprintln!(
        "{PASSES} x {READS} reads of 4 KiB, {SKEW}, depth {DEPTH}, over {} MiB; RAM tier {} MiB, {DISK_READ_IOPS} disk reads/s; \
         on: after {warm_ticks} ticks",
        LOAD_BYTES >> 20,
        RAM_BYTES >> 20
    );
    eprintln!("{:<24}{:>15}{:>15}", "", "scheduler off", "scheduler on");
    let row = |name: &str, of: &dyn Fn(&Run) -> String| eprintln!("{name:<24}{:>15}{:>15}", of(&off), of(&on));
    row("block reads from RAM", &|run| {
        format!("{:.1} %", 100.0 * run.hit_ratio())
    });
    row("read p50", &|run| format!("{:.0} us", run.p50_us));
    row("read p99", &|run| format!("{:.0} us", run.p99_us));
    row("device reads", &|run| run.device_reads.to_string());
    row("took", &|run| format!("{:.1} s", run.took_s));

    // The limit on the disk was in force: the run that leans on it went at its speed.
    let iops = off.device_reads as f64 / off.took_s;
    ensure!(
        iops <= DISK_READ_IOPS as f64 * 1.1,
        "the disk did {iops:.0} reads/s, it is not slowed down"
    );
    within_memory(&hearth, &memory)?;
    cluster.check_running()?;
    // The front alone takes all room that nobody promotes into, and finds the same hot blocks in a load that does not
    // change: here the scheduler cannot gain much, and must not cost.
    ensure!(on.hit_ratio() > 0.6, "the tier does not hold the hot blocks");
    // A main region filled with the wrong blocks would cost twenty points.
    ensure!(
        on.hit_ratio() > off.hit_ratio() - 0.04,
        "the scheduler lowered the hit ratio"
    );
    ensure!(
        on.device_reads as f64 <= off.device_reads as f64 * 1.15,
        "the scheduler burdens the disk"
    );
    // Both medians are hits, since the front alone has all the room: they differ by the machine's noise.
    ensure!(on.p50_us <= 2.0 * off.p50_us, "the median read became much slower");
    Ok(())
}

/// Imports and attaches an image full of data without any structure.
fn image(hearth: &Hearth, scratch: &Path) -> Result<Target> {
    let raw = scratch.join("raw");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&raw)?);
    // xorshift64*: no block is empty, none repeats.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..(LOAD_BYTES + SPARE_BYTES) / 8 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    file.into_inner()?.sync_all()?;
    let path = raw.to_str().context("the temporary folder's path is not UTF-8")?;
    hearth.text(&["image", "import", path, IMAGE])?;
    let device = Path::new("/dev/fuse").exists() && Path::new("/dev/loop-control").exists();
    let export = if device { "device" } else { "socket" };
    let info = hearth.json(&["image", "attach", IMAGE, "--export", export])?;
    let text = |key: &str| {
        let value = info["attached"][key].as_str();
        value.with_context(|| format!("attached without {key}: {info}"))
    };
    Ok(if device {
        Target::Device(text("device")?.into())
    } else {
        Target::Nbd {
            socket: text("socket")?.into(),
            export: text("export")?.to_owned(),
        }
    })
}

/// Blocks that nobody touched before are read again and again, and must be in the main region within two ticks of
/// the report that puts them over the threshold.
fn become_hot(hearth: &Hearth, target: &Target) -> Result<()> {
    let first = (LOAD_BYTES + SPARE_BYTES / 2) / BLOCK_BYTES;
    let blocks: BTreeSet<u64> = (first..first + HOT_BLOCKS).collect();
    let before = Log::read(hearth)?;
    ensure!(
        blocks.iter().all(|block| !before.touched(*block)),
        "someone read the spare blocks already"
    );
    fio::read(
        target,
        &[
            format!("--offset={}", first * BLOCK_BYTES),
            format!("--size={}", HOT_BLOCKS * BLOCK_BYTES),
            // Each block some twenty times a second: in most tenths of it.
            format!("--rate_iops={}", HOT_BLOCKS * 20),
            "--time_based".into(),
            "--runtime=2".into(),
        ],
    )?;
    let threshold = hearth.json(&["status"])?["policy"][1]["threshold_bursts"]
        .as_u64()
        .context("the view has no threshold")?;
    let (log, found) = wait::until("hot blocks to be promoted", WITHIN, || {
        let log = Log::read(hearth)?;
        let found: Option<Vec<_>> = blocks
            .iter()
            .map(|block| Some((*block, log.over(*block, threshold)?, log.promoted(*block)?)))
            .collect();
        Ok(found.map(|found| (log, found)))
    })?;
    for (block, over, promoted) in found {
        let ticks = log.ticks_between(over, promoted);
        eprintln!("block {block}: over {threshold} bursts with #{over}, in RAM with #{promoted}, {ticks} tick(s)");
        ensure!(
            ticks <= PROMOTED_WITHIN_TICKS,
            "block {block} was in RAM {ticks} ticks after it was over the threshold"
        );
    }
    let map = hearth.json(&["image", "map", IMAGE])?;
    let in_ram = |block: &u64| {
        let runs = map.as_array().into_iter().flatten();
        runs.filter(|run| run["tier"] == "ram").any(|run| {
            let (first, count) = (run["first"].as_u64(), run["count"].as_u64());
            first
                .zip(count)
                .is_some_and(|(first, count)| (first..first + count).contains(block))
        })
    };
    ensure!(
        blocks.iter().all(in_ram),
        "the map shows {blocks:?} elsewhere than in RAM: {map}"
    );
    Ok(())
}

/// One measured run.
#[derive(Debug)]
struct Run {
    /// Medians over the passes.
    p50_us: f64,
    p99_us: f64,
    /// In all.
    took_s: f64,
    device_reads: u64,
    hits: u64,
    misses: u64,
}

impl Run {
    fn hit_ratio(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses) as f64
    }
}

fn load(target: &Target) -> Result<Measured> {
    fio::read(
        target,
        &[
            format!("--size={LOAD_BYTES}"),
            format!("--io_size={}", READS * READ_BYTES),
            format!("--random_distribution={SKEW}"),
            format!("--iodepth={DEPTH}"),
        ],
    )
}

/// The load, with what it did to the disk and to the node's counters.
fn run(hearth: &Hearth, target: &Target, throttle: &Throttle) -> Result<Run> {
    // What came before is told in windows that end before this run begins.
    let from_ms = now_ms()?;
    let (_, from) = told(hearth, from_ms, from_ms)?;
    let reads_before = throttle.device_reads()?;
    let passes = (0..PASSES).map(|_| load(target)).collect::<Result<Vec<_>>>()?;
    let device_reads = throttle.device_reads()? - reads_before;
    let ((hits, misses), _) = told(hearth, from, now_ms()?)?;
    let median = |of: fn(&Measured) -> f64| {
        let mut all: Vec<f64> = passes.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let run = Run {
        p50_us: median(|pass| pass.p50_us),
        p99_us: median(|pass| pass.p99_us),
        took_s: passes.iter().map(|pass| pass.took_s).sum(),
        device_reads,
        hits,
        misses,
    };
    let reads: u64 = passes.iter().map(|pass| pass.reads).sum();
    ensure!(
        reads == PASSES * READS,
        "fio read {reads} times, not {PASSES} x {READS}"
    );
    // The kernel may merge neighbours into one request.
    let counted = hits + misses;
    ensure!(
        (reads * 99 / 100..=reads).contains(&counted),
        "{reads} reads were told as {counted}: {run:?}"
    );
    Ok(run)
}

/// Hits and misses in the windows that end after `from_ms`, once the first that ends at or after `to_ms` is in the
/// log; and when that one ends.
fn told(hearth: &Hearth, from_ms: u64, to_ms: u64) -> Result<((u64, u64), u64)> {
    wait::until("the heat reports of a run", WITHIN, || {
        let heats = hearth.json_lines(&["log", "list", "--kind", "heat_folded", "--since", "1"])?;
        let (mut hits, mut misses) = (0, 0);
        for heat in &heats {
            let heat = &heat["event"];
            let end_ms = heat["time"].as_u64().context("a heat event without a time")?;
            if end_ms > from_ms {
                for image in heat["images"].as_array().into_iter().flatten() {
                    hits += image["ram_hits"].as_u64().context("an image's heat lacks its hits")?;
                    misses += image["ram_misses"]
                        .as_u64()
                        .context("an image's heat lacks its misses")?;
                }
            }
            if end_ms >= to_ms {
                return Ok(Some(((hits, misses), end_ms)));
            }
        }
        Ok(None)
    })
}

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis(),
    )?)
}

fn tick(hearth: &Hearth) -> Result<u64> {
    hearth.json(&["status"])?["tick"]
        .as_u64()
        .context("the view has no tick")
}

fn set_policy(hearth: &Hearth, setting: &str) -> Result<()> {
    let reason = "measure with and without the scheduler";
    hearth.text(&["policy", "set", setting, "--reason", reason]).map(drop)
}

/// Neither the tier nor the daemon around it outgrew its size, ever.
fn within_memory(hearth: &Hearth, memory: &MemoryLimit) -> Result<()> {
    let heats = hearth.json_lines(&["log", "list", "--kind", "heat_folded", "--since", "1"])?;
    let mut most = 0;
    for heat in &heats {
        let tier = &heat["event"]["tier"];
        let bytes = |key: &str| tier[key].as_u64().with_context(|| format!("a heat event lacks {key}"));
        let (front, main) = (bytes("front")?, bytes("main")?);
        ensure!(
            front <= bytes("front_capacity")? && front + main <= bytes("capacity")? && bytes("capacity")? <= RAM_BYTES,
            "a region is over its size: {tier}"
        );
        ensure!(front + main <= RAM_BYTES, "the tier is over its size: {tier}");
        most = most.max(front + main);
    }
    let used = memory.used()?;
    eprintln!(
        "RAM tier: at most {} of {} KiB in {} samples, one a second; daemon: at most {} of {} KiB, limit hit {} times",
        most >> 10,
        RAM_BYTES >> 10,
        heats.len(),
        used.peak_bytes >> 10,
        (RAM_BYTES + OVERHEAD_BYTES) >> 10,
        used.limit_hits
    );
    ensure!(
        used.peak_bytes >= RAM_BYTES,
        "the group does not hold the daemon's memory: {used:?}"
    );
    ensure!(
        used.peak_bytes <= RAM_BYTES + OVERHEAD_BYTES && used.limit_hits == 0 && used.oom_kills == 0,
        "the node daemon was over its memory: {used:?}"
    );
    // Most of the tier must have been in use for this to say anything.
    ensure!(
        most >= RAM_BYTES * 9 / 10,
        "only {most} bytes of the tier were ever used"
    );
    Ok(())
}

/// The whole log, in order.
struct Log(Vec<Value>);

impl Log {
    fn read(hearth: &Hearth) -> Result<Self> {
        Ok(Self(hearth.json_lines(&["log", "list", "--since", "1"])?))
    }

    fn of_kind(&self, kind: &'static str) -> impl Iterator<Item = (u64, &Value)> {
        let lines = self.0.iter().filter(move |line| line["kind"] == kind);
        lines.filter_map(|line| Some((line["seq"].as_u64()?, &line["event"])))
    }

    /// The bursts of reads that each heat event counts for a block, by log position.
    fn bursts(&self, block: u64) -> BTreeMap<u64, u64> {
        let mut bursts = BTreeMap::new();
        for (seq, heat) in self.of_kind("heat_folded") {
            let images = heat["images"].as_array().into_iter().flatten();
            let layers = images.flat_map(|image| image["layers"].as_array().into_iter().flatten());
            let records = layers.flat_map(|layer| layer["blocks"].as_array().into_iter().flatten());
            for record in records.filter(|record| record["block"] == block) {
                *bursts.entry(seq).or_default() += record["bursts"].as_u64().unwrap_or(0);
            }
        }
        bursts
    }

    fn touched(&self, block: u64) -> bool {
        !self.bursts(block).is_empty()
    }

    /// The first heat event that puts a block over so many bursts.
    fn over(&self, block: u64, threshold: u64) -> Option<u64> {
        let mut sum = 0;
        self.bursts(block).into_iter().find_map(|(seq, bursts)| {
            sum += bursts;
            (sum > threshold).then_some(seq)
        })
    }

    /// The closing event of the first promotion that got a block into RAM.
    fn promoted(&self, block: u64) -> Option<u64> {
        let promotions: Vec<&Value> = self
            .of_kind("command_given")
            .filter(|(_, command)| !command["order"]["Promote"].is_null())
            .map(|(_, command)| &command["id"])
            .collect();
        let mut finished = self.of_kind("command_finished");
        finished.find_map(|(seq, end)| {
            let done = end["outcome"]["Done"]["done"].as_array()?;
            (promotions.contains(&&end["command"]) && done.iter().any(|one| *one == block)).then_some(seq)
        })
    }

    fn ticks_between(&self, from: u64, to: u64) -> usize {
        self.of_kind("ticked")
            .filter(|(seq, _)| (from..to).contains(seq))
            .count()
    }
}
