//! Answers `hearth image export`: a job that copies a snapshot, or an image that nobody uses, into a file of the node.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hearth_protocol::rpc::{Answer, Failure, FailureKind, ImageFormat, JobKind, NodeReply};
use hearth_protocol::{ByteLen, Event, ImageName, SnapshotName};

use super::node::{failed, store_failure};
use super::requests::Requests;
use crate::disk::DiskError;
use crate::imagefile::ImageFile;
use crate::store::LayerRef;
use crate::volume::copy_out;

impl Requests {
    pub(super) fn export(
        self,
        image: ImageName,
        snapshot: Option<SnapshotName>,
        path: PathBuf,
        format: ImageFormat,
        replace: bool,
    ) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        self.link.ready()?;
        if let Some(name) = &snapshot {
            meta.snapshot(name).map_err(|e| store_failure(&e))?;
        } else if self.node.served.get(meta.id).is_some() {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("image {image} is attached: its blocks would change while they are copied"),
                format!("export a snapshot: hearth image snapshot {image}@NAME, then hearth image export {image}@NAME"),
            ));
        }
        check_target(&path, replace)?;
        let runtime = tokio::runtime::Handle::current();
        let jobs = Arc::clone(&self.jobs);
        let at = snapshot.as_ref().map_or_else(String::new, |name| format!("@{name}"));
        let what = format!("export {image}{at} to {} as {}", path.display(), format.as_str());
        let job = jobs.start(JobKind::Export, meta.name.clone(), what, move |progress| {
            let allocated = match &snapshot {
                Some(name) => {
                    let at = meta.snapshot(name).map_err(|e| store_failure(&e))?;
                    let (size, layer) = (at.size, at.layer);
                    let (_, layers) = self.node.store.sealed_stack(layer).map_err(|e| store_failure(&e))?;
                    self.copy(layers, (size, meta.block_size), &path, format, replace, progress)?
                }
                // Nobody can attach it meanwhile.
                None => self
                    .node
                    .store
                    .while_detached(meta.id, |store| {
                        let (meta, layers) = store.look_at(meta.id)?;
                        let shape = (meta.size, meta.block_size);
                        Ok(self.copy(layers, shape, &path, format, replace, progress))
                    })
                    .map_err(|e| store_failure(&e))??,
            };
            let event = Event::ImageExported {
                image: meta.id,
                snapshot,
                path: path.display().to_string(),
                format: format.as_str().into(),
                allocated: ByteLen(allocated),
            };
            runtime
                .block_on(self.link.publish_image(meta.id, &event))
                .map(drop)
                .map_err(|failure| {
                    Failure::new(
                        failure.kind,
                        format!("{} is complete, but the log does not say so: {failure}", path.display()),
                        failure.hint,
                    )
                })
        });
        Ok(NodeReply::Job(job))
    }

    /// Copies layers into a file; returns the bytes that the file takes up.
    fn copy(
        &self,
        layers: Vec<LayerRef>,
        (size, block_size): (u64, u64),
        path: &Path,
        format: ImageFormat,
        replace: bool,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64, Failure> {
        let (node, shown) = (&self.node, path.display());
        let mut file = ImageFile::create(path, format, size)
            .map_err(|error| failed(format!("cannot begin {shown} on {}: {error}", node.config.id)))?;
        let shape = (size, block_size);
        copy_out(layers, shape, &node.tier, &*node.remote, &mut file, progress).map_err(|error| match error {
            DiskError::Io { source, what } if source.kind() == io::ErrorKind::StorageFull => {
                let hint = "make room there, or export to another file system";
                Failure::new(
                    FailureKind::Failed,
                    format!("no space left for {shown} ({what}); the part that was written is removed"),
                    hint,
                )
            }
            other => failed(format!("cannot export to {shown}: {other}")),
        })?;
        file.finish(replace).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => taken(path),
            _ => failed(format!("cannot finish {shown}: {error}")),
        })
    }
}

fn taken(path: &Path) -> Failure {
    Failure::new(
        FailureKind::Conflict,
        format!("{} exists already", path.display()),
        "name another file, or replace it with --force",
    )
}

/// Whether the file can be made, before any work is done for it.
fn check_target(path: &Path, replace: bool) -> Result<(), Failure> {
    let shown = path.display();
    let usage = |message: String, hint: &str| Err(Failure::new(FailureKind::Usage, message, hint));
    if !path.is_absolute() {
        return usage(format!("{shown} is not an absolute path on the node"), "");
    }
    if !path.parent().is_some_and(|dir| dir.is_dir()) || path.file_name().is_none() {
        return usage(
            format!("{shown} is no file in an existing folder of the node"),
            "name a file in a folder that exists on the node",
        );
    }
    match std::fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(found) if !found.is_file() => usage(format!("{shown} is no regular file"), "name another file"),
        Ok(_) if replace => Ok(()),
        Ok(_) => Err(taken(path)),
    }
}
