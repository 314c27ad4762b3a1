//! What the end-to-end tests in `tests/` share: skipping with a reason, load from stock clients, and limits that the
//! kernel holds processes to. The cluster that they start is [`xtask::cluster`], the same as the demo's.

pub mod fio;
pub mod load;
pub mod memory;

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
