//! The explorations. Each has its bounds beside it; the ADR has the state counts.

use hearth_replication::mutants::Rules;

use super::config::{Budget, Config, Time};
use super::ghost::Reached;

const NOTHING: Budget = Budget {
    writes: [0; 3],
    reads: [0; 3],
    flushes: [0; 3],
    kills: 0,
    power_losses: 0,
    site_losses: 0,
    disk_failures: 0,
    tail_losses: 0,
    failures: 0,
    takeovers: [0; 3],
    seals: 0,
    joins: 0,
    leaves: 0,
    time: 0,
    misses: 0,
    renewals: 0,
};

fn base(name: &'static str, rules: Rules) -> Config {
    Config {
        name,
        rules,
        blocks: 1,
        members: 0b111,
        joiner: 2,
        leaver: 1,
        destination: None,
        time: Time::Jumps(1),
        async_writes: false,
        async_persist: false,
        straddling: false,
        unheard_loss: false,
        budget: NOTHING,
        reach: &[],
    }
}

/// The fence and a takeover: a writes, b takes over and writes, c is a member.
pub fn fence(rules: Rules) -> Config {
    Config {
        async_writes: true,
        async_persist: true,
        budget: Budget {
            writes: [1, 1, 0],
            kills: 1,
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover],
        ..base("fence", rules)
    }
}

/// A smaller set: a writes while b or c fails.
pub fn shrink(rules: Rules) -> Config {
    Config {
        async_writes: true,
        budget: Budget {
            writes: [2, 0, 0],
            failures: 1,
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterShrink],
        ..base("set shrink", rules)
    }
}
