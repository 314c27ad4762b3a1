//! The probes on the real kernel. Needs root; says why it skips, and fails then where `REQUIRE_E2E=1`.

mod cost;
mod device;
mod truth;

/// Says why a test cannot run here, which fails where everything has to run.
fn skip(reason: impl std::fmt::Display) {
    assert!(
        !std::env::var("REQUIRE_E2E").is_ok_and(|value| value == "1"),
        "REQUIRE_E2E=1, but: {reason}"
    );
    println!("SKIP: {reason}");
}
