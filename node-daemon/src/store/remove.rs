//! Deleting images. An image is gone once its metadata file is: what a crash then leaves is removed when the store opens.

use std::sync::Arc;

use hearth_protocol::{ImageId, LayerId};

use super::error::StoreError;
use super::fault::Site;
use super::image::ImageMeta;
use super::{Store, os, sealed_file};

impl Store {
    /// Deletes an image that is not attached and has no clones, with the layers that only it uses. Returns those.
    ///
    /// # Errors
    /// [`StoreError::Replicated`], [`StoreError::Attached`], [`StoreError::HasClones`], [`StoreError`].
    pub fn delete(&self, id: ImageId) -> Result<Vec<LayerId>, StoreError> {
        if let Ok(meta) = self.image(id) {
            self.refuse_replica(&meta)?;
        }
        self.remove(id)
    }

    /// Removes an image's metadata, which is the commit point, then everything that only it uses.
    pub(super) fn remove(&self, id: ImageId) -> Result<Vec<LayerId>, StoreError> {
        let writing = self.writing(id);
        let _alone = writing.lock().expect("metadata lock");
        let (meta, unused) = {
            let mut state = self.state();
            let meta = state.images.get(&id).cloned().ok_or_else(|| StoreError::no_image(id))?;
            if state.attached.contains(&id) {
                return Err(StoreError::Attached(meta.name.to_string()));
            }
            let is_clone = |i: &&ImageMeta| {
                i.id != id && (i.parent.as_ref().is_some_and(|p| p.image == id) || i.stack.contains(&meta.top()))
            };
            let clones: Vec<_> = state
                .images
                .values()
                .filter(is_clone)
                .map(|i| i.name.to_string())
                .collect();
            if !clones.is_empty() {
                let mut names = clones[..clones.len().min(5)].join(", ");
                if clones.len() > 5 {
                    names.push_str(", …");
                }
                return Err(StoreError::HasClones {
                    image: meta.name.to_string(),
                    clones: names,
                });
            }
            let path = self.image_dir(id).join("meta");
            os::remove_file(Site::ImageMetaRemove, &path, self.faults()).map_err(StoreError::at("remove", &path))?;
            state.images.remove(&id);
            state.replicas.remove(&id);
            // What a damaged image uses is not known: nothing of it goes.
            let unknown = !state.damaged.is_empty();
            let used = |layer: &LayerId| unknown || state.images.values().any(|i| i.stack.contains(layer));
            let unused: Vec<_> = meta.stack.iter().copied().filter(|l| !used(l)).collect();
            (meta, unused)
        };
        let dir = self.image_dir(meta.id);
        sealed_file::sync_dir(Site::ImageDirSync, &dir, self.faults())?;
        os::remove_dir_all(Site::ImageDirRemove, &dir, self.faults()).map_err(StoreError::at("remove", &dir))?;
        for layer in &unused {
            self.remove_layer(*layer)?;
        }
        // Whoever waits for the lock keeps it alive; nobody new gets it without the state.
        let mut state = self.state();
        if Arc::strong_count(&writing) == 2 {
            state.writing.remove(&id);
        }
        Ok(unused)
    }
}
