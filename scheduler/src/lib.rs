//! The scheduler's shell: the event log, and the loop that fetches, logs, applies, decides and publishes.
//!
//! It makes no choice of its own: those are in `scheduler-core`. It knows no NATS either: that is `hearth-bus`.
//! Invariant: what is folded is in the log, and what is in the log is on stable storage.

pub mod config;
mod heat;
pub mod ingest;
mod keeper;
mod leader;
pub mod log;
pub mod replica;
pub mod run;
pub mod snapshot;
pub mod verify;

use tokio::signal::unix::{SignalKind, signal};

/// Resolves at SIGTERM or SIGINT.
///
/// # Panics
/// If the process cannot listen to signals.
pub async fn stop_signal() {
    let mut terminate = signal(SignalKind::terminate()).expect("a process can listen to SIGTERM");
    let mut interrupt = signal(SignalKind::interrupt()).expect("a process can listen to SIGINT");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
