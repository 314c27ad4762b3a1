//! Copies of an image on real nodes, under a guest: a bit that flipped on a disk is found and repaired, copies are written
//! anew, where they are can be asked block by block, and a join can be paused.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::load::{self, Load};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 32 << 20;
const BLOCK_BYTES: u64 = 64 << 10;

/// Where in its block a bit is flipped.
const FLIPPED_AT: u64 = 4_321;

fn start(nodes: usize, bytes: u64) -> Result<Option<Cluster>> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(None);
    }
    let spec = ClusterSpec {
        nodes,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(None);
    };
    let (hearth, size) = (cluster.hearth(), bytes.to_string());
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", "node-1"])?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
    Ok(Some(cluster))
}

/// The data file of a node's copy.
fn data(cluster: &Cluster, node: usize) -> Result<PathBuf> {
    let info = cluster
        .hearth()
        .json(&["image", "show", IMAGE, "--node", &Cluster::node_id(node)])?;
    let layer = info["layers"][0].as_str().context("no layer")?.to_owned();
    let mut found = Vec::new();
    let mut dirs = vec![cluster.store_dir(node)];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.to_string_lossy().contains(&layer) && path.ends_with("data") {
                found.push(path);
            }
        }
    }
    ensure!(found.len() == 1, "the data files of layer {layer}: {found:?}");
    found.pop().context("no data file")
}

/// One byte of a block in a node's data file.
fn byte(cluster: &Cluster, node: usize, block: u64) -> Result<u8> {
    let mut byte = [0];
    let file = std::fs::File::open(data(cluster, node)?)?;
    file.read_exact_at(&mut byte, block * BLOCK_BYTES + FLIPPED_AT)?;
    Ok(byte[0])
}

fn flip(cluster: &Cluster, node: usize, block: u64) -> Result<()> {
    let flipped = byte(cluster, node, block)? ^ 4;
    let file = OpenOptions::new().write(true).open(data(cluster, node)?)?;
    file.write_all_at(&[flipped], block * BLOCK_BYTES + FLIPPED_AT)?;
    file.sync_all()?;
    Ok(())
}

/// The events about copies, oldest first.
fn checked(cluster: &Cluster) -> Result<Vec<Value>> {
    let words = ["log", "list", "--since", "1", "--kind", "copies_checked"];
    wait::until("the log to have it", WITHIN, || {
        Ok(Some(cluster.hearth().json_lines(&words)?))
    })
}

#[test]
fn a_bit_that_flipped_on_a_disk_is_found_and_repaired_under_a_guest() -> Result<()> {
    let Some(cluster) = start(2, IMAGE_BYTES)? else {
        return Ok(());
    };
    let hearth = cluster.hearth();
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(300, WITHIN)?;

    // Writes in flight are no differences.
    for _ in 0..3 {
        let job = hearth.json(&["image", "scrub", IMAGE, "--check", "--rate", "1GiB"])?;
        ensure!(
            job["found"]["differing"] == 0 && job["found"]["blocks"] == IMAGE_BYTES / BLOCK_BYTES,
            "{job}"
        );
        load.wait_for(50, WITHIN)?;
    }
    let pattern = load.stop()?;

    // On the member's disk, and on that of the node that serves the guest.
    let written = |nth: usize| {
        let slots = pattern.iter().enumerate().filter(|(_, byte)| **byte != 0);
        slots
            .map(|(slot, _)| slot as u64)
            .nth(nth)
            .context("too little was written")
    };
    let (first, second) = (written(3)?, written(9)?);
    flip(&cluster, 1, first)?;
    flip(&cluster, 1, second)?;
    let bad = byte(&cluster, 1, first)?;
    let found = hearth.text(&["image", "scrub", IMAGE, "--check", "--rate", "1GiB"]);
    let text = format!("{:#}", found.err().context("differing copies were taken for equal")?);
    ensure!(text.contains("2 on node-2"), "{text}");
    ensure!(byte(&cluster, 1, first)? == bad, "--check wrote to a copy");
    let job = hearth.json(&["image", "scrub", IMAGE, "--rate", "1GiB"])?;
    let found = &job["found"];
    ensure!(
        found["differing"] == 2 && found["repaired"] == 2 && found["copies"]["node-2"] == 2,
        "{job}"
    );
    ensure!(found["named"] == serde_json::json!([first, second]), "{job}");
    for block in [first, second] {
        ensure!(
            byte(&cluster, 1, block)? == byte(&cluster, 0, block)?,
            "block {block} is not repaired"
        );
    }
    let again = hearth.json(&["image", "scrub", IMAGE, "--check", "--rate", "1GiB"])?;
    ensure!(again["found"]["differing"] == 0, "{again}");

    // Auditors see each.
    let events = checked(&cluster)?;
    ensure!(events.len() == 6, "{events:?}");
    let told = events[4].to_string();
    ensure!(told.contains("repaired") || told.contains("repair"), "{told}");
    load::verify(&cluster.socket(0), IMAGE, &pattern)?;
    hearth_tests::digests_agree(&cluster)
}

#[test]
fn named_blocks_are_written_anew_and_nobody_leaves_the_set() -> Result<()> {
    let Some(cluster) = start(2, IMAGE_BYTES)? else {
        return Ok(());
    };
    let hearth = cluster.hearth();
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(300, WITHIN)?;
    let before = hearth.json(&["image", "map", IMAGE])?;
    load.wait_for(50, WITHIN)?;

    // One block within the range and one behind it.
    let pattern_at = |slot: u64| -> Result<()> { flip(&cluster, 1, slot) };
    load.stop().and_then(|pattern| {
        let slots: Vec<u64> = (0..pattern.len() as u64)
            .filter(|slot| pattern[*slot as usize] != 0)
            .collect();
        let (within, behind) = (slots[1], slots[slots.len() - 1]);
        pattern_at(within)?;
        pattern_at(behind)?;
        let range = format!("{within}-{}", behind - 1);
        let job = hearth.json(&[
            "image", "sync", IMAGE, "--blocks", &range, "--node", "node-2", "--rate", "1GiB",
        ])?;
        ensure!(job["found"]["copies"]["node-2"] == behind - within, "{job}");
        ensure!(
            byte(&cluster, 1, within)? == byte(&cluster, 0, within)?,
            "block {within} is as it was"
        );
        ensure!(
            byte(&cluster, 1, behind)? != byte(&cluster, 0, behind)?,
            "block {behind} was not named"
        );
        hearth.text(&["image", "sync", IMAGE, "--rate", "1GiB"])?;
        let compared = hearth.json(&["image", "scrub", IMAGE, "--check", "--rate", "1GiB"])?;
        ensure!(compared["found"]["differing"] == 0, "{compared}");
        load::verify(&cluster.socket(0), IMAGE, &pattern)
    })?;
    ensure!(hearth.json(&["image", "map", IMAGE])? == before, "the set changed");
    let refused = hearth.text(&["image", "sync", IMAGE, "--node", "node-1"]);
    ensure!(refused.is_err(), "the copy that counts was to be written");
    let refused = hearth.text(&["image", "sync", IMAGE, "--blocks", "0-512"]);
    ensure!(refused.is_err(), "blocks past the image's end were taken");
    Ok(())
}

#[test]
fn a_join_stands_still_while_it_is_paused_and_its_jobs_are_known_everywhere() -> Result<()> {
    // Large enough that it takes much longer to copy than to pause.
    let Some(mut cluster) = start(3, 64 << 30)? else {
        return Ok(());
    };
    let hearth = cluster.hearth().clone();
    let map = || hearth.json(&["image", "map", IMAGE, "--blocks", "0-1"]);
    let before = map()?;
    let located = before["blocks"][1]["locations"].as_array().context("no locations")?;
    ensure!(
        located.len() == 2 && located.iter().all(|at| at["synced"] == true),
        "{before}"
    );
    let holds = |node: &str| located.iter().any(|at| at["node"] == node);
    let third = (0..3)
        .map(Cluster::node_id)
        .find(|node| !holds(node))
        .context("three members")?;

    let job = hearth.json(&["location", "add", IMAGE, &third, "--detach"])?;
    let job = job["id"].as_u64().context("a job without an id")?.to_string();
    let joins = |map: &Value| {
        let located = map["blocks"][1]["locations"].as_array();
        located.is_some_and(|all| all.iter().any(|at| at["node"] == *third && at["synced"] == false))
    };
    wait::until("the join to have begun", WITHIN, || Ok(joins(&map()?).then_some(())))?;
    hearth.text(&["job", "pause", &job])?;
    let done = || -> Result<u64> {
        let jobs = hearth.json(&["job", "list"])?;
        let jobs = jobs.as_array().context("no jobs")?;
        ensure!(jobs.len() == 1 && jobs[0]["state"] == "paused", "{jobs:?}");
        ensure!(jobs[0]["kind"] == "join" && jobs[0]["node"] == "node-1", "{jobs:?}");
        jobs[0]["done"].as_u64().context("no progress")
    };
    // What was under way ends; then nothing is copied, while the guest's writes go to the joining node.
    let mut last = done()?;
    wait::until("the copies under way to end", WITHIN, || {
        std::thread::sleep(Duration::from_millis(500));
        let now = done()?;
        let stands = now == last;
        last = now;
        Ok(stands.then_some(()))
    })?;
    let mut load = Load::start(&cluster.socket(0), IMAGE, 1 << 20)?;
    load.wait_for(100, WITHIN)?;
    let pattern = load.stop()?;
    ensure!(done()? == last, "a paused join copied on");
    ensure!(joins(&map()?), "a paused join is none any more");
    hearth.text(&["job", "resume", &job])?;
    wait::until("the join to go on", WITHIN, || {
        let job = hearth.json(&["job", "list"])?;
        Ok((job[0]["done"].as_u64() > Some(last)).then_some(()))
    })?;

    // The daemon dies: its job has ended with it, and says so.
    cluster.crash_and_restart_node(0)?;
    cluster.wait_ready()?;
    let ended = wait::until("the job's end to be known", WITHIN, || {
        let jobs = hearth.json(&["job", "list", "--all", "--node", "node-1"])?;
        Ok((jobs[0]["state"] == "failed").then_some(jobs))
    })?;
    let text = ended.to_string();
    ensure!(
        text.contains("the daemon ended") && text.contains("location add"),
        "{text}"
    );
    wait::until("the guest's disk to be back", WITHIN, || {
        Ok(load::verify(&cluster.socket(0), IMAGE, &pattern).is_ok().then_some(()))
    })
}
