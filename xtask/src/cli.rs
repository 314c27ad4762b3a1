//! The command line.

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::setup::{Purpose, SetupMode};
use crate::workspace::Workspace;
use crate::{bench, check, demo, mutants, setup};

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about = "Set-up, demo and test of the Hearth workspace")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(clap::Args)]
struct SetupArgs {
    /// Installs nothing: if something is missing, lists it and stops.
    #[arg(long)]
    no_install: bool,
}

impl SetupArgs {
    fn mode(&self) -> SetupMode {
        if self.no_install {
            SetupMode::ListOnly
        } else {
            SetupMode::Install
        }
    }
}

#[derive(Subcommand)]
enum Task {
    /// Installs what builds, tests and the demo need; does nothing twice
    Setup {
        #[command(flatten)]
        setup: SetupArgs,
    },
    /// Set-up, then a cluster with real guests on this machine, and what it measured
    Demo {
        #[command(flatten)]
        setup: SetupArgs,
        /// Without the dashboard: progress on stderr, one line of JSON on stdout at the end
        #[arg(long)]
        headless: bool,
    },
    /// Set-up, then format, lints, docs and all tests
    Test {
        #[command(flatten)]
        setup: SetupArgs,
        /// Runs only the tests, without format, lints and docs
        #[arg(long)]
        tests_only: bool,
        /// Test names to run, as `cargo test` takes them; all without
        filters: Vec<String>,
    },
    /// Breaks one safety rule at a time and shows the test that notices
    Mutants {
        /// Only mutants whose names contain this
        #[arg(default_value = "")]
        only: String,
        /// Only say which switch breaks which rule, and which test notices
        #[arg(long)]
        list: bool,
    },
    /// Measures Hearth beside its peers
    Bench {
        #[command(subcommand)]
        what: bench::What,
    },
}

/// Parses the command line and runs the task.
///
/// # Errors
/// The first step that failed, with what to do about it.
pub fn run() -> Result<()> {
    let workspace = Workspace::find()?;
    match Cli::parse().task {
        Task::Setup { setup: args } => setup::run(&workspace, Purpose::Test, args.mode()).map(drop),
        Task::Demo { setup: args, headless } => {
            let machine = setup::run(&workspace, Purpose::Demo, args.mode())?;
            demo::run(&workspace, &machine, headless)
        }
        Task::Test {
            setup: args,
            tests_only,
            filters,
        } => {
            let machine = setup::run(&workspace, Purpose::Test, args.mode())?;
            check::run(&workspace, &machine, tests_only, &filters)
        }
        Task::Mutants { list: true, .. } => {
            mutants::list();
            Ok(())
        }
        Task::Mutants { only, .. } => {
            setup::run(&workspace, Purpose::Test, SetupMode::Install)?;
            mutants::run(&workspace, &only)
        }
        Task::Bench { what } => bench::run(&workspace, what),
    }
}
