//! Requests between two tracepoints: an eight-way table of addresses and start times.
//!
//! A hash map would do it for twice the time: here starting costs one compare-and-swap, ending one store, and nothing is
//! allocated. A full bucket refuses, so what is measured does not depend on how long anything takes.
//!
//! Not every end is seen. Measured on Linux 6.18: a tracepoint that fires in a soft interrupt may leave its eBPF programs
//! out, without counting that as a miss. Such an entry stays until its address is used again, or until its bucket is full
//! and it is old; either way its latency is reported as not measured.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::maps::Array;
use hearth_probes_common::abi::{
    FORGOTTEN_NS, IN_FLIGHT_WAYS, InFlight, InFlightBucket, Latencies, elapsed, in_flight_bucket,
};
use hearth_probes_common::latency::{BUCKETS, bucket_of_ns};

use crate::atomic;

/// A table of requests in flight.
pub type Table = Array<InFlightBucket>;

/// The entries among which a request's is.
#[inline(always)]
fn entries(table: &Table, request: u64) -> Option<impl Iterator<Item = *mut InFlight>> {
    let first = table.get_ptr_mut(in_flight_bucket(request))?.cast::<InFlight>();
    // SAFETY: the map holds whole buckets of that many entries.
    Some((0..IN_FLIGHT_WAYS).map(move |way| unsafe { first.add(way) }))
}

/// Notes the start of a request of some bytes; false when a latency is lost by it: its own, because its bucket is full,
/// or that of an earlier request whose end was not seen.
#[inline(always)]
pub fn start(table: &Table, request: u64, stamp: u64, bytes: u64) -> bool {
    let Some(entries) = entries(table, request) else {
        return false;
    };
    for entry in entries {
        // SAFETY: the entry is in a map value, aligned, and only accessed atomically or by the request's own events.
        unsafe {
            let holder = &raw mut (*entry).request;
            let held = atomic::load(holder);
            if held == request || held == 0 && atomic::replace(holder, 0, request) == 0 {
                note(entry, stamp, bytes);
                return held == 0;
            }
        }
    }
    take_forgotten(table, request, stamp, bytes);
    false
}

/// Takes the place of a request in a full bucket that began so long ago that its end was surely missed.
#[inline(never)]
fn take_forgotten(table: &Table, request: u64, stamp: u64, bytes: u64) {
    let Some(entries) = entries(table, request) else { return };
    for entry in entries {
        // SAFETY: as in `start`.
        unsafe {
            let holder = &raw mut (*entry).request;
            let held = atomic::load(holder);
            let (_, age_ns) = elapsed(atomic::load(&raw const (*entry).stamp), stamp);
            if age_ns > FORGOTTEN_NS && atomic::replace(holder, held, request) == held {
                note(entry, stamp, bytes);
                return;
            }
        }
    }
}

/// # Safety
/// As in `start`: the caller holds the entry.
#[inline(always)]
unsafe fn note(entry: *mut InFlight, stamp: u64, bytes: u64) {
    // SAFETY: as in `start`.
    unsafe {
        atomic::store(&raw mut (*entry).left, bytes);
        atomic::store(&raw mut (*entry).stamp, stamp);
    }
}

/// The entry of a request; `None` if its start was not seen.
#[inline(always)]
pub fn find(table: &Table, request: u64) -> Option<*mut InFlight> {
    // SAFETY: as in `start`.
    entries(table, request)?.find(|entry| unsafe { atomic::load(&raw const (**entry).request) } == request)
}

/// Ends a request and counts how long it took.
#[inline(always)]
pub fn end(entry: *mut InFlight, latencies: &Array<Latencies>) {
    // SAFETY: as in `start`; the stamp was written before the request went on to complete. The clock has no demands.
    unsafe {
        let stamp = atomic::load(&raw const (*entry).stamp);
        atomic::store(&raw mut (*entry).request, 0);
        record(latencies, stamp, bpf_ktime_get_ns());
    }
}

/// Some bytes of a request are complete: ends it with the last of them.
#[inline(always)]
pub fn end_part(entry: *mut InFlight, latencies: &Array<Latencies>, bytes: u64) {
    // SAFETY: as in `start`.
    if unsafe { atomic::fetch_add(&raw mut (*entry).left, bytes.wrapping_neg()) } <= bytes {
        end(entry, latencies);
    }
}

#[inline(always)]
fn record(latencies: &Array<Latencies>, stamp: u64, now_ns: u64) {
    let (index, ns) = elapsed(stamp, now_ns);
    let bucket = atomic::opaque(bucket_of_ns(ns).into()) as usize;
    if let Some(counts) = latencies.get_ptr_mut(index)
        && bucket < BUCKETS
    {
        // SAFETY: the bucket lies in the map value and is aligned.
        unsafe { atomic::add(counts.cast::<u64>().add(bucket), 1) };
    }
}
