//! Images with replicas on real nodes: a member dies and comes back while the guest writes, and when the owner dies its
//! image goes on elsewhere, with every byte that was acknowledged.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hearth_tests::load::{self, Load};
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 32 << 20;

fn start() -> Result<Option<Cluster>> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(None);
    }
    hearth_tests::cluster(&ClusterSpec {
        nodes: 2,
        heat: "export",
        ..ClusterSpec::default()
    })
}

/// Makes an image with two replicas and attaches it on the first node.
fn attach(cluster: &Cluster) -> Result<()> {
    let hearth = cluster.hearth();
    let size = IMAGE_BYTES.to_string();
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", "node-1"])?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
    Ok(())
}

/// Has a node hold the image again, unless the repair policy came before.
fn back_in_sync(cluster: &Cluster, owner: &str, node: &str) -> Result<()> {
    wait::until("both nodes to be in sync", WITHIN, || {
        if members(cluster, owner)?.len() == 2 {
            return Ok(Some(()));
        }
        let added = cluster.hearth().text(&["location", "add", IMAGE, node]);
        Ok(added.is_ok().then_some(()))
    })
}

/// The nodes that are in sync, as a node says.
fn members(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let runs = cluster.hearth().json(&["location", "list", IMAGE, "--node", node])?;
    let members = runs[0]["members"].as_array().context("no members")?;
    Ok(members.iter().filter_map(|m| Some(m.as_str()?.to_owned())).collect())
}

#[test]
fn a_member_dies_and_comes_back_and_then_takes_over_from_the_owner() -> Result<()> {
    let Some(mut cluster) = start()? else { return Ok(()) };
    attach(&cluster)?;
    let (owner, other) = (Cluster::node_id(0), 1);
    let member = Cluster::node_id(other);
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(200, WITHIN)?;

    // The member dies: the guest waits for the smaller set and goes on.
    cluster.node(other).kill()?;
    let died = Instant::now();
    load.wait_for(200, WITHIN)?;
    eprintln!("the guest went on within {:?} of the member's death", died.elapsed());
    ensure!(members(&cluster, &owner)? == std::slice::from_ref(&owner));

    // It comes back, without what it missed, and gets it.
    cluster.crash_and_restart_node(other)?;
    cluster.wait_ready()?;
    back_in_sync(&cluster, &owner, &member)?;
    ensure!(members(&cluster, &owner)?.len() == 2);
    load.wait_for(200, WITHIN)?;
    let pattern = load.stop()?;

    // The owner dies: the member takes over what was acknowledged.
    cluster.node(0).kill()?;
    let died = Instant::now();
    let taken = cluster.hearth().text(&["image", "attach", IMAGE, "--node", &member]);
    ensure!(
        taken.is_err(),
        "an image that another node owns was attached without --takeover"
    );
    cluster
        .hearth()
        .text(&["image", "attach", IMAGE, "--node", &member, "--takeover"])?;
    eprintln!("taken over within {:?} of the owner's death", died.elapsed());
    load::verify(&cluster.socket(other), IMAGE, &pattern)?;

    // What comes back serves nothing old.
    cluster.crash_and_restart_node(0)?;
    cluster.wait_ready()?;
    let info = cluster.hearth().json(&["image", "show", IMAGE, "--node", &owner])?;
    ensure!(info["attached"].is_null(), "the old owner serves the image: {info}");
    back_in_sync(&cluster, &member, &owner)?;

    // Handed over while it is served, and then detached in order.
    let hearth = cluster.hearth();
    hearth.text(&["image", "attach", IMAGE, "--node", &owner, "--incoming"])?;
    load::verify(&cluster.socket(0), IMAGE, &pattern)?;
    hearth.text(&["image", "hand-over", IMAGE, "--to", &owner])?;
    load::verify(&cluster.socket(0), IMAGE, &pattern)?;
    hearth.text(&["image", "detach", IMAGE])?;
    hearth.text(&["image", "attach", IMAGE, "--node", &member])?;
    load::verify(&cluster.socket(other), IMAGE, &pattern)?;
    hearth_tests::digests_agree(&cluster)?;
    Ok(())
}

/// A machine that shuts down stops its daemons in any order, and does not wait for them.
#[test]
fn nodes_stop_while_others_are_gone_and_a_guest_writes() -> Result<()> {
    let Some(mut cluster) = start()? else { return Ok(()) };
    attach(&cluster)?;
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(50, WITHIN)?;
    cluster.node(1).stop()?;
    cluster.node(0).stop()
}
