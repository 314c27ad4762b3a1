//! What every arm of the bus must do. The NATS arm and the memory arm pass the same test bodies.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use hearth_protocol::Seq;

use crate::error::{BusError, PublishError, RequestError};
use crate::fetched::Fetched;
use crate::settings::Wanted;

/// What the log's stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    /// Drawn when the stream was created: another identity is another log.
    pub identity: String,
    /// The first message still there; one past `last` when it is empty.
    pub first: Seq,
    /// The last message; 0 before the first one.
    pub last: Seq,
}

/// A publish on the log's stream.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub subject: String,
    pub frame: Bytes,
    pub message_id: String,
    /// Filter, and the seq that must be the last one on it.
    pub expect: Option<(String, Seq)>,
}

/// What a reader reads.
#[derive(Debug, Clone)]
pub(crate) struct ReaderSpec {
    pub stream: &'static str,
    pub from: Seq,
    pub filters: Vec<String>,
    pub durable: Option<String>,
}

pub(crate) trait Arm: Send + Sync {
    fn ensure_streams<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, Result<Vec<String>, BusError>>;
    fn make_log_anew<'a>(&'a self, identity: &'a str, replicas: usize) -> BoxFuture<'a, Result<(), BusError>>;
    fn bounds(&self) -> BoxFuture<'_, Result<Bounds, BusError>>;
    fn get(&self, seq: Seq) -> BoxFuture<'_, Result<Option<Fetched>, BusError>>;
    fn last<'a>(&'a self, filter: &'a str) -> BoxFuture<'a, Result<Option<Fetched>, BusError>>;
    fn acked<'a>(&'a self, durable: &'a str) -> BoxFuture<'a, Result<Option<Seq>, BusError>>;
    fn reader(&self, spec: ReaderSpec) -> Reader;
    fn publish(&self, out: Outgoing) -> BoxFuture<'_, Result<Seq, PublishError>>;
    fn send(&self, subject: String, payload: Bytes) -> BoxFuture<'_, Result<(), PublishError>>;
    fn request(&self, subject: String, payload: Bytes, timeout: Duration)
    -> BoxFuture<'_, Result<Bytes, RequestError>>;
    fn request_all(
        &self,
        subject: String,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<futures::stream::BoxStream<'static, Bytes>, RequestError>>;
    fn serve(&self, subject: String) -> BoxFuture<'_, Result<Requests, BusError>>;
    fn close(&self) -> BoxFuture<'_, ()>;
}

pub(crate) trait ArmReader: Send {
    fn fetch(&mut self, max: usize, wait: Duration) -> BoxFuture<'_, Result<Vec<Fetched>, BusError>>;
    fn ack(&mut self, seq: Seq) -> BoxFuture<'_, Result<(), BusError>>;
    fn openings(&self) -> u64;
}

/// An ordered reader of a stream: every message once, ascending, none left out.
pub struct Reader(pub(crate) Box<dyn ArmReader>);

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reader")
    }
}

impl Reader {
    /// Waits up to `wait` for the next message, and returns it with those already there behind it, `max` at most.
    /// Empty when nothing came. After an error, call it again: it goes on at the same place, and does not return
    /// errors faster than a few a second. Cancel-safe: a dropped call loses no message.
    ///
    /// # Errors
    /// [`BusError::RolledBack`] when the stream ends behind what this reader has read, else transient ones.
    pub async fn fetch(&mut self, max: usize, wait: Duration) -> Result<Vec<Fetched>, BusError> {
        self.0.fetch(max, wait).await
    }

    /// How often it began reading anew, on a new connection or consumer: after each, the stream may be another one
    /// than before, which only the bytes of what was already read can tell.
    pub fn openings(&self) -> u64 {
        self.0.openings()
    }

    /// Tells the server that everything up to `seq` is durable here. Only for durable readers.
    ///
    /// # Errors
    /// Transient ones; the next call covers it.
    pub async fn ack(&mut self, seq: Seq) -> Result<(), BusError> {
        self.0.ack(seq).await
    }
}

/// Requests that arrive on a subject.
pub struct Requests {
    pub(crate) incoming: futures::stream::BoxStream<'static, Incoming>,
}

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Requests")
    }
}

/// One request and the way back to who asked.
pub struct Incoming {
    /// Its bytes.
    pub payload: Bytes,
    pub(crate) reply: Box<dyn FnOnce(Bytes) -> BoxFuture<'static, ()> + Send>,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming({} bytes)", self.payload.len())
    }
}

impl Requests {
    /// The next request; `None` once the connection is closed.
    pub async fn next(&mut self) -> Option<Incoming> {
        futures::StreamExt::next(&mut self.incoming).await
    }
}

impl Incoming {
    /// Answers.
    pub async fn respond(self, answer: Bytes) {
        (self.reply)(answer).await;
    }
}
