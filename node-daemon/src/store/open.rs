//! Opening an image for serving, and closing it: recovery after a crash, the clean mark, and what a failed sync leaves
//! behind.
//!
//! Invariant: while an image is open, its metadata does not call it clean; so whoever comes after a crash knows.

use std::sync::Arc;

use hearth_protocol::{Epoch, ImageId, LeaseId, SetVersion};

use super::doubt::{self, Closed};
use super::error::StoreError;
use super::image::ImageMeta;
use super::journal::Trust;
use super::layer::{Layer, Recovery};
use super::{LayerRef, Store};
use crate::mutants;

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

impl Opened {
    /// The whole stack, top first.
    pub fn stack(&self) -> Vec<LayerRef> {
        let mut stack = vec![LayerRef::Local(self.top.clone())];
        stack.extend(self.below.iter().cloned());
        stack
    }
}

impl Store {
    /// Opens an image for writing under an epoch and lease, after bringing its top layer back from a crash if needed.
    ///
    /// # Errors
    /// [`StoreError::Attached`]; [`StoreError::Replicated`]; [`StoreError::Unfit`] if the record has a higher epoch, or
    /// this one under another lease; [`StoreError`].
    pub fn open_image(
        &self,
        id: ImageId,
        epoch: Epoch,
        lease: LeaseId,
        set_version: SetVersion,
    ) -> Result<Opened, StoreError> {
        let mut meta = {
            let meta = self.image(id)?;
            self.refuse_replica(&meta)?;
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
    pub(super) fn kept(&self, meta: &ImageMeta) -> Trust {
        if meta.storage_incarnation == Some(self.incarnation) || mutants::POWER_LOSS_UNSEEN.is_on() {
            Trust::All
        } else {
            Trust::Committed
        }
    }

    pub(super) fn remember(&self, layer: Layer) -> Arc<Layer> {
        let layer = Arc::new(layer);
        self.state().open.insert(layer.id(), Arc::downgrade(&layer));
        layer
    }

    /// Opens the top layer for writing; after a crash, recovers it first.
    pub(super) fn open_top(&self, meta: &ImageMeta) -> Result<(Arc<Layer>, Option<Recovery>), StoreError> {
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
}
