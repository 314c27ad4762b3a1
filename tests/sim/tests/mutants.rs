//! Broken rules are found by seeds too. `cargo test -p hearth-sim --features mutants --test mutants -- --nocapture` says
//! after how many; `HEARTH_SIM_SEEDS=300` tries all switches, or the one of
//! `HEARTH_MUTANT`, on so many seeds.
#![allow(missing_docs, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "the environment says how many seeds")]
#![cfg(feature = "mutants")]

use hearth_replication::mutants::{Mutant, Rules};

/// The first seed below a bound that notices, and how.
fn found(mutant: Mutant, seeds: u64) -> Option<(u64, String)> {
    (0..seeds).find_map(|seed| {
        let what = hearth_sim::run(seed, Rules::breaking(mutant)).err()?;
        Some((seed, what.lines().last().unwrap_or_default().to_owned()))
    })
}

/// Seeds that each of these is found within; many more than it takes.
const FOUND: &[(Mutant, u64)] = &[
    (Mutant::AckBeforeSetDurable, 100),
    (Mutant::JoinBeforeFlush, 100),
    (Mutant::LateWriteAfterFence, 200),
    (Mutant::NoWait, 100),
    (Mutant::StaleSetServed, 300),
    (Mutant::DoubtIgnored, 100),
    (Mutant::ReadOvertakesWrite, 100),
    (Mutant::CopyUnlocked, 100),
    (Mutant::JoinCountsLate, 1_500),
    (Mutant::UnmarkedAlone, 400),
    (Mutant::EqualUnflushed, 100),
    (Mutant::WritesUnmissed, 400),
];

#[test]
fn broken_rules_are_found() {
    for (mutant, seeds) in FOUND {
        let found = found(*mutant, *seeds);
        println!("{mutant:?}: {found:?}");
        assert!(found.is_some(), "{mutant:?} is not found within {seeds} seeds");
    }
}

#[test]
fn every_switch_on_as_many_seeds_as_asked() {
    let Ok(seeds) = std::env::var("HEARTH_SIM_SEEDS") else {
        return;
    };
    let seeds = seeds.parse().expect("HEARTH_SIM_SEEDS=300");
    let only = std::env::var("HEARTH_MUTANT").ok();
    for (name, mutant) in Mutant::ALL {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        match found(*mutant, seeds) {
            Some((seed, what)) => println!("{name}: seed {seed}: {what}"),
            None => println!("{name}: not found in {seeds} seeds"),
        }
    }
}
