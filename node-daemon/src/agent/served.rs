//! The images that this node serves now, as the NBD server looks them up, and the list that survives a restart.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use hearth_probes::export::ExportCounter;
use hearth_protocol::rpc::ExportKind;
use hearth_protocol::{Epoch, ImageId, ImageName, LayerId, LeaseId};
use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::export::device::DeviceInfo;
use crate::export::nbd::{self, ExportEntry, ExportName, ExportTable, PeerDoor};
use crate::peer::Links;
use crate::store::fault::Faults;
use crate::store::os::{read_note, replace_note};
use crate::volume::Volume;

/// One image in service.
#[derive(Clone)]
pub struct Served {
    /// Its name.
    pub name: ImageName,
    /// The lease under which it is served.
    pub lease: LeaseId,
    /// The epoch of the lease.
    pub epoch: Epoch,
    /// This node's blocks of it.
    pub volume: Arc<Volume>,
    /// What is behind its exports: the volume or, of an image with replicas, all of them.
    pub disk: Arc<dyn Disk>,
    /// Counts what comes over NBD.
    pub counter: Arc<ExportCounter>,
    /// How it is exported.
    pub export: ExportKind,
    /// The kernel device, if there is one.
    pub device: Option<DeviceInfo>,
    /// Another node owns it still, and is to hand it over.
    pub incoming: bool,
}

/// One line of the list that survives a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Which image.
    pub image: ImageId,
    /// The epoch under which it was served.
    pub epoch: Epoch,
    /// The lease of the epoch.
    pub lease: LeaseId,
    /// How it was exported.
    pub export: ExportKind,
}

/// Opens a sealed layer as a disk.
pub type SealedLayers = dyn Fn(LayerId) -> Option<Arc<dyn Disk>> + Send + Sync;

/// The images in service. An image is kept in the list before it is served, and leaves it after its service ended.
pub struct ServedImages {
    images: RwLock<BTreeMap<ImageId, Served>>,
    sealed: Box<SealedLayers>,
    links: Arc<Links>,
    list: PathBuf,
    faults: Faults,
}

impl ServedImages {
    /// No images yet; `list` is the file that survives a restart.
    pub fn new(list: PathBuf, sealed: Box<SealedLayers>, links: Arc<Links>, faults: Faults) -> Self {
        Self {
            images: RwLock::default(),
            sealed,
            links,
            list,
            faults,
        }
    }

    /// What was served when the last process ended.
    ///
    /// # Errors
    /// When the list cannot be read or is damaged.
    pub fn kept(&self) -> io::Result<Vec<Kept>> {
        let fix = "remove it, and attach the images again with hearth image attach";
        Ok(read_note(&self.list, fix)?.unwrap_or_default())
    }

    /// Remembers durably what is to be served after a restart.
    ///
    /// # Errors
    /// The file system's.
    pub fn keep(&self, kept: &[Kept]) -> io::Result<()> {
        replace_note(&self.list, &serde_json::to_vec_pretty(kept)?, &self.faults)
    }

    /// Adds an image.
    pub fn insert(&self, image: ImageId, served: Served) {
        self.images.write().expect("served lock").insert(image, served);
    }

    /// Sets or clears an image's device.
    pub fn set_device(&self, image: ImageId, device: Option<DeviceInfo>) {
        if let Some(served) = self.images.write().expect("served lock").get_mut(&image) {
            served.device = device;
        }
    }

    /// This node owns an image under another lease than when its service began.
    pub fn set_lease(&self, image: ImageId, epoch: Epoch, lease: LeaseId) {
        if let Some(served) = self.images.write().expect("served lock").get_mut(&image) {
            (served.epoch, served.lease, served.incoming) = (epoch, lease, false);
        }
    }

    /// Takes an image out.
    pub fn remove(&self, image: ImageId) -> Option<Served> {
        self.images.write().expect("served lock").remove(&image)
    }

    /// One image.
    pub fn get(&self, image: ImageId) -> Option<Served> {
        self.images.read().expect("served lock").get(&image).cloned()
    }

    /// All of them, ascending by id.
    pub fn all(&self) -> Vec<(ImageId, Served)> {
        self.images
            .read()
            .expect("served lock")
            .iter()
            .map(|(id, s)| (*id, s.clone()))
            .collect()
    }

    fn entry(served: &Served) -> ExportEntry {
        ExportEntry::new(served.disk.clone())
            .counted(served.counter.clone())
            .described(format!("image {} at epoch {}", served.name, served.epoch))
    }
}

impl ExportTable for ServedImages {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        let images = self.images.read().expect("served lock");
        match name.parse().ok()? {
            ExportName::Image(name) => images.values().find(|s| s.name == name).map(Self::entry),
            ExportName::Id(id) => {
                if let Some(served) = images.get(&ImageId(id)) {
                    return Some(Self::entry(served));
                }
                drop(images);
                let disk = (self.sealed)(LayerId(id))?;
                Some(
                    ExportEntry::new(disk)
                        .described("a sealed layer and what is below it")
                        .read_only(),
                )
            }
            // Members are written and read by nodes, which do not speak NBD to each other (docs/adr/0008).
            ExportName::MemberWrite { .. } | ExportName::MemberRead { .. } => None,
        }
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        let images = self.images.read().expect("served lock");
        nbd::page(images.values().map(|s| s.name.to_string()), after, max)
    }

    fn peers(&self) -> Option<&dyn PeerDoor> {
        Some(&*self.links)
    }
}
