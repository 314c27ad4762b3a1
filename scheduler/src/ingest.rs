//! From the stream into the log: fetch, append (synced), acknowledge, hand on.
//!
//! A task of its own, the only writer of the log. It never appends what does not continue the very stream it has read
//! before: after each new connection it compares its last record with what the stream has there.

use std::time::Duration;

use hearth_bus::{Bus, BusError, Fetched, Reader};
use hearth_protocol::{DecodeError, SchedulerId, Seq};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::keeper::Keeper;
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
    /// The stream continues what the log holds. Before this comes, nothing may be decided.
    Flowing,
    /// It does not, or not any more.
    Frozen,
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
    bus: Bus,
    log: Box<dyn EventLog>,
    id: SchedulerId,
    to: mpsc::Sender<Ingested>,
    keeper: Keeper,
    flowing: bool,
    complained: Option<Instant>,
}

impl Ingest {
    pub(crate) fn new(
        bus: Bus,
        log: Box<dyn EventLog>,
        id: SchedulerId,
        to: mpsc::Sender<Ingested>,
        keeper: Keeper,
    ) -> Self {
        Self {
            bus,
            log,
            id,
            to,
            keeper,
            flowing: false,
            complained: None,
        }
    }

    /// Runs until the receiver is gone.
    pub(crate) async fn run(mut self) -> Result<(), IngestError> {
        self.tie().await?;
        self.wait_until_it_continues().await?;
        self.flow().await;
        'anew: while !self.to.is_closed() {
            let mut reader = self
                .bus
                .durable_log_reader(self.log.head().seq.next(), durable_name(&self.id));
            let mut checked_opening = 0;
            while !self.to.is_closed() {
                let fetched = match reader.fetch(BATCH_MAX, FETCH_WAIT).await {
                    Ok(fetched) => fetched,
                    Err(rolled_back @ BusError::RolledBack { .. }) => {
                        self.freeze(rolled_back.to_string()).await;
                        continue;
                    }
                    Err(error) => {
                        tracing::debug!(%error, "the stream cannot be read now");
                        continue;
                    }
                };
                if reader.openings() != checked_opening {
                    if !self.belongs(&fetched).await? {
                        // It came from a stream that does not continue the log. What comes once one does is another.
                        self.wait_until_it_continues().await?;
                        continue 'anew;
                    }
                    checked_opening = reader.openings();
                }
                self.flow().await;
                self.append(fetched, &mut reader).await?;
            }
        }
        Ok(())
    }

    /// Whether messages just fetched come from the stream that continues the log: it holds, at the log's last
    /// position, the very message the log holds there, and at theirs the very messages that were fetched. Asked when
    /// a reader began anew; the answers may come from yet another server than the messages, hence both halves.
    async fn belongs(&mut self, fetched: &[Fetched]) -> Result<bool, IngestError> {
        if !self.continues().await? {
            return Ok(false);
        }
        let Some(last) = fetched.last() else {
            return Ok(true);
        };
        Ok(matches!(self.bus.get(last.seq).await, Ok(Some(there)) if there == *last))
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

    async fn wait_until_it_continues(&mut self) -> Result<(), IngestError> {
        while !self.continues().await? && !self.to.is_closed() {
            sleep(ASK_AGAIN).await;
        }
        Ok(())
    }

    /// Whether the stream holds, at the log's last position, the very message the log holds there. Freezes if it
    /// holds another or none; a server that does not answer is no reason to freeze, and no yes either.
    async fn continues(&mut self) -> Result<bool, IngestError> {
        let head = self.log.head().seq;
        if head == Seq(0) {
            return Ok(true);
        }
        let ours = self
            .log
            .get(head)?
            .ok_or_else(|| self.log.damage_at(head, "the last record is missing".into()))?;
        match self.bus.get(head).await {
            Ok(Some(theirs)) if ours.is(&theirs) => return Ok(true),
            Ok(Some(_)) => {
                let why = format!(
                    "the stream HEARTH holds another message at {head} than this scheduler has read there: it was \
                     rolled back and went on, or was replaced. Nothing is decided until an operator restores it \
                     from a backup, or moves this scheduler's folder away, starts it anew and accepts the loss: \
                     hearth log recover --accept-loss"
                );
                self.freeze(why).await;
            }
            Ok(None) => {
                let last = self.bus.bounds().await.map_or(Seq(0), |bounds| bounds.last);
                let why = BusError::RolledBack { seen: head, last }.to_string();
                self.freeze(why).await;
            }
            Err(error) => tracing::debug!(%error, "the stream cannot be compared now"),
        }
        Ok(false)
    }

    async fn freeze(&mut self, why: String) {
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            self.complained = Some(Instant::now());
            tracing::error!("frozen: {why}");
        }
        if self.flowing {
            self.flowing = false;
            let _ = self.to.send(Ingested::Frozen).await;
        }
    }

    async fn flow(&mut self) {
        if !self.flowing {
            self.flowing = true;
            if self.complained.take().is_some() {
                tracing::info!("the stream continues the log again");
            }
            let _ = self.to.send(Ingested::Flowing).await;
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
        tokio::task::block_in_place(|| self.keeper.work(self.log.as_mut()))?;
        Ok(())
    }
}
