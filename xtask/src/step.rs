//! Progress for people: every step prints what it does and how long it took, on stderr.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Result;

/// Seconds between signs of life of a step that prints nothing itself.
const HEARTBEAT_S: u64 = 60;

/// Seconds for people: one digit under ten minutes, minutes above.
pub fn seconds(elapsed: Duration) -> String {
    let s = elapsed.as_secs_f64();
    if s < 600.0 {
        format!("{s:.1} s")
    } else {
        format!("{} min {:02} s", elapsed.as_secs() / 60, elapsed.as_secs() % 60)
    }
}

/// Prints one line about what goes on.
pub fn note(text: impl AsRef<str>) {
    eprintln!("    {}", text.as_ref());
}

/// Runs one step; prints its name before it, a sign of life each minute, and its duration after it.
///
/// # Errors
/// Those of the step.
pub fn step<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let (done, alive) = channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while alive.recv_timeout(Duration::from_secs(HEARTBEAT_S)) == Err(RecvTimeoutError::Timeout) {
                eprintln!("    ... {what}: {} so far", seconds(start.elapsed()));
            }
        });
        let result = body();
        drop(done);
        result
    });
    let verdict = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!("    {verdict}: {what} ({})", seconds(start.elapsed()));
    result
}
