//! Physical disks: latency of requests from issue to completion.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::BtfTracePointContext;
use hearth_probes_common::abi::{DISKS_MAX, IN_FLIGHT_BUCKETS, Latencies, stamp};

use crate::fields::{Kernel, QUEUE_DISK, REQUEST_LENGTH, REQUEST_OPF, REQUEST_QUEUE, is_write};
use crate::in_flight::{self, Table};

/// Slot of each watched disk by `dev_t`.
#[map]
static DISKS: HashMap<u32, u32> = HashMap::with_max_entries(DISKS_MAX, 0);

#[map]
static DISK_LATENCIES: Array<Latencies> = Array::with_max_entries(2 * DISKS_MAX, 0);

#[map]
static REQUESTS: Table = Array::with_max_entries(IN_FLIGHT_BUCKETS, 0);

/// A request goes to the driver. Argument: the request.
#[btf_tracepoint(function = "block_rq_issue")]
pub fn request_issue(ctx: BtfTracePointContext) -> i32 {
    let request = Kernel::new(ctx.arg(0));
    let Some(write) = is_write(request.load(&REQUEST_OPF)) else {
        return 0;
    };
    let device = request.follow(&REQUEST_QUEUE).follow(&QUEUE_DISK).disk_device();
    let Some(slot) = DISKS.get_ptr(device) else { return 0 };
    // SAFETY: the pointer is to a value of the map, which is only changed as a whole word; the helper has no demands.
    let (slot, now_ns) = unsafe { (slot.read_volatile(), bpf_ktime_get_ns()) };
    if let Some(address) = request.address(2) {
        in_flight::start(&REQUESTS, address, stamp(slot, write, now_ns), 0);
    }
    0
}

/// Some bytes of a request are done. Arguments: the request, its status, the number of bytes.
#[btf_tracepoint(function = "block_rq_complete")]
pub fn request_complete(ctx: BtfTracePointContext) -> i32 {
    let request = Kernel::new(ctx.arg(0));
    let done: u32 = ctx.arg(2);
    let left: u32 = request.load(&REQUEST_LENGTH);
    if done >= left
        && let Some(address) = request.address(3)
        && let Some(entry) = in_flight::find(&REQUESTS, address)
    {
        in_flight::end(entry, &DISK_LATENCIES);
    }
    0
}
