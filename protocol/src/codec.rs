//! How an event travels and is stored: a framed envelope and payload, both MessagePack with field names.
//!
//! Frame: magic `HRT1`, envelope length as u32 big-endian, envelope, payload to the end. Envelope and payload stay
//! separate bytes because the hash chain covers each by itself, so that a payload can be thinned later.
//! Self-describing: fields can be added with a serde default, and every format ever released keeps decoding
//! (golden files under `tests/golden`).

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::ids::{Incarnation, Publisher};
use crate::limits::MESSAGE_BYTES_MAX;
use crate::units::WallMs;

/// Version of the codec that this build writes. Readers refuse a higher one.
pub const CODEC_VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"HRT1";

/// What is known about a message besides its payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Codec version that wrote the payload.
    pub codec: u16,
    /// Subject it was published on.
    pub subject: String,
    /// Who published it.
    pub publisher: Publisher,
    /// The publisher's process start.
    pub incarnation: Incarnation,
    /// Exactly last + 1 within the incarnation, from 1.
    pub publisher_seq: u64,
    /// The publisher's wall clock. Data only.
    pub time: WallMs,
    /// The words of the operator who asked for it; empty where nobody did or nothing was said. Data only.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Envelope {
    /// The id under which JetStream drops repeats (`Nats-Msg-Id`).
    pub fn message_id(&self) -> String {
        format!("{}.{}", self.incarnation, self.publisher_seq)
    }
}

/// A message as it is stored: the two parts, undecoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Encoded [`Envelope`].
    pub envelope: Vec<u8>,
    /// Encoded [`Event`].
    pub payload: Vec<u8>,
}

/// Why bytes are no message of ours.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Too short, wrong magic, or a length that points past the end.
    #[error("the message frame is damaged or foreign: {0}")]
    Frame(&'static str),
    /// Written by a newer Hearth.
    #[error("the message has codec version {found}, this build reads up to {CODEC_VERSION}: upgrade Hearth first")]
    Newer {
        /// The version found.
        found: u16,
    },
    /// Not the MessagePack that was expected.
    #[error("cannot decode {what}: {source}")]
    Part {
        /// `envelope` or `event`.
        what: &'static str,
        /// The decoder's complaint.
        #[source]
        source: rmp_serde::decode::Error,
    },
}

impl Message {
    /// Encodes an event under its envelope.
    ///
    /// # Panics
    /// Never for the types of this crate: their encoding cannot fail.
    pub fn encode(envelope: &Envelope, event: &Event) -> Self {
        Self {
            envelope: rmp_serde::to_vec_named(envelope).expect("an envelope always encodes"),
            payload: rmp_serde::to_vec_named(event).expect("an event always encodes"),
        }
    }

    /// The bytes that travel.
    pub fn to_frame(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.envelope.len() + self.payload.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(
            &u32::try_from(self.envelope.len())
                .expect("an envelope is small")
                .to_be_bytes(),
        );
        out.extend_from_slice(&self.envelope);
        out.extend_from_slice(&self.payload);
        out
    }

    /// Splits a frame.
    ///
    /// # Errors
    /// [`DecodeError::Frame`] for anything that is not one whole frame.
    pub fn from_frame(frame: &[u8]) -> Result<Self, DecodeError> {
        if frame.len() > MESSAGE_BYTES_MAX {
            return Err(DecodeError::Frame("longer than any message"));
        }
        let rest = frame.strip_prefix(&MAGIC).ok_or(DecodeError::Frame("wrong magic"))?;
        let (len, rest) = rest.split_first_chunk::<4>().ok_or(DecodeError::Frame("no length"))?;
        let len = u32::from_be_bytes(*len) as usize;
        if len > rest.len() {
            return Err(DecodeError::Frame("envelope runs past the end"));
        }
        let (envelope, payload) = rest.split_at(len);
        Ok(Self {
            envelope: envelope.to_vec(),
            payload: payload.to_vec(),
        })
    }

    /// Decodes the envelope.
    ///
    /// # Errors
    /// [`DecodeError::Part`], or [`DecodeError::Newer`] for a later codec version.
    pub fn envelope(&self) -> Result<Envelope, DecodeError> {
        let envelope: Envelope = rmp_serde::from_slice(&self.envelope).map_err(|source| DecodeError::Part {
            what: "envelope",
            source,
        })?;
        if envelope.codec > CODEC_VERSION {
            return Err(DecodeError::Newer { found: envelope.codec });
        }
        Ok(envelope)
    }

    /// Decodes the event.
    ///
    /// # Errors
    /// [`DecodeError::Part`].
    pub fn event(&self) -> Result<Event, DecodeError> {
        rmp_serde::from_slice(&self.payload).map_err(|source| DecodeError::Part { what: "event", source })
    }
}
