//! One record: a message, its place and its chain value; and how it is laid out as a value of the store.
//!
//! Value: version 1 (one byte), length of the envelope as u32 big-endian, envelope, payload, 32 bytes of chain.
//! A foreign message (damaged, or under a subject that is not its publisher's) is kept with its bare subject as the
//! envelope and its whole frame as the payload; no envelope decodes from a subject, so it stays foreign for ever.

use hearth_bus::{Fetched, Foreign};
use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{DecodeError, Envelope, Event, Message, Seq};

use super::Head;

const VERSION: u8 = 1;
const HEADER: usize = 5;

/// A message to append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the stream.
    pub seq: Seq,
    /// Its subject, as the server knows it.
    pub subject: String,
    /// Its bytes as they are stored.
    pub message: Message,
    /// Decoded; `None` for a foreign message.
    pub event: Option<(Envelope, Event)>,
}

impl Entry {
    /// Takes a message of the stream.
    ///
    /// # Errors
    /// [`DecodeError::Newer`] for a message of a later Hearth, which must not be passed over. Other messages that
    /// cannot be decoded become foreign entries.
    pub fn from_fetched(fetched: Fetched) -> Result<Self, DecodeError> {
        let (message, event) = match fetched.decode() {
            Ok(decoded) => (decoded.message, Some((decoded.envelope, decoded.event))),
            Err(Foreign::Decode(newer @ DecodeError::Newer { .. })) => return Err(newer),
            Err(foreign) => {
                tracing::warn!(seq = %fetched.seq, subject = %fetched.subject, %foreign, "foreign message in the log");
                (
                    Message {
                        envelope: fetched.subject.clone().into_bytes(),
                        payload: fetched.frame.to_vec(),
                    },
                    None,
                )
            }
        };
        Ok(Self {
            seq: fetched.seq,
            subject: fetched.subject,
            message,
            event,
        })
    }
}

/// A message in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its place.
    pub seq: Seq,
    /// Its bytes.
    pub message: Message,
    /// The chain value after it.
    pub chain: Hash,
}

impl Record {
    /// The record of an entry that follows `previous`.
    pub fn after(previous: &Head, entry: &Entry) -> Self {
        let message = entry.message.clone();
        Self {
            seq: entry.seq,
            chain: link(previous, entry.seq, &message),
            message,
        }
    }

    /// Checks that it follows `previous` and that its bytes are those its chain value was made of; returns the head
    /// after it.
    ///
    /// # Errors
    /// One sentence that says what is wrong.
    pub fn check(&self, previous: &Head) -> Result<Head, String> {
        let expected = previous.seq.next();
        if self.seq != expected {
            return Err(format!(
                "the record {expected} is missing, the next one is {}",
                self.seq
            ));
        }
        let computed = link(previous, self.seq, &self.message);
        if computed != self.chain {
            return Err(format!(
                "its chain value is {}, its bytes and the record before give {}",
                chain::hex(&self.chain),
                chain::hex(&computed)
            ));
        }
        Ok(Head {
            seq: self.seq,
            chain: self.chain,
        })
    }

    /// The event and its envelope; `None` for a foreign message.
    pub fn event(&self) -> Option<(Envelope, Event)> {
        Some((self.message.envelope().ok()?, self.message.event().ok()?))
    }

    /// The subject it was published on.
    pub fn subject(&self) -> String {
        match self.message.envelope() {
            Ok(envelope) => envelope.subject,
            Err(_) => String::from_utf8_lossy(&self.message.envelope).into_owned(),
        }
    }

    /// Whether a message of the stream is the one recorded here.
    pub fn is(&self, fetched: &Fetched) -> bool {
        let same_bytes = || self.message.payload == fetched.frame || self.message.to_frame() == fetched.frame;
        self.seq == fetched.seq && self.subject() == fetched.subject && same_bytes()
    }

    /// The value of the store.
    pub(super) fn encode(&self) -> Vec<u8> {
        let Message { envelope, payload } = &self.message;
        let mut value = Vec::with_capacity(HEADER + envelope.len() + payload.len() + chain::GENESIS.len());
        value.push(VERSION);
        value.extend_from_slice(
            &u32::try_from(envelope.len())
                .expect("an envelope is small")
                .to_be_bytes(),
        );
        value.extend_from_slice(envelope);
        value.extend_from_slice(payload);
        value.extend_from_slice(&self.chain);
        value
    }

    /// Reads a value of the store.
    pub(super) fn decode(seq: Seq, value: &[u8]) -> Result<Self, String> {
        let cut = || format!("its {} bytes are cut short", value.len());
        let (&version, rest) = value.split_first().ok_or_else(cut)?;
        if version != VERSION {
            return Err(format!("its layout is version {version}, this build reads {VERSION}"));
        }
        let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (parts, chain) = rest.split_last_chunk::<32>().ok_or_else(cut)?;
        let (envelope, payload) = parts
            .split_at_checked(u32::from_be_bytes(*len) as usize)
            .ok_or_else(cut)?;
        Ok(Self {
            seq,
            message: Message {
                envelope: envelope.to_vec(),
                payload: payload.to_vec(),
            },
            chain: *chain,
        })
    }
}

fn link(previous: &Head, seq: Seq, message: &Message) -> Hash {
    chain::link(
        &previous.chain,
        seq,
        &chain::part(&message.envelope),
        &chain::part(&message.payload),
    )
}
