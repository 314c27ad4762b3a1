//! What a request does to a disk: checks before it is admitted, and the blocking call itself.

use std::sync::Arc;

use super::buffer::Buffer;
use super::proto::{Errno, Head, PAYLOAD_BYTES_MAX, Request, command, command_flag};
use crate::disk::{Change, Disk, DiskError, Extent, ExtentKind};
use crate::mutants;
use crate::shared::Shared;

/// Reads shorter than this are not searched for holes: copying them costs less than asking.
const SPARSE_READ_BYTES_MIN: usize = 64 << 10;
/// Pieces that one sparse read is cut into at most.
const SPARSE_PIECES_MAX: usize = 32;
/// Extents in one answer to `BLOCK_STATUS`; the client asks again from where they end.
const EXTENTS_MAX: usize = 4_096;
/// Bytes of one extent under extended headers.
const EXTENT_BYTES_MAX: usize = 16;

/// A failure as the client sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The protocol's number for it.
    pub errno: Errno,
    /// The text that goes with it, where the framing has room for one.
    pub text: String,
}

impl Failure {
    /// A failure with its text.
    pub fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self {
            errno,
            text: text.into(),
        }
    }

    /// A bug of ours.
    pub fn internal() -> Self {
        Self::new(Errno::Io, "internal error; see the daemon's log")
    }

    /// A disk's failure.
    pub fn of(error: &DiskError, is_write: bool) -> Self {
        let errno = match error {
            DiskError::OutOfRange { .. } if is_write => Errno::NoSpace,
            DiskError::OutOfRange { .. } => Errno::Inval,
            DiskError::ReadOnly(_) => Errno::Perm,
            DiskError::NoSpace(_) => Errno::NoSpace,
            DiskError::Io { .. } | DiskError::Poisoned(_) => Errno::Io,
            DiskError::ShuttingDown => Errno::Shutdown,
        };
        Self::new(errno, error.to_string())
    }
}

/// What a connection knows about its export; fixed when transmission begins.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Size in bytes.
    pub size: u64,
    /// Block size in bytes.
    pub block_size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether replies can have several chunks.
    pub structured: bool,
    /// Metadata contexts that were negotiated.
    pub contexts: Vec<(u32, ExtentKind)>,
}

impl Terms {
    /// Checks a request as the protocol demands, before any memory is spent on it.
    ///
    /// # Errors
    /// What to answer instead of carrying it out.
    pub fn check(&self, request: &Request) -> Result<(), Failure> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
        let (is_write, flags) = match request.command {
            command::READ if self.structured => (false, DF),
            // FUA asks for nothing that a read, a flush or a cache does not do anyway: allowed by the protocol.
            command::READ => (false, 0),
            command::WRITE => (true, PAYLOAD_LEN),
            command::FLUSH | command::CACHE => (false, 0),
            command::TRIM => (true, 0),
            command::WRITE_ZEROES => (true, NO_HOLE | FAST_ZERO),
            command::BLOCK_STATUS if self.contexts.is_empty() => {
                return Err(Failure::new(Errno::Inval, "no metadata context was negotiated"));
            }
            command::BLOCK_STATUS => (false, REQ_ONE),
            other => return Err(Failure::new(Errno::Inval, format!("unknown command {other}"))),
        };
        if request.flags & !(flags | FUA) != 0 {
            let text = format!("flags {:#x} do not go with command {}", request.flags, request.command);
            return Err(Failure::new(Errno::Inval, text));
        }
        if request.command == command::WRITE && request.payload_length != request.length {
            // Extended headers without the payload flag: what follows is the next request, not data.
            return Err(Failure::new(Errno::Inval, "a write without its payload"));
        }
        if is_write && self.read_only {
            return Err(Failure::new(Errno::Perm, "the export is read-only"));
        }
        if request.command == command::FLUSH {
            let well_formed = request.offset == 0 && request.length == 0;
            return if well_formed {
                Ok(())
            } else {
                Err(Failure::new(Errno::Inval, "a flush has no range"))
            };
        }
        let end = request.offset.checked_add(request.length);
        if end.is_none_or(|end| end > self.size) {
            let errno = if is_write && request.command != command::TRIM {
                Errno::NoSpace
            } else {
                Errno::Inval
            };
            let text = format!(
                "{} bytes at {} reach past the end of the disk ({} bytes)",
                request.length, request.offset, self.size
            );
            return Err(Failure::new(errno, text));
        }
        let moves_data = matches!(request.command, command::READ | command::WRITE);
        let oversize = moves_data && request.length > PAYLOAD_BYTES_MAX.into();
        if oversize && !mutants::OVERSIZE_TAKEN.is_on() {
            return Err(Failure::new(
                Errno::Inval,
                format!("the limit is {PAYLOAD_BYTES_MAX} bytes in one request"),
            ));
        }
        if request.length == 0 && request.command == command::BLOCK_STATUS {
            return Err(Failure::new(Errno::Inval, "a status needs a range"));
        }
        let ends_whole = end.is_some_and(|end| end == self.size || end.is_multiple_of(self.block_size));
        let partial = !request.offset.is_multiple_of(self.block_size) || !ends_whole;
        if request.flags & FAST_ZERO != 0 && (partial || request.flags & NO_HOLE != 0) {
            // Whole blocks are forgotten; parts of one, and zeroes that keep their place, are written.
            return Err(Failure::new(
                Errno::NotSupported,
                "only whole blocks without NO_HOLE are zeroed fast",
            ));
        }
        Ok(())
    }
}

impl Terms {
    /// Bytes that the answer to a `BLOCK_STATUS` takes at most.
    pub fn status_bytes_max(&self, request: &Request) -> usize {
        let pages = request.length.div_ceil(4_096) + 1;
        let extents = pages.min(extents_max(request) as u64) as usize;
        self.contexts.len() * (Head::BYTES_MAX + extents * EXTENT_BYTES_MAX)
    }
}

/// Extents that the client may get in one answer.
fn extents_max(request: &Request) -> usize {
    if request.flags & command_flag::REQ_ONE != 0 {
        1
    } else {
        EXTENTS_MAX
    }
}

/// A piece of a read's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// This range of the buffer.
    Data {
        /// First byte within the read.
        start: usize,
        /// Bytes.
        length: usize,
    },
    /// Zeroes.
    Hole {
        /// First byte within the read.
        start: usize,
        /// Bytes.
        length: usize,
    },
}

/// How a request ended.
#[derive(Debug)]
pub enum Outcome {
    /// Done; there is nothing to say.
    Done,
    /// It failed.
    Failed(Failure),
    /// A read, in one piece.
    Data(Buffer),
    /// A read, in pieces that cover it without overlap.
    Pieces(Buffer, Vec<Piece>),
    /// Extents per metadata context.
    Status(Vec<(u32, Vec<Extent>)>),
}

/// An admitted request.
pub struct Job {
    /// What to do.
    pub request: Request,
    /// A write's payload; a read's room.
    pub buffer: Option<Buffer>,
    /// On which disk.
    pub disk: Arc<dyn Disk>,
    /// Under which terms.
    pub terms: Arc<Terms>,
}

impl Job {
    /// Whether the request is begun together with others, and ends later.
    pub fn is_begun(&self) -> bool {
        matches!(self.request.command, command::WRITE | command::FLUSH) && self.disk.takes_batches()
    }

    /// What is to be begun.
    pub fn change(&mut self) -> Change {
        match (self.request.command, self.buffer.take()) {
            (command::WRITE, Some(buffer)) => Change::Write {
                offset: self.request.offset,
                data: Shared::of(buffer),
                fua: self.request.flags & command_flag::FUA != 0,
            },
            _ => Change::Flush,
        }
    }

    /// Carries the request out. May wait for a disk or a peer: call it on a worker.
    pub fn run(&mut self) -> Outcome {
        let Request {
            offset,
            length,
            flags,
            command,
            ..
        } = self.request;
        let fua = flags & command_flag::FUA != 0;
        let buffer = self.buffer.take();
        let result = match (command, buffer) {
            (command::READ, Some(buffer)) => self.read(buffer),
            (command::WRITE, Some(buffer)) => self.disk.write(offset, &buffer, fua).map(|()| Outcome::Done),
            // A zero-length request has no effect, and its meaning is up to the server.
            (command::TRIM | command::WRITE_ZEROES | command::CACHE, _) if length == 0 => Ok(Outcome::Done),
            (command::FLUSH, _) => self.disk.flush().map(|()| Outcome::Done),
            (command::TRIM, _) => self.disk.trim(offset, length, fua).map(|()| Outcome::Done),
            (command::CACHE, _) => self.disk.cache(offset, length).map(|()| Outcome::Done),
            (command::WRITE_ZEROES, _) => {
                let keep = flags & command_flag::NO_HOLE != 0;
                self.disk
                    .write_zeroes(offset, length, keep, fua)
                    .map(|()| Outcome::Done)
            }
            (command::BLOCK_STATUS, _) => self.status(),
            (command, _) => unreachable!("command {command} was admitted without a buffer or at all"),
        };
        result.unwrap_or_else(|error| {
            let is_write = matches!(command, command::WRITE | command::WRITE_ZEROES);
            Outcome::Failed(Failure::of(&error, is_write))
        })
    }

    fn read(&self, mut buffer: Buffer) -> Result<Outcome, DiskError> {
        let offset = self.request.offset;
        let fragments = self.terms.structured && self.request.flags & command_flag::DF == 0;
        if fragments && buffer.len() >= SPARSE_READ_BYTES_MIN {
            let pieces = self.pieces(buffer.len())?;
            if pieces.iter().any(|piece| matches!(piece, Piece::Hole { .. })) {
                for piece in &pieces {
                    if let Piece::Data { start, length } = *piece {
                        self.disk
                            .read(offset + start as u64, &mut buffer[start..start + length])?;
                    }
                }
                return Ok(Outcome::Pieces(buffer, pieces));
            }
        }
        self.disk.read(offset, &mut buffer)?;
        Ok(Outcome::Data(buffer))
    }

    /// Cuts a read at its holes. What is not described, is data.
    fn pieces(&self, length: usize) -> Result<Vec<Piece>, DiskError> {
        let offset = self.request.offset;
        let extents = self
            .disk
            .extents(offset, length as u64, ExtentKind::Allocation, SPARSE_PIECES_MAX - 1)?;
        let mut pieces = Vec::with_capacity(extents.len() + 1);
        let mut start = 0;
        for extent in extents {
            let take = usize::try_from(extent.length).unwrap_or(usize::MAX).min(length - start);
            match (pieces.last_mut(), extent.status & 2 != 0) {
                _ if take == 0 => {}
                (Some(Piece::Hole { length, .. }), true) | (Some(Piece::Data { length, .. }), false) => *length += take,
                (_, true) => pieces.push(Piece::Hole { start, length: take }),
                (_, false) => pieces.push(Piece::Data { start, length: take }),
            }
            start += take;
        }
        if start < length {
            match pieces.last_mut() {
                Some(Piece::Data { length: last, .. }) => *last += length - start,
                _ => pieces.push(Piece::Data {
                    start,
                    length: length - start,
                }),
            }
        }
        Ok(pieces)
    }

    fn status(&self) -> Result<Outcome, DiskError> {
        let Request { offset, length, .. } = self.request;
        let extents_max = extents_max(&self.request);
        let mut answer = Vec::with_capacity(self.terms.contexts.len());
        for (id, kind) in &self.terms.contexts {
            let mut extents = self.disk.extents(offset, length, *kind, extents_max)?;
            let mut left = length;
            extents.retain_mut(|extent| {
                extent.length = extent.length.min(left);
                left -= extent.length;
                extent.length > 0
            });
            extents.truncate(extents_max);
            if extents.is_empty() {
                let source = std::io::Error::other("the disk described nothing");
                return Err(DiskError::Io {
                    what: format!("describe {length} bytes at {offset}"),
                    source,
                });
            }
            answer.push((*id, extents));
        }
        Ok(Outcome::Status(answer))
    }
}

#[cfg(test)]
mod tests {
    use super::super::buffer::BufferPool;
    use super::super::memory::MemoryDisk;
    use super::*;

    fn request(command: u16, flags: u16, offset: u64, length: u64) -> Request {
        let payload_length = if command == command::WRITE { length } else { 0 };
        Request {
            flags,
            command,
            cookie: 1,
            offset,
            length,
            payload_length,
        }
    }

    fn terms() -> Terms {
        let contexts = vec![(1, ExtentKind::Allocation), (2, ExtentKind::Tier)];
        Terms {
            size: 1 << 20,
            block_size: 64 << 10,
            read_only: false,
            structured: true,
            contexts,
        }
    }

    #[test]
    fn requests_are_checked_as_the_protocol_demands() {
        use command::{BLOCK_STATUS, CACHE, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES};
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        const END: u64 = 1 << 20;
        const BLOCK: u64 = 64 << 10;
        let cases = [
            (request(READ, DF | FUA, 1, 511), None),
            (request(READ, 0, END, 0), None),
            (request(READ, 0, END, 1), Some(Errno::Inval)),
            (request(READ, 0, u64::MAX, 2), Some(Errno::Inval)),
            (request(READ, NO_HOLE, 0, 1), Some(Errno::Inval)),
            (request(READ, 1 << 9, 0, 1), Some(Errno::Inval)),
            (request(WRITE, FUA, END - 1, 1), None),
            (request(WRITE, 0, END - 1, 2), Some(Errno::NoSpace)),
            (request(WRITE, DF, 0, 1), Some(Errno::Inval)),
            (request(WRITE_ZEROES, 0, END, 1), Some(Errno::NoSpace)),
            (request(WRITE_ZEROES, NO_HOLE | FUA, 1, 2), None),
            (request(WRITE_ZEROES, FAST_ZERO, BLOCK, 2 * BLOCK), None),
            (request(WRITE_ZEROES, FAST_ZERO, 512, BLOCK), Some(Errno::NotSupported)),
            (
                request(WRITE_ZEROES, FAST_ZERO, 0, BLOCK + 512),
                Some(Errno::NotSupported),
            ),
            (
                request(WRITE_ZEROES, FAST_ZERO | NO_HOLE, 0, BLOCK),
                Some(Errno::NotSupported),
            ),
            (request(TRIM, FUA, 0, END), None),
            (request(TRIM, 0, 1, END), Some(Errno::Inval)),
            (request(CACHE, 0, 0, END), None),
            (request(CACHE, REQ_ONE, 0, END), Some(Errno::Inval)),
            (request(FLUSH, FUA, 0, 0), None),
            (request(FLUSH, 0, 0, 1), Some(Errno::Inval)),
            (request(BLOCK_STATUS, REQ_ONE, 0, END), None),
            (request(BLOCK_STATUS, 0, 0, 0), Some(Errno::Inval)),
            (request(8, 0, 0, 0), Some(Errno::Inval)),
            (
                Request {
                    payload_length: 0,
                    ..request(WRITE, 0, 0, 512)
                },
                Some(Errno::Inval),
            ),
        ];
        for (request, expected) in cases {
            let found = terms().check(&request).err().map(|failure| failure.errno);
            assert_eq!(found, expected, "{request:?}");
        }
        let read_only = Terms {
            read_only: true,
            ..terms()
        };
        for command in [WRITE, TRIM, WRITE_ZEROES] {
            assert_eq!(
                read_only.check(&request(command, 0, 0, 1)).unwrap_err().errno,
                Errno::Perm
            );
        }
        let simple = Terms {
            structured: false,
            contexts: Vec::new(),
            ..terms()
        };
        assert!(simple.check(&request(READ, DF, 0, 1)).is_err());
        assert!(simple.check(&request(BLOCK_STATUS, 0, 0, 1)).is_err());
        let large = Terms {
            size: 1 << 40,
            ..terms()
        };
        assert!(large.check(&request(READ, 0, 0, (32 << 20) + 1)).is_err());
        assert!(large.check(&request(TRIM, 0, 0, 1 << 31)).is_ok());
    }

    #[test]
    fn a_sparse_read_is_cut_at_its_holes() {
        const BLOCK: usize = 64 << 10;
        let disk = MemoryDisk::new(1 << 20);
        disk.write((2 * BLOCK) as u64, &[7; BLOCK], false).unwrap();
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let pool = BufferPool::new(0);
        let run = |flags, offset: usize, length: usize| {
            let request = request(command::READ, flags, offset as u64, length as u64);
            let buffer = Some(pool.take(length));
            Job {
                request,
                buffer,
                disk: Arc::clone(&disk),
                terms: Arc::new(terms()),
            }
            .run()
        };
        let Outcome::Pieces(buffer, pieces) = run(0, BLOCK, 3 * BLOCK) else {
            panic!("not sparse")
        };
        let expected = [
            Piece::Hole {
                start: 0,
                length: BLOCK,
            },
            Piece::Data {
                start: BLOCK,
                length: BLOCK,
            },
            Piece::Hole {
                start: 2 * BLOCK,
                length: BLOCK,
            },
        ];
        assert_eq!(pieces, expected);
        assert!(buffer[BLOCK..2 * BLOCK].iter().all(|b| *b == 7));
        assert!(matches!(run(command_flag::DF, 0, 3 * BLOCK), Outcome::Data(_)));
        assert!(matches!(run(0, 2 * BLOCK, BLOCK), Outcome::Data(_)));
        assert!(matches!(run(0, 0, BLOCK - 1), Outcome::Data(_)));
    }

    #[test]
    fn errors_become_the_protocols_numbers() {
        let io = || DiskError::Io {
            what: "read".into(),
            source: std::io::Error::other("x"),
        };
        let out = || DiskError::OutOfRange {
            offset: 1,
            length: 2,
            size: 1,
        };
        let cases = [
            (out(), false, Errno::Inval),
            (out(), true, Errno::NoSpace),
            (DiskError::ReadOnly("sealed"), true, Errno::Perm),
            (DiskError::NoSpace(String::new()), true, Errno::NoSpace),
            (io(), false, Errno::Io),
            (DiskError::Poisoned(String::new()), true, Errno::Io),
            (DiskError::ShuttingDown, false, Errno::Shutdown),
        ];
        for (error, is_write, errno) in cases {
            assert_eq!(Failure::of(&error, is_write).errno, errno);
        }
    }
}
