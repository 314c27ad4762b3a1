//! The machines of this crate, explored: every order of everything that may happen within stated bounds.
//!
//! What is explored is the production code. The model around it has three nodes, each with the machines, a disk (what a
//! read finds, what a power loss leaves, the durable record and marks) and a boot-time clock; the log, which may lose its
//! last entry; and messages. A message that is never delivered is lost, so partitions of every shape are among the runs; a
//! node that stays down is one that gets no messages after its crash. The reference in `ghost` judges what clients see.
//!
//! Time is coarse. In most explorations 1.25 T pass in one jump, at most once or twice, and leases are renewed in one step
//! when they have run out: an owner then holds either every lease or none. "read lease" has ticks of T/4 = 750 ms, renewals
//! as messages, and a clock that misses a tick; a lease holds for fewer than 4 ticks of the owner's clock and a new owner
//! waits for 5 of its own, so one missed tick is the most that is safe, and exactly that is explored. Finer ticks would add
//! no order of events: a lease is granted after its request was sent and before the member records the next epoch, and the
//! wait begins after that; the two durations meet only in the one comparison of 5 - 1 with 4.
//!
//! Not modelled: images of more than one run, FUA, copies in RAM, more than one image,
//! the answers to a takeover's question arriving one by one (they are one step; what changes after them is explored), the
//! store below the marks, bytes that a failed disk returns, and NBD. `quick` and `eager` in `config` say where an answer or
//! the log takes no time. States are told apart by a 64-bit hash.
//!
//! `HEARTH_MODEL=deep` explores larger bounds.
#![allow(missing_docs, reason = "a test program")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the clock is for the printed duration, the environment for the bounds"
)]

mod actions;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod configs;
mod ghost;
mod limits;
mod machines;
mod model;
#[cfg(feature = "mutants")]
mod variants;
mod world;

use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

use actions::Action;
use common::rules;
use config::Config;
use model::Exploration;
use world::World;

/// The steps of a run, one per line.
fn print(path: Path<World, Action>) {
    for (at, action) in path.into_actions().iter().enumerate() {
        println!("  {:2}. {action}", at + 1);
    }
}

/// Explores everything within the bounds: every invariant holds everywhere, and what must be reached is reached.
fn explore(config: Config) {
    let started = Instant::now();
    let checker = Exploration(config)
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{}: {} states, {} steps, depth {}, {:.1} s",
        config.name,
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f32()
    );
    let mut found = checker.discoveries();
    for property in checker.model().properties() {
        let path = found.remove(property.name);
        match property.expectation {
            Expectation::Sometimes => assert!(path.is_some(), "{}: never: {}", config.name, property.name),
            Expectation::Always | Expectation::Eventually => {
                if let Some(path) = path {
                    print(path);
                    panic!("{}: broken: {}", config.name, property.name);
                }
            }
        }
    }
}

fn is_deep() -> bool {
    match std::env::var("HEARTH_MODEL").as_deref() {
        Ok("deep") => true,
        Ok(other) => panic!("HEARTH_MODEL={other}: only `deep` is known"),
        Err(_) => false,
    }
}

/// Each within its bounds, on the machines as they are.
mod explorations {
    use super::{configs, explore, is_deep, rules};

    macro_rules! explorations {
        ($($name:ident)+) => {
            $(#[test]
            fn $name() {
                explore(configs::$name(rules(), is_deep()));
            })+
        };
    }

    explorations! {
        fence crash in_flight rivals shrink_alone shrink_disk shrink_takeover lease_alone lease_again join_alone join_takeover join_crash join_power rejoin_alone rejoin_power relocate
        handover_alone handover_again handover_crash handover_power no_copy tail_shrink tail_rivals site_loss power_loss
    }
}
