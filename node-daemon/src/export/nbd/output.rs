//! What a connection has to send: small things packed into one arena, large buffers beside it, sent with few calls.
//!
//! Bounded by construction: the arena has a fixed size, and large buffers are paid for by the connection's budget.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;

use super::buffer::Buffer;
use super::job::{Failure, Outcome, Piece};
use super::proto::{self, Framing, Head, Request, chunk};
use super::stream::Stream;
use crate::disk::Extent;

/// Bytes of the arena: a batch of 64 RAM hits of 4 KiB, small enough to stay in the cache on its way to the socket.
const ARENA_BYTES: usize = 272 << 10;
/// Arena room that any reply may need: heads of a sparse read's pieces, or an error and its text.
pub const REPLY_ROOM_BYTES: usize = 4 << 10;
/// Pieces of one gathering write; the kernel takes 1,024.
const GATHER_MAX: usize = 64;
/// Longest text sent with an error.
const ERROR_TEXT_BYTES_MAX: usize = 512;

#[derive(Debug)]
enum Segment {
    Arena {
        start: usize,
        end: usize,
    },
    Shared {
        buffer: Arc<Buffer>,
        start: usize,
        end: usize,
    },
    Whole {
        buffer: Buffer,
        start: usize,
    },
    Owned {
        bytes: Vec<u8>,
        start: usize,
    },
    /// Everything that reserved these budget bytes is sent.
    Release(usize),
}

impl Segment {
    fn bytes<'a>(&'a self, arena: &'a [u8]) -> &'a [u8] {
        match self {
            Segment::Arena { start, end } => &arena[*start..*end],
            Segment::Shared { buffer, start, end } => &buffer[*start..*end],
            Segment::Whole { buffer, start } => &buffer[*start..],
            Segment::Owned { bytes, start } => &bytes[*start..],
            Segment::Release(_) => &[],
        }
    }

    fn skip(&mut self, sent: usize) {
        match self {
            Segment::Arena { start, .. }
            | Segment::Shared { start, .. }
            | Segment::Whole { start, .. }
            | Segment::Owned { start, .. } => *start += sent,
            Segment::Release(_) => {}
        }
    }
}

/// Replies waiting to be sent, in order.
pub struct Output {
    arena: Box<[u8]>,
    used: usize,
    segments: VecDeque<Segment>,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            arena: vec![0; ARENA_BYTES].into(),
            used: 0,
            segments: VecDeque::with_capacity(64),
        }
    }
}

impl Output {
    /// Bytes that still fit into the arena.
    pub fn room(&self) -> usize {
        self.arena.len() - self.used
    }

    /// Whether everything is sent.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The next `length` bytes of the arena, to be filled and then [`Output::commit`]ted.
    pub fn slot(&mut self, length: usize) -> &mut [u8] {
        &mut self.arena[self.used..self.used + length]
    }

    /// Takes over the first `length` bytes of the last slot.
    pub fn commit(&mut self, length: usize) {
        let (start, end) = (self.used, self.used + length);
        self.used = end;
        match self.segments.back_mut() {
            Some(Segment::Arena { end: last, .. }) if *last == start => *last = end,
            _ => self.segments.push_back(Segment::Arena { start, end }),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.slot(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    fn head(&mut self, head: &Head) {
        self.put(head.as_bytes());
    }

    /// Appends the reply to `request`. The caller made sure of [`REPLY_ROOM_BYTES`]. `reserved` budget bytes are
    /// returned by [`Output::send`] once the reply is out.
    pub fn reply(&mut self, framing: Framing, request: &Request, outcome: Outcome, reserved: usize) {
        let Request { cookie, offset, .. } = *request;
        match outcome {
            Outcome::Done if framing == Framing::Extended => {
                self.head(&proto::chunk_header(framing, true, chunk::NONE, cookie, offset, 0));
            }
            Outcome::Done => self.head(&proto::simple_reply(0, cookie)),
            Outcome::Failed(failure) => self.failure(framing, request, &failure),
            Outcome::Data(buffer) => {
                self.head(&proto::read_header(framing, cookie, offset, buffer.len() as u64));
                self.segments.push_back(Segment::Whole { buffer, start: 0 });
            }
            Outcome::Pieces(buffer, pieces) => self.pieces(framing, request, buffer, &pieces),
            Outcome::Status(contexts) => {
                let bytes = status_chunks(framing, request, &contexts);
                self.segments.push_back(Segment::Owned { bytes, start: 0 });
            }
        }
        if reserved > 0 {
            self.segments.push_back(Segment::Release(reserved));
        }
    }

    fn failure(&mut self, framing: Framing, request: &Request, failure: &Failure) {
        if framing == Framing::Simple {
            return self.head(&proto::simple_reply(failure.errno as u32, request.cookie));
        }
        let mut end = failure.text.len().min(ERROR_TEXT_BYTES_MAX);
        while !failure.text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &failure.text.as_bytes()[..end];
        let length = 6 + text.len() as u64;
        self.head(&proto::chunk_header(
            framing,
            true,
            chunk::ERROR,
            request.cookie,
            request.offset,
            length,
        ));
        self.put(&(failure.errno as u32).to_be_bytes());
        self.put(&(text.len() as u16).to_be_bytes());
        self.put(text);
    }

    fn pieces(&mut self, framing: Framing, request: &Request, buffer: Buffer, pieces: &[Piece]) {
        let Request { cookie, offset, .. } = *request;
        let buffer = Arc::new(buffer);
        for (place, piece) in pieces.iter().enumerate() {
            let done = place + 1 == pieces.len();
            match *piece {
                Piece::Data { start, length } => {
                    let at = offset + start as u64;
                    self.head(&proto::data_header(framing, done, cookie, offset, at, length as u64));
                    let buffer = Arc::clone(&buffer);
                    self.segments.push_back(Segment::Shared {
                        buffer,
                        start,
                        end: start + length,
                    });
                }
                Piece::Hole { start, length } => {
                    let at = offset + start as u64;
                    self.head(&proto::hole_chunk(framing, done, cookie, offset, at, length as u32));
                }
            }
        }
    }

    /// Sends as much as the socket takes without waiting. Returns the bytes sent and the budget bytes released.
    ///
    /// # Errors
    /// The socket's; [`io::ErrorKind::WouldBlock`] is none.
    pub fn send(&mut self, stream: &Stream) -> io::Result<(usize, usize)> {
        let (mut sent, mut released) = (0, 0);
        while !self.segments.is_empty() {
            let written = match self.segments.as_slices().0 {
                [only] if self.segments.len() == 1 => stream.try_write(only.bytes(&self.arena)),
                _ => {
                    let mut gather = [IoSlice::new(&[]); GATHER_MAX];
                    let mut count = 0;
                    for segment in self
                        .segments
                        .iter()
                        .filter(|s| !s.bytes(&self.arena).is_empty())
                        .take(GATHER_MAX)
                    {
                        gather[count] = IoSlice::new(segment.bytes(&self.arena));
                        count += 1;
                    }
                    if count == 0 {
                        Ok(0)
                    } else {
                        stream.try_write_vectored(&gather[..count])
                    }
                }
            };
            let mut left = match written {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            sent += left;
            while let Some(front) = self.segments.front_mut() {
                let length = front.bytes(&self.arena).len();
                if left < length {
                    front.skip(left);
                    break;
                }
                left -= length;
                if let Some(Segment::Release(bytes)) = self.segments.pop_front() {
                    released += bytes;
                }
            }
        }
        if self.segments.is_empty() {
            self.used = 0;
        }
        Ok((sent, released))
    }
}

/// Chunks of a `BLOCK_STATUS` answer, one per context.
fn status_chunks(framing: Framing, request: &Request, contexts: &[(u32, Vec<Extent>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (place, (id, extents)) in contexts.iter().enumerate() {
        let done = place + 1 == contexts.len();
        let count = extents.len() as u64;
        if framing == Framing::Extended {
            let kind = chunk::BLOCK_STATUS_EXT;
            let head = proto::chunk_header(framing, done, kind, request.cookie, request.offset, 8 + 16 * count);
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(&id.to_be_bytes());
            out.extend_from_slice(&(count as u32).to_be_bytes());
            for extent in extents {
                out.extend_from_slice(&extent.length.to_be_bytes());
                out.extend_from_slice(&u64::from(extent.status).to_be_bytes());
            }
        } else {
            let kind = chunk::BLOCK_STATUS;
            let head = proto::chunk_header(framing, done, kind, request.cookie, request.offset, 4 + 8 * count);
            out.extend_from_slice(head.as_bytes());
            out.extend_from_slice(&id.to_be_bytes());
            for extent in extents {
                // The request's length fits 32 bits, and no extent is longer than the request.
                out.extend_from_slice(&(extent.length as u32).to_be_bytes());
                out.extend_from_slice(&extent.status.to_be_bytes());
            }
        }
    }
    out
}
