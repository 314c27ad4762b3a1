//! The `hearth` command: every operation on the cluster, and `hearth top` for the dashboard.
//!
//! Data goes to stdout, everything else to stderr. A failure is one line that says what failed, one that says what to
//! do next, and an exit code that scripts can rely on ([`hearth_protocol::rpc::FailureKind`]). Nothing here decides
//! anything: nodes and the scheduler do, and the log says what they did.

mod cli;
mod cluster;
mod history;
mod moment;
mod names;
mod output;
mod qmp;
mod run;
mod snippets;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use hearth_protocol::rpc::{Failure, FailureKind};

/// What every operation returns.
type Outcome<T = ()> = Result<T, Failure>;

/// The command line as clap knows it, for completions and manual pages.
pub fn command() -> clap::Command {
    cli::Cli::command()
}

/// Longest argument that an error repeats, in characters.
const SHOWN_CHARS_MAX: usize = 100;

/// Ends with clap's words, in which arguments that nobody wants to read again are cut.
fn usage(error: &clap::Error) -> ! {
    let arguments: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let cut = |text: &str| {
        text.chars()
            .take(SHOWN_CHARS_MAX)
            .chain("…".chars())
            .collect::<String>()
    };
    let long: Vec<_> = arguments
        .iter()
        .filter(|a| a.chars().count() > SHOWN_CHARS_MAX)
        .collect();
    if long.is_empty() || !error.use_stderr() {
        error.exit();
    }
    let text = long.iter().fold(error.to_string(), |text, argument| {
        text.replace(argument.as_str(), &cut(argument))
    });
    eprint!("{text}");
    std::process::exit(error.exit_code());
}

/// Reads the command line, does what it says, and reports.
pub fn main() -> ExitCode {
    // Usage errors leave here with exit code 2, help and version with 0.
    let cli = cli::Cli::try_parse().unwrap_or_else(|error| usage(&error));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run::run(cli));
            // A blocked read of a terminal must not hold up the end.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Failure::new(FailureKind::Failed, format!("cannot start: {error}"), "")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::report(&failure);
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
