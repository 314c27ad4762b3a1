//! Replicas on real nodes are moved while the guest writes: a drain empties a node, the number of replicas is set, and
//! every byte that was acknowledged is on what is left.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::load::{self, Load};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 32 << 20;

/// Exit code of what a safety rule refuses.
const REFUSED: i32 = 5;

/// The nodes that hold some of the image in sync, as a node says; none while one is being synced.
fn members(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let runs = cluster.hearth().json(&["location", "list", IMAGE, "--node", node])?;
    let runs = runs.as_array().context("no runs")?;
    let names = |run: &Value, field: &str| -> Vec<String> {
        let nodes = run[field].as_array().into_iter().flatten();
        nodes.filter_map(|node| Some(node.as_str()?.to_owned())).collect()
    };
    if runs.iter().any(|run| !names(run, "joiners").is_empty()) {
        return Ok(Vec::new());
    }
    let all: BTreeSet<String> = runs.iter().flat_map(|run| names(run, "members")).collect();
    Ok(all.into_iter().collect())
}

fn wait_for_members(
    cluster: &Cluster,
    owner: &str,
    what: &str,
    expect: impl Fn(&[String]) -> bool,
) -> Result<Vec<String>> {
    wait::until(what, WITHIN, || {
        let members = members(cluster, owner)?;
        Ok(expect(&members).then_some(members))
    })
}

#[test]
fn a_drained_node_is_emptied_while_the_guest_writes_and_the_number_of_replicas_can_change() -> Result<()> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(());
    }
    let spec = ClusterSpec {
        nodes: 3,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let (hearth, owner) = (cluster.hearth(), Cluster::node_id(0));
    let size = IMAGE_BYTES.to_string();
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", &owner])?;
    hearth.text(&["image", "attach", IMAGE, "--node", &owner])?;
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(200, WITHIN)?;
    let before = members(&cluster, &owner)?;
    let old = before
        .iter()
        .find(|node| **node != owner)
        .context("no other member")?
        .clone();

    // The owner's node cannot stop, nor can the other one: each for its own reason.
    let stop = |node: &str| -> Result<(i32, Value)> {
        let output = hearth.command(&["node", "ok-to-stop", node, "-o", "json"]).output()?;
        let answer = serde_json::from_slice(&output.stdout).context("ok-to-stop printed no JSON")?;
        Ok((output.status.code().context("ended by a signal")?, answer))
    };
    let (code, answer) = stop(&owner)?;
    ensure!(
        code == REFUSED && answer["images"][0]["harm"] == "stalled",
        "{code}: {answer}"
    );
    let (code, answer) = stop(&old)?;
    ensure!(
        code == REFUSED && answer["images"][0]["harm"] == "degraded",
        "{code}: {answer}"
    );

    // Drained: the replica is elsewhere, the guest goes on, and the node may stop.
    hearth.text(&["node", "drain", &old, "--reason", "a new disk"])?;
    hearth.text(&["node", "drain", &old])?;
    let after = wait_for_members(&cluster, &owner, "the replica to have moved", |members| {
        members.len() == 2 && !members.contains(&old)
    })?;
    load.wait_for(200, WITHIN)?;
    wait::until("the drained node to be free", WITHIN, || {
        let (code, answer) = stop(&old)?;
        Ok((code == 0).then_some(answer))
    })?;
    let refused = hearth.text(&["image", "create", "appl/vm-2", &size, "--node", &old]);
    ensure!(refused.is_err(), "a draining node took a new image");
    let refused = hearth.text(&["location", "add", IMAGE, &old]);
    ensure!(refused.is_err(), "a draining node took a replica");

    // More replicas at once where there is a node, and fewer again.
    hearth.text(&["node", "undrain", &old])?;
    hearth.text(&["image", "set", IMAGE, "--replicas", "3"])?;
    wait_for_members(&cluster, &owner, "three replicas", |members| members.len() == 3)?;
    hearth.text(&["image", "set", IMAGE, "--replicas", "2"])?;
    let last = wait_for_members(&cluster, &owner, "two replicas", |members| members.len() == 2)?;
    ensure!(last.contains(&owner), "the owner's copy went: {last:?}");

    // Everything acknowledged is on the copy that is left, without the owner.
    load.wait_for(100, WITHIN)?;
    let pattern = load.stop()?;
    let other = last.iter().find(|node| **node != owner).context("no other member")?;
    let at = (0..3)
        .find(|n| Cluster::node_id(*n) == *other)
        .context("an unknown node")?;
    hearth.text(&["image", "detach", IMAGE])?;
    hearth.text(&["image", "attach", IMAGE, "--node", other])?;
    load::verify(&cluster.socket(at), IMAGE, &pattern)?;

    let why = hearth.text(&["why", &format!("{IMAGE}:0")])?;
    for words in [
        "which is to replace the one on",
        "the replica on",
        "drain/replicate",
        "move/drop",
        "fewer/drop",
    ] {
        ensure!(why.contains(words), "{words:?} is not in: {why}");
    }
    ensure!(after.contains(&owner));
    hearth_tests::digests_agree(&cluster)?;
    Ok(())
}

#[test]
fn a_join_that_is_cancelled_leaves_nothing_behind() -> Result<()> {
    let spec = ClusterSpec {
        nodes: 3,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let (hearth, owner) = (cluster.hearth(), Cluster::node_id(0));
    // Large enough that it takes much longer to copy than to cancel.
    hearth.text(&["image", "create", IMAGE, "64GiB", "--replicas", "2", "--node", &owner])?;
    hearth.text(&["image", "attach", IMAGE, "--node", &owner])?;
    let before = members(&cluster, &owner)?;
    let ids = (0..3).map(Cluster::node_id);
    let third = ids
        .into_iter()
        .find(|id| !before.contains(id))
        .context("three members")?;
    let job = hearth.json(&["location", "add", IMAGE, &third, "--detach"])?;
    let job = job["id"].as_u64().context("a job without an id")?.to_string();
    wait::until("the join to have begun", WITHIN, || {
        let runs = hearth.json(&["location", "list", IMAGE, "--node", &owner])?;
        Ok(runs.to_string().contains(&third).then_some(()))
    })?;
    hearth.text(&["job", "cancel", &job, "--node", &owner])?;
    ensure!(members(&cluster, &owner)? == before, "the set is as it was");
    wait::until("the half copy to be gone", WITHIN, || {
        let images = hearth.json(&["image", "list", "--node", &third])?;
        Ok(images.as_array().is_some_and(Vec::is_empty).then_some(()))
    })?;
    // Nothing is in the way of another one, of some blocks.
    hearth.text(&["location", "add", IMAGE, &third, "--blocks", "0-63"])?;
    ensure!(members(&cluster, &owner)?.contains(&third));
    Ok(())
}
