//! The local replicas: one directory per node, in it images (small metadata) and layers (sparse data files).
//!
//! ```text
//! lock                       held while a daemon has the store open
//! images/<image-id>/meta     name, size, stack, record, storage incarnation, clean mark
//! layers/<layer-id>/meta     size and block size
//! layers/<layer-id>/data     the blocks, sparse, read and written past the page cache
//! layers/<layer-id>/bitmap   which blocks the layer holds; names the journal that continues it
//! layers/<layer-id>/journal-<generation>
//! layers/<layer-id>/doubt    only after a failed sync, until the image is opened anew
//! ```
//!
//! An image exists when its metadata file does: that rename is the commit point of create, import, clone and
//! snapshot. Layers that no image's stack names are left over from a crash and removed when the store is opened.
//! docs/adr/0002 has the reasons for the order of writes.

mod blockmap;
pub mod direct;
mod doubt;
mod error;
pub mod fault;
mod image;
mod import;
pub mod incarnation;
mod journal;
mod layer;
mod layer_meta;
pub mod os;
pub mod sealed_file;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use hearth_protocol::{Epoch, ImageId, ImageName, Incarnation, LayerId, LeaseId, SetVersion};

pub use blockmap::{BlockMap, BlockState};
pub use doubt::Closed;
pub use error::StoreError;
pub(crate) use error::disk_io;
pub use image::{IMAGE_META, ImageMeta, LocationRun, Parent, Record, Snapshot};
pub use journal::{Record as JournalRecord, Trust, encode as encode_record, records};
pub use layer::{Layer, Recovery};
pub use layer_meta::{BITMAP, LAYER_META, LayerMeta, apply, decode_bitmap};

use fault::{Faults, Site};
use os::StoreFile;

use crate::mutants;

/// How to open a store.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// Replaces the storage incarnation; for tests that play a power loss.
    pub incarnation: Option<Incarnation>,
    /// Fault injection; for tests.
    pub faults: Faults,
}

/// An open store. One per node daemon.
pub struct Store {
    root: PathBuf,
    incarnation: Incarnation,
    faults: Faults,
    state: Mutex<State>,
    _lock: StoreFile,
}

#[derive(Default)]
struct State {
    images: BTreeMap<ImageId, ImageMeta>,
    /// Images whose metadata file is damaged.
    damaged: BTreeSet<ImageId>,
    attached: HashSet<ImageId>,
    /// Names of imports that run.
    reserved: HashSet<ImageName>,
    open: HashMap<LayerId, Weak<Layer>>,
}

/// One place in an image's stack.
#[derive(Clone)]
pub enum LayerRef {
    /// This node holds it.
    Local(Arc<Layer>),
    /// Another node holds it, sealed, with everything below it.
    Remote(LayerId),
}

impl LayerRef {
    /// The layer's id.
    pub fn id(&self) -> LayerId {
        match self {
            LayerRef::Local(layer) => layer.id(),
            LayerRef::Remote(id) => *id,
        }
    }
}

/// An image opened for serving.
pub struct Opened {
    /// Its metadata, as now on disk.
    pub meta: ImageMeta,
    /// The layer that takes writes.
    pub top: Arc<Layer>,
    /// What lies below, upper first.
    pub below: Vec<LayerRef>,
    /// What a crash left to do, `None` after a clean detach.
    pub recovery: Option<Recovery>,
}

impl Store {
    /// Opens the store in `dir`, creating it if there is none, and removes what a crash left over.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while another process has it open; [`StoreError`].
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        for sub in ["images", "layers"] {
            let path = dir.join(sub);
            os::create_dir_all(Site::StoreDirCreate, &path, &options.faults)
                .map_err(StoreError::at("create", &path))?;
        }
        sealed_file::sync_dir(Site::StoreDirSync, dir, &options.faults)?;
        let path = dir.join("lock");
        let lock =
            StoreFile::create(Site::LockCreate, &path, 0, &options.faults).map_err(StoreError::at("create", &path))?;
        match lock.file().try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::InUse(dir.to_owned())),
            Err(TryLockError::Error(err)) => return Err(StoreError::at("lock", &path)(err)),
        }
        let incarnation = match options.incarnation {
            Some(given) => given,
            None => incarnation::of_directory(&File::open(dir).map_err(StoreError::at("open", dir))?)
                .map_err(|err| StoreError::io("cannot learn the storage incarnation; mount /proc", err))?,
        };
        let store = Self {
            root: dir.to_owned(),
            incarnation,
            faults: options.faults,
            state: Mutex::default(),
            _lock: lock,
        };
        store.load_images()?;
        store.remove_left_over_layers()?;
        Ok(store)
    }

    fn load_images(&self) -> Result<(), StoreError> {
        let dir = self.root.join("images");
        let mut state = self.state();
        for name in entries(&dir)? {
            let path = dir.join(&name).join("meta");
            let Ok(id) = name.parse::<ImageId>() else {
                tracing::warn!(path = %dir.join(&name).display(), "is no image; left alone");
                continue;
            };
            if !path.exists() {
                // A creation that did not reach its commit point, or a deletion that did.
                let path = dir.join(&name);
                os::remove_dir_all(Site::ImageDirRemove, &path, &self.faults)
                    .map_err(StoreError::at("remove", &path))?;
                continue;
            }
            match self.read_image(id) {
                Ok(meta) => {
                    state.images.insert(id, meta);
                }
                // The others are served all the same.
                Err(err @ StoreError::Damaged { .. }) => {
                    tracing::error!(image = %id, "{err}");
                    state.damaged.insert(id);
                }
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    fn read_image(&self, id: ImageId) -> Result<ImageMeta, StoreError> {
        let path = self.image_dir(id).join("meta");
        let meta = ImageMeta::read(&path)?;
        if meta.id != id {
            return Err(StoreError::Damaged {
                path,
                why: format!("it belongs to image {}", meta.id),
            });
        }
        Ok(meta)
    }

    /// Images whose metadata file is damaged, with what is wrong. Each is looked at again: one that was restored
    /// meanwhile is an image again.
    pub fn damaged(&self) -> Vec<(ImageId, StoreError)> {
        let ids: Vec<_> = self.state().damaged.iter().copied().collect();
        let look = |id| self.image(id).err().map(|err| (id, err));
        ids.into_iter().filter_map(look).collect()
    }

    fn remove_left_over_layers(&self) -> Result<(), StoreError> {
        if !self.state().damaged.is_empty() {
            tracing::warn!("layers that no image uses are kept: a damaged image may use them");
            return Ok(());
        }
        let used: HashSet<LayerId> = self.state().images.values().flat_map(|i| i.stack.clone()).collect();
        for name in entries(&self.root.join("layers"))? {
            match name.parse::<LayerId>() {
                Ok(id) if used.contains(&id) => {}
                Ok(id) => {
                    tracing::info!(layer = %id, "removing a layer that no image uses");
                    self.remove_layer(id)?;
                }
                Err(_) => tracing::warn!(name, "in the layers directory is no layer; left alone"),
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("store state lock")
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The storage incarnation under which it was opened.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }

    fn layer_dir(&self, id: LayerId) -> PathBuf {
        self.root.join("layers").join(id.to_string())
    }

    /// All images, ascending by id.
    pub fn images(&self) -> Vec<ImageMeta> {
        self.state().images.values().cloned().collect()
    }

    /// The image of that id.
    ///
    /// # Errors
    /// [`StoreError::NoImage`]; [`StoreError::Damaged`] as long as its metadata file is.
    pub fn image(&self, id: ImageId) -> Result<ImageMeta, StoreError> {
        let mut state = self.state();
        if state.damaged.contains(&id) {
            let meta = self.read_image(id)?;
            tracing::info!(image = %meta.name, "a damaged image was restored");
            state.damaged.remove(&id);
            state.images.insert(id, meta);
        }
        state.images.get(&id).cloned().ok_or_else(|| StoreError::no_image(id))
    }

    /// The image of that name.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn find(&self, name: &ImageName) -> Result<ImageMeta, StoreError> {
        self.state()
            .images
            .values()
            .find(|i| &i.name == name)
            .cloned()
            .ok_or_else(|| StoreError::NoImage(name.to_string()))
    }

    /// Bytes that the image's top layer takes up on disk.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn allocated(&self, id: ImageId) -> Result<u64, StoreError> {
        layer::allocated(&self.layer_dir(self.image(id)?.top()))
    }

    /// Sealed layers that this store holds, ascending: those below the top of some image.
    pub fn sealed_layers(&self) -> Vec<LayerId> {
        let mut layers: Vec<_> = self
            .state()
            .images
            .values()
            .flat_map(|i| i.stack[1..].to_vec())
            .collect();
        layers.sort_unstable();
        layers.dedup();
        layers.retain(|id| self.layer_dir(*id).exists());
        layers
    }

    /// Bytes that a layer takes up on disk.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn layer_allocated(&self, id: LayerId) -> Result<u64, StoreError> {
        layer::allocated(&self.layer_dir(id))
    }

    /// A sealed layer with everything below it, as an image's stack has it: upper first. The image's own top is no
    /// sealed layer.
    ///
    /// # Errors
    /// [`StoreError::NoLayer`].
    pub fn sealed_stack(&self, id: LayerId) -> Result<(ImageMeta, Vec<LayerRef>), StoreError> {
        let found = self.state().images.values().find_map(|image| {
            let at = image.stack[1..].iter().position(|layer| *layer == id)?;
            Some((image.clone(), image.stack[1 + at..].to_vec()))
        });
        let (image, stack) = found.ok_or(StoreError::NoLayer(id))?;
        if !self.layer_dir(id).exists() {
            return Err(StoreError::NoLayer(id));
        }
        let refs = stack
            .into_iter()
            .map(|id| self.layer_ref(id))
            .collect::<Result<_, _>>()?;
        Ok((image, refs))
    }

    /// A sealed layer by id, opened once and shared.
    fn layer_ref(&self, id: LayerId) -> Result<LayerRef, StoreError> {
        let mut state = self.state();
        if let Some(layer) = state.open.get(&id).and_then(Weak::upgrade) {
            return Ok(LayerRef::Local(layer));
        }
        let dir = self.layer_dir(id);
        if !dir.exists() {
            return Ok(LayerRef::Remote(id));
        }
        let layer = Arc::new(Layer::open_sealed(&dir, &self.faults)?);
        state.open.insert(id, Arc::downgrade(&layer));
        Ok(LayerRef::Local(layer))
    }

    /// Opens an image for writing under an epoch and lease, after bringing its top layer back from a crash if needed.
    ///
    /// # Errors
    /// [`StoreError::Attached`]; [`StoreError::Unfit`] if the record has a higher epoch, or this one under another
    /// lease; [`StoreError`].
    pub fn open_image(
        &self,
        id: ImageId,
        epoch: Epoch,
        lease: LeaseId,
        set_version: SetVersion,
    ) -> Result<Opened, StoreError> {
        let mut meta = {
            let meta = self.image(id)?;
            let mut state = self.state();
            let known = &meta.record;
            if epoch < known.epoch || (epoch == known.epoch && known.lease.is_some_and(|l| l != lease)) {
                return Err(StoreError::Unfit(format!(
                    "image {} was opened under epoch {} already, so epoch {epoch} cannot open it: attach it anew",
                    meta.name, known.epoch
                )));
            }
            if !state.attached.insert(id) {
                return Err(StoreError::Attached(meta.name.to_string()));
            }
            meta
        };
        let open = || {
            let below = meta.stack[1..]
                .iter()
                .map(|id| self.layer_ref(*id))
                .collect::<Result<Vec<_>, _>>()?;
            if let (Some(closed), true) = (self.closed(&meta)?, meta.record.epoch == epoch) {
                // The daemon died and serves again under the same lease: that repairs nothing.
                let (layer, recovery) =
                    Layer::open_closed(&self.layer_dir(meta.top()), self.kept(&meta), closed, &self.faults)?;
                return Ok(Opened {
                    top: self.remember(layer),
                    meta,
                    below,
                    recovery: Some(recovery),
                });
            }
            let (top, recovery) = self.open_top(&meta)?;
            meta.record.epoch = epoch;
            meta.record.lease = Some(lease);
            meta.record.set_version = set_version;
            meta.clean = false;
            meta.closed = None;
            meta.storage_incarnation = Some(self.incarnation);
            self.put_image(&meta)?;
            doubt::remove(&self.layer_dir(meta.top()), &self.faults)?;
            Ok(Opened {
                meta,
                top,
                below,
                recovery,
            })
        };
        open().inspect_err(|_| {
            self.state().attached.remove(&id);
        })
    }

    /// Why an image takes no more writes under the lease of its record, if so: by its metadata, or by the mark of a
    /// sync that failed so shortly before the daemon's death that the metadata does not say so.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn closed(&self, meta: &ImageMeta) -> Result<Option<Closed>, StoreError> {
        if meta.clean || mutants::CLOSED_FORGOTTEN.is_on() {
            return Ok(None);
        }
        match &meta.closed {
            Some(closed) => Ok(Some(closed.clone())),
            None => doubt::found(&self.layer_dir(meta.top())),
        }
    }

    /// What is still there of writes that were not flushed, if the image is as its last attach left it.
    fn kept(&self, meta: &ImageMeta) -> Trust {
        if meta.storage_incarnation == Some(self.incarnation) || mutants::POWER_LOSS_UNSEEN.is_on() {
            Trust::All
        } else {
            Trust::Committed
        }
    }

    fn remember(&self, layer: Layer) -> Arc<Layer> {
        let layer = Arc::new(layer);
        self.state().open.insert(layer.id(), Arc::downgrade(&layer));
        layer
    }

    /// Opens the top layer for writing; after a crash, recovers it first.
    fn open_top(&self, meta: &ImageMeta) -> Result<(Arc<Layer>, Option<Recovery>), StoreError> {
        let trust = match &self.closed(meta)? {
            _ if meta.clean => None,
            Some(closed) if closed.doubt => Some(Trust::Committed),
            _ => Some(self.kept(meta)),
        };
        let opened = Layer::open_writable(&self.layer_dir(meta.top()), trust, &self.faults);
        let (layer, recovery) = opened.inspect_err(|err| {
            if let (StoreError::Unsynced { .. }, Some(_)) = (err, trust)
                && let Err(again) = self.close_for_writes(
                    meta.id,
                    Closed {
                        why: err.to_string(),
                        doubt: true,
                    },
                )
            {
                tracing::error!(image = %meta.name, %again, "cannot record that a sync failed");
            }
        })?;
        if let Some(trust) = trust {
            tracing::warn!(
                image = %meta.name,
                ?trust,
                replayed = recovery.replayed,
                dropped = recovery.dropped,
                scrubbed_bytes = recovery.scrubbed_bytes,
                "the image was not detached in order; its top layer is recovered"
            );
        }
        Ok((self.remember(layer), trust.map(|_| recovery)))
    }

    /// Ends serving. `clean` says that the top layer was sealed, so that the next attach has nothing to recover.
    ///
    /// # Errors
    /// [`StoreError`]; the image is then not attached any more, and the next attach recovers it.
    pub fn close_image(&self, id: ImageId, clean: bool) -> Result<(), StoreError> {
        let mut meta = self.image(id)?;
        self.state().open.remove(&meta.top());
        let result = if clean {
            meta.clean = true;
            self.put_image(&meta)
        } else {
            Ok(())
        };
        self.state().attached.remove(&id);
        result
    }

    /// Remembers why the image takes no more writes, over restarts of the daemon, until it is attached under another
    /// lease. With doubt, that attach recovers it as after a power loss.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn close_for_writes(&self, id: ImageId, closed: Closed) -> Result<(), StoreError> {
        let mut meta = self.image(id)?;
        meta.closed = Some(closed);
        self.put_image(&meta)
    }

    /// Writes the image's metadata durably and then remembers it.
    fn put_image(&self, meta: &ImageMeta) -> Result<(), StoreError> {
        self.put_image_file(meta)?;
        self.sync_image_dir(meta.id)?;
        self.state().images.insert(meta.id, meta.clone());
        Ok(())
    }

    /// Replaces the image's metadata file. After an error the old one is still in place.
    fn put_image_file(&self, meta: &ImageMeta) -> Result<(), StoreError> {
        let dir = self.image_dir(meta.id);
        if !dir.exists() {
            os::create_dir(Site::ImageDirCreate, &dir, &self.faults).map_err(StoreError::at("create", &dir))?;
            sealed_file::sync_dir(Site::ImagesDirSync, &self.root.join("images"), &self.faults)?;
        }
        sealed_file::put(&dir.join("meta"), IMAGE_META, &meta.encode(), &self.faults)
    }

    /// Makes the last replacement survive a power loss.
    fn sync_image_dir(&self, id: ImageId) -> Result<(), StoreError> {
        sealed_file::sync_dir(Site::ImageDirSync, &self.image_dir(id), &self.faults)
    }

    fn image_dir(&self, id: ImageId) -> PathBuf {
        self.root.join("images").join(id.to_string())
    }

    fn remove_layer(&self, id: LayerId) -> Result<(), StoreError> {
        self.state().open.remove(&id);
        let dir = self.layer_dir(id);
        if dir.exists() {
            os::remove_dir_all(Site::LayerDirRemove, &dir, &self.faults).map_err(StoreError::at("remove", &dir))?;
        }
        Ok(())
    }
}

fn entries(dir: &Path) -> Result<Vec<String>, StoreError> {
    let read = || -> std::io::Result<Vec<String>> {
        fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    };
    read().map_err(StoreError::at("list", dir))
}
