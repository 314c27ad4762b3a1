//! An NBD client of the plainest kind: one connection over a unix socket, one request at a time. It tells an error that
//! the server answered from a server that is gone, which stock clients do not, and it can stop waiting.
//!
//! Source: `doc/proto.md` of the NetworkBlockDevice project: fixed newstyle, `GO`, simple replies.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_IS_ERROR: u32 = 1 << 31;
/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: u32 = 3;
const FLAG_FUA: u16 = 1;

/// How often somebody who waits for an answer looks whether to go on waiting.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The protocol's number of "no space left".
pub const ENOSPC: u32 = 28;

/// Why there is no result.
#[derive(Debug)]
pub enum NoResult {
    /// The server answered with this error number.
    Refused(u32),
    /// The connection ended, or was never made.
    Gone(io::Error),
    /// The caller did not want to wait any longer.
    Left,
}

impl From<io::Error> for NoResult {
    fn from(error: io::Error) -> Self {
        NoResult::Gone(error)
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    cookie: u64,
}

impl Connection {
    /// Opens an export; waits while `waits` says so.
    ///
    /// # Errors
    /// [`NoResult`]; an export that is not there is `Gone`.
    pub fn open(socket: &Path, export: &str, waits: &dyn Fn() -> bool) -> Result<Self, NoResult> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(LOOK_EVERY))?;
        let mut connection = Self { stream, cookie: 0 };
        let mut greeting = [0; 18];
        connection.read(&mut greeting, waits)?;
        let mut hello = Vec::new();
        hello.extend(CLIENT_FLAGS.to_be_bytes());
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPTION_GO.to_be_bytes());
        let name = u32::try_from(export.len()).expect("a short name");
        hello.extend((4 + name + 2).to_be_bytes());
        hello.extend(name.to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0u16.to_be_bytes());
        connection.stream.write_all(&hello)?;
        loop {
            let mut head = [0; 20];
            connection.read(&mut head, waits)?;
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
            let (kind, length) = (number(12), number(16));
            let mut data = vec![0; length as usize];
            connection.read(&mut data, waits)?;
            if kind == REPLY_ACK {
                return Ok(connection);
            }
            if kind & REPLY_IS_ERROR != 0 {
                let why = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::new(io::ErrorKind::NotFound, why).into());
            }
        }
    }

    /// Reads.
    ///
    /// # Errors
    /// [`NoResult`].
    pub fn read_at(&mut self, offset: u64, into: &mut [u8], waits: &dyn Fn() -> bool) -> Result<(), NoResult> {
        self.ask(0, 0, offset, into.len(), &[])?;
        self.answered(waits)?;
        self.read(into, waits)
    }

    /// Writes; with `fua` durably.
    ///
    /// # Errors
    /// [`NoResult`]; whether it was done is then not known.
    pub fn write_at(&mut self, offset: u64, data: &[u8], fua: bool, waits: &dyn Fn() -> bool) -> Result<(), NoResult> {
        let flags = if fua { FLAG_FUA } else { 0 };
        self.ask(1, flags, offset, data.len(), data)?;
        self.answered(waits)
    }

    /// Makes durable what was acknowledged.
    ///
    /// # Errors
    /// [`NoResult`].
    pub fn flush(&mut self, waits: &dyn Fn() -> bool) -> Result<(), NoResult> {
        self.ask(3, 0, 0, 0, &[])?;
        self.answered(waits)
    }

    fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: usize, data: &[u8]) -> Result<(), NoResult> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(flags.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(length).expect("a short request").to_be_bytes());
        request.extend(data);
        Ok(self.stream.write_all(&request)?)
    }

    fn answered(&mut self, waits: &dyn Fn() -> bool) -> Result<(), NoResult> {
        let mut head = [0; 16];
        self.read(&mut head, waits)?;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let cookie = u64::from_be_bytes(head[8..].try_into().expect("eight bytes"));
        if number(0) != REPLY_MAGIC || cookie != self.cookie {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "that is no answer to the request").into());
        }
        match number(4) {
            0 => Ok(()),
            error => Err(NoResult::Refused(error)),
        }
    }

    fn read(&mut self, into: &mut [u8], waits: &dyn Fn() -> bool) -> Result<(), NoResult> {
        let mut done = 0;
        while done < into.len() {
            match self.stream.read(&mut into[done..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => done += count,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if !waits() {
                        return Err(NoResult::Left);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
