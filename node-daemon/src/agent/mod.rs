//! The daemon's side towards the cluster: follows the log, answers requests, carries out commands, reports heat.

pub mod facts;
pub mod link;
pub mod report;
