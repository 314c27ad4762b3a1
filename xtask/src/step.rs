//! Progress for people: every step prints what it does and how long it took, on stderr or, while a dashboard has the
//! terminal, into a file.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// From now on progress goes to a file; to stderr again with `None`.
///
/// # Errors
/// The file cannot be made.
pub fn send_to(path: Option<&Path>) -> Result<()> {
    let open = |path: &Path| File::create(path).with_context(|| format!("cannot make {}", path.display()));
    let file = path.map(open).transpose()?;
    if let Ok(mut current) = FILE.lock() {
        *current = file;
    }
    Ok(())
}

/// Writes one line of progress. Progress that cannot be written must not stop the work.
pub fn say(text: &str) {
    match FILE.lock() {
        Ok(mut current) => match current.as_mut() {
            Some(file) => drop(writeln!(file, "{text}")),
            None => eprintln!("{text}"),
        },
        Err(_) => eprintln!("{text}"),
    }
}

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
    say(&format!("    {}", text.as_ref()));
}

/// Runs one step; prints its name before it, a sign of life each minute, and its duration after it.
///
/// # Errors
/// Those of the step.
pub fn step<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    say(&format!("==> {what}"));
    let start = Instant::now();
    let (done, alive) = channel::<()>();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || {
            while alive.recv_timeout(Duration::from_secs(HEARTBEAT_S)) == Err(RecvTimeoutError::Timeout) {
                say(&format!("    ... {what}: {} so far", seconds(start.elapsed())));
            }
        });
        let result = body();
        drop(done);
        result
    });
    let verdict = if result.is_ok() { "done" } else { "FAILED" };
    say(&format!("    {verdict}: {what} ({})", seconds(start.elapsed())));
    result
}
