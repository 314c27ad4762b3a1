//! `cargo xtask mutants`: breaks one safety rule at a time and shows the test that notices.
//!
//! The switches are compiled in by the feature `mutants` of the crates that hold the rules; `HEARTH_MUTANT` turns one on
//! for a whole process. The tests are the ordinary ones: each passes with every switch off, and has to fail with its own
//! switch on.

mod table;

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use self::table::{MUTANTS, Mutant, RULES};
use crate::setup;
use crate::step::{note, seconds};
use crate::workspace::Workspace;

/// The variable that names the switch that is on.
const SWITCH: &str = "HEARTH_MUTANT";

/// The crates that hold switches.
const FEATURES: &str =
    "hearth-node/mutants,hearth-replication/mutants,hearth-scheduler/mutants,hearth-sim/mutants,scheduler-core/mutants";

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

/// Prints for each safety rule which switches break it, and which test notices.
pub fn list() {
    println!("| rule | switch | what it breaks | test |\n|---|---|---|---|");
    for (number, words) in (1..).zip(RULES) {
        for mutant in MUTANTS.iter().filter(|mutant| mutant.number == Some(number)) {
            let [package, program, name] = mutant.test;
            println!(
                "| {number}. {words} | `{}` | {} | {package} {program} {name} |",
                mutant.name, mutant.rule
            );
        }
    }
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
