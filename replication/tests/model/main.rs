//! The machines of this crate, explored exhaustively.
#![allow(missing_docs, reason = "a test program")]

mod config;
mod configs;
mod ghost;
mod model;
mod world;

use std::time::Instant;

use hearth_replication::mutants::Rules;
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

use config::Config;
use model::{Action, Exploration};
use world::World;

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
            _ => {
                if let Some(path) = path {
                    print(path);
                    panic!("{}: broken: {}", config.name, property.name);
                }
            }
        }
    }
}

#[test]
fn fence() {
    explore(configs::fence(Rules::default()));
}

#[test]
fn shrink() {
    explore(configs::shrink(Rules::default()));
}
