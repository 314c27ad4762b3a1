//! Counts of one image in one window, as every heat source builds them: block touches, latencies, losses.
//!
//! It is bounded: what does not fit is counted as lost, so that `sum of block counts + lost = touches submitted`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use hdrhistogram::Histogram;
use hearth_probes_common::latency;
use hearth_protocol::heat::{BlockHeat, LatencySummary};
use hearth_protocol::{BlockIndex, ByteLen, ImageId};

use crate::source::{ImageWindow, Op};

/// Nanoseconds in the tenth of a second that a burst is.
pub const BURST_NS: u64 = 100_000_000;

/// Blocks one image can have in one window; further ones are counted as lost. One record takes some 40 bytes here.
pub const BLOCKS_PER_WINDOW_MAX: usize = 1 << 20;

/// The bit of a burst bitmap for a moment `ns` after the window's start; the last bit stands for all later tenths.
pub fn burst_bit(ns: u64) -> u64 {
    1 << (ns / BURST_NS).min(63)
}

/// What one block saw in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Reads that touched it.
    pub reads: u64,
    /// Writes, trims and zeroes that touched it.
    pub writes: u64,
    /// Bytes of both within it.
    pub bytes: u64,
    /// One bit for each tenth of a second in which it was touched.
    pub bursts: u64,
}

impl BlockCounts {
    /// One touch.
    pub fn touch(&mut self, op: Op, bytes: u64, burst: u64) {
        match op {
            Op::Read => self.reads += 1,
            Op::Write => self.writes += 1,
        }
        self.bytes += bytes;
        self.bursts |= burst;
    }

    /// Adds what another counter saw of the same block in the same window.
    pub fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.bytes += other.bytes;
        self.bursts |= other.bursts;
    }

    /// Touches of both kinds.
    pub fn touches(&self) -> u64 {
        self.reads + self.writes
    }
}

/// Hashes block numbers: one multiplication, folded, because neighbouring blocks are the common case and no guest
/// gains anything from collisions in its own table.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

/// Counts by block number.
pub type BlockTable = HashMap<u64, BlockCounts, BuildHasherDefault<BlockHasher>>;

/// The part of a request that lies in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touch {
    /// Which block.
    pub block: u64,
    /// Bytes of the request within it.
    pub bytes: u64,
}

/// Splits a request into the blocks it touches, ascending; a request of no bytes touches none.
/// `block_shift` is the power of two of the block size.
pub fn touches(offset: u64, length: u64, block_shift: u32) -> impl ExactSizeIterator<Item = Touch> {
    let end = offset.saturating_add(length);
    let first = offset >> block_shift;
    let count = if length == 0 {
        0
    } else {
        ((end - 1) >> block_shift) - first + 1
    };
    (0..usize::try_from(count).unwrap_or(usize::MAX)).map(move |index| {
        let block = first + index as u64;
        let start = offset.max(block << block_shift);
        let stop = end.min((block + 1).saturating_mul(1 << block_shift));
        Touch {
            block,
            bytes: stop - start,
        }
    })
}

/// An empty latency histogram in microseconds, as all windows carry it: two digits, which is what the common scale
/// knows, growing with the longest wait.
pub fn latency_histogram() -> Histogram<u64> {
    Histogram::new(2).expect("two digits are valid")
}

/// Adds `count` requests of a bucket of the common latency scale.
pub fn record_latency(histogram: &mut Histogram<u64>, bucket: u32, count: u64) {
    let us = (latency::bucket_middle_ns(bucket) + 500) / 1000;
    histogram.saturating_record_n(us, count);
}

/// The percentiles that travel in a heat report.
pub fn summary(histogram: &Histogram<u64>) -> LatencySummary {
    LatencySummary {
        count: histogram.len(),
        p50_us: histogram.value_at_quantile(0.5),
        p99_us: histogram.value_at_quantile(0.99),
        max_us: histogram.max(),
    }
}

/// One image's window while it is put together.
#[derive(Debug, Clone)]
pub struct ImageTally {
    /// Block size in bytes.
    pub block_size: ByteLen,
    /// Counts by block, at most [`BLOCKS_PER_WINDOW_MAX`] when filled by [`ImageTally::add`].
    pub blocks: BlockTable,
    /// Block touches that are not in `blocks`.
    pub lost: u64,
    /// Requests.
    pub events: u64,
    /// Read latency, microseconds.
    pub read_latency: Histogram<u64>,
    /// Write latency, microseconds.
    pub write_latency: Histogram<u64>,
}

impl ImageTally {
    /// Nothing seen yet.
    pub fn new(block_size: ByteLen) -> Self {
        Self {
            block_size,
            blocks: BlockTable::default(),
            lost: 0,
            events: 0,
            read_latency: latency_histogram(),
            write_latency: latency_histogram(),
        }
    }

    /// Adds what was counted for a block; counts it as lost when the table is full.
    pub fn add(&mut self, block: u64, counts: &BlockCounts) {
        if self.blocks.len() >= BLOCKS_PER_WINDOW_MAX && !self.blocks.contains_key(&block) {
            self.lost += counts.touches();
        } else {
            self.blocks.entry(block).or_default().add(counts);
        }
    }

    /// Adds the touches of one request; what does not fit is counted as lost.
    pub fn add_request(&mut self, op: Op, offset: u64, length: u64, burst: u64) {
        let parts = touches(offset, length, self.block_size.get().trailing_zeros());
        let total = parts.len() as u64;
        for (done, touch) in parts.enumerate() {
            if self.blocks.len() >= BLOCKS_PER_WINDOW_MAX && done >= BLOCKS_PER_WINDOW_MAX {
                self.lost += total - done as u64;
                return;
            }
            let mut counts = BlockCounts::default();
            counts.touch(op, touch.bytes, burst);
            self.add(touch.block, &counts);
        }
    }

    /// Adds what another counter of the same image saw in the same window; block sizes are the same.
    pub fn merge(&mut self, other: Self) {
        other.blocks.iter().for_each(|(block, counts)| self.add(*block, counts));
        self.lost += other.lost;
        self.events += other.events;
        self.read_latency += &other.read_latency;
        self.write_latency += &other.write_latency;
    }

    /// Whether there is nothing to report.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
            && self.lost == 0
            && self.events == 0
            && self.read_latency.is_empty()
            && self.write_latency.is_empty()
    }

    /// The finished window.
    pub fn into_window(self, image: ImageId) -> ImageWindow {
        let mut blocks: Vec<_> = self
            .blocks
            .into_iter()
            .map(|(block, counts)| BlockHeat {
                block: BlockIndex(block),
                reads: counts.reads.try_into().unwrap_or(u32::MAX),
                writes: counts.writes.try_into().unwrap_or(u32::MAX),
                bursts: counts.bursts.count_ones(),
                bytes: counts.bytes,
            })
            .collect();
        blocks.sort_unstable_by_key(|heat| heat.block);
        ImageWindow {
            image,
            block_size: self.block_size,
            blocks,
            lost: self.lost,
            read_latency: self.read_latency,
            write_latency: self.write_latency,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(offset: u64, length: u64, expect: &[(u64, u64)]) {
        let found: Vec<_> = touches(offset, length, 12).map(|t| (t.block, t.bytes)).collect();
        assert_eq!(found, expect, "offset {offset}, length {length}");
    }

    #[test]
    fn a_request_touches_each_block_once_with_its_bytes() {
        check(0, 0, &[]);
        check(4096, 4096, &[(1, 4096)]);
        check(4095, 2, &[(0, 1), (1, 1)]);
        check(512, 8192, &[(0, 3584), (1, 4096), (2, 512)]);
        check(u64::MAX - 1, 1, &[(u64::MAX >> 12, 1)]);
    }

    #[test]
    fn bursts_are_tenths_of_a_second() {
        assert_eq!(burst_bit(0), burst_bit(BURST_NS - 1));
        assert_ne!(burst_bit(0), burst_bit(BURST_NS));
        assert_eq!(burst_bit(u64::MAX), 1 << 63);
    }

    #[test]
    fn a_full_table_counts_what_it_loses() {
        let mut tally = ImageTally::new(ByteLen(4096));
        let submitted = BLOCKS_PER_WINDOW_MAX as u64 + 1000;
        tally.add_request(Op::Write, 0, submitted * 4096, 1);
        tally.add_request(Op::Read, 0, 4096, 1);
        tally.add_request(Op::Read, submitted * 4096, 4096, 1);
        let counted: u64 = tally.blocks.values().map(BlockCounts::touches).sum();
        assert_eq!(tally.lost, 1001);
        assert_eq!(counted + tally.lost, submitted + 2);
    }

    #[test]
    fn windows_ascend_by_block() {
        let mut tally = ImageTally::new(ByteLen(4096));
        for block in [9u64, 3, 7, 3] {
            tally.add_request(Op::Read, block * 4096, 4096, burst_bit(block * BURST_NS));
        }
        let window = tally.into_window(ImageId(1));
        let blocks: Vec<_> = window.blocks.iter().map(|b| (b.block.0, b.reads, b.bursts)).collect();
        assert_eq!(blocks, [(3, 2, 1), (7, 1, 1), (9, 1, 1)]);
    }
}
