//! Every switch, the safety rule that it breaks, and the test that notices.

/// One broken rule.
pub struct Mutant {
    /// Its switch.
    pub name: &'static str,
    /// Which of the rules that keep data safe ([`RULES`]), counted from 1, if it breaks one of them.
    pub number: Option<usize>,
    /// What it breaks, in words.
    pub rule: &'static str,
    /// What notices: a package, its test program (the library's own tests if empty), and the test's name.
    pub test: [&'static str; 3],
}

/// The rules that keep data safe, from the first on.
pub const RULES: [&str; 11] = [
    "one writer per epoch",
    "the set before the acknowledgement",
    "no reads without read leases",
    "unflushed writes over a loss of power",
    "a failed sync stays failed",
    "copies are dropped last",
    "resync and moves",
    "live migration",
    "without NATS and schedulers",
    "full disk, full RAM, full stream",
    "RAM never outlives what it was read from",
];

/// Every switch.
pub const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "write-back",
        number: None,
        rule: "a write is acknowledged when the disk has it",
        test: ["hearth-node", "store_crash", "kill_9"],
    },
    Mutant {
        name: "flush-without-fsync",
        number: None,
        rule: "FLUSH syncs",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "commit-without-data",
        number: None,
        rule: "a block's bytes are durable before its record",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "fsync-retried",
        number: Some(5),
        rule: "a failed sync is never retried into success",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "failed-flush-forgotten",
        number: Some(5),
        rule: "a failed flush closes the image for writes",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "closed-forgotten",
        number: Some(5),
        rule: "it stays closed over a restart",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "doubt-unmarked",
        number: Some(5),
        rule: "also if the daemon dies right behind the failed sync",
        test: ["hearth-node", "store_crash", "right_behind_a_failed_sync"],
    },
    Mutant {
        name: "short-write-trusted",
        number: Some(5),
        rule: "a short write is not the whole write",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "compaction-unchecked",
        number: Some(5),
        rule: "a failed sync of the journal is a failed sync",
        test: ["hearth-node", "", "store::layer"],
    },
    Mutant {
        name: "durable-uncommitted",
        number: None,
        rule: "FUA makes a block's record durable too",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "power-loss-unseen",
        number: Some(4),
        rule: "uncommitted records do not count after a power loss",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "unscrubbed",
        number: Some(4),
        rule: "bytes that a power loss undid do not come back",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "mark-unsynced",
        number: Some(4),
        rule: "a mark is durable before its block changes",
        test: ["hearth-node", "store_replica_power", "a_replica_keeps"],
    },
    Mutant {
        name: "region-unmarked-early",
        number: Some(4),
        rule: "a region stays marked while one of its blocks is",
        test: ["hearth-node", "store_marks", "regions_are_unmarked"],
    },
    Mutant {
        name: "mark-renewed",
        number: Some(4),
        rule: "a mark keeps the life under which it was set first",
        test: ["hearth-node", "store_marks", "a_mark_keeps_the_life"],
    },
    Mutant {
        name: "failed-replica-reopened",
        number: Some(5),
        rule: "a replica whose disk failed stays closed",
        test: ["hearth-node", "store_replica", "whose_disk_failed"],
    },
    Mutant {
        name: "fill-unchecked",
        number: Some(11),
        rule: "a fill is dropped if a write began meanwhile",
        test: ["hearth-node", "volume_fill_race", ""],
    },
    Mutant {
        name: "ram-unlimited",
        number: Some(10),
        rule: "the RAM tier never holds more than its size",
        test: ["hearth-node", "volume_stress", ""],
    },
    Mutant {
        name: "rollback-unseen",
        number: None,
        rule: "a node freezes on a stream that lost what it has read",
        test: ["hearth-node", "", "agent::seen"],
    },
    Mutant {
        name: "oversize-taken",
        number: None,
        rule: "a request over the payload limit is refused",
        test: ["hearth-node", "nbd_attack", "a_request_over"],
    },
    Mutant {
        name: "connections-uncounted",
        number: None,
        rule: "connections are counted, per image and in all",
        test: ["hearth-node", "nbd_attack", "one_image_takes"],
    },
    Mutant {
        name: "memory-uncounted",
        number: None,
        rule: "what clients can make the server hold is bounded",
        test: ["hearth-node", "nbd_attack", "clients_that_never_read"],
    },
    Mutant {
        name: "chain-unchecked",
        number: None,
        rule: "a record's chain value is compared",
        test: ["hearth-scheduler", "tamper", "one_flipped_bit"],
    },
    Mutant {
        name: "void-applied",
        number: None,
        rule: "a void event changes nothing",
        test: ["scheduler-core", "replay", "a_void_event"],
    },
    Mutant {
        name: "duplicate-applied",
        number: None,
        rule: "an event counts once",
        test: ["scheduler-core", "", "laws::whatever_happens"],
    },
    Mutant {
        name: "lost-uncounted",
        number: None,
        rule: "heat with lost samples is not clean",
        test: ["scheduler-core", "scripts", "every_script"],
    },
    Mutant {
        name: "hash-order",
        number: None,
        rule: "decisions do not depend on hash order",
        test: ["scheduler-core", "", "laws::whatever_happens"],
    },
    Mutant {
        name: "drop-unchecked",
        number: Some(6),
        rule: "a replica is dropped only where enough are in sync without it",
        test: ["scheduler-core", "moves", "a_drain_adds"],
    },
    Mutant {
        name: "circle-unseen",
        number: None,
        rule: "a replica that goes in a circle trips the breaker",
        test: ["scheduler-core", "moves", "a_replica_that_goes_in_a_circle"],
    },
    Mutant {
        name: "ack-before-set-durable",
        number: Some(2),
        rule: "a write is acknowledged when the smaller set is committed and durable",
        test: ["hearth-replication", "model", "explorations::shrink_takeover"],
    },
    Mutant {
        name: "ram-unleased",
        number: Some(3),
        rule: "who does not own an image answers nothing, not even from RAM",
        test: ["hearth-node", "replica_pair", "who_is_fenced_off"],
    },
    Mutant {
        name: "member-ram-stale",
        number: Some(11),
        rule: "what a replica's node has in RAM is what was written last, whoever wrote it",
        test: ["hearth-node", "replica_pair", "what_a_member_has_in_ram"],
    },
    Mutant {
        name: "write-unmarked",
        number: Some(4),
        rule: "a member marks blocks before it writes them",
        test: ["hearth-node", "replica_pair", "what_was_written_and_not_flushed"],
    },
    Mutant {
        name: "equal-epoch-accepted",
        number: Some(1),
        rule: "a member refuses another lease of its epoch",
        test: ["hearth-replication", "model", "explorations::tail_rivals"],
    },
    Mutant {
        name: "join-before-flush",
        number: Some(7),
        rule: "a joining node is flushed before it is a member",
        test: ["hearth-replication", "model", "explorations::join_power"],
    },
    Mutant {
        name: "handover-from-connect",
        number: Some(8),
        rule: "only the source's seal ends the source",
        test: ["hearth-replication", "model", "explorations::handover_alone"],
    },
    Mutant {
        name: "read-without-lease",
        number: Some(3),
        rule: "an owner reads under the members' read leases",
        test: ["hearth-replication", "model", "explorations::lease_alone"],
    },
    Mutant {
        name: "late-write-after-fence",
        number: Some(1),
        rule: "the fence waits for admitted writes",
        test: ["hearth-replication", "model", "explorations::fence"],
    },
    Mutant {
        name: "older-record-taken",
        number: None,
        rule: "a takeover starts from the newest record",
        test: ["hearth-replication", "model", "explorations::tail_shrink"],
    },
    Mutant {
        name: "stale-grant-taken",
        number: None,
        rule: "a member refuses an epoch granted over an older record",
        test: ["hearth-replication", "model", "explorations::tail_shrink"],
    },
    Mutant {
        name: "no-wait",
        number: Some(3),
        rule: "a new owner waits until read leases have ended",
        test: ["hearth-replication", "model", "explorations::lease_alone"],
    },
    Mutant {
        name: "stale-set-served",
        number: Some(1),
        rule: "a member refuses older set versions",
        test: ["hearth-replication", "model", "explorations::shrink_alone"],
    },
    Mutant {
        name: "doubt-ignored",
        number: Some(4),
        rule: "regions in doubt are equal before an image opens",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "read-overtakes-write",
        number: None,
        rule: "a read waits for a write under way to its blocks",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "copy-unlocked",
        number: Some(7),
        rule: "a block is copied while no write overlaps it",
        test: ["hearth-replication", "model", "explorations::join_alone"],
    },
    Mutant {
        name: "join-counts-late",
        number: Some(2),
        rule: "members of a proposed set count",
        test: ["hearth-replication", "model", "explorations::join_takeover"],
    },
    Mutant {
        name: "unmarked-alone",
        number: Some(4),
        rule: "marks go when every member has the write",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "own-epoch-seals",
        number: Some(3),
        rule: "only a durable seal spares the wait",
        test: ["hearth-replication", "model", "explorations::lease_again"],
    },
    Mutant {
        name: "gap-taken",
        number: Some(4),
        rule: "a guest that goes on loses nothing silently",
        test: ["hearth-replication", "model", "explorations::handover_power"],
    },
    Mutant {
        name: "ack-without-lease",
        number: Some(3),
        rule: "an owner acknowledges under the members' read leases",
        test: ["hearth-replication", "model", "explorations::crash"],
    },
    Mutant {
        name: "owner-not-told",
        number: Some(1),
        rule: "a fenced member ends the owner on its node",
        test: ["hearth-replication", "model", "explorations::join_takeover"],
    },
    Mutant {
        name: "old-answer-counts",
        number: None,
        rule: "a repeated request is answered by its repetition",
        test: ["hearth-replication", "model", "explorations::shrink_alone"],
    },
    Mutant {
        name: "equal-unflushed",
        number: Some(4),
        rule: "what was made equal is flushed before an image opens",
        test: ["hearth-replication", "model", "explorations::site_loss"],
    },
    Mutant {
        name: "writes-unmissed",
        number: Some(7),
        rule: "a member that joins again is copied what was written while it was away",
        test: ["hearth-replication", "model", "explorations::rejoin_alone"],
    },
    Mutant {
        name: "marked-uncopied",
        number: Some(7),
        rule: "a member that joins again is copied what it has marked itself",
        test: ["hearth-replication", "model", "explorations::rejoin_power"],
    },
    Mutant {
        name: "destination-deaf",
        number: Some(8),
        rule: "a destination that gave up hears the next seal, or goes on by itself",
        test: ["hearth-replication", "session", "a_destination_that_was_overtaken"],
    },
    Mutant {
        name: "log-awaited",
        number: Some(9),
        rule: "the log's absence stops nothing of a healthy image",
        test: ["hearth-replication", "session", "without_the_log"],
    },
    Mutant {
        name: "silence-counts",
        number: Some(9),
        rule: "what the log does not answer does not count",
        test: ["hearth-replication", "session", "without_the_log"],
    },
    Mutant {
        name: "full-acknowledged",
        number: Some(10),
        rule: "a write that found no room is not acknowledged",
        test: ["hearth-replication", "owner", "the_last_copy_refuses"],
    },
    Mutant {
        name: "full-member-kept",
        number: Some(10),
        rule: "a full member beside another copy leaves the set",
        test: ["hearth-replication", "owner", "a_full_disk_beside"],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_a_switch_and_every_switch_a_rule() {
        for number in 1..=RULES.len() {
            assert!(
                MUTANTS.iter().any(|mutant| mutant.number == Some(number)),
                "rule {number}"
            );
        }
        let numbers = MUTANTS.iter().filter_map(|mutant| mutant.number);
        assert!(numbers.max() <= Some(RULES.len()));
    }
}
