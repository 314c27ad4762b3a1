//! Scheduler, nats-server and node daemon crash in every order under load: the system carries on, the client on the
//! socket export sees no error, the log is contiguous, and the state equals a replay from nothing.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::digests_agree;
use hearth_tests::load::Load;
use xtask::cluster::{Cluster, ClusterSpec};

const WITHIN: Duration = Duration::from_secs(90);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 32 << 20;

#[derive(Debug, Clone, Copy)]
enum Part {
    Nats,
    Scheduler,
    Node,
}

const ORDERS: [[Part; 3]; 6] = {
    use Part::{Nats, Node, Scheduler};
    [
        [Nats, Scheduler, Node],
        [Nats, Node, Scheduler],
        [Scheduler, Nats, Node],
        [Scheduler, Node, Nats],
        [Node, Nats, Scheduler],
        [Node, Scheduler, Nats],
    ]
};

fn start() -> Result<Option<Cluster>> {
    hearth_tests::cluster(&ClusterSpec {
        heat: "export",
        ..ClusterSpec::default()
    })
}

/// Makes an image, attaches it to the socket, and starts load on it.
fn start_load(cluster: &Cluster) -> Result<Load> {
    let export = hearth_tests::attached(cluster, IMAGE, IMAGE_BYTES)?;
    Load::start(&cluster.socket(0), &export, IMAGE_BYTES)
}

#[test]
fn every_part_may_crash_in_any_order_under_load() -> Result<()> {
    let Some(mut cluster) = start()? else { return Ok(()) };
    let mut load = start_load(&cluster)?;
    load.wait_for(100, WITHIN)?;
    for order in ORDERS {
        for part in order {
            match part {
                Part::Nats => cluster.nats().crash_and_restart()?,
                Part::Scheduler => cluster.crash_and_restart_scheduler()?,
                Part::Node => cluster.crash_and_restart_node(0)?,
            }
        }
        cluster
            .wait_ready()
            .with_context(|| format!("after crashes in the order {order:?}"))?;
        load.wait_for(100, WITHIN)
            .with_context(|| format!("after crashes in the order {order:?}"))?;
    }
    digests_agree(&cluster)?;
    load.stop()?;
    Ok(())
}

#[test]
fn a_scheduler_with_an_empty_directory_refills_to_the_same_state() -> Result<()> {
    let Some(mut cluster) = start()? else { return Ok(()) };
    let mut load = start_load(&cluster)?;
    load.wait_for(100, WITHIN)?;
    cluster.wait_ready()?;
    let view = cluster.view()?;
    let (seq, digest) = (view["seq"].as_u64().context("no position")?, view["digest"].clone());

    cluster.stop_scheduler()?;
    std::fs::remove_dir_all(cluster.scheduler_dir())?;
    cluster.start_scheduler()?;
    cluster.wait_ready()?;
    let dir = cluster.scheduler_dir();
    let dir = dir.to_str().context("the scheduler's folder is not UTF-8")?;
    let again = cluster
        .hearth()
        .json(&["replay", "--at", &seq.to_string(), "--log-dir", dir])?;
    ensure!(
        again["state_digest"] == digest,
        "at {seq} it was {digest}, refilled it is {}",
        again["state_digest"]
    );
    digests_agree(&cluster)?;
    load.stop()?;
    Ok(())
}
