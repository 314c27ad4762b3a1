//! Faults of nodes, networks and the control plane, on real processes in network namespaces, while clients that know
//! every byte read and write an image with replicas, and fio verifies what it writes to another one.

use anyhow::{Result, ensure};
use hearth_tests::faults::{MEMBER, OWNER};
use hearth_tests::fio::{Target, Verifying};
use hearth_tests::trial::{IMAGE, Trial, TrialSpec};
use xtask::cluster::Cluster;

const SPEC: TrialSpec = TrialSpec {
    replicas: 2,
    image_bytes: 16 << 20,
    disk_bytes: None,
};
/// What fio writes and verifies, with a copy on every node.
const FIO_IMAGE: &str = "appl/vm-2";
const FIO_BYTES: u64 = 4 << 20;

#[test]
fn an_image_feels_nothing_of_what_happens_to_a_member() -> Result<()> {
    if !hearth_tests::have(&["fio"]) {
        return Ok(());
    }
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    let hearth = trial.cluster.hearth();
    let size = FIO_BYTES.to_string();
    hearth.text(&[
        "image",
        "create",
        FIO_IMAGE,
        &size,
        "--replicas",
        "3",
        "--node",
        "node-1",
    ])?;
    hearth.text(&["image", "attach", FIO_IMAGE, "--node", "node-1"])?;
    let target = Target::Nbd {
        socket: trial.cluster.socket(trial.owner),
        export: FIO_IMAGE.to_owned(),
    };
    let fio = Verifying::start(target, FIO_BYTES);
    trial.suffer(MEMBER)?;
    ensure!(
        trial.clients.seen().refused.is_empty(),
        "a healthy image answered errors"
    );
    eprintln!("fio verified {} passes over {FIO_IMAGE}", fio.stop()?);
    trial.end()
}

#[test]
fn an_owner_that_comes_back_late_serves_nothing() -> Result<()> {
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    trial.suffer(OWNER)?;
    let owner = Cluster::node_id(trial.owner);
    eprintln!("{IMAGE} ends on {owner}");
    trial.end()
}
