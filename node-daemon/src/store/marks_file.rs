//! The file of a replica's intent marks, which regions of its layer are marked and since when.
//!
//! Records as in a layer's journal. The first says how many of those behind it were written with it, in one replacement;
//! later ones are appended in batches, each synced before the next is written. Invariants: a batch counts as a prefix
//! of its records, which is why nothing may depend on a batch before it was synced; what a failed batch left is cut off
//! before the next is written, because its records would else count behind a shorter one.

use std::io;
use std::path::{Path, PathBuf};

use hearth_protocol::Incarnation;

use super::error::StoreError;
use super::fault::{Faults, Site};
use super::journal::{RECORD_BYTES, decode_raw, encode};
use super::layer_meta::damaged;
use super::os::{self, FileSites, Range, StoreFile};
use crate::mutants;

/// Bytes of a region, the unit in which marks are durable. Larger regions cost fewer syncs, one for each region that
/// starts to be written, and more bytes that are made equal after a crash: at most
/// `marks::REGIONS_MAX` × this in a guest that flushes, which is seconds of a network. A whole number of
/// blocks of every size: the largest block is as large.
pub const REGION_BYTES: u64 = 4 << 20;

/// The file's name in the image's directory.
pub const MARKS: &str = "marks";

/// A file that is to grow over this many bytes is replaced by what still counts: a few thousand records, read in well
/// under a millisecond.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Space is reserved in steps of this many bytes, so that a write to blocks that have their place meets no full disk.
const RESERVE: u64 = 64 << 10;

const KIND_BASE: u8 = 16;
const KIND_UNDER: u8 = 17;
const KIND_MARK: u8 = 18;
const KIND_UNMARK: u8 = 19;

const SITES: FileSites = FileSites {
    create: Site::MarksCreate,
    write: Site::MarksWrite,
    sync: Site::MarksSync,
    rename: Site::MarksRename,
};

/// One change of which regions are marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `count` regions from `first` are marked; those that were marked before stay so under their older life.
    Mark {
        /// First region.
        first: u64,
        /// How many.
        count: u64,
        /// The store's life.
        under: Incarnation,
    },
    /// They are not.
    Unmark {
        /// First region.
        first: u64,
        /// How many.
        count: u64,
    },
}

/// Appends a change of one region to a list, as part of the last one where it continues that.
pub(super) fn push(changes: &mut Vec<Change>, region: u64, mark: Option<Incarnation>) {
    match (changes.last_mut(), mark) {
        (Some(Change::Mark { first, count, under }), Some(now)) if *under == now && *first + *count == region => {
            *count += 1;
        }
        (Some(Change::Unmark { first, count }), None) if *first + *count == region => *count += 1,
        (_, Some(under)) => changes.push(Change::Mark {
            first: region,
            count: 1,
            under,
        }),
        (_, None) => changes.push(Change::Unmark {
            first: region,
            count: 1,
        }),
    }
}

/// Why a batch is not durable.
#[derive(Debug)]
pub(super) enum Unwritten {
    /// Nothing of it will ever count: it may be written again.
    Refused(io::Error),
    /// What is on the disk is not known.
    Lost(io::Error),
}

/// An open file of marks.
pub(super) struct MarksFile {
    file: StoreFile,
    path: PathBuf,
    /// Keeps the records of one layer from counting in another one's file.
    salt: u32,
    tail: u64,
    reserved: u64,
    long: u64,
    under: Option<Incarnation>,
    faults: Faults,
}

impl MarksFile {
    /// Replaces the file in `dir` by one that says `changes`, durably.
    ///
    /// # Errors
    /// [`Unwritten::Refused`]: the old file is still there.
    pub(super) fn replace(dir: &Path, salt: u32, changes: &[Change], faults: &Faults) -> Result<Self, Unwritten> {
        let mut under = None;
        let mut records = Records::at(0, salt);
        records.add(KIND_BASE, REGION_BYTES, count(changes, None));
        records.say(changes, &mut under);
        let path = dir.join(MARKS);
        let file = os::replace(SITES, &path, &[&records.bytes], faults).map_err(Unwritten::Refused)?;
        os::sync_dir(Site::ImageDirSync, dir, faults).map_err(Unwritten::Lost)?;
        let tail = records.bytes.len() as u64;
        Ok(Self {
            file,
            path,
            salt,
            tail,
            reserved: 0,
            long: FILE_BYTES_MAX.max(2 * tail),
            under,
            faults: faults.clone(),
        })
    }

    /// Whether the file is better replaced than continued by these changes.
    pub(super) fn is_long_with(&self, changes: &[Change]) -> bool {
        self.tail + count(changes, self.under) * RECORD_BYTES > self.long
    }

    /// Replaces the file by one that says `all`, durably.
    ///
    /// # Errors
    /// [`Unwritten::Refused`]: the old file is still there.
    pub(super) fn renew(&mut self, all: &[Change]) -> Result<(), Unwritten> {
        let dir = self.path.parent().expect("a file in the store has a directory");
        *self = Self::replace(dir, self.salt, all, &self.faults)?;
        Ok(())
    }

    /// As [`Self::renew`]; where nothing can be replaced, continues the file by `changes`.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub(super) fn shorten(&mut self, all: &[Change], changes: &[Change]) -> Result<(), Unwritten> {
        match self.renew(all) {
            Err(Unwritten::Refused(err)) => {
                tracing::warn!(path = %self.path.display(), %err, "cannot shorten the file of marks; will try again");
                self.long = self.tail + FILE_BYTES_MAX;
                self.append(changes)
            }
            other => other,
        }
    }

    /// Appends a batch, durably.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub(super) fn append(&mut self, changes: &[Change]) -> Result<(), Unwritten> {
        let mut under = self.under;
        let mut records = Records::at(self.tail, self.salt);
        records.say(changes, &mut under);
        let end = self.tail + records.bytes.len() as u64;
        self.reserve(end).map_err(Unwritten::Refused)?;
        if let Err(err) = self.file.write(Site::MarksAppend, self.tail, &records.bytes) {
            self.reserved = self.tail;
            return Err(match self.file.set_len(Site::MarksCut, self.tail) {
                Ok(()) => Unwritten::Refused(err),
                Err(again) => Unwritten::Lost(io::Error::new(
                    again.kind(),
                    format!("{err}; cutting it off failed too: {again}"),
                )),
            });
        }
        if !mutants::MARK_UNSYNCED.is_on() {
            self.file.sync(Site::MarksAppendSync).map_err(Unwritten::Lost)?;
        }
        (self.tail, self.under) = (end, under);
        Ok(())
    }

    fn reserve(&mut self, end: u64) -> io::Result<()> {
        if end <= self.reserved {
            return Ok(());
        }
        let length = (end - self.tail).max(RESERVE);
        match self.file.change(Site::MarksReserve, Range::Reserve, self.tail, length) {
            Err(err) if err.raw_os_error() != Some(libc::EOPNOTSUPP) => Err(err),
            _ => {
                self.reserved = self.tail + length;
                Ok(())
            }
        }
    }
}

/// Records for these changes, behind one that set `under`.
fn count(changes: &[Change], mut under: Option<Incarnation>) -> u64 {
    let mut records = 0;
    for change in changes {
        if let Change::Mark { under: now, .. } = change {
            records += u64::from(under != Some(*now));
            under = Some(*now);
        }
        records += 1;
    }
    records
}

/// The bytes of records from a place in the file on.
struct Records {
    bytes: Vec<u8>,
    at: u64,
    salt: u32,
}

impl Records {
    fn at(at: u64, salt: u32) -> Self {
        Self {
            bytes: Vec::new(),
            at,
            salt,
        }
    }

    fn add(&mut self, kind: u8, first: u64, count: u64) {
        let at = self.at + self.bytes.len() as u64;
        self.bytes.extend_from_slice(&encode(kind, self.salt, first, count, at));
    }

    fn say(&mut self, changes: &[Change], under: &mut Option<Incarnation>) {
        for change in changes {
            match *change {
                Change::Mark {
                    first,
                    count,
                    under: now,
                } => {
                    if *under != Some(now) {
                        self.add(KIND_UNDER, (now.0 >> 64) as u64, now.0 as u64);
                        *under = Some(now);
                    }
                    self.add(KIND_MARK, first, count);
                }
                Change::Unmark { first, count } => self.add(KIND_UNMARK, first, count),
            }
        }
    }
}

/// The changes that a file of marks says, in order. `path` only names it in errors; `salt` and `regions` are the layer's.
///
/// # Errors
/// [`StoreError::Damaged`] if what was written with its first record is not all there. What was appended ends at the
/// first record that is torn.
pub fn changes(path: &Path, bytes: &[u8], salt: u32, regions: u64) -> Result<Vec<Change>, StoreError> {
    let mut records = bytes
        .chunks_exact(RECORD_BYTES as usize)
        .enumerate()
        .map_while(|(i, raw)| {
            let raw = raw.try_into().expect("chunks are exact");
            decode_raw(raw, salt, i as u64 * RECORD_BYTES)
        });
    let Some((KIND_BASE, region_bytes, with_it)) = records.next() else {
        return Err(damaged(path, "its first record is not whole"));
    };
    if region_bytes != REGION_BYTES {
        let why = format!("its regions have {region_bytes} bytes, in this build {REGION_BYTES}");
        return Err(damaged(path, why));
    }
    let (mut found, mut under, mut read) = (Vec::new(), None, 0);
    for (kind, first, count) in records {
        read += 1;
        let fits = || match first.checked_add(count) {
            Some(end) if end <= regions => Ok(()),
            _ => Err(damaged(path, "a record lies past the end of the layer")),
        };
        match (kind, under) {
            (KIND_UNDER, _) => under = Some(Incarnation(u128::from(first) << 64 | u128::from(count))),
            (KIND_MARK, Some(under)) => {
                fits()?;
                found.push(Change::Mark { first, count, under });
            }
            (KIND_UNMARK, _) => {
                fits()?;
                found.push(Change::Unmark { first, count });
            }
            _ => return Err(damaged(path, "it has a record that does not belong there")),
        }
    }
    if read < with_it {
        return Err(damaged(path, "it ends early"));
    }
    Ok(found)
}

/// The changes that the file in `dir` says; `None` if there is no file.
///
/// # Errors
/// [`StoreError`].
pub(super) fn read(dir: &Path, salt: u32, regions: u64) -> Result<Option<Vec<Change>>, StoreError> {
    let path = dir.join(MARKS);
    match std::fs::read(&path) {
        Ok(bytes) => changes(&path, &bytes, salt, regions).map(Some),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(StoreError::at("read", &path)(err)),
    }
}
