//! Where the protocol ends: runs outside its assumptions in which an invariant breaks, found on the production machines.
//! They say what an operator can count on; the ADR says what each means. If one is found no more, the limit is gone.

use std::collections::BTreeSet;

use hearth_replication::mutants::Rules;
use stateright::{Checker, HasDiscoveries, Model};

use super::config::{Budget, Config};
use super::ghost::{LINEARIZABLE, ON_EVERY_MEMBER};
use super::model::Exploration;
use super::{configs, print};

fn reaches(limit: &str, config: Config, broken: &'static str) {
    let checker = Exploration(config)
        .checker()
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([broken])))
        .spawn_bfs()
        .join();
    let path = checker.discovery(broken);
    let path = path.unwrap_or_else(|| panic!("{limit}: {broken:?} holds: the limit is gone"));
    println!(
        "{limit}: {broken:?} breaks in {} steps:",
        path.clone().into_actions().len()
    );
    print(path);
}

/// An owner whose clock misses T/2 while the new owner waits, such as a paused virtual machine, answers a read too late.
#[test]
fn a_clock_that_misses_more_than_the_wait_allows() {
    let config = configs::lease_alone(Rules::default(), false);
    let budget = Budget {
        misses: 2,
        ..config.budget
    };
    reaches("a clock that misses T/2", Config { budget, ..config }, LINEARIZABLE);
}

/// The log loses a set change that only nodes have recorded which the next owner does not hear of.
#[test]
fn a_lost_end_that_nobody_heard_of() {
    let config = Config {
        unheard_loss: true,
        ..configs::tail_shrink(Rules::default(), false)
    };
    reaches("a lost end nobody heard of", config, ON_EVERY_MEMBER);
}
