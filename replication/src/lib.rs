//! The protocol of replicated images: who may write, which nodes hold every acknowledged write, and how both change.
//!
//! Pure state machines. Each takes an input and, where durations matter, the reading of the node's boot-time clock, and
//! returns outputs: requests to members, records to persist, changes to publish, answers. It knows no clock, no network,
//! no disk, no randomness and no hash order; bytes stay with whoever drives it. `clippy.toml` beside this crate's manifest
//! bans what would break that.
//!
//! Where things are: the words of requests in [`request`], one replica and its fence in [`member`], the writer with its
//! read leases and set changes in [`owner`], its resync of a joining node in [`resync`], how another node becomes the
//! writer in [`takeover`], live migration in [`handover`], all of it for one image on one node in [`session`], durations in
//! [`time`]. What is durable and how two records
//! compare is [`hearth_protocol::record`], which changes count [`hearth_protocol::aggregate`].
//!
//! The invariants are those of the rules that keep data safe; `tests/model` explores these machines against them. What
//! that found, and which bounds it has, is in `docs/adr/0007`.

#![deny(clippy::float_arithmetic)]

pub mod handover;
pub mod member;
pub mod mutants;
pub mod owner;
pub mod request;
pub mod resync;
pub mod session;
pub mod takeover;
pub mod time;
