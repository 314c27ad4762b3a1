//! `hearth why`: the chain from heat to result for one block, from the log alone.

use std::ops::ControlFlow;

use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_protocol::{BlockIndex, Event, ImageName, Seq};
use scheduler_core::State;
use scheduler_core::why::{Why, WhyImage, WhyReport};

use super::Context;
use crate::Outcome;
use crate::cli;
use crate::history::History;
use crate::moment::Moment;

pub async fn run(context: &Context, options: cli::Why) -> Outcome {
    let history = History::open(&context.global, &options.from).await?;
    let report = ask(&history, options.block.image, options.block.block, options.at).await?;
    context.out.one(&report, || report.to_string());
    Ok(())
}

/// Folds the log up to a moment and watches one block.
///
/// # Errors
/// Exit code 3 if image or block did not exist then, 4 if the log does not begin at its beginning.
pub async fn ask(history: &History, image: ImageName, block: BlockIndex, at: Option<Moment>) -> Outcome<WhyReport> {
    let last = history.check_whole().await?;
    let last = match at {
        Some(Moment::Seq(seq)) => last.min(seq),
        _ => last,
    };
    let mut state = State::default();
    let mut why = Why::new(WhyImage::Name(image), block);
    history
        .walk(Seq(1), last, |logged| {
            // What is no event of ours is skipped by every fold.
            let (Ok(envelope), Ok(event)) = (logged.message.envelope(), logged.message.event()) else {
                return ControlFlow::Continue(());
            };
            if let (Some(Moment::Time(end)), Event::Ticked { time, .. }) = (at, &event)
                && *time > end
            {
                return ControlFlow::Break(());
            }
            let applied = state.apply(logged.seq, &envelope, &event);
            why.observe(logged.seq, &event, applied, &state);
            ControlFlow::Continue(())
        })
        .await?;
    why.answer(&state)
        .map_err(|error| Failure::new(FailureKind::NotFound, error.to_string(), "hearth image list"))
}
