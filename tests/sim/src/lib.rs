//! Replicated images, simulated: several nodes run the production machines of `hearth-replication` over simulated disks,
//! network, log and clocks, and schedulers the production core over that log, under faults, for as many runs as there are
//! seeds.
//!
//! One log has everything, as in production: what nodes and schedulers publish, in envelopes, judged by the protocol's one
//! rule. A leader and a standby fold it, campaign, tick and decide; their digests are compared wherever both have been.
//! Nodes report each second, and execute the commands that count. In half of the runs lost copies are replaced by the
//! repair policy alone, in the others an operator is quicker.
//!
//! It is not the exhaustive exploration of `replication/tests/model`: it goes far where that goes everywhere. Maps have many
//! runs, blocks are dozens, operations are many, time is continuous, and things have to come to an end. When faults stop,
//! within a bounded time every image is served again, with all its copies, equal and in sync, every operation and command is
//! answered, one scheduler leads, and the log, replayed from nothing, gives the state of each. The bound is three minutes
//! and, where the policy repairs, its grace time and the rests after the orders that it gave.
//!
//! Not simulated: heat and what moves with it (reports say that a node lives), JetStream's own copies, and that the event
//! log of every scheduler is lost: what one of them has read can be put back.
//!
//! The invariant: a seed is a run. Nothing here knows a clock, a thread, or the order of a hash.

mod agent;
mod begins;
mod carry;
mod chance;
mod check;
mod clients;
pub mod counters;
mod disk;
mod event;
mod facts;
mod faults;
mod handover;
mod lead;
mod life;
mod links;
mod log;
mod net;
mod node;
mod operator;
mod plan;
mod quiet;
mod reference;
mod reports;
mod restart;
mod scheduler;
mod text;
mod world;

use hearth_protocol::{ImageId, NodeId};
use hearth_replication::mutants::Rules;

use chance::Chance;
use counters::Counters;
use plan::Plan;
use world::World;

/// Simulates a node that is there for twenty seconds and away for twenty, over and over, for so long; nothing else fails.
/// Returns the orders to replicate, each with its image and the node that was to get the copy.
///
/// # Errors
/// What went wrong, with the last events.
pub fn flapping(seconds: u64, nodes: usize) -> Result<Vec<(ImageId, NodeId)>, String> {
    let plan = Plan::flapping(seconds, nodes);
    let mut world = World::of(plan, Chance::new(0), Rules::default(), true);
    match world.run() {
        Ok(()) => Ok(world.replications()),
        Err(what) => Err(format!("{}\n{what}", world.last_events())),
    }
}

/// Runs a seed.
///
/// # Errors
/// What went wrong, with the plan and the last events of the run.
pub fn run(seed: u64, rules: Rules) -> Result<Counters, String> {
    let mut world = World::new(seed, rules, false);
    let Err(what) = world.run() else {
        return Ok(world.counters);
    };
    // The same run again, with its last events remembered.
    let mut world = World::new(seed, rules, true);
    let again = world.run().err().unwrap_or_else(|| "nothing".to_owned());
    assert_eq!(again, what, "seed {seed} does not replay");
    Err(format!(
        "{}\nseed {seed}: {:?}\nseed {seed}: {what}",
        world.last_events(),
        world.plan
    ))
}
