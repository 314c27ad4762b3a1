//! Images: what their metadata says, and create, clone, snapshot, grow and delete.

use std::cmp::Ordering;
use std::path::Path;
use std::sync::Arc;

use hearth_protocol::limits::{IMAGE_BYTES_MAX, LAYERS_PER_IMAGE_MAX};
use hearth_protocol::units::is_block_size;
use hearth_protocol::{Epoch, ImageId, ImageName, Incarnation, LayerId, LeaseId, NodeId, SetVersion, SnapshotName};
use serde::{Deserialize, Serialize};

use super::Store;
use super::doubt::{self, Closed};
use super::error::StoreError;
use super::fault::Site;
use super::incarnation::random_id;
use super::layer::Layer;
use super::layer_meta::LayerMeta;
use super::os::{self, FileSites};
use super::sealed_file::{self, Kind};

/// The kind of an image's metadata file.
pub const IMAGE_META: Kind = Kind {
    name: "image",
    version: 1,
    sites: FileSites {
        create: Site::ImageMetaCreate,
        write: Site::ImageMetaWrite,
        sync: Site::ImageMetaSync,
        rename: Site::ImageMetaRename,
    },
};

/// Everything a node remembers of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMeta {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Bytes as the guest sees them; a multiple of 4,096.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// Its layers, top first.
    pub stack: Vec<LayerId>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Where a clone came from.
    pub parent: Option<Parent>,
    /// Who may write it.
    pub record: Record,
    /// The storage incarnation that took the last attach's writes; `None` if they cannot be trusted to be there.
    pub storage_incarnation: Option<Incarnation>,
    /// Whether it was detached in order since.
    pub clean: bool,
    /// Why it takes no more writes under the lease of its record, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<Closed>,
}

/// A name for a sealed layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// The layer that was sealed.
    pub layer: LayerId,
    /// Size of the image when it was.
    pub size: u64,
}

/// Where a clone came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The image.
    pub image: ImageId,
    /// Its name then.
    pub name: ImageName,
    /// The snapshot.
    pub snapshot: SnapshotName,
}

/// The right to write, as this member knows it durably (DESIGN §2 "record").
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Record {
    /// The highest epoch seen.
    pub epoch: Epoch,
    /// The lease of that epoch.
    pub lease: Option<LeaseId>,
    /// Version of the location map.
    pub set_version: SetVersion,
    /// The location map; empty means one run with this node as its only member.
    #[serde(default)]
    pub location_map: Vec<LocationRun>,
}

/// One run of the location map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocationRun {
    /// First block.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// The nodes that hold every acknowledged write to it.
    pub members: Vec<NodeId>,
}

impl ImageMeta {
    /// The layer that takes writes.
    pub fn top(&self) -> LayerId {
        self.stack[0]
    }

    /// The snapshot of that name.
    ///
    /// # Errors
    /// [`StoreError::NoSnapshot`].
    pub fn snapshot(&self, name: &SnapshotName) -> Result<&Snapshot, StoreError> {
        self.snapshots
            .iter()
            .find(|s| &s.name == name)
            .ok_or_else(|| StoreError::NoSnapshot {
                image: self.name.to_string(),
                snapshot: name.to_string(),
            })
    }

    /// Checks that the image can be made as large as that.
    ///
    /// # Errors
    /// [`StoreError::Unfit`].
    pub(crate) fn check_growth(&self, size: u64) -> Result<(), StoreError> {
        check_shape(size, self.block_size)?;
        let (name, now) = (&self.name, self.size);
        match size.cmp(&now) {
            Ordering::Greater => Ok(()),
            Ordering::Equal => Err(StoreError::Unfit(format!("image {name} has {now} bytes already"))),
            Ordering::Less => Err(StoreError::Shrinks {
                image: name.to_string(),
                now,
                size,
            }),
        }
    }

    /// Reads the body of an image's metadata file. `path` only names it in errors.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub fn decode(path: &Path, body: &[u8]) -> Result<Self, StoreError> {
        let damaged = |why: String| StoreError::Damaged {
            path: path.to_owned(),
            why,
        };
        let meta: Self = serde_json::from_slice(body).map_err(|err| damaged(err.to_string()))?;
        check_shape(meta.size, meta.block_size).map_err(|err| damaged(err.to_string()))?;
        if meta.stack.is_empty() || meta.stack.len() > LAYERS_PER_IMAGE_MAX {
            return Err(damaged(format!("its stack has {} layers", meta.stack.len())));
        }
        Ok(meta)
    }

    /// The body of its metadata file.
    ///
    /// # Panics
    /// Never: it always encodes.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("image metadata always encodes")
    }
}

/// Checks what an image's size and block size may be.
pub(super) fn check_shape(size: u64, block_size: u64) -> Result<(), StoreError> {
    if !is_block_size(block_size) {
        return Err(StoreError::Unfit(format!(
            "a block size of {block_size} bytes is not possible: use a power of two from 4096 to 4194304, such as 65536"
        )));
    }
    if size == 0 || !size.is_multiple_of(4096) || size > IMAGE_BYTES_MAX {
        return Err(StoreError::Unfit(format!(
            "an image of {size} bytes is not possible: use a multiple of 4096 from 4096 to {IMAGE_BYTES_MAX}"
        )));
    }
    // Units of the RAM tier (a block, or 64 KiB of a larger one) are numbered in 32 bits.
    if size / block_size.min(64 << 10) >= u64::from(u32::MAX) {
        return Err(StoreError::Unfit(format!(
            "an image of {size} bytes in blocks of {block_size} has too many blocks: use blocks of 65536 bytes"
        )));
    }
    Ok(())
}

fn fresh() -> Result<u128, StoreError> {
    random_id().map_err(|err| StoreError::io("cannot draw a random id from /dev/urandom", err))
}

impl Store {
    /// Creates an empty image.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Unfit`], [`StoreError`].
    pub fn create(&self, name: &ImageName, size: u64, block_size: u64) -> Result<ImageMeta, StoreError> {
        check_shape(size, block_size)?;
        self.with_name(name, || self.new_image(name, size, block_size, Vec::new(), None))
    }

    /// Creates an image on top of a snapshot of an image of this store. Takes no space.
    ///
    /// # Errors
    /// [`StoreError::NoImage`], [`StoreError::NoSnapshot`], [`StoreError::Exists`], [`StoreError`].
    pub fn clone_image(
        &self,
        source: ImageId,
        snapshot: &SnapshotName,
        name: &ImageName,
    ) -> Result<ImageMeta, StoreError> {
        let source = self.image(source)?;
        let found = source.snapshot(snapshot)?;
        let at = source
            .stack
            .iter()
            .position(|layer| *layer == found.layer)
            .expect("a snapshot's layer is in its image's stack");
        self.with_name(name, || {
            self.new_image(
                name,
                found.size,
                source.block_size,
                source.stack[at..].to_vec(),
                Some(Parent {
                    image: source.id,
                    name: source.name.clone(),
                    snapshot: snapshot.clone(),
                }),
            )
        })
    }

    /// Creates an image on top of sealed layers that other nodes hold (some may be here too); `below` is the stack
    /// under the new top, upper first.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Unfit`], [`StoreError`].
    pub fn clone_remote(
        &self,
        name: &ImageName,
        size: u64,
        block_size: u64,
        below: Vec<LayerId>,
        parent: Parent,
    ) -> Result<ImageMeta, StoreError> {
        check_shape(size, block_size)?;
        self.with_name(name, || self.new_image(name, size, block_size, below, Some(parent)))
    }

    fn new_image(
        &self,
        name: &ImageName,
        size: u64,
        block_size: u64,
        below: Vec<LayerId>,
        parent: Option<Parent>,
    ) -> Result<ImageMeta, StoreError> {
        check_depth(name, below.len() + 1)?;
        let top = self.create_layer(size, block_size)?;
        // A new layer is empty and its files are durable: it needs no sealing to be clean.
        let mut stack = vec![top.id()];
        stack.extend(below);
        self.commit_image(name, size, block_size, stack, parent)
    }

    /// Writes the metadata of a new image whose layers are complete and durable.
    pub(super) fn commit_image(
        &self,
        name: &ImageName,
        size: u64,
        block_size: u64,
        stack: Vec<LayerId>,
        parent: Option<Parent>,
    ) -> Result<ImageMeta, StoreError> {
        let meta = ImageMeta {
            id: ImageId(fresh()?),
            name: name.clone(),
            size,
            block_size,
            stack,
            snapshots: Vec::new(),
            parent,
            record: Record::default(),
            storage_incarnation: None,
            clean: true,
            closed: None,
        };
        // The caller removes the layers, so no metadata should go on naming them.
        self.put_image(&meta)
            .inspect_err(|_| os::discard_dir(&self.image_dir(meta.id), self.faults()))?;
        Ok(meta)
    }

    /// Creates an empty layer under a new id, durable with its directory entry.
    pub(super) fn create_layer(&self, size: u64, block_size: u64) -> Result<Layer, StoreError> {
        self.create_layer_as(LayerId(fresh()?), size, block_size)
    }

    /// As [`Self::create_layer`], under a given id.
    pub(super) fn create_layer_as(&self, id: LayerId, size: u64, block_size: u64) -> Result<Layer, StoreError> {
        let dir = self.layer_dir(id);
        let meta = LayerMeta { id, size, block_size };
        let create = || {
            let layer = Layer::create(&dir, meta, self.faults())?;
            sealed_file::sync_dir(Site::LayersDirSync, &self.root().join("layers"), self.faults())?;
            Ok(layer)
        };
        create().inspect_err(|_| os::discard_dir(&dir, self.faults()))
    }

    /// Runs `f` while nobody else can take the name.
    pub(super) fn with_name<T>(
        &self,
        name: &ImageName,
        f: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        {
            let mut state = self.state();
            if state.images.values().any(|i| &i.name == name) || !state.reserved.insert(name.clone()) {
                return Err(StoreError::Exists {
                    what: "image",
                    name: name.to_string(),
                });
            }
        }
        let result = f();
        self.state().reserved.remove(name);
        result
    }

    /// Takes a snapshot of an image that is not attached. (Of an attached one: [`crate::volume::Volume::snapshot`].)
    ///
    /// # Errors
    /// [`StoreError::Attached`], [`StoreError::Exists`], [`StoreError`].
    pub fn snapshot(&self, id: ImageId, name: &SnapshotName) -> Result<ImageMeta, StoreError> {
        self.while_detached(id, |store| {
            let (meta, _) = store.push_layer(id, Some(name), None, None)?;
            Ok(meta)
        })
    }

    /// Makes an image that is not attached larger. Takes a layer of its stack.
    ///
    /// # Errors
    /// [`StoreError::Attached`], [`StoreError::Unfit`] for a size that is no larger, [`StoreError`].
    pub fn grow(&self, id: ImageId, size: u64) -> Result<ImageMeta, StoreError> {
        self.image(id)?.check_growth(size)?;
        self.while_detached(id, |store| Ok(store.push_layer(id, None, Some(size), None)?.0))
    }

    /// Recovers and seals the top layer of a detached image, runs `f`, and keeps attach out meanwhile.
    pub(crate) fn while_detached<T>(
        &self,
        id: ImageId,
        f: impl FnOnce(&Self) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let meta = self.image(id)?;
        self.refuse_replica(&meta)?;
        if !self.state().attached.insert(id) {
            return Err(StoreError::Attached(meta.name.to_string()));
        }
        let run = || {
            if !meta.clean {
                let (top, _) = self.open_top(&meta)?;
                top.seal().map_err(|err| StoreError::Io {
                    what: format!("cannot recover image {}", meta.name),
                    source: std::io::Error::other(err.to_string()),
                })?;
                self.put_image(&ImageMeta {
                    clean: true,
                    closed: None,
                    ..meta.clone()
                })?;
                doubt::remove(&self.layer_dir(meta.top()), self.faults())?;
            }
            f(self)
        };
        let result = run();
        self.state().attached.remove(&id);
        result
    }

    /// Puts an empty layer on top of an image whose old top is durable and takes no writes meanwhile; its metadata
    /// file is the commit point. Returns the new metadata and the new top, open for writing.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Unfit`], [`StoreError`]. The stack is then as before; if not even that
    /// can be made sure, `old_top` is poisoned.
    pub(crate) fn push_layer(
        &self,
        id: ImageId,
        snapshot: Option<&SnapshotName>,
        size: Option<u64>,
        old_top: Option<&Layer>,
    ) -> Result<(ImageMeta, Arc<Layer>), StoreError> {
        let old = self.image(id)?;
        let mut meta = old.clone();
        self.check_snapshot(&meta, snapshot)?;
        let top = self.create_layer(size.unwrap_or(meta.size), meta.block_size)?;
        if let Some(name) = snapshot {
            meta.snapshots.push(Snapshot {
                name: name.clone(),
                layer: meta.top(),
                size: meta.size,
            });
        }
        meta.stack.insert(0, top.id());
        meta.size = size.unwrap_or(meta.size);
        if let Err(err) = self.put_image_file(&meta, None) {
            let _ = self.remove_layer(top.id());
            return Err(err);
        }
        if let Err(err) = self.sync_image_dir(id) {
            // The new metadata is visible and may not be durable. Writes to the old top would be lost under it, so
            // either the old metadata comes back, durably, or there are no more writes.
            match self.put_image(&old) {
                Ok(()) => {
                    let _ = self.remove_layer(top.id());
                }
                Err(again) => {
                    if let Some(layer) = old_top {
                        layer.poison(
                            format!("a snapshot failed half-way: {err}; undoing it failed too: {again}"),
                            false,
                        );
                    }
                }
            }
            return Err(err);
        }
        self.state().images.insert(id, meta.clone());
        let top = Arc::new(top);
        self.state().open.insert(top.id(), Arc::downgrade(&top));
        Ok((meta, top))
    }

    /// Checks that the image can take one more layer, under that snapshot name.
    ///
    /// # Errors
    /// [`StoreError::Replicated`], [`StoreError::Exists`], [`StoreError::Unfit`].
    pub(crate) fn check_snapshot(&self, meta: &ImageMeta, name: Option<&SnapshotName>) -> Result<(), StoreError> {
        self.refuse_replica(meta)?;
        if let Some(name) = name
            && meta.snapshots.iter().any(|s| &s.name == name)
        {
            return Err(StoreError::Exists {
                what: "snapshot",
                name: format!("{}@{name}", meta.name),
            });
        }
        check_depth(&meta.name, meta.stack.len() + 1)
    }

    /// Opens a detached image's stack to look at, not to serve: top first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn look_at(&self, id: ImageId) -> Result<(ImageMeta, Vec<super::LayerRef>), StoreError> {
        let meta = self.image(id)?;
        let top = Layer::open_sealed(&self.layer_dir(meta.top()), self.faults())?;
        let mut stack = vec![super::LayerRef::Local(Arc::new(top))];
        for id in &meta.stack[1..] {
            stack.push(self.layer_ref(*id)?);
        }
        Ok((meta, stack))
    }
}

fn check_depth(name: &ImageName, layers: usize) -> Result<(), StoreError> {
    if layers > LAYERS_PER_IMAGE_MAX {
        return Err(StoreError::Unfit(format!(
            "image {name} would have {layers} layers, at most {LAYERS_PER_IMAGE_MAX} are possible: copy it into a new image"
        )));
    }
    Ok(())
}
