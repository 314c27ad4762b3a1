//! One blocking NBD connection to a peer, for reading. Every wait has an end, every length is checked.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::PeerError;
use super::address::PeerAddress;
use super::links::Hello;
use crate::export::nbd::proto::{
    self, Errno, PAYLOAD_BYTES_MAX, be16, be32, be64, command, handshake_flag, info, option, option_reply,
};

/// Longest answer to an option that is read.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// Answers to one option that are read.
const OPTION_REPLIES_MAX: u32 = 64;

trait Socket: Read + Write + Send {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()>;
}

impl Socket for UnixStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

impl Socket for TcpStream {
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

/// A connection in transmission.
pub struct Session {
    socket: Box<dyn Socket>,
    /// Size of the export in bytes.
    size: u64,
    payload_max: usize,
    cookie: u64,
    timeout: Duration,
    deadline: Instant,
}

pub(super) fn broken(what: &str, source: io::Error) -> PeerError {
    // A timeout on a blocking socket shows as "would block".
    let source = match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => io::Error::new(io::ErrorKind::TimedOut, "no answer"),
        _ => source,
    };
    PeerError::Broken {
        what: what.to_owned(),
        source,
    }
}

pub(super) fn protocol(what: impl Into<String>) -> PeerError {
    PeerError::Protocol(what.into())
}

impl Session {
    /// Connects, and chooses `export`. `timeout` bounds this, and each request later.
    ///
    /// # Errors
    /// [`PeerError::Refused`] if the peer does not serve the export; else what went wrong with the connection.
    pub fn open(address: &PeerAddress, export: &str, timeout: Duration) -> Result<Self, PeerError> {
        let connected: io::Result<Box<dyn Socket>> = match address {
            PeerAddress::Unix(path) => UnixStream::connect(path).map(|socket| Box::new(socket) as Box<dyn Socket>),
            PeerAddress::Tcp(address) => TcpStream::connect_timeout(address, timeout).and_then(|socket| {
                socket.set_nodelay(true)?;
                Ok(Box::new(socket) as Box<dyn Socket>)
            }),
        };
        let socket = connected.map_err(|error| broken("connect", error))?;
        socket
            .set_timeout(timeout)
            .map_err(|error| broken("set a timeout", error))?;
        let deadline = Instant::now() + timeout;
        let payload_max = PAYLOAD_BYTES_MAX as usize;
        let mut session = Self {
            socket,
            size: 0,
            payload_max,
            cookie: 0,
            timeout,
            deadline,
        };
        session.shake_hands(export)?;
        Ok(session)
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn receive(&mut self, mut buf: &mut [u8]) -> Result<(), PeerError> {
        while !buf.is_empty() {
            if Instant::now() >= self.deadline {
                return Err(broken("receive", io::ErrorKind::TimedOut.into()));
            }
            match self.socket.read(buf) {
                Ok(0) => return Err(broken("receive", io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => buf = &mut buf[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken("receive", error)),
            }
        }
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), PeerError> {
        self.socket.write_all(bytes).map_err(|error| broken("send", error))
    }

    fn shake_hands(&mut self, export: &str) -> Result<(), PeerError> {
        let mut greeting = [0; 18];
        self.receive(&mut greeting)?;
        if be64(&greeting, 0) != proto::INIT_MAGIC || be64(&greeting, 8) != proto::OPTION_MAGIC {
            return Err(protocol("the greeting is not NBD's"));
        }
        let offered = be16(&greeting, 16);
        if offered & handshake_flag::FIXED_NEWSTYLE == 0 {
            return Err(protocol("the server is older than fixed newstyle"));
        }
        let flags = offered & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let mut out = u32::from(flags).to_be_bytes().to_vec();
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        proto::put_option(&mut out, option::GO, &data);
        self.send(&out)?;
        let mut known = false;
        for _ in 0..OPTION_REPLIES_MAX {
            let (kind, data) = self.option_reply(option::GO)?;
            match kind {
                option_reply::ACK if known => return Ok(()),
                option_reply::ACK => return Err(protocol("the export's size is missing")),
                option_reply::INFO if data.len() == 12 && be16(&data, 0) == info::EXPORT => {
                    self.size = be64(&data, 2);
                    known = true;
                }
                option_reply::INFO if data.len() == 14 && be16(&data, 0) == info::BLOCK_SIZE => {
                    self.payload_max = self.payload_max.min(be32(&data, 10) as usize).max(512);
                }
                option_reply::INFO => {}
                kind => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    return Err(PeerError::Refused {
                        what: format!("serve {export}"),
                        errno: kind,
                        text,
                    });
                }
            }
        }
        Err(protocol("endless answers to one option"))
    }

    fn option_reply(&mut self, option: u32) -> Result<(u32, Vec<u8>), PeerError> {
        let mut head = [0; 20];
        self.receive(&mut head)?;
        if be64(&head, 0) != proto::OPTION_REPLY_MAGIC || be32(&head, 8) != option {
            return Err(protocol("an answer to another option"));
        }
        let length = be32(&head, 16);
        if length > OPTION_REPLY_BYTES_MAX {
            return Err(protocol(format!("an option's answer of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        self.receive(&mut data)?;
        Ok((be32(&head, 12), data))
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`PeerError::Refused`] leaves the session usable; after any other error it must be dropped.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), PeerError> {
        let mut at = offset;
        for part in buf.chunks_mut(self.payload_max) {
            self.deadline = Instant::now() + self.timeout;
            self.cookie += 1;
            // At most the payload limit, which fits.
            let request = proto::request_header(command::READ, 0, self.cookie, at, part.len() as u32);
            self.send(&request)?;
            let mut head = [0; 16];
            self.receive(&mut head)?;
            if be32(&head, 0) != proto::SIMPLE_REPLY_MAGIC || be64(&head, 8) != self.cookie {
                return Err(protocol("an answer to another request"));
            }
            let errno = be32(&head, 4);
            if errno == Errno::Shutdown as u32 {
                return Err(broken("read", io::Error::other("the peer is shutting down")));
            }
            if errno != 0 {
                let what = format!("read {} bytes at {at}", part.len());
                return Err(PeerError::Refused {
                    what,
                    errno,
                    text: String::new(),
                });
            }
            self.receive(part)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

/// Connects as a node that is none of NBD's clients: what follows on the socket is [`super::frame`]s.
///
/// # Errors
/// [`PeerError::Refused`] with the peer's words; else what went wrong.
pub(super) fn shake_hands_as_peer(socket: &mut (impl Read + Write), hello: &Hello) -> Result<(), PeerError> {
    let mut greeting = [0; 18];
    let receiving = |error| broken("receive", error);
    socket.read_exact(&mut greeting).map_err(receiving)?;
    if be64(&greeting, 0) != proto::INIT_MAGIC || be64(&greeting, 8) != proto::OPTION_MAGIC {
        return Err(protocol("the greeting is not NBD's"));
    }
    let flags = be16(&greeting, 16) & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    let mut out = u32::from(flags).to_be_bytes().to_vec();
    let data = serde_json::to_vec(hello).map_err(|error| protocol(error.to_string()))?;
    proto::put_option(&mut out, option::PEER, &data);
    socket.write_all(&out).map_err(|error| broken("send", error))?;
    let mut head = [0; 20];
    socket.read_exact(&mut head).map_err(receiving)?;
    let (kind, length) = (be32(&head, 12), be32(&head, 16));
    if be64(&head, 0) != proto::OPTION_REPLY_MAGIC || be32(&head, 8) != option::PEER || length > OPTION_REPLY_BYTES_MAX
    {
        return Err(protocol("an answer to another option"));
    }
    let mut data = vec![0; length as usize];
    socket.read_exact(&mut data).map_err(receiving)?;
    if kind != option_reply::ACK {
        return Err(PeerError::Refused {
            what: "speak as one node to another".into(),
            errno: kind,
            text: String::from_utf8_lossy(&data).into_owned(),
        });
    }
    let answer: Hello = serde_json::from_slice(&data).map_err(|error| protocol(error.to_string()))?;
    if Some(&answer.node) != hello.to.as_ref() {
        return Err(protocol(format!("node {} answers at that address", answer.node)));
    }
    Ok(())
}

impl Drop for Session {
    fn drop(&mut self) {
        // Good manners only: a peer notices the hang-up too.
        let _ = self.socket.write(&proto::request_header(command::DISC, 0, 0, 0, 0));
    }
}
