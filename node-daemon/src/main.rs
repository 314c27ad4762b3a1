//! `hearth-node`: the daemon of one node.

use std::io::IsTerminal as _;
use std::path::PathBuf;

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

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("HEARTH_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = hearth_node::config::NodeConfig::load(&args.config)?;
    hearth_node::agent::run(config, Faults::default())
}
