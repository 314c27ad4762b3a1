//! Map keys, values and indexes, as they lie in memory on both sides of the system call.

use crate::latency;

/// Bits of a heat key that hold the block; the bits above hold the slot. 2^48 blocks of 4 KiB are an exbibyte.
pub const BLOCK_BITS: u32 = 48;

/// Slots there can be: the bits of a heat key above the block, less one that a [`stamp`] needs for the direction.
pub const SLOTS_MAX: u32 = 1 << 15;

/// Bios of one merged request that a program follows; latencies of further ones are not measured. Block layers merge up
/// to 128 segments by default.
pub const MERGED_BIOS_MAX: u32 = 256;

/// Touches a program counts for one bio by itself. Longer ones (trims) go into a range map and are counted by the loader.
pub const TOUCHES_AT_ONCE_MAX: u64 = 1024;

/// Ranges per window; the touches of further ones are lost.
pub const RANGES_MAX: u32 = 1024;

/// Physical disks that can be watched at a time.
pub const DISKS_MAX: u32 = 64;

/// Control word: which of the two sides is written, 0 or 1. The other one is drained.
pub const CONTROL_ACTIVE: u32 = 0;
/// Control words, one per side: the monotonic time at which its window began, nanoseconds.
pub const CONTROL_START: u32 = 1;
/// Control words, one per side: how many ranges were noted, which may be more than there is room for.
pub const CONTROL_RANGES: u32 = 3;
/// Number of control words.
pub const CONTROL_LENGTH: u32 = 5;

/// Where a device's I/O is counted. Key: the kernel's `dev_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// The slot its counts carry.
    pub slot: u32,
    /// Power of two of the image's block size.
    pub block_shift: u32,
}

/// What one block saw in one window. Every word is changed atomically.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heat {
    /// [`heat_key`]; 0 is a free entry. Claimed by compare-and-swap and not freed until the side is drained.
    pub key: u64,
    /// Reads in the lower half, writes in the upper: one atomic addition counts either.
    pub touches: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// One bit for each tenth of a second of the window in which the block was touched.
    pub bursts: u64,
}

/// Entries that share a bucket of the heat table: neighbouring blocks lie in two neighbouring cache lines.
pub const HEAT_WAYS: usize = 4;

/// Buckets in which a block may lie. A table that is half full has a free one among them but for one time in 2^32.
pub const HEAT_PROBES_MAX: u32 = 32;

/// A bucket of the heat table. The table has the buckets of one side, then those of the other.
pub type HeatBucket = [Heat; HEAT_WAYS];

/// One access too long to be counted by a program.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First byte on the device.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The tenth of a second, as in [`Heat::bursts`].
    pub burst: u64,
    /// The device's slot, and [`RANGE_WRITE`].
    pub slot_and_op: u64,
}

/// Bit of [`Range::slot_and_op`] that stands for a write.
pub const RANGE_WRITE: u64 = 1 << 63;

/// Totals of one slot on one CPU since the programs were loaded. Each field is written by one program only.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Bios with data.
    pub events: u64,
    /// Block touches that found no room.
    pub lost: u64,
    /// Bios whose latency was not measured: their bucket of the in-flight table was full, or their end was not seen.
    pub untimed: u64,
}

/// Entries that share a bucket of an in-flight table.
pub const IN_FLIGHT_WAYS: usize = 8;

/// Buckets of an in-flight table; 32,768 requests fit if they spread well.
pub const IN_FLIGHT_BUCKETS: u32 = 4096;

/// A request that began longer ago than this may lose its place in a full bucket, nanoseconds.
pub const FORGOTTEN_NS: u64 = 60_000_000_000;

/// One request between its two tracepoints.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct InFlight {
    /// Address of the bio or request; 0 is a free entry. Claimed by compare-and-swap.
    pub request: u64,
    /// [`stamp`] of its start.
    pub stamp: u64,
    /// Bytes not complete yet, for requests that complete in parts.
    pub left: u64,
}

/// A bucket of an in-flight table.
pub type InFlightBucket = [InFlight; IN_FLIGHT_WAYS];

/// Latency counts of one direction of one slot or disk since the programs were loaded. Index: [`latency_index`].
pub type Latencies = [u64; latency::BUCKETS];

const _: () = assert!(size_of::<Device>() == 8);
const _: () = assert!(size_of::<HeatBucket>() == 128);
const _: () = assert!(size_of::<Range>() == 32);
const _: () = assert!(size_of::<Totals>() == 24);
const _: () = assert!(size_of::<InFlightBucket>() == 192);

/// Key of a block's heat, never 0.
#[inline(always)]
pub fn heat_key(slot: u32, block: u64) -> u64 {
    1 << 63 | (slot as u64) << BLOCK_BITS | block & ((1 << BLOCK_BITS) - 1)
}

/// Slot and block of a heat key.
pub fn slot_and_block(key: u64) -> (u32, u64) {
    (
        (key >> BLOCK_BITS) as u32 & (SLOTS_MAX - 1),
        key & ((1 << BLOCK_BITS) - 1),
    )
}

/// Blocks whose buckets follow each other in the table, as a shift: neighbours share a page, hence its translation.
const HEAT_RUN_SHIFT: u32 = 6;

/// Bucket where the search for a key begins, and the odd step to the next one, both modulo the number of buckets.
#[inline(always)]
pub fn heat_place(key: u64) -> (u32, u32) {
    const BUCKETS_PER_RUN: u32 = (1 << HEAT_RUN_SHIFT) / HEAT_WAYS as u32;
    let mut mixed = (key >> HEAT_RUN_SHIFT).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^= mixed >> 32;
    mixed = mixed.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let within = (key >> HEAT_WAYS.trailing_zeros()) as u32 & (BUCKETS_PER_RUN - 1);
    (
        ((mixed >> 32) as u32).wrapping_mul(BUCKETS_PER_RUN) | within,
        mixed as u32 | 1,
    )
}

/// Bucket of a request in an in-flight table: addresses differ in their middle bits, so they are multiplied upwards.
#[inline(always)]
pub fn in_flight_bucket(request: u64) -> u32 {
    (request.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - IN_FLIGHT_BUCKETS.trailing_zeros())) as u32
}

const STAMP_TIME_BITS: u32 = 48;

/// Start of a request in one word: slot, direction, and the time modulo 2^48 ns (78 hours).
#[inline(always)]
pub fn stamp(slot: u32, write: bool, now_ns: u64) -> u64 {
    (write as u64) << 63 | (slot as u64) << STAMP_TIME_BITS | now_ns & ((1 << STAMP_TIME_BITS) - 1)
}

/// Latency index and elapsed nanoseconds of a request that was stamped at its start and ends now.
#[inline(always)]
pub fn elapsed(stamp: u64, now_ns: u64) -> (u32, u64) {
    let slot = (stamp >> STAMP_TIME_BITS) as u32 & (SLOTS_MAX - 1);
    (
        latency_index(slot, stamp >> 63 != 0),
        now_ns.wrapping_sub(stamp) & ((1 << STAMP_TIME_BITS) - 1),
    )
}

/// Index of a slot's or disk's latencies.
#[inline(always)]
pub fn latency_index(slot: u32, write: bool) -> u32 {
    slot << 1 | write as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_stamps_come_apart_again() {
        for (slot, block) in [(0, 0), (1, 5), (SLOTS_MAX - 1, (1 << BLOCK_BITS) - 1)] {
            assert_eq!(slot_and_block(heat_key(slot, block)), (slot, block));
            assert_ne!(heat_key(slot, block), 0);
            for write in [false, true] {
                let start = (1 << STAMP_TIME_BITS) - 10;
                let (index, ns) = elapsed(stamp(slot, write, start), start + 25);
                assert_eq!((index, ns), (latency_index(slot, write), 25));
            }
        }
    }

    #[test]
    fn a_half_full_table_has_room_for_every_block() {
        const BUCKETS: u32 = 1 << 10;
        let dense = |i: u64| heat_key(1, i);
        let strided = |i: u64| heat_key(2, i << 9);
        let scattered = |i: u64| heat_key(i as u32 % 7, i.wrapping_mul(0x5851_f42d_4c95_7f2d) >> 20);
        for keys in [&dense as &dyn Fn(u64) -> u64, &strided, &scattered] {
            let mut taken = [0usize; BUCKETS as usize];
            for number in 0..u64::from(BUCKETS) * HEAT_WAYS as u64 / 2 {
                let (place, step) = heat_place(keys(number));
                let bucket = (0..HEAT_PROBES_MAX)
                    .map(|probe| place.wrapping_add(step.wrapping_mul(probe)) & (BUCKETS - 1))
                    .find(|bucket| taken[*bucket as usize] < HEAT_WAYS);
                taken[bucket.expect("there is room") as usize] += 1;
            }
        }
    }
}
