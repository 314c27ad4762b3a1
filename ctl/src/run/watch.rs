//! `--watch`: the same print again and again.

use std::io::{self, IsTerminal};

use super::Context;
use crate::Outcome;
use crate::cli::Watch;
use crate::output;

/// Prints once, or again and again until interrupted; on a terminal each print takes the place of the last.
///
/// # Errors
/// Those of a single print. A watcher outlives a restart of what it watches: it says the failure and looks again.
pub async fn run(context: &Context, watch: Watch, print: impl AsyncFn() -> Outcome) -> Outcome {
    let Some(every) = watch.watch else {
        return print().await;
    };
    let clear = io::stdout().is_terminal() && !context.out.is_json();
    loop {
        if clear {
            // Home, then clear to the end: less flicker than clearing first.
            context.out.text("\x1b[H\x1b[J");
        }
        if let Err(failure) = print().await {
            output::report(&failure);
        }
        if !clear && !context.out.is_json() {
            context.out.text("\n");
        }
        tokio::time::sleep(every).await;
    }
}
