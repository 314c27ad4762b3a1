//! Every call by which the store changes something on disk. Nothing else in the store or the volume writes, syncs,
//! allocates, renames or removes; so the fault arm ([`super::fault`]) reaches all of it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::fault::{Action, Faults, Site, Verdict};
use crate::mutants;

/// A file of the store.
pub struct StoreFile {
    file: File,
    path: PathBuf,
    faults: Faults,
}

/// What to do with a range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// It becomes a hole.
    Punch,
    /// It reads as zero and is allocated.
    Zero,
    /// It is allocated, its content stays.
    Reserve,
}

impl StoreFile {
    /// Opens a file that is there, with further flags of open(2).
    ///
    /// # Errors
    /// The operating system's.
    pub fn open(path: &Path, write: bool, flags: i32, faults: &Faults) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(path)?;
        Ok(Self::of(file, path, faults))
    }

    /// Creates a file, empty even if there was one of that name.
    ///
    /// # Errors
    /// The operating system's.
    pub fn create(site: Site, path: &Path, flags: i32, faults: &Faults) -> io::Result<Self> {
        faults.at(site, path, Action::Create)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(path)?;
        Ok(Self::of(file, path, faults))
    }

    fn of(file: File, path: &Path, faults: &Faults) -> Self {
        Self {
            file,
            path: path.to_owned(),
            faults: faults.clone(),
        }
    }

    /// The file itself, to read and to look at.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a fault arm wants to see every call.
    pub fn is_watched(&self) -> bool {
        self.faults.is_armed()
    }

    /// Asks the fault arm at a site where nothing is changed.
    ///
    /// # Errors
    /// That of the arm.
    pub fn pass(&self, site: Site, action: Action<'_>) -> io::Result<()> {
        self.faults.at(site, &self.path, action).map(drop)
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The operating system's; part of the bytes may have been written.
    pub fn write(&self, site: Site, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all(site, offset, bytes, false, |offset, part| {
            self.file.write_at(part, offset)
        })
    }

    /// As [`Self::write`], and on stable storage with what is needed to read it back.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_durable(&self, site: Site, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all(site, offset, bytes, true, |offset, part| {
            let part = libc::iovec {
                iov_base: part.as_ptr() as *mut libc::c_void,
                iov_len: part.len(),
            };
            // SAFETY: `part` describes a slice that outlives the call; the kernel only reads from it.
            let n = unsafe { libc::pwritev2(self.file.as_raw_fd(), &part, 1, offset as i64, libc::RWF_DSYNC) };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        })
    }

    fn write_all(
        &self,
        site: Site,
        mut offset: u64,
        mut bytes: &[u8],
        durable: bool,
        write: impl Fn(u64, &[u8]) -> io::Result<usize>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            let action = Action::Write { offset, bytes, durable };
            let most = match self.faults.at(site, &self.path, action)? {
                Verdict::Go => bytes.len(),
                Verdict::Short(most) => most.min(bytes.len()),
            };
            match write(offset, &bytes[..most]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    bytes = &bytes[n..];
                    offset += n as u64;
                    if mutants::SHORT_WRITE_TRUSTED.is_on() {
                        return Ok(());
                    }
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    /// Changes a range without changing the file's length.
    ///
    /// # Errors
    /// The operating system's; part of the range may have been changed.
    pub fn change(&self, site: Site, range: Range, offset: u64, length: u64) -> io::Result<()> {
        let action = match range {
            Range::Punch | Range::Zero => Action::Zero { offset, length },
            Range::Reserve => Action::Reserve,
        };
        self.faults.at(site, &self.path, action)?;
        let how = match range {
            Range::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Range::Zero => FallocateFlags::FALLOC_FL_ZERO_RANGE,
            Range::Reserve => FallocateFlags::empty(),
        };
        loop {
            match fallocate(
                &self.file,
                how | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                offset as i64,
                length as i64,
            ) {
                Ok(()) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Extends or cuts the file.
    ///
    /// # Errors
    /// The operating system's.
    pub fn set_len(&self, site: Site, len: u64) -> io::Result<()> {
        self.faults.at(site, &self.path, Action::SetLen(len))?;
        self.file.set_len(len)
    }

    /// Puts everything written before on stable storage, with what is needed to read it back.
    ///
    /// # Errors
    /// The operating system's. After one, nothing written before can be trusted to be there, and a later sync that
    /// succeeds says nothing about it.
    pub fn sync(&self, site: Site) -> io::Result<()> {
        self.faults.at(site, &self.path, Action::Sync)?;
        self.file.sync_data()
    }
}

/// Creates a directory; its parent must be there.
///
/// # Errors
/// The operating system's.
pub fn create_dir(site: Site, path: &Path, faults: &Faults) -> io::Result<()> {
    faults.at(site, path, Action::CreateDir)?;
    fs::create_dir(path)
}

/// Creates a directory and those above it, where they are missing.
///
/// # Errors
/// The operating system's.
pub fn create_dir_all(site: Site, path: &Path, faults: &Faults) -> io::Result<()> {
    faults.at(site, path, Action::CreateDir)?;
    fs::create_dir_all(path)
}

/// Removes a file.
///
/// # Errors
/// The operating system's.
pub fn remove_file(site: Site, path: &Path, faults: &Faults) -> io::Result<()> {
    faults.at(site, path, Action::Remove)?;
    fs::remove_file(path)
}

/// Removes a directory with all in it.
///
/// # Errors
/// The operating system's.
pub fn remove_dir_all(site: Site, path: &Path, faults: &Faults) -> io::Result<()> {
    faults.at(site, path, Action::Remove)?;
    fs::remove_dir_all(path)
}

/// Removes a file that nobody needs, as well as it goes: one that stays behind is never read.
pub fn discard_file(path: &Path, faults: &Faults) {
    let _ = remove_file(Site::Discard, path, faults);
}

/// Removes a directory that nobody needs, as well as it goes: one that stays is removed when the store opens next.
pub fn discard_dir(path: &Path, faults: &Faults) {
    let _ = remove_dir_all(Site::Discard, path, faults);
}

/// Makes names created, renamed or removed in a directory survive a power loss.
///
/// # Errors
/// The operating system's.
pub fn sync_dir(site: Site, dir: &Path, faults: &Faults) -> io::Result<()> {
    faults.at(site, dir, Action::Sync)?;
    File::open(dir)?.sync_all()
}

/// The sites of one kind of small file.
#[derive(Debug, Clone, Copy)]
pub struct FileSites {
    /// Its creation under the temporary name.
    pub create: Site,
    /// Writing it.
    pub write: Site,
    /// Its sync.
    pub sync: Site,
    /// Its final name.
    pub rename: Site,
}

/// Replaces a small file whole: a reader, and whoever comes after a crash, finds the old or the new one. The new one
/// survives a power loss after [`sync_dir`]. Returns it, open for writing.
///
/// # Errors
/// The operating system's; the old content is then still there.
pub fn replace(sites: FileSites, path: &Path, parts: &[&[u8]], faults: &Faults) -> io::Result<StoreFile> {
    let temporary = path.with_extension("new");
    let write = || {
        let file = StoreFile::create(sites.create, &temporary, 0, faults)?;
        let mut at = 0;
        for part in parts {
            file.write(sites.write, at, part)?;
            at += part.len() as u64;
        }
        file.sync(sites.sync)?;
        faults.at(sites.rename, &temporary, Action::Rename { to: path })?;
        fs::rename(&temporary, path)?;
        Ok(StoreFile {
            path: path.to_owned(),
            ..file
        })
    };
    // What a failed sync left behind must not be the file that the next attempt syncs.
    write().inspect_err(|_| discard_file(&temporary, faults))
}

/// Replaces one of the daemon's own small files, durably.
///
/// # Errors
/// The operating system's; the old content is then still there, or the new one is but may not survive a power loss.
pub fn replace_note(path: &Path, bytes: &[u8], faults: &Faults) -> io::Result<()> {
    let sites = FileSites {
        create: Site::NoteCreate,
        write: Site::NoteWrite,
        sync: Site::NoteSync,
        rename: Site::NoteRename,
    };
    replace(sites, path, &[bytes], faults)?;
    sync_dir(
        Site::NoteDirSync,
        path.parent().expect("a file in the store has a directory"),
        faults,
    )
}

/// Reads a note that [`replace_note`] wrote; `None` if there is none. `fix` says what to do about one that is damaged.
///
/// # Errors
/// The operating system's, or that it is damaged.
pub fn read_note<T: serde::de::DeserializeOwned>(path: &Path, fix: &str) -> io::Result<Option<T>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| io::Error::other(format!("{} is damaged ({error}): {fix}", path.display())))
}
