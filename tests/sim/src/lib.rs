//! Replicated images, simulated: several nodes run the production machines of `hearth-replication` over simulated disks,
//! network, log and clocks, under faults, for as many runs as there are seeds.
//!
//! It is not the exhaustive exploration of `replication/tests/model`: it goes far where that goes everywhere. Maps have many
//! runs, blocks are dozens, operations are many, time is continuous, and things have to come to an end: when faults stop,
//! every image is served again, every copy in sync and every operation answered within a bounded time.
//!
//! The invariant: a seed is a run. Nothing here knows a clock, a thread, or the order of a hash.

mod agent;
mod begins;
mod carry;
mod chance;
mod clients;
pub mod counters;
mod disk;
mod event;
mod facts;
mod faults;
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
mod scheduler;
mod text;
mod world;

use hearth_replication::mutants::Rules;

use counters::Counters;
use world::World;

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
