//! What an image with replicas looks like, and how its bytes lie in blocks.

use hearth_protocol::{BlockIndex, ImageName, LayerId};
use hearth_replication::request::Extent;

use super::piece::{Body, Piece};

/// What an image looks like to its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Its name.
    pub name: ImageName,
    /// Bytes.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u64,
    /// The layer that takes writes.
    pub layer: LayerId,
}

impl Shape {
    /// The blocks that bytes lie in; there is one at least.
    pub fn extent(&self, offset: u64, length: u64) -> Extent {
        Extent {
            first: BlockIndex(offset / self.block_size),
            last: BlockIndex((offset + length.max(1) - 1) / self.block_size),
        }
    }

    /// The last block.
    pub fn end(&self) -> BlockIndex {
        BlockIndex(self.size.div_ceil(self.block_size).max(1) - 1)
    }

    /// The bytes of blocks, as far as the image goes.
    pub(super) fn bytes(&self, extent: Extent) -> Piece {
        let offset = extent.first.0 * self.block_size;
        let end = (extent.last.0 + 1).saturating_mul(self.block_size).min(self.size);
        Piece {
            offset,
            body: Body::Wanted(end.saturating_sub(offset)),
        }
    }

    /// Whether a piece lies within the blocks and within the image.
    pub(super) fn holds(&self, piece: &Piece, extent: Extent) -> bool {
        let within = self.bytes(extent);
        let end = piece.offset.checked_add(piece.body.length());
        piece.offset >= within.offset && end.is_some_and(|end| end <= within.offset + within.body.length())
    }
}
