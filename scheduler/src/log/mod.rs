//! The event log: every message of the stream, in order, chained by hashes, indexed, on this scheduler's own disk.
//!
//! It is not the authority on order (the stream is) and judges nothing. Invariant: positions are contiguous from 1,
//! each record's chain value follows from the one before, and what [`EventLog::append`] returned for is on stable
//! storage.

mod index;
mod memory;
mod record;
mod rocks;

use std::path::PathBuf;

use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{Seq, WallMs};

pub use index::Index;
pub use memory::MemoryLog;
pub use record::{Content, Entry, Record};
pub use rocks::RocksLog;

/// Layout of the directory that this build writes. Older ones open, newer ones are refused.
pub const LAYOUT: u32 = 2;

/// Where a log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The last position; 0 for an empty log.
    pub seq: Seq,
    /// The chain value there.
    pub chain: Hash,
}

impl Default for Head {
    fn default() -> Self {
        Self {
            seq: Seq(0),
            chain: chain::GENESIS,
        }
    }
}

/// What [`EventLog::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Records whose chain value is right, from the first on without a gap.
    pub count: u64,
    /// Where the verified part ends.
    pub head: Head,
    /// The first position that is wrong, and why; `None` if everything is right.
    pub bad: Option<(Seq, String)>,
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store under it failed.
    #[error(
        "the event log in {dir} failed at {attempted}: {source}. If its disk is well and its files are yours to write, \
         they are damaged: move {dir} away and start again, an empty directory is refilled from the stream"
    )]
    Store {
        /// The directory.
        dir: PathBuf,
        /// What was attempted.
        attempted: &'static str,
        /// RocksDB's words.
        #[source]
        source: rocksdb::Error,
    },
    /// The directory cannot be made or read.
    #[error("cannot use {dir} for the event log: {source}")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// A record is missing, cut, or not what was written.
    #[error(
        "the event log is damaged at {seq}: {why}. Nothing is decided on it. Move {dir} away and start again: an \
         empty directory is refilled from the stream"
    )]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// The first position that is wrong.
        seq: Seq,
        /// What is wrong.
        why: String,
    },
    /// A later Hearth wrote here.
    #[error(
        "the event log in {dir} was written by a newer Hearth ({found}): start that one, or move {dir} away and start \
         again: an empty directory is refilled from the stream"
    )]
    Newer {
        /// The directory.
        dir: PathBuf,
        /// What shows it.
        found: String,
    },
    /// An append that would leave a gap or write twice: a mistake of the caller, nothing was written.
    #[error("the next position of the event log is {expected}, not {found}")]
    NotNext {
        /// The position that comes next.
        expected: Seq,
        /// The position given.
        found: Seq,
    },
    /// The log belongs to another stream.
    #[error(
        "the event log in {dir} was filled from the stream with identity {ours}, this one is {theirs}: is this the \
         right NATS? If the cluster was made anew, use an empty directory"
    )]
    OtherStream {
        /// The directory.
        dir: PathBuf,
        /// Identity in the log.
        ours: String,
        /// Identity of the stream.
        theirs: String,
    },
}

/// A log. The RocksDB arm and the memory arm pass the same test bodies.
pub trait EventLog: Send + Sync {
    /// Where it ends.
    fn head(&self) -> Head;

    /// The error for damage at a position, which names this log.
    fn damage_at(&self, seq: Seq, why: String) -> LogError;

    /// Ties the log to a stream for ever, at the first call, and checks the tie at later ones.
    ///
    /// # Errors
    /// [`LogError::OtherStream`], or a failure of the store.
    fn bind(&mut self, identity: &str) -> Result<(), LogError>;

    /// Appends entries that follow the head; on stable storage when it returns. All or nothing.
    ///
    /// # Errors
    /// [`LogError::NotNext`], or a failure of the store, after which the log must be opened anew.
    fn append(&mut self, entries: &[Entry]) -> Result<(), LogError>;

    /// One record.
    ///
    /// # Errors
    /// A failure of the store or [`LogError::Damaged`].
    fn get(&self, seq: Seq) -> Result<Option<Record>, LogError>;

    /// Calls `each` for the records from `from` on, ascending, until it returns false.
    ///
    /// # Errors
    /// A failure of the store or [`LogError::Damaged`]; gaps are damage.
    fn scan(&self, from: Seq, each: &mut dyn FnMut(Record) -> bool) -> Result<(), LogError>;

    /// Positions under an index, ascending, from `from` on, `max` at most.
    ///
    /// # Errors
    /// A failure of the store.
    fn find(&self, index: &Index, from: Seq, max: usize) -> Result<Vec<Seq>, LogError>;

    /// The last tick at or before a time: the position at which the cluster's own clock read `time`. `None` before
    /// the first tick.
    ///
    /// # Errors
    /// A failure of the store.
    fn seq_at_time(&self, time: WallMs) -> Result<Option<Seq>, LogError>;

    /// Drops the payloads of the next heat events that have one, at positions up to `through`, `max` at most; the
    /// chain stays as it is, because it is made of the payloads' hashes. Returns how many were dropped.
    ///
    /// # Errors
    /// A failure of the store or [`LogError::Damaged`].
    fn thin(&mut self, through: Seq, max: usize) -> Result<usize, LogError>;

    /// The last position that may have been thinned; 0 if nothing was.
    ///
    /// # Errors
    /// A failure of the store.
    fn thinned(&self) -> Result<Seq, LogError>;

    /// Keeps a snapshot of the state at a position, on stable storage when it returns.
    ///
    /// # Errors
    /// [`LogError::Directory`] or a failure of the store.
    fn put_snapshot(&mut self, at: Seq, bytes: &[u8]) -> Result<(), LogError>;

    /// Positions of the snapshots kept, ascending.
    ///
    /// # Errors
    /// As [`EventLog::put_snapshot`].
    fn snapshots(&self) -> Result<Vec<Seq>, LogError>;

    /// A snapshot's bytes, as they are now; `None` if there is none.
    ///
    /// # Errors
    /// As [`EventLog::put_snapshot`].
    fn snapshot(&self, at: Seq) -> Result<Option<Vec<u8>>, LogError>;

    /// Removes a snapshot.
    ///
    /// # Errors
    /// As [`EventLog::put_snapshot`].
    fn drop_snapshot(&mut self, at: Seq) -> Result<(), LogError>;

    /// Up to `max` records from `from` on.
    ///
    /// # Errors
    /// As [`EventLog::scan`].
    fn range(&self, from: Seq, max: usize) -> Result<Vec<Record>, LogError> {
        let mut records = Vec::new();
        if max > 0 {
            self.scan(from, &mut |record| {
                records.push(record);
                records.len() < max
            })?;
        }
        Ok(records)
    }

    /// Recomputes the whole chain and compares it with what is stored. Damage is an answer here, not an error.
    ///
    /// # Errors
    /// Never for damage; for failures of the store that say nothing about a position.
    fn verify(&self) -> Result<Verification, LogError> {
        let wanted = self.head();
        let mut head = Head::default();
        let mut bad = None;
        let scanned = self.scan(Seq(1), &mut |record| match record.check(&head) {
            Ok(next) => {
                head = next;
                true
            }
            Err(why) => {
                bad = Some((record.seq, why));
                false
            }
        });
        match scanned {
            Ok(()) => {}
            Err(LogError::Damaged { seq, why, .. }) => bad = bad.or(Some((seq, why))),
            Err(LogError::Store { source, .. }) => {
                bad = bad.or_else(|| Some((head.seq.next(), format!("the store cannot read it: {source}"))));
            }
            Err(other) => return Err(other),
        }
        if bad.is_none() && head != wanted {
            bad = Some((
                head.seq.next(),
                format!(
                    "the log ends here, its head says {} with chain {}",
                    wanted.seq,
                    chain::hex(&wanted.chain)
                ),
            ));
        }
        Ok(Verification {
            count: head.seq.0,
            head,
            bad,
        })
    }
}
