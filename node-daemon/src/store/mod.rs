//! The local replicas: one directory per node, in it images (small metadata) and layers (sparse data files).
//!
//! ```text
//! lock                       held while a daemon has the store open
//! images/<image-id>/meta     name, size, stack, record, storage incarnation, clean mark; of a replica, what its member keeps
//! images/<image-id>/marks    of a replica, regions that were written and may not be everywhere
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
mod marks;
mod marks_file;
mod open;
pub mod os;
mod remove;
mod replica;
pub mod sealed_file;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use hearth_protocol::{ImageId, ImageName, Incarnation, LayerId};

pub use blockmap::{BlockMap, BlockState};
pub use doubt::Closed;
pub use error::StoreError;
pub(crate) use error::disk_io;
pub use image::{IMAGE_META, ImageMeta, LocationRun, Parent, Record, Snapshot};
pub use journal::{Record as JournalRecord, Trust, encode as encode_record, records};
pub use layer::{Layer, Recovery};
pub use layer_meta::{BITMAP, LAYER_META, LayerMeta, apply, decode_bitmap};
pub use marks::Marks;
pub use marks_file::{Change, REGION_BYTES, changes as mark_changes};
pub use open::Opened;
pub use replica::{NewReplica, OpenedReplica, Replica};

use fault::{Faults, Site};
use os::StoreFile;

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
    /// What the members of those images keep that are replicas.
    replicas: BTreeMap<ImageId, Replica>,
    /// Held over each replacement of an image's metadata file, so that no older state overtakes a newer one.
    writing: HashMap<ImageId, Arc<Mutex<()>>>,
    /// Images whose metadata file is damaged.
    damaged: BTreeSet<ImageId>,
    attached: HashSet<ImageId>,
    /// Names of imports that run.
    reserved: HashSet<ImageName>,
    open: HashMap<LayerId, Weak<Layer>>,
}

impl State {
    fn insert(&mut self, meta: ImageMeta, replica: Option<Replica>) {
        if let Some(replica) = replica {
            self.replicas.insert(meta.id, replica);
        }
        self.images.insert(meta.id, meta);
    }
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
                Ok((meta, replica)) => state.insert(meta, replica),
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

    fn read_image(&self, id: ImageId) -> Result<(ImageMeta, Option<Replica>), StoreError> {
        let path = self.image_dir(id).join("meta");
        let body = sealed_file::read(&path, IMAGE_META)?;
        let meta = ImageMeta::decode(&path, &body)?;
        if meta.id != id {
            return Err(StoreError::Damaged {
                path,
                why: format!("it belongs to image {}", meta.id),
            });
        }
        Ok((meta, Replica::decode(&path, &body)?))
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
            let (meta, replica) = self.read_image(id)?;
            tracing::info!(image = %meta.name, "a damaged image was restored");
            state.damaged.remove(&id);
            state.insert(meta, replica);
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

    /// The lock that is held while an image's metadata file is replaced.
    fn writing(&self, id: ImageId) -> Arc<Mutex<()>> {
        self.state().writing.entry(id).or_default().clone()
    }

    /// Writes the image's metadata durably and then remembers it. What the member of a replica keeps stays as it is.
    fn put_image(&self, meta: &ImageMeta) -> Result<(), StoreError> {
        let writing = self.writing(meta.id);
        let _alone = writing.lock().expect("metadata lock");
        self.put_image_locked(meta)
    }

    fn put_image_locked(&self, meta: &ImageMeta) -> Result<(), StoreError> {
        self.put_image_file(meta, self.replica(meta.id).as_ref())?;
        self.sync_image_dir(meta.id)?;
        self.state().images.insert(meta.id, meta.clone());
        Ok(())
    }

    /// Replaces the image's metadata file. After an error the old one is still in place.
    fn put_image_file(&self, meta: &ImageMeta, replica: Option<&Replica>) -> Result<(), StoreError> {
        let dir = self.image_dir(meta.id);
        if !dir.exists() {
            os::create_dir(Site::ImageDirCreate, &dir, &self.faults).map_err(StoreError::at("create", &dir))?;
            sealed_file::sync_dir(Site::ImagesDirSync, &self.root.join("images"), &self.faults)?;
        }
        let body = match replica {
            None => meta.encode(),
            Some(replica) => replica.encode(meta),
        };
        sealed_file::put(&dir.join("meta"), IMAGE_META, &body, &self.faults)
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
