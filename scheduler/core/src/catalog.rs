//! Images and layers as the log tells them: stacks, snapshots, and which nodes hold which layer.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::aggregate::Change;
use hearth_protocol::event::{ImageAttached, ImageCreated};
use hearth_protocol::heat::{HeatOrigin, LatencySummary};
use hearth_protocol::record::{Nodes, Record};
use hearth_protocol::{ByteLen, Epoch, ImageId, ImageName, LayerId, NodeId, SetVersion, SnapshotName};
use serde::{Deserialize, Serialize};

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub name: ImageName,
    pub size: ByteLen,
    pub block_size: ByteLen,
    /// The stack, top first.
    pub layers: Vec<LayerId>,
    /// Name of the image a clone came from, as it was then, and the snapshot.
    pub parent: Option<(ImageName, SnapshotName)>,
    /// Oldest first.
    pub snapshots: Vec<SnapshotName>,
    pub node: NodeId,
    pub attached: bool,
    pub epoch: Epoch,
    pub set_version: SetVersion,
    pub last: LastWindow,
    /// Of an image with replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<Replicas>,
}

/// Where an image's replicas are, as its record says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replicas {
    /// How many there should be: as many as the image was created with, until an operator says otherwise.
    pub wanted: u64,
    /// Members of the runs that have the fewest.
    pub fewest: u64,
    /// Members of any run.
    pub members: Nodes,
    /// Joiners of any run.
    pub joiners: Nodes,
}

impl Replicas {
    fn located(&mut self, record: &Record) {
        self.fewest = record
            .runs()
            .iter()
            .map(|run| run.members.len() as u64)
            .min()
            .unwrap_or(0);
        self.members = record.members();
        self.joiners = record.runs().iter().flat_map(|run| run.joiners.clone()).collect();
    }
}

impl Image {
    /// Blocks in all, the last one maybe partial.
    pub(crate) fn blocks(&self) -> u64 {
        self.size.0.div_ceil(self.block_size.0.max(1))
    }
}

/// What the image's last heat event said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct LastWindow {
    pub origin: Option<HeatOrigin>,
    /// The tick before which it was folded.
    pub tick: u64,
    pub reports: u64,
    pub reads: u64,
    pub writes: u64,
    pub ram_hits: u64,
    pub ram_misses: u64,
    pub lost: u64,
    pub read_latency: LatencySummary,
    pub write_latency: LatencySummary,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layer {
    pub block_size: ByteLen,
    /// The image whose top it is; `None` once it is sealed.
    pub growing: Option<ImageId>,
    /// Epoch of the image when the layer was sealed.
    pub sealed_at: Epoch,
    /// Nodes that hold it whole.
    pub holders: BTreeSet<NodeId>,
    /// Images whose stack it is in.
    pub images: BTreeSet<ImageId>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Catalog {
    pub images: BTreeMap<ImageId, Image>,
    pub layers: BTreeMap<LayerId, Layer>,
}

impl Catalog {
    /// Whether some image has replicas. A pass over all images where none has.
    pub(crate) fn has_replicas(&self) -> bool {
        self.images.values().any(|image| image.replicas.is_some())
    }

    pub(crate) fn created(&mut self, event: &ImageCreated) {
        let parent = event.parent.as_ref().map(|(id, snapshot)| {
            // A parent that is gone keeps a readable place holder: its id is a valid name part.
            let name = self.images.get(id).map(|p| p.name.clone());
            (name, *id, snapshot.clone())
        });
        let parent = parent.map(|(name, id, snapshot)| {
            let fallback = || format!("deleted/{id}").parse().expect("hexadecimal digits are a name");
            (name.unwrap_or_else(fallback), snapshot)
        });
        for (depth, id) in event.layers.iter().enumerate() {
            let layer = self.layers.entry(*id).or_insert_with(|| Layer {
                block_size: event.block_size,
                growing: None,
                sealed_at: Epoch(0),
                holders: BTreeSet::new(),
                images: BTreeSet::new(),
            });
            layer.images.insert(event.image);
            if depth == 0 {
                layer.growing = Some(event.image);
                layer.holders.insert(event.node.clone());
                layer.holders.extend(event.members.iter().cloned());
            }
        }
        self.images.insert(
            event.image,
            Image {
                name: event.name.clone(),
                size: event.size,
                block_size: event.block_size,
                layers: event.layers.clone(),
                parent,
                snapshots: Vec::new(),
                node: event.node.clone(),
                attached: false,
                epoch: Epoch(0),
                set_version: event.set_version,
                last: LastWindow::default(),
                replicas: (!event.members.is_empty()).then(|| Replicas {
                    wanted: event.members.len() as u64,
                    fewest: event.members.len() as u64,
                    members: event.members.clone(),
                    joiners: Nodes::new(),
                }),
            },
        );
    }

    /// Returns the top layer, whose copies of earlier epochs are stale now.
    pub(crate) fn attached(&mut self, event: &ImageAttached) -> Option<LayerId> {
        let image = self.images.get_mut(&event.image)?;
        image.attached = true;
        image.epoch = event.epoch;
        image.set_version = event.set_version;
        image.layers.first().copied()
    }

    /// The record of an image with replicas changed. Returns the top layer if another epoch began: copies of earlier
    /// ones are stale now.
    pub(crate) fn located(&mut self, id: ImageId, change: &Change) -> Option<LayerId> {
        let image = self.images.get_mut(&id)?;
        let (epoch, stamp) = (image.epoch, change.to.stamp());
        let top = image.layers.first().copied()?;
        image.set_version = stamp.set_version;
        if let Some(replicas) = &mut image.replicas {
            replicas.located(&change.to);
        }
        if let Some(layer) = self.layers.get_mut(&top) {
            layer.holders = change.to.members();
        }
        if epoch == stamp.epoch {
            return None;
        }
        image.node = change.by.clone();
        image.attached = true;
        image.epoch = stamp.epoch;
        Some(top)
    }

    pub(crate) fn detached(&mut self, id: ImageId) {
        if let Some(image) = self.images.get_mut(&id) {
            image.attached = false;
        }
    }

    pub(crate) fn snapshot_taken(&mut self, id: ImageId, name: &SnapshotName, sealed: LayerId, top: LayerId) {
        let Some(image) = self.images.get_mut(&id) else {
            return;
        };
        if !image.snapshots.contains(name) {
            image.snapshots.push(name.clone());
        }
        self.pushed(id, sealed, top);
    }

    pub(crate) fn resized(&mut self, id: ImageId, size: ByteLen, sealed: LayerId, top: LayerId) {
        if let Some(image) = self.images.get_mut(&id) {
            image.size = size;
        }
        self.pushed(id, sealed, top);
    }

    /// A layer took no more writes, and an empty one was put on top of it.
    fn pushed(&mut self, id: ImageId, sealed: LayerId, top: LayerId) {
        let Some(image) = self.images.get_mut(&id) else {
            return;
        };
        if !image.layers.contains(&sealed) {
            image.layers.insert(0, sealed);
        }
        if !image.layers.contains(&top) {
            image.layers.insert(0, top);
        }
        let (node, epoch, block_size) = (image.node.clone(), image.epoch, image.block_size);
        for (layer_id, growing) in [(sealed, None), (top, Some(id))] {
            let layer = self.layers.entry(layer_id).or_insert_with(|| Layer {
                block_size,
                growing,
                sealed_at: epoch,
                holders: BTreeSet::new(),
                images: BTreeSet::new(),
            });
            layer.growing = growing;
            layer.sealed_at = epoch;
            layer.holders.insert(node.clone());
            layer.images.insert(id);
        }
    }

    pub(crate) fn snapshot_deleted(&mut self, id: ImageId, name: &SnapshotName) {
        if let Some(image) = self.images.get_mut(&id) {
            image.snapshots.retain(|s| s != name);
        }
    }

    /// Returns the layers that no image stands on any more.
    pub(crate) fn deleted(&mut self, id: ImageId) -> Vec<LayerId> {
        let Some(image) = self.images.remove(&id) else {
            return Vec::new();
        };
        let mut gone = Vec::new();
        for layer_id in image.layers {
            let Some(layer) = self.layers.get_mut(&layer_id) else {
                continue;
            };
            layer.images.remove(&id);
            if layer.growing == Some(id) {
                layer.growing = None;
            }
            if layer.images.is_empty() {
                self.layers.remove(&layer_id);
                gone.push(layer_id);
            }
        }
        gone
    }

    pub(crate) fn sealed(&mut self, id: LayerId, node: &NodeId) {
        if let Some(layer) = self.layers.get_mut(&id) {
            if let Some(image) = layer.growing.take().and_then(|i| self.images.get(&i)) {
                layer.sealed_at = image.epoch;
            }
            layer.holders.insert(node.clone());
        }
    }

    pub(crate) fn dropped(&mut self, id: LayerId, node: &NodeId) {
        if let Some(layer) = self.layers.get_mut(&id) {
            layer.holders.remove(node);
        }
    }

    /// A node said which sealed layers it holds. Adds only: a layer leaves a node by `LayerDropped`, never by being
    /// left out of a list.
    pub(crate) fn joined(&mut self, node: &NodeId, layers: &[LayerId]) {
        for id in layers {
            if let Some(layer) = self.layers.get_mut(id) {
                layer.holders.insert(node.clone());
            }
        }
    }
}
