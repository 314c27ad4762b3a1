//! `hearth-scheduler`: see `--help`.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use hearth_scheduler::{config::Arguments, run, stop_signal};

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,async_nats=warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let fail = |code: u8, error: &dyn std::error::Error| {
        eprintln!("hearth-scheduler: {error}");
        ExitCode::from(code)
    };
    match Arguments::parse().resolve() {
        Err(error) => fail(2, &error),
        Ok(config) => run::run(config, stop_signal())
            .await
            .map_or_else(|error| fail(1, &error), |()| ExitCode::SUCCESS),
    }
}
