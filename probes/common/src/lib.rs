//! What the eBPF programs and their loader agree on: map keys and values, and the latency scale.
//!
//! Plain old data and pure functions only: it is compiled for the kernel as well. It knows neither aya nor std.

#![no_std]

pub mod abi;
pub mod latency;
