//! Policies: each one file, a pure function of the state.

pub mod drain;
pub mod locality;
pub mod moves;
pub mod rebalance;
pub mod repair;
pub mod spread;
pub mod surplus;
pub mod tier;
