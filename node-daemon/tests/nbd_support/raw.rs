//! A client that sends whatever bytes a test wants.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hearth_node::export::nbd::proto::{self, Errno, be32, be64, option, option_reply};

/// Time after which a test gives up waiting for the server.
const PATIENCE: Duration = Duration::from_secs(20);

/// A socket and nothing more.
pub struct Raw {
    pub socket: UnixStream,
}

impl Raw {
    /// Connects and reads the greeting.
    pub fn greeted(path: &Path) -> Self {
        let socket = UnixStream::connect(path).expect("the server listens");
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Self { socket };
        let greeting = raw.receive(18).expect("a greeting");
        assert_eq!(be64(&greeting, 0), proto::INIT_MAGIC);
        raw
    }

    /// Connects and enters transmission with simple replies.
    pub fn transmitting(path: &Path, export: &str) -> Self {
        let mut raw = Self::greeted(path);
        raw.send(&3_u32.to_be_bytes());
        raw.go(export);
        raw
    }

    /// Connects and enters transmission after each of `options` was accepted.
    pub fn negotiated(path: &Path, export: &str, options: &[(u32, Vec<u8>)]) -> Self {
        let mut raw = Self::greeted(path);
        raw.send(&3_u32.to_be_bytes());
        for (option, data) in options {
            raw.option(*option, data);
            raw.option_replies();
        }
        raw.go(export);
        raw
    }

    fn go(&mut self, export: &str) {
        let data = [&(export.len() as u32).to_be_bytes(), export.as_bytes(), &[0, 0]].concat();
        self.option(option::GO, &data);
        let replies = self.option_replies();
        assert_eq!(replies.last(), Some(&option_reply::ACK), "{replies:x?}");
    }

    /// Sends one option.
    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = Vec::new();
        proto::put_option(&mut out, option, data);
        self.send(&out);
    }

    /// The kinds of all replies to an option.
    pub fn option_replies(&mut self) -> Vec<u32> {
        let mut kinds = Vec::new();
        loop {
            let head = self.receive(20).expect("an option's reply");
            self.receive(be32(&head, 16) as usize).expect("its data");
            let kind = be32(&head, 12);
            kinds.push(kind);
            if kind == option_reply::ACK || kind >> 31 == 1 {
                return kinds;
            }
        }
    }

    /// Sends bytes; a server that hung up is fine.
    pub fn send(&mut self, bytes: &[u8]) {
        if let Err(error) = self.socket.write_all(bytes) {
            assert!(
                matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset),
                "{error}"
            );
        }
    }

    /// Sends one compact request.
    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.send(&proto::request_header(command, flags, cookie, offset, length));
    }

    /// Receives exactly `length` bytes, or `None` if the server hung up.
    pub fn receive(&mut self, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        match self.socket.read_exact(&mut bytes) {
            Ok(()) => Some(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the server neither answers nor hangs up: {error}"),
        }
    }

    /// A simple reply without data: its cookie and error.
    pub fn simple_reply(&mut self) -> (u64, u32) {
        let head = self.receive(16).expect("a reply");
        assert_eq!(be32(&head, 0), proto::SIMPLE_REPLY_MAGIC);
        (be64(&head, 8), be32(&head, 4))
    }

    /// Expects a refusal.
    pub fn refused(&mut self, cookie: u64, errno: Errno) {
        assert_eq!(self.simple_reply(), (cookie, errno as u32));
    }

    /// Waits until the server hangs up, throwing away what it still sends.
    pub fn hung_up(&mut self) {
        while self.receive(1).is_some() {}
    }
}
