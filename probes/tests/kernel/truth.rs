//! Heat is true: per-block counts of the eBPF probes equal a log of what was submitted, on the real kernel.

use std::thread;
use std::time::{Duration, Instant};

use crate::device::{BLKDISCARD, BLKZEROOUT, Device};
use crate::skip;
use hearth_probes::testing::{
    KIB, Load, Log, MIB, Order, Request, check, check_counts, drain_during, drain_every, loads, run,
};
use hearth_probes::{EbpfOptions, EbpfSource, HeatError, HeatSource};
use hearth_protocol::{ByteLen, ImageId};

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
        check(&source, &device.target(), block_size, &loads);
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
    check(&source, &device.target(), 16 * KIB, &loads);
    device.split_at(64 * KIB).unwrap();
    check(&source, &device.target(), 64 * KIB, &loads);
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
    let (log, sum) = drain_every(Duration::ZERO, &source, || {
        run(device.file(), device.size, &[load; 2], 11).unwrap()
    });
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
        run(
            device.file(),
            device.size,
            &[load(4 * KIB, 10_000), load(256 * KIB, 500)],
            7,
        )
        .unwrap()
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
                .map(|(device, seed)| scope.spawn(move || run(device.file(), device.size, &load, seed).unwrap()))
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
        run(device.file(), device.size, &load, 1).unwrap();
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
