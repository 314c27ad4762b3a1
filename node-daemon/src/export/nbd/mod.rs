//! The NBD server: every served image as a disk for QEMU, libnbd, `nbdcopy` and other nodes.
//!
//! | file | what it is |
//! |---|---|
//! | [`name`] | the grammar of export names |
//! | [`proto`] | numbers and messages of the protocol, pure functions on bytes |
//! | [`handshake`] | options until an export is chosen, without I/O |
//! | [`job`] | what a request may do, and doing it |
//! | [`workers`] | threads that wait for disks, divided fairly |
//! | [`buffer`], [`limits`] | memory, and every bound on what a client can make the daemon spend |
//! | [`output`], [`connection`], [`stream`], [`server`] | sockets and the tasks that serve them |
//! | [`memory`] | a disk in memory for measurements and tests |
//!
//! Fixed newstyle only. TLS is not served, so nothing but unix sockets and loopback addresses is.
//! `CAN_MULTI_CONN` is announced because it is true: all connections use one [`Disk`], and its flush covers every
//! write that returned, whichever connection it came by.

pub mod buffer;
pub mod connection;
pub mod handshake;
pub mod job;
pub mod limits;
pub mod memory;
pub mod name;
pub mod output;
mod pace;
pub mod proto;
mod ring;
pub mod server;
pub mod stream;
pub mod workers;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use hearth_probes::export::ExportCounter;

pub use limits::NbdLimits;
pub use name::ExportName;
pub use server::{ConnectionInfo, NbdHandle, NbdServer};
pub use stream::{Listener, listener_from_env};

use crate::disk::Disk;

/// Permissions of the unix socket: whoever may open it may read and write every image.
pub const SOCKET_MODE: u32 = 0o660;

/// One served disk.
#[derive(Clone)]
pub struct ExportEntry {
    /// What is behind it.
    pub disk: Arc<dyn Disk>,
    /// Counts its requests as heat.
    pub counter: Option<Arc<ExportCounter>>,
    /// Text for people; may be empty.
    pub description: String,
    /// Serves it read-only although the disk takes writes.
    pub read_only: bool,
}

impl ExportEntry {
    /// Serves `disk` as it is, uncounted.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self {
            disk,
            counter: None,
            description: String::new(),
            read_only: false,
        }
    }

    /// The same, counted.
    pub fn counted(mut self, counter: Arc<ExportCounter>) -> Self {
        self.counter = Some(counter);
        self
    }

    /// The same, with a description.
    pub fn described(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// The same, read-only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Whether writes are refused, by the entry or by the disk.
    pub fn is_read_only(&self) -> bool {
        self.read_only || self.disk.is_read_only()
    }

    /// The preferred request size, a power of two that the protocol accepts.
    fn preferred_bytes(&self) -> u32 {
        let block = self
            .disk
            .block_size_bytes()
            .clamp(4_096, proto::PAYLOAD_BYTES_MAX.into());
        1 << block.ilog2()
    }
}

/// What a server serves. Both calls are quick: a connection waits for them in its handshake.
pub trait ExportTable: Send + Sync {
    /// The export that a client asks for; [`ExportName`] reads the name. The empty name asks for a default.
    fn find(&self, name: &str) -> Option<ExportEntry>;

    /// Asked when a client is about to use the export that it found.
    ///
    /// # Errors
    /// Why it may not, as the client is told.
    fn admit(&self, _name: &str, _entry: &ExportEntry) -> Result<(), String> {
        Ok(())
    }

    /// Names of the exports shown to clients that ask for a list: the first `max` of those that sort after `after`,
    /// ascending. A client gets them page by page, so that a long list takes no memory while it is sent.
    fn list(&self, after: &str, max: usize) -> Vec<String>;

    /// Who takes connections of other nodes.
    fn peers(&self) -> Option<&dyn PeerDoor> {
        None
    }
}

/// Takes connections on which another node goes on in words of its own after the handshake.
pub trait PeerDoor {
    /// Judges what a node says of itself, and answers.
    ///
    /// # Errors
    /// Why it is not let in, as it is told.
    fn greet(&self, hello: &[u8]) -> Result<Vec<u8>, String>;

    /// Takes the connection of a node that was let in; `early` came behind its handshake.
    fn enter(&self, hello: &[u8], socket: stream::Accepted, early: Vec<u8>);
}

/// One page of an export list, for tables whose names are in no order.
pub fn page(names: impl Iterator<Item = String>, after: &str, max: usize) -> Vec<String> {
    let mut names: Vec<_> = names.filter(|name| name.as_str() > after).collect();
    names.sort_unstable();
    names.truncate(max);
    names
}

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Another process serves there.
    #[error("{} is served by another process: stop that daemon, or choose another socket", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has the name.
    #[error("{} exists and is no socket: remove it, or choose another path", path.display())]
    NotSocket {
        /// The path.
        path: PathBuf,
    },
    /// A listener cannot be made.
    #[error(
        "cannot {what} the NBD socket {place}: {source}; check that the directory exists and the path is under 100 bytes"
    )]
    Listen {
        /// What was attempted.
        what: &'static str,
        /// Where.
        place: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// An address that others reach.
    #[error("{address} is no loopback address, and NBD is served without TLS: use a unix socket or 127.0.0.1")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// An inherited file descriptor cannot be served.
    #[error("inherited file descriptor {fd} cannot be served: {why}; pass listening unix or loopback sockets")]
    Inherited {
        /// Its number.
        fd: i32,
        /// Why not.
        why: String,
    },
    /// Threads or listeners cannot be set up.
    #[error("cannot start the NBD server: {0}; check the limits on open files and tasks")]
    Start(#[source] std::io::Error),
}
