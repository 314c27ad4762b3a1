//! `cargo xtask demo`: a whole cluster on this machine with real guests, and what it measured.
//!
//! One golden image, a clone for each guest, each attached on a node of its own. The guests boot from Hearth's disks
//! and do the same skewed reads and writes twice: first with the scheduler's policy off, then on. The store's disk is
//! slowed down to a thousand reads a second, as a busy shared disk is, so that RAM pays here as it pays there. Then
//! guests on images with replicas migrate between nodes, and a node dies (`moves.rs`).

mod figures;
mod fleet;
mod moves;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, ClusterSpec, Hearth, Programs};
use crate::guest::{self, Accel};
use crate::process;
use crate::setup::{self, Machine};
use crate::step::{self, note, step};
use crate::throttle::Throttle;
use crate::wait;
use crate::workspace::Workspace;
use figures::{Figures, Phase, Reads};
use fleet::{Disk, Fleet};

/// Nodes, and guests: one on each.
const NODES: usize = 3;

/// RAM tier of each node: less than a third of what its guest touches.
const RAM_TIER_BYTES: u64 = 16 << 20;

/// Reads per second that the store's disk allows, all nodes together.
const DISK_READ_IOPS: u64 = 1_000;

/// Block size of the golden image, and so of its clones.
const BLOCK_BYTES: u64 = 64 << 10;

/// Length of each measured phase.
const PHASE: Duration = Duration::from_secs(30);

/// Time in which promotions must have filled the main regions or come to rest.
const SETTLE_WITHIN: Duration = Duration::from_secs(90);

/// Time in which an import, a promotion or a demotion must be done.
const DONE_WITHIN: Duration = Duration::from_secs(120);

/// Heat events of a block that are shown; a hot block has one for each second.
const HEAT_LINES_SHOWN: usize = 3;

const MASTER: &str = "masters/debian";

/// Runs the demo and prints its figures as the last line of standard output.
///
/// # Errors
/// A step failed; everything started has been ended.
pub fn run(workspace: &Workspace, machine: &Machine, headless: bool) -> Result<()> {
    let start = Instant::now();
    wait::catch_interrupts();
    let bin_dir = build(workspace, machine)?;
    let golden = step("make the golden image", || guest::build_golden(&workspace.cache))?;
    let (accelerator, why) = step("find out how guests can run", guest::choose)?;
    note(format!("{}: {why}", accelerator.name()));
    let programs = Programs {
        bin_dir,
        nats_server: setup::nats_server(workspace)?,
    }
    .checked()?;
    let mut cluster = step("start nats-server, scheduler and three nodes", || {
        Cluster::start(
            programs,
            &ClusterSpec {
                nodes: NODES,
                ram_bytes: RAM_TIER_BYTES,
                under: Some(workspace.cache.clone()),
                ..ClusterSpec::default()
            },
        )
    })?;
    let dashboard = if headless {
        None
    } else {
        Some(Dashboard::show(cluster.hearth(), &workspace.cache)?)
    };
    let line = measure(machine, &mut cluster, &golden, accelerator, start);
    if let Some(dashboard) = dashboard {
        dashboard.until_quit(line.is_ok())?;
    }
    step("stop everything", || {
        drop(cluster);
        Ok(())
    })?;
    println!("{}", line?);
    Ok(())
}

/// Builds Hearth's programs, unless `HEARTH_BIN_DIR` names some, and returns their folder.
fn build(workspace: &Workspace, machine: &Machine) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("HEARTH_BIN_DIR") {
        let dir = PathBuf::from(dir);
        note(format!(
            "running the programs in {}, as HEARTH_BIN_DIR says",
            dir.display()
        ));
        return Ok(dir);
    }
    let what = "build Hearth (the first time compiles RocksDB: some ten minutes)";
    step(what, || {
        let mut cargo = workspace.command("cargo");
        cargo.args(["build", "--workspace", "--bins"]);
        if machine.ebpf_build.is_ok() {
            cargo.env("HEARTH_REQUIRE_EBPF", "1");
        }
        process::passthrough(&mut cargo)
    })?;
    Ok(workspace.bin_dir())
}

fn measure(
    machine: &Machine,
    cluster: &mut Cluster,
    golden: &Path,
    accelerator: Accel,
    start: Instant,
) -> Result<Value> {
    let hearth = cluster.hearth().clone();
    let disks = step("import the golden image, clone and attach it for each guest", || {
        import(&hearth, golden)?;
        (0..NODES)
            .map(|index| attach(&hearth, index, machine.root))
            .collect::<Result<Vec<_>>>()
    })?;
    let throttle = throttle(cluster);
    let images: BTreeSet<String> = disks.iter().map(|disk| disk.image_id.clone()).collect();
    set_policy(&hearth, "enabled=false", "demo: measure without the scheduler")?;
    let mut fleet = step("boot the guests from their disks", || {
        Fleet::boot(accelerator, cluster.dir(), &disks)
    })?;

    let phase = |what: &str, name: &str, fleet: &mut Fleet| {
        step(what, || {
            let reads_before = throttle.as_ref().map(Throttle::device_reads).transpose()?;
            let from = position(&hearth)?;
            let latency = fleet.measure(name, PHASE)?;
            let to = position(&hearth)?;
            let reads_after = throttle.as_ref().map(Throttle::device_reads).transpose()?;
            let reads = Reads::of(&heat(&hearth, from, to)?, &images);
            note(format!(
                "{:.1} % of block reads from RAM; the guests read {} times, p50 {} us, p99 {} us",
                reads.hit_ratio()? * 100.0,
                latency.reads,
                latency.p50_us,
                latency.p99_us
            ));
            Ok(Phase {
                reads,
                latency,
                device_reads: reads_before.zip(reads_after).map(|(before, after)| after - before),
            })
        })
    };
    let before = phase("measure with the scheduler's policy off", "before", &mut fleet)?;
    set_policy(&hearth, "enabled=true", "demo: let the scheduler promote")?;
    step("let the scheduler promote what is hot", || {
        fleet.work_until(SETTLE_WITHIN, || settled(&hearth))
    })?;
    let after = phase("measure with the scheduler's policy on", "after", &mut fleet)?;
    let guests_booted = fleet.count();
    let guests_touch_bytes = figures::touched_bytes(&heat(&hearth, 1, position(&hearth)?)?, &images, BLOCK_BYTES);
    step("shut the guests down", || fleet.shut_down())?;

    // With nobody reading, heat decays; a short half-life lets it happen before your eyes.
    set_policy(&hearth, "half_life_s=5", "demo: let what was hot grow cold")?;
    step("let what has grown cold leave RAM", || {
        wait::until("a demotion", DONE_WITHIN, || {
            let view = hearth.json(&["status"])?;
            Ok((view["totals"]["blocks_demoted"].as_u64() > Some(0)).then_some(()))
        })
    })?;
    let moves = moves::run(cluster, golden, accelerator)?;
    let verified = step("verify the log: chain, contiguity and every decision again", || {
        hearth.json(&["log", "verify"])
    })?;
    let replayed = step("replay the log from nothing", || hearth.json(&["replay"]))?;
    let recorded = &replayed["recorded"];
    note(format!(
        "digest {} recorded at #{}, replay {}",
        recorded["state"], recorded["at"], recorded["same"]
    ));
    explain(&hearth, &disks)?;
    cluster.check_running()?;
    let view = hearth.json(&["status"])?;
    Figures {
        view,
        guests_booted,
        accelerator: accelerator.name(),
        export: if machine.root { "device" } else { "socket" },
        before,
        after,
        ram_tier_bytes_set: RAM_TIER_BYTES * NODES as u64,
        guests_touch_bytes,
        moves,
        disk_read_iops_set: throttle.as_ref().map(|throttle| throttle.read_iops_max),
        events_logged: verified["events"]
            .as_u64()
            .context("`hearth log verify` counts no events")?,
        log_verified: verified["verified"] == true,
        replay_same: recorded["same"] == true && replayed["differences"] == 0,
        wall_s: start.elapsed().as_secs_f64(),
    }
    .line()
}

/// Slows the store's disk down for the nodes, if the kernel lets us.
fn throttle(cluster: &mut Cluster) -> Option<Throttle> {
    let set = Throttle::new(cluster.dir(), DISK_READ_IOPS).and_then(|throttle| {
        for index in 0..cluster.node_count() {
            throttle.add(cluster.node(index).pid())?;
        }
        Ok(throttle)
    });
    match set {
        Ok(throttle) => {
            note(format!(
                "the nodes may read their disk {DISK_READ_IOPS} times a second, as on a busy shared disk"
            ));
            Some(throttle)
        }
        Err(error) => {
            note(format!(
                "the disk is not slowed down ({error:#}); misses cost less here than on a shared disk"
            ));
            None
        }
    }
}

fn import(hearth: &Hearth, golden: &Path) -> Result<()> {
    let path = golden.to_str().context("the golden image's path is not UTF-8")?;
    let (node, block_size) = (Cluster::node_id(0), BLOCK_BYTES.to_string());
    hearth.text(&[
        "image",
        "import",
        path,
        MASTER,
        "--node",
        &node,
        "--block-size",
        &block_size,
    ])?;
    hearth.text(&["image", "snapshot", &format!("{MASTER}@v1")]).map(drop)
}

/// Clones the golden image onto a node of its own; the blocks stay on the first node until they are needed.
fn attach(hearth: &Hearth, index: usize, device: bool) -> Result<Disk> {
    let name = format!("appl/vm-{}", index + 1);
    let node = Cluster::node_id(index);
    hearth.text(&["image", "clone", &format!("{MASTER}@v1"), &name, "--node", &node])?;
    let export = if device { "device" } else { "socket" };
    let info = hearth.json(&["image", "attach", &name, "--node", &node, "--export", export])?;
    let text = |value: &Value, what: &str| {
        value
            .as_str()
            .map(str::to_owned)
            .with_context(|| format!("{name} was attached without {what}"))
    };
    let attached = &info["attached"];
    let device = device.then(|| text(&attached["device"], "a device")).transpose()?;
    let (socket, export) = (
        text(&attached["socket"], "a socket")?,
        text(&attached["export"], "an export name")?,
    );
    Ok(Disk {
        image_id: text(&info["id"], "an id")?,
        path: fleet::path(device.as_deref(), &socket, &export),
        name,
    })
}

fn set_policy(hearth: &Hearth, setting: &str, reason: &str) -> Result<()> {
    hearth.text(&["policy", "set", setting, "--reason", reason]).map(drop)
}

/// The log's end as the scheduler has folded it.
fn position(hearth: &Hearth) -> Result<u64> {
    let view = hearth.json(&["status"])?;
    view["seq"].as_u64().context("the view has no log position")
}

fn heat(hearth: &Hearth, from: u64, to: u64) -> Result<Vec<Value>> {
    let (from, to) = (from.to_string(), to.to_string());
    hearth.json_lines(&["log", "list", "--kind", "heat_folded", "--since", &from, "--until", &to])
}

/// Whether something was promoted and nothing is on its way any more.
fn settled(hearth: &Hearth) -> Result<bool> {
    let view = hearth.json(&["status"])?;
    let nodes = view["nodes"].as_array().context("the view lists no nodes")?;
    let promoted = view["totals"]["blocks_promoted"].as_u64() > Some(0);
    Ok(promoted && nodes.iter().all(|node| node["in_flight"] == 0))
}

/// Shows why one block was promoted, from the log alone.
fn explain(hearth: &Hearth, disks: &[Disk]) -> Result<()> {
    let commands = hearth.json_lines(&[
        "log",
        "list",
        "--kind",
        "command_given",
        "--node",
        &Cluster::node_id(0),
        "--since",
        "1",
    ])?;
    let block = commands
        .iter()
        .find_map(figures::first_promoted)
        .context("no command in the log promotes a block")?;
    let image = &disks.first().context("there are no disks")?.name;
    step(&format!("ask why block {block} of {image} is where it is"), || {
        let said = hearth.text(&["why", &format!("{image}:{block}")])?;
        ensure!(!said.is_empty(), "`hearth why` said nothing");
        let (heat, rest): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with("heat "));
        rest.iter().chain(heat.iter().take(HEAT_LINES_SHOWN)).for_each(note);
        note(format!("... {} heat events in all", heat.len()));
        Ok(())
    })
}

/// The dashboard on this terminal; progress goes to a file meanwhile.
struct Dashboard(std::process::Child);

impl Dashboard {
    fn show(hearth: &Hearth, cache: &Path) -> Result<Self> {
        let log = cache.join("demo.log");
        note(format!(
            "progress goes to {} while the dashboard has the terminal",
            log.display()
        ));
        let child = hearth.command(&["top"]).spawn().context("cannot start `hearth top`")?;
        step::send_to(Some(&log))?;
        Ok(Self(child))
    }

    /// Leaves it to the user until they quit; ends it at once if there is nothing to look at.
    fn until_quit(mut self, look: bool) -> Result<()> {
        while look && wait::check_interrupted().is_ok() && self.0.try_wait()?.is_none() {
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // Killed, it cannot give the terminal back; so we do: main screen, cursor, cooked mode.
            let _ = self.0.kill();
            let _ = self.0.wait();
            eprint!("\x1b[?1049l\x1b[?25h");
            let _ = Command::new("stty").arg("sane").status();
        }
        // Stderr is always there to go back to.
        let _ = step::send_to(None);
    }
}
