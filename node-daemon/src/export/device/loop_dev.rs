//! Loop devices: set up over a file with direct I/O, verified, inspected and taken down.
//!
//! Constants and layouts follow the kernel's `include/uapi/linux/loop.h`.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time that a probe of udev may keep a device open, with much room.
const PROBED_WITHIN: Duration = Duration::from_secs(1);
/// Pause between looks whether it ended.
const PROBED_POLL: Duration = Duration::from_millis(20);

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4C04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Logical block size of the devices, in bytes.
pub(super) const BLOCK_BYTES: u32 = 4096;
/// Attempts to get a free device while others on the machine take them too.
const FREE_DEVICE_ATTEMPTS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        sizelimit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

/// A loop device, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LoopDevice(pub u32);

/// What became of an attempt to take a device down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cleared {
    /// It has no file any more.
    Yes,
    /// Somebody has it open; it goes on as before.
    Busy,
}

fn no_argument(fd: &File, request: libc::Ioctl) -> io::Result<libc::c_int> {
    // SAFETY: these requests take no argument, and the descriptor is open.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl LoopDevice {
    /// `/dev/loopN`.
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.0))
    }

    fn sys(self, entry: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}/{entry}", self.0))
    }

    fn open(self, write: bool) -> io::Result<File> {
        let file = File::options().read(true).write(write).open(self.path())?;
        if !file.metadata()?.file_type().is_block_device() {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                format!("{} is no device", self.path().display()),
            ));
        }
        Ok(file)
    }

    /// Major and minor number of the node.
    pub fn numbers(self) -> io::Result<(u32, u32)> {
        let rdev = fs::metadata(self.path())?.rdev();
        Ok((libc::major(rdev), libc::minor(rdev)))
    }

    /// Takes a free device and puts it on `file` with direct I/O and 4,096-byte blocks.
    ///
    /// # Errors
    /// The ioctl's, or `Other` with words if the kernel did not set up what was asked.
    pub fn configure(file: &File, shown_name: &str, read_only: bool) -> io::Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control")?;
        for _ in 0..FREE_DEVICE_ATTEMPTS {
            let number = no_argument(&control, LOOP_CTL_GET_FREE)?;
            let device = Self(number.cast_unsigned());
            let mut info = Info::EMPTY;
            info.flags = LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
            // The rest stays zero, so the name ends with one.
            let shown = &shown_name.as_bytes()[..shown_name.len().min(63)];
            info.file_name[..shown.len()].copy_from_slice(shown);
            let config = Config {
                fd: file.as_raw_fd().cast_unsigned(),
                block_size: BLOCK_BYTES,
                info,
                reserved: [0; 8],
            };
            let node = device.open(!read_only)?;
            // SAFETY: `config` has the kernel's layout (sizes asserted above), lives over the call and is only read.
            let result = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
            if result == 0 {
                drop(node);
                if let Err(wrong) = device.verify(read_only) {
                    // Nobody can have opened it yet who would be missed.
                    let _ = device.clear();
                    return Err(io::Error::other(wrong));
                }
                return Ok(device);
            }
            let error = io::Error::last_os_error();
            // Another process took the free device first.
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error);
            }
        }
        Err(io::Error::new(
            ErrorKind::WouldBlock,
            format!("every free loop device was taken by others, {FREE_DEVICE_ATTEMPTS} times in a row"),
        ))
    }

    fn status(self) -> io::Result<Info> {
        let node = self.open(false)?;
        let mut info = Info::EMPTY;
        // SAFETY: `info` has the kernel's layout, is writable and lives over the call.
        if unsafe { libc::ioctl(node.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(info)
    }

    fn setting(self, entry: &str) -> Result<String, String> {
        let path = self.sys(entry);
        fs::read_to_string(&path)
            .map(|text| text.trim().to_string())
            .map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Reads back what [`LoopDevice::configure`] asked for; older kernels ignore flags that they do not know.
    ///
    /// # Errors
    /// What differs, in words.
    pub fn verify(self, read_only: bool) -> Result<(), String> {
        let name = self.path();
        let name = name.display();
        let info = self
            .status()
            .map_err(|e| format!("{name}: reading its state back: {e}"))?;
        if info.flags & LO_FLAGS_DIRECT_IO == 0 {
            return Err(format!(
                "{name} does not use direct I/O (flags {:#x}); its reads would be cached twice",
                info.flags
            ));
        }
        if (info.flags & LO_FLAGS_READ_ONLY != 0) != read_only {
            return Err(format!(
                "{name} has flags {:#x}, read-only was to be {read_only}",
                info.flags
            ));
        }
        if info.flags & LO_FLAGS_AUTOCLEAR != 0 {
            return Err(format!(
                "{name} would vanish when its last user closes it (flags {:#x})",
                info.flags
            ));
        }
        for (entry, expected) in [("loop/dio", "1"), ("queue/logical_block_size", "4096")] {
            let found = self.setting(entry)?;
            if found != expected {
                return Err(format!("{name}: {entry} is {found}, not {expected}"));
            }
        }
        Ok(())
    }

    /// Size of the device in bytes.
    pub fn size_bytes(self) -> Result<u64, String> {
        let sectors = self.setting("size")?;
        sectors
            .parse::<u64>()
            .map(|s| s * 512)
            .map_err(|e| format!("size {sectors:?} of {self:?}: {e}"))
    }

    /// The path of the file that the device stands on, if it stands on one.
    pub fn backing_file(self) -> Option<PathBuf> {
        self.setting("loop/backing_file").ok().map(PathBuf::from)
    }

    /// Writes out what the kernel still caches above the device.
    pub fn sync(self) -> io::Result<()> {
        self.open(false)?.sync_all()
    }

    /// Takes the device down, unless somebody else has it open.
    pub fn clear(self) -> io::Result<Cleared> {
        let gone = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENOENT));
        let node = match self.open(false) {
            Ok(node) => node,
            Err(e) if gone(&e) => return Ok(Cleared::Yes),
            Err(e) => return Err(e),
        };
        match no_argument(&node, LOOP_CLR_FD) {
            Ok(_) => {}
            Err(e) if gone(&e) => return Ok(Cleared::Yes),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(Cleared::Busy),
            Err(e) => return Err(e),
        }
        // On a device that others have open the kernel only marks it to vanish later. That is not wanted: a refused
        // detach must leave everything as it was.
        let mut info = Info::EMPTY;
        // SAFETY: `info` has the kernel's layout, is writable and lives over the call.
        if unsafe { libc::ioctl(node.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) } != 0 {
            return Ok(Cleared::Yes);
        }
        if info.flags & LO_FLAGS_AUTOCLEAR == 0 {
            return Ok(Cleared::Yes); // somebody else already set it up anew
        }
        info.flags &= !LO_FLAGS_AUTOCLEAR;
        // SAFETY: as above, and the kernel only reads it.
        if unsafe { libc::ioctl(node.as_raw_fd(), LOOP_SET_STATUS64, &raw const info) } != 0 {
            let error = io::Error::last_os_error();
            return if gone(&error) { Ok(Cleared::Yes) } else { Err(error) };
        }
        Ok(Cleared::Busy)
    }

    /// As [`Self::clear`], and waits a little for whoever has it open: udev looks into every new device and into every
    /// device that was written to, for some milliseconds.
    pub fn clear_soon(self) -> io::Result<Cleared> {
        let began = Instant::now();
        loop {
            match self.clear()? {
                Cleared::Busy if began.elapsed() < PROBED_WITHIN => std::thread::sleep(PROBED_POLL),
                other => return Ok(other),
            }
        }
    }

    /// Clears the device even if it is open: it vanishes when the last user closes it.
    pub fn clear_when_unused(self) -> io::Result<()> {
        match self.open(false).and_then(|node| no_argument(&node, LOOP_CLR_FD)) {
            Err(e) if !matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => Err(e),
            _ => Ok(()),
        }
    }

    /// Who has the device open or mounted, for people: `qemu-system-x86 (pid 7)`, `mounted on /mnt`.
    pub fn users(self) -> Vec<String> {
        let mut users = Vec::new();
        let own = self.path();
        if let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") {
            let own = own.to_string_lossy();
            for line in mounts.lines() {
                let mut after = line.split(" - ");
                let point = after.next().and_then(|l| l.split(' ').nth(4));
                let source = after.next().and_then(|l| l.split(' ').nth(1));
                if let (Some(point), Some(source)) = (point, source)
                    && source == own
                {
                    users.push(format!("mounted on {point}"));
                }
            }
        }
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let open = fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == own));
            if open {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                users.push(format!("{} (pid {pid})", name.trim()));
            }
        }
        users
    }

    /// All loop devices that stand on a file below `root`.
    pub fn below(root: &Path) -> Vec<(Self, PathBuf)> {
        let mut found: Vec<_> = fs::read_dir("/sys/block")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok().map(Self))
            .filter_map(|device| Some((device, device.backing_file()?)))
            .filter(|(_, file)| file.starts_with(root))
            .collect();
        found.sort();
        found
    }
}
