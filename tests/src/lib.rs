//! What the end-to-end tests in `tests/` share: skipping with a reason, load from stock clients, and limits that the
//! kernel holds processes to. The cluster that they start is [`xtask::cluster`], the same as the demo's.

use anyhow::{Context, Result, ensure};
use xtask::cluster::{Cluster, ClusterSpec, Programs};
use xtask::process;

pub mod clients;
pub mod faults;
pub mod fio;
pub mod load;
pub mod memory;
pub mod nbd;
pub mod netns;
pub mod store_disk;
pub mod trial;

/// Starts a cluster, or says why there can be none here.
///
/// # Errors
/// A part does not come up.
pub fn cluster(spec: &ClusterSpec) -> Result<Option<Cluster>> {
    or_skip(Programs::for_tests())
        .map(|programs| Cluster::start(programs, spec))
        .transpose()
}

/// Makes an image on the first node and attaches it to the socket; returns its export's name.
///
/// # Errors
/// The node refuses.
pub fn attached(cluster: &Cluster, image: &str, bytes: u64) -> Result<String> {
    let hearth = cluster.hearth();
    let node = Cluster::node_id(0);
    hearth.text(&["image", "create", image, "--size", &bytes.to_string(), "--node", &node])?;
    let info = hearth.json(&["image", "attach", image])?;
    let export = info["attached"]["export"].as_str();
    Ok(export.context("attached without an export name")?.to_owned())
}

/// What a test needs of this machine, or `None` after saying why it cannot run here.
pub fn or_skip<T>(needed: Result<T>) -> Option<T> {
    needed.map_err(|error| skip(&format!("{error:#}"))).ok()
}

/// Whether all of these stock clients are installed; says which is not.
pub fn have(tools: &[&str]) -> bool {
    let missing = tools
        .iter()
        .find(|tool| !process::succeeds(process::stock(tool).arg("--version")));
    if let Some(tool) = missing {
        skip(&format!(
            "{tool} is not installed (Debian: qemu-utils, libnbd-bin, python3-libnbd)"
        ));
    }
    missing.is_none()
}

/// Checks that the log verifies, and that the scheduler's state and a replay from nothing agree at the position that
/// the scheduler has reached.
///
/// # Errors
/// What differs.
pub fn digests_agree(cluster: &Cluster) -> Result<()> {
    let hearth = cluster.hearth();
    hearth.text(&["log", "verify"])?;
    let view = hearth.json(&["status"])?;
    let (seq, digest) = (view["seq"].as_u64().context("no position")?, &view["digest"]);
    let replayed = hearth.json(&["replay", "--at", &seq.to_string()])?;
    ensure!(
        &replayed["state_digest"] == digest,
        "at {seq} the scheduler has {digest}, a replay {}",
        replayed["state_digest"]
    );
    ensure!(replayed["differences"] == 0, "decisions or digests differ: {replayed}");
    Ok(())
}

/// Says why a test cannot run here. With `REQUIRE_E2E=1` that is a failure.
///
/// # Panics
/// If `REQUIRE_E2E=1`.
pub fn skip(reason: &str) {
    eprintln!("SKIP: {reason}");
    assert!(
        !xtask::setup::strict(),
        "REQUIRE_E2E=1, but this test cannot run: {reason}"
    );
}
