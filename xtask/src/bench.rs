//! `cargo xtask bench`: the measurements, each a subcommand of the `hearth-bench` program.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use crate::workspace::Workspace;

/// What can be measured.
#[derive(clap::Subcommand)]
pub enum What {
    /// Hit ratios of the production RAM tier over recorded block traces, beside other policies
    Policy {
        /// Folder of `.vbt.zst` traces [default: `../shared/traces` beside the clone]
        #[arg(long, env = "HEARTH_TRACES")]
        traces: Option<PathBuf>,
    },
}

/// Builds the benchmarks and runs one of them.
///
/// # Errors
/// The benchmark said why on standard error.
pub fn run(workspace: &Workspace, what: What) -> Result<()> {
    let What::Policy { traces } = what;
    // Relative paths are the caller's, and cargo runs in the clone.
    let traces = match traces {
        Some(dir) => std::path::absolute(dir)?,
        None => workspace.root.join("../shared/traces"),
    };
    let mut command = workspace.command("cargo");
    command
        .args(["run", "--quiet", "-p", "hearth-bench", "--", "policy", "--traces"])
        .arg(&traces)
        .args(["--out", "bench/results/policy.md"]);
    let status = command.status()?;
    ensure!(status.success(), "the benchmark ended with {status}");
    Ok(())
}
