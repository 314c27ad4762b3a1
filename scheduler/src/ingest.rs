//! From the stream into the log: fetch, append (synced), acknowledge, hand on.
//!
//! A task of its own, the only writer of the log. It never appends what does not continue the very stream it has read
//! before: after each new connection it compares its last record with what the stream has there.

use std::time::Duration;

use hearth_bus::{Bus, BusError, Fetched, Reader};
use hearth_protocol::{DecodeError, SchedulerId, Seq};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::log::{Entry, EventLog, LogError};

/// Messages per write batch, at most: one synced write covers them all.
const BATCH_MAX: usize = 512;

/// How long one fetch waits: bounds how late a lost connection or a rollback is noticed.
const FETCH_WAIT: Duration = Duration::from_secs(1);

/// Pause before asking again a server that is away.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// A frozen scheduler repeats this often why.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// What the task hands on.
#[derive(Debug)]
pub enum Ingested {
    /// Appended entries, in order.
    Entries(Vec<Entry>),
    /// The stream does not continue what the log holds: nothing may be decided until it does again.
    Frozen(String),
    /// It does.
    Flowing,
}

/// Why the task ended.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The log failed: what was acknowledged is safe, nothing more can be.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A message of a later Hearth.
    #[error("message {seq} cannot be read: {source}")]
    Newer {
        /// Its position.
        seq: Seq,
        /// What is wrong.
        #[source]
        source: DecodeError,
    },
}

/// The name under which the server remembers how far a scheduler's log has come.
pub fn durable_name(id: &SchedulerId) -> String {
    format!("scheduler-{id}")
}

pub(crate) struct Ingest {
    pub bus: Bus,
    pub log: Box<dyn EventLog>,
    pub id: SchedulerId,
    pub to: mpsc::Sender<Ingested>,
}

impl Ingest {
    /// Runs until the receiver is gone.
    pub(crate) async fn run(mut self) -> Result<(), IngestError> {
        self.tie().await?;
        let mut reader = self
            .bus
            .durable_log_reader(self.log.head().seq.next(), durable_name(&self.id));
        let mut checked_opening = 0;
        let mut frozen: Option<Instant> = None;
        while !self.to.is_closed() {
            let fetched = match reader.fetch(BATCH_MAX, FETCH_WAIT).await {
                Ok(fetched) => fetched,
                Err(rolled_back @ BusError::RolledBack { .. }) => {
                    self.freeze(&mut frozen, rolled_back.to_string()).await;
                    continue;
                }
                Err(error) => {
                    tracing::debug!(%error, "the stream cannot be read now");
                    continue;
                }
            };
            if reader.openings() != checked_opening {
                self.continues(&mut frozen).await?;
                checked_opening = reader.openings();
            }
            if frozen.take().is_some() {
                tracing::info!("the stream continues the log again");
                let _ = self.to.send(Ingested::Flowing).await;
            }
            self.append(fetched, &mut reader).await?;
        }
        Ok(())
    }

    /// Ties the log to the stream, and says when the log lost a tail that the server knows it had.
    async fn tie(&mut self) -> Result<(), IngestError> {
        let bounds = loop {
            match self.bus.bounds().await {
                Ok(bounds) => break bounds,
                Err(error) => {
                    tracing::debug!(%error, "waiting for the stream");
                    sleep(ASK_AGAIN).await;
                }
            }
        };
        self.log.bind(&bounds.identity)?;
        let head = self.log.head().seq;
        if bounds.first > head.next() {
            return Err(self
                .log
                .damage_at(
                    head.next(),
                    format!(
                        "the stream begins at {}, so the positions before cannot be refilled",
                        bounds.first
                    ),
                )
                .into());
        }
        match self.bus.acked(&durable_name(&self.id)).await {
            Ok(Some(acked)) if acked > head => tracing::warn!(
                %head, %acked,
                "the log ends before the position it acknowledged: it is refilled from the stream"
            ),
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the acknowledged position cannot be read"),
        }
        Ok(())
    }

    /// Waits until the stream holds, at the log's last position, the very message the log holds there.
    async fn continues(&mut self, frozen: &mut Option<Instant>) -> Result<(), IngestError> {
        let head = self.log.head().seq;
        if head == Seq(0) {
            return Ok(());
        }
        let ours = self
            .log
            .get(head)?
            .ok_or_else(|| self.log.damage_at(head, "the last record is missing".into()))?;
        loop {
            match self.bus.get(head).await {
                Ok(Some(theirs)) if ours.is(&theirs) => return Ok(()),
                Ok(Some(_)) => {
                    let why = format!(
                        "the stream HEARTH holds another message at {head} than this scheduler has read there: it was \
                         rolled back and went on, or was replaced. Nothing is decided until an operator restores it or \
                         acts with `hearth log recover`"
                    );
                    self.freeze(frozen, why).await;
                }
                Ok(None) => {
                    let last = self.bus.bounds().await.map_or(Seq(0), |bounds| bounds.last);
                    let why = BusError::RolledBack { seen: head, last }.to_string();
                    self.freeze(frozen, why).await;
                }
                Err(error) => tracing::debug!(%error, "the stream cannot be compared now"),
            }
            if self.to.is_closed() {
                return Ok(());
            }
            sleep(ASK_AGAIN).await;
        }
    }

    async fn freeze(&self, frozen: &mut Option<Instant>, why: String) {
        if frozen.is_none_or(|since| since.elapsed() >= COMPLAIN_EVERY) {
            *frozen = Some(Instant::now());
            tracing::error!("frozen: {why}");
            let _ = self.to.send(Ingested::Frozen(why)).await;
        }
    }

    async fn append(&mut self, fetched: Vec<Fetched>, reader: &mut Reader) -> Result<(), IngestError> {
        let Some(last) = fetched.last().map(|message| message.seq) else {
            return Ok(());
        };
        let mut entries = Vec::with_capacity(fetched.len());
        for message in fetched {
            let seq = message.seq;
            entries.push(Entry::from_fetched(message).map_err(|source| IngestError::Newer { seq, source })?);
        }
        tokio::task::block_in_place(|| self.log.append(&entries))?;
        if let Err(error) = reader.ack(last).await {
            tracing::debug!(%error, "not acknowledged; the next acknowledgement covers it");
        }
        // A closed channel is the end of the scheduler, which the loop sees.
        let _ = self.to.send(Ingested::Entries(entries)).await;
        Ok(())
    }
}
