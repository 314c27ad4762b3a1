//! One record: a message, its place and its chain value; and how it is laid out as a value of the store.
//!
//! Value: version (one byte), length of the envelope as u32 big-endian, envelope, payload, 32 bytes of chain. Version 1
//! holds the payload, version 2 (a *thinned* record) the 32 bytes of the payload's hash, of which the chain is made.
//! A foreign message (damaged, or under a subject that is not its publisher's) is kept with its bare subject as the
//! envelope and its whole frame as the payload; no envelope decodes from a subject, so it stays foreign for ever.

use hearth_bus::{Fetched, Foreign};
use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{DecodeError, Envelope, Event, Message, Seq};
use scheduler_core::mutants;

use super::Head;

const WHOLE: u8 = 1;
const THINNED: u8 = 2;
const HEADER: usize = 5;
const HASH: usize = chain::GENESIS.len();

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
    /// Hashes of envelope and payload, computed once for all that chain them.
    parts: (Hash, Hash),
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
            parts: (chain::part(&message.envelope), chain::part(&message.payload)),
            seq: fetched.seq,
            subject: fetched.subject,
            message,
            event,
        })
    }

    /// The head after this entry, behind `previous`.
    pub fn after(&self, previous: &Head) -> Head {
        Head {
            seq: self.seq,
            chain: chain::link(&previous.chain, self.seq, &self.parts.0, &self.parts.1),
        }
    }

    /// The value of the store.
    pub(super) fn encode(&self, chain: &Hash) -> Vec<u8> {
        encode(WHOLE, &self.message.envelope, &self.message.payload, chain)
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
    /// The payload's hash, when the payload itself was dropped (and is empty here).
    pub thinned: Option<Hash>,
}

/// What a record tells whoever folds the log.
#[derive(Debug)]
pub enum Content {
    /// An event and its envelope.
    Event(Box<(Envelope, Event)>),
    /// A message that is no event of ours.
    Foreign,
    /// An event whose payload was dropped: what it said is gone.
    Thinned,
}

impl Record {
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
        let computed = self.link(previous);
        if computed != self.chain && !mutants::is_on("chain-unchecked") {
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

    fn link(&self, previous: &Head) -> Hash {
        let payload = self.thinned.unwrap_or_else(|| chain::part(&self.message.payload));
        chain::link(
            &previous.chain,
            self.seq,
            &chain::part(&self.message.envelope),
            &payload,
        )
    }

    /// The event and its envelope; `None` for a foreign message and for a thinned record.
    pub fn event(&self) -> Option<(Envelope, Event)> {
        match self.content() {
            Ok(Content::Event(event)) => Some(*event),
            _ => None,
        }
    }

    /// What the record tells.
    ///
    /// # Errors
    /// [`DecodeError::Newer`] for an event of a later Hearth, which no fold may pass over.
    pub fn content(&self) -> Result<Content, DecodeError> {
        if self.thinned.is_some() {
            return Ok(Content::Thinned);
        }
        let decoded = self.message.envelope().and_then(|e| Ok((e, self.message.event()?)));
        match decoded {
            Ok(event) => Ok(Content::Event(Box::new(event))),
            Err(newer @ DecodeError::Newer { .. }) => Err(newer),
            Err(_) => Ok(Content::Foreign),
        }
    }

    /// The message as the stream had it; `None` when its payload was thinned.
    pub fn to_fetched(&self) -> Option<Fetched> {
        if self.thinned.is_some() {
            return None;
        }
        let envelope = self.message.envelope().ok();
        Some(Fetched {
            seq: self.seq,
            subject: self.subject(),
            message_id: envelope.as_ref().map(Envelope::message_id),
            frame: match envelope {
                Some(_) => self.message.to_frame(),
                None => self.message.payload.clone(),
            }
            .into(),
        })
    }

    /// The record without its payload, under the same chain value.
    pub(super) fn thin(mut self) -> Self {
        if self.thinned.is_none() {
            self.thinned = Some(chain::part(&self.message.payload));
            self.message.payload.clear();
        }
        self
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
        let same_bytes = || match &self.thinned {
            None => self.message.payload == fetched.frame || self.message.to_frame() == fetched.frame,
            Some(payload) => Message::from_frame(&fetched.frame)
                .is_ok_and(|m| m.envelope == self.message.envelope && chain::part(&m.payload) == *payload),
        };
        self.seq == fetched.seq && self.subject() == fetched.subject && same_bytes()
    }

    /// The value of the store.
    pub(super) fn encode(&self) -> Vec<u8> {
        match &self.thinned {
            None => encode(WHOLE, &self.message.envelope, &self.message.payload, &self.chain),
            Some(payload) => encode(THINNED, &self.message.envelope, payload, &self.chain),
        }
    }

    /// Reads a value of the store.
    pub(super) fn decode(seq: Seq, value: &[u8]) -> Result<Self, String> {
        let cut = || format!("its {} bytes are cut short", value.len());
        let (&version, rest) = value.split_first().ok_or_else(cut)?;
        if version != WHOLE && version != THINNED {
            return Err(format!(
                "its layout is version {version}, this build reads {WHOLE} and {THINNED}"
            ));
        }
        let (len, rest) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (parts, chain) = rest.split_last_chunk::<HASH>().ok_or_else(cut)?;
        let (envelope, payload) = parts
            .split_at_checked(u32::from_be_bytes(*len) as usize)
            .ok_or_else(cut)?;
        let (payload, thinned) = if version == THINNED {
            let hash = Hash::try_from(payload).map_err(|_| cut())?;
            (Vec::new(), Some(hash))
        } else {
            (payload.to_vec(), None)
        };
        Ok(Self {
            seq,
            message: Message {
                envelope: envelope.to_vec(),
                payload,
            },
            chain: *chain,
            thinned,
        })
    }
}

fn encode(version: u8, envelope: &[u8], payload: &[u8], chain: &Hash) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEADER + envelope.len() + payload.len() + HASH);
    value.push(version);
    let len = u32::try_from(envelope.len()).expect("an envelope is small");
    value.extend_from_slice(&len.to_be_bytes());
    value.extend_from_slice(envelope);
    value.extend_from_slice(payload);
    value.extend_from_slice(chain);
    value
}
