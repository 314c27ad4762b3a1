//! A layer that takes no more writes, and the mark that a failed sync leaves on it: a later sync could not tell what the
//! failed one lost, so that it must outlive the daemon.

use std::fs;
use std::io;
use std::path::Path;

use hearth_protocol::LayerId;
use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::fault::{Faults, Site};
use super::os::{self, StoreFile};
use super::sealed_file;

/// The mark of a failed sync in a layer's directory.
const DOUBT: &str = "doubt";

/// Why a layer or an image takes no more writes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// What happened, in words.
    pub why: String,
    /// Whether acknowledged writes that were not flushed may be lost, so that none of them may count later.
    pub doubt: bool,
}

/// Leaves the mark of a failed sync: the first thing that is done after one, and one system call, so that a daemon
/// that dies right behind the sync is not followed by one that knows of nothing. Not synced: the death of the
/// machine takes what was not flushed in any case.
pub(super) fn leave(dir: &Path, layer: LayerId, why: &str, faults: &Faults) {
    let path = dir.join(DOUBT);
    let marked = StoreFile::create(Site::DoubtCreate, &path, 0, faults)
        .and_then(|file| file.write(Site::DoubtWrite, 0, why.as_bytes()));
    if let Err(err) = marked {
        tracing::error!(%layer, %err, "cannot mark that a sync failed");
    }
}

/// The mark that a failed sync left on the layer in `dir`, if one did. What it says is for people; that it is there
/// counts.
///
/// # Errors
/// [`StoreError::Io`].
pub(super) fn found(dir: &Path) -> Result<Option<Closed>, StoreError> {
    let path = dir.join(DOUBT);
    match fs::read(&path) {
        Ok(bytes) if bytes.is_empty() => Ok(Some("a sync failed".into())),
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(StoreError::at("read", &path)(err)),
    }
    .map(|why| why.map(|why| Closed { why, doubt: true }))
}

/// Removes the mark of a failed sync, durably; only once the image no longer counts on what was in doubt.
///
/// # Errors
/// [`StoreError`].
pub(super) fn remove(dir: &Path, faults: &Faults) -> Result<(), StoreError> {
    let path = dir.join(DOUBT);
    if !path.exists() {
        return Ok(());
    }
    os::remove_file(Site::DoubtRemove, &path, faults).map_err(StoreError::at("remove", &path))?;
    sealed_file::sync_dir(Site::LayerDirSync, dir, faults)
}
