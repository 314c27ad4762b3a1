//! Copies a disk that nobody writes into a disk image file, past the RAM tier: a long read of everything must not wash
//! out what guests use.

use std::cell::RefCell;

use super::stack::{BlockSource, Stack, Where};
use crate::disk::DiskError;
use crate::imagefile::{CLUSTER, ImageFile};
use crate::store::LayerRef;
use crate::store::direct::{AlignedBuf, with_buffer};
use crate::tier::RamTier;

/// Bytes read and written between two looks at `progress`.
const CHUNK: u64 = 1 << 20;

thread_local! {
    static BUFFER: RefCell<AlignedBuf> = RefCell::default();
}

/// Copies everything, clusters of zeros left out. `progress` hears bytes done and bytes in all, and stops the copy by
/// returning `false`.
///
/// # Errors
/// What could not be read or written; [`DiskError::ShuttingDown`] when stopped.
pub fn copy_out(
    layers: Vec<LayerRef>,
    (size, block_size): (u64, u64),
    tier: &RamTier,
    remote: &dyn BlockSource,
    file: &mut ImageFile,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), DiskError> {
    let stack = Stack::new(layers, block_size, tier);
    let mut at = 0;
    while at < size {
        if !progress(at, size) {
            return Err(DiskError::ShuttingDown);
        }
        // A hole that reaches into other chunks is passed over at once.
        let (found, run) = stack.find_run(at / block_size, (size - at).div_ceil(block_size));
        let hole_end = (at / block_size + run) * block_size;
        if found == Where::Hole && hole_end / CHUNK > at / CHUNK {
            at = hole_end / CHUNK * CHUNK;
            continue;
        }
        let length = CHUNK.min(size - at);
        with_buffer(&BUFFER, length as usize, |chunk| {
            read(&stack, at, chunk, remote)?;
            for (i, cluster) in chunk.chunks(CLUSTER).enumerate() {
                if !is_zero(cluster) {
                    let offset = at + (i * CLUSTER) as u64;
                    file.write(offset, cluster).map_err(|source| DiskError::Io {
                        what: format!("cannot write {} bytes for offset {offset}", cluster.len()),
                        source,
                    })?;
                }
            }
            Ok::<(), DiskError>(())
        })?;
        at += length;
    }
    progress(size, size);
    Ok(())
}

/// Fills `chunk` from wherever its blocks are.
fn read(stack: &Stack, offset: u64, chunk: &mut [u8], remote: &dyn BlockSource) -> Result<(), DiskError> {
    let mut at = 0;
    while at < chunk.len() {
        let from = offset + at as u64;
        let block = from / stack.block_size;
        let left = (chunk.len() - at) as u64;
        let (found, run) = stack.find_run(block, left.div_ceil(stack.block_size) + 1);
        let length = ((block + run) * stack.block_size - from).min(left) as usize;
        stack.read_from(found, from, &mut chunk[at..at + length], remote)?;
        at += length;
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    // Compares the bytes with themselves, one place on: as fast as memory.
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}
