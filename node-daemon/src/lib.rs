//! The node daemon: keeps layers in its store, serves images from them, holds hot blocks in RAM, and carries out the
//! scheduler's orders.
//!
//! The data path ([`disk`], [`volume`], [`tier`], [`store`], [`export`], [`peer`], [`replica`]) never calls NATS and knows no
//! runtime below [`export`]; only [`agent`] speaks NATS. Only [`export::nbd`] and [`peer`] know NBD.

pub mod agent;
pub mod config;
pub mod disk;
pub mod export;
pub mod imagefile;
pub mod mutants;
pub mod peer;
pub mod replica;
pub mod shared;
pub mod store;
pub mod tier;
pub mod volume;
