//! What the end-to-end tests in `tests/` share: skipping with a reason, load from stock clients, and limits that the
//! kernel holds processes to. The cluster that they start is [`xtask::cluster`], the same as the demo's.

use anyhow::{Context, Result, ensure};
use xtask::cluster::{Cluster, ClusterSpec, Programs};

pub mod fio;
pub mod load;
pub mod memory;

/// Starts a cluster, or says why there can be none here.
///
/// # Errors
/// A part does not come up.
pub fn cluster(spec: &ClusterSpec) -> Result<Option<Cluster>> {
    match Programs::for_tests() {
        Ok(programs) => Cluster::start(programs, spec).map(Some),
        Err(error) => {
            skip(&format!("{error:#}"));
            Ok(None)
        }
    }
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
