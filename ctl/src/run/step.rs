//! The cluster right after any event of the log, folded from the log: what the dashboard's `t`, `T` and `b` ask for.
//!
//! States on the way are kept, the denser the nearer to the event asked for, so that the next step in either direction
//! folds few events, and many steps back never fold the whole log again each.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_protocol::view::{ClusterView, ImageHeatView};
use hearth_protocol::{ImageId, Seq};
use hearth_tui::tables::LogLine;
use scheduler_core::{Judged, State};

use super::events::{self, Catalog};
use crate::Outcome;
use crate::history::History;

/// Blocks tracked in all kept states together: some 300 MB.
const BLOCKS_KEPT_MAX: u64 = 4 << 20;
/// States kept at most and, of a cluster that tracks very many blocks, at least.
const STATES_KEPT: (u64, u64) = (3, 32);
/// How far before the event asked for the nearest state is kept; each further one lies four times as far.
const NEAREST: u64 = 16;
/// Events between two reports of how far the log was read.
const REPORT_EVERY: u64 = 10_000;

/// An event, and the cluster right after it.
#[derive(Debug)]
pub struct Stepped {
    /// The event.
    pub event: LogLine,
    /// The cluster after it.
    pub view: ClusterView,
    /// Heat of the image that was asked for, if there was one of that id.
    pub heat: Option<ImageHeatView>,
}

/// See the module.
pub struct Steps {
    history: History,
    catalog: Catalog,
    /// States by the position they were folded up to, foreign messages included.
    kept: BTreeMap<Seq, State>,
}

impl Steps {
    /// Steps through a log.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn new(history: History) -> Outcome<Self> {
        let catalog = Catalog::read(&history).await?;
        Ok(Self {
            history,
            catalog,
            kept: BTreeMap::new(),
        })
    }

    /// The cluster right after the event at `seq`. `go_on` hears now and then how far the log was read; if it breaks,
    /// `None` is returned, and what was folded so far is kept.
    ///
    /// # Errors
    /// Exit code 3 if the log has no such event, 4 if it does not begin at its beginning.
    pub async fn at(
        &mut self,
        seq: Seq,
        heat: Option<ImageId>,
        mut go_on: impl FnMut(Seq) -> ControlFlow<()> + Send,
    ) -> Outcome<Option<Stepped>> {
        let last = self.history.check_whole().await?;
        if seq < Seq(1) || seq > last {
            return Err(Failure::new(
                FailureKind::NotFound,
                format!("there is no event #{seq}: the log ends at #{last}"),
                "",
            ));
        }
        // Strictly before: the event itself is folded, so that its verdict is known.
        let before = self.kept.range(..seq).next_back();
        let (start, mut state) = before.map_or((Seq(0), State::default()), |(at, state)| (*at, state.clone()));
        let (catalog, kept) = (&mut self.catalog, &mut self.kept);
        let (mut at, mut event) = (start, None);
        self.history
            .walk(start.next(), seq, |logged| {
                at = logged.seq;
                catalog.learn(&logged);
                let decoded = logged.message.envelope().and_then(|e| Ok((e, logged.message.event()?)));
                // What is no event of ours is skipped by every fold.
                let judged = decoded
                    .ok()
                    .map(|(envelope, event)| state.apply(at, &envelope, &event).judged);
                if at == seq {
                    let mut line = events::line(&logged, catalog);
                    line.void = match judged {
                        Some(Judged::Void(why)) => Some(why.into()),
                        Some(Judged::Repeat | Judged::Behind) => Some("a repeat".into()),
                        Some(Judged::Valid) | None => None,
                    };
                    event = Some(line);
                } else if is_kept(seq.0 - at.0) {
                    kept.insert(at, state.clone());
                }
                if at.0.is_multiple_of(REPORT_EVERY) {
                    go_on(at)
                } else {
                    ControlFlow::Continue(())
                }
            })
            .await?;
        let stepped = event.map(|event| Stepped {
            event,
            view: scheduler_core::view(&state),
            heat: heat.and_then(|image| scheduler_core::image_heat(&state, image)),
        });
        self.keep(at, state);
        Ok(stepped)
    }

    /// Keeps a state, and forgets some far from it if there are too many.
    fn keep(&mut self, at: Seq, state: State) {
        let (least, most) = STATES_KEPT;
        let room = (BLOCKS_KEPT_MAX / state.tracked_blocks().max(1)).clamp(least, most);
        self.kept.insert(at, state);
        while self.kept.len() as u64 > room {
            let (first, last) = (self.kept.first_key_value(), self.kept.last_key_value());
            // Later ones go first: they are reached again from here.
            match (first, last) {
                (_, Some((last, _))) if *last > at => self.kept.pop_last(),
                _ => self.kept.pop_first(),
            };
        }
    }
}

/// Whether a state this far before the event asked for is kept.
fn is_kept(distance: u64) -> bool {
    let mut far = NEAREST;
    while far < distance {
        far = far.saturating_mul(4);
    }
    far == distance
}

#[cfg(test)]
mod tests;
