//! A FUSE file with a loop device on top, set up, handed from one daemon to the next, and taken down.
//!
//! Order, and why: the connection is left with the holder only when the device is complete, and removed from it only
//! when the loop device is gone. So a daemon that dies anywhere in between leaves either a whole device, which the next
//! one takes over, or remains that [`super::stale`] finds, and never a device in use without a connection.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_protocol::{ImageId, ImageName};
use serde::{Deserialize, Serialize};

use super::loop_dev::{Cleared, LoopDevice};
use super::session::{self, Session, Threads};
use super::{Detach, DeviceError, DeviceExport, DeviceInfo, DeviceOptions, Waiting, stale};
use crate::disk::Disk;
use crate::export::fdstore::FdStore;

/// Entries of the holder that are kernel devices; the path of the mount point follows.
const ENTRY: &str = "device:";
/// Version of [`Note`].
const NOTE_VERSION: u32 = 1;

/// What is noted beside a connection in the holder: all that the next daemon must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    version: u32,
    name: ImageName,
    image: ImageId,
    size_bytes: u64,
    read_only: bool,
    loop_number: u32,
    /// The mount point.
    pub mount: PathBuf,
    link: PathBuf,
    can_resend: bool,
}

impl Note {
    fn entry(&self) -> String {
        entry(&self.mount)
    }
}

fn entry(mount: &Path) -> String {
    format!("{ENTRY}{}", mount.display())
}

/// A connection that an earlier daemon left behind.
pub(super) struct Held {
    pub note: Note,
    fuse: File,
}

impl Held {
    pub fn describe(&self) -> Waiting {
        let Note {
            name,
            image,
            size_bytes,
            read_only,
            ..
        } = self.note.clone();
        Waiting {
            name,
            image,
            size_bytes,
            read_only,
        }
    }

    /// Whether `disk` is what the users of the device had before.
    pub fn fits(&self, disk: &dyn Disk) -> bool {
        let note = &self.note;
        (note.image, note.size_bytes, note.read_only) == (disk.image(), disk.size_bytes(), disk.is_read_only())
            && note.can_resend
    }
}

/// Takes back all connections below `mount_root` whose devices still stand. Those that do not are dropped from the
/// holder, and [`stale::clean`] removes the rest.
pub(super) fn take_back(store: &FdStore, mount_root: &Path) -> Result<BTreeMap<ImageName, Held>, DeviceError> {
    let mut found = BTreeMap::new();
    // The trailing slash keeps `/run/a` from taking what is `/run/ab`'s.
    for name in store.list(&format!("{ENTRY}{}/", mount_root.display()))? {
        let Some(kept) = store.take(&name)? else { continue };
        match serde_json::from_str::<Note>(&kept.metadata) {
            Ok(note) if note.version == NOTE_VERSION && stands(&note) => {
                found.insert(
                    note.name.clone(),
                    Held {
                        note,
                        fuse: File::from(kept.fd),
                    },
                );
            }
            unusable => {
                tracing::warn!(
                    entry = name,
                    ?unusable,
                    "a kept connection has no device any more; dropping it"
                );
                store.remove(&name)?;
            }
        }
    }
    Ok(found)
}

fn stands(note: &Note) -> bool {
    LoopDevice(note.loop_number).backing_file().as_deref() == Some(&note.mount)
}

/// Removes a device that nobody serves; its users get errors.
pub(super) fn discard(held: Held, store: Option<&FdStore>) -> Result<(), DeviceError> {
    let Held { note, fuse } = held;
    if let Some(store) = store {
        store.remove(&note.entry())?;
    }
    // With the last copy of the descriptor the kernel ends the connection, and what waited on it fails.
    drop(fuse);
    stale::remove_loop(LoopDevice(note.loop_number))?;
    stale::remove_mount(&note.mount)?;
    stale::remove_link(&note.link)
}

/// One image's device. Its session lives in the threads that serve it, until the file is unmounted.
pub(super) struct FuseLoop {
    note: Note,
    disk: Arc<dyn Disk>,
    numbers: (u32, u32),
    store: Option<Arc<FdStore>>,
    /// Why the device does not survive the daemon, if so.
    why_not: Option<String>,
}

/// Undoes the steps of a set-up that failed half way.
struct Undo<'a> {
    mount: &'a Path,
    link: Option<&'a Path>,
    device: Option<LoopDevice>,
    armed: bool,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let undone = self
            .link
            .map_or(Ok(()), stale::remove_link)
            .and(self.device.map_or(Ok(()), stale::remove_loop))
            .and(stale::remove_mount(self.mount));
        if let Err(e) = undone {
            tracing::warn!("cleaning up after a failed attach: {e}");
        }
    }
}

impl FuseLoop {
    /// Sets a new device up.
    pub fn create(
        options: &DeviceOptions,
        name: &ImageName,
        disk: Arc<dyn Disk>,
        threads: Threads,
    ) -> Result<Self, DeviceError> {
        let mount = options.mount_root.join(name.project()).join(name.name());
        let link = options.link_root.join(name.project()).join(name.name());
        let read_only = disk.is_read_only();
        let size_bytes = disk.size_bytes();

        for path in [&mount, &link] {
            let parent = path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(parent).map_err(|e| DeviceError::step(format!("making {}", parent.display()), e))?;
        }
        File::options()
            .create(true)
            .append(true)
            .open(&mount)
            .map_err(|e| DeviceError::step(format!("making the mount point {}", mount.display()), e))?;
        let mut undo = Undo {
            mount: &mount,
            link: None,
            device: None,
            armed: true,
        };
        let fuse = session::mount_file(&mount, name.as_str(), read_only)
            .map_err(|e| DeviceError::step(format!("mounting {name} on {}", mount.display()), e))?;
        let agreed = session::negotiate(&fuse)
            .map_err(|e| DeviceError::step(format!("starting the FUSE connection of {name}"), e))?;
        let session = Session::new(fuse, Arc::clone(&disk), name.to_string(), threads);
        session
            .start()
            .map_err(|e| DeviceError::step(format!("starting the threads of {name}"), e))?;

        // From here on the kernel's requests are answered, so the file can be opened.
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(&mount)
            .map_err(|e| DeviceError::step(format!("opening {}", mount.display()), e))?;
        let device = LoopDevice::configure(&file, name.as_str(), read_only)
            .map_err(|e| DeviceError::step(format!("setting up a loop device on {}", mount.display()), e))?;
        undo.device = Some(device);
        drop(file);
        let device_size = device.size_bytes().map_err(DeviceError::Unverified)?;
        if device_size != size_bytes {
            return Err(DeviceError::Unverified(format!(
                "{} has {device_size} bytes, {name} has {size_bytes}",
                device.path().display()
            )));
        }
        let numbers = device
            .numbers()
            .map_err(|e| DeviceError::step(format!("looking at {}", device.path().display()), e))?;
        point_link(&link, &device.path())?;
        undo.link = Some(&link);

        let note = Note {
            version: NOTE_VERSION,
            name: name.clone(),
            image: disk.image(),
            size_bytes,
            read_only,
            loop_number: device.0,
            mount: mount.clone(),
            link: link.clone(),
            can_resend: agreed.can_resend,
        };
        let why_not = keep(&note, &session, options.fdstore.as_deref());
        undo.armed = false;
        drop(undo);
        let store = options.fdstore.clone();
        Ok(Self {
            note,
            disk,
            numbers,
            store,
            why_not,
        })
    }

    /// Goes on serving a device that an earlier daemon set up.
    pub fn take_over(
        held: Held,
        name: &ImageName,
        disk: Arc<dyn Disk>,
        threads: Threads,
        store: Option<Arc<FdStore>>,
    ) -> Result<Self, DeviceError> {
        let Held { note, fuse } = held;
        let device = LoopDevice(note.loop_number);
        let numbers = device
            .numbers()
            .map_err(|e| DeviceError::step(format!("looking at {}", device.path().display()), e))?;
        let session = Session::new(fuse, Arc::clone(&disk), name.to_string(), threads);
        session
            .resend()
            .map_err(|e| DeviceError::step(format!("asking for the open requests of {name} again"), e))?;
        session
            .start()
            .map_err(|e| DeviceError::step(format!("starting the threads of {name}"), e))?;
        point_link(&note.link, &device.path())?;
        Ok(Self {
            note,
            disk,
            numbers,
            store,
            why_not: None,
        })
    }

    fn device(&self) -> LoopDevice {
        LoopDevice(self.note.loop_number)
    }

    /// What is left to do once the loop device is gone; the first failure of all steps.
    fn remove_rest(&self) -> Result<(), DeviceError> {
        let flushed = if self.disk.is_read_only() {
            Ok(())
        } else {
            self.disk.flush()
        };
        let flushed = flushed.map_err(|source| DeviceError::Flush {
            image: self.note.name.clone(),
            source,
        });
        let dropped = match &self.store {
            Some(store) => store.remove(&self.note.entry()).map_err(DeviceError::from),
            None => Ok(()),
        };
        let unmounted = stale::remove_mount(&self.note.mount);
        let unlinked = stale::remove_link(&self.note.link);
        flushed.and(dropped).and(unmounted).and(unlinked)
    }
}

/// Leaves the connection with the holder; says why the device does not survive the daemon, if so.
fn keep(note: &Note, session: &Session, store: Option<&FdStore>) -> Option<String> {
    let Some(store) = store else {
        return Some("no descriptor holder is configured for this daemon".into());
    };
    if !note.can_resend {
        return Some("this kernel cannot send requests again (FUSE_NOTIFY_RESEND needs Linux 6.9)".into());
    }
    let metadata = serde_json::to_string(note).expect("a note is plain data");
    store
        .store(&note.entry(), session.fuse().as_fd(), &metadata)
        .err()
        .map(|e| e.to_string())
}

/// Makes `link` point to `device`, at once also where it existed before.
fn point_link(link: &Path, device: &Path) -> Result<(), DeviceError> {
    if fs::read_link(link).is_ok_and(|target| target == device) {
        return Ok(());
    }
    // Image names have no "..", so this name is nobody's image.
    let next = link.with_file_name(format!("..{}", link.file_name().unwrap_or_default().display()));
    let made = match fs::remove_file(&next) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => std::os::unix::fs::symlink(device, &next),
    };
    made.and_then(|()| fs::rename(&next, link))
        .map_err(|e| DeviceError::step(format!("linking {} to {}", link.display(), device.display()), e))
}

impl DeviceExport for FuseLoop {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            path: self.note.link.clone(),
            node: self.device().path(),
            major: self.numbers.0,
            minor: self.numbers.1,
            survives_restart: self.why_not.is_none(),
            why_not: self.why_not.clone(),
        }
    }

    fn detach(&self) -> Detach {
        let device = self.device();
        let node = device.path();
        // A disk that takes no more writes fails here and must still be detachable: that is how it is repaired.
        let synced = device
            .sync()
            .map_err(|e| DeviceError::step(format!("writing {} out", node.display()), e));
        match device.clear_soon() {
            Ok(Cleared::Yes) => Detach::Gone(self.remove_rest().and(synced)),
            Ok(Cleared::Busy) => {
                let users = device.users();
                let users = if users.is_empty() {
                    "another process".into()
                } else {
                    users.join(", ")
                };
                Detach::Refused(DeviceError::Busy { device: node, users })
            }
            Err(e) => Detach::Refused(DeviceError::step(
                format!("removing the loop device {}", node.display()),
                e,
            )),
        }
    }
}
