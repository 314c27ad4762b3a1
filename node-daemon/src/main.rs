//! `hearth-node`: the daemon of one node.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use hearth_node::store::fault::Faults;

/// Serves VM images from this node's store, holds their hot blocks in RAM, and carries out the scheduler's orders.
#[derive(Parser)]
#[command(name = "hearth-node", version)]
struct Args {
    /// Configuration file (TOML); see docs/OPERATING.md
    #[arg(long, value_name = "FILE", default_value = "/etc/hearth/node.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEARTH_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // Exit codes as the other commands have them: 2 for what the operator wrote, 1 for everything else.
    let (code, error) = match hearth_node::config::NodeConfig::load(&args.config) {
        Err(error) => (2, error.into()),
        Ok(config) => match hearth_node::agent::run(config, Faults::default()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (1, error),
        },
    };
    eprintln!("hearth-node: {error:#}");
    ExitCode::from(code)
}
