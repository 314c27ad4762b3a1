//! `cargo xtask test`: format, lints, docs and tests, all in one cargo profile over the whole workspace.
//!
//! One profile and one package selection matter: a dependency compiled with another set of features is another
//! dependency, and RocksDB's C++ takes ten minutes.

use std::env;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::process;
use crate::setup::{self, Machine};
use crate::step::{note, seconds, step};
use crate::workspace::Workspace;

/// Tests that ran.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs everything, goes on after a failure, and ends with a summary line on standard output.
///
/// # Errors
/// At least one step failed; their names are in the text.
pub fn run(workspace: &Workspace, machine: &Machine, tests_only: bool, filters: &[String]) -> Result<()> {
    let start = Instant::now();
    let mut failed = Vec::new();
    if !tests_only {
        lints(workspace, machine, &mut failed);
    }
    let mut tally = Tally::default();
    let mut stage = |what: &'static str, words: &[&str], filters: &[String]| {
        let run = step(what, || {
            let ok = process::watched(cargo(workspace, machine, words).args(filters), |line| {
                if let Some(counted) = counted(line) {
                    tally.passed += counted.passed;
                    tally.failed += counted.failed;
                    tally.skipped += counted.skipped;
                }
            })?;
            if ok {
                Ok(())
            } else {
                bail!("`cargo {}` failed", words.join(" "))
            }
        });
        if let Err(error) = run {
            failed.push((what, error));
        }
    };
    // The end-to-end tests start these programs.
    stage(
        "build programs and tests",
        &["build", "--workspace", "--bins", "--tests"],
        &[],
    );
    if process::succeeds(workspace.command("cargo").args(["nextest", "--version"])) {
        stage(
            "run tests",
            &["nextest", "run", "--workspace", "--no-fail-fast"],
            filters,
        );
        if filters.is_empty() {
            stage(
                "run examples in the docs",
                &["test", "--workspace", "--doc", "--no-fail-fast"],
                &[],
            );
        }
    } else {
        stage("run tests", &["test", "--workspace", "--no-fail-fast"], filters);
    }
    for (what, error) in &failed {
        note(format!("FAILED: {what}: {error:#}"));
    }
    note(format!("{} in all", seconds(start.elapsed())));
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    match failed.len() {
        0 => Ok(()),
        n => bail!(
            "{n} steps failed: {}",
            failed.iter().map(|(what, _)| *what).collect::<Vec<_>>().join(", ")
        ),
    }
}

fn lints(workspace: &Workspace, machine: &Machine, failed: &mut Vec<(&'static str, anyhow::Error)>) {
    let mut one = |what: &'static str, command: &mut Command| {
        if let Err(error) = step(what, || process::passthrough(command)) {
            failed.push((what, error));
        }
    };
    one(
        "check format",
        &mut cargo(workspace, machine, &["fmt", "--all", "--check"]),
    );
    one(
        "lint",
        &mut cargo(
            workspace,
            machine,
            &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ),
    );
    one(
        "build the docs",
        cargo(workspace, machine, &["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    );
    if machine.ebpf_build.is_ok() && setup::has_nightly_clippy(workspace) {
        one("lint the eBPF programs", &mut ebpf_clippy(workspace));
    } else {
        note("the eBPF programs are not linted in this run: that needs clippy of the nightly toolchain");
    }
    if workspace.find_program("cargo-deny").is_some() {
        one(
            "check licences and bans",
            &mut cargo(workspace, machine, &["deny", "check", "licenses", "bans", "sources"]),
        );
    } else {
        note("cargo-deny is not here: licences are checked by a test, bans and sources are not checked in this run");
    }
}

/// Clippy for the target on which the kernel programs really run; the workspace's lint sees only their host stub.
fn ebpf_clippy(workspace: &Workspace) -> Command {
    let mut command = setup::nightly(workspace, "cargo");
    command
        .args(["clippy", "--package", "hearth-probes-ebpf"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        // Its own folder: another compiler in the shared one would only make both wait for each other.
        .arg(workspace.target.join("ebpf-lint"))
        .args(["--", "-D", "warnings"])
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        );
    command
}

fn cargo(workspace: &Workspace, machine: &Machine, words: &[&str]) -> Command {
    let mut command = workspace.command("cargo");
    command.args(words).env("HEARTH_BIN_DIR", workspace.bin_dir());
    if let Ok(nats_server) = setup::nats_server(workspace) {
        command.env("HEARTH_NATS_SERVER", nats_server);
    }
    if machine.ebpf_build.is_ok() {
        // Without it the probes' build may leave the eBPF object out and say so only at run time.
        command.env("HEARTH_REQUIRE_EBPF", "1");
    }
    if env::var_os("REQUIRE_E2E").is_none() {
        note_once();
    }
    command
}

fn note_once() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| note("tests that cannot run here print SKIP; set REQUIRE_E2E=1 to make them fail"));
}

/// Reads the summary line of `cargo test` or of nextest.
fn counted(line: &str) -> Option<Tally> {
    // Nextest repeats what a failed test program said, indented: that is in its own summary already.
    let body = if let Some(rest) = line.strip_prefix("test result: ") {
        rest.split_once(". ")?.1
    } else if line.trim_start().starts_with("Summary [") {
        line.split_once("tests run: ")
            .or_else(|| line.split_once("test run: "))?
            .1
    } else {
        return None;
    };
    let mut tally = Tally::default();
    for part in body.split([',', ';']) {
        let mut words = part.split_whitespace();
        let (Some(Ok(number)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
            continue;
        };
        match what {
            "passed" => tally.passed = number,
            "failed" | "timed" => tally.failed += number,
            "skipped" | "ignored" => tally.skipped = number,
            _ => {}
        }
    }
    Some(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_both_runners_are_read() {
        let check = |line: &str, passed, failed, skipped| {
            let expect = Tally {
                passed,
                failed,
                skipped,
            };
            assert_eq!(counted(line), Some(expect), "{line}");
        };
        check(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s",
            12,
            0,
            1,
        );
        check(
            "     Summary [  12.345s] 45 tests run: 40 passed (2 slow), 5 failed, 3 skipped",
            40,
            5,
            3,
        );
        check("     Summary [   0.345s] 1 test run: 1 passed, 0 skipped", 1, 0, 0);
        check(
            "     Summary [   9.000s] 9 tests run: 7 passed, 1 failed, 1 timed out, 0 skipped",
            7,
            2,
            0,
        );
        assert_eq!(counted("running 3 tests"), None);
        assert_eq!(counted("    test result: FAILED. 0 passed; 1 failed; 0 ignored"), None);
    }
}
