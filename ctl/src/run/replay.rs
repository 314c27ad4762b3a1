//! `hearth replay`: the cluster as of a moment, folded anew, and whether its digest is the one recorded.

use std::ops::ControlFlow;

use hearth_protocol::chain::hex;
use hearth_protocol::view::ClusterView;
use hearth_protocol::{Event, Seq};
use hearth_tui::headless;
use scheduler_core::replay::{Replayer, Step, Until};
use serde::Serialize;

use super::Context;
use crate::Outcome;
use crate::cli::Replay;
use crate::history::History;
use crate::moment::Moment;
use crate::output;

/// A digest that the leader recorded.
#[derive(Debug, Clone, Serialize)]
struct Recorded {
    /// The event that records it.
    seq: Seq,
    /// The position it covers.
    at: Seq,
    /// blake3 of the state, hexadecimal.
    state: String,
    /// Whether the replay came to the same one.
    same: bool,
}

/// What the replay gives.
#[derive(Debug, Serialize)]
struct Replayed {
    /// The position reached.
    seq: Seq,
    /// blake3 of the state there, hexadecimal.
    state_digest: String,
    /// The newest recorded digest that covers a position up to there.
    recorded: Option<Recorded>,
    /// Digests compared on the way, and those that differ from the log or follow not from it.
    digests_same: u64,
    /// Differences of decisions and digests.
    differences: u64,
    /// Commands on the way that follow from their ticks.
    commands_same: u64,
    /// The cluster then.
    view: ClusterView,
}

pub async fn run(context: &Context, options: &Replay) -> Outcome {
    let history = History::open(&context.global, &options.from).await?;
    let last = history.check_whole().await?;
    let until = match options.at {
        None => Until::End,
        Some(Moment::Seq(seq)) => Until::Seq(seq),
        Some(Moment::Time(time)) => Until::Time(time),
    };
    let mut replayer = Replayer::new(until);
    let mut recorded: Option<Recorded> = None;
    // Digests computed at the positions that records will name; the leader records one some events after its position.
    let mut computed: Vec<(Seq, String)> = Vec::new();
    let mut stopped = false;
    history
        .walk(Seq(1), last, |logged| {
            let event = if stopped {
                logged.message.event().ok()
            } else {
                match replayer.step(logged.seq, &logged.message) {
                    Step::Folded { event, .. } => {
                        if let Some((seq, state, _)) = &replayer.report().newest_digest
                            && computed.last().is_none_or(|(last, _)| last < seq)
                        {
                            computed.push((*seq, state.clone()));
                        }
                        Some(*event)
                    }
                    Step::Foreign => None,
                    Step::Stopped => {
                        stopped = true;
                        computed.push((replayer.state().seq(), hex(&replayer.state().digest())));
                        logged.message.event().ok()
                    }
                }
            };
            if let Some(Event::DigestRecorded { at, state, .. }) = event {
                if at > replayer.state().seq() {
                    return ControlFlow::Break(());
                }
                if let Some((_, here)) = computed.iter().find(|(seq, _)| *seq == at) {
                    let state = hex(&state);
                    recorded = Some(Recorded {
                        seq: logged.seq,
                        at,
                        same: *here == state,
                        state,
                    });
                }
            }
            ControlFlow::Continue(())
        })
        .await?;
    let (state, report) = replayer.finish();
    let replayed = Replayed {
        seq: state.seq(),
        state_digest: hex(&state.digest()),
        recorded,
        digests_same: report.digests_same,
        differences: report.differences_total,
        commands_same: report.commands_same,
        view: scheduler_core::view(&state),
    };
    context.out.one(&replayed, || text(&replayed));
    Ok(())
}

fn text(r: &Replayed) -> String {
    let recorded = match &r.recorded {
        None => "no digest was recorded for a position up to here".into(),
        Some(d) if d.same && d.at == r.seq => format!("equal to the one recorded for #{} by event #{}", d.at, d.seq),
        Some(d) if d.same => format!(
            "the newest recorded one, for #{} by event #{}, is equal to the replay's there",
            d.at, d.seq
        ),
        Some(d) => format!(
            "DIFFERENT from the one recorded for #{} by event #{}: {}",
            d.at, d.seq, d.state
        ),
    };
    format!(
        "state digest  {} at #{}\n              {recorded}\n              {} digests agree on the way, {} commands \
         follow from their ticks, {} differences\n\n{}",
        r.state_digest,
        r.seq,
        r.digests_same,
        r.commands_same,
        r.differences,
        headless::overview(&r.view, output::width())
    )
}
