//! A file read and written past the page cache, so that RAM is spent and counted once.
//!
//! `O_DIRECT` wants offsets, lengths and memory aligned to the device's logical block; 4,096 bytes suit every device.
//! Memory that is not aligned goes through a per-thread bounce buffer. Where the file system refuses `O_DIRECT` (old
//! tmpfs, some FUSE file systems) the file is used through the page cache and the store says so once.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::LocalKey;

use super::fault::{Action, Faults, Site};
use super::os::{Range, StoreFile};
#[cfg(feature = "mutants")]
use crate::mutants;

/// Alignment of offsets, lengths and memory, in bytes.
pub const ALIGN: usize = 4096;

/// Largest transfer through the bounce buffer, in bytes: a whole number of default blocks, small enough to keep per thread.
const BOUNCE: usize = 1 << 20;

/// Memory that starts at a multiple of [`ALIGN`].
#[derive(Default)]
pub struct AlignedBuf {
    raw: Vec<u8>,
}

impl AlignedBuf {
    /// At least `len` bytes, aligned; the content is whatever was there.
    pub fn get(&mut self, len: usize) -> &mut [u8] {
        if self.raw.len() < len + ALIGN {
            self.raw = vec![0; len + ALIGN];
        }
        let skip = self.raw.as_ptr().align_offset(ALIGN);
        &mut self.raw[skip..skip + len]
    }
}

/// Lends a thread's buffer to `f`, `len` bytes of it. It is taken out meanwhile, so that `f` may come by here again.
pub fn with_buffer<T>(local: &'static LocalKey<RefCell<AlignedBuf>>, len: usize, f: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = local.take();
    let result = f(buffer.get(len));
    local.replace(buffer);
    result
}

thread_local! {
    static BOUNCE_BUF: RefCell<AlignedBuf> = RefCell::default();
}

/// A file opened for direct I/O.
pub struct DirectFile {
    file: StoreFile,
    direct: bool,
    /// Writes acknowledged from memory, where [`mutants::WRITE_BACK`] breaks that rule.
    #[cfg(feature = "mutants")]
    held: std::sync::Mutex<Vec<(u64, Vec<u8>)>>,
}

static WARNED: AtomicBool = AtomicBool::new(false);

impl DirectFile {
    /// Opens the file for reading, and writing if asked; creates it if `create`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path, write: bool, create: bool, faults: &Faults) -> io::Result<Self> {
        let open = |flags: i32| {
            if create {
                StoreFile::create(Site::DataCreate, path, flags, faults)
            } else {
                StoreFile::open(path, write, flags, faults)
            }
        };
        match open(libc::O_DIRECT) {
            Ok(file) => Ok(Self::of(file, true)),
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => {
                let file = open(0)?;
                if !WARNED.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        path = %path.display(),
                        "the file system refuses O_DIRECT: reads and writes go through the page cache, so RAM is spent twice; use ext4 or xfs for the store"
                    );
                }
                Ok(Self::of(file, false))
            }
            Err(err) => Err(err),
        }
    }

    fn of(file: StoreFile, direct: bool) -> Self {
        Self {
            file,
            direct,
            #[cfg(feature = "mutants")]
            held: std::sync::Mutex::default(),
        }
    }

    /// The file itself, for metadata.
    pub fn file(&self) -> &File {
        self.file.file()
    }

    /// Whether the file's bytes may be read by others than [`Self::read`]: nothing stands between the two.
    pub fn is_plain(&self) -> bool {
        #[cfg(feature = "mutants")]
        if mutants::WRITE_BACK.is_on() {
            return false;
        }
        !self.file.is_watched()
    }

    fn fits(&self, buf: &[u8]) -> bool {
        !self.direct || buf.as_ptr().align_offset(ALIGN) == 0
    }

    /// Fills `buf` from `offset`; any alignment.
    ///
    /// # Errors
    /// The operating system's; `UnexpectedEof` past the end of the file.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.pass(Site::DataRead, Action::Read)?;
        if self.fits(buf) && (!self.direct || is_aligned(offset, buf.len())) {
            self.file().read_exact_at(buf, offset)?;
        } else {
            let mut at = 0;
            while at < buf.len() {
                let from = offset + at as u64;
                let base = from - from % ALIGN as u64;
                let skip = (from - base) as usize;
                let take = (buf.len() - at).min(BOUNCE - skip);
                BOUNCE_BUF.with_borrow_mut(|bounce| {
                    let bounce = bounce.get((skip + take).next_multiple_of(ALIGN));
                    self.file().read_exact_at(bounce, base)?;
                    buf[at..at + take].copy_from_slice(&bounce[skip..skip + take]);
                    io::Result::Ok(())
                })?;
                at += take;
            }
        }
        #[cfg(feature = "mutants")]
        for (at, bytes) in &*self.held.lock().expect("held writes lock") {
            for (i, byte) in bytes.iter().enumerate() {
                if let Some(place) = (at + i as u64)
                    .checked_sub(offset)
                    .and_then(|n| buf.get_mut(n as usize))
                {
                    *place = *byte;
                }
            }
        }
        self.file.pass(Site::DataReadDone, Action::Moment)
    }

    /// Writes `data` at `offset`, both multiples of [`ALIGN`]. `durable`: the bytes and the metadata needed to read
    /// them are on stable storage before this returns.
    ///
    /// # Errors
    /// The operating system's; part of the data may have been written.
    ///
    /// # Panics
    /// If offset or length are not aligned.
    pub fn write(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        assert!(
            is_aligned(offset, data.len()),
            "unaligned write of {} at {offset}",
            data.len()
        );
        if self.fits(data) {
            self.put(offset, data, durable)?;
        } else {
            for (i, part) in data.chunks(BOUNCE).enumerate() {
                BOUNCE_BUF.with_borrow_mut(|bounce| {
                    let bounce = bounce.get(part.len());
                    bounce.copy_from_slice(part);
                    self.put(offset + (i * BOUNCE) as u64, bounce, durable)
                })?;
            }
        }
        self.file.pass(Site::DataWriteDone, Action::Moment)
    }

    fn put(&self, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        #[cfg(feature = "mutants")]
        if mutants::WRITE_BACK.is_on() && !durable {
            self.held
                .lock()
                .expect("held writes lock")
                .push((offset, data.to_vec()));
            return Ok(());
        }
        if durable {
            self.file.write_durable(Site::DataWriteDurable, offset, data)
        } else {
            self.file.write(Site::DataWrite, offset, data)
        }
    }

    /// Gives the range back to the file system; it reads as zero. Offset and length are multiples of [`ALIGN`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.change(Site::DataPunch, Range::Punch, offset, length)
    }

    /// Makes the range read as zero and keeps or makes it allocated. Same alignment as [`Self::punch`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn zero_allocated(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.change(Site::DataZero, Range::Zero, offset, length) {
            // tmpfs has no ZERO_RANGE.
            Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.punch(offset, length)?;
                self.change(Site::DataReserve, Range::Reserve, offset, length)
            }
            other => other,
        }
    }

    fn change(&self, site: Site, range: Range, offset: u64, length: u64) -> io::Result<()> {
        assert!(
            is_aligned(offset, length as usize),
            "unaligned change of {length} at {offset}"
        );
        self.file.change(site, range, offset, length)
    }

    /// Puts everything written before on stable storage.
    ///
    /// # Errors
    /// The operating system's. After one, nothing written before can be trusted to be there.
    pub fn sync(&self) -> io::Result<()> {
        #[cfg(feature = "mutants")]
        for (offset, bytes) in self.held.lock().expect("held writes lock").drain(..) {
            let mut buf = AlignedBuf::default();
            let aligned = buf.get(bytes.len());
            aligned.copy_from_slice(&bytes);
            self.file.write(Site::DataWrite, offset, aligned)?;
        }
        self.file.sync(Site::DataSync)
    }

    /// Extends or cuts the file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn resize(&self, len: u64) -> io::Result<()> {
        self.file.set_len(Site::DataSize, len)
    }
}

/// Whether offset and length are multiples of [`ALIGN`].
pub fn is_aligned(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(ALIGN as u64) && len.is_multiple_of(ALIGN)
}
