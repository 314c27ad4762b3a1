//! The scheduler's shell: the event log, the bus, and the loop that fetches, logs, applies, decides and publishes.
//!
//! It makes no choice of its own: those are in `scheduler-core`.

pub mod bus;
pub mod log;
