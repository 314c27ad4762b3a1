//! Why the store could not do something.

use std::io;
use std::path::{Path, PathBuf};

use hearth_protocol::rpc::FailureKind;
use hearth_protocol::{ImageId, LayerId};

use crate::disk::DiskError;

/// Why an operation of the store failed. Every text says what to do next where the user can do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A sync failed: what was written before may be lost, and no later sync can tell.
    #[error("{what}: {source}; what was not flushed before may be lost: attach again to open what was")]
    Unsynced {
        /// What was attempted, on what.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// Another process has the store open.
    #[error(
        "the store {0} is open in another process: stop that node daemon first, or give this one another directory"
    )]
    InUse(PathBuf),
    /// A file is not what this build wrote.
    #[error("{path} is damaged: {why}; restore it from another copy, or remove the image")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file was written by a newer build.
    #[error("{path} has format version {found}, this build reads up to {known}: upgrade Hearth first")]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Highest version known here.
        known: u32,
    },
    /// No image of that name or id.
    #[error("no image {0} in this store")]
    NoImage(String),
    /// The store does not hold that layer.
    #[error("this store does not hold layer {0}")]
    NoLayer(LayerId),
    /// No snapshot of that name.
    #[error("image {image} has no snapshot {snapshot}")]
    NoSnapshot {
        /// The image's name.
        image: String,
        /// The snapshot asked for.
        snapshot: String,
    },
    /// The name is taken.
    #[error("{what} {name} exists already: choose another name")]
    Exists {
        /// `image` or `snapshot`.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// The image is being served.
    #[error("image {0} is attached: detach it first")]
    Attached(String),
    /// Clones stand on the image's layers.
    #[error("image {image} has clones ({clones}): delete them first")]
    HasClones {
        /// The image.
        image: String,
        /// Its clones' names, some of them.
        clones: String,
    },
    /// The image is one of several replicas, and what was asked for is done to all of them or to none.
    #[error(
        "image {0} has replicas on several nodes: it is served, changed and deleted by way of its members, not in this \
         store alone"
    )]
    Replicated(String),
    /// The image is served by this node alone.
    #[error("image {0} is here without replicas: it has no members whose record could be kept")]
    NotReplicated(String),
    /// A replica whose disk failed.
    #[error(
        "the replica of image {image} on this node failed ({why}): take this node out of the image's locations, and add \
         it again once its disk is sound"
    )]
    ReplicaFailed {
        /// The image.
        image: String,
        /// What happened.
        why: String,
    },
    /// A size, block size or depth outside what images can have.
    #[error("{0}")]
    Unfit(String),
    /// What lies behind the new end would be lost.
    #[error(
        "image {image} has {now} bytes and cannot shrink to {size}: what the guest keeps behind would be lost. Shrink \
         the file system in the guest, create an image of the new size, and copy"
    )]
    Shrinks {
        /// The image.
        image: String,
        /// Its size, bytes.
        now: u64,
        /// The size asked for, bytes.
        size: u64,
    },
    /// The file to import is not a raw disk image.
    #[error("cannot import {path}: {why}")]
    NotRaw {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        why: String,
    },
    /// No room left.
    #[error("no space left in the store ({0}): delete images or add disk space")]
    NoSpace(String),
}

impl StoreError {
    /// Wraps an operating system's error; `ENOSPC` and `EDQUOT` become [`StoreError::NoSpace`].
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        if is_no_space(&source) {
            StoreError::NoSpace(what.into())
        } else {
            StoreError::Io {
                what: what.into(),
                source,
            }
        }
    }

    /// As [`StoreError::io`], for an action on a path.
    pub fn at<'a>(action: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::io(format!("cannot {action} {}", path.display()), source)
    }

    /// What is missing, by id.
    pub fn no_image(id: ImageId) -> Self {
        StoreError::NoImage(id.to_string())
    }

    /// The kind that requests from outside are answered with.
    pub fn kind(&self) -> FailureKind {
        match self {
            StoreError::NoImage(_) | StoreError::NoLayer(_) | StoreError::NoSnapshot { .. } => FailureKind::NotFound,
            StoreError::Exists { .. } => FailureKind::Conflict,
            StoreError::Attached(_)
            | StoreError::HasClones { .. }
            | StoreError::InUse(_)
            | StoreError::Replicated(_)
            | StoreError::NotReplicated(_)
            | StoreError::Shrinks { .. } => FailureKind::Refused,
            StoreError::Unfit(_) | StoreError::NotRaw { .. } => FailureKind::Usage,
            StoreError::Newer { .. } => FailureKind::NotSupported,
            StoreError::Io { .. }
            | StoreError::Unsynced { .. }
            | StoreError::Damaged { .. }
            | StoreError::ReplicaFailed { .. }
            | StoreError::NoSpace(_) => FailureKind::Failed,
        }
    }
}

impl From<StoreError> for DiskError {
    fn from(err: StoreError) -> Self {
        match err {
            StoreError::NoSpace(what) => DiskError::NoSpace(what),
            StoreError::Io { what, source } | StoreError::Unsynced { what, source } => DiskError::Io { what, source },
            other => DiskError::Io {
                what: "the store".into(),
                source: io::Error::other(other.to_string()),
            },
        }
    }
}

/// Whether the error says that the file system or quota is full.
pub(crate) fn is_no_space(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// An I/O failure as a disk sees it.
pub(crate) fn disk_io(what: impl Into<String>, source: io::Error) -> DiskError {
    if is_no_space(&source) {
        DiskError::NoSpace(what.into())
    } else {
        DiskError::Io {
            what: what.into(),
            source,
        }
    }
}
