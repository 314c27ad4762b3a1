//! Brings store and log together: after a crash between the two, and after an operator accepted that the log lost its
//! end. The store is the truth about what is here; the log, about what was deleted and who may write.
//!
//! The log is told of images, snapshots, sizes, attaches and their ends that it does not know, and of deletions that it
//! lost, of which this node has a proof ([`super::gone`]). Images that the log says are deleted leave the store.

use std::collections::BTreeSet;

use hearth_protocol::rpc::Failure;
use hearth_protocol::{ByteLen, Event, ImageId, ImageName, LayerId, Seq, SnapshotName};

use super::locations::never_owned;
use super::node::{failed, store_failure};
use super::requests::{Requests, created};
use super::resize;
use crate::store::ImageMeta;

/// Compares every image of the store, and every one that the log says is here.
pub async fn reconcile(requests: &Requests) {
    // First: a name may belong to another image by now.
    for (image, name) in requests.listed_and_absent() {
        if !requests.node.gone.has(image) {
            continue;
        }
        match requests.tell_deleted(image).await {
            Ok(()) => tracing::info!(%name, "told a deletion that the log had lost"),
            Err(error) => tracing::error!(%name, %error, "the log lists an image that was deleted here"),
        }
    }
    for meta in requests.node.store.images() {
        if requests.replica(meta.id).is_some() {
            reconcile_replica(requests, &meta).await;
            continue;
        }
        reconcile_image(requests, &meta).await;
        match requests.tell(&meta).await {
            Ok(0) => {}
            Ok(told) => tracing::info!(image = %meta.name, told, "told changes that the log did not know"),
            Err(error) => tracing::error!(image = %meta.name, %error, "store and log differ about an image"),
        }
    }
}

/// A copy of an image that the log does not know: its creation did not get so far, or the image was deleted meanwhile. If
/// the log lost the image itself, its copies stay.
async fn reconcile_replica(requests: &Requests, meta: &ImageMeta) {
    let (known, deleted) = {
        let facts = requests.link.facts();
        (facts.image(meta.id).is_some(), facts.aggregate(meta.id) > Seq(0))
    };
    let Some(replica) = requests.replica(meta.id).filter(|_| !known) else {
        return;
    };
    if !deleted && !replica.look(never_owned) {
        tracing::error!(image = %meta.name, "the log does not know an image of which this node holds a copy; it is kept");
        return;
    }
    requests.node.replicas.remove(meta.id);
    let removed = requests
        .blocking(move |_| replica.forget().map_err(|error| store_failure(&error)))
        .await;
    match removed {
        Ok(()) => tracing::info!(image = %meta.name, "removed a copy of an image that is not there"),
        Err(error) => tracing::error!(image = %meta.name, %error, "a copy of an image that is not there stays behind"),
    }
}

async fn reconcile_image(requests: &Requests, meta: &ImageMeta) {
    let (known, deleted) = {
        let facts = requests.link.facts();
        (facts.image(meta.id).is_some(), facts.aggregate(meta.id) > Seq(0))
    };
    if known {
        return;
    }
    let served = requests.node.served.get(meta.id).is_some();
    let result = match (deleted, served) {
        (true, false) => requests
            .remove(meta.id)
            .await
            .map(|_| "removed an image that the log says is deleted"),
        (true, true) => Err(failed("the log says it is deleted, but it is in service".into())),
        (false, _) => requests
            .link
            .publish_image(meta.id, &created(&requests.node, meta))
            .await
            .map(|_| "announced an image that the log did not know"),
    };
    match result {
        Ok(what) => tracing::info!(image = %meta.name, what),
        Err(error) => tracing::error!(image = %meta.name, %error, "store and log differ about an image"),
    }
}

/// What the log knows of an image's layers.
struct Known {
    size: ByteLen,
    layers: Vec<LayerId>,
    snapshots: BTreeSet<SnapshotName>,
}

/// The events that make the log know an image's stack, snapshots and size, oldest first.
fn missing(meta: &ImageMeta, known: &Known) -> Vec<Event> {
    let grown = |sealed, top| Event::ImageResized {
        image: meta.id,
        size: ByteLen(meta.size),
        sealed,
        top,
    };
    let mut events = Vec::new();
    // From the bottom up: each layer was sealed by a snapshot, or by a growth, when the one above it came.
    for pair in meta.stack.windows(2).rev() {
        let (top, sealed) = (pair[0], pair[1]);
        match meta.snapshots.iter().find(|snapshot| snapshot.layer == sealed) {
            Some(snapshot) if !known.snapshots.contains(&snapshot.name) => events.push(Event::SnapshotTaken {
                image: meta.id,
                name: snapshot.name.clone(),
                sealed,
                top,
            }),
            None if !known.layers.contains(&top) => events.push(grown(sealed, top)),
            _ => {}
        }
    }
    let told = events.iter().any(|event| matches!(event, Event::ImageResized { .. }));
    if known.size < ByteLen(meta.size) && !told {
        events.push(resize::resized(meta).0);
    }
    events
}

impl Requests {
    /// The images that the log says are on this node and that its store does not have, not even damaged.
    pub(super) fn listed_and_absent(&self) -> Vec<(ImageId, ImageName)> {
        let damaged = self.node.store.damaged().into_iter().map(|(id, _)| id);
        let here: BTreeSet<ImageId> = self
            .node
            .store
            .images()
            .iter()
            .map(|meta| meta.id)
            .chain(damaged)
            .collect();
        let facts = self.link.facts();
        facts
            .images()
            .filter(|(id, image)| image.created.members.is_empty() && !here.contains(id))
            .filter(|(_, image)| image.created.node == self.node.config.id)
            .map(|(id, image)| (id, image.created.name.clone()))
            .collect()
    }

    /// Takes an image out of the store that the log says is deleted; the layers that went with it.
    pub(super) async fn remove(&self, image: ImageId) -> Result<Vec<LayerId>, Failure> {
        self.blocking(move |node| {
            if let Err(error) = node.gone.remember(image) {
                tracing::warn!(%image, %error, "if the log loses this deletion, it is not told again");
            }
            node.store.delete(image).map_err(|e| store_failure(&e))
        })
        .await
    }

    async fn tell_deleted(&self, image: ImageId) -> Result<(), Failure> {
        self.tell_detached(image).await?;
        self.link.publish_image(image, &Event::ImageDeleted { image }).await?;
        Ok(())
    }

    /// Tells that this node serves an image no more, if the log says it does.
    async fn tell_detached(&self, image: ImageId) -> Result<u64, Failure> {
        let attached = {
            let facts = self.link.facts();
            let known = facts.validity().image(image);
            known
                .filter(|known| matches!(&known.owner, Some((node, _)) if *node == self.node.config.id))
                .map(|known| known.epoch)
        };
        let Some(epoch) = attached else { return Ok(0) };
        self.link
            .publish_image(image, &Event::ImageDetached { image, epoch })
            .await?;
        Ok(1)
    }

    /// Tells everything about an image that the log does not know.
    async fn tell(&self, meta: &ImageMeta) -> Result<u64, Failure> {
        let mut told = self.tell_layers(meta).await? + self.tell_epochs(meta).await?;
        if self.node.served.get(meta.id).is_none() && self.node.waiting_why(meta.id).is_none() {
            told += self.tell_detached(meta.id).await?;
        }
        Ok(told)
    }

    /// Tells of layers, snapshots and a size that the log does not know.
    async fn tell_layers(&self, meta: &ImageMeta) -> Result<u64, Failure> {
        let known = self.link.facts().image(meta.id).map(|image| Known {
            size: image.created.size,
            layers: image.created.layers.clone(),
            snapshots: image.snapshots.iter().map(|(name, _)| name.clone()).collect(),
        });
        let Some(known) = known else { return Ok(0) };
        let events = missing(meta, &known);
        for event in &events {
            self.link.publish_image(meta.id, event).await?;
            if let Event::SnapshotTaken { sealed, .. } | Event::ImageResized { sealed, .. } = event {
                self.sealed(*sealed).await?;
            }
        }
        Ok(events.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::{Epoch, SetVersion};

    use super::*;
    use crate::store::{Record, Snapshot};

    fn meta(stack: &[u128], snapshots: &[(&str, u128)]) -> ImageMeta {
        ImageMeta {
            id: ImageId(1),
            name: "a/b".parse().unwrap(),
            size: 8 << 20,
            block_size: 65_536,
            stack: stack.iter().copied().map(LayerId).collect(),
            snapshots: snapshots
                .iter()
                .map(|(name, layer)| Snapshot {
                    name: name.parse().unwrap(),
                    layer: LayerId(*layer),
                    size: 8 << 20,
                })
                .collect(),
            parent: None,
            record: Record {
                epoch: Epoch(0),
                lease: None,
                set_version: SetVersion(1),
                location_map: Vec::new(),
            },
            storage_incarnation: None,
            clean: true,
            closed: None,
        }
    }

    /// What is told, as `name sealed/top`, of a log that knows these layers and snapshots and a size in MiB.
    fn check(meta: &ImageMeta, layers: &[u128], snapshots: &[&str], mib: u64, expect: &[&str]) {
        let known = Known {
            size: ByteLen(mib << 20),
            layers: layers.iter().copied().map(LayerId).collect(),
            snapshots: snapshots.iter().map(|name| name.parse().unwrap()).collect(),
        };
        let told: Vec<_> = missing(meta, &known)
            .iter()
            .map(|event| match event {
                Event::SnapshotTaken { name, sealed, top, .. } => format!("{name} {}/{}", sealed.0, top.0),
                Event::ImageResized { size, sealed, top, .. } => {
                    assert_eq!(*size, ByteLen(8 << 20));
                    format!("grown {}/{}", sealed.0, top.0)
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(told, expect, "{layers:?} {snapshots:?}");
    }

    #[test]
    fn what_the_log_lost_of_a_stack_is_told_from_the_bottom_up() {
        // s1 seals 1, a growth seals 2, s3 seals 3, 4 is the top.
        let image = meta(&[4, 3, 2, 1], &[("s1", 1), ("s3", 3)]);
        check(&image, &[4, 3, 2, 1], &["s1", "s3"], 8, &[]);
        check(&image, &[1], &[], 4, &["s1 1/2", "grown 2/3", "s3 3/4"]);
        check(&image, &[2, 1], &["s1"], 4, &["grown 2/3", "s3 3/4"]);
        check(&image, &[3, 2, 1], &["s1"], 8, &["s3 3/4"]);
        // Announced with its whole stack, without the names.
        check(&image, &[4, 3, 2, 1], &[], 8, &["s1 1/2", "s3 3/4"]);
        check(&image, &[4, 3, 2, 1], &["s1", "s3"], 4, &["grown 3/4"]);
        check(&meta(&[1], &[]), &[1], &[], 8, &[]);
    }
}
