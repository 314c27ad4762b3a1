//! Many seeds, and that they reach what they are there for. `HEARTH_SIM_SEED=7` runs one, `HEARTH_SIM_SEEDS=0..20000` many.
#![allow(missing_docs, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "the environment says which seeds")]

use std::ops::Range;

use hearth_replication::mutants::Rules;
use hearth_sim::counters::Counters;

/// What one test run takes.
const SEEDS: Range<u64> = 0..2_000;

fn seeds() -> Range<u64> {
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|_| panic!("{text} is not a seed"));
    if let Ok(seed) = std::env::var("HEARTH_SIM_SEED") {
        let seed = number(&seed);
        return seed..seed + 1;
    }
    match std::env::var("HEARTH_SIM_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").expect("HEARTH_SIM_SEEDS=from..to");
            number(from)..number(to)
        }
        Err(_) => SEEDS,
    }
}

#[test]
fn every_seed_is_safe_and_comes_to_an_end() {
    let seeds = seeds();
    let mut all = Counters::default();
    let mut failed = Vec::new();
    for seed in seeds.clone() {
        match hearth_sim::run(seed, Rules::default()) {
            Ok(counters) => all.add(&counters),
            Err(what) => {
                if failed.is_empty() {
                    println!("{what}");
                } else {
                    println!("{}", what.lines().last().unwrap_or_default());
                }
                failed.push(seed);
            }
        }
        if failed.len() >= 20 {
            break;
        }
    }
    println!("{all}");
    assert!(
        failed.is_empty(),
        "run again with HEARTH_SIM_SEED={}: all that failed: {failed:?}",
        failed[0]
    );
    if seeds.end - seeds.start >= SEEDS.end {
        let missing = all.missing();
        assert!(missing.is_empty(), "never happened: {missing:?}");
    }
}
