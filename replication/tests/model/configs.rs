//! The explorations. Each has its bounds beside it, larger ones for `HEARTH_MODEL=deep`; the ADR has the state counts.

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
        time: Time::Jumps,
        async_writes: false,
        async_persist: false,
        quick: true,
        eager: false,
        straddling: false,
        unheard_loss: false,
        budget: NOTHING,
        reach: &[],
    }
}

/// One of two bounds.
fn bound<T>(deep: bool, usual: T, deeper: T) -> T {
    if deep { deeper } else { usual }
}

/// The fence and a takeover: a writes, b takes over and writes, c is a member. Disks take their time, answers come late.
pub fn fence(rules: Rules, deep: bool) -> Config {
    Config {
        async_writes: true,
        async_persist: true,
        quick: false,
        budget: Budget {
            writes: bound(deep, [1, 1, 0], [2, 1, 0]),
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover],
        ..base("fence", rules)
    }
}

/// The fence, a takeover and the death of any daemon between any two steps. Answers come late.
pub fn crash(rules: Rules, deep: bool) -> Config {
    Config {
        async_persist: true,
        async_writes: deep,
        quick: false,
        budget: Budget {
            writes: [1, 1, 0],
            kills: 1,
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover],
        ..base("fence and crash", rules)
    }
}

/// A write, a read and a flush at once, then a takeover that reads.
pub fn in_flight(rules: Rules, deep: bool) -> Config {
    Config {
        budget: Budget {
            writes: [1, 0, 0],
            reads: bound(deep, [1, 1, 0], [1, 2, 0]),
            flushes: [1, 0, 0],
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::Read, Reached::Flushed],
        ..base("operations in flight", rules)
    }
}

/// Two nodes take over at once from a third that lives on.
pub fn rivals(rules: Rules, deep: bool) -> Config {
    Config {
        budget: Budget {
            writes: bound(deep, [0, 1, 1], [1, 1, 1]),
            takeovers: [0, 1, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover],
        ..base("two takeovers", rules)
    }
}

/// A smaller set: a writes while a member is given up. Disks take their time, answers come late.
pub fn shrink_alone(rules: Rules, deep: bool) -> Config {
    Config {
        async_writes: true,
        quick: false,
        budget: Budget {
            writes: [2, 0, 0],
            failures: bound(deep, 1, 2),
            ..NOTHING
        },
        reach: &[Reached::WroteAfterShrink],
        ..base("set shrink", rules)
    }
}

/// A smaller set: a writes and flushes while a member is given up and a disk fails.
pub fn shrink_disk(rules: Rules, deep: bool) -> Config {
    Config {
        async_writes: true,
        budget: Budget {
            writes: bound(deep, [1, 0, 0], [2, 0, 0]),
            flushes: [1, 0, 0],
            failures: 1,
            disk_failures: 1,
            ..NOTHING
        },
        reach: &[Reached::WroteAfterShrink, Reached::Flushed],
        ..base("set shrink and failed disk", rules)
    }
}

/// A smaller set and a takeover by a node that is in it or not.
pub fn shrink_takeover(rules: Rules, deep: bool) -> Config {
    Config {
        budget: Budget {
            writes: bound(deep, [1, 1, 0], [2, 1, 0]),
            failures: 1,
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterShrink],
        ..base("set shrink and takeover", rules)
    }
}

/// Read leases on clocks of which one misses a tick. Answers come late.
pub fn lease_alone(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        time: Time::Ticks,
        quick: false,
        budget: Budget {
            writes: bound(deep, [0, 1, 0], [1, 1, 0]),
            reads: [1, 0, 0],
            takeovers: [0, 1, 0],
            time: 7,
            misses: 1,
            renewals: 2,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover, Reached::Read],
        ..base("read lease", rules)
    }
}

/// Read leases, and a takeover that is given up and begun again.
pub fn lease_again(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        time: Time::Ticks,
        quick: !deep,
        budget: Budget {
            writes: [0, 1, 0],
            reads: [1, 0, 0],
            takeovers: [0, 2, 0],
            time: 6,
            renewals: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover, Reached::Read],
        ..base("read lease and two takeovers", rules)
    }
}

/// A node joins while writes go on, some over two blocks; a member may be given up.
pub fn join_alone(rules: Rules, deep: bool) -> Config {
    Config {
        blocks: 2,
        members: 0b011,
        straddling: true,
        budget: Budget {
            writes: bound(deep, [2, 0, 0], [3, 0, 0]),
            joins: 1,
            failures: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::WroteAfterShrink],
        ..base("join", rules)
    }
}

/// A member is given up, with requests to it under way, and joins again with what it has.
pub fn rejoin_alone(rules: Rules, deep: bool) -> Config {
    Config {
        blocks: 2,
        members: 0b011,
        joiner: 1,
        straddling: true,
        async_writes: true,
        quick: false,
        budget: Budget {
            writes: bound(deep, [2, 0, 0], [3, 0, 0]),
            joins: 2,
            failures: 2,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::WroteAfterShrink],
        ..base("joining again", rules)
    }
}

/// A member loses power, is given up and joins again with what is left.
pub fn rejoin_power(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        joiner: 1,
        budget: Budget {
            writes: [2, 0, 0],
            flushes: [1, 0, 0],
            kills: bound(deep, 0, 1),
            joins: 1,
            failures: 1,
            power_losses: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::WroteAfterShrink],
        ..base("power loss and joining again", rules)
    }
}

/// A node joins and takes over, at whatever point.
pub fn join_takeover(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        budget: Budget {
            writes: bound(deep, [1, 0, 1], [2, 0, 1]),
            joins: 1,
            takeovers: [0, 0, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::TookOver, Reached::WroteAfterTakeover],
        ..base("join and takeover", rules)
    }
}

/// A node joins, with the death of any daemon between any two steps, and may take over.
pub fn join_crash(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        eager: true,
        budget: Budget {
            writes: [1, 0, 0],
            kills: 1,
            joins: 1,
            failures: bound(deep, 0, 1),
            takeovers: [0, 0, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::TookOver],
        ..base("join and crash", rules)
    }
}

/// A node joins the only copy, then the power fails everywhere.
pub fn join_power(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b001,
        joiner: 1,
        eager: true,
        budget: Budget {
            writes: [2, 0, 0],
            flushes: [1, 0, 0],
            joins: 1,
            site_losses: bound(deep, 1, 2),
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::TookOver, Reached::AllLost, Reached::Flushed],
        ..base("join and power loss", rules)
    }
}

/// A copy moves: c joins, then b leaves and deletes its copy; c may take over.
pub fn relocate(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        eager: !deep,
        budget: Budget {
            writes: [1, 0, 0],
            joins: 1,
            leaves: 1,
            takeovers: [0, 0, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::Joined, Reached::Dropped, Reached::TookOver],
        ..base("move", rules)
    }
}

/// A live migration from a to b, and a's way back at whatever point.
pub fn handover_alone(rules: Rules, deep: bool) -> Config {
    Config {
        destination: Some(1),
        budget: Budget {
            writes: [1, 1, 0],
            reads: bound(deep, [1, 0, 0], [1, 1, 0]),
            seals: 1,
            takeovers: [1, 0, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::HandedOver, Reached::WayBack, Reached::WroteAfterTakeover],
        ..base("hand-over", rules)
    }
}

/// A live migration whose destination gives up what the log has decided, and takes over again.
pub fn handover_again(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        destination: Some(1),
        budget: Budget {
            writes: [1, 1, 0],
            reads: bound(deep, [0, 0, 0], [1, 0, 0]),
            seals: 1,
            takeovers: [1, 1, 0],
            time: bound(deep, 1, 2),
            ..NOTHING
        },
        reach: &[Reached::HandedOver, Reached::TookAgain, Reached::WroteAfterTakeover],
        ..base("hand-over tried again", rules)
    }
}

/// A live migration with the death of any daemon between any two steps.
pub fn handover_crash(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        destination: Some(1),
        async_persist: true,
        budget: Budget {
            writes: [1, 1, 0],
            kills: 1,
            seals: 1,
            takeovers: bound(deep, [1, 0, 0], [1, 1, 0]),
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::HandedOver, Reached::WayBack, Reached::WroteAfterTakeover],
        ..base("hand-over and crash", rules)
    }
}

/// The log loses the last set change; what is published next concerns somebody who has recorded it.
pub fn tail_shrink(rules: Rules, deep: bool) -> Config {
    Config {
        budget: Budget {
            writes: bound(deep, [1, 0, 1], [2, 0, 1]),
            failures: 1,
            tail_losses: 1,
            takeovers: [0, 0, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterShrink, Reached::Frozen],
        ..base("lost set change", rules)
    }
}

/// The log loses the last grant, and gives the epoch again.
pub fn tail_rivals(rules: Rules, deep: bool) -> Config {
    Config {
        budget: Budget {
            writes: bound(deep, [0, 1, 1], [1, 1, 1]),
            tail_losses: 1,
            takeovers: [0, 1, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover, Reached::Frozen],
        ..base("lost grant", rules)
    }
}

/// The power fails everywhere, with writes flushed and not; then again.
pub fn site_loss(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b011,
        eager: true,
        budget: Budget {
            writes: [2, 0, 0],
            flushes: [1, 0, 0],
            reads: [0, 1, 0],
            site_losses: 2,
            takeovers: [1, 1, 0],
            time: bound(deep, 1, 2),
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::AllLost, Reached::Read, Reached::Flushed],
        ..base("power loss of all", rules)
    }
}

/// The power of one node fails, then another takes over.
pub fn power_loss(rules: Rules, deep: bool) -> Config {
    Config {
        eager: true,
        budget: Budget {
            writes: bound(deep, [1, 1, 0], [2, 1, 0]),
            flushes: [1, 0, 0],
            power_losses: 1,
            takeovers: [0, 1, 0],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::WroteAfterTakeover, Reached::Flushed],
        ..base("power loss of one", rules)
    }
}

/// An owner without a copy of its own reads and writes at others; c takes over. Answers come late.
pub fn no_copy(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b110,
        quick: false,
        budget: Budget {
            writes: bound(deep, [1, 0, 0], [1, 0, 1]),
            reads: [1, 0, 1],
            takeovers: [0, 0, 1],
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::TookOver, Reached::Read],
        ..base("owner without a copy", rules)
    }
}

/// A live migration to a node without a copy, while members lose power: the guest goes on only if nothing is missing.
pub fn handover_power(rules: Rules, deep: bool) -> Config {
    Config {
        members: 0b101,
        destination: Some(1),
        eager: true,
        budget: Budget {
            writes: bound(deep, [1, 0, 0], [2, 0, 0]),
            flushes: [1, 0, 0],
            reads: [0, 1, 0],
            power_losses: 2,
            seals: 1,
            time: 1,
            ..NOTHING
        },
        reach: &[Reached::HandedOver, Reached::Read, Reached::Flushed],
        ..base("hand-over and power loss", rules)
    }
}
