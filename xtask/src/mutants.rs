//! `cargo xtask mutants`: breaks one safety rule at a time and shows the test that notices.
//!
//! The switches are compiled in by the feature `mutants` of the crates that hold the rules; `HEARTH_MUTANT` turns one on
//! for a whole process. The tests are the ordinary ones: each passes with every switch off, and has to fail with its own
//! switch on.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::setup;
use crate::step::{note, seconds};
use crate::workspace::Workspace;

/// The variable that names the switch that is on.
const SWITCH: &str = "HEARTH_MUTANT";

/// The crates that hold switches.
const FEATURES: &str =
    "hearth-node/mutants,hearth-replication/mutants,hearth-scheduler/mutants,hearth-sim/mutants,scheduler-core/mutants";

/// One broken rule.
struct Mutant {
    /// Its switch.
    name: &'static str,
    /// The rule that it breaks.
    rule: &'static str,
    /// What notices: a package, its test program (the library's own tests if empty), and the test's name.
    test: [&'static str; 3],
}

/// Every switch.
const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "write-back",
        rule: "a write is acknowledged when the disk has it",
        test: ["hearth-node", "store_crash", "kill_9"],
    },
    Mutant {
        name: "flush-without-fsync",
        rule: "FLUSH syncs",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "commit-without-data",
        rule: "a block's bytes are durable before its record",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "fsync-retried",
        rule: "a failed sync is never retried into success",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "failed-flush-forgotten",
        rule: "a failed flush closes the image for writes",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "closed-forgotten",
        rule: "it stays closed over a restart",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "doubt-unmarked",
        rule: "also if the daemon dies right behind the failed sync",
        test: ["hearth-node", "store_crash", "right_behind_a_failed_sync"],
    },
    Mutant {
        name: "short-write-trusted",
        rule: "a short write is not the whole write",
        test: ["hearth-node", "store_faults", "every_site"],
    },
    Mutant {
        name: "compaction-unchecked",
        rule: "a failed sync of the journal is a failed sync",
        test: ["hearth-node", "", "store::layer"],
    },
    Mutant {
        name: "durable-uncommitted",
        rule: "FUA makes a block's record durable too",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "power-loss-unseen",
        rule: "uncommitted records do not count after a power loss",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "unscrubbed",
        rule: "bytes that a power loss undid do not come back",
        test: ["hearth-node", "power_loss", ""],
    },
    Mutant {
        name: "mark-unsynced",
        rule: "a mark is durable before its block changes",
        test: ["hearth-node", "store_replica_power", "a_replica_keeps"],
    },
    Mutant {
        name: "region-unmarked-early",
        rule: "a region stays marked while one of its blocks is",
        test: ["hearth-node", "store_marks", "regions_are_unmarked"],
    },
    Mutant {
        name: "mark-renewed",
        rule: "a mark keeps the life under which it was set first",
        test: ["hearth-node", "store_marks", "a_mark_keeps_the_life"],
    },
    Mutant {
        name: "failed-replica-reopened",
        rule: "a replica whose disk failed stays closed",
        test: ["hearth-node", "store_replica", "whose_disk_failed"],
    },
    Mutant {
        name: "fill-unchecked",
        rule: "a fill is dropped if a write began meanwhile",
        test: ["hearth-node", "volume_fill_race", ""],
    },
    Mutant {
        name: "ram-unlimited",
        rule: "the RAM tier never holds more than its size",
        test: ["hearth-node", "volume_stress", ""],
    },
    Mutant {
        name: "rollback-unseen",
        rule: "a node freezes on a stream that lost what it has read",
        test: ["hearth-node", "", "agent::seen"],
    },
    Mutant {
        name: "oversize-taken",
        rule: "a request over the payload limit is refused",
        test: ["hearth-node", "nbd_attack", "a_request_over"],
    },
    Mutant {
        name: "connections-uncounted",
        rule: "connections are counted, per image and in all",
        test: ["hearth-node", "nbd_attack", "one_image_takes"],
    },
    Mutant {
        name: "memory-uncounted",
        rule: "what clients can make the server hold is bounded",
        test: ["hearth-node", "nbd_attack", "clients_that_never_read"],
    },
    Mutant {
        name: "chain-unchecked",
        rule: "a record's chain value is compared",
        test: ["hearth-scheduler", "tamper", "one_flipped_bit"],
    },
    Mutant {
        name: "void-applied",
        rule: "a void event changes nothing",
        test: ["scheduler-core", "replay", "a_void_event"],
    },
    Mutant {
        name: "duplicate-applied",
        rule: "an event counts once",
        test: ["scheduler-core", "", "laws::whatever_happens"],
    },
    Mutant {
        name: "lost-uncounted",
        rule: "heat with lost samples is not clean",
        test: ["scheduler-core", "scripts", "every_script"],
    },
    Mutant {
        name: "hash-order",
        rule: "decisions do not depend on hash order",
        test: ["scheduler-core", "", "laws::whatever_happens"],
    },
    Mutant {
        name: "drop-unchecked",
        rule: "a replica is dropped only where enough are in sync without it",
        test: ["scheduler-core", "moves", "a_drain_adds"],
    },
    Mutant {
        name: "circle-unseen",
        rule: "a replica that goes in a circle trips the breaker",
        test: ["scheduler-core", "moves", "a_replica_that_goes_in_a_circle"],
    },
    Mutant {
        name: "ack-before-set-durable",
        rule: "a write is acknowledged when the smaller set is committed and durable",
        test: ["hearth-replication", "model", "explorations::shrink_takeover"],
    },
    Mutant {
        name: "ram-unleased",
        rule: "who does not own an image answers nothing, not even from RAM",
        test: ["hearth-node", "replica_pair", "who_is_fenced_off"],
    },
    Mutant {
        name: "member-ram-stale",
        rule: "what a replica's node has in RAM is what was written last, whoever wrote it",
        test: ["hearth-node", "replica_pair", "what_a_member_has_in_ram"],
    },
    Mutant {
        name: "write-unmarked",
        rule: "a member marks blocks before it writes them",
        test: ["hearth-node", "replica_pair", "what_was_written_and_not_flushed"],
    },
    Mutant {
        name: "equal-epoch-accepted",
        rule: "a member refuses another lease of its epoch",
        test: ["hearth-replication", "model", "explorations::tail_rivals"],
    },
    Mutant {
        name: "join-before-flush",
        rule: "a joining node is flushed before it is a member",
        test: ["hearth-replication", "model", "explorations::join_power"],
    },
    Mutant {
        name: "handover-from-connect",
        rule: "only the source's seal ends the source",
        test: ["hearth-replication", "model", "explorations::handover_alone"],
    },
    Mutant {
        name: "read-without-lease",
        rule: "an owner reads under the members' read leases",
        test: ["hearth-replication", "model", "explorations::lease_alone"],
    },
    Mutant {
        name: "late-write-after-fence",
        rule: "the fence waits for admitted writes",
        test: ["hearth-replication", "model", "explorations::fence"],
    },
    Mutant {
        name: "older-record-taken",
        rule: "a takeover starts from the newest record",
        test: ["hearth-replication", "model", "explorations::tail_shrink"],
    },
    Mutant {
        name: "stale-grant-taken",
        rule: "a member refuses an epoch granted over an older record",
        test: ["hearth-replication", "model", "explorations::tail_shrink"],
    },
    Mutant {
        name: "no-wait",
        rule: "a new owner waits until read leases have ended",
        test: ["hearth-replication", "model", "explorations::lease_alone"],
    },
    Mutant {
        name: "stale-set-served",
        rule: "a member refuses older set versions",
        test: ["hearth-replication", "model", "explorations::shrink_alone"],
    },
    Mutant {
        name: "doubt-ignored",
        rule: "regions in doubt are equal before an image opens",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "read-overtakes-write",
        rule: "a read waits for a write under way to its blocks",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "copy-unlocked",
        rule: "a block is copied while no write overlaps it",
        test: ["hearth-replication", "model", "explorations::join_alone"],
    },
    Mutant {
        name: "join-counts-late",
        rule: "members of a proposed set count",
        test: ["hearth-replication", "model", "explorations::join_takeover"],
    },
    Mutant {
        name: "unmarked-alone",
        rule: "marks go when every member has the write",
        test: ["hearth-replication", "model", "explorations::in_flight"],
    },
    Mutant {
        name: "own-epoch-seals",
        rule: "only a durable seal spares the wait",
        test: ["hearth-replication", "model", "explorations::lease_again"],
    },
    Mutant {
        name: "gap-taken",
        rule: "a guest that goes on loses nothing silently",
        test: ["hearth-replication", "model", "explorations::handover_power"],
    },
    Mutant {
        name: "ack-without-lease",
        rule: "an owner acknowledges under the members' read leases",
        test: ["hearth-replication", "model", "explorations::crash"],
    },
    Mutant {
        name: "owner-not-told",
        rule: "a fenced member ends the owner on its node",
        test: ["hearth-replication", "model", "explorations::join_takeover"],
    },
    Mutant {
        name: "old-answer-counts",
        rule: "a repeated request is answered by its repetition",
        test: ["hearth-replication", "model", "explorations::shrink_alone"],
    },
    Mutant {
        name: "equal-unflushed",
        rule: "what was made equal is flushed before an image opens",
        test: ["hearth-replication", "model", "explorations::site_loss"],
    },
    Mutant {
        name: "writes-unmissed",
        rule: "a member that joins again is copied what was written while it was away",
        test: ["hearth-replication", "model", "explorations::rejoin_alone"],
    },
    Mutant {
        name: "marked-uncopied",
        rule: "a member that joins again is copied what it has marked itself",
        test: ["hearth-replication", "model", "explorations::rejoin_power"],
    },
];

/// How a run of a test ended.
#[derive(Debug, PartialEq, Eq)]
enum Run {
    Passed,
    /// The tests that failed, as the runner names them.
    Failed(String),
}

fn run_test(workspace: &Workspace, mutant: &Mutant, on: bool) -> Result<Run> {
    let [package, program, name] = mutant.test;
    let mut command = workspace.command("cargo");
    // One set of features for all: another one would compile every dependency again.
    command.args(["test", "--features", FEATURES]);
    match program {
        "" => command.arg("--lib"),
        program => command.args(["--test", program]),
    };
    command
        .arg(name)
        .env("HEARTH_BIN_DIR", workspace.bin_dir())
        .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1")
        .env_remove(SWITCH);
    if let Ok(nats_server) = setup::nats_server(workspace) {
        command.env("HEARTH_NATS_SERVER", nats_server);
    }
    if on {
        command.env(SWITCH, mutant.name);
    }
    let output = command.output().context("starting cargo test")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        said.lines()
            .any(|line| line.starts_with("test ") && line.contains(" ... ")),
        "no test {name} ran in {package} {program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    if output.status.success() {
        return Ok(Run::Passed);
    }
    let lines = said
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
    let failed: Vec<&str> = lines.collect();
    // A test program that a broken rule brings down has no such line.
    Ok(Run::Failed(if failed.is_empty() {
        name.to_owned()
    } else {
        failed.join(", ")
    }))
}

/// Runs the mutants whose names contain `only`, and prints a table.
///
/// # Errors
/// A test that fails without a mutant, or a mutant that lives.
pub fn run(workspace: &Workspace, only: &str) -> Result<()> {
    let chosen: Vec<&Mutant> = MUTANTS.iter().filter(|mutant| mutant.name.contains(only)).collect();
    ensure!(!chosen.is_empty(), "no mutant's name contains {only:?}");
    println!("| mutant | the rule it breaks | killed by |\n|---|---|---|");
    let mut alive = Vec::new();
    let mut sound: Vec<[&str; 3]> = Vec::new();
    for mutant in chosen {
        let started = Instant::now();
        if !sound.contains(&mutant.test) {
            if let Run::Failed(names) = run_test(workspace, mutant, false)? {
                bail!("{names} fails without any mutant: `cargo xtask test` first");
            }
            sound.push(mutant.test);
        }
        let killer = match run_test(workspace, mutant, true)? {
            Run::Failed(names) => names,
            Run::Passed => {
                alive.push(mutant.name);
                "ALIVE".to_owned()
            }
        };
        println!("| `{}` | {} | {killer} |", mutant.name, mutant.rule);
        note(format!("{} took {}", mutant.name, seconds(started.elapsed())));
    }
    ensure!(alive.is_empty(), "no test notices {}", alive.join(", "));
    Ok(())
}
