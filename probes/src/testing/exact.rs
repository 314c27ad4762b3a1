//! The comparison itself: loads of every kind against one attached device.

use std::fs::File;

use hearth_protocol::{ByteLen, ImageId};

use super::generator::{Load, Order, run};
use super::windows::{check_counts, drain_during};
use crate::{EbpfSource, HeatSource};

/// 1,024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1,048,576 bytes.
pub const MIB: u64 = 1 << 20;

/// Loads that run at the same time, and what they are in words.
pub type NamedLoads = (&'static str, Vec<Load>);

/// A block device to load, not attached to the probes yet.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Open for direct reads and writes.
    pub file: &'a File,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its number.
    pub major: u32,
    /// Its number.
    pub minor: u32,
}

/// Runs the loads one after the other under `source` and checks every count.
///
/// # Panics
/// If any count is not exact, or anything was lost.
pub fn check(source: &EbpfSource, device: &Target, block_size: u64, loads: &[NamedLoads]) {
    for (number, (what, load)) in loads.iter().enumerate() {
        let image = ImageId(1000 + number as u128);
        let seed = 42 + number as u64;
        source
            .attach_device(device.major, device.minor, image, ByteLen(block_size))
            .unwrap();
        let before = source.clone().drain().unwrap();
        let unfinished_before = source.unfinished();
        assert!(before.images.is_empty(), "an idle device counts nothing: {before:?}");
        let (log, sum) = drain_during(source, || run(device.file, device.size_bytes, load, seed).unwrap());
        source.detach_device(device.major, device.minor).unwrap();
        let seen = &sum.images[&image];
        println!(
            "{what}: {} requests, {:.0} IOPS, {} windows, blocks of {block_size}, seed {seed}",
            log.requests.len(),
            log.iops(),
            sum.windows
        );
        check_counts(what, &seen.counts, &log.counts(block_size));
        assert_eq!(
            (seen.lost, sum.lost_total - before.lost_total),
            (0, 0),
            "{what}: losses"
        );
        assert_eq!(
            sum.events_total - before.events_total,
            log.requests.len() as u64,
            "{what}: one bio per request"
        );
        let writes = log.requests.iter().filter(|request| request.write).count() as u64;
        let reads = log.requests.len() as u64 - writes;
        let measured = (seen.read_latencies, seen.write_latencies);
        // The kernel may leave out a completion, but not without the probes knowing that a latency is missing.
        let missing = (sum.untimed_total + source.unfinished()) - (before.untimed_total + unfinished_before);
        println!("{what}: {missing} latencies were not measured");
        assert!(
            measured.0 <= reads && measured.1 <= writes && measured.0 + measured.1 + missing == reads + writes,
            "{what}: latencies {measured:?} of {reads} reads and {writes} writes, {missing} known to be missing"
        );
    }
}

/// The loads of DESIGN §11: 4 KiB and 256 KiB, aligned to the block and not, sequential and random.
/// `count` requests of each thread, fewer of the long ones; `step` shifts them off multiples of 4 KiB.
pub fn loads(step: u64, count: u64) -> Vec<NamedLoads> {
    let load = |length, align, shift, order, write_percent, count| Load {
        length,
        align,
        shift,
        order,
        write_percent,
        count,
    };
    let large = count / 40;
    vec![
        (
            "4 KiB random, two threads, reads and writes",
            vec![load(4 * KIB, 4 * KIB, 0, Order::Random, 30, count); 2],
        ),
        (
            "4 KiB sequential reads",
            vec![load(4 * KIB, 4 * KIB, 0, Order::Sequential, 0, count); 2],
        ),
        (
            "4 KiB from any sector the device has, random",
            vec![load(4 * KIB, 4 * KIB, step, Order::Random, 50, count / 2); 2],
        ),
        (
            "256 KiB sequential",
            vec![load(256 * KIB, 256 * KIB, 0, Order::Sequential, 50, large); 2],
        ),
        (
            "256 KiB from any sector, random",
            vec![load(256 * KIB, 4 * KIB, step, Order::Random, 50, large); 2],
        ),
    ]
}
