//! The heat table: block counts of two windows, one being written and one being drained.
//!
//! Open addressing in a plain array that the loader maps into its memory. A hash map of the kernel's would take a lock,
//! a free list and three cache misses for a block's first touch; here it is one compare-and-swap.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use hearth_probes_common::abi::{
    CONTROL_LENGTH, CONTROL_RANGES, HEAT_PROBES_MAX, HEAT_WAYS, Heat, HeatBucket, RANGES_MAX, Range, heat_place,
};

use crate::atomic;

// The loader sets the lengths of the maps that hold blocks, and the mask.

#[map]
static CONTROL: Array<u64> = Array::with_max_entries(CONTROL_LENGTH, BPF_F_MMAPABLE);

#[map]
static HEAT: Array<HeatBucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Of each side: how many entries of its table are claimed, then which.
#[map]
static CLAIMED: Array<u64> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static RANGES: Array<Range> = Array::with_max_entries(2 * RANGES_MAX, BPF_F_MMAPABLE);

/// Buckets of a side less one; their number is a power of two.
#[unsafe(no_mangle)]
static HEAT_MASK: Global<u32> = Global::new(0);

/// A control word.
#[inline(always)]
pub fn control(index: u32) -> u64 {
    // SAFETY: the pointer is to a value of the map.
    CONTROL.get_ptr(index).map_or(0, |word| unsafe { atomic::load(word) })
}

#[inline(always)]
fn add(heat: *mut Heat, one: u64, bytes: u64, burst: u64) {
    // SAFETY: the pointer is to an entry in a value of the map.
    unsafe {
        atomic::add(&raw mut (*heat).touches, one);
        atomic::add(&raw mut (*heat).bytes, bytes);
        if atomic::load(&raw const (*heat).bursts) & burst == 0 {
            atomic::or(&raw mut (*heat).bursts, burst);
        }
    }
}

/// Lists an entry for the drain. There is room: an entry is claimed once per window.
#[inline(always)]
fn list(side: u32, position: u32) {
    let base = side * ((HEAT_MASK.load() + 1) * HEAT_WAYS as u32 + 1);
    let Some(count) = CLAIMED.get_ptr_mut(base) else { return };
    // SAFETY: the pointer is to a value of the map.
    let number = unsafe { atomic::fetch_add(count, 1) } as u32;
    if let Some(entry) = CLAIMED.get_ptr_mut(base + 1 + number) {
        // SAFETY: as above.
        unsafe { atomic::store(entry, position.into()) };
    }
}

/// Counts one touch; false when there is no room for the block.
#[inline(always)]
pub fn touch(side: u32, key: u64, one: u64, bytes: u64, burst: u64) -> bool {
    let mask = HEAT_MASK.load();
    let (mut place, step) = heat_place(key);
    for _ in 0..HEAT_PROBES_MAX {
        let bucket = side * (mask + 1) + (place & mask);
        let Some(entries) = HEAT.get_ptr_mut(bucket) else {
            return false;
        };
        for other in 0..HEAT_WAYS {
            // Neighbours each have an entry that is looked at first.
            let way = (key as usize + other) % HEAT_WAYS;
            // SAFETY: the map holds whole buckets.
            let heat = unsafe { entries.cast::<Heat>().add(way) };
            // SAFETY: as in `add`.
            let mut held = unsafe { atomic::load(&raw const (*heat).key) };
            if held == 0 {
                // SAFETY: as in `add`.
                held = unsafe { atomic::replace(&raw mut (*heat).key, 0, key) };
                if held == 0 {
                    list(side, bucket * HEAT_WAYS as u32 + way as u32);
                    held = key;
                }
            }
            if held == key {
                add(heat, one, bytes, burst);
                return true;
            }
        }
        place = place.wrapping_add(step);
    }
    false
}

/// Notes an access for the loader to count; false when there is no room.
#[inline(always)]
pub fn note_range(side: u32, range: Range) -> bool {
    let Some(count) = CONTROL.get_ptr_mut(CONTROL_RANGES + side) else {
        return false;
    };
    // SAFETY: the pointer is to a value of the map.
    let number = unsafe { atomic::fetch_add(count, 1) };
    if number >= u64::from(RANGES_MAX) {
        return false;
    }
    let Some(place) = RANGES.get_ptr_mut(side * RANGES_MAX + number as u32) else {
        return false;
    };
    // SAFETY: the pointer is to a value of the map that no other run of a program was given.
    unsafe { place.write(range) };
    true
}
