//! An image's layers as reads walk through them.

use std::sync::Arc;

use hearth_protocol::{BlockIndex, LayerId};

use crate::disk::DiskError;
use crate::store::{BlockState, Layer, LayerRef};
use crate::tier::{LayerHandle, RamTier};

/// Reads blocks of sealed layers that this node does not hold, from the node that does.
pub trait BlockSource: Send + Sync + 'static {
    /// Fills `buf` with the bytes at `offset` of the image as it was when `layer` was sealed: what lies in that layer
    /// or, where it has nothing, in those below it.
    ///
    /// # Errors
    /// [`DiskError::Io`] when no node that holds the layer answers.
    fn read_block(&self, layer: LayerId, offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;
}

/// A node without peers.
pub struct NoPeers;

impl BlockSource for NoPeers {
    fn read_block(&self, layer: LayerId, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        Err(DiskError::Io {
            what: format!(
                "cannot read {} bytes at {offset} of layer {layer}: this node does not hold it and has no peers",
                buf.len()
            ),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }
}

/// One layer of a stack.
pub(super) struct Level {
    pub layer: LayerRef,
    pub handle: LayerHandle,
}

/// The layers, top first. Never changes; a snapshot makes a new one.
pub(super) struct Stack {
    pub levels: Vec<Level>,
    pub block_size: u64,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Where {
    /// Nowhere: it reads as zero.
    Hole,
    /// In the data file of this level.
    Local(usize),
    /// On another node, which looks from this level down.
    Remote(usize),
}

impl Stack {
    pub fn new(layers: Vec<LayerRef>, block_size: u64, tier: &RamTier) -> Self {
        let levels = layers
            .into_iter()
            .map(|layer| Level {
                handle: tier.register(layer.id(), block_size),
                layer,
            })
            .collect();
        Self { levels, block_size }
    }

    /// Looks for a block from level `from` down.
    pub fn find(&self, block: u64, from: usize) -> Where {
        for (i, level) in self.levels.iter().enumerate().skip(from) {
            match &level.layer {
                LayerRef::Remote(_) => return Where::Remote(i),
                LayerRef::Local(layer) if block < layer.map().blocks() => match layer.map().get(block) {
                    BlockState::Data => return Where::Local(i),
                    BlockState::Zero => return Where::Hole,
                    BlockState::Absent => {}
                },
                // The image has grown since this layer was sealed.
                LayerRef::Local(_) => {}
            }
        }
        Where::Hole
    }

    /// As [`Self::find`], with the length of the run for which the answer is the same, at most `max`.
    pub fn find_run(&self, block: u64, max: u64) -> (Where, u64) {
        let mut run = max;
        for (i, level) in self.levels.iter().enumerate() {
            match &level.layer {
                LayerRef::Remote(_) => return (Where::Remote(i), run),
                LayerRef::Local(layer) if block < layer.map().blocks() => {
                    let (state, len) = layer.map().run(block, run);
                    run = len;
                    match state {
                        BlockState::Data => return (Where::Local(i), run),
                        BlockState::Zero => return (Where::Hole, run),
                        BlockState::Absent => {}
                    }
                }
                LayerRef::Local(_) => {}
            }
        }
        (Where::Hole, run)
    }

    /// The layer that holds a block; `None` for a hole.
    pub fn layer_of(&self, block: BlockIndex) -> Option<LayerId> {
        match self.find(block.0, 0) {
            Where::Hole => None,
            Where::Local(i) | Where::Remote(i) => Some(self.levels[i].layer.id()),
        }
    }

    pub fn handle(&self, level: usize) -> LayerHandle {
        self.levels[level].handle
    }

    /// Reads from what was found, past RAM.
    pub fn read_from(
        &self,
        found: Where,
        offset: u64,
        buf: &mut [u8],
        remote: &dyn BlockSource,
    ) -> Result<(), DiskError> {
        match found {
            Where::Hole => {
                buf.fill(0);
                Ok(())
            }
            Where::Local(i) => match &self.levels[i].layer {
                LayerRef::Local(layer) => read_layer(layer, offset, buf),
                LayerRef::Remote(_) => unreachable!("a block was found in a layer that is not here"),
            },
            Where::Remote(i) => remote.read_block(self.levels[i].layer.id(), offset, buf),
        }
    }
}

/// Reads from a layer; what lies past its end, because the image grew later, is zero.
fn read_layer(layer: &Arc<Layer>, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
    let have = layer.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    let (inside, past) = buf.split_at_mut(have);
    past.fill(0);
    if inside.is_empty() {
        return Ok(());
    }
    layer.read(offset, inside)
}
