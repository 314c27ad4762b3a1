//! The arm over NATS JetStream.

mod reader;
mod streams;
mod varz;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::connection::State;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ConnectOptions, HeaderMap, Request, ServerAddr, StatusCode};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use hearth_protocol::{Seq, subject};
use serde::Deserialize;

use crate::FRAME_BYTES_MAX;
use crate::arm::{Arm, Bounds, Incoming, Outgoing, Reader, ReaderSpec, Requests};
use crate::error::{BusError, PublishError, RequestError};
use crate::fetched::Fetched;
use crate::settings::Wanted;

/// How long one attempt to publish waits for its acknowledgement: a synced write takes milliseconds, a new stream
/// leader about a second.
const ACK_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a question to JetStream waits.
const API_TIMEOUT: Duration = Duration::from_secs(3);

/// JetStream's two ways to say that another publish came first: one names the sequence it found, one does not.
const WRONG_LAST_SEQUENCE: [u64; 2] = [10071, 10164];

/// JetStream's codes for "busy or not ready": nothing was stored, trying again helps.
const NOT_READY: [u64; 4] = [10008, 10023, 10041, 10118];

/// Which part of an answer a message is, as `1/3`.
const PART: &str = "Hearth-Part";

const MESSAGE_ID: &str = "Nats-Msg-Id";
const EXPECTED_LAST: &str = "Nats-Expected-Last-Subject-Sequence";
const EXPECTED_FILTER: &str = "Nats-Expected-Last-Subject-Sequence-Subject";

/// How to reach NATS.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// Servers, separated by commas: `nats://host:4222`.
    pub url: String,
    /// Name of this connection, for the server's operator.
    pub name: String,
    /// Credentials file, if the server asks for one.
    pub credentials: Option<PathBuf>,
}

impl NatsOptions {
    /// Options without credentials.
    pub fn new(url: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            name: name.into(),
            credentials: None,
        }
    }
}

/// One connection.
pub(crate) struct NatsArm {
    client: Client,
    jetstream: Context,
}

#[derive(Deserialize)]
struct PublishAnswer {
    seq: Option<u64>,
    error: Option<ApiError>,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

impl NatsArm {
    pub(crate) async fn connect(options: &NatsOptions) -> Result<Self, BusError> {
        let cannot = |reason: String| BusError::Connect {
            url: options.url.clone(),
            reason,
        };
        let servers = servers(&options.url)?;
        let mut connect = ConnectOptions::new()
            .name(&options.name)
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| Duration::from_millis((attempts as u64 * 50).min(500)))
            .ping_interval(Duration::from_secs(5))
            .request_timeout(Some(API_TIMEOUT))
            .event_callback(|event| async move { tracing::debug!(%event, "nats connection") });
        if let Some(path) = &options.credentials {
            connect = connect
                .credentials_file(path)
                .await
                .map_err(|error| cannot(format!("cannot read the credentials file {}: {error}", path.display())))?;
        }
        let client = connect
            .connect(servers)
            .await
            .map_err(|error| cannot(error.to_string()))?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(API_TIMEOUT);
        Ok(Self { client, jetstream })
    }

    async fn publish_once(&self, out: Outgoing) -> Result<Seq, PublishError> {
        let unknown = |reason: String| PublishError::Unknown {
            subject: out.subject.clone(),
            reason,
        };
        // Not handed to the client while the connection is down: it would queue every repeat and send them all later.
        if self.client.connection_state() != State::Connected {
            return Err(unknown("no connection to NATS".into()));
        }
        let mut headers = HeaderMap::new();
        headers.insert(MESSAGE_ID, out.message_id.as_str());
        if let Some((filter, last)) = &out.expect {
            headers.insert(EXPECTED_LAST, last.to_string().as_str());
            headers.insert(EXPECTED_FILTER, filter.as_str());
        }
        let request = Request::new()
            .headers(headers)
            .payload(out.frame.clone())
            .timeout(Some(ACK_TIMEOUT));
        let answer = self
            .client
            .send_request(out.subject.clone(), request)
            .await
            .map_err(|error| match error.kind() {
                RequestErrorKind::NoResponders => unknown(
                    "no stream takes the subject yet: is JetStream enabled, and did hearth-scheduler create it?".into(),
                ),
                _ => unknown(error.to_string()),
            })?;
        let answer: PublishAnswer = serde_json::from_slice(&answer.payload)
            .map_err(|error| unknown(format!("the acknowledgement cannot be read: {error}")))?;
        match (answer.error, answer.seq) {
            (Some(error), _) if WRONG_LAST_SEQUENCE.contains(&error.err_code) => {
                let (filter, expected) = out.expect.unwrap_or_else(|| (out.subject.clone(), Seq(0)));
                Err(PublishError::Conflict {
                    filter,
                    expected,
                    description: error.description,
                })
            }
            (Some(error), _) if NOT_READY.contains(&error.err_code) => Err(unknown(error.description)),
            (Some(error), _) => Err(PublishError::Refused {
                subject: out.subject,
                code: error.err_code,
                description: error.description,
            }),
            (None, Some(seq)) => Ok(Seq(seq)),
            (None, None) => Err(unknown("the acknowledgement names no sequence".into())),
        }
    }

    async fn raw_message(&self, seq: Option<Seq>, filter: &str) -> Result<Option<Fetched>, BusError> {
        let stream = self
            .jetstream
            .get_stream_no_info(subject::LOG_STREAM)
            .await
            .map_err(|error| unavailable("a look at the stream HEARTH", error))?;
        let answer = match seq {
            Some(seq) => stream.get_raw_message(seq.0).await,
            None => stream.get_last_raw_message_by_subject(filter).await,
        };
        match answer {
            Ok(message) => Ok(Some(Fetched {
                seq: Seq(message.sequence),
                subject: message.subject.to_string(),
                message_id: message.headers.get(MESSAGE_ID).map(|id| id.as_str().to_owned()),
                frame: message.payload,
            })),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                LastRawMessageErrorKind::JetStream(e) if e.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND => {
                    Err(BusError::NoStream(subject::LOG_STREAM))
                }
                _ => Err(unavailable("a look at a message of HEARTH", error)),
            },
        }
    }

    /// Asks and gathers the answer's parts. A subscription of its own, because the client's own request takes one
    /// message only.
    async fn ask(&self, subject: String, payload: Bytes, timeout: Duration) -> Result<Bytes, RequestError> {
        let broken = |error: &dyn std::fmt::Display| RequestError::Connection(error.to_string());
        if self.client.connection_state() != State::Connected {
            return Err(broken(&"it is down, reconnecting"));
        }
        let inbox = self.client.new_inbox();
        let mut answers = self.client.subscribe(inbox.clone()).await.map_err(|e| broken(&e))?;
        self.client
            .publish_with_reply(subject, inbox, payload)
            .await
            .map_err(|e| broken(&e))?;
        let gather = async {
            let mut parts = Parts::default();
            while let Some(message) = answers.next().await {
                if message.status == Some(StatusCode::NO_RESPONDERS) {
                    return Err(RequestError::NoResponders);
                }
                let place = message.headers.as_ref().and_then(|h| h.get(PART));
                if let Some(whole) = parts.take(place.map(|p| p.as_str()), message.payload) {
                    return Ok(whole);
                }
            }
            Err(broken(&"it was closed"))
        };
        tokio::time::timeout(timeout, gather)
            .await
            .unwrap_or(Err(RequestError::TimedOut))
    }

    /// Asks everyone and brings the answers as they come; those in several parts are left out. Ends at once where
    /// nobody listens.
    async fn ask_all(&self, subject: String, payload: Bytes) -> Result<BoxStream<'static, Bytes>, RequestError> {
        let broken = |error: &dyn std::fmt::Display| RequestError::Connection(error.to_string());
        if self.client.connection_state() != State::Connected {
            return Err(broken(&"it is down, reconnecting"));
        }
        let inbox = self.client.new_inbox();
        let answers = self.client.subscribe(inbox.clone()).await.map_err(|e| broken(&e))?;
        self.client
            .publish_with_reply(subject, inbox, payload)
            .await
            .map_err(|e| broken(&e))?;
        let listening =
            |message: &async_nats::Message| futures::future::ready(message.status != Some(StatusCode::NO_RESPONDERS));
        let whole = |message: async_nats::Message| {
            let place = message
                .headers
                .as_ref()
                .and_then(|h| h.get(PART))
                .map(|p| p.as_str().to_owned());
            futures::future::ready(Parts::default().take(place.as_deref(), message.payload))
        };
        Ok(answers.take_while(listening).filter_map(whole).boxed())
    }

    async fn subscribe(&self, subject: String) -> Result<Requests, BusError> {
        let subscriber = self
            .client
            .subscribe(subject)
            .await
            .map_err(|error| unavailable("a subscription for requests", error))?;
        // The server must know the subscription before anyone is told that requests can come.
        self.client
            .flush()
            .await
            .map_err(|error| unavailable("a subscription for requests", error))?;
        let client = self.client.clone();
        let incoming = subscriber
            .filter_map(move |message| {
                let client = client.clone();
                async move {
                    let reply = message.reply?;
                    Some(Incoming {
                        payload: message.payload,
                        reply: Box::new(move |answer| {
                            async move {
                                for (headers, part) in split(answer) {
                                    let sent = client.publish_with_headers(reply.clone(), headers, part).await;
                                    if let Err(error) = sent {
                                        tracing::warn!(%error, "an answer could not be sent");
                                        return;
                                    }
                                }
                            }
                            .boxed()
                        }),
                    })
                }
            })
            .boxed();
        Ok(Requests { incoming })
    }
}

/// Cuts an answer into messages; the header of each says which part of how many it is.
fn split(answer: Bytes) -> Vec<(HeaderMap, Bytes)> {
    let count = answer.len().div_ceil(FRAME_BYTES_MAX).max(1);
    (0..count)
        .map(|index| {
            let start = index * FRAME_BYTES_MAX;
            let part = answer.slice(start..answer.len().min(start + FRAME_BYTES_MAX));
            let mut headers = HeaderMap::new();
            headers.insert(PART, format!("{}/{count}", index + 1).as_str());
            (headers, part)
        })
        .collect()
}

/// The parts of an answer that came so far.
#[derive(Default)]
struct Parts(BTreeMap<usize, Bytes>);

impl Parts {
    /// Takes the part `n/count` in; returns the whole once it is complete. Without a place it is whole by itself.
    fn take(&mut self, place: Option<&str>, part: Bytes) -> Option<Bytes> {
        let place = place.and_then(|p| p.split_once('/'));
        let Some((index, count)) = place.and_then(|(i, n)| Some((i.parse().ok()?, n.parse::<usize>().ok()?))) else {
            return Some(part);
        };
        self.0.insert(index, part);
        (self.0.len() >= count).then(|| match count {
            1 => std::mem::take(&mut self.0).into_values().next().unwrap_or_default(),
            _ => self.0.values().flatten().copied().collect(),
        })
    }
}

/// A transient failure with the client's words.
/// The servers of a URL, several separated by commas.
pub(crate) fn servers(url: &str) -> Result<Vec<ServerAddr>, BusError> {
    url.split(',')
        .map(|url| url.trim().parse())
        .collect::<Result<_, _>>()
        .map_err(|error: std::io::Error| BusError::Address {
            url: url.to_owned(),
            reason: error.to_string(),
        })
}

fn unavailable(what: &'static str, reason: impl std::fmt::Display) -> BusError {
    BusError::Unavailable {
        what,
        reason: reason.to_string(),
    }
}

impl Arm for NatsArm {
    fn ensure_streams<'a>(&'a self, wanted: &'a Wanted) -> BoxFuture<'a, Result<Vec<String>, BusError>> {
        streams::ensure(&self.client, &self.jetstream, wanted).boxed()
    }

    fn make_log_anew<'a>(&'a self, identity: &'a str, replicas: usize) -> BoxFuture<'a, Result<(), BusError>> {
        streams::make_log_anew(&self.jetstream, identity, replicas).boxed()
    }

    fn bounds(&self) -> BoxFuture<'_, Result<Bounds, BusError>> {
        streams::bounds(&self.jetstream, subject::LOG_STREAM).boxed()
    }

    fn get(&self, seq: Seq) -> BoxFuture<'_, Result<Option<Fetched>, BusError>> {
        self.raw_message(Some(seq), "").boxed()
    }

    fn last<'a>(&'a self, filter: &'a str) -> BoxFuture<'a, Result<Option<Fetched>, BusError>> {
        self.raw_message(None, filter).boxed()
    }

    fn acked<'a>(&'a self, durable: &'a str) -> BoxFuture<'a, Result<Option<Seq>, BusError>> {
        streams::acked(&self.jetstream, durable).boxed()
    }

    fn reader(&self, spec: ReaderSpec) -> Reader {
        Reader(Box::new(reader::NatsReader::new(self.jetstream.clone(), spec)))
    }

    fn publish(&self, out: Outgoing) -> BoxFuture<'_, Result<Seq, PublishError>> {
        self.publish_once(out).boxed()
    }

    fn send(&self, subject: String, payload: Bytes) -> BoxFuture<'_, Result<(), PublishError>> {
        async move {
            let unknown = |reason: String| PublishError::Unknown {
                subject: subject.clone(),
                reason,
            };
            if self.client.connection_state() != State::Connected {
                return Err(unknown("no connection to NATS".into()));
            }
            self.client
                .publish(subject.clone(), payload)
                .await
                .map_err(|error| unknown(error.to_string()))
        }
        .boxed()
    }

    fn request(
        &self,
        subject: String,
        payload: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Bytes, RequestError>> {
        self.ask(subject, payload, timeout).boxed()
    }

    fn request_all(
        &self,
        subject: String,
        payload: Bytes,
    ) -> BoxFuture<'_, Result<BoxStream<'static, Bytes>, RequestError>> {
        self.ask_all(subject, payload).boxed()
    }

    fn serve(&self, subject: String) -> BoxFuture<'_, Result<Requests, BusError>> {
        self.subscribe(subject).boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            if let Err(error) = self.client.drain().await {
                tracing::debug!(%error, "the connection was closed already");
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(len: usize, count: usize) {
        let answer: Bytes = (0..len).map(|i| i as u8).collect();
        let mut messages = split(answer.clone());
        assert_eq!(messages.len(), count);
        assert!(messages.iter().all(|(_, part)| part.len() <= FRAME_BYTES_MAX));
        messages.reverse();
        let mut parts = Parts::default();
        let whole = messages.into_iter().find_map(|(headers, part)| {
            let place = headers.get(PART).map(|p| p.as_str().to_owned());
            parts.take(place.as_deref(), part)
        });
        assert!(whole.as_ref() == Some(&answer));
    }

    #[test]
    fn answers_of_any_length_come_whole() {
        check(0, 1);
        check(1, 1);
        check(FRAME_BYTES_MAX, 1);
        check(FRAME_BYTES_MAX + 1, 2);
        check(3 * FRAME_BYTES_MAX, 3);
    }
}
