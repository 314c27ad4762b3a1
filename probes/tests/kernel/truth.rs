//! Heat is true: per-block counts of the eBPF probes equal a log of what was submitted, on the real kernel.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::device::{BLKDISCARD, BLKZEROOUT, Device};
use crate::generator::{Counts, Load, Log, Order, Request, run};
use crate::skip;
use hearth_probes::{EbpfOptions, EbpfSource, HeatError, HeatSource, Window};
use hearth_protocol::{ByteLen, ImageId};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// How often windows are drained under load: often, so that many bios meet a change of windows.
const DRAIN_EVERY: Duration = Duration::from_millis(50);

/// Loads the probes, or says why they cannot run here.
fn probes(options: EbpfOptions) -> Option<EbpfSource> {
    match EbpfSource::load(options) {
        Ok(source) => Some(source),
        Err(error @ HeatError::Unavailable { .. }) => {
            skip(error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn device(made: anyhow::Result<Device>) -> Option<Device> {
    made.inspect_err(|error| skip(format!("{error:#}"))).ok()
}

/// What all windows together said of an image.
#[derive(Default)]
struct Seen {
    counts: Counts,
    lost: u64,
    read_latencies: u64,
    write_latencies: u64,
}

impl Seen {
    fn touches(&self) -> u64 {
        self.counts.values().map(|(reads, writes, _)| reads + writes).sum()
    }
}

/// Adds up windows.
#[derive(Default)]
struct Sum {
    images: BTreeMap<ImageId, Seen>,
    windows: u64,
    events_total: u64,
    lost_total: u64,
}

impl Sum {
    fn add(&mut self, window: Window) {
        self.windows += 1;
        (self.events_total, self.lost_total) = (window.events_total, window.lost_total);
        for image in window.images {
            assert!(
                image.blocks.is_sorted_by(|a, b| a.block < b.block),
                "blocks ascend strictly"
            );
            let seen = self.images.entry(image.image).or_default();
            seen.lost += image.lost;
            seen.read_latencies += image.read_latency.len();
            seen.write_latencies += image.write_latency.len();
            for heat in image.blocks {
                assert!((1..=heat.reads + heat.writes).contains(&heat.bursts), "{heat:?}");
                let entry = seen.counts.entry(heat.block.0).or_default();
                entry.0 += u64::from(heat.reads);
                entry.1 += u64::from(heat.writes);
                entry.2 += heat.bytes;
            }
        }
    }
}

/// Drains windows while `work` runs, and once more when it has ended.
fn drain_during<T: Send>(source: &EbpfSource, work: impl FnOnce() -> T + Send) -> (T, Sum) {
    drain_every(DRAIN_EVERY, source, work)
}

/// Drains windows this often.
fn drain_every<T: Send>(pause: Duration, source: &EbpfSource, work: impl FnOnce() -> T + Send) -> (T, Sum) {
    let (done, wait) = mpsc::channel::<()>();
    let mut drained = source.clone();
    let drainer = move || {
        let mut sum = Sum::default();
        loop {
            let ended = wait.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
            sum.add(drained.drain().expect("the window can be drained"));
            if ended {
                return sum;
            }
        }
    };
    thread::scope(|scope| {
        let drainer = scope.spawn(drainer);
        let result = work();
        drop(done);
        (result, drainer.join().expect("the drain does not panic"))
    })
}

fn check_counts(what: &str, found: &Counts, expect: &Counts) {
    let wrong: Vec<_> = expect
        .keys()
        .chain(found.keys().filter(|block| !expect.contains_key(block)))
        .filter(|block| expect.get(block) != found.get(block))
        .take(10)
        .map(|block| {
            format!(
                "block {block}: submitted {:?}, counted {:?}",
                expect.get(block),
                found.get(block)
            )
        })
        .collect();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
}

/// Runs the loads one after the other under `source` and checks every count.
fn check(source: &EbpfSource, device: &Device, block_size: u64, loads: &[(&str, &[Load])]) {
    for (number, (what, load)) in loads.iter().enumerate() {
        let image = ImageId(1000 + number as u128);
        let seed = 42 + number as u64;
        source
            .attach_device(device.major, device.minor, image, ByteLen(block_size))
            .unwrap();
        let before = source.clone().drain().unwrap();
        assert!(before.images.is_empty(), "an idle device counts nothing: {before:?}");
        let (log, sum) = drain_during(source, || run(device, load, seed).unwrap());
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
        assert_eq!(
            (seen.read_latencies, seen.write_latencies),
            (reads, writes),
            "{what}: every latency is measured"
        );
    }
}

/// The loads of DESIGN §11: 4 KiB and 256 KiB, aligned to the block and not, sequential and random.
fn loads(step: u64, count: u64) -> Vec<(&'static str, Vec<Load>)> {
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

fn as_slices<'a>(loads: &'a [(&'static str, Vec<Load>)]) -> Vec<(&'a str, &'a [Load])> {
    loads.iter().map(|(what, loads)| (*what, loads.as_slice())).collect()
}

#[test]
fn zram_counts_are_exact() {
    let Some(source) = probes(EbpfOptions::default()) else {
        return;
    };
    let Some(device) = device(Device::zram(512 * MIB)) else {
        return;
    };
    let loads = loads(0, 200_000);
    for block_size in [4 * KIB, 64 * KIB] {
        check(&source, &device, block_size, &as_slices(&loads));
    }
}

#[test]
fn loop_counts_are_exact_also_when_requests_are_split() {
    let Some(source) = probes(EbpfOptions::default()) else {
        return;
    };
    let Some(device) = device(Device::loop_over_tmpfs(256 * MIB)) else {
        return;
    };
    // Sectors of 512 bytes: requests need not even be aligned to 4 KiB.
    let loads = loads(1536, 20_000);
    check(&source, &device, 16 * KIB, &as_slices(&loads));
    device.split_at(64 * KIB).unwrap();
    check(&source, &device, 64 * KIB, &as_slices(&loads));
}

#[test]
fn no_touch_falls_between_two_windows() {
    let Some(source) = probes(EbpfOptions::default()) else {
        return;
    };
    let Some(device) = device(Device::zram(64 * MIB)) else {
        return;
    };
    let image = ImageId(4);
    source
        .attach_device(device.major, device.minor, image, ByteLen(4 * KIB))
        .unwrap();
    // Long requests keep a program busy for microseconds, so that many changes of windows meet it halfway.
    let load = Load {
        length: 256 * KIB,
        shift: 0,
        align: 4 * KIB,
        order: Order::Random,
        write_percent: 10,
        count: 20_000,
    };
    let (log, sum) = drain_every(Duration::ZERO, &source, || run(&device, &[load; 2], 11).unwrap());
    println!("{} requests in {} windows", log.requests.len(), sum.windows);
    check_counts(
        "windows without pause",
        &sum.images[&image].counts,
        &log.counts(4 * KIB),
    );
    assert_eq!(sum.lost_total, 0);
}

#[test]
fn what_finds_no_room_is_lost_and_counted() {
    let Some(source) = probes(EbpfOptions {
        blocks_max: 100,
        ..EbpfOptions::default()
    }) else {
        return;
    };
    let Some(device) = device(Device::loop_over_tmpfs(256 * MIB)) else {
        return;
    };
    let image = ImageId(5);
    source
        .attach_device(device.major, device.minor, image, ByteLen(4 * KIB))
        .unwrap();
    let load = |length, count| Load {
        length,
        shift: 0,
        align: 4 * KIB,
        order: Order::Random,
        write_percent: 30,
        count,
    };
    let (log, sum) = drain_during(&source, || {
        run(&device, &[load(4 * KIB, 10_000), load(256 * KIB, 500)], 7).unwrap()
    });
    let seen = &sum.images[&image];
    let expect = log.counts(4 * KIB);
    let submitted: u64 = expect.values().map(|(reads, writes, _)| reads + writes).sum();
    println!(
        "submitted {submitted}, counted {}, lost {} in {} windows",
        seen.touches(),
        seen.lost,
        sum.windows
    );
    assert!(seen.lost > 0 && seen.touches() > 0, "the map is too small on purpose");
    assert_eq!(seen.touches() + seen.lost, submitted);
    assert_eq!(sum.lost_total, seen.lost);
    for (block, (reads, writes, bytes)) in &seen.counts {
        let most = expect[block];
        assert!(
            *reads <= most.0 && *writes <= most.1 && *bytes <= most.2,
            "block {block} counts more than submitted"
        );
    }
}

#[test]
fn trims_and_zeroes_of_any_length_count_as_writes() {
    let Some(source) = probes(EbpfOptions::default()) else {
        return;
    };
    // A device that cannot zero is asked to, refuses, and is sent plain writes: that would be counted twice, rightly.
    let Some(device) = device(Device::zram(256 * MIB)) else {
        return;
    };
    let image = ImageId(6);
    let block_size = 4 * KIB;
    source
        .attach_device(device.major, device.minor, image, ByteLen(block_size))
        .unwrap();
    // The first is longer than a program counts by itself.
    let ranges = [
        (BLKDISCARD, 0, 256 * MIB),
        (BLKDISCARD, MIB, 64 * KIB),
        (BLKZEROOUT, 8 * MIB, 2 * MIB),
    ];
    let ((), sum) = drain_during(&source, || {
        for (request, offset, length) in ranges {
            device.range_ioctl(request, offset, length).unwrap();
        }
        device.file().sync_all().unwrap();
    });
    let requests = ranges.iter().map(|(_, offset, length)| Request {
        write: true,
        offset: *offset,
        length: *length,
    });
    let log = Log {
        requests: requests.collect(),
        took: Duration::ZERO,
    };
    check_counts("trims and zeroes", &sum.images[&image].counts, &log.counts(block_size));
    assert_eq!(sum.lost_total, 0);
}

#[test]
fn two_images_and_a_stranger_do_not_mix() {
    let Some(source) = probes(EbpfOptions::default()) else {
        return;
    };
    let made = [(); 3].map(|()| device(Device::loop_over_tmpfs(64 * MIB)));
    let [Some(first), Some(second), Some(stranger)] = made else {
        return;
    };
    let load = [Load {
        length: 4 * KIB,
        shift: 0,
        align: 4 * KIB,
        order: Order::Random,
        write_percent: 50,
        count: 5_000,
    }];
    source
        .attach_device(first.major, first.minor, ImageId(1), ByteLen(64 * KIB))
        .unwrap();
    source
        .attach_device(second.major, second.minor, ImageId(2), ByteLen(4 * KIB))
        .unwrap();
    let again = source
        .attach_device(first.major, first.minor, ImageId(3), ByteLen(4 * KIB))
        .unwrap_err();
    assert!(
        again.to_string().contains(&format!("{}:{}", first.major, first.minor)),
        "{again}"
    );
    let (logs, sum) = drain_during(&source, || {
        thread::scope(|scope| {
            let threads = [(&first, 1), (&second, 2), (&stranger, 3)];
            threads
                .map(|(device, seed)| scope.spawn(move || run(device, &load, seed).unwrap()))
                .map(|thread| thread.join().unwrap())
        })
    });
    assert_eq!(sum.images.len(), 2);
    check_counts("first", &sum.images[&ImageId(1)].counts, &logs[0].counts(64 * KIB));
    check_counts("second", &sum.images[&ImageId(2)].counts, &logs[1].counts(4 * KIB));
}

#[test]
fn a_block_touched_again_and_again_has_a_burst_for_each_tenth_of_a_second() {
    let Some(mut source) = probes(EbpfOptions::default()) else {
        return;
    };
    let Some(device) = device(Device::loop_over_tmpfs(MIB)) else {
        return;
    };
    source
        .attach_device(device.major, device.minor, ImageId(1), ByteLen(4 * KIB))
        .unwrap();
    source.drain().unwrap();
    let load = [Load {
        length: 4 * KIB,
        shift: 0,
        align: MIB / 2,
        order: Order::Sequential,
        write_percent: 0,
        count: 1,
    }];
    let started = Instant::now();
    // Touches that were surely a tenth of a second apart, however this thread was scheduled.
    let (mut apart, mut last_end) = (0, None::<Instant>);
    while started.elapsed() < Duration::from_millis(450) {
        let begin = Instant::now();
        run(&device, &load, 1).unwrap();
        if last_end.is_none_or(|last| begin.duration_since(last) >= Duration::from_millis(100)) {
            apart += 1;
            last_end = Some(Instant::now());
        }
    }
    let tenths = started.elapsed().as_millis() as u32 / 100;
    let window = source.drain().unwrap();
    let bursts = window.images[0].blocks[0].bursts;
    assert!(
        (apart..=tenths + 2).contains(&bursts),
        "{bursts} bursts, {apart} touches apart in some {tenths} tenths"
    );
}
