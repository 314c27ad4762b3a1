//! Many threads on one volume: no read goes back in time, nothing tears, the tier stays within its size.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hearth_node::disk::Disk;
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{BlockIndex, Epoch, LeaseId};

const SECTOR: u64 = 512;
const WRITERS: u64 = 3;

/// Each sector has one writer, who fills it with growing versions; a reader who began after version `v` was
/// acknowledged must see `v` or later, and all of a sector from one version.
struct Board {
    begun: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
}

fn stress(block_size: u64, sectors: u64, run: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(dir.path(), StoreOptions::default()).unwrap());
    let tier = RamTier::new(TierOptions {
        capacity_bytes: sectors * SECTOR / 2,
        front_percent: 50,
        lock: false,
    })
    .unwrap();
    let size = sectors * SECTOR;
    let image = store.create(&"p/i".parse().unwrap(), size, block_size).unwrap().id;
    let volume = Volume::attach(store, tier.clone(), image, Epoch(1), LeaseId(1), Arc::new(NoPeers)).unwrap();
    let board = Board {
        begun: (0..sectors).map(|_| AtomicU64::new(0)).collect(),
        acknowledged: (0..sectors).map(|_| AtomicU64::new(0)).collect(),
    };
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    let check = |first: u64, buf: &[u8], floor: &[u64]| {
        for (i, sector) in buf.chunks(SECTOR as usize).enumerate() {
            let words: Vec<u64> = sector
                .chunks(8)
                .map(|w| u64::from_le_bytes(w.try_into().unwrap()))
                .collect();
            assert!(
                words.iter().all(|w| *w == words[0]),
                "sector {} is torn",
                first + i as u64
            );
            let most = board.begun[first as usize + i].load(Ordering::SeqCst);
            assert!(
                words[0] >= floor[i] && words[0] <= most,
                "sector {} has version {}, {} was acknowledged before and {most} begun",
                first + i as u64,
                words[0],
                floor[i]
            );
        }
    };
    let random = |seed: &mut u64| {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *seed >> 33
    };
    std::thread::scope(|scope| {
        let (volume, board, stop, check, reads, tier) = (&volume, &board, &stop, &check, &reads, &tier);
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let mut seed = writer + 1;
                let mut version = 0;
                while !stop.load(Ordering::Relaxed) {
                    version += 1;
                    // A run of sectors of this writer's own: runs of 8 go around among the writers.
                    let run = random(&mut seed) % (sectors / 8 / WRITERS) * WRITERS + writer;
                    let first = run * 8 + random(&mut seed) % 4;
                    let count = 1 + random(&mut seed) % 4;
                    for s in first..first + count {
                        board.begun[s as usize].store(version, Ordering::SeqCst);
                    }
                    let data: Vec<u8> = version.to_le_bytes().repeat((count * SECTOR / 8) as usize);
                    volume.write(first * SECTOR, &data, version % 64 == 0).unwrap();
                    for s in first..first + count {
                        board.acknowledged[s as usize].store(version, Ordering::SeqCst);
                    }
                }
            });
        }
        for reader in 0..2u64 {
            scope.spawn(move || {
                let mut seed = 100 + reader;
                let mut buf = vec![0; 40 * SECTOR as usize];
                while !stop.load(Ordering::Relaxed) {
                    let count = 1 + random(&mut seed) % 40;
                    let first = random(&mut seed) % (sectors - count);
                    let floor: Vec<u64> = (first..first + count)
                        .map(|s| board.acknowledged[s as usize].load(Ordering::SeqCst))
                        .collect();
                    let part = &mut buf[..(count * SECTOR) as usize];
                    if !volume.try_read_ram(first * SECTOR, part) {
                        volume.read(first * SECTOR, part).unwrap();
                    }
                    check(first, part, &floor);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(move || {
            let mut seed = 7;
            while !stop.load(Ordering::Relaxed) {
                let block = BlockIndex(random(&mut seed) % (size / block_size));
                if let Some(layer) = volume.resolve(block) {
                    if random(&mut seed) % 2 == 0 {
                        volume.promote(layer, &[block], Epoch(1), u64::MAX).unwrap();
                    } else {
                        volume.demote(layer, &[block]);
                    }
                }
                let usage = tier.usage();
                assert!(usage.front.0 + usage.main.0 <= usage.capacity.0, "{usage:?}");
            }
        });
        let end = Instant::now() + run;
        let mut snapshots = 0;
        while Instant::now() < end {
            std::thread::park_timeout(Duration::from_millis(200));
            volume.flush().unwrap();
            if snapshots < 5 {
                volume.snapshot(&format!("s{snapshots}").parse().unwrap()).unwrap();
                snapshots += 1;
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    let counters = tier.counters();
    println!("{} reads, {counters:?}", reads.load(Ordering::Relaxed));
    assert!(reads.load(Ordering::Relaxed) > 100 && counters.hits > 0 && counters.promoted > 0);
    let mut buf = vec![0; size as usize];
    volume.read(0, &mut buf).unwrap();
    let last: Vec<u64> = board.acknowledged.iter().map(|v| v.load(Ordering::SeqCst)).collect();
    check(0, &buf, &last);
}

#[test]
fn reads_never_go_back_in_time_under_promotion_and_snapshots() {
    stress(64 << 10, 8 * 3 * 160, Duration::from_secs(3));
    stress(4 << 10, 8 * 3 * 80, Duration::from_secs(2));
}
