//! What the end-to-end tests in `tests/` share: skipping with a reason, load from stock clients, and limits that the
//! kernel holds processes to. The cluster that they start is [`xtask::cluster`], the same as the demo's.

use anyhow::Result;
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
