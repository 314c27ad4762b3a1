//! A file read and written past the page cache, so that RAM is spent and counted once.
//!
//! `O_DIRECT` wants offsets, lengths and memory aligned to the device's logical block; 4,096 bytes suit every device.
//! Memory that is not aligned goes through a per-thread bounce buffer. Where the file system refuses `O_DIRECT` (old
//! tmpfs, some FUSE file systems) the file is used through the page cache and the store says so once.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::LocalKey;

use nix::fcntl::{FallocateFlags, fallocate};

use super::fault::{Faults, Site};

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
    file: File,
    direct: bool,
    faults: Faults,
}

static WARNED: AtomicBool = AtomicBool::new(false);

impl DirectFile {
    /// Opens the file for reading, and writing if asked; creates it if `create`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path, write: bool, create: bool, faults: Faults) -> io::Result<Self> {
        let options = |flags: i32| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .create_new(create)
                .custom_flags(flags | libc::O_CLOEXEC)
                .open(path)
        };
        match options(libc::O_DIRECT) {
            Ok(file) => Ok(Self {
                file,
                direct: true,
                faults,
            }),
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => {
                // open(2) may have created the file before it found O_DIRECT unsupported.
                if create && path.exists() {
                    std::fs::remove_file(path)?;
                }
                let file = options(0)?;
                if !WARNED.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        path = %path.display(),
                        "the file system refuses O_DIRECT: reads and writes go through the page cache, so RAM is spent twice; use ext4 or xfs for the store"
                    );
                }
                Ok(Self {
                    file,
                    direct: false,
                    faults,
                })
            }
            Err(err) => Err(err),
        }
    }

    /// The file itself, for metadata.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn fits(&self, buf: &[u8]) -> bool {
        !self.direct || buf.as_ptr().align_offset(ALIGN) == 0
    }

    /// Fills `buf` from `offset`; any alignment.
    ///
    /// # Errors
    /// The operating system's; `UnexpectedEof` past the end of the file.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.faults.at(Site::DataRead)?;
        if self.fits(buf) && (!self.direct || is_aligned(offset, buf.len())) {
            self.file.read_exact_at(buf, offset)?;
        } else {
            let mut at = 0;
            while at < buf.len() {
                let from = offset + at as u64;
                let base = from - from % ALIGN as u64;
                let skip = (from - base) as usize;
                let take = (buf.len() - at).min(BOUNCE - skip);
                BOUNCE_BUF.with_borrow_mut(|bounce| {
                    let bounce = bounce.get((skip + take).next_multiple_of(ALIGN));
                    self.file.read_exact_at(bounce, base)?;
                    buf[at..at + take].copy_from_slice(&bounce[skip..skip + take]);
                    io::Result::Ok(())
                })?;
                at += take;
            }
        }
        self.faults.at(Site::DataReadDone)
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
        self.faults.at(Site::DataWrite)?;
        if self.fits(data) {
            self.write_all(offset, data, durable)?;
        } else {
            for (i, part) in data.chunks(BOUNCE).enumerate() {
                BOUNCE_BUF.with_borrow_mut(|bounce| {
                    let bounce = bounce.get(part.len());
                    bounce.copy_from_slice(part);
                    self.write_all(offset + (i * BOUNCE) as u64, bounce, durable)
                })?;
            }
        }
        self.faults.at(Site::DataWriteDone)
    }

    fn write_all(&self, mut offset: u64, mut data: &[u8], durable: bool) -> io::Result<()> {
        if !durable {
            return self.file.write_all_at(data, offset);
        }
        while !data.is_empty() {
            let part = libc::iovec {
                iov_base: data.as_ptr() as *mut libc::c_void,
                iov_len: data.len(),
            };
            // SAFETY: `part` describes `data`, which outlives the call; the kernel only reads from it.
            let n = unsafe { libc::pwritev2(self.file.as_raw_fd(), &part, 1, offset as i64, libc::RWF_DSYNC) };
            match n {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n if n > 0 => {
                    data = &data[n as usize..];
                    offset += n as u64;
                }
                _ => {
                    let err = io::Error::last_os_error();
                    if err.kind() != io::ErrorKind::Interrupted {
                        return Err(err);
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives the range back to the file system; it reads as zero. Offset and length are multiples of [`ALIGN`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            offset,
            length,
        )
    }

    /// Makes the range read as zero and keeps or makes it allocated. Same alignment as [`Self::punch`].
    ///
    /// # Errors
    /// The operating system's.
    pub fn zero_allocated(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.allocate(flags, offset, length) {
            // tmpfs has no ZERO_RANGE.
            Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.punch(offset, length)?;
                self.allocate(FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, length)
            }
            other => other,
        }
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        assert!(
            is_aligned(offset, length as usize),
            "unaligned fallocate of {length} at {offset}"
        );
        self.faults.at(Site::DataPunch)?;
        loop {
            match fallocate(&self.file, flags, offset as i64, length as i64) {
                Ok(()) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Puts everything written before on stable storage.
    ///
    /// # Errors
    /// The operating system's. After one, nothing written before can be trusted to be there.
    pub fn sync(&self) -> io::Result<()> {
        self.faults.at(Site::DataSync)?;
        self.file.sync_data()
    }

    /// Extends or cuts the file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

/// Whether offset and length are multiples of [`ALIGN`].
pub fn is_aligned(offset: u64, len: usize) -> bool {
    offset.is_multiple_of(ALIGN as u64) && len.is_multiple_of(ALIGN)
}
