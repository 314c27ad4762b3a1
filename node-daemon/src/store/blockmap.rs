//! Which blocks a layer holds: two bits for each, readable without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

use roaring::RoaringBitmap;

/// What a layer knows about one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum BlockState {
    /// Nothing: look in the layer below.
    Absent = 0,
    /// Its bytes are in the data file.
    Data = 1,
    /// It reads as zero whatever is below; the data file has a hole there.
    Zero = 2,
}

impl BlockState {
    fn from_bits(bits: u64) -> Self {
        match bits & 3 {
            0 => BlockState::Absent,
            1 => BlockState::Data,
            2 => BlockState::Zero,
            _ => unreachable!("a block state has two bits, of which 3 is never written"),
        }
    }
}

const PER_WORD: u64 = 32;

/// States of all blocks of one layer. Whoever changes a block's state holds that block's write lock.
pub struct BlockMap {
    words: Box<[AtomicU64]>,
    blocks: u64,
}

impl BlockMap {
    /// All absent.
    pub fn new(blocks: u64) -> Self {
        let words = vec![0u64; blocks.div_ceil(PER_WORD) as usize].into_boxed_slice();
        let raw = Box::into_raw(words) as *mut [AtomicU64];
        // SAFETY: `AtomicU64` has the size and, on the 64-bit targets Hearth builds for, the alignment of `u64`
        // (asserted below); the box is taken apart and put together once. Going through `vec!` keeps untouched pages
        // of a large, empty layer unallocated.
        let words = unsafe { Box::from_raw(raw) };
        Self { words, blocks }
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The state of a block.
    ///
    /// # Panics
    /// If the block is past the end.
    pub fn get(&self, block: u64) -> BlockState {
        debug_assert!(block < self.blocks);
        let word = self.words[(block / PER_WORD) as usize].load(Ordering::Acquire);
        BlockState::from_bits(word >> (block % PER_WORD * 2))
    }

    /// Changes a block's state; whatever was written before is seen by whoever reads the new state.
    pub fn set(&self, block: u64, state: BlockState) {
        debug_assert!(block < self.blocks);
        let shift = block % PER_WORD * 2;
        let word = &self.words[(block / PER_WORD) as usize];
        word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |old| {
            Some(old & !(3 << shift) | (state as u64) << shift)
        })
        .expect("the update always gives a value");
    }

    /// The length of the run of equal states that starts at `block`, at most `max`, at least 1.
    pub fn run(&self, block: u64, max: u64) -> (BlockState, u64) {
        let state = self.get(block);
        let end = block.saturating_add(max).min(self.blocks);
        let pattern = state as u64 * 0x5555_5555_5555_5555;
        let mut at = block + 1;
        while at < end {
            if at.is_multiple_of(PER_WORD)
                && at + PER_WORD <= end
                && self.words[(at / PER_WORD) as usize].load(Ordering::Acquire) == pattern
            {
                at += PER_WORD;
            } else if self.get(at) == state {
                at += 1;
            } else {
                break;
            }
        }
        (state, at - block)
    }

    /// Blocks in the `Data` state.
    pub fn data_blocks(&self) -> u64 {
        self.words
            .iter()
            .map(|w| u64::from((w.load(Ordering::Relaxed) & 0x5555_5555_5555_5555).count_ones()))
            .sum()
    }

    /// The two sets, `Data` and `Zero`, in the portable roaring format.
    pub fn encode(&self) -> Vec<u8> {
        let mut sets = [RoaringBitmap::new(), RoaringBitmap::new()];
        let mut at = 0;
        while at < self.blocks {
            let (state, run) = self.run(at, u64::MAX);
            if state != BlockState::Absent {
                sets[state as usize - 1].insert_range(at as u32..=(at + run - 1) as u32);
            }
            at += run;
        }
        let mut out = Vec::new();
        for set in &mut sets {
            set.optimize();
            out.extend_from_slice(&(set.serialized_size() as u64).to_le_bytes());
            set.serialize_into(&mut out).expect("writing to memory does not fail");
        }
        out
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(blocks: u64, mut bytes: &[u8]) -> Result<Self, String> {
        let map = Self::new(blocks);
        for state in [BlockState::Data, BlockState::Zero] {
            let (len, rest) = bytes.split_first_chunk::<8>().ok_or("ends early")?;
            let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| "a set is too long")?;
            if len > rest.len() {
                return Err("a set reaches past the end".into());
            }
            let (set, rest) = rest.split_at(len);
            let set = RoaringBitmap::deserialize_from(set).map_err(|err| format!("a set does not decode: {err}"))?;
            if set.max().is_some_and(|max| u64::from(max) >= blocks) {
                return Err("a block lies past the end of the layer".into());
            }
            for block in &set {
                if map.get(block.into()) != BlockState::Absent {
                    return Err(format!("block {block} is in both sets"));
                }
                map.set(block.into(), state);
            }
            bytes = rest;
        }
        if bytes.is_empty() {
            Ok(map)
        } else {
            Err("has bytes after its end".into())
        }
    }
}

const _: () = assert!(align_of::<AtomicU64>() == align_of::<u64>() && size_of::<AtomicU64>() == size_of::<u64>());

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn states_read_back_and_runs_are_maximal(raw in prop::collection::vec((0u8..3, 1u64..90), 1..40)) {
            let states: Vec<u8> = raw.iter().flat_map(|&(s, n)| std::iter::repeat_n(s, n as usize)).collect();
            let map = BlockMap::new(states.len() as u64);
            for (i, s) in states.iter().enumerate() {
                map.set(i as u64, BlockState::from_bits(u64::from(*s)));
            }
            let map = BlockMap::decode(map.blocks(), &map.encode()).unwrap();
            let mut at = 0usize;
            while at < states.len() {
                let (state, run) = map.run(at as u64, u64::MAX);
                let expect = states[at..].iter().take_while(|s| **s == states[at]).count();
                prop_assert_eq!((state as u8, run as usize), (states[at], expect));
                at += expect;
            }
            prop_assert_eq!(map.data_blocks() as usize, states.iter().filter(|s| **s == 1).count());
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = BlockMap::decode(100, &bytes);
        }
    }
}
