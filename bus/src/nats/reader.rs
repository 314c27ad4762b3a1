//! The ordered reader over a JetStream pull consumer.
//!
//! The consumer is only a means: it is made anew, at the next message wanted, whenever anything about it is doubtful
//! (errors, missed heartbeats, a hole in its own numbering).

use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy, pull};
use async_nats::jetstream::message::Message;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use hearth_protocol::{Seq, subject};
use tokio::time::{Instant, sleep_until};

use super::{MESSAGE_ID, streams, unavailable};
use crate::arm::{ArmReader, ReaderSpec};
use crate::error::BusError;
use crate::fetched::Fetched;

/// Messages asked for at a time.
const BATCH: usize = 512;

/// Bytes asked for at a time, so that a batch of the longest messages stays bounded.
const BATCH_BYTES: usize = 16 << 20;

/// The server says this often that it is still there; two missed ones end the consumer.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long one pull waits on the server.
const EXPIRES: Duration = Duration::from_secs(20);

/// A consumer that nobody reads goes away after this.
const INACTIVE: Duration = Duration::from_secs(60);

/// Least time between two failures: they come back to the caller, which calls again at once.
const FAILURE_EVERY: Duration = Duration::from_millis(200);

pub(super) struct NatsReader {
    jetstream: Context,
    spec: ReaderSpec,
    /// The next message wanted.
    next: Seq,
    open: Option<Open>,
    next_failure: Instant,
    openings: u64,
}

struct Open {
    messages: pull::Stream,
    /// The consumer's own numbering: a hole in it is a lost message.
    delivered: u64,
    /// The newest message handed out, to acknowledge it and all before it.
    newest: Option<Message>,
    /// Connections made when it was opened. A new connection may lead to a server whose stream ends earlier.
    connects: u64,
}

impl NatsReader {
    pub(super) fn new(jetstream: Context, spec: ReaderSpec) -> Self {
        Self {
            jetstream,
            next: Seq(spec.from.0.max(1)),
            spec,
            open: None,
            next_failure: Instant::now(),
            openings: 0,
        }
    }

    fn connects(&self) -> u64 {
        let statistics = self.jetstream.client().statistics();
        statistics.connects.load(std::sync::atomic::Ordering::Relaxed)
    }

    async fn open(&self) -> Result<Open, BusError> {
        let connects = self.connects();
        let doubt = |error: &dyn std::fmt::Display| unavailable("opening a reader", error);
        let bounds = match streams::bounds(&self.jetstream, self.spec.stream).await {
            Err(BusError::NoStream(subject::HEAT_STREAM)) => {
                streams::restore_heat(&self.jetstream).await?;
                streams::bounds(&self.jetstream, self.spec.stream).await?
            }
            other => other?,
        };
        // The heat stream is memory only and numbers from 1 again after a restart: starting over is right there.
        if bounds.last.next() < self.next && self.spec.stream == subject::LOG_STREAM {
            return Err(BusError::RolledBack {
                seen: Seq(self.next.0 - 1),
                last: bounds.last,
            });
        }
        let start = if bounds.last.next() < self.next {
            bounds.first
        } else {
            self.next
        };
        let stream = self
            .jetstream
            .get_stream_no_info(self.spec.stream)
            .await
            .map_err(|e| doubt(&e))?;
        let durable = self.spec.durable.clone();
        if let Some(name) = &durable {
            // Its position is ours to say: the log knows better than the server what is durable here.
            let _ = stream.delete_consumer(name).await;
        }
        let config = pull::Config {
            ack_policy: if durable.is_some() {
                AckPolicy::All
            } else {
                AckPolicy::None
            },
            inactive_threshold: if durable.is_some() { Duration::ZERO } else { INACTIVE },
            max_ack_pending: if durable.is_some() { 100_000 } else { 0 },
            memory_storage: durable.is_none(),
            num_replicas: usize::from(durable.is_none()),
            durable_name: durable,
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: start.0,
            },
            filter_subjects: self.spec.filters.clone(),
            ..pull::Config::default()
        };
        let consumer: Consumer<pull::Config> = stream.create_consumer(config).await.map_err(|e| doubt(&e))?;
        let messages = consumer
            .stream()
            .max_messages_per_batch(BATCH)
            .max_bytes_per_batch(BATCH_BYTES)
            .expires(EXPIRES)
            .heartbeat(HEARTBEAT)
            .messages()
            .await
            .map_err(|e| doubt(&e))?;
        Ok(Open {
            messages,
            delivered: 0,
            newest: None,
            connects,
        })
    }

    /// Takes one message in; `None` for a repeat.
    fn take(&mut self, message: Message) -> Result<Option<Fetched>, BusError> {
        let open = self.open.as_mut().expect("messages come from an open consumer");
        let info = message
            .info()
            .map_err(|error| unavailable("reading a message", error))?;
        let seq = Seq(info.stream_sequence);
        if info.consumer_sequence != open.delivered + 1 {
            let (found, wanted) = (info.consumer_sequence, open.delivered + 1);
            return Err(unavailable(
                "reading in order",
                format!("delivery {found} came instead of {wanted}"),
            ));
        }
        open.delivered = info.consumer_sequence;
        let is_log = self.spec.stream == subject::LOG_STREAM;
        if is_log && seq < self.next {
            return Ok(None);
        }
        let fetched = Fetched {
            seq,
            subject: message.subject.to_string(),
            message_id: message
                .headers
                .as_ref()
                .and_then(|h| h.get(MESSAGE_ID))
                .map(|id| id.as_str().to_owned()),
            frame: message.payload.clone(),
        };
        self.next = seq.next();
        open.newest = Some(message);
        Ok(Some(fetched))
    }

    async fn try_fetch(&mut self, max: usize, wait: Duration) -> Result<Vec<Fetched>, BusError> {
        let deadline = Instant::now() + wait;
        if self.open.as_ref().is_none_or(|open| open.connects != self.connects()) {
            self.open = Some(self.open().await?);
            self.openings += 1;
        }
        let mut batch = Vec::new();
        while batch.is_empty() {
            let open = self.open.as_mut().expect("opened above");
            let Ok(first) = tokio::time::timeout_at(deadline, open.messages.next()).await else {
                return Ok(batch);
            };
            let first = first.ok_or_else(|| unavailable("reading", "the consumer ended"))?;
            let first = first.map_err(|error| unavailable("reading", error))?;
            batch.extend(self.take(first)?);
            while batch.len() < max {
                let open = self.open.as_mut().expect("opened above");
                let Some(Some(more)) = open.messages.next().now_or_never() else {
                    break;
                };
                // What was taken so far must not be lost to a failure behind it: the failure shows at the next call.
                match more
                    .map_err(|error| unavailable("reading", error))
                    .and_then(|m| self.take(m))
                {
                    Ok(more) => batch.extend(more),
                    Err(error) => {
                        tracing::debug!(%error, "a reader starts over");
                        self.open = None;
                        return Ok(batch);
                    }
                }
            }
        }
        Ok(batch)
    }
}

impl ArmReader for NatsReader {
    fn fetch(&mut self, max: usize, wait: Duration) -> BoxFuture<'_, Result<Vec<Fetched>, BusError>> {
        async move {
            let result = self.try_fetch(max, wait).await;
            if result.is_err() {
                self.open = None;
                sleep_until(self.next_failure).await;
                self.next_failure = Instant::now() + FAILURE_EVERY;
            }
            result
        }
        .boxed()
    }

    fn ack(&mut self, seq: Seq) -> BoxFuture<'_, Result<(), BusError>> {
        async move {
            let Some(newest) = self.open.as_ref().and_then(|open| open.newest.as_ref()) else {
                return Ok(());
            };
            assert!(self.spec.durable.is_some(), "only durable readers acknowledge");
            assert_eq!(seq.next(), self.next, "everything fetched is acknowledged at once");
            newest.ack().await.map_err(|error| unavailable("acknowledging", error))
        }
        .boxed()
    }

    fn openings(&self) -> u64 {
        self.openings
    }
}
