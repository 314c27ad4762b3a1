//! A node's store on a disk of its own: an ext4 file system in a file, over a loop device. It can be filled up, and its
//! power can be cut.
//!
//! A cut is the file system's own emergency stop (ext4's shutdown ioctl without a flush of its log): from then on it
//! writes nothing more, and what the next mount finds is what had reached the device. So every byte that the store handed
//! to the kernel and did not sync may be gone. The device itself has no cache that loses something.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use xtask::process;

/// `EXT4_IOC_SHUTDOWN`, `_IOR('X', 125, __u32)` (fs/ext4/ext4.h).
const SHUTDOWN: libc::c_ulong = 0x8004_587d;
/// `EXT4_GOING_FLAGS_NOLOGFLUSH`: neither data nor log is written any more.
const NO_LOG_FLUSH: u32 = 2;
/// A file that takes what room is left.
const FILLER: &str = "another-tenant";

/// See the module. It is unmounted by the cluster under whose folder it lies.
#[derive(Debug)]
pub struct StoreDisk {
    file: PathBuf,
    mounted_at: PathBuf,
}

impl StoreDisk {
    /// Makes an empty file system of `bytes` in `file` and mounts it.
    ///
    /// # Errors
    /// A tool is missing, or this process may not mount.
    pub fn make(file: PathBuf, bytes: u64, mounted_at: PathBuf) -> Result<Self> {
        File::create(&file)
            .and_then(|file| file.set_len(bytes))
            .with_context(|| format!("cannot make {}", file.display()))?;
        // No room is kept for root, who would find some in a full file system.
        process::output(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&file))?;
        let disk = Self { file, mounted_at };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&self) -> Result<()> {
        let mut mount = Command::new("mount");
        process::output(mount.args(["-o", "loop"]).args([&self.file, &self.mounted_at])).map(drop)
    }

    /// Loses everything that is not on the device yet. Processes that use it are to be dead.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn cut_power(&self) -> Result<()> {
        let dir = File::open(&self.mounted_at)?;
        let how = NO_LOG_FLUSH;
        // SAFETY: the ioctl reads one u32, which lives over the call, and the descriptor is open.
        let done = unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN, &raw const how) };
        if done == -1 {
            return Err(std::io::Error::last_os_error()).context("cannot stop the file system");
        }
        Ok(())
    }

    /// Mounts it again, as after a boot: its log is replayed.
    ///
    /// # Errors
    /// Somebody uses it, or the kernel refuses.
    pub fn power_on(&self) -> Result<()> {
        process::output(Command::new("umount").arg(&self.mounted_at))?;
        self.mount()
    }

    /// Takes all room but so many bytes.
    ///
    /// # Errors
    /// There is less room than that already.
    pub fn fill(&self, but_bytes: u64) -> Result<()> {
        let path = self.mounted_at.join(FILLER);
        let mut filler = File::create(&path)?;
        for piece in [1 << 20, 4096, 1] {
            let zeros = vec![0u8; piece];
            while filler.write_all(&zeros).and_then(|()| filler.sync_data()).is_ok() {}
        }
        let bytes = filler.metadata()?.len();
        let left = bytes.checked_sub(but_bytes).context("there is less room")?;
        filler.set_len(left)?;
        filler.sync_all()?;
        Ok(())
    }

    /// Gives the room back.
    ///
    /// # Errors
    /// It was not taken.
    pub fn make_room(&self) -> Result<()> {
        let path: &Path = &self.mounted_at.join(FILLER);
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
    }
}
