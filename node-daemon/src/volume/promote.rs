//! The scheduler's orders: bring blocks of a layer into the main region, drop them from it.

use hearth_protocol::{BlockIndex, Epoch, LayerId};

use super::Volume;
use super::extents::block_regions;
use super::stack::Where;
use crate::store::{BlockState, LayerRef};
use crate::tier::{Filled, Region};

/// What became of a promotion.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Promoted {
    /// Blocks now in the main region, in the order asked.
    pub done: Vec<BlockIndex>,
    /// Blocks that are not, each with a short reason.
    pub skipped: Vec<(BlockIndex, &'static str)>,
    /// Bytes read for it.
    pub bytes: u64,
}

/// What became of a demotion.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Demoted {
    /// Blocks dropped from the main region, in the order asked.
    pub done: Vec<BlockIndex>,
    /// Blocks that were not there.
    pub skipped: Vec<(BlockIndex, &'static str)>,
    /// Bytes now free.
    pub bytes: u64,
}

impl Volume {
    /// Brings blocks of one of this image's layers into the main region. For the growing top layer `epoch` must be
    /// this attach's. At most `bytes_max` are read. `Err` says why nothing was done.
    ///
    /// # Errors
    /// A sentence for the command's answer.
    pub fn promote(
        &self,
        layer: LayerId,
        blocks: &[BlockIndex],
        epoch: Epoch,
        bytes_max: u64,
    ) -> Result<Promoted, String> {
        let stack = self.stack();
        let level = stack
            .levels
            .iter()
            .position(|l| l.layer.id() == layer)
            .ok_or_else(|| format!("image {} does not stand on layer {layer}", self.image))?;
        if level == 0 && self.read_only.is_none() && epoch != self.epoch {
            return Err(format!(
                "layer {layer} grows under epoch {}, the order was given under {epoch}",
                self.epoch
            ));
        }
        let handle = stack.handle(level);
        let units = self.block_size / handle.unit_bytes();
        let units_all = self.size().div_ceil(handle.unit_bytes());
        let mut result = Promoted::default();
        for &block in blocks {
            let found = match &stack.levels[level].layer {
                LayerRef::Remote(_) => Where::Remote(level),
                LayerRef::Local(l) if block.0 < l.map().blocks() && l.map().get(block.0) == BlockState::Data => {
                    Where::Local(level)
                }
                LayerRef::Local(_) => Where::Hole,
            };
            if found == Where::Hole || block.0 * units >= units_all {
                result.skipped.push((block, "not_in_layer"));
                continue;
            }
            let mut why = None;
            for unit in block.0 * units..((block.0 + 1) * units).min(units_all) {
                let resident = self.tier.region(handle, unit as u32).is_some();
                if !resident && result.bytes + handle.unit_bytes() > bytes_max {
                    why = Some("over_bytes_of_command");
                    break;
                }
                match self.bring_in(&stack, found, handle, unit as u32, Region::Main) {
                    Ok((filled, bytes)) => {
                        result.bytes += bytes;
                        why = match filled {
                            Filled::Done | Filled::Present => continue,
                            Filled::Stale => Some("written_during_fill"),
                            Filled::Full => Some("main_region_full"),
                        };
                    }
                    Err(err) => {
                        tracing::warn!(%layer, %block, %err, "cannot read a block to promote");
                        why = Some("read_failed");
                    }
                }
                break;
            }
            match why {
                None => result.done.push(block),
                Some(why) => {
                    // A block is promoted as a whole or not at all.
                    (block.0 * units..(block.0 + 1) * units).for_each(|unit| {
                        self.tier.demote(handle, unit as u32);
                    });
                    result.skipped.push((block, why));
                }
            }
        }
        Ok(result)
    }

    /// Drops blocks of one of this image's layers from the main region.
    pub fn demote(&self, layer: LayerId, blocks: &[BlockIndex]) -> Demoted {
        let handle = self.tier.register(layer, self.block_size);
        let units = self.block_size / handle.unit_bytes();
        let mut result = Demoted::default();
        for &block in blocks {
            if !block_regions(&self.tier, handle, block.0, self.block_size).any(|r| r == Some(Region::Main)) {
                result.skipped.push((block, "not_in_main_region"));
                continue;
            }
            for unit in block.0 * units..(block.0 + 1) * units {
                if self.tier.demote(handle, unit as u32) {
                    result.bytes += handle.unit_bytes();
                }
            }
            result.done.push(block);
        }
        result
    }
}
