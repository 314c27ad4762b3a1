//! The bus: one handle to the cluster's streams and requests, over NATS JetStream or in memory.
//!
//! It moves frames and orders them. It does not judge events, keep them or decide anything, and it knows no RocksDB,
//! so that node daemons and the `hearth` command can use it. No guest I/O ever waits for it.
//!
//! Invariant: a [`LogPublisher`] hands out its publisher's sequence numbers without gaps and without repeats, also
//! when a publish timed out and its fate was unknown for a while.

mod arm;
mod error;
mod fetched;
mod memory;
mod nats;
mod publisher;
pub mod rpc;
pub mod settings;
#[cfg(feature = "testing")]
pub mod testing;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hearth_protocol::heat::HeatReport;
use hearth_protocol::limits::MESSAGE_BYTES_MAX;
use hearth_protocol::{NodeId, Seq, subject};

pub use arm::{Bounds, Incoming, Reader, Requests};
pub use error::{BusError, PublishError};
pub use fetched::{Decoded, Fetched, Foreign};
pub use memory::MemoryCluster;
pub use nats::NatsOptions;
pub use publisher::{LogPublisher, new_incarnation, wall_now};

/// Checks that a text names NATS servers, without asking whether they are there.
///
/// # Errors
/// [`BusError::Address`].
pub fn check_address(url: &str) -> Result<(), BusError> {
    nats::servers(url).map(drop)
}

use arm::{Arm, Outgoing};

/// Longest frame of the log, in bytes: the server's limit counts the headers too, which stay under 4 KiB.
pub const FRAME_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (4 << 10);

/// Longest heat report, in bytes: its folded form repeats it in a frame of the log with an envelope around it.
pub const HEAT_REPORT_BYTES_MAX: usize = MESSAGE_BYTES_MAX - (16 << 10);

/// A handle to the cluster; clones share one connection.
#[derive(Clone)]
pub struct Bus {
    arm: Arc<dyn Arm>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bus")
    }
}

impl Bus {
    /// Connects to NATS. Later losses of the connection are repaired in the background for ever.
    ///
    /// # Errors
    /// [`BusError::Connect`] when no server of the URL answers within the connection timeout.
    pub async fn connect(options: &NatsOptions) -> Result<Self, BusError> {
        Ok(Self {
            arm: Arc::new(nats::NatsArm::connect(options).await?),
        })
    }

    /// A handle to a cluster in this process's memory, with the same semantics.
    pub fn memory(cluster: &MemoryCluster) -> Self {
        Self {
            arm: Arc::new(cluster.arm()),
        }
    }

    /// Creates the two streams where they are missing, reads every setting back from the server and refuses unsafe
    /// ones by name. Returns what `dev` let pass, one sentence each, to be said loudly.
    ///
    /// # Errors
    /// [`BusError::Unsafe`] with all unsafe settings, or [`BusError::Unavailable`].
    pub async fn ensure_streams(&self, wanted: &settings::Wanted) -> Result<Vec<String>, BusError> {
        self.arm.ensure_streams(wanted).await
    }

    /// Makes the log's stream again, empty, with the identity of the one that is gone: what put-back messages go into.
    /// Only for an operator's recovery of a deleted stream.
    ///
    /// # Errors
    /// [`BusError::Unsafe`] if there is a stream with messages, or the server refuses so many copies.
    pub async fn make_log_anew(&self, identity: &str, replicas: usize) -> Result<(), BusError> {
        self.arm.make_log_anew(identity, replicas).await
    }

    /// What the log's stream holds now.
    ///
    /// # Errors
    /// [`BusError::NoStream`] before a scheduler created it, or [`BusError::Unavailable`].
    pub async fn bounds(&self) -> Result<Bounds, BusError> {
        self.arm.bounds().await
    }

    /// One message of the log's stream by its sequence number; `None` if it is not there.
    ///
    /// # Errors
    /// As [`Bus::bounds`].
    pub async fn get(&self, seq: Seq) -> Result<Option<Fetched>, BusError> {
        self.arm.get(seq).await
    }

    /// The last message of the log's stream on a subject or filter; `None` if there is none.
    ///
    /// # Errors
    /// As [`Bus::bounds`].
    pub async fn last(&self, filter: &str) -> Result<Option<Fetched>, BusError> {
        self.arm.last(filter).await
    }

    /// Reads the log's stream in order from `from` on, whole (`filters` empty) or by subject filters. The reader
    /// repairs itself after losses of the connection, restarts of the server and loss of its consumer.
    pub fn log_reader(&self, from: Seq, filters: Vec<String>) -> Reader {
        self.arm.reader(arm::ReaderSpec {
            stream: subject::LOG_STREAM,
            from,
            filters,
            durable: None,
        })
    }

    /// Reads the whole log's stream under a durable name, so that the server remembers what was acknowledged
    /// ([`Reader::ack`]): a second witness of how far this reader had come ([`Bus::acked`]).
    pub fn durable_log_reader(&self, from: Seq, durable: String) -> Reader {
        self.arm.reader(arm::ReaderSpec {
            stream: subject::LOG_STREAM,
            from,
            filters: Vec::new(),
            durable: Some(durable),
        })
    }

    /// How far the durable reader of that name has acknowledged; `None` if the server knows none.
    ///
    /// # Errors
    /// As [`Bus::bounds`].
    pub async fn acked(&self, durable: &str) -> Result<Option<Seq>, BusError> {
        self.arm.acked(durable).await
    }

    /// Puts a message back at the very place it had in the log's stream, which must end right before it. Only for an
    /// operator's recovery of a stream that lost its end.
    ///
    /// # Errors
    /// [`PublishError::Conflict`] when the stream ends elsewhere, else as for a publish.
    pub async fn put_back(&self, message: &Fetched) -> Result<(), PublishError> {
        let before = Seq(message.seq.0 - 1);
        let conflict = |found: String| PublishError::Conflict {
            filter: subject::LOG_ALL.into(),
            expected: before,
            description: found,
        };
        let out = Outgoing {
            subject: message.subject.clone(),
            frame: message.frame.clone(),
            message_id: message
                .message_id
                .clone()
                .unwrap_or_else(|| format!("put-back.{}", message.seq)),
            expect: Some((subject::LOG_ALL.into(), before)),
        };
        match self.publish_frame(out).await {
            Ok(seq) if seq == message.seq => Ok(()),
            Ok(seq) => Err(conflict(format!("the stream has it at {seq} already"))),
            // Its answer may have been lost and the message be there.
            Err(error) => match self.get(message.seq).await {
                Ok(Some(there)) if there.subject == message.subject && there.frame == message.frame => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Reads heat reports in order of arrival, from the oldest kept.
    pub fn heat_reader(&self) -> Reader {
        self.arm.reader(arm::ReaderSpec {
            stream: subject::HEAT_STREAM,
            from: Seq(1),
            filters: Vec::new(),
            durable: None,
        })
    }

    /// Sends a heat report, at most once: a lost one shows as a gap in `report_seq` and is counted by the leader.
    ///
    /// # Errors
    /// [`PublishError::TooLong`] above [`HEAT_REPORT_BYTES_MAX`], [`PublishError::Unknown`] without a connection.
    pub async fn publish_heat(&self, report: &HeatReport) -> Result<(), PublishError> {
        let bytes = report.encode();
        if bytes.len() > HEAT_REPORT_BYTES_MAX {
            return Err(PublishError::TooLong {
                what: format!("the heat report of {}", report.node),
                len: bytes.len(),
                max: HEAT_REPORT_BYTES_MAX,
            });
        }
        self.publish_heat_bytes(&report.node, bytes.into()).await
    }

    async fn publish_heat_bytes(&self, node: &NodeId, bytes: Bytes) -> Result<(), PublishError> {
        self.arm.send(subject::heat(node), bytes).await
    }

    pub(crate) async fn publish_frame(&self, out: Outgoing) -> Result<Seq, PublishError> {
        self.arm.publish(out).await
    }

    pub(crate) async fn request_bytes(
        &self,
        subject: String,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, error::RequestError> {
        self.arm.request(subject, payload, timeout).await
    }

    pub(crate) async fn request_all_bytes(
        &self,
        subject: String,
        payload: Bytes,
    ) -> Result<futures::stream::BoxStream<'static, Bytes>, error::RequestError> {
        self.arm.request_all(subject, payload).await
    }

    pub(crate) async fn serve_bytes(&self, subject: String) -> Result<Requests, BusError> {
        self.arm.serve(subject).await
    }

    /// Sends everything that is still queued and closes the connection in order.
    pub async fn close(&self) {
        self.arm.close().await;
    }
}
