//! The daemon's side towards the cluster: follows the log, answers requests, carries out commands, reports heat.

pub mod commands;
mod epochs;
pub mod facts;
pub mod gone;
mod handover;
mod health;
mod image_export;
pub mod jobs;
pub mod link;
mod locations;
mod moves;
pub mod node;
mod pace;
pub mod peers;
mod reconcile;
mod replicas;
pub mod report;
pub mod requests;
mod resize;
mod run;
mod scrub;
pub mod seen;
mod served;

pub use run::run;
