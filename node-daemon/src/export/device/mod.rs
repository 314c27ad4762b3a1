//! The kernel device export: an image as a block device `/dev/hearth/<project>/<image>`.
//!
//! Here the device is a FUSE file with a direct-I/O loop device on top, which works on every kernel; ublk fits behind
//! [`DeviceExport`] beside it. Requests go: guest → loop device (the probes count here) → FUSE → [`Disk`].
//!
//! With an [`FdStore`] the connection to the kernel is kept outside the daemon. When the daemon dies, the device stays
//! and its users wait; the next daemon takes the connection over, and the kernel sends again what was not answered
//! (Linux 6.9 and later). [`DeviceInfo::survives_restart`] says whether that holds.
//!
//! This module is not the place for choices about data: it calls [`Disk`] and translates errors.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hearth_protocol::{ImageId, ImageName};

use self::fuse_loop::{FuseLoop, Held};
use super::fdstore::{FdStore, FdStoreError};
use crate::disk::{Disk, DiskError};

mod fuse_loop;
mod loop_dev;
mod process;
mod session;
mod stale;
mod wire;

pub use process::prepare_process;

/// Why a device could not be had, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Something on this machine is missing.
    #[error("no kernel devices on this machine: {0}")]
    Unavailable(String),
    /// The image has one already.
    #[error("{image} already has the device {path}; detach it first")]
    Attached {
        /// The image.
        image: ImageName,
        /// Its device.
        path: PathBuf,
    },
    /// The image has none.
    #[error("{0} has no kernel device on this node")]
    NotAttached(ImageName),
    /// Somebody has the device open.
    #[error("{device} is in use by {users}; stop the guest or unmount it, then detach again")]
    Busy {
        /// The device.
        device: PathBuf,
        /// Who, in words.
        users: String,
    },
    /// A step of setting up or taking down failed.
    #[error("{what}: {source}")]
    Step {
        /// What was attempted, on what.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The kernel set up something else than was asked.
    #[error("the kernel did not set the device up as asked: {0}")]
    Unverified(String),
    /// The disk failed while the device was taken down.
    #[error("flushing {image} before its device is removed: {source}")]
    Flush {
        /// The image.
        image: ImageName,
        /// The disk's error.
        #[source]
        source: DiskError,
    },
    /// The descriptor holder failed.
    #[error(transparent)]
    FdStore(#[from] FdStoreError),
}

impl DeviceError {
    fn step(what: impl Into<String>, source: io::Error) -> Self {
        DeviceError::Step {
            what: what.into(),
            source,
        }
    }
}

/// What a kernel device is to the rest of the daemon, whatever it is made of.
pub trait DeviceExport: Send + Sync {
    /// The device as its users and the probes see it.
    fn info(&self) -> DeviceInfo;

    /// Writes everything out and removes the device.
    fn detach(&self) -> Detach;
}

/// How an attempt to remove a device ended.
#[derive(Debug)]
pub enum Detach {
    /// The device is gone. An error says that something was not written out or not tidied up.
    Gone(Result<(), DeviceError>),
    /// The device is in service as before.
    Refused(DeviceError),
}

/// Where a device is and what it can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The stable path, a link to the device node.
    pub path: PathBuf,
    /// The device node.
    pub node: PathBuf,
    /// Major number, for the probes.
    pub major: u32,
    /// Minor number, for the probes.
    pub minor: u32,
    /// Whether users of the device only wait, and see no error, when the daemon dies and is started again.
    pub survives_restart: bool,
    /// If not: why not.
    pub why_not: Option<String>,
}

/// Where devices go and how they are served.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Directory of the links `<project>/<image>`, `/dev/hearth` unless several daemons share a machine.
    pub link_root: PathBuf,
    /// Directory of the mount points, owned by this daemon alone: what it finds there at start it cleans up.
    pub mount_root: PathBuf,
    /// Threads per image that read requests at the same time. 0: half the processors, 2 to 4.
    pub readers: usize,
    /// Threads per image, hence requests that wait for a disk at the same time. 0: 64.
    pub threads_max: usize,
    /// Keeps connections over a restart; without it devices fail when the daemon dies.
    pub fdstore: Option<Arc<FdStore>>,
}

impl DeviceOptions {
    /// Options with the usual number of threads and nothing kept over a restart.
    pub fn new(link_root: impl Into<PathBuf>, mount_root: impl Into<PathBuf>) -> Self {
        Self {
            link_root: link_root.into(),
            mount_root: mount_root.into(),
            readers: 0,
            threads_max: 0,
            fdstore: None,
        }
    }

    fn threads(&self) -> session::Threads {
        let readers = match self.readers {
            0 => (std::thread::available_parallelism().map_or(1, usize::from) / 2).clamp(2, 4),
            n => n,
        };
        let max = if self.threads_max == 0 { 64 } else { self.threads_max };
        session::Threads {
            readers,
            max: max.max(readers),
        }
    }
}

/// A device that an earlier daemon left in service and that nobody serves at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// The image's name.
    pub name: ImageName,
    /// The image.
    pub image: ImageId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether it is read-only.
    pub read_only: bool,
}

/// All kernel devices of this daemon.
pub struct DeviceExports {
    options: DeviceOptions,
    /// Held over every attach and detach: they are rare, and two at a time would race for names.
    state: Mutex<State>,
}

struct State {
    attached: BTreeMap<ImageName, Arc<dyn DeviceExport>>,
    waiting: BTreeMap<ImageName, Held>,
}

impl DeviceExports {
    /// Says whether this process can make kernel devices, or what is missing.
    ///
    /// # Errors
    /// What is missing and what to do, in words.
    pub fn available() -> Result<(), String> {
        let can = |path: &str, module: &str| {
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .map(drop)
                .map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => format!("{path} does not exist; run: modprobe {module}"),
                    _ => format!("{path}: {e}; run the daemon as root, or serve images over NBD only"),
                })
        };
        can("/dev/fuse", "fuse")?;
        can("/dev/loop-control", "loop")?;
        const CAP_SYS_ADMIN: u32 = 21;
        let status = fs::read_to_string("/proc/self/status").map_err(|e| format!("/proc/self/status: {e}"))?;
        let effective = status
            .lines()
            .find_map(|l| l.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
            .unwrap_or(0);
        if effective & 1 << CAP_SYS_ADMIN == 0 {
            return Err(
                "CAP_SYS_ADMIN is missing, which mounting needs; run the daemon as root, or serve images \
                        over NBD only"
                    .into(),
            );
        }
        Ok(())
    }

    /// Takes over what an earlier daemon left with the holder (see [`DeviceExports::waiting`]) and cleans up what it
    /// left otherwise below the two roots.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], or what could not be cleaned up.
    pub fn new(options: DeviceOptions) -> Result<Self, DeviceError> {
        Self::available().map_err(DeviceError::Unavailable)?;
        for root in [&options.link_root, &options.mount_root] {
            fs::create_dir_all(root).map_err(|e| DeviceError::step(format!("making {}", root.display()), e))?;
        }
        // As the kernel will name the files on it.
        let canonical = |path: &Path| {
            path.canonicalize()
                .map_err(|e| DeviceError::step(format!("looking at {}", path.display()), e))
        };
        let options = DeviceOptions {
            link_root: canonical(&options.link_root)?,
            mount_root: canonical(&options.mount_root)?,
            ..options
        };
        let waiting = match &options.fdstore {
            Some(store) => fuse_loop::take_back(store, &options.mount_root)?,
            None => BTreeMap::new(),
        };
        let kept: Vec<PathBuf> = waiting.values().map(|held| held.note.mount.clone()).collect();
        stale::clean(&options.mount_root, &options.link_root, &kept)?;
        Ok(Self {
            options,
            state: Mutex::new(State {
                attached: BTreeMap::new(),
                waiting,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Entries are added and removed in single steps.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Devices that an earlier daemon left in service: their users wait until [`DeviceExports::attach`] is called for
    /// them, or [`DeviceExports::give_up_waiting`].
    pub fn waiting(&self) -> Vec<Waiting> {
        self.state().waiting.values().map(Held::describe).collect()
    }

    /// Serves `disk` as the kernel device of `name`. If an earlier daemon left that device in service, takes it over.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left behind.
    pub fn attach(&self, name: &ImageName, disk: Arc<dyn Disk>) -> Result<DeviceInfo, DeviceError> {
        let mut state = self.state();
        if let Some(device) = state.attached.get(name) {
            return Err(DeviceError::Attached {
                image: name.clone(),
                path: device.info().path,
            });
        }
        let threads = self.options.threads();
        let device = match state.waiting.remove(name) {
            Some(held) if held.fits(&*disk) => {
                FuseLoop::take_over(held, name, disk, threads, self.options.fdstore.clone())?
            }
            other => {
                if let Some(held) = other {
                    tracing::warn!(image = %name, "the device left by an earlier daemon is of another image; removing it");
                    fuse_loop::discard(held, self.options.fdstore.as_deref())?;
                }
                FuseLoop::create(&self.options, name, disk, threads)?
            }
        };
        let info = device.info();
        state.attached.insert(name.clone(), Arc::new(device));
        Ok(info)
    }

    /// Writes everything out and removes the image's device.
    ///
    /// # Errors
    /// [`DeviceError::Busy`] if somebody has it open: it then stays in service. After [`DeviceError::Flush`] the
    /// device is gone and the disk's own error says what was lost.
    pub fn detach(&self, name: &ImageName) -> Result<(), DeviceError> {
        let mut state = self.state();
        let device = state
            .attached
            .get(name)
            .ok_or_else(|| DeviceError::NotAttached(name.clone()))?;
        match device.detach() {
            Detach::Refused(error) => Err(error),
            Detach::Gone(result) => {
                state.attached.remove(name);
                result
            }
        }
    }

    /// The device of an attached image.
    pub fn info(&self, name: &ImageName) -> Option<DeviceInfo> {
        self.state().attached.get(name).map(|device| device.info())
    }

    /// All devices in service.
    pub fn list(&self) -> Vec<(ImageName, DeviceInfo)> {
        self.state()
            .attached
            .iter()
            .map(|(name, device)| (name.clone(), device.info()))
            .collect()
    }

    /// Removes the devices of [`DeviceExports::waiting`], whose users get I/O errors. To be called once every image
    /// that this node serves is attached again.
    ///
    /// # Errors
    /// The first that could not be removed; the others are removed all the same.
    pub fn give_up_waiting(&self) -> Result<Vec<ImageName>, DeviceError> {
        let waiting = std::mem::take(&mut self.state().waiting);
        let mut names = Vec::new();
        let mut failed = None;
        for (name, held) in waiting {
            match fuse_loop::discard(held, self.options.fdstore.as_deref()) {
                Ok(()) => names.push(name),
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        failed.map_or(Ok(names), Err)
    }
}
