//! A boot storm: fifty clones of one golden image are made at once, then fifty guests read the same boot set at the
//! same time through the node's NBD socket, each from its own clone, with nothing in RAM. The disk must deliver the boot
//! set once, not fifty times.
//!
//! Timed is one `hearth image clone` with fifty names, from the start of its process to its end: every clone is by
//! then durable in the node's store and in the log. Bytes read are the kernel's count for the node daemon's control
//! group. `HEARTH_STORM_IOPS` sets how many reads a second the disk is held to (2,000 without it); with few, more
//! guests wait for the same block at the same time.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hearth_tests::or_skip;
use serde_json::{Value, json};
use xtask::cluster::{Cluster, ClusterSpec, Hearth};
use xtask::process;
use xtask::throttle::Throttle;

const CLONES: usize = 50;

/// Time that making all clones may take.
const CLONES_WITHIN: Duration = Duration::from_secs(1);

/// What all clones may take on disk when they are made.
const CLONES_BYTES_MAX: u64 = 20 << 20;

/// What guests may read from the disk, in percent of the boot set.
const READ_PERCENT_MAX: u64 = 110;

const BLOCK_BYTES: u64 = 64 << 10;

const GOLDEN_BYTES: u64 = 192 << 20;

/// Distinct blocks that one boot touches, about: 48 MiB.
const BOOT_BLOCKS: usize = 768;

/// A node with room for one boot set in the part of its RAM that admits by itself.
const RAM_BYTES: u64 = 256 << 20;

const SOURCE: &str = "masters/os@v1";

#[test]
fn fifty_clones_boot_from_one_read_of_their_boot_set() -> Result<()> {
    if !hearth_tests::have(&["nbdsh"]) {
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let read_iops = match std::env::var("HEARTH_STORM_IOPS") {
        Ok(text) => text.parse().context("HEARTH_STORM_IOPS is no number")?,
        Err(_) => 2_000,
    };
    let Some(throttle) = or_skip(Throttle::new(scratch.path(), read_iops)) else {
        return Ok(());
    };
    let spec = ClusterSpec {
        ram_bytes: RAM_BYTES,
        heat: "export",
        under: Some(scratch.path().to_owned()),
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let hearth = cluster.hearth().clone();
    let raw = scratch.path().join("raw");
    write_golden(&raw)?;
    hearth.text(&["image", "import", path(&raw)?, "masters/os"])?;
    hearth.text(&["image", "snapshot", SOURCE])?;

    let names: Vec<String> = (1..=CLONES).map(|n| format!("appl/vm-{n}")).collect();
    make_clones(&cluster, &names)?;
    attach(&hearth, &names)?;

    // Everything from cold: a new process has nothing in RAM, and reads of the store pass the page cache by.
    cluster.restart_node(0)?;
    cluster.wait_ready()?;
    throttle.add(cluster.node(0).pid())?;
    let plan = boot_plan();
    let before = throttle.device_read_bytes()?;
    let took_s = boot(&cluster, &raw, &names, &plan)?;
    let read_bytes = throttle.device_read_bytes()? - before;
    let (set_bytes, asked_bytes) = (plan.blocks.len() as u64 * BLOCK_BYTES, plan.bytes());
    eprintln!(
        "{CLONES} guests read {} requests each ({:.1} MiB of a boot set of {:.1} MiB in {} blocks) in {took_s:.2} s at \
         {read_iops} disk reads/s; the disk delivered {:.1} MiB, {:.3} boot sets",
        plan.requests.len(),
        mib(asked_bytes),
        mib(set_bytes),
        plan.blocks.len(),
        mib(read_bytes),
        read_bytes as f64 / set_bytes as f64
    );
    cluster.check_running()?;
    ensure!(
        read_bytes * 100 >= set_bytes * 95,
        "the kernel counted less than the boot set: something was warm, or it counts elsewhere"
    );
    ensure!(
        read_bytes * 100 <= set_bytes * READ_PERCENT_MAX,
        "the guests made the disk deliver more than {READ_PERCENT_MAX} % of one boot set"
    );
    Ok(())
}

/// Makes the clones, and holds time and space to their limits.
fn make_clones(cluster: &Cluster, names: &[String]) -> Result<()> {
    let hearth = cluster.hearth();
    let store = cluster.store_dir(0);
    let used = allocated(&store)?;
    let mut words = vec!["image", "clone", SOURCE];
    words.extend(names.iter().map(String::as_str));
    let start = Instant::now();
    let made = hearth.json(&words)?;
    let took = start.elapsed();
    let bytes = allocated(&store)? - used;
    eprintln!(
        "{CLONES} clones: {:.0} ms, {:.2} MiB on disk",
        took.as_secs_f64() * 1e3,
        mib(bytes)
    );
    ensure!(
        made.as_array().map(Vec::len) == Some(CLONES),
        "not every clone was answered: {made:.400}"
    );
    ensure!(bytes > 0 && bytes < CLONES_BYTES_MAX, "the clones take {bytes} bytes");
    ensure!(took < CLONES_WITHIN, "the clones took {took:?}");
    Ok(())
}

fn attach(hearth: &Hearth, names: &[String]) -> Result<()> {
    let mut words = vec!["image", "attach"];
    words.extend(names.iter().map(String::as_str));
    let start = Instant::now();
    hearth.text(&words)?;
    eprintln!("{CLONES} attaches: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// What one guest reads when it boots.
struct BootPlan {
    /// Offset and length, in order.
    requests: Vec<(u64, u64)>,
    /// The blocks that they touch.
    blocks: BTreeSet<u64>,
}

impl BootPlan {
    fn bytes(&self) -> u64 {
        self.requests.iter().map(|(_, length)| length).sum()
    }
}

/// Bytes of a guest's largest request, as Linux reads files ahead.
const READAHEAD_BYTES: u64 = 128 << 10;

/// Files read from end to end, scattered over the disk, in pieces of the guest's read-ahead; between them small reads
/// of few metadata blocks again and again, skewed.
fn boot_plan() -> BootPlan {
    let mut random = Random(0x5eed_0001);
    let mut plan = BootPlan {
        requests: Vec::new(),
        blocks: BTreeSet::new(),
    };
    let all = GOLDEN_BYTES / BLOCK_BYTES;
    while plan.blocks.len() < BOOT_BLOCKS {
        // From 8 KiB to 4 MiB, most of them small.
        let length = 8192 << random.below(10).min(random.below(10));
        let offset = random.below((GOLDEN_BYTES - length) / 4096) * 4096;
        let mut at = offset;
        while at < offset + length {
            let piece = (offset + length - at).min(READAHEAD_BYTES);
            plan.requests.push((at, piece));
            at += piece;
        }
        for _ in 0..4 {
            // The minimum of three draws: the lowest tenth of the metadata gets a quarter of the reads.
            let block = (0..3).map(|_| random.below(64)).min().unwrap_or(0) * (all / 64);
            let offset = block * BLOCK_BYTES + random.below(BLOCK_BYTES / 4096) * 4096;
            plan.requests.push((offset, 4096));
        }
        for (offset, length) in &plan.requests {
            plan.blocks
                .extend(offset / BLOCK_BYTES..=(offset + length - 1) / BLOCK_BYTES);
        }
    }
    plan
}

/// Lets all guests boot at once; returns the seconds that it took.
fn boot(cluster: &Cluster, raw: &Path, names: &[String], plan: &BootPlan) -> Result<f64> {
    let file = cluster.dir().join("boot-plan.json");
    let text = json!({
        "raw": raw,
        "socket": cluster.socket(0),
        "exports": names,
        "requests": plan.requests,
    });
    fs::write(&file, text.to_string())?;
    let told = process::output(
        process::stock("nbdsh")
            .args(["-n", "-c", include_str!("boot_storm.py")])
            .env("BOOT_PLAN", &file),
    )?;
    let told: Value = serde_json::from_str(&told).with_context(|| format!("the guests said {told:.400}"))?;
    ensure!(
        told["failures"].as_array().is_some_and(Vec::is_empty),
        "guests failed: {:.400}",
        told["failures"].to_string()
    );
    told["took_s"]
        .as_f64()
        .context("the guests did not say how long it took")
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}

/// A raw file without structure: no block is empty, none repeats.
fn write_golden(raw: &Path) -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(usize::try_from(GOLDEN_BYTES)?);
    while bytes.len() < bytes.capacity() {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    let mut file = fs::File::create(raw)?;
    file.write_all(&bytes)?;
    Ok(file.sync_all()?)
}

/// Bytes that a folder takes on its disk, as `du` counts them.
fn allocated(dir: &Path) -> Result<u64> {
    let mut bytes = fs::metadata(dir)?.blocks() * 512;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        bytes += if meta.is_dir() {
            allocated(&entry.path())?
        } else {
            meta.blocks() * 512
        };
    }
    Ok(bytes)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("the temporary folder's path is not UTF-8")
}
