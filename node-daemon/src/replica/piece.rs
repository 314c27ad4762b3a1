//! The bytes that go with a request or its answer, and how message and bytes travel together in a frame.

use hearth_protocol::ImageId;
use hearth_replication::session::Message;
use serde::{Deserialize, Serialize};

use crate::peer::Frame;
use crate::shared::Shared;

/// A part of the image, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The first byte.
    pub offset: u64,
    /// How many there are, and what they are.
    pub body: Body,
}

/// What a piece holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// So many bytes, to be read.
    Wanted(u64),
    /// These bytes.
    Data(Shared),
    /// So many zeros.
    Zeros {
        /// How many.
        length: u64,
        /// Later writes cannot run out of space.
        keep_allocated: bool,
    },
}

impl Body {
    /// Bytes, as zeros if they are nothing else: those take no space and no time on the way.
    pub fn of(bytes: Vec<u8>) -> Self {
        let length = bytes.len() as u64;
        if bytes.iter().all(|byte| *byte == 0) {
            return Body::Zeros {
                length,
                keep_allocated: false,
            };
        }
        Body::Data(bytes.into())
    }

    /// How many bytes.
    pub fn length(&self) -> u64 {
        match self {
            Body::Wanted(length) | Body::Zeros { length, .. } => *length,
            Body::Data(bytes) => bytes.len() as u64,
        }
    }
}

/// A piece as a frame's head tells it; the bytes are behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Wanted { length: u64 },
    Data,
    Zeros { length: u64, keep_allocated: bool },
}

/// Bytes of most heads: requests and their answers.
const HEAD_BYTES: usize = 192;

#[derive(Serialize, Deserialize)]
struct Head {
    image: ImageId,
    message: Message,
    piece: Option<(u64, Kind)>,
}

/// Why a frame is none of ours.
#[derive(Debug, thiserror::Error)]
#[error("cannot read what a peer says: {0}; use the same version of Hearth on all nodes")]
pub struct Garbled(String);

/// A message with its piece as a frame.
pub fn to_frame(image: ImageId, message: Message, piece: Option<&Piece>) -> Frame {
    let mut data = Shared::default();
    let piece = piece.map(|piece| {
        let kind = match &piece.body {
            Body::Wanted(length) => Kind::Wanted { length: *length },
            Body::Zeros { length, keep_allocated } => Kind::Zeros {
                length: *length,
                keep_allocated: *keep_allocated,
            },
            Body::Data(bytes) => {
                data = bytes.clone();
                Kind::Data
            }
        };
        (piece.offset, kind)
    });
    let mut head = Vec::with_capacity(HEAD_BYTES);
    rmp_serde::encode::write(&mut head, &Head { image, message, piece }).expect("messages always encode");
    Frame { head, data }
}

/// What a frame says.
///
/// # Errors
/// [`Garbled`].
pub fn from_frame(frame: Frame) -> Result<(ImageId, Message, Option<Piece>), Garbled> {
    let head: Head = rmp_serde::from_slice(&frame.head).map_err(|error| Garbled(error.to_string()))?;
    let piece = head.piece.map(|(offset, kind)| Piece {
        offset,
        body: match kind {
            Kind::Wanted { length } => Body::Wanted(length),
            Kind::Zeros { length, keep_allocated } => Body::Zeros { length, keep_allocated },
            Kind::Data => Body::Data(frame.data),
        },
    });
    Ok((head.image, head.message, piece))
}

#[cfg(test)]
mod tests {
    use hearth_protocol::{Epoch, Incarnation, LeaseId, SetVersion};
    use hearth_replication::request::{Request, RequestId, Stamp, Work};

    use super::*;

    #[test]
    fn messages_travel_with_their_bytes() {
        let stamp = Stamp {
            epoch: Epoch(3),
            lease: LeaseId(u128::MAX),
            set_version: SetVersion(7),
        };
        let request = Message::Request(Request {
            id: RequestId(9),
            stamp,
            store: Incarnation(5),
            work: Work::Flush {
                keep: [hearth_protocol::BlockIndex(4)].into(),
            },
        });
        let zeros = Body::of(vec![0; 64]);
        assert_eq!(zeros.length(), 64);
        assert!(matches!(zeros, Body::Zeros { .. }));
        for body in [
            None,
            Some(zeros),
            Some(Body::Wanted(4096)),
            Some(Body::of(vec![0, 1, 2])),
        ] {
            let piece = body.map(|body| Piece { offset: 12, body });
            let frame = to_frame(ImageId(1), request.clone(), piece.as_ref());
            let (image, message, back) = from_frame(frame).unwrap();
            assert_eq!((image, message, back), (ImageId(1), request.clone(), piece));
        }
        let garbage = Frame {
            head: vec![0xc1; 40],
            data: Shared::default(),
        };
        assert!(from_frame(garbage).is_err());
    }
}
