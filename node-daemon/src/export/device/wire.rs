//! The part of the FUSE wire protocol that a file system with a single regular file needs.
//!
//! Layouts and numbers follow the kernel's `include/uapi/linux/fuse.h` (protocol 7.31 and later). Everything is read
//! and written field by field in the machine's byte order, so nothing here is `unsafe`, and no I/O happens here.

use std::fmt;

/// Bytes of the header before every request.
pub const IN_HEADER_BYTES: usize = 40;
/// Bytes of the header before every answer.
pub const OUT_HEADER_BYTES: usize = 16;
/// Bytes of what stands between the request header and a write's data.
pub const WRITE_IN_BYTES: usize = 40;
/// The root, which here is the image's file itself.
pub const ROOT_NODE: u64 = 1;

/// The protocol that this daemon speaks; the kernel lowers it to its own if that is older.
pub const MAJOR: u32 = 7;
/// Minor part of [`MAJOR`]: the one that brought `FUSE_HAS_RESEND`.
pub const MINOR: u32 = 40;

/// Request codes.
pub mod op {
    #![allow(missing_docs)]
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const ACCESS: u32 = 34;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
}

/// Capabilities of the kernel and of this daemon, as one 64-bit set (`flags` and `flags2` of INIT).
pub mod cap {
    #![allow(missing_docs)]
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_RESEND: u64 = 1 << 39;
}

/// Reads and writes bypass the page cache.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// Direct writes to one file may run beside each other.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
/// The notification that makes the kernel queue again every request that was read and not answered (Linux 6.9).
pub const NOTIFY_RESEND: i32 = 7;
/// SETATTR asks for another size.
pub const FATTR_SIZE: u32 = 1 << 3;

/// A request that is shorter than its kind demands: kernel and daemon do not speak the same protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel sent a FUSE request of {have} bytes where {need} were expected")]
pub struct Short {
    /// Bytes that arrived.
    pub have: usize,
    /// Bytes that were needed.
    pub need: usize,
}

fn bytes<const N: usize>(buf: &[u8], at: usize) -> Result<[u8; N], Short> {
    buf.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or(Short {
        have: buf.len(),
        need: at + N,
    })
}

fn u32_at(buf: &[u8], at: usize) -> Result<u32, Short> {
    bytes(buf, at).map(u32::from_ne_bytes)
}

fn u64_at(buf: &[u8], at: usize) -> Result<u64, Short> {
    bytes(buf, at).map(u64::from_ne_bytes)
}

/// The header of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// What is asked, see [`op`].
    pub opcode: u32,
    /// Identifies the request in the answer; resent ones have the top bit set.
    pub unique: u64,
}

impl fmt::Debug for InHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FUSE request {} #{:#x}", self.opcode, self.unique)
    }
}

impl InHeader {
    /// Reads the header of `request`, which is everything that one `read` returned.
    ///
    /// # Errors
    /// [`Short`] if it is cut or its own length says otherwise.
    pub fn parse(request: &[u8]) -> Result<Self, Short> {
        let need = u32_at(request, 0)? as usize;
        if need != request.len() || need < IN_HEADER_BYTES {
            return Err(Short {
                have: request.len(),
                need,
            });
        }
        Ok(Self {
            opcode: u32_at(request, 4)?,
            unique: u64_at(request, 8)?,
        })
    }
}

/// What the kernel offers in INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// Major version; 7 for every kernel this runs on.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
    /// Bytes the kernel would read ahead.
    pub max_readahead: u32,
    /// What it can do, see [`cap`].
    pub caps: u64,
}

impl InitIn {
    /// Reads the body of an INIT.
    ///
    /// # Errors
    /// [`Short`].
    pub fn parse(body: &[u8]) -> Result<Self, Short> {
        let low = u64::from(u32_at(body, 12)?);
        let high = if low & cap::INIT_EXT != 0 {
            u64::from(u32_at(body, 16)?)
        } else {
            0
        };
        Ok(Self {
            major: u32_at(body, 0)?,
            minor: u32_at(body, 4)?,
            max_readahead: u32_at(body, 8)?,
            caps: low | high << 32,
        })
    }
}

/// Body of READ, or the first part of the body of WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Range {
    /// Reads the body of a READ or WRITE.
    ///
    /// # Errors
    /// [`Short`].
    pub fn parse(body: &[u8]) -> Result<Self, Short> {
        Ok(Self {
            offset: u64_at(body, 8)?,
            length: u32_at(body, 16)?,
        })
    }
}

/// Body of FALLOCATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fallocate {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// `FALLOC_FL_*`.
    pub mode: u32,
}

impl Fallocate {
    /// Reads the body of a FALLOCATE.
    ///
    /// # Errors
    /// [`Short`].
    pub fn parse(body: &[u8]) -> Result<Self, Short> {
        Ok(Self {
            offset: u64_at(body, 8)?,
            length: u64_at(body, 16)?,
            mode: u32_at(body, 24)?,
        })
    }
}

/// Reads which attributes a SETATTR wants to change (`FATTR_*`).
///
/// # Errors
/// [`Short`].
pub fn setattr_valid(body: &[u8]) -> Result<u32, Short> {
    u32_at(body, 0)
}

/// An answer's body of fixed size, filled front to back.
struct Out<const N: usize> {
    buf: [u8; N],
    at: usize,
}

impl<const N: usize> Out<N> {
    fn new() -> Self {
        Self { buf: [0; N], at: 0 }
    }

    fn put(mut self, field: &[u8]) -> Self {
        self.buf[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    fn u16(self, v: u16) -> Self {
        self.put(&v.to_ne_bytes())
    }

    fn u32(self, v: u32) -> Self {
        self.put(&v.to_ne_bytes())
    }

    fn u64(self, v: u64) -> Self {
        self.put(&v.to_ne_bytes())
    }
}

/// The header of an answer with `body_bytes` after it; `errno` 0 for success, else positive.
pub fn out_header(unique: u64, errno: i32, body_bytes: usize) -> [u8; OUT_HEADER_BYTES] {
    let length = u32::try_from(OUT_HEADER_BYTES + body_bytes).expect("an answer is at most a mebibyte");
    Out::new().u32(length).u32((-errno).cast_unsigned()).u64(unique).buf
}

/// A notification without a body. The kernel tells it from an answer by `unique` 0 and a positive code.
pub fn notification(code: i32) -> [u8; OUT_HEADER_BYTES] {
    Out::new().u32(16).u32(code.cast_unsigned()).u64(0).buf
}

/// What the daemon agrees to in INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitOut {
    /// Minor version in use.
    pub minor: u32,
    /// Accepted capabilities, a subset of the offer.
    pub caps: u64,
    /// Asynchronous requests in flight before the kernel holds further ones back.
    pub max_background: u16,
    /// In flight before it calls the file system congested.
    pub congestion_threshold: u16,
    /// Bytes in one WRITE.
    pub max_write_bytes: u32,
    /// Pages in one request.
    pub max_pages: u16,
    /// Bytes of read-ahead, echoed.
    pub max_readahead: u32,
}

impl InitOut {
    /// The body of the answer to INIT.
    pub fn encode(&self) -> [u8; 64] {
        let low = (self.caps & u64::from(u32::MAX)) as u32;
        let high = (self.caps >> 32) as u32;
        Out::new()
            .u32(MAJOR)
            .u32(self.minor)
            .u32(self.max_readahead)
            .u32(low)
            .u16(self.max_background)
            .u16(self.congestion_threshold)
            .u32(self.max_write_bytes)
            .u32(1) // time granularity, ns
            .u16(self.max_pages)
            .u16(0)
            .u32(high)
            .buf
    }
}

/// The body of the answer to GETATTR and SETATTR: a regular file of `size_bytes`, for its owner only, that the kernel
/// may remember for as long as it likes, because neither size nor mode ever changes while it is mounted.
pub fn attributes(size_bytes: u64, read_only: bool) -> [u8; 104] {
    const S_IFREG: u32 = 0o100_000;
    let mode = S_IFREG | if read_only { 0o400 } else { 0o600 };
    Out::new()
        .u64(1 << 40) // valid, seconds
        .u32(0)
        .u32(0)
        .u64(ROOT_NODE)
        .u64(size_bytes)
        .u64(size_bytes.div_ceil(512))
        .u64(0)
        .u64(0)
        .u64(0)
        .u32(0)
        .u32(0)
        .u32(0)
        .u32(mode)
        .u32(1)
        .u32(0)
        .u32(0)
        .u32(0)
        .u32(4096)
        .u32(0)
        .buf
}

/// The body of the answer to OPEN.
pub fn opened(flags: u32) -> [u8; 16] {
    Out::new().u64(0).u32(flags).u32(0).buf
}

/// The body of the answer to WRITE.
pub fn written(length: u32) -> [u8; 8] {
    Out::new().u32(length).u32(0).buf
}

/// The body of the answer to STATFS. The block size becomes the loop device's discard granularity.
pub fn file_system(size_bytes: u64, block_bytes: u32) -> [u8; 80] {
    let blocks = size_bytes / u64::from(block_bytes);
    Out::new()
        .u64(blocks)
        .u64(0)
        .u64(0)
        .u64(1)
        .u64(0)
        .u32(block_bytes)
        .u32(255)
        .u32(block_bytes)
        .u32(0)
        .buf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_the_kernel_lays_it_out() {
        let mut read = Vec::new();
        read.extend(80u32.to_ne_bytes());
        read.extend(op::READ.to_ne_bytes());
        read.extend(0x8000_0000_0000_0042u64.to_ne_bytes());
        read.extend([0; 24]);
        read.extend(7u64.to_ne_bytes()); // file handle
        read.extend(0x1234_5000u64.to_ne_bytes());
        read.extend(8192u32.to_ne_bytes());
        read.extend([0; 20]);
        assert_eq!(read.len(), 80);
        let header = InHeader::parse(&read).unwrap();
        assert_eq!((header.opcode, header.unique), (op::READ, 0x8000_0000_0000_0042));
        assert_eq!(
            Range::parse(&read[IN_HEADER_BYTES..]).unwrap(),
            Range {
                offset: 0x1234_5000,
                length: 8192
            }
        );
    }

    #[test]
    fn cut_requests_are_refused() {
        let mut request = vec![0; 60];
        request[..4].copy_from_slice(&60u32.to_ne_bytes());
        assert!(InHeader::parse(&request).is_ok());
        for cut in 0..60 {
            assert!(InHeader::parse(&request[..cut]).is_err(), "{cut}");
        }
        assert!(Range::parse(&request[IN_HEADER_BYTES..]).is_ok());
        assert!(Fallocate::parse(&request[IN_HEADER_BYTES..]).is_err());
        assert!(InitIn::parse(&[]).is_err());
    }

    #[test]
    fn the_upper_capabilities_need_the_extension_bit() {
        let mut body = vec![0; 64];
        body[..4].copy_from_slice(&7u32.to_ne_bytes());
        body[16..20].copy_from_slice(&(1u32 << 7).to_ne_bytes());
        assert_eq!(InitIn::parse(&body).unwrap().caps, 0);
        body[12..16].copy_from_slice(&(1u32 << 30).to_ne_bytes());
        assert_ne!(InitIn::parse(&body).unwrap().caps & cap::HAS_RESEND, 0);
    }

    #[test]
    fn answers_carry_the_negated_errno_and_their_whole_length() {
        let ok = out_header(9, 0, 8);
        assert_eq!(u32_at(&ok, 0).unwrap(), 24);
        assert_eq!(u64_at(&ok, 8).unwrap(), 9);
        let failed = out_header(9, libc::EIO, 0);
        assert_eq!(i32::from_ne_bytes(failed[4..8].try_into().unwrap()), -libc::EIO);
        assert_eq!(
            i32::from_ne_bytes(notification(NOTIFY_RESEND)[4..8].try_into().unwrap()),
            7
        );
    }
}
