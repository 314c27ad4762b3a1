//! Block devices made for one test and gone after it.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hearth_probes::testing::Target;
use nix::fcntl::{Flock, FlockArg};
use tempfile::NamedTempFile;

/// One zram device at a time on a machine: they share its memory.
const ZRAM_LOCK: &str = "/tmp/hearth-zram.lock";

/// What removes the device again.
enum Undo {
    Zram { number: String, _lock: Flock<File> },
    Loop { _backing: NamedTempFile },
}

/// An open block device of the test's own.
pub struct Device {
    /// Under `/dev`.
    pub path: PathBuf,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
    /// Its size in bytes.
    pub size: u64,
    /// `None` only while the device is being removed.
    file: Option<Flock<File>>,
    undo: Undo,
}

impl Device {
    fn open(path: PathBuf, size: u64, undo: Undo) -> Result<Self> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path);
        let file = opened.with_context(|| format!("open {}", path.display()))?;
        let number = file.metadata()?.rdev();
        let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        Ok(Self {
            path,
            major: libc::major(number),
            minor: libc::minor(number),
            size,
            file: Some(file),
            undo,
        })
    }

    /// Open for direct reads and writes; locked, so that udev does not look into it.
    pub fn file(&self) -> &File {
        self.file.as_ref().expect("the device is in use")
    }

    /// As the comparison wants it.
    pub fn target(&self) -> Target<'_> {
        Target {
            file: self.file(),
            size_bytes: self.size,
            major: self.major,
            minor: self.minor,
        }
    }

    /// A new zram device.
    pub fn zram(size: u64) -> Result<Self> {
        let lock = File::create(ZRAM_LOCK).context(ZRAM_LOCK)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").context("adding a zram device")?;
        let number = number.trim().to_string();
        let undo = Undo::Zram {
            number: number.clone(),
            _lock: lock,
        };
        let sized = fs::write(format!("/sys/block/zram{number}/disksize"), size.to_string());
        let device = sized.map(|()| format!("/dev/zram{number}").into());
        match device {
            Ok(path) => Self::open(path, size, undo),
            Err(error) => {
                remove(&undo, Path::new(""));
                Err(error.into())
            }
        }
    }

    /// A new loop device over a file in memory.
    pub fn loop_over_tmpfs(size: u64) -> Result<Self> {
        let backing = NamedTempFile::with_prefix_in("hearth-probes-", "/dev/shm").context("a file in /dev/shm")?;
        backing.as_file().set_len(size)?;
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(backing.path())
            .output();
        let made = made.context("run losetup, from util-linux")?;
        ensure!(
            made.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let path = PathBuf::from(String::from_utf8(made.stdout)?.trim());
        Self::open(path, size, Undo::Loop { _backing: backing })
    }

    /// Has requests split into parts of at most this size.
    pub fn split_at(&self, bytes: u64) -> Result<()> {
        let name = self.path.file_name().context("a device has a name")?.to_string_lossy();
        let setting = format!("/sys/block/{name}/queue/max_sectors_kb");
        fs::write(&setting, (bytes >> 10).to_string()).context(setting)
    }

    /// Trims or zeroes a range.
    pub fn range_ioctl(&self, request: libc::c_ulong, offset: u64, length: u64) -> Result<()> {
        let range = [offset, length];
        // SAFETY: both requests read two u64 from the address.
        let result = unsafe { libc::ioctl(self.file().as_raw_fd(), request, range.as_ptr()) };
        ensure!(result == 0, "ioctl {request:#x}: {}", std::io::Error::last_os_error());
        Ok(())
    }
}

/// `BLKDISCARD`, `include/uapi/linux/fs.h`.
pub const BLKDISCARD: libc::c_ulong = 0x1277;
/// `BLKZEROOUT`.
pub const BLKZEROOUT: libc::c_ulong = 0x127f;

fn remove(undo: &Undo, path: &Path) {
    match undo {
        Undo::Zram { number, .. } => {
            let _ = fs::write("/sys/class/zram-control/hot_remove", number);
        }
        Undo::Loop { .. } => drop(Command::new("losetup").arg("--detach").arg(path).status()),
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device that is open cannot be removed.
        self.file = None;
        remove(&self.undo, &self.path);
    }
}
