//! The scheduler's pure core: [`State::apply`] folds an event of the log into the state, [`State::decide`] turns the
//! state into commands.
//!
//! It knows no clock (time is a field of `Ticked`), no randomness (ids are hashes of what they name), no hash order,
//! no floats, no threads and no I/O: one log gives one state and one list of decisions on every machine. `clippy.toml`
//! beside this crate's manifest bans what would break that.
//!
//! Where things are: [`State`] and its fold in `state`, per-block heat and places in `blocks`, integer decay in
//! `decay`, images and layers in `catalog`, commands in flight in `orders`, where new replicas go in `place`, what
//! operators said of nodes in `marks`, what repair remembers in `repairs`, what moves of replicas leave behind in `moves`, whether a node may stop in `stop`, what moves and
//! why in [`policy`], what people see in [`view()`], re-derivation in
//! [`replay`], explanations in [`why`].

#![deny(clippy::float_arithmetic)]

// The simulated cluster of the tests names this crate from outside and from inside.
#[cfg(test)]
extern crate self as scheduler_core;

mod audit;
mod blocks;
mod catalog;
mod decay;
mod digest;
#[cfg(test)]
mod laws;
mod marks;
mod moves;
pub mod mutants;
mod orders;
mod place;
pub mod policy;
mod repairs;
pub mod replay;
mod state;
mod stop;
mod view;
pub mod why;

pub use blocks::REST_TICKS;
pub use digest::{DigestBook, DigestCheck};
pub use orders::COMMAND_TICKS;
pub use place::{Misfit, place};
pub use state::{Applied, DIGEST_EVERY_TICKS, Judged, State, TRACKED_BLOCKS_MAX, TRACKED_BLOCKS_PER_NODE_MAX};
pub use stop::ok_to_stop;
pub use view::{image_heat, view};
