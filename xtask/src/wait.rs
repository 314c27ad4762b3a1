//! Waiting for conditions, and noticing Ctrl-C while waiting.
//!
//! Nothing here waits for time to pass: every wait has a condition, a deadline, and an error that says what was
//! missing when the deadline came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

/// Milliseconds between two looks at a condition.
const LOOK_EVERY_MS: u64 = 50;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupted(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// From now on Ctrl-C and SIGTERM end waits with an error instead of the process, so that everything started is
/// ended in order. A second Ctrl-C during that changes nothing.
pub fn catch_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe, and lives as long as the program.
        unsafe { libc::signal(signal, interrupted as *const () as libc::sighandler_t) };
    }
}

/// Fails after Ctrl-C.
///
/// # Errors
/// The user wants to stop.
pub fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    Ok(())
}

/// Looks until `look` yields something. `look` may fail as long as it likes; the last failure is in the error.
///
/// # Errors
/// The deadline came, or Ctrl-C.
pub fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        check_interrupted()?;
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= within {
            let waited = format!("waited {} s for {what}", within.as_secs());
            return Err(match last {
                Some(error) => error.context(waited),
                None => anyhow!("{waited}"),
            });
        }
        std::thread::sleep(Duration::from_millis(LOOK_EVERY_MS));
    }
}
