//! The images that were deleted here, remembered over restarts: the only proof that an image which the log lists and the
//! store does not have was deleted, and is not on a disk that is away. Ids are never used twice, so the proof never ages.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use hearth_protocol::ImageId;

use crate::store::fault::Faults;
use crate::store::os::{read_note, replace_note};

/// Ids remembered, the newest: enough for what a stream can lose between two of its backups, some 140 KB on disk.
const GONE_MAX: usize = 4_096;

/// See the module.
pub struct Gone {
    /// In the order of their deletion.
    images: Mutex<Vec<ImageId>>,
    file: PathBuf,
    faults: Faults,
}

impl Gone {
    /// What earlier processes deleted.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn open(file: PathBuf, faults: Faults) -> io::Result<Self> {
        let fix = "remove it; deletions that the log loses are not told again then";
        let images = read_note(&file, fix)?.unwrap_or_default();
        Ok(Self {
            images: Mutex::new(images),
            file,
            faults,
        })
    }

    /// Remembers an image that is about to leave the store because the log says that it is deleted.
    ///
    /// # Errors
    /// The file system's; it is remembered all the same while this process lives.
    pub fn remember(&self, image: ImageId) -> io::Result<()> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        if !images.contains(&image) {
            images.push(image);
        }
        let over = images.len().saturating_sub(GONE_MAX);
        images.drain(..over);
        replace_note(&self.file, &serde_json::to_vec_pretty(&*images)?, &self.faults)
    }

    /// Whether an image was deleted here.
    pub fn has(&self, image: ImageId) -> bool {
        self.images
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deletions_outlive_the_process_and_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Gone::open(dir.path().join("gone"), Faults::default());
        let gone = open().unwrap();
        let ids = (GONE_MAX as u128 - 3..GONE_MAX as u128 + 2).map(ImageId);
        gone.images
            .lock()
            .unwrap()
            .extend((0..GONE_MAX as u128 - 3).map(ImageId));
        for id in ids {
            gone.remember(id).unwrap();
        }
        gone.remember(ImageId(5)).unwrap();
        drop(gone);
        let gone = open().unwrap();
        assert_eq!(gone.images.lock().unwrap().len(), GONE_MAX);
        assert!(!gone.has(ImageId(1)) && gone.has(ImageId(2)) && gone.has(ImageId(GONE_MAX as u128 + 1)));
        std::fs::write(dir.path().join("gone"), "[").unwrap();
        assert!(open().err().unwrap().to_string().contains("is damaged"));
    }
}
