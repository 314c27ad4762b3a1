//! The two windows that take turns: the programs write one while the other is drained.
//!
//! A window is drained only after a grace period: when every run of a program that could have chosen it has ended. So
//! each touch is in exactly one window, whole.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::{Relaxed, Release};

use aya::maps::Map;
use hearth_probes_common::abi::{
    CONTROL_ACTIVE, CONTROL_LENGTH, CONTROL_RANGES, CONTROL_START, HEAT_WAYS, Heat, RANGE_WRITE, RANGES_MAX, Range,
    slot_and_block,
};

use super::sys::{Grace, SharedWords, monotonic_ns};
use crate::source::Op;
use crate::tally::BlockCounts;

const HEAT_WORDS: usize = size_of::<Heat>() / 8;
const RANGE_WORDS: usize = size_of::<Range>() / 8;

/// Buckets of each side for that many blocks: a table at most half full finds room for every block.
pub fn buckets(blocks_max: u32) -> u32 {
    blocks_max
        .saturating_mul(2)
        .div_ceil(HEAT_WAYS as u32)
        .next_power_of_two()
}

/// Length of the list of claimed entries of both sides, each with its count before it.
pub fn claimed_words(buckets: u32) -> u32 {
    2 * (buckets * HEAT_WAYS as u32 + 1)
}

/// What a drain takes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A block's counts.
    Block(u64, BlockCounts),
    /// An access that was too long to count in the kernel.
    Range {
        /// Which way.
        op: Op,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bit of its burst.
        burst: u64,
    },
}

/// Both windows.
#[derive(Debug)]
pub struct Windows {
    control: SharedWords,
    heat: SharedWords,
    claimed: SharedWords,
    ranges: SharedWords,
    grace: Grace,
    /// Entries of each side of the table.
    entries: usize,
    /// A side that is no longer written and not yet empty, because waiting failed.
    full: Option<usize>,
    /// Open until the programs are loaded, which refer to them by descriptor.
    _maps: [Map; 4],
}

/// The descriptor of an array map.
pub fn descriptor(map: &Map) -> io::Result<BorrowedFd<'_>> {
    match map {
        Map::Array(data) => Ok(data.fd().as_fd()),
        _ => Err(io::Error::other("the object has another kind of map")),
    }
}

impl Windows {
    /// Maps the programs' tables of `buckets` buckets a side, and begins the first window.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn map(control: Map, heat: Map, claimed: Map, ranges: Map, buckets: u32) -> io::Result<Self> {
        let entries = buckets as usize * HEAT_WAYS;
        let windows = Self {
            control: SharedWords::map(descriptor(&control)?, CONTROL_LENGTH as usize)?,
            heat: SharedWords::map(descriptor(&heat)?, 2 * entries * HEAT_WORDS)?,
            claimed: SharedWords::map(descriptor(&claimed)?, claimed_words(buckets) as usize)?,
            ranges: SharedWords::map(descriptor(&ranges)?, 2 * RANGES_MAX as usize * RANGE_WORDS)?,
            grace: Grace::new()?,
            entries,
            full: None,
            _maps: [control, heat, claimed, ranges],
        };
        windows.control[CONTROL_START as usize].store(monotonic_ns(), Relaxed);
        Ok(windows)
    }

    /// Begins a new window and takes everything out of the old one.
    ///
    /// # Errors
    /// The kernel's error; nothing was taken, and the next call takes it.
    pub fn drain(&mut self, mut take: impl FnMut(u32, Taken)) -> io::Result<()> {
        let side = *self.full.get_or_insert_with(|| {
            let old = self.control[CONTROL_ACTIVE as usize].load(Relaxed) as usize;
            let new = 1 - old;
            self.control[CONTROL_START as usize + new].store(monotonic_ns(), Relaxed);
            self.control[CONTROL_ACTIVE as usize].store(new as u64, Release);
            old
        });
        self.grace.wait()?;
        self.take_blocks(side, &mut take);
        self.take_ranges(side, &mut take);
        self.full = None;
        Ok(())
    }

    fn take_blocks(&self, side: usize, take: &mut impl FnMut(u32, Taken)) {
        let list = &self.claimed[side * (self.entries + 1)..][..self.entries + 1];
        let count = list[0].swap(0, Relaxed) as usize;
        for position in &list[1..][..count] {
            let entry = &self.heat[position.load(Relaxed) as usize * HEAT_WORDS..][..HEAT_WORDS];
            let [key, touches, bytes, bursts] = [0, 1, 2, 3].map(|word| entry[word].swap(0, Relaxed));
            let (slot, block) = slot_and_block(key);
            let counts = BlockCounts {
                reads: touches & u64::from(u32::MAX),
                writes: touches >> 32,
                bytes,
                bursts,
            };
            take(slot, Taken::Block(block, counts));
        }
    }

    fn take_ranges(&self, side: usize, take: &mut impl FnMut(u32, Taken)) {
        let noted = self.control[CONTROL_RANGES as usize + side].swap(0, Relaxed);
        let first = side * RANGES_MAX as usize;
        for number in first..first + noted.min(RANGES_MAX.into()) as usize {
            let words = &self.ranges[number * RANGE_WORDS..][..RANGE_WORDS];
            let [offset, length, burst, slot_and_op] = [0, 1, 2, 3].map(|word| words[word].load(Relaxed));
            let op = if slot_and_op & RANGE_WRITE != 0 {
                Op::Write
            } else {
                Op::Read
            };
            take(
                (slot_and_op & !RANGE_WRITE) as u32,
                Taken::Range {
                    op,
                    offset,
                    length,
                    burst,
                },
            );
        }
    }
}
