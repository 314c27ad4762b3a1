//! What the probes' tests on the real kernel share: devices, and a generator that knows exactly what it submitted.

pub mod device;
pub mod generator;

/// Says why a test cannot run here, which fails where everything has to run.
pub fn skip(reason: impl std::fmt::Display) {
    assert!(
        !std::env::var("REQUIRE_E2E").is_ok_and(|value| value == "1"),
        "REQUIRE_E2E=1, but: {reason}"
    );
    println!("SKIP: {reason}");
}
