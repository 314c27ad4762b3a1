//! Rule 11: a RAM copy never outlives the bytes it was read from.
//!
//! Writes count themselves in and out on a cell chosen by the block's hash; a fill remembers the cell's value before
//! it reads, and its bytes are dropped if the value is another when they would be published. Two blocks that share a
//! cell cost a fill that was not needed to drop, never a stale copy.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::mutants;

/// Cells: 64 KiB of memory; with 64 writes in flight a fill meets a foreign one in under 1 % of cases.
const CELLS: usize = 8192;

/// Low bits count writes in flight, the rest counts writes begun.
const IN_FLIGHT_BITS: u32 = 16;

/// The cells.
pub struct WriteGuards {
    cells: Box<[AtomicU64]>,
}

/// What a fill saw before it began to read.
#[derive(Debug, Clone, Copy)]
pub struct FillToken {
    cell: u32,
    value: u64,
}

impl WriteGuards {
    /// All cells at rest.
    pub fn new() -> Self {
        Self {
            cells: (0..CELLS).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn cell(&self, hash: u64) -> usize {
        (hash >> 32) as usize % CELLS
    }

    /// A write, trim or zero of the block begins.
    pub fn begin_write(&self, hash: u64) {
        self.cells[self.cell(hash)].fetch_add((1 << IN_FLIGHT_BITS) + 1, Ordering::SeqCst);
    }

    /// It ended; its RAM copy was updated or removed before.
    pub fn end_write(&self, hash: u64) {
        let old = self.cells[self.cell(hash)].fetch_sub(1, Ordering::SeqCst);
        assert!(old & ((1 << IN_FLIGHT_BITS) - 1) != 0, "more writes ended than began");
    }

    /// A fill is about to read the block.
    pub fn begin_fill(&self, hash: u64) -> FillToken {
        let cell = self.cell(hash);
        FillToken {
            cell: cell as u32,
            value: self.cells[cell].load(Ordering::SeqCst),
        }
    }

    /// Whether no write to the block began since the fill did, and none was in flight then. The caller holds the lock
    /// under which writes update the block's RAM copy.
    pub fn is_fresh(&self, token: FillToken) -> bool {
        if mutants::FILL_UNCHECKED.is_on() {
            return true;
        }
        token.value & ((1 << IN_FLIGHT_BITS) - 1) == 0
            && self.cells[token.cell as usize].load(Ordering::SeqCst) == token.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fill_is_fresh_only_if_no_write_overlaps_it() {
        let guards = WriteGuards::new();
        let hash = 0x1234_5678_9abc_def0;
        let before = guards.begin_fill(hash);
        assert!(guards.is_fresh(before));
        guards.begin_write(hash);
        let during = guards.begin_fill(hash);
        assert!(!guards.is_fresh(before) && !guards.is_fresh(during));
        guards.end_write(hash);
        assert!(!guards.is_fresh(before) && !guards.is_fresh(during));
        assert!(guards.is_fresh(guards.begin_fill(hash)));
    }
}
