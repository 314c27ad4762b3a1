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

/// Seeds that each of these is found within; more than twice as many as it takes.
const FOUND: &[(Mutant, u64)] = &[
    (Mutant::AckBeforeSetDurable, 10),
    (Mutant::JoinBeforeFlush, 10),
    (Mutant::LateWriteAfterFence, 20),
    (Mutant::NoWait, 10),
    (Mutant::StaleSetServed, 10),
    (Mutant::DoubtIgnored, 10),
    (Mutant::ReadOvertakesWrite, 10),
    (Mutant::CopyUnlocked, 10),
    (Mutant::JoinCountsLate, 40),
    (Mutant::UnmarkedAlone, 40),
    (Mutant::EqualUnflushed, 10),
    (Mutant::WritesUnmissed, 40),
    (Mutant::DestinationDeaf, 100),
    (Mutant::SilenceCounts, 40),
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
