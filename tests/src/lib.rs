//! What the end-to-end tests in `tests/` share: skipping with a reason, and load from stock clients. The cluster that
//! they start is [`xtask::cluster`], the same as the demo's.

pub mod load;

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
