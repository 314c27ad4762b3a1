//! What is wrong on this node, as it knows by itself: of its images, and of its place in the log.

use hearth_protocol::limits::NODE_HEALTH_MAX;
use hearth_protocol::rpc::{ImageInfo, NodeHealth};
use hearth_protocol::view::HealthItem;
use hearth_protocol::{ByteLen, ImageId, NodeId};

use super::requests::Requests;
use crate::store::{ImageMeta, StoreError};
use crate::volume::{Ailment, STORE_FULL, in_words};

fn damaged(error: &StoreError) -> Ailment {
    Ailment {
        code: "IMAGE_DAMAGED",
        error: true,
        what: error.to_string(),
        fix: "Put a sound copy of the file in its place; the image is served again by itself then".into(),
    }
}

/// A copy that is out of the set for want of room.
fn left_for_room() -> Ailment {
    Ailment {
        code: STORE_FULL,
        error: false,
        what: "the store is full, so this copy left the set, and the image goes on without it".into(),
        fix: "Delete images or add disk space, then: hearth location add; or wait until the copy is replaced".into(),
    }
}

/// An image whose clients wait for members.
fn waits_for(members: &[NodeId]) -> Option<Ailment> {
    let names: Vec<_> = members.iter().map(NodeId::as_str).collect();
    (!names.is_empty()).then(|| Ailment {
        code: "IMAGE_WAITS",
        error: true,
        what: format!("reads and writes wait: {} does not answer", names.join(", ")),
        fix: "Start it, or bring its network back; others go on without it by themselves while the log can be written"
            .into(),
    })
}

impl Requests {
    /// What is wrong with an image.
    pub(super) fn ailments(&self, meta: &ImageMeta) -> Vec<Ailment> {
        let replica = self.replica(meta.id);
        let left = replica
            .as_ref()
            .filter(|replica| replica.left_for_room())
            .map(|_| left_for_room());
        if let Some(served) = self.node.served.get(meta.id) {
            let waits = replica.and_then(|replica| waits_for(&replica.waits_for()));
            let own = served.volume.ailments().into_iter();
            let own = own.filter(|ailment| left.is_none() || ailment.code != STORE_FULL);
            return waits.into_iter().chain(left.clone()).chain(own).collect();
        }
        if let Some(why) = self.node.waiting_why(meta.id) {
            return vec![Ailment {
                code: "IMAGE_NOT_SERVED",
                error: true,
                what: format!("is to be served and cannot be: {why}"),
                fix: "Remove what stands in the way; it is tried again every 2 s".into(),
            }];
        }
        if let Some(left) = left {
            return vec![left];
        }
        match self.node.store.closed(meta) {
            Ok(None) => Vec::new(),
            Ok(Some(closed)) => vec![Ailment {
                fix: "The next attach opens it, without what was not flushed".into(),
                ..Ailment::closed(&closed)
            }],
            Err(error) => vec![damaged(&error)],
        }
    }

    fn damaged_images(&self) -> Vec<(ImageId, Ailment)> {
        let found = self.node.store.damaged();
        found.iter().map(|(id, error)| (*id, damaged(error))).collect()
    }

    /// The images whose metadata cannot be read, as far as the log knows them.
    pub(super) fn damaged_infos(&self) -> Vec<ImageInfo> {
        let facts = self.link.facts();
        let info = |(id, ailment): (ImageId, Ailment)| {
            let known = facts.image(id)?;
            Some(ImageInfo {
                id,
                name: known.created.name.clone(),
                size: known.created.size,
                block_size: known.created.block_size,
                allocated: ByteLen(0),
                layers: known.created.layers.clone(),
                snapshots: known.snapshots.iter().map(|(name, _)| name.clone()).collect(),
                parent: None,
                node: self.node.config.id.clone(),
                locations: Vec::new(),
                record: None,
                attached: None,
                trouble: in_words(&[ailment]),
            })
        };
        self.damaged_images().into_iter().filter_map(info).collect()
    }

    /// Everything that is wrong.
    pub(super) fn health(&self) -> NodeHealth {
        let node = &self.node.config.id;
        let mut items = Vec::new();
        if let Some(why) = self.link.frozen() {
            items.push(HealthItem::new(
                "NODE_FROZEN",
                true,
                format!("node {node} makes no changes to images, their I/O goes on: {why}"),
                "put back what the stream lost, or accept the loss: hearth log recover --help",
            ));
        }
        let item = |what: String, ailment: Ailment| {
            let message = format!("{what} on {node}: {}", ailment.what);
            HealthItem::new(ailment.code, ailment.error, message, ailment.fix)
        };
        for meta in self.node.store.images() {
            let found = self.ailments(&meta).into_iter();
            items.extend(found.map(|ailment| item(format!("image {}", meta.name), ailment)));
        }
        for (id, ailment) in self.damaged_images() {
            let name = self.link.facts().image(id).map(|known| known.created.name.to_string());
            items.push(item(
                format!("image {}", name.unwrap_or_else(|| id.to_string())),
                ailment,
            ));
        }
        // Before both were compared, the log may still list what is to go.
        if self.link.takes_changes().is_ok() {
            for (_, name) in self.listed_and_absent() {
                items.push(item(
                    format!("image {name}"),
                    Ailment {
                        code: "IMAGE_MISSING",
                        error: true,
                        what: "the log lists it there, and the store does not have it".into(),
                        fix: "Is the store's disk mounted? Bring it back, then start the node again".into(),
                    },
                ));
            }
        }
        HealthItem::sort(&mut items);
        let omitted = items.len().saturating_sub(NODE_HEALTH_MAX);
        items.truncate(NODE_HEALTH_MAX);
        NodeHealth {
            node: node.clone(),
            items,
            omitted: omitted as u64,
        }
    }
}
