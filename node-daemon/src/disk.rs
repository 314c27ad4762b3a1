//! What an export serves: the narrow waist between exports (NBD, kernel device) and what is behind them
//! (a [`crate::volume`], a sealed layer, a test double).
//!
//! All calls are synchronous. [`Disk::try_read_ram`] never waits, so a connection's task may call it in line; every
//! other call may wait for a disk or a peer and belongs on a worker thread.
//!
//! Offsets and lengths are bytes. Callers have checked that a request lies within [`Disk::size_bytes`];
//! implementations check again and answer [`DiskError::OutOfRange`]. Any alignment is allowed.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use hearth_protocol::ImageId;

use crate::shared::Shared;

/// Why a request failed. Exports translate it into the errno of their protocol.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Beyond the end (NBD: `EINVAL`, for writes `ENOSPC`).
    #[error("{length} bytes at {offset} reach past the end of the disk ({size} bytes)")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Size of the disk.
        size: u64,
    },
    /// A write to something that takes none (`EPERM`).
    #[error("the disk is read-only: {0}")]
    ReadOnly(&'static str),
    /// The store has no room (`ENOSPC`). Nothing was acknowledged; the guest may retry after room was made.
    #[error("no space left in the store: {0}")]
    NoSpace(String),
    /// The disk under the store, or the peer, failed (`EIO`).
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// An earlier failure closed the disk for writes; it stays closed until detach and attach (`EIO`).
    #[error("the image takes no more writes: {0}; detach and attach it")]
    Poisoned(String),
    /// The disk is being detached (`ESHUTDOWN`).
    #[error("the image is being detached")]
    ShuttingDown,
}

/// A property of byte ranges that clients can ask for (NBD: a metadata context).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// `base:allocation`: bit 0 hole, bit 1 reads as zero.
    Allocation,
    /// `hearth:tier`: 0 ram, 1 disk, 2 remote, 3 hole.
    Tier,
    /// `hearth:synced`: 1 where this node holds every acknowledged write.
    Synced,
    /// `hearth:heat`: 0 cold to 15 hottest, on a logarithmic scale.
    Heat,
}

/// One run of equal status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never 0.
    pub length: u64,
    /// As [`ExtentKind`] says.
    pub status: u32,
}

/// Bytes in a file, which stays open as long as this lives.
pub struct FileRead {
    /// The file.
    pub file: Arc<dyn AsFd + Send + Sync>,
    /// The first byte, a multiple of what the file needs for direct I/O.
    pub offset: u64,
}

/// A change whose end is told later.
pub struct Begun {
    /// What.
    pub change: Change,
    /// Told once, on any thread; must not wait.
    pub tell: Box<dyn FnOnce(Result<(), DiskError>) + Send>,
}

/// What can be begun.
pub enum Change {
    /// As [`Disk::write`].
    Write {
        /// The first byte.
        offset: u64,
        /// What to write.
        data: Shared,
        /// On stable storage before the end is told.
        fua: bool,
    },
    /// As [`Disk::flush`].
    Flush,
}

/// An image (or sealed layer) as an export sees it.
pub trait Disk: Send + Sync + 'static {
    /// Which image, for heat and messages.
    fn image(&self) -> ImageId;

    /// Size in bytes, a multiple of 4,096.
    fn size_bytes(&self) -> u64;

    /// Block size in bytes; the preferred request size.
    fn block_size_bytes(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Fills `buf` from RAM if all of it is there, and says whether it did. Never waits. A `false` leaves `buf`
    /// unspecified and counts as no access: the caller goes on with [`Disk::read`].
    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool;

    /// Where the bytes of a read lie, if that is one place of one file and nothing is to be done with them but to hand
    /// them out. Never waits. `Some` counts as the access: the caller reads them and calls [`Disk::file_read_done`].
    fn file_read(&self, offset: u64, length: usize) -> Option<FileRead> {
        let _ = (offset, length);
        None
    }

    /// How a [`Disk::file_read`] ended, and how long it took.
    ///
    /// # Errors
    /// [`DiskError`], if it did.
    fn file_read_done(
        &self,
        offset: u64,
        length: usize,
        took: Duration,
        read: io::Result<()>,
    ) -> Result<(), DiskError> {
        let _ = took;
        read.map_err(|source| DiskError::Io {
            what: format!("cannot read {length} bytes at {offset}"),
            source,
        })
    }

    /// Fills `buf`.
    ///
    /// # Errors
    /// [`DiskError`]; `buf` is then unspecified.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// Writes `data`. `fua`: it is on stable storage before this returns.
    ///
    /// # Errors
    /// [`DiskError`]; each block touched then holds old or new bytes, and no RAM copy of them remains.
    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), DiskError>;

    /// Puts every write that returned before this call on stable storage.
    ///
    /// # Errors
    /// [`DiskError`]; the disk is then poisoned for writes.
    fn flush(&self) -> Result<(), DiskError>;

    /// Whether writes and flushes are to be handed over with [`Disk::begin`], all that wait at a time: where each waits
    /// for other nodes, a thread for each costs more than the work.
    fn takes_batches(&self) -> bool {
        false
    }

    /// Begins changes. May wait for this node's disk, but not for other nodes.
    fn begin(&self, changes: Vec<Begun>) {
        for Begun { change, tell } in changes {
            tell(match change {
                Change::Write { offset, data, fua } => self.write(offset, &data, fua),
                Change::Flush => self.flush(),
            });
        }
    }

    /// Gives the range back; it reads as zero afterwards.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), DiskError>;

    /// Makes the range read as zero; `keep_allocated` asks that later writes cannot run out of space.
    ///
    /// # Errors
    /// As [`Disk::write`].
    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError>;

    /// Brings the range into RAM as far as the front has room.
    ///
    /// # Errors
    /// [`DiskError`] if it cannot be read.
    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Describes the range: consecutive runs from `offset` that cover at least its first block and at most `length`
    /// bytes, at most `extents_max` of them.
    ///
    /// # Errors
    /// [`DiskError`] if the answer cannot be had.
    fn extents(&self, offset: u64, length: u64, kind: ExtentKind, extents_max: usize)
    -> Result<Vec<Extent>, DiskError>;
}
