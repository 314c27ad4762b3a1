//! Publishing to the log: the handle that numbers a process's events and never leaves one in doubt.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::{Envelope, Event, Incarnation, Message, Publisher, Seq, WallMs};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::arm::Outgoing;
use crate::error::PublishError;
use crate::{Bus, FRAME_BYTES_MAX};

/// How long a publish is repeated under the same id before its caller hears [`PublishError::Unknown`].
const PATIENCE: Duration = Duration::from_secs(5);

/// Pause between repeats: a restarting server takes about a second.
const REPEAT_AFTER: Duration = Duration::from_millis(200);

/// Draws an incarnation: 128 random bits from the kernel.
///
/// # Panics
/// If the kernel gives no randomness.
pub fn new_incarnation() -> Incarnation {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("/dev/urandom gives random bytes");
    Incarnation(u128::from_be_bytes(bytes))
}

/// The wall clock. Data only.
pub fn wall_now() -> WallMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    WallMs(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Publishes one process's events, one after the other. Clones share the numbering.
#[derive(Debug, Clone)]
pub struct LogPublisher {
    inner: Arc<Inner>,
    /// Goes into the envelope of what this handle publishes.
    reason: String,
}

#[derive(Debug)]
struct Inner {
    bus: Bus,
    publisher: Publisher,
    incarnation: Incarnation,
    numbering: Mutex<Numbering>,
}

#[derive(Debug)]
struct Numbering {
    /// The number of the next event; also of `in_doubt`.
    next: u64,
    /// A publish without an answer, to be resolved before anything else is published.
    in_doubt: Option<Outgoing>,
}

impl LogPublisher {
    /// A publisher that starts its incarnation: its first event gets number 1.
    pub fn new(bus: Bus, publisher: Publisher, incarnation: Incarnation) -> Self {
        Self {
            inner: Arc::new(Inner {
                bus,
                publisher,
                incarnation,
                numbering: Mutex::new(Numbering {
                    next: 1,
                    in_doubt: None,
                }),
            }),
            reason: String::new(),
        }
    }

    /// A handle on the same numbering whose events carry an operator's words.
    #[must_use]
    pub fn because(&self, reason: impl Into<String>) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            reason: reason.into(),
        }
    }

    /// The operator's words that its events carry; may be empty.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Who publishes.
    pub fn publisher(&self) -> &Publisher {
        &self.inner.publisher
    }

    /// Its process start.
    pub fn incarnation(&self) -> Incarnation {
        self.inner.incarnation
    }

    /// Appends an event and returns its place in the log.
    ///
    /// # Errors
    /// [`PublishError`]. After [`PublishError::Unknown`] the event may be stored by now, or by the next publish.
    pub async fn publish(&self, subject: impl Into<String>, event: &Event) -> Result<Seq, PublishError> {
        self.append(subject.into(), event, None).await
    }

    /// Appends an event if `expected_last` is the last seq on `filter` (0: nothing is there yet).
    ///
    /// # Errors
    /// [`PublishError::Conflict`] when someone else came first, else as [`LogPublisher::publish`].
    pub async fn publish_expecting(
        &self,
        subject: impl Into<String>,
        event: &Event,
        filter: impl Into<String>,
        expected_last: Seq,
    ) -> Result<Seq, PublishError> {
        self.append(subject.into(), event, Some((filter.into(), expected_last)))
            .await
    }

    async fn append(&self, subject: String, event: &Event, expect: Option<(String, Seq)>) -> Result<Seq, PublishError> {
        let mut numbering = self.inner.numbering.lock().await;
        if numbering.in_doubt.is_some() {
            match self.settle(&mut numbering).await {
                Ok(_) | Err(PublishError::Conflict { .. } | PublishError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let envelope = Envelope {
            codec: CODEC_VERSION,
            subject: subject.clone(),
            publisher: self.inner.publisher.clone(),
            incarnation: self.inner.incarnation,
            publisher_seq: numbering.next,
            time: wall_now(),
            reason: self.reason.clone(),
        };
        let frame = Message::encode(&envelope, event).to_frame();
        if frame.len() > FRAME_BYTES_MAX {
            return Err(PublishError::TooLong {
                what: format!("the event {} on {subject}", event.kind()),
                len: frame.len(),
                max: FRAME_BYTES_MAX,
            });
        }
        numbering.in_doubt = Some(Outgoing {
            subject,
            frame: frame.into(),
            message_id: envelope.message_id(),
            expect,
        });
        self.settle(&mut numbering).await
    }

    /// Publishes what is in doubt until its fate is known or the patience ends. Kept in `numbering` throughout, so
    /// that a cancelled call leaves nothing behind.
    async fn settle(&self, numbering: &mut Numbering) -> Result<Seq, PublishError> {
        let Some(out) = numbering.in_doubt.clone() else {
            unreachable!("settle is called with a publish in doubt");
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.inner.bus.publish_frame(out.clone()).await {
                Ok(seq) => {
                    numbering.next += 1;
                    numbering.in_doubt = None;
                    return Ok(seq);
                }
                Err(PublishError::Unknown { subject, reason }) => {
                    if Instant::now() + REPEAT_AFTER >= deadline {
                        return Err(PublishError::Unknown { subject, reason });
                    }
                    tokio::time::sleep(REPEAT_AFTER).await;
                }
                // An earlier attempt of ours may be what came first: the comparison knows no ids.
                Err(conflict @ PublishError::Conflict { .. }) => {
                    let last = self.inner.bus.last(&out.subject).await;
                    match last {
                        Ok(Some(last)) if last.message_id.as_ref() == Some(&out.message_id) => {
                            numbering.next += 1;
                            numbering.in_doubt = None;
                            return Ok(last.seq);
                        }
                        Ok(_) => {
                            numbering.in_doubt = None;
                            return Err(conflict);
                        }
                        Err(error) if Instant::now() + REPEAT_AFTER >= deadline => {
                            return Err(PublishError::Unknown {
                                subject: out.subject,
                                reason: error.to_string(),
                            });
                        }
                        Err(_) => tokio::time::sleep(REPEAT_AFTER).await,
                    }
                }
                Err(error) => {
                    numbering.in_doubt = None;
                    return Err(error);
                }
            }
        }
    }
}
