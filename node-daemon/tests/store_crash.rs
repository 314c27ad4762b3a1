//! What the store holds after the daemon died (kill -9) and after the machine did.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{Epoch, ImageName, Incarnation, LeaseId};
use nix::fcntl::{FallocateFlags, fallocate};

const BLOCK: u64 = 16 << 10;
const SIZE: u64 = 64 * BLOCK;

fn open(dir: &Path, incarnation: u128) -> Arc<Store> {
    let options = StoreOptions {
        incarnation: Some(Incarnation(incarnation)),
        ..StoreOptions::default()
    };
    Arc::new(Store::open(dir, options).unwrap())
}

fn attach(store: &Arc<Store>, name: &str, epoch: u64) -> Arc<Volume> {
    let tier = RamTier::new(TierOptions {
        capacity_bytes: 1 << 20,
        front_percent: 50,
        lock: false,
    })
    .unwrap();
    let image = store.find(&name.parse().unwrap()).unwrap().id;
    let lease = LeaseId(epoch.into());
    Volume::attach(store.clone(), tier, image, Epoch(epoch), lease, Arc::new(NoPeers)).unwrap()
}

/// A parent full of 0xAA with snapshot v1, and its clone `p/clone`.
fn with_clone(dir: &Path) -> Arc<Store> {
    let store = open(dir, 1);
    let parent: ImageName = "p/parent".parse().unwrap();
    let id = store.create(&parent, SIZE, BLOCK).unwrap().id;
    let volume = attach(&store, "p/parent", 1);
    volume.write(0, &vec![0xaa; SIZE as usize], false).unwrap();
    volume.detach().unwrap();
    store.snapshot(id, &"v1".parse().unwrap()).unwrap();
    store
        .clone_image(id, &"v1".parse().unwrap(), &"p/clone".parse().unwrap())
        .unwrap();
    store
}

fn crash(volume: Arc<Volume>, store: Arc<Store>) {
    drop(volume);
    while Arc::strong_count(&store) > 1 {
        std::thread::yield_now();
    }
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let mut buf = vec![0; SIZE as usize];
    volume.read(0, &mut buf).unwrap();
    buf
}

/// The data of a block that the top layer's data file loses, as a power loss may lose what was not flushed.
fn lose_block(dir: &Path, store: &Store, block: u64) {
    let top = store.find(&"p/clone".parse().unwrap()).unwrap().top();
    let path = dir.join("layers").join(top.to_string()).join("data");
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file.as_fd(), flags, (block * BLOCK) as i64, BLOCK as i64).unwrap();
}

#[test]
fn a_power_loss_never_exposes_a_block_whose_copy_up_did_not_reach_the_disk() {
    for incarnation in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let store = with_clone(dir.path());
        let volume = attach(&store, "p/clone", 1);
        volume.write(100, &[1; 50], false).unwrap();
        volume.flush().unwrap();
        volume.write(BLOCK + 100, &[2; 50], false).unwrap();
        lose_block(dir.path(), &store, 1);
        crash(volume, store);

        let store = open(dir.path(), incarnation);
        let volume = attach(&store, "p/clone", 2);
        let mut expect = vec![0xaa; SIZE as usize];
        expect[100..150].fill(1);
        let got = read_all(&volume);
        if incarnation == 2 {
            // Another boot: the unflushed write is gone, the parent's bytes are all there.
            assert!(got == expect);
            assert_eq!(volume.recovery().unwrap().dropped, 1);
        } else {
            // The same boot would have trusted the record; only an impossible loss of kernel memory shows the hole.
            // That the result differs is the proof that the commit rule is what saved the other case.
            assert!(got != expect);
        }
    }
}

#[test]
fn an_unflushed_write_that_a_power_loss_undid_does_not_come_back_later() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), 1);
    store.create(&"p/clone".parse().unwrap(), SIZE, BLOCK).unwrap();
    let volume = attach(&store, "p/clone", 1);
    volume.write(0, &[7; 4096], false).unwrap();
    crash(volume, store);

    let store = open(dir.path(), 2);
    let volume = attach(&store, "p/clone", 2);
    assert!(read_all(&volume).iter().all(|b| *b == 0));
    assert!(volume.recovery().unwrap().scrubbed_bytes >= 4096);
    volume.write(8192, &[8; 4096], false).unwrap();
    let got = read_all(&volume);
    assert!(got[..8192].iter().all(|b| *b == 0), "bytes of the lost write came back");
    assert!(got[8192..12288].iter().all(|b| *b == 8));
}

#[test]
fn fua_is_durable_by_itself_and_flush_covers_everything_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut expect = vec![0xaa; SIZE as usize];
    let store = with_clone(dir.path());
    let volume = attach(&store, "p/clone", 1);
    // First into a new block, then over a held one, then over one whose record is not committed yet.
    for (at, fua) in [
        (5_000u64, true),
        (5_100, true),
        (40_000, false),
        (40_100, true),
        (90_000, false),
    ] {
        volume.write(at, &[3; 60], fua).unwrap();
        if at < 90_000 {
            expect[at as usize..at as usize + 60].fill(3);
        }
    }
    crash(volume, store);
    let store = open(dir.path(), 2);
    let volume = attach(&store, "p/clone", 2);
    assert!(read_all(&volume) == expect);
    volume.trim(3 * BLOCK, 2 * BLOCK, true).unwrap();
    expect[3 * BLOCK as usize..5 * BLOCK as usize].fill(0);
    volume.trim(9 * BLOCK, BLOCK, false).unwrap();
    crash(volume, store);
    let volume = attach(&open(dir.path(), 3), "p/clone", 3);
    assert!(read_all(&volume) == expect);
}

/// Operation `i` of the child, made from its number alone.
fn operation(i: u64) -> (u64, u64, u8, u64) {
    let r = |salt: u64| {
        let mut x = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
        x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 16
    };
    let at = r(1) % SIZE;
    let len = (1 + r(2) % 30_000).min(SIZE - at);
    (at, len, (i % 250) as u8 + 1, r(3) % 40)
}

fn apply(model: &mut [u8], i: u64) -> std::ops::Range<usize> {
    let (at, len, fill, kind) = operation(i);
    let range = at as usize..(at + len) as usize;
    match kind {
        0..=5 => model[range.clone()].fill(0),
        6 | 7 => return 0..0,
        _ => model[range.clone()].fill(fill),
    }
    range
}

/// Not a test by itself: the process that is killed.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(dir) = std::env::var("HEARTH_CRASH_DIR") else {
        return;
    };
    let store = open(Path::new(&dir), 1);
    let epoch = store.find(&"p/clone".parse().unwrap()).unwrap().record.epoch.0 + 1;
    let start: u64 = std::env::var("HEARTH_CRASH_START").unwrap().parse().unwrap();
    let volume = attach(&store, "p/clone", epoch);
    let mut out = std::io::stdout();
    for i in start.. {
        let (at, len, fill, kind) = operation(i);
        match kind {
            0..=2 => volume.trim(at, len, false).unwrap(),
            3..=5 => volume.write_zeroes(at, len, kind == 3, false).unwrap(),
            6 => volume.flush().unwrap(),
            7 => {
                // Up to the limit of layers; a refusal changes nothing.
                let _ = volume.snapshot(&format!("s{i}").parse().unwrap());
            }
            _ => volume.write(at, &vec![fill; len as usize], kind == 8).unwrap(),
        }
        writeln!(out, "acknowledged {i}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn kill_9_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    drop(with_clone(dir.path()));
    let mut model = vec![0xaa; SIZE as usize];
    let mut next = 0u64;
    for round in 0..6u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env("HEARTH_CRASH_DIR", dir.path())
            .env("HEARTH_CRASH_START", next.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok).filter_map(|line| {
            let at = line.find("acknowledged ")?;
            line[at + 13..].parse::<u64>().ok()
        });
        let mut last = None;
        for i in lines.by_ref().take(40 + 30 * round as usize) {
            last = Some(i);
        }
        child.kill().unwrap();
        // What it said before it died counts too.
        last = lines.last().or(last);
        child.wait().unwrap();
        let last = last.expect("the child acknowledged something");
        for i in next..=last {
            apply(&mut model, i);
        }
        next = last + 1;

        let store = open(dir.path(), 1);
        let epoch = store.find(&"p/clone".parse().unwrap()).unwrap().record.epoch.0 + 1;
        let volume = attach(&store, "p/clone", epoch);
        let got = read_all(&volume);
        // The operation in flight may have happened, or not, or in part.
        let mut with_next = model.clone();
        let in_flight = apply(&mut with_next, next);
        for at in 0..SIZE as usize {
            let fits = got[at] == model[at] || (in_flight.contains(&at) && got[at] == with_next[at]);
            assert!(
                fits,
                "round {round}: byte {at} is {} and should be {}",
                got[at], model[at]
            );
        }
        // Go on from what is there.
        model = got;
        next += 1;
        crash(volume, store);
    }
}

/// After a sync that failed the daemon lives for `calls` more calls of the store, then dies.
fn dies_behind_a_failed_sync(calls: usize) -> (tempfile::TempDir, usize) {
    use hearth_node::store::fault::{Faults, Site, Verdict};
    use std::sync::Mutex;

    #[derive(Clone, Copy, PartialEq)]
    enum Sync {
        Works,
        Fails,
        HasFailed { calls: usize },
    }
    let dir = tempfile::tempdir().unwrap();
    let sync = Arc::new(Mutex::new(Sync::Works));
    let hook = sync.clone();
    let faults = Faults::hook(move |call| {
        let mut sync = hook.lock().unwrap();
        let eio = || std::io::Error::from_raw_os_error(libc::EIO);
        match &mut *sync {
            Sync::Fails if call.site == Site::DataSync => {
                *sync = Sync::HasFailed { calls: 0 };
                Err(eio())
            }
            Sync::HasFailed { calls: made } => {
                *made += 1;
                if *made > calls { Err(eio()) } else { Ok(Verdict::Go) }
            }
            _ => Ok(Verdict::Go),
        }
    });
    let options = StoreOptions {
        incarnation: Some(Incarnation(1)),
        faults,
    };
    let store = Arc::new(Store::open(dir.path(), options).unwrap());
    store.create(&"p/clone".parse().unwrap(), SIZE, BLOCK).unwrap();
    let volume = attach(&store, "p/clone", 1);
    volume.write(0, &[1; BLOCK as usize], false).unwrap();
    volume.flush().unwrap();
    volume.write(BLOCK, &[2; BLOCK as usize], false).unwrap();
    *sync.lock().unwrap() = Sync::Fails;
    volume.flush().unwrap_err();
    crash(volume, store);
    let Sync::HasFailed { calls: asked } = *sync.lock().unwrap() else {
        panic!("no sync failed");
    };
    (dir, asked)
}

/// The kernel reports a failed sync once: whoever asks next hears that all is well. So the daemon leaves a mark before
/// anything else, and the one that comes after it knows, wherever its predecessor died behind the mark's creation.
#[test]
fn a_daemon_that_dies_right_behind_a_failed_sync_leaves_word() {
    let (_, asked) = dies_behind_a_failed_sync(usize::MAX);
    assert!(asked > 4, "a mark and a note in the image's metadata: {asked} calls");
    for calls in 1..=asked {
        let (dir, _) = dies_behind_a_failed_sync(calls);
        let store = open(dir.path(), 1);
        let volume = attach(&store, "p/clone", 1);
        let what = format!("dead after {calls} calls");
        assert!(
            volume.flush().is_err(),
            "{what}: a flush of the same lease was acknowledged"
        );
        assert!(volume.write(0, &[3; 4096], false).is_err(), "{what}: took a write");
        let trouble = volume.trouble().unwrap();
        assert!(trouble.contains("takes no more writes"), "{what}: {trouble}");
        assert!(
            read_all(&volume).starts_with(&[1; BLOCK as usize]),
            "{what}: serves what was flushed"
        );
        crash(volume, store);

        // Attached anew: what was not flushed is gone, and the image works, also after the next death.
        let store = open(dir.path(), 1);
        let volume = attach(&store, "p/clone", 2);
        let got = read_all(&volume);
        assert!(got[..BLOCK as usize].iter().all(|b| *b == 1) && got[BLOCK as usize..].iter().all(|b| *b == 0));
        volume.write(BLOCK, &[4; 4096], true).unwrap();
        crash(volume, store);
        let store = open(dir.path(), 1);
        let volume = attach(&store, "p/clone", 2);
        volume.flush().unwrap();
        assert_eq!(volume.trouble(), None, "{what}");
        volume.detach().unwrap();
    }
}
