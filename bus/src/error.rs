//! What can go wrong between a process and its streams.

use hearth_protocol::Seq;

/// Why something about a stream could not be done.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The address is none.
    #[error("{url:?} is not the address of a NATS server: {reason}. Use nats://HOST:4222, several with commas")]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No server answered.
    #[error("cannot connect to NATS at {url}: {reason}. Is nats-server running, and is the address right?")]
    Connect {
        /// The address tried.
        url: String,
        /// What the client says.
        reason: String,
    },
    /// The server did not answer in time, or the connection is down; try again.
    #[error("{what} failed for now: {reason}")]
    Unavailable {
        /// What was attempted.
        what: &'static str,
        /// What the client or server says.
        reason: String,
    },
    /// The stream does not exist.
    #[error("the stream {0} does not exist: start hearth-scheduler, it creates it")]
    NoStream(&'static str),
    /// The stream ends behind what was already read from it.
    #[error(
        "the stream HEARTH ends at {last}, but {seen} was already read from it: it was rolled back or replaced. \
         Nothing is decided until an operator restores it from a backup"
    )]
    RolledBack {
        /// The highest position read.
        seen: Seq,
        /// Where the stream ends now.
        last: Seq,
    },
    /// The servers' or streams' settings can lose acknowledged events.
    #[error("unsafe settings, refused: {}", .0.join("; "))]
    Unsafe(Vec<String>),
}

impl BusError {
    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, BusError::Unavailable { .. } | BusError::Connect { .. })
    }
}

/// Why a publish did not happen, or may have happened.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Someone else published on the filter first: read on and decide anew. Nothing was stored.
    #[error("another event on {filter} came first (expected {expected} as the last one): {description}")]
    Conflict {
        /// The subject filter that was compared.
        filter: String,
        /// The last seq that was expected on it.
        expected: Seq,
        /// The server's words.
        description: String,
    },
    /// No answer: it may be stored, or be stored by the next publish, which resolves it first.
    #[error("no answer to the publish on {subject}, it may or may not be in the log: {reason}")]
    Unknown {
        /// The subject.
        subject: String,
        /// Why there is no answer.
        reason: String,
    },
    /// The server said no, such as for a full stream. Nothing was stored.
    #[error("the server refused the publish on {subject}: {description} (error {code})")]
    Refused {
        /// The subject.
        subject: String,
        /// JetStream error code.
        code: u64,
        /// The server's words.
        description: String,
    },
    /// Larger than any message may be. Nothing was stored.
    #[error("{what} is {len} bytes long, the limit is {max}: split it")]
    TooLong {
        /// Which message.
        what: String,
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
}

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// Nobody listens on the subject.
    NoResponders,
    /// Nobody answered in time.
    TimedOut,
    /// The connection is down.
    Connection(String),
}
