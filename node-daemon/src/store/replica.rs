//! A replica of an image that several nodes hold: the same ids, name and shape on each, and beside them what the member
//! on this node keeps (docs/adr/0007): its durable record here, its marks in [`super::marks`].
//!
//! It is not the member: it knows no rule of epochs and sets, and keeps what the member tells it to.
//!
//! Invariants:
//! - The record is in the image's metadata file, so that image, record and their end are one replacement or removal.
//!   In memory it is apart from [`ImageMeta`]: no copy of that which somebody edits brings an older record back.
//! - A replica whose disk failed takes no more writes, over restarts, until it is forgotten.
//! - A replica that was ever opened has its file of marks.

use std::path::Path;
use std::sync::Arc;

use hearth_protocol::{ImageId, ImageName, Incarnation, LayerId};
use hearth_replication::member::Durable;
use serde::{Deserialize, Serialize};

use super::doubt::{self, Closed};
use super::error::StoreError;
use super::image::{ImageMeta, Record, check_shape};
use super::layer::Layer;
use super::layer_meta::damaged;
use super::marks::Marks;
use super::open::Opened;
use super::{Store, os};
use crate::mutants;

/// What the member of a replica keeps in the image's metadata file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Replica {
    /// Its record, and what it sealed.
    pub durable: Durable,
}

/// A metadata file's body as this module writes it.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    meta: &'a ImageMeta,
    replica: &'a Replica,
}

/// What this module reads of a metadata file's body.
#[derive(Deserialize)]
struct Found {
    #[serde(default)]
    replica: Option<Replica>,
}

impl Replica {
    /// Reads it off the body of an image's metadata file; `None` for an image that only this node holds. `path` only
    /// names the file in errors.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub fn decode(path: &Path, body: &[u8]) -> Result<Option<Self>, StoreError> {
        let found: Found = serde_json::from_slice(body).map_err(|err| damaged(path, err.to_string()))?;
        Ok(found.replica)
    }

    /// The body of the metadata file of an image with this replica.
    ///
    /// # Panics
    /// Never: it always encodes.
    pub fn encode(&self, meta: &ImageMeta) -> Vec<u8> {
        let written = Written { meta, replica: self };
        serde_json::to_vec_pretty(&written).expect("image metadata always encodes")
    }
}

/// A replica to be made.
#[derive(Debug, Clone)]
pub struct NewReplica {
    /// The image's id, on all nodes.
    pub image: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Bytes as the guest sees them.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// The id of its only layer, on all nodes.
    pub layer: LayerId,
    /// What the member starts with, if it has something.
    pub durable: Option<Durable>,
}

/// A replica opened for its member.
pub struct OpenedReplica {
    /// The image.
    pub opened: Opened,
    /// Its intent marks.
    pub marks: Arc<Marks>,
    /// What the member kept.
    pub durable: Durable,
    /// Whether its disk failed, in this life or an earlier one: it takes no writes.
    pub failed: bool,
    /// The store's life now. Marks of another one tell of a power loss.
    pub incarnation: Incarnation,
}

impl Store {
    /// What the member of a replica keeps; `None` for an image that only this node holds, and for none at all.
    pub fn replica(&self, image: ImageId) -> Option<Replica> {
        self.state().replicas.get(&image).cloned()
    }

    /// Refuses what an image with members does not allow.
    pub(super) fn refuse_replica(&self, meta: &ImageMeta) -> Result<(), StoreError> {
        match self.replica(meta.id) {
            Some(_) => Err(StoreError::Replicated(meta.name.to_string())),
            None => Ok(()),
        }
    }

    fn replica_of(&self, image: ImageId) -> Result<(ImageMeta, Replica), StoreError> {
        let meta = self.image(image)?;
        match self.replica(image) {
            Some(replica) => Ok((meta, replica)),
            None => Err(StoreError::NotReplicated(meta.name.to_string())),
        }
    }

    /// Makes an empty replica under given ids, durable when this returns. One that is here already, with the same ids
    /// and shape, stays as it is, with its own record.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if another image has the name; [`StoreError::NotReplicated`] if the image is here as
    /// this node's alone; [`StoreError::Unfit`] if its shape is another or its layer is another image's;
    /// [`StoreError`].
    pub fn create_replica(&self, new: &NewReplica) -> Result<ImageMeta, StoreError> {
        check_shape(new.size, new.block_size)?;
        let writing = self.writing(new.image);
        let _alone = writing.lock().expect("metadata lock");
        match self.replica_of(new.image) {
            Ok((meta, _)) => return self.made_before(new, meta),
            Err(StoreError::NoImage(_)) => {}
            Err(err) => return Err(err),
        }
        self.with_name(&new.name, || self.make_replica(new))
    }

    fn made_before(&self, new: &NewReplica, meta: ImageMeta) -> Result<ImageMeta, StoreError> {
        let has = (&meta.name, meta.size, meta.block_size, meta.stack.as_slice());
        if has != (&new.name, new.size, new.block_size, &[new.layer]) {
            return Err(StoreError::Unfit(format!(
                "image {} is here as {} with {} bytes in blocks of {} on layer {}, and was to be {} with {} bytes in \
                 blocks of {} on layer {}: take this node out of its locations and add it again",
                meta.id,
                meta.name,
                meta.size,
                meta.block_size,
                meta.top(),
                new.name,
                new.size,
                new.block_size,
                new.layer,
            )));
        }
        // Whoever made it may have failed before it was durable.
        self.put_image_locked(&meta)?;
        Ok(meta)
    }

    fn make_replica(&self, new: &NewReplica) -> Result<ImageMeta, StoreError> {
        self.clear_layer(new.layer)?;
        self.create_layer_as(new.layer, new.size, new.block_size)?;
        let meta = ImageMeta {
            id: new.image,
            name: new.name.clone(),
            size: new.size,
            block_size: new.block_size,
            stack: vec![new.layer],
            snapshots: Vec::new(),
            parent: None,
            record: Record::default(),
            storage_incarnation: None,
            clean: true,
            closed: None,
        };
        let replica = Replica {
            durable: new.durable.clone().unwrap_or_default(),
        };
        let commit = || {
            self.put_image_file(&meta, Some(&replica))?;
            self.sync_image_dir(meta.id)
        };
        commit().inspect_err(|_| {
            // The image first: no metadata goes on naming a layer that is not there.
            os::discard_dir(&self.image_dir(meta.id), self.faults());
            if !self.image_dir(meta.id).join("meta").exists() {
                os::discard_dir(&self.layer_dir(new.layer), self.faults());
            }
        })?;
        self.state().insert(meta.clone(), Some(replica));
        Ok(meta)
    }

    /// Removes what a failed creation left of a layer.
    fn clear_layer(&self, layer: LayerId) -> Result<(), StoreError> {
        if !self.layer_dir(layer).exists() {
            return Ok(());
        }
        let taken = {
            let state = self.state();
            // What a damaged image uses is not known.
            !state.damaged.is_empty() || state.images.values().any(|image| image.stack.contains(&layer))
        };
        if taken {
            return Err(StoreError::Unfit(format!(
                "layer {layer} is here already and may be another image's: it cannot become a replica's"
            )));
        }
        self.remove_layer(layer)
    }

    /// Opens a replica for its member: after a crash, brings its layer back first. No epoch and no lease: the record
    /// decides, and the member checks it.
    ///
    /// # Errors
    /// [`StoreError::NotReplicated`]; [`StoreError::Attached`]; [`StoreError`].
    pub fn open_replica(&self, image: ImageId) -> Result<OpenedReplica, StoreError> {
        let (meta, replica) = self.replica_of(image)?;
        if !self.state().attached.insert(image) {
            return Err(StoreError::Attached(meta.name.to_string()));
        }
        self.open_parts(meta, replica.durable).inspect_err(|_| {
            self.state().attached.remove(&image);
        })
    }

    fn open_parts(&self, mut meta: ImageMeta, durable: Durable) -> Result<OpenedReplica, StoreError> {
        let dir = self.image_dir(meta.id);
        let failed = self.replica_failed(&meta)?;
        let is_failed = failed.is_some();
        let never_opened = meta.storage_incarnation.is_none();
        let (top, recovery, marks) = if let Some(closed) = failed {
            let (layer, recovery) =
                Layer::open_closed(&self.layer_dir(meta.top()), self.kept(&meta), closed, self.faults())?;
            let top = self.remember(layer);
            let marks = Marks::look(&dir, &top, never_opened)?;
            (top, Some(recovery), marks)
        } else {
            let (top, recovery) = self.open_top(&meta)?;
            let marks = Marks::open(&dir, &top, never_opened, self.faults())?;
            meta.clean = false;
            meta.storage_incarnation = Some(self.incarnation);
            self.put_image(&meta)?;
            (top, recovery, marks)
        };
        Ok(OpenedReplica {
            opened: Opened {
                meta,
                top,
                below: Vec::new(),
                recovery,
            },
            marks: Arc::new(marks),
            durable,
            failed: is_failed,
            incarnation: self.incarnation,
        })
    }

    /// Why a replica takes no writes until it is forgotten, if so. Unlike an image of this node alone, no attach opens
    /// it anew: what it lost, others have.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn replica_failed(&self, meta: &ImageMeta) -> Result<Option<Closed>, StoreError> {
        if mutants::FAILED_REPLICA_REOPENED.is_on() {
            return Ok(None);
        }
        match &meta.closed {
            Some(closed) => Ok(Some(closed.clone())),
            None => doubt::found(&self.layer_dir(meta.top())),
        }
    }

    /// Replaces what the member of a replica keeps, durably.
    ///
    /// # Errors
    /// [`StoreError::ReplicaFailed`] if it failed before; [`StoreError`]. The old one counts then, or, where that is
    /// not sure, the replica has failed.
    pub fn put_durable(&self, image: ImageId, durable: &Durable) -> Result<(), StoreError> {
        let writing = self.writing(image);
        let _alone = writing.lock().expect("metadata lock");
        let (meta, _) = self.replica_of(image)?;
        if let Some(closed) = self.replica_failed(&meta)? {
            return Err(StoreError::ReplicaFailed {
                image: meta.name.to_string(),
                why: closed.why,
            });
        }
        let replica = Replica {
            durable: durable.clone(),
        };
        self.put_image_file(&meta, Some(&replica))?;
        if let Err(err) = self.sync_image_dir(image) {
            // Either may be there after a power loss.
            self.fail_replica(&meta, format!("its record may not be durable: {err}"));
            return Err(err);
        }
        self.state().replicas.insert(image, replica);
        Ok(())
    }

    /// Closes a replica for good. The caller holds the metadata's lock.
    fn fail_replica(&self, meta: &ImageMeta, why: String) {
        let open = self.state().open.get(&meta.top()).and_then(std::sync::Weak::upgrade);
        match open {
            Some(layer) => layer.poison(why.clone(), true),
            None => doubt::leave(&self.layer_dir(meta.top()), meta.top(), &why, self.faults()),
        }
        let closed = ImageMeta {
            closed: Some(Closed { why, doubt: true }),
            ..meta.clone()
        };
        if let Err(err) = self.put_image_locked(&closed) {
            tracing::error!(image = %meta.name, %err, "cannot record that the replica failed");
        }
    }

    /// Deletes record, marks and blocks of a replica that is not open, in one piece: others hold all of it.
    ///
    /// # Errors
    /// [`StoreError::NotReplicated`]; [`StoreError::Attached`]; [`StoreError`].
    pub fn forget_replica(&self, image: ImageId) -> Result<(), StoreError> {
        self.replica_of(image)?;
        self.remove(image).map(drop)
    }
}
