//! What this node's disk holds of blocks, as hashes for a comparison of copies.
//!
//! RAM is left out: a copy there may be sound where the disk is not. Invariant: a block that the disk cannot read is said to
//! be that, and costs the copy nothing; nobody waits for what it holds.

use hearth_protocol::BlockIndex;
use hearth_replication::request::{BlockHash, Extent, Hashes};

use super::image::Replica;

/// The hash of a block's bytes.
pub fn hash(bytes: &[u8]) -> BlockHash {
    let hash = blake3::hash(bytes);
    let half = hash.as_bytes().first_chunk::<16>().expect("a hash has 32 bytes");
    BlockHash(u128::from_be_bytes(*half))
}

impl Replica {
    /// The hashes of blocks on this node's disk.
    pub(super) fn hashes(&self, extent: Extent) -> Hashes {
        let Some(copy) = self.copy() else {
            return extent.blocks().map(|_| None).collect();
        };
        let mut bytes = Vec::new();
        let of = |block: BlockIndex| {
            let piece = self.shape().bytes(Extent::block(block));
            bytes.resize(piece.body.length() as usize, 0);
            match copy.volume.read_stored(piece.offset, &mut bytes) {
                Ok(()) => Some(hash(&bytes)),
                Err(error) => {
                    tracing::error!(image = %self.shape().name, %block, %error, "a block cannot be read while copies are compared");
                    None
                }
            }
        };
        extent.blocks().map(of).collect()
    }

    /// The hash of a block that is in this node's RAM as a whole.
    pub fn hash_in_ram(&self, block: BlockIndex) -> Option<BlockHash> {
        let piece = self.shape().bytes(Extent::block(block));
        let mut bytes = vec![0; piece.body.length() as usize];
        self.read_ram(piece.offset, &mut bytes).then(|| hash(&bytes))
    }
}
