//! The append-only record of blocks that changed state since the layer's bitmap file was written.
//!
//! A record is handed to the kernel before the write that caused it is acknowledged: the death of the daemon loses
//! none. After the death of the machine only records before the last durable *commit* count, because a commit is
//! written when the data of everything before it is on stable storage (docs/adr/0002).

use std::io;
use std::path::Path;
use std::sync::Arc;

use hearth_protocol::chain;

use super::blockmap::BlockState;
use super::fault::{Faults, Site};
use super::os::{self, Range, StoreFile};

const RECORD: usize = 32;

/// Bytes of one record.
pub const RECORD_BYTES: u64 = RECORD as u64;
const KIND_DATA: u8 = BlockState::Data as u8;
const KIND_ZERO: u8 = BlockState::Zero as u8;
const KIND_COMMIT: u8 = 3;

/// Journal space is reserved in steps of this many bytes, so that a commit never meets a full disk.
const RESERVE: u64 = 64 << 10;

/// One line of the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// `count` blocks from `first` took this state.
    Blocks {
        /// First block.
        first: u64,
        /// How many.
        count: u64,
        /// Their new state; never `Absent`.
        state: BlockState,
    },
    /// The data of every record before `upto` bytes is on stable storage.
    Commit {
        /// Journal offset in bytes.
        upto: u64,
    },
}

/// A journal open for appending.
pub struct Journal {
    file: Arc<StoreFile>,
    generation: u32,
    tail: u64,
    reserved: u64,
    committed: u64,
}

/// How far a journal found at open counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The machine has run on since it was written: every record counts.
    All,
    /// The machine may have lost power: records before the last commit count.
    Committed,
}

impl Journal {
    /// Creates an empty journal and syncs it; the caller syncs the directory.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create(path: &Path, generation: u32, faults: &Faults) -> io::Result<Self> {
        let file = StoreFile::create(Site::JournalCreate, path, 0, faults)?;
        file.sync(Site::JournalCreateSync)
            .inspect_err(|_| os::discard_file(path, faults))?;
        Ok(Self {
            file: Arc::new(file),
            generation,
            tail: 0,
            reserved: 0,
            committed: 0,
        })
    }

    /// Reads a journal's records that count, in order. The second value is how many intact block records did not
    /// count.
    ///
    /// # Errors
    /// The operating system's.
    pub fn replay(path: &Path, generation: u32, trust: Trust) -> io::Result<(Vec<Record>, usize)> {
        Ok(records(&std::fs::read(path)?, generation, trust))
    }

    /// Appends a change of state.
    ///
    /// # Errors
    /// The operating system's; the journal is then as before.
    pub fn append_blocks(&mut self, first: u64, count: u64, state: BlockState) -> io::Result<()> {
        let kind = match state {
            BlockState::Data => KIND_DATA,
            BlockState::Zero => KIND_ZERO,
            BlockState::Absent => unreachable!("a block never becomes absent again"),
        };
        self.reserve()?;
        self.append(Site::JournalAppend, kind, first, count)
    }

    /// Appends a commit for everything before `upto`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn append_commit(&mut self, upto: u64) -> io::Result<()> {
        self.append(Site::JournalCommit, KIND_COMMIT, upto, 0)
    }

    fn append(&mut self, site: Site, kind: u8, first: u64, count: u64) -> io::Result<()> {
        let record = encode(kind, self.generation, first, count, self.tail);
        self.file.write(site, self.tail, &record)?;
        self.tail += RECORD as u64;
        Ok(())
    }

    /// Makes sure that this record and a commit after it have room.
    fn reserve(&mut self) -> io::Result<()> {
        if self.tail + 3 * RECORD as u64 <= self.reserved {
            return Ok(());
        }
        match self
            .file
            .change(Site::JournalReserve, Range::Reserve, self.tail, RESERVE)
        {
            Err(err) if err.raw_os_error() != Some(libc::EOPNOTSUPP) => Err(err),
            _ => {
                self.reserved = self.tail + RESERVE;
                Ok(())
            }
        }
    }

    /// Takes back what a failed append may have left behind the tail: it must not count after a crash.
    ///
    /// # Errors
    /// The operating system's; whether the record counts is then unknown.
    pub fn cut(&mut self) -> io::Result<()> {
        self.reserved = self.tail;
        self.file.set_len(Site::JournalCut, self.tail)
    }

    /// Bytes written so far.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Bytes of records that are known to count after a power loss.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Records that [`Self::committed`] rose to `upto`, after the file was synced.
    pub fn set_committed(&mut self, upto: u64) {
        self.committed = self.committed.max(upto);
    }

    /// The journal's generation; the bitmap file names the one that continues it.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The file, to be synced without holding the journal's lock.
    pub fn file(&self) -> Arc<StoreFile> {
        self.file.clone()
    }
}

/// Reads the records that count off a journal's bytes, in order. The second value is how many intact block records did
/// not count.
pub fn records(bytes: &[u8], generation: u32, trust: Trust) -> (Vec<Record>, usize) {
    let mut blocks = Vec::new();
    let mut committed = 0;
    for (i, raw) in bytes.chunks_exact(RECORD).enumerate() {
        let at = (i * RECORD) as u64;
        match decode(raw.try_into().expect("chunks are exact"), generation, at) {
            None => break,
            Some(Record::Commit { upto }) => committed = committed.max(upto.min(at)),
            Some(record) => blocks.push((at, record)),
        }
    }
    let count = match trust {
        Trust::All => blocks.len(),
        Trust::Committed => blocks.iter().take_while(|(at, _)| *at < committed).count(),
    };
    let dropped = blocks.len() - count;
    blocks.truncate(count);
    (blocks.into_iter().map(|(_, record)| record).collect(), dropped)
}

fn check(head: &[u8], at: u64) -> [u8; 8] {
    let mut bytes = [0; 32];
    bytes[..24].copy_from_slice(head);
    bytes[24..].copy_from_slice(&at.to_le_bytes());
    chain::part(&bytes)[..8].try_into().expect("a hash has 32 bytes")
}

/// The bytes of one record of `kind` at byte `at` of its journal.
pub fn encode(kind: u8, generation: u32, first: u64, count: u64, at: u64) -> [u8; RECORD] {
    let mut out = [0; RECORD];
    out[0] = kind;
    out[4..8].copy_from_slice(&generation.to_le_bytes());
    out[8..16].copy_from_slice(&first.to_le_bytes());
    out[16..24].copy_from_slice(&count.to_le_bytes());
    let sum = check(&out[..24], at);
    out[24..].copy_from_slice(&sum);
    out
}

/// Kind, first and count of a record; `None` where it is torn, stale or was never written.
pub(super) fn decode_raw(raw: &[u8; RECORD], generation: u32, at: u64) -> Option<(u8, u64, u64)> {
    let number = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().expect("8 bytes"));
    if raw[4..8] != generation.to_le_bytes() || raw[24..] != check(&raw[..24], at) {
        return None;
    }
    Some((raw[0], number(8), number(16)))
}

fn decode(raw: &[u8; RECORD], generation: u32, at: u64) -> Option<Record> {
    let (kind, first, count) = decode_raw(raw, generation, at)?;
    match kind {
        KIND_DATA => Some(Record::Blocks {
            first,
            count,
            state: BlockState::Data,
        }),
        KIND_ZERO => Some(Record::Blocks {
            first,
            count,
            state: BlockState::Zero,
        }),
        KIND_COMMIT => Some(Record::Commit { upto: first }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(first: u64, state: BlockState) -> Record {
        Record::Blocks { first, count: 1, state }
    }

    #[test]
    fn only_committed_records_survive_a_power_loss_and_torn_tails_end_the_journal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&path, 7, &Faults::default()).unwrap();
        journal.append_blocks(1, 1, BlockState::Data).unwrap();
        let upto = journal.tail();
        journal.append_blocks(2, 1, BlockState::Zero).unwrap();
        journal.append_commit(upto).unwrap();
        journal.append_blocks(3, 1, BlockState::Data).unwrap();

        let all = [
            blocks(1, BlockState::Data),
            blocks(2, BlockState::Zero),
            blocks(3, BlockState::Data),
        ];
        assert_eq!(Journal::replay(&path, 7, Trust::All).unwrap(), (all.to_vec(), 0));
        assert_eq!(
            Journal::replay(&path, 7, Trust::Committed).unwrap(),
            (all[..1].to_vec(), 2)
        );
        assert_eq!(Journal::replay(&path, 8, Trust::All).unwrap(), (vec![], 0));

        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (got, _) = Journal::replay(&path, 7, Trust::All).unwrap();
            assert!(all.starts_with(&got));
        }
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            let (got, _) = Journal::replay(&path, 7, Trust::All).unwrap();
            assert!(all.starts_with(&got) && got.len() <= at / RECORD, "byte {at}");
        }
    }
}
