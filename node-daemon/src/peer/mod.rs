//! Other nodes: reading their sealed layers over NBD, and the connections on which replicas are kept.
//!
//! A node that lacks the blocks of a sealed layer reads them from one that has them, from the same server and under
//! the same names that every other client uses. Calls may wait for the peer: they belong on a worker thread. Every
//! wait is bounded by [`PeerLimits`].

pub mod address;
pub mod client;
pub mod frame;
pub mod links;
mod outbox;
pub mod pool;
pub mod session;

use std::time::Duration;

use hearth_protocol::LayerId;

pub use address::{PeerAddress, PeerAddressError};
pub use client::PeerClient;
pub use frame::Frame;
pub use links::{Links, Receive};
pub use pool::PeerPool;

/// Bounds of waiting for peers.
#[derive(Debug, Clone)]
pub struct PeerLimits {
    /// Connections to one export of one peer; further reads wait for one of them.
    pub connections_max: usize,
    /// Time for a connection to be made, and for each request on it.
    pub request_timeout: Duration,
    /// Time for a read in all, with its retries. Below the 30 s after which guests' kernels reset a disk.
    pub read_timeout: Duration,
    /// Pause after the first failed attempt to connect; doubled each time.
    pub retry_delay_min: Duration,
    /// Longest pause between attempts.
    pub retry_delay_max: Duration,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            connections_max: 8,
            request_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(20),
            retry_delay_min: Duration::from_millis(20),
            retry_delay_max: Duration::from_secs(1),
        }
    }
}

/// Why a peer did not answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The address makes no sense.
    #[error(transparent)]
    Address(#[from] PeerAddressError),
    /// The connection failed, or took too long.
    #[error("cannot {what}: {source}")]
    Broken {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The peer speaks no NBD that this client understands.
    #[error("the peer is no NBD server of ours: {0}")]
    Protocol(String),
    /// The peer said no.
    #[error("the peer refuses to {what} (error {errno}) {text}")]
    Refused {
        /// What was asked.
        what: String,
        /// The protocol's number.
        errno: u32,
        /// The peer's words.
        text: String,
    },
    /// An attempt failed a moment ago; the next one is not due yet.
    #[error("the last attempt to reach {address} failed; the next one is due in {} ms", left.as_millis())]
    BackingOff {
        /// The peer.
        address: String,
        /// Time left.
        left: Duration,
    },
    /// All connections to the peer are in use for too long.
    #[error("every connection to {address} is busy")]
    Busy {
        /// The peer.
        address: String,
    },
    /// Nobody holds the layer.
    #[error("no node announces layer {layer}; `hearth image list` shows where images are")]
    Nobody {
        /// The layer.
        layer: LayerId,
    },
}

impl PeerError {
    /// Whether asking the same peer again is pointless.
    fn is_final(&self) -> bool {
        matches!(self, PeerError::Refused { .. } | PeerError::Address(_))
    }
}
