//! `hearth-fd-holder --socket PATH [--exit-when-unused]`: keeps file descriptors for node daemons over their restarts.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Keeps file descriptors for node daemons, so that kernel devices and listening sockets survive their restarts.
#[derive(Parser)]
#[command(name = "hearth-fd-holder", version)]
struct Args {
    /// Unix socket on which daemons reach it.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// End when nothing is held and the last daemon has disconnected.
    #[arg(long)]
    exit_when_unused: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match hearth_node::export::fdstore::holder::run(&args.socket, args.exit_when_unused) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hearth-fd-holder: {}: {error}", args.socket.display());
            ExitCode::FAILURE
        }
    }
}
