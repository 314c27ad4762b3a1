//! The arm in this process's memory, for tests: same order, same comparisons, same repeats.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use hearth_protocol::{Seq, subject};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use crate::arm::{Arm, ArmReader, Bounds, Incoming, Outgoing, Reader, ReaderSpec, Requests};
use crate::error::{BusError, PublishError, RequestError};
use crate::fetched::Fetched;
use crate::publisher::new_incarnation;
use crate::settings::Wanted;

/// Heat reports kept.
const HEAT_KEPT: usize = 4_096;

/// A cluster in memory: what the server would hold. Clones are the same cluster.
#[derive(Clone, Default)]
pub struct MemoryCluster {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    held: Mutex<Held>,
    changed: Notify,
}

#[derive(Default)]
struct Held {
    identity: Option<String>,
    log: Vec<Fetched>,
    heat: VecDeque<Fetched>,
    heat_last: u64,
    acked: BTreeMap<String, Seq>,
    servers: BTreeMap<String, mpsc::UnboundedSender<(Bytes, oneshot::Sender<Bytes>)>>,
    down: bool,
    starts: u64,
    lose_acknowledgements: u32,
}

impl std::fmt::Debug for MemoryCluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MemoryCluster")
    }
}

impl MemoryCluster {
    pub(crate) fn arm(&self) -> MemoryArm {
        MemoryArm {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Takes the server away, or brings it back.
    pub fn set_down(&self, down: bool) {
        let mut held = self.shared.held();
        held.starts += u64::from(held.down && !down);
        held.down = down;
        drop(held);
        self.shared.changed.notify_waiters();
    }

    /// The next `count` publishes are stored, and their acknowledgements lost.
    pub fn lose_acknowledgements(&self, count: u32) {
        self.shared.held().lose_acknowledgements = count;
    }

    /// Rolls the log back to its first `keep` messages, as a restored old disk would.
    pub fn roll_back(&self, keep: usize) {
        let mut held = self.shared.held();
        held.log.truncate(keep);
        held.starts += 1;
        drop(held);
        self.shared.changed.notify_waiters();
    }
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("no panic happens under this lock")
    }
}

impl Held {
    fn up(&self, what: &'static str) -> Result<&Self, BusError> {
        if self.down {
            return Err(BusError::Unavailable {
                what,
                reason: "the server is down".into(),
            });
        }
        Ok(self)
    }

    fn with_log(&self, what: &'static str) -> Result<&Self, BusError> {
        let up = self.up(what)?;
        if up.identity.is_none() {
            return Err(BusError::NoStream(subject::LOG_STREAM));
        }
        Ok(up)
    }

    fn publish(&mut self, out: Outgoing) -> Result<Seq, PublishError> {
        let unknown = |reason: &str| PublishError::Unknown {
            subject: out.subject.clone(),
            reason: reason.into(),
        };
        if self.down {
            return Err(unknown("the server is down"));
        }
        if self.identity.is_none() {
            return Err(unknown("no stream takes the subject yet"));
        }
        if let Some(known) = self
            .log
            .iter()
            .rev()
            .find(|m| m.message_id.as_ref() == Some(&out.message_id))
        {
            return Ok(known.seq);
        }
        if let Some((filter, expected)) = &out.expect {
            let last = self.log.iter().rev().find(|m| matches(filter, &m.subject));
            let last = last.map_or(Seq(0), |m| m.seq);
            if last != *expected {
                return Err(PublishError::Conflict {
                    filter: filter.clone(),
                    expected: *expected,
                    description: format!("wrong last sequence: {last}"),
                });
            }
        }
        let seq = Seq(self.log.len() as u64 + 1);
        let unknown = unknown("the acknowledgement was lost");
        self.log.push(Fetched {
            seq,
            subject: out.subject,
            message_id: Some(out.message_id),
            frame: out.frame,
        });
        if self.lose_acknowledgements > 0 {
            self.lose_acknowledgements -= 1;
            return Err(unknown);
        }
        Ok(seq)
    }
}

/// Whether a subject falls under a filter: `*` is one token, `>` one or more at the end.
fn matches(filter: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in filter.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

pub(crate) struct MemoryArm {
    shared: Arc<Shared>,
}

impl MemoryArm {
    fn now<T: Send + 'static>(&self, act: impl FnOnce(&mut Held) -> T) -> BoxFuture<'_, T> {
        let result = act(&mut self.shared.held());
        self.shared.changed.notify_waiters();
        futures::future::ready(result).boxed()
    }
}

impl Arm for MemoryArm {
    fn ensure_streams<'a>(&'a self, _wanted: &'a Wanted) -> BoxFuture<'a, Result<Vec<String>, BusError>> {
        self.now(|held| {
            held.up("creating the streams")?;
            held.identity.get_or_insert_with(|| new_incarnation().to_string());
            Ok(Vec::new())
        })
    }

    fn make_log_anew<'a>(&'a self, identity: &'a str, _replicas: usize) -> BoxFuture<'a, Result<(), BusError>> {
        let identity = identity.to_owned();
        self.now(|held| {
            held.up("making the log's stream anew")?;
            if !held.log.is_empty() {
                return Err(BusError::Unsafe(vec!["the log's stream is not empty".into()]));
            }
            held.identity = Some(identity);
            held.starts += 1;
            Ok(())
        })
    }

    fn bounds(&self) -> BoxFuture<'_, Result<Bounds, BusError>> {
        self.now(|held| {
            let held = held.with_log("a look at the stream HEARTH")?;
            Ok(Bounds {
                identity: held.identity.clone().unwrap_or_default(),
                first: Seq(1),
                last: Seq(held.log.len() as u64),
            })
        })
    }

    fn get(&self, seq: Seq) -> BoxFuture<'_, Result<Option<Fetched>, BusError>> {
        self.now(move |held| {
            let log = &held.with_log("a look at a message")?.log;
            Ok(log.iter().find(|m| m.seq == seq).cloned())
        })
    }

    fn last<'a>(&'a self, filter: &'a str) -> BoxFuture<'a, Result<Option<Fetched>, BusError>> {
        self.now(move |held| {
            let log = &held.with_log("a look at a message")?.log;
            Ok(log.iter().rev().find(|m| matches(filter, &m.subject)).cloned())
        })
    }

    fn acked<'a>(&'a self, durable: &'a str) -> BoxFuture<'a, Result<Option<Seq>, BusError>> {
        self.now(|held| {
            Ok(held
                .with_log("a look at the acknowledged position")?
                .acked
                .get(durable)
                .copied())
        })
    }

    fn reader(&self, spec: ReaderSpec) -> Reader {
        Reader(Box::new(MemoryReader {
            shared: Arc::clone(&self.shared),
            next: spec.from.0.max(1),
            openings: 0,
            spec,
        }))
    }

    fn publish(&self, out: Outgoing) -> BoxFuture<'_, Result<Seq, PublishError>> {
        self.now(|held| held.publish(out))
    }

    fn send(&self, subject: String, payload: Bytes) -> BoxFuture<'_, Result<(), PublishError>> {
        self.now(move |held| {
            if held.down {
                return Err(PublishError::Unknown {
                    subject,
                    reason: "the server is down".into(),
                });
            }
            held.heat_last += 1;
            let seq = Seq(held.heat_last);
            held.heat.push_back(Fetched {
                seq,
                subject,
                message_id: None,
                frame: payload,
            });
            if held.heat.len() > HEAT_KEPT {
                held.heat.pop_front();
            }
            Ok(())
        })
    }

    fn request(
        &self,
        subject: String,
        payload: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Bytes, RequestError>> {
        async move {
            let server = {
                let held = self.shared.held();
                if held.down {
                    return Err(RequestError::Connection("the server is down".into()));
                }
                held.servers.get(&subject).cloned()
            };
            let (reply, answer) = oneshot::channel();
            server
                .ok_or(RequestError::NoResponders)?
                .send((payload, reply))
                .map_err(|_| RequestError::NoResponders)?;
            match tokio::time::timeout(timeout, answer).await {
                Ok(Ok(bytes)) => Ok(bytes),
                _ => Err(RequestError::TimedOut),
            }
        }
        .boxed()
    }

    fn request_all(
        &self,
        subject: String,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<BoxStream<'static, Bytes>, RequestError>> {
        let servers = {
            let held = self.shared.held();
            if held.down {
                let down = RequestError::Connection("the server is down".into());
                return futures::future::ready(Err(down)).boxed();
            }
            held.servers.get(&subject).cloned().into_iter()
        };
        let answers = futures::stream::iter(servers).filter_map(move |server| {
            let (reply, answer) = oneshot::channel();
            let sent = server.send((payload.clone(), reply));
            async move {
                sent.ok()?;
                answer.await.ok()
            }
        });
        futures::future::ready(Ok(answers.boxed())).boxed()
    }

    fn serve(&self, subject: String) -> BoxFuture<'_, Result<Requests, BusError>> {
        let (sender, receiver) = mpsc::unbounded_channel::<(Bytes, oneshot::Sender<Bytes>)>();
        self.now(move |held| {
            held.servers.insert(subject, sender);
            let incoming = futures::stream::unfold(receiver, |mut receiver| async move {
                let (payload, reply) = receiver.recv().await?;
                let incoming = Incoming {
                    payload,
                    reply: Box::new(move |answer| {
                        // Who asked may have given up: that is its right.
                        let _ = reply.send(answer);
                        futures::future::ready(()).boxed()
                    }),
                };
                Some((incoming, receiver))
            });
            Ok(Requests {
                incoming: Box::pin(incoming),
            })
        })
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        futures::future::ready(()).boxed()
    }
}

struct MemoryReader {
    shared: Arc<Shared>,
    /// The server's count of going away when it read last.
    openings: u64,
    spec: ReaderSpec,
    next: u64,
}

impl MemoryReader {
    fn ready(&mut self, max: usize) -> Result<Vec<Fetched>, BusError> {
        let held = self.shared.held();
        let is_log = self.spec.stream == subject::LOG_STREAM;
        let held = if is_log {
            held.with_log("reading")?
        } else {
            held.up("reading")?
        };
        if is_log && (held.log.len() as u64) + 1 < self.next {
            return Err(BusError::RolledBack {
                seen: Seq(self.next - 1),
                last: Seq(held.log.len() as u64),
            });
        }
        self.openings = held.starts + 1;
        let wanted = |m: &&Fetched| {
            m.seq.0 >= self.next
                && (self.spec.filters.is_empty() || self.spec.filters.iter().any(|f| matches(f, &m.subject)))
        };
        let batch: Vec<Fetched> = if is_log {
            held.log.iter().filter(wanted).take(max).cloned().collect()
        } else {
            held.heat.iter().filter(wanted).take(max).cloned().collect()
        };
        if let Some(last) = batch.last() {
            self.next = last.seq.0 + 1;
        }
        Ok(batch)
    }
}

impl ArmReader for MemoryReader {
    fn fetch(&mut self, max: usize, wait: Duration) -> BoxFuture<'_, Result<Vec<Fetched>, BusError>> {
        async move {
            let deadline = Instant::now() + wait;
            loop {
                let shared = Arc::clone(&self.shared);
                let mut changed = std::pin::pin!(shared.changed.notified());
                changed.as_mut().enable();
                let batch = match self.ready(max) {
                    Ok(batch) => batch,
                    Err(error) => {
                        // As the other arm: failures do not spin.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        return Err(error);
                    }
                };
                if !batch.is_empty() || tokio::time::timeout_at(deadline, changed).await.is_err() {
                    return Ok(batch);
                }
            }
        }
        .boxed()
    }

    fn ack(&mut self, seq: Seq) -> BoxFuture<'_, Result<(), BusError>> {
        let name = self.spec.durable.clone().expect("only durable readers acknowledge");
        let mut held = self.shared.held();
        let result = held.with_log("acknowledging").map(|_| ());
        if result.is_ok() {
            held.acked.insert(name, seq);
        }
        futures::future::ready(result).boxed()
    }

    fn openings(&self) -> u64 {
        self.openings
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn filters_match_as_the_servers_do() {
        assert!(matches("a.*.c", "a.b.c"));
        assert!(!matches("a.*.c", "a.b.d"));
        assert!(!matches("a.*", "a.b.c"));
        assert!(matches("a.>", "a.b.c"));
        assert!(!matches("a.>", "a"));
        assert!(matches("a.b", "a.b"));
    }
}
