//! Every call that the store makes to the operating system fails in turn; nothing acknowledged may be lost, and a
//! failed flush must close the image for writes.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::fault::{Faults, Site};
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{Epoch, Incarnation, LeaseId};

const BLOCK: u64 = 8 << 10;
const SIZE: u64 = 8 * BLOCK;

/// Fails the `n`th call at one site, and all later ones if `for_good`.
struct Plan {
    site: Site,
    at: u64,
    for_good: bool,
    error: io::ErrorKind,
    armed: AtomicU64,
    seen: AtomicU64,
}

fn faults(plan: &Arc<Plan>) -> Faults {
    let plan = plan.clone();
    Faults::hook(move |site| {
        if plan.armed.load(Ordering::SeqCst) == 0 || site != plan.site {
            return Ok(());
        }
        let n = plan.seen.fetch_add(1, Ordering::SeqCst);
        if n == plan.at || (plan.for_good && n > plan.at) {
            return Err(plan.error.into());
        }
        Ok(())
    })
}

fn open(dir: &Path, incarnation: u128, faults: Faults) -> Arc<Store> {
    let options = StoreOptions {
        incarnation: Some(Incarnation(incarnation)),
        faults,
    };
    Arc::new(Store::open(dir, options).unwrap())
}

fn attach(store: &Arc<Store>, epoch: u64) -> Arc<Volume> {
    let tier = RamTier::new(TierOptions {
        capacity_bytes: 512 << 10,
        front_percent: 50,
        lock: false,
    })
    .unwrap();
    let image = store.find(&"p/clone".parse().unwrap()).unwrap().id;
    Volume::attach(
        store.clone(),
        tier,
        image,
        Epoch(epoch),
        LeaseId(epoch.into()),
        Arc::new(NoPeers),
    )
    .unwrap()
}

/// What each byte may be: the acknowledged value, or that of a write that failed since.
struct Model {
    acknowledged: Vec<u8>,
    failed: Mutex<Vec<(std::ops::Range<usize>, u8)>>,
    flushed: Vec<u8>,
}

impl Model {
    fn fits(&self, base: &[u8], got: &[u8], unflushed: &[(std::ops::Range<usize>, u8)]) -> Result<(), String> {
        let failed = self.failed.lock().unwrap();
        let maybe: Vec<_> = failed.iter().chain(unflushed).collect();
        (0..got.len()).try_for_each(|i| {
            if got[i] == base[i]
                || maybe
                    .iter()
                    .any(|(range, value)| range.contains(&i) && got[i] == *value)
            {
                Ok(())
            } else {
                Err(format!("byte {i} is {} and should be {}", got[i], base[i]))
            }
        })
    }
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let mut buf = vec![0; SIZE as usize];
    volume.read(0, &mut buf).unwrap();
    buf
}

fn wait_alone(store: &Arc<Store>) {
    while Arc::strong_count(store) > 1 {
        std::thread::yield_now();
    }
}

/// Plays a fixed script with one fault. Says whether the fault was met.
fn play(site: Site, at: u64, for_good: bool, error: io::ErrorKind, power_loss: bool) -> bool {
    let what = format!("{site:?} call {at}, for good: {for_good}, {error:?}, power loss: {power_loss}");
    let dir = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() {
        Path::new("/dev/shm")
    } else {
        Path::new("/tmp")
    })
    .unwrap();
    let plan = Arc::new(Plan {
        site,
        at,
        for_good,
        error,
        armed: AtomicU64::new(0),
        seen: AtomicU64::new(0),
    });
    let store = open(dir.path(), 1, faults(&plan));
    let parent = store.create(&"p/parent".parse().unwrap(), SIZE, BLOCK).unwrap().id;
    let tier = RamTier::new(TierOptions {
        capacity_bytes: 0,
        front_percent: 0,
        lock: false,
    })
    .unwrap();
    let volume = Volume::attach(store.clone(), tier, parent, Epoch(1), LeaseId(1), Arc::new(NoPeers)).unwrap();
    volume.write(0, &vec![0xaa; SIZE as usize], false).unwrap();
    volume.detach().unwrap();
    drop(volume);
    store.snapshot(parent, &"v1".parse().unwrap()).unwrap();
    store
        .clone_image(parent, &"v1".parse().unwrap(), &"p/clone".parse().unwrap())
        .unwrap();
    let volume = attach(&store, 1);
    let mut model = Model {
        acknowledged: vec![0xaa; SIZE as usize],
        failed: Mutex::default(),
        flushed: vec![0xaa; SIZE as usize],
    };
    // Writes acknowledged since the last flush that succeeded: a power loss may keep any of them.
    let mut unflushed: Vec<(std::ops::Range<usize>, u8)> = Vec::new();
    plan.armed.store(1, Ordering::SeqCst);
    let mut poisoned = false;
    let mut step = |kind: &str, at: u64, len: u64, value: u8| {
        let range = at as usize..(at + len) as usize;
        let result = match kind {
            "write" => volume.write(at, &vec![value; len as usize], false),
            "fua" => volume.write(at, &vec![value; len as usize], true),
            "trim" => volume.trim(at, len, false),
            "zero" => volume.write_zeroes(at, len, true, false),
            "flush" => volume.flush(),
            "snapshot" => {
                let name = format!("s{at}").parse().unwrap();
                volume
                    .snapshot(&name)
                    .map(drop)
                    .map_err(|err| DiskError::ReadOnly(Box::leak(err.to_string().into())))
            }
            _ => unreachable!(),
        };
        assert!(
            !(poisoned && result.is_ok()),
            "{what}: {kind} succeeded on a poisoned image"
        );
        match (&result, kind) {
            (Ok(()), "flush" | "snapshot") => {
                model.flushed.clone_from(&model.acknowledged);
                unflushed.clear();
            }
            (Ok(()), _) => {
                model.acknowledged[range.clone()].fill(value);
                // What had failed there before is overwritten now.
                let mut failed = model.failed.lock().unwrap();
                failed.retain(|(r, _)| !(range.start <= r.start && r.end <= range.end));
                unflushed.push((range.clone(), value));
                if kind == "fua" {
                    model.flushed[range].fill(value);
                }
            }
            (Err(DiskError::Poisoned(_)), _) => poisoned = true,
            (Err(_), "flush") => poisoned = true,
            (Err(_), "snapshot") => {}
            (Err(err), _) => {
                if error == io::ErrorKind::StorageFull && !poisoned {
                    assert!(
                        matches!(err, DiskError::NoSpace(_)) || kind == "fua",
                        "{what}: {kind} says {err}"
                    );
                }
                model.failed.lock().unwrap().push((range.clone(), value));
                unflushed.push((range, value));
            }
        }
        // Whatever happened, reads give acknowledged bytes, and RAM agrees with them.
        if site != Site::DataRead && site != Site::DataReadDone {
            let got = read_all(&volume);
            model
                .fits(&model.acknowledged, &got, &[])
                .unwrap_or_else(|why| panic!("{what}: after {kind}: {why}"));
            assert!(got == read_all(&volume), "{what}: two reads differ");
        }
    };
    step("write", 100, 50, 1);
    step("write", BLOCK + 10, 2 * BLOCK, 2);
    step("flush", 0, 0, 0);
    step("write", 4096, 4096, 3);
    step("fua", 5 * BLOCK + 5, 20, 4);
    step("trim", 2 * BLOCK, BLOCK, 0);
    step("zero", 3 * BLOCK + 100, BLOCK, 0);
    step("snapshot", 1, 0, 0);
    step("write", 6 * BLOCK, BLOCK, 5);
    step("write", 100, 10, 6);
    step("flush", 0, 0, 0);
    step("fua", 7 * BLOCK, 4096, 7);
    step("snapshot", 2, 0, 0);
    step("write", 50, 100, 8);
    let met = plan.seen.load(Ordering::SeqCst) > at;
    plan.armed.store(0, Ordering::SeqCst);
    drop(volume);
    wait_alone(&store);
    drop(store);

    let store = open(dir.path(), if power_loss { 2 } else { 1 }, Faults::default());
    let volume = attach(&store, 2);
    let got = read_all(&volume);
    let result = if power_loss || poisoned {
        model.fits(&model.flushed, &got, &unflushed)
    } else {
        model.fits(&model.acknowledged, &got, &[])
    };
    result.unwrap_or_else(|why| panic!("{what}: after reopening: {why}"));
    // The image works again.
    volume.write(0, &[9; 512], true).unwrap();
    volume.detach().unwrap();
    met
}

#[test]
fn no_failing_call_loses_anything_acknowledged() {
    let mut played = 0;
    for site in Site::ALL {
        for (for_good, error, power_loss) in [
            (false, io::ErrorKind::Other, false),
            (true, io::ErrorKind::Other, true),
            (false, io::ErrorKind::StorageFull, true),
            (true, io::ErrorKind::StorageFull, false),
        ] {
            let mut at = 0;
            while play(site, at, for_good, error, power_loss) {
                played += 1;
                at += 1;
            }
        }
    }
    println!("{played} faults played");
    assert!(played > 200, "the script meets only {played} faults");
}
