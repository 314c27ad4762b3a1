//! What happens to a log besides appending: snapshots come, old heat and old snapshots go. Between two batches, a
//! bounded piece at a time, so that appending never waits long.

use hearth_protocol::{Event, Seq, WallMs};
use tokio::sync::mpsc;

use crate::log::{EventLog, LogError};
use crate::snapshot::{self, Retention};

/// Heat events thinned between two batches: a few megabytes read and written.
const THINNED_AT_ONCE: usize = 64;

/// See the module.
pub(crate) struct Keeper {
    snapshots: mpsc::Receiver<(Seq, Vec<u8>)>,
    retention: Retention,
    /// Heat up to here is to go; 0 for none.
    thin_through: Seq,
}

impl Keeper {
    pub(crate) fn new(snapshots: mpsc::Receiver<(Seq, Vec<u8>)>, retention: Retention) -> Self {
        Self {
            snapshots,
            retention,
            thin_through: Seq(0),
        }
    }

    /// Does the next piece.
    ///
    /// # Errors
    /// Failures of the log. A snapshot that cannot be written is none: the log goes on without it.
    pub(crate) fn work(&mut self, log: &mut dyn EventLog) -> Result<(), LogError> {
        if let Ok((at, bytes)) = self.snapshots.try_recv() {
            match log.put_snapshot(at, &bytes) {
                Ok(()) => tracing::debug!(%at, bytes = bytes.len(), "kept a snapshot"),
                Err(error) => tracing::warn!(%at, %error, "no snapshot is kept: the next start takes longer"),
            }
            self.plan(log)?;
        }
        if self.thin_through > Seq(0) && log.thin(self.thin_through, THINNED_AT_ONCE)? < THINNED_AT_ONCE {
            tracing::info!(through = %self.thin_through, "heat before this position is thinned");
            self.thin_through = Seq(0);
        }
        Ok(())
    }

    fn plan(&mut self, log: &mut dyn EventLog) -> Result<(), LogError> {
        let mut snapshots = Vec::new();
        for at in log.snapshots()? {
            // What was not taken after a tick is no snapshot of this log.
            if let Some((_, Event::Ticked { time, .. })) = log.get(at)?.and_then(|record| record.event()) {
                snapshots.push((at, time));
            }
        }
        let now = snapshots.last().map_or(WallMs(0), |(_, time)| *time);
        let thinned = log.thinned()?;
        let (through, gone) = self.retention.plan(&snapshots, thinned, now);
        for at in gone {
            log.drop_snapshot(at)?;
        }
        if through > thinned {
            // What is derived behind the gap rests on this one.
            match snapshot::open(log, through)? {
                Ok(_) => self.thin_through = through,
                Err(why) => tracing::warn!(at = %through, "heat is kept, the snapshot behind it is not sound: {why}"),
            }
        }
        Ok(())
    }
}
