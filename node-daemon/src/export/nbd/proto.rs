//! The NBD protocol's numbers, and its messages as bytes: pure functions on slices, shared by the server and the
//! [peer client](crate::peer).
//!
//! No I/O, no allocation, no trust in what is read. Source: `doc/proto.md` of the NetworkBlockDevice project and its
//! extended-headers extension. All numbers on the wire are big-endian.

/// First eight bytes a server sends (`NBDMAGIC`).
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Opens every option and the second half of the greeting (`IHAVEOPT`).
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Opens every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Opens a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Opens an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Opens a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Opens a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Opens a chunk of a reply under extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Longest export name or query, in bytes (proto.md, "string": SHOULD be no longer than 4,096).
pub const STRING_BYTES_MAX: usize = 4_096;
/// Largest payload of a request or a reply, in bytes; what clients assume when nothing else is announced.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Handshake flags of server and client.
pub mod handshake_flag {
    /// Options have lengths and replies.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// `EXPORT_NAME` is answered without 124 zero bytes.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options a client may send before transmission.
pub mod option {
    /// Chooses an export the old way; cannot fail politely.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the session.
    pub const ABORT: u32 = 2;
    /// Asks for the names of all exports.
    pub const LIST: u32 = 3;
    /// Asks for TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks about an export.
    pub const INFO: u32 = 6;
    /// Asks about an export and enters transmission.
    pub const GO: u32 = 7;
    /// Asks for structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks which metadata contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Selects metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Asks for 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
    /// Hearth's own: another node, that goes on in words of its own.
    pub const PEER: u32 = 0x4872_7450;
}

/// Types of option replies.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The server's rules forbid it.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The option's data is longer than the server takes.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information in [`option_reply::INFO`].
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum request size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod export_flag {
    /// The other flags are valid.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is served.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// "Do not fragment" is served.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one coherent disk: a flush on one covers what was acknowledged on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `CACHE` is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// `WRITE_ZEROES` can be told to fail where it would be slow.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the only command with a payload.
    pub const WRITE: u16 = 1;
    /// Finish what is in flight and disconnect.
    pub const DISC: u16 = 2;
    /// Put acknowledged writes on stable storage.
    pub const FLUSH: u16 = 3;
    /// Give a range back.
    pub const TRIM: u16 = 4;
    /// Bring a range into RAM.
    pub const CACHE: u16 = 5;
    /// Make a range read as zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod command_flag {
    /// Stable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// At most one chunk of data.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail instead of zeroing slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: `length` bytes of payload follow.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks of a structured reply.
pub mod chunk {
    /// Nothing, only an end.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents, 32 bits.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents, 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error and its text.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// Set on the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// The error numbers the protocol knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// Not allowed, such as a write to a read-only export.
    Perm = 1,
    /// The disk or the peer failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// No room, or a write past the end.
    NoSpace = 28,
    /// Too long for one reply.
    Overflow = 75,
    /// Not fast.
    NotSupported = 95,
    /// The export is going away.
    Shutdown = 108,
}

/// How requests and replies of a connection are framed; negotiated, only ever upwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Framing {
    /// Simple replies only.
    Simple,
    /// Structured replies.
    Structured,
    /// Structured replies with 64-bit lengths in both directions.
    Extended,
}

impl Framing {
    /// Bytes of a request's header.
    pub const fn request_bytes(self) -> usize {
        match self {
            Framing::Simple | Framing::Structured => 28,
            Framing::Extended => 32,
        }
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// [`command_flag`]s.
    pub flags: u16,
    /// [`command`].
    pub command: u16,
    /// Returned with the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes that follow the header.
    pub payload_length: u64,
}

/// The stream cannot be understood any more; the connection must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A message that opens with the wrong number.
    #[error("{what} opens with {found:#x}")]
    Magic {
        /// Which message was expected.
        what: &'static str,
        /// What stood there.
        found: u64,
    },
    /// Client flags the server never offered.
    #[error("the client sets unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// An option longer than anything the protocol needs.
    #[error("option {option} announces {length} bytes")]
    OptionLength {
        /// Which option.
        option: u32,
        /// Its announced length.
        length: u32,
    },
    /// More payload than the protocol allows.
    #[error("a request announces {0} bytes of payload")]
    PayloadLength(u64),
    /// `EXPORT_NAME` for an export that is not there; the protocol has no other answer.
    #[error("no such export")]
    UnknownExport,
    /// `EXPORT_NAME` for an export that takes no more connections; the protocol has no other answer.
    #[error("refused: {0}")]
    Refused(String),
}

/// Reads a big-endian `u16` at `at`. The caller has checked the length.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Reads a big-endian `u32` at `at`. The caller has checked the length.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(four)
}

/// Reads a big-endian `u64` at `at`. The caller has checked the length.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(eight)
}

/// Reads a request's header from the front of `bytes`; `None` if not all of it is there.
///
/// # Errors
/// [`Malformed`] if it does not open with the request magic.
pub fn parse_request(framing: Framing, bytes: &[u8]) -> Result<Option<Request>, Malformed> {
    if bytes.len() < framing.request_bytes() {
        return Ok(None);
    }
    let extended = framing == Framing::Extended;
    let magic = be32(bytes, 0);
    let expected = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    if magic != expected {
        return Err(Malformed::Magic {
            what: "a request",
            found: magic.into(),
        });
    }
    let flags = be16(bytes, 4);
    let command = be16(bytes, 6);
    let length = if extended {
        be64(bytes, 24)
    } else {
        be32(bytes, 24).into()
    };
    let has_payload = if extended {
        flags & command_flag::PAYLOAD_LEN != 0
    } else {
        command == command::WRITE
    };
    Ok(Some(Request {
        flags,
        command,
        cookie: be64(bytes, 8),
        offset: be64(bytes, 16),
        length,
        payload_length: if has_payload { length } else { 0 },
    }))
}

/// Writes a compact request's header; the client side of [`parse_request`].
pub fn request_header(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut out = [0; 28];
    out[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&command.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..28].copy_from_slice(&length.to_be_bytes());
    out
}

/// A reply's header, with the fixed part of its payload, of at most 44 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    bytes: [u8; Self::BYTES_MAX],
    length: u8,
}

impl Head {
    /// Longest header: an extended chunk's 32 bytes, and the offset and length of a hole.
    pub const BYTES_MAX: usize = 44;

    fn new() -> Self {
        Self {
            bytes: [0; Self::BYTES_MAX],
            length: 0,
        }
    }

    fn put(mut self, part: &[u8]) -> Self {
        let at = usize::from(self.length);
        self.bytes[at..at + part.len()].copy_from_slice(part);
        self.length += part.len() as u8;
        self
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// A simple reply; `error` 0 is success, and a read's data follows.
pub fn simple_reply(error: u32, cookie: u64) -> Head {
    Head::new()
        .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
        .put(&error.to_be_bytes())
        .put(&cookie.to_be_bytes())
}

/// A chunk's header for `length` bytes of chunk payload. `offset` is the request's, and only extended headers send it.
///
/// # Panics
/// If the framing has no chunks, or `length` does not fit the framing.
pub fn chunk_header(framing: Framing, done: bool, kind: u16, cookie: u64, offset: u64, length: u64) -> Head {
    let flags = if done { chunk::FLAG_DONE } else { 0 };
    match framing {
        Framing::Simple => panic!("a chunk on a connection without structured replies"),
        Framing::Structured => {
            let length = u32::try_from(length).expect("chunks are bounded by the payload limit");
            Head::new()
                .put(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
                .put(&flags.to_be_bytes())
                .put(&kind.to_be_bytes())
                .put(&cookie.to_be_bytes())
                .put(&length.to_be_bytes())
        }
        Framing::Extended => Head::new()
            .put(&EXTENDED_REPLY_MAGIC.to_be_bytes())
            .put(&flags.to_be_bytes())
            .put(&kind.to_be_bytes())
            .put(&cookie.to_be_bytes())
            .put(&offset.to_be_bytes())
            .put(&length.to_be_bytes()),
    }
}

/// What stands before the data of a read that is answered in one piece.
pub fn read_header(framing: Framing, cookie: u64, offset: u64, length: u64) -> Head {
    if framing == Framing::Simple {
        simple_reply(0, cookie)
    } else {
        data_header(framing, true, cookie, offset, offset, length)
    }
}

/// What stands before `length` bytes of data at `at`, a piece of the read of `offset`.
pub fn data_header(framing: Framing, done: bool, cookie: u64, offset: u64, at: u64, length: u64) -> Head {
    chunk_header(framing, done, chunk::OFFSET_DATA, cookie, offset, length + 8).put(&at.to_be_bytes())
}

/// A whole chunk that says that `length` bytes at `at` read as zero.
pub fn hole_chunk(framing: Framing, done: bool, cookie: u64, offset: u64, at: u64, length: u32) -> Head {
    chunk_header(framing, done, chunk::OFFSET_HOLE, cookie, offset, 12)
        .put(&at.to_be_bytes())
        .put(&length.to_be_bytes())
}

/// Appends an option's reply to `out`.
pub fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends an option to `out`; the client's side.
pub fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_reads_back() {
        let bytes = request_header(command::WRITE, command_flag::FUA, 7, 4096, 512);
        let request = parse_request(Framing::Simple, &bytes).unwrap().unwrap();
        assert_eq!(
            request,
            Request {
                flags: command_flag::FUA,
                command: command::WRITE,
                cookie: 7,
                offset: 4096,
                length: 512,
                payload_length: 512
            }
        );
        for short in 0..bytes.len() {
            assert_eq!(parse_request(Framing::Simple, &bytes[..short]), Ok(None));
        }
        assert!(parse_request(Framing::Extended, &[bytes.as_slice(), &[0; 4]].concat()).is_err());
    }

    #[test]
    fn headers_have_their_documented_lengths() {
        for (framing, data, hole) in [(Framing::Structured, 28, 32), (Framing::Extended, 40, 44)] {
            assert_eq!(read_header(framing, 1, 2, 3).as_bytes().len(), data);
            let chunk = hole_chunk(framing, true, 1, 2, 2, 3);
            assert_eq!(chunk.as_bytes().len(), hole);
            assert_eq!(be32(chunk.as_bytes(), hole - 4), 3);
        }
        assert_eq!(read_header(Framing::Simple, 1, 2, 3).as_bytes().len(), 16);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
                let _ = parse_request(framing, &bytes);
            }
        }
    }
}
