//! Policies: each one file, a pure function of the state.

pub mod repair;
pub mod tier;
