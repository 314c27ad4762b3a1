//! Images: heat of every submitted bio, and the time until it is complete.
//!
//! `block_bio_queue` fires once per submitted bio, before splits and merges. `block_bio_complete` fires for drivers
//! without requests only (`bio_endio` and `blk_update_request` in the kernel's `block/`); elsewhere a bio is complete when
//! as many bytes of requests are as it was submitted with.

use core::ffi::c_void;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::{bpf_ktime_get_ns, generated::bpf_loop};
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::BtfTracePointContext;
use hearth_probes_common::abi::{
    CONTROL_ACTIVE, CONTROL_START, Device, IN_FLIGHT_BUCKETS, Latencies, MERGED_BIOS_MAX, RANGE_WRITE, Range,
    TOUCHES_AT_ONCE_MAX, Totals, heat_key, stamp,
};

use crate::fields::{
    BDEV_DISK, BIO_BDEV, BIO_NEXT, BIO_OPF, BIO_PRIVATE, BIO_SECTOR, BIO_SIZE, Kernel, QUEUE_DISK, REQUEST_BIO,
    REQUEST_QUEUE, is_write, load_at,
};
use crate::heat;
use crate::in_flight::{self, Table};

/// Length of a burst.
const BURST_NS: u64 = 100_000_000;

// The loader sets the lengths of the maps that hold images.

#[map]
static DEVICES: HashMap<u32, Device> = HashMap::with_max_entries(1, 0);

#[map]
static TOTALS: PerCpuArray<Totals> = PerCpuArray::with_max_entries(1, 0);

#[map]
static LATENCIES: Array<Latencies> = Array::with_max_entries(1, 0);

#[map]
static BIOS: Table = Array::with_max_entries(IN_FLIGHT_BUCKETS, BPF_F_MMAPABLE);

/// An access to several blocks while its touches are counted.
struct Access {
    /// Which side is being written.
    side: u64,
    slot: u64,
    block_shift: u64,
    /// First byte and the byte after the last.
    start: u64,
    end: u64,
    /// 1 as it is added to [`Heat::touches`].
    one: u64,
    burst: u64,
    lost: u64,
}

/// Counts the touch of one block of an access.
#[inline(always)]
fn touch_part(access: &mut Access, index: u64) {
    let block = (access.start >> access.block_shift) + index;
    let first = access.start.max(block << access.block_shift);
    let after = access.end.min((block + 1) << access.block_shift);
    let key = heat_key(access.slot as u32, block);
    if !heat::touch(access.side as u32, key, access.one, after - first, access.burst) {
        access.lost += 1;
    }
}

/// Callback of `bpf_loop`.
extern "C" fn touch_next(index: u64, access: *mut c_void) -> i64 {
    // SAFETY: `bpf_loop` passes on the pointer that `count` gave it.
    touch_part(unsafe { &mut *access.cast::<Access>() }, index);
    0
}

/// Notes an access for the loader to count; false when there is no room.
#[inline(always)]
fn note_range(access: &Access) -> bool {
    let write = if access.one == 1 { 0 } else { RANGE_WRITE };
    let range = Range {
        offset: access.start,
        length: access.end - access.start,
        burst: access.burst,
        slot_and_op: access.slot | write,
    };
    heat::note_range(access.side as u32, range)
}

/// Counts the touches of an access.
#[inline(always)]
fn count(access: &mut Access) {
    let blocks = ((access.end - 1) >> access.block_shift) - (access.start >> access.block_shift) + 1;
    if blocks == 1 {
        touch_part(access, 0);
    } else if blocks <= TOUCHES_AT_ONCE_MAX {
        // SAFETY: the callback has the signature that the helper calls and the access outlives the call.
        unsafe { bpf_loop(blocks as u32, touch_next as *mut c_void, (&raw mut *access).cast(), 0) };
    } else if !note_range(access) {
        access.lost += blocks;
    }
}

/// A bio was submitted. Argument: the bio.
#[btf_tracepoint(function = "block_bio_queue")]
pub fn bio_queue(ctx: BtfTracePointContext) -> i32 {
    let bio = Kernel::new(ctx.arg(0));
    let device = bio.follow(&BIO_BDEV).follow(&BDEV_DISK).disk_device();
    let Some(device) = DEVICES.get_ptr(device) else {
        return 0;
    };
    let length: u32 = bio.load(&BIO_SIZE);
    let Some(write) = is_write(bio.load(&BIO_OPF)) else {
        return 0;
    };
    if length == 0 {
        return 0;
    }
    // SAFETY: the pointer is to a value of the map, which the loader replaces but never changes in place.
    let Device { slot, block_shift } = unsafe { *device };
    let Some(totals) = TOTALS.get_ptr_mut(slot) else {
        return 0;
    };
    // SAFETY: the helper has no demands.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let side = heat::control(CONTROL_ACTIVE) & 1;
    let start_ns = heat::control(CONTROL_START + side as u32);
    let tenth = (now_ns.saturating_sub(start_ns) / BURST_NS).min(63);
    let start = bio.load::<u64>(&BIO_SECTOR) << 9;
    let mut access = Access {
        side,
        slot: slot.into(),
        block_shift: (block_shift & 63).into(),
        start,
        end: start + u64::from(length),
        one: if write { 1 << 32 } else { 1 },
        burst: 1 << tenth,
        lost: 0,
    };
    count(&mut access);
    let Some(address) = bio.address(0) else { return 0 };
    let none_lost = in_flight::start(&BIOS, address, stamp(slot, write, now_ns), length.into());
    // SAFETY: the totals are this CPU's own, and the kernel never runs this program twice at a time on one CPU.
    unsafe {
        (*totals).events += 1;
        (*totals).lost += access.lost;
        (*totals).untimed += u64::from(!none_lost);
    }
    0
}

/// A bio of a driver without requests is complete with all its parts. Arguments: its queue, the bio.
#[btf_tracepoint(function = "block_bio_complete")]
pub fn bio_complete(ctx: BtfTracePointContext) -> i32 {
    let bio = Kernel::new(ctx.arg(1));
    if let Some(address) = bio.address(1)
        && let Some(entry) = in_flight::find(&BIOS, address)
    {
        in_flight::end(entry, &LATENCIES);
    }
    0
}

/// The rest of a chain of bios in a request, with the bytes of them that are complete.
struct Chain {
    bio: u64,
    bytes: u64,
}

/// Some bytes of a bio are complete. It is the submitted one, or a part split off from it that points to it.
#[inline(always)]
fn end_part(bio: u64, parent: impl FnOnce() -> u64, bytes: u64) {
    let entry = match in_flight::find(&BIOS, bio) {
        Some(entry) => Some(entry),
        None => in_flight::find(&BIOS, parent()),
    };
    if let Some(entry) = entry {
        in_flight::end_part(entry, &LATENCIES, bytes);
    }
}

/// Callback of `bpf_loop`.
extern "C" fn end_next(_index: u64, chain: *mut c_void) -> i64 {
    // SAFETY: `bpf_loop` passes on the pointer that `bio_request_complete` gave it.
    let chain = unsafe { &mut *chain.cast::<Chain>() };
    let bio = chain.bio;
    if bio == 0 || chain.bytes == 0 {
        return 1;
    }
    let bytes = chain.bytes.min(load_at::<u32>(bio, &BIO_SIZE).into());
    end_part(bio, || load_at(bio, &BIO_PRIVATE), bytes);
    chain.bytes -= bytes;
    chain.bio = load_at(bio, &BIO_NEXT);
    0
}

/// Some bytes of a request, hence of one or several bios, are complete: bios in requests have no tracepoint of their
/// own. Arguments: the request, its status, the number of bytes.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn bio_request_complete(ctx: BtfTracePointContext) -> i32 {
    let request = Kernel::new(ctx.arg(0));
    let bytes: u32 = ctx.arg(2);
    let disk = request.follow(&REQUEST_QUEUE).follow(&QUEUE_DISK);
    if bytes == 0 || DEVICES.get_ptr(disk.disk_device()).is_none() {
        return 0;
    }
    let bio = request.follow(&REQUEST_BIO);
    let Some(address) = bio.address(4) else { return 0 };
    if address == 0 {
        return 0;
    }
    if bio.load::<u32>(&BIO_SIZE) >= bytes {
        end_part(address, || load_at(address, &BIO_PRIVATE), bytes.into());
    } else {
        let mut chain = Chain {
            bio: address,
            bytes: bytes.into(),
        };
        // SAFETY: the callback has the signature that the helper calls and the chain outlives the call.
        unsafe { bpf_loop(MERGED_BIOS_MAX, end_next as *mut c_void, (&raw mut chain).cast(), 0) };
    }
    0
}
