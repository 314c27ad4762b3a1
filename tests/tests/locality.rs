//! An image with replicas is served on a node that holds none of it, and a replica follows; every byte is checked.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::load::{self, Load};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(90);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 32 << 20;

/// Three nodes and an image on two of them, served by the first; and the indexes of the other member and of the third node.
fn start() -> Result<Option<(Cluster, usize, usize)>> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(None);
    }
    let spec = ClusterSpec {
        nodes: 3,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(None);
    };
    let (hearth, owner) = (cluster.hearth(), Cluster::node_id(0));
    let size = IMAGE_BYTES.to_string();
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", &owner])?;
    hearth.text(&["image", "attach", IMAGE, "--node", &owner])?;
    let members = members(&cluster, 0)?;
    let other = (1..3).find(|index| members.contains(&Cluster::node_id(*index)));
    let other = other.context("no other member")?;
    Ok(Some((cluster, other, 3 - other)))
}

/// The nodes that hold some of the image, in sync or not, as a node says.
fn members(cluster: &Cluster, index: usize) -> Result<BTreeSet<String>> {
    let node = Cluster::node_id(index);
    let runs = cluster.hearth().json(&["location", "list", IMAGE, "--node", &node])?;
    let runs = runs.as_array().context("no runs")?;
    let names = |run: &Value, field: &str| -> Vec<String> {
        let nodes = run[field].as_array().into_iter().flatten();
        nodes.filter_map(|node| Some(node.as_str()?.to_owned())).collect()
    };
    Ok(runs
        .iter()
        .flat_map(|run| [names(run, "members"), names(run, "joiners")].concat())
        .collect())
}

#[test]
fn a_guest_starts_where_its_disk_is_not_and_a_replica_follows_while_it_writes() -> Result<()> {
    let Some((cluster, other, third)) = start()? else {
        return Ok(());
    };
    let hearth = cluster.hearth();
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(300, WITHIN)?;
    let pattern = load.stop()?;
    hearth.text(&["image", "detach", IMAGE])?;
    let node = Cluster::node_id(third);
    hearth.text(&["image", "attach", IMAGE, "--node", &node])?;
    let shown = hearth.text(&["image", "show", IMAGE, "--node", &node])?;
    ensure!(
        !members(&cluster, third)?.contains(&node),
        "it is no member yet: {shown}"
    );
    // Everything is read from the other nodes, and every write goes to them.
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    hearth
        .text(&["image", "prewarm", IMAGE, "--node", &node])
        .expect_err("there is nothing here to read into RAM");
    let mut load = Load::over(&cluster.socket(third), IMAGE, pattern)?;
    load.wait_for(100, WITHIN)?;
    let moved = wait::until("a replica to follow", WITHIN, || {
        load.check()?;
        let members = members(&cluster, third)?;
        Ok((members.contains(&node) && members.len() == 2).then_some(members))
    })?;
    load.wait_for(100, WITHIN)?;
    let pattern = load.stop()?;
    let why = hearth.text(&["why", &format!("{IMAGE}:0")])?;
    for words in ["locality/replicate", "move/drop"] {
        ensure!(why.contains(words), "{words:?} is not in: {why}");
    }
    let left = if moved.contains(&Cluster::node_id(0)) { other } else { 0 };
    wait::until("the old copy to be gone", WITHIN, || {
        let images = hearth.json(&["image", "list", "--node", &Cluster::node_id(left)])?;
        Ok(images.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    // What followed is a copy of its own.
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    hearth.text(&["image", "detach", IMAGE, "--node", &node])?;
    hearth.text(&["image", "attach", IMAGE, "--node", &node])?;
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    hearth_tests::digests_agree(&cluster)?;
    Ok(())
}

#[test]
fn a_node_without_a_copy_is_handed_an_image_takes_one_over_and_leaves_nothing_behind() -> Result<()> {
    let Some((cluster, _, third)) = start()? else {
        return Ok(());
    };
    let hearth = cluster.hearth();
    let node = Cluster::node_id(third);
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(300, WITHIN)?;
    let pattern = load.stop()?;
    // It waits for a hand-over, which does not come: detached again, it keeps nothing.
    hearth.text(&["image", "attach", IMAGE, "--node", &node, "--incoming"])?;
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    hearth.text(&["image", "detach", IMAGE, "--node", &node])?;
    let here = || hearth.json(&["image", "list", "--node", &node]);
    wait::until("the empty store to be gone", WITHIN, || {
        Ok(here()?.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    hearth
        .text(&["image", "attach", IMAGE, "--node", &node])
        .expect_err("it is attached elsewhere");
    ensure!(
        here()?.as_array().is_some_and(Vec::is_empty),
        "a refused attach left a store"
    );
    // Now it comes.
    hearth.text(&["image", "attach", IMAGE, "--node", &node, "--incoming"])?;
    hearth.text(&["image", "hand-over", IMAGE, "--to", &node])?;
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    let mut load = Load::over(&cluster.socket(third), IMAGE, pattern)?;
    load.wait_for(100, WITHIN)?;
    let pattern = load.stop()?;
    hearth.text(&["image", "detach", IMAGE, "--node", &node])?;
    let owner = Cluster::node_id(0);
    hearth.text(&["image", "attach", IMAGE, "--node", &owner])?;
    load::verify(&cluster.socket(0), IMAGE, &pattern)?;
    Ok(())
}

#[test]
fn a_node_without_a_copy_takes_over_what_a_dead_node_served() -> Result<()> {
    let Some((mut cluster, _, third)) = start()? else {
        return Ok(());
    };
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(300, WITHIN)?;
    let pattern = load.stop()?;
    cluster.node(0).kill()?;
    let node = Cluster::node_id(third);
    let hearth = cluster.hearth();
    hearth.text(&["image", "attach", IMAGE, "--node", &node, "--takeover"])?;
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    // One copy is left, elsewhere: the next one is made where the guest is.
    let mut load = Load::over(&cluster.socket(third), IMAGE, pattern)?;
    wait::until("a copy where the guest is", 2 * WITHIN, || {
        load.check()?;
        let runs = hearth.json(&["location", "list", IMAGE, "--node", &node])?;
        let members = runs[0]["members"].to_string();
        Ok((members.contains(&node) && members.matches("node-").count() == 2).then_some(()))
    })?;
    let pattern = load.stop()?;
    load::verify(&cluster.socket(third), IMAGE, &pattern)?;
    Ok(())
}
