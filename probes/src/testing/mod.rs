//! For tests of this crate and of crates above it: I/O with an exact log of it, and windows added up, so that both can
//! be compared. Not for the daemon: it is there only with the feature `testing`.

mod exact;
mod generator;
mod windows;

pub use exact::{KIB, MIB, NamedLoads, Target, check, loads};
pub use generator::{Counts, Load, Log, Order, Request, run};
pub use windows::{DRAIN_EVERY, Seen, Sum, check_counts, drain_during, drain_every};
