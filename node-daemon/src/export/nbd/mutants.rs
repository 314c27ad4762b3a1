//! Switches that break a bound of the server, so that tests can show that they would notice. Constant in production
//! builds.

#[cfg(not(feature = "mutants"))]
use crate::tier::mutants::Off as Switch;
#[cfg(feature = "mutants")]
use std::sync::atomic::AtomicBool as Switch;

#[cfg(not(feature = "mutants"))]
const OFF: Switch = Switch;
#[cfg(feature = "mutants")]
const OFF: Switch = Switch::new(false);

/// Requests over the payload limit are carried out.
pub static OVERSIZE_TAKEN: Switch = OFF;
/// Connections are taken however many there are, of one image and in all.
pub static CONNECTIONS_UNCOUNTED: Switch = OFF;
/// Replies and payloads are held whatever memory they take.
pub static MEMORY_UNCOUNTED: Switch = OFF;
