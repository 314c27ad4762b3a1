//! What a layer's files say: its metadata, its bitmap, and how the records of its journal continue that.

use std::path::Path;

use hearth_protocol::LayerId;
use serde::{Deserialize, Serialize};

use super::blockmap::BlockMap;
use super::error::StoreError;
use super::fault::Site;
use super::journal::Record;
use super::os::FileSites;
use super::sealed_file::Kind;

/// The kind of a layer's metadata file.
pub const LAYER_META: Kind = Kind {
    name: "layer",
    version: 1,
    sites: FileSites {
        create: Site::LayerMetaCreate,
        write: Site::LayerMetaWrite,
        sync: Site::LayerMetaSync,
        rename: Site::LayerMetaRename,
    },
};
/// The kind of a layer's bitmap file.
pub const BITMAP: Kind = Kind {
    name: "bitmap",
    version: 1,
    sites: FileSites {
        create: Site::BitmapCreate,
        write: Site::BitmapWrite,
        sync: Site::BitmapSync,
        rename: Site::BitmapRename,
    },
};

/// What a layer is, as its metadata file says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMeta {
    /// Its id.
    pub id: LayerId,
    /// Bytes as the guest sees them.
    pub size: u64,
    /// Bytes in a block.
    pub block_size: u64,
}

pub(super) fn damaged(path: &Path, why: impl Into<String>) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        why: why.into(),
    }
}

impl LayerMeta {
    /// Blocks, the last of which may be cut short.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Reads the body of a layer's metadata file. `path` only names it in errors.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub fn decode(path: &Path, body: &[u8]) -> Result<Self, StoreError> {
        let meta: Self = serde_json::from_slice(body).map_err(|err| damaged(path, err.to_string()))?;
        if !hearth_protocol::units::is_block_size(meta.block_size)
            || meta.size > hearth_protocol::limits::IMAGE_BYTES_MAX
        {
            return Err(damaged(path, "size or block size is out of range"));
        }
        Ok(meta)
    }
}

/// Reads the body of a layer's bitmap file: the journal generation that continues it, and the map. `path` only names
/// it in errors.
///
/// # Errors
/// [`StoreError::Damaged`].
pub fn decode_bitmap(path: &Path, blocks: u64, body: &[u8]) -> Result<(u32, BlockMap), StoreError> {
    let (generation, sets) = body
        .split_first_chunk::<4>()
        .ok_or_else(|| damaged(path, "it ends early"))?;
    let map = BlockMap::decode(blocks, sets).map_err(|why| damaged(path, why))?;
    Ok((u32::from_le_bytes(*generation), map))
}

/// Brings a map up to date with the records of its journal. `path` only names the journal in errors.
///
/// # Errors
/// [`StoreError::Damaged`].
pub fn apply(path: &Path, map: &BlockMap, records: &[Record]) -> Result<(), StoreError> {
    for record in records {
        if let Record::Blocks { first, count, state } = *record {
            if first.checked_add(count).is_none_or(|end| end > map.blocks()) {
                return Err(damaged(path, "a record lies past the end of the layer"));
            }
            (first..first + count).for_each(|block| map.set(block, state));
        }
    }
    Ok(())
}
