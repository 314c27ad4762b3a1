//! The power fails at every moment of a store's life: whatever of the unsynced writes is then on the disk, the store
//! opens, everything flushed is there, and nothing is there that was never written to its place.
//!
//! The short form takes one in some states of each moment; `HEARTH_TEST_LONG=1` takes all of them, each write torn at
//! every 512 bytes.

mod store_support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use hearth_node::store::Store;
use hearth_node::store::fault::Faults;
use store_support::powerloss::{Disk, Recorder};
use store_support::{Request, Sectors, ask, attach, fast_dir, long, open, read_all};

const BLOCK: u64 = 8 << 10;
const SIZE: u64 = 6 * BLOCK;

/// What the parent holds; the rest of the clone is a hole until it is written.
fn parent() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    bytes[..(SIZE / 2) as usize].fill(0xaa);
    bytes
}

/// Of how many states of one moment the short form takes one.
const ONE_IN: u64 = 12;

/// What must be there once the call that promised it has returned.
#[derive(Clone)]
struct Promise {
    /// The moment at which its call began.
    from: usize,
    /// The moment at which it returned.
    until: usize,
    what: What,
}

#[derive(Clone)]
enum What {
    /// An image exists.
    Image(&'static str),
    /// A request to `p/clone`.
    Asked(Request, u64, u64, u8),
    /// A snapshot of `p/clone`.
    Snapshot(String),
}

struct Story {
    recorder: Recorder,
    promises: Vec<Promise>,
    _dir: tempfile::TempDir,
}

/// Runs a store from its first opening on, and writes down what was promised when.
fn story() -> Story {
    let dir = fast_dir();
    let recorder = Recorder::new(dir.path());
    let mut promises = Vec::new();
    let mut promise = |what: What, call: &mut dyn FnMut()| {
        let from = recorder.moment();
        call();
        promises.push(Promise {
            from,
            until: recorder.moment(),
            what,
        });
    };
    let store = open(dir.path(), 1, recorder.faults());
    let name = |n: &str| format!("p/{n}").parse().unwrap();
    promise(What::Image("parent"), &mut || {
        let parent = store.create(&name("parent"), SIZE, BLOCK).unwrap().id;
        let volume = attach(&store, "p/parent", 1);
        ask(&volume, Request::Write { fua: false }, 0, SIZE / 2, 0xaa).unwrap();
        volume.detach().unwrap();
        store.snapshot(parent, &"v1".parse().unwrap()).unwrap();
    });
    promise(What::Image("clone"), &mut || {
        let parent = store.find(&name("parent")).unwrap().id;
        store
            .clone_image(parent, &"v1".parse().unwrap(), &name("clone"))
            .unwrap();
    });
    let volume = attach(&store, "p/clone", 1);
    let (write, fua) = (Request::Write { fua: false }, Request::Write { fua: true });
    let script = [
        (write, 100, 50, 1),
        (write, BLOCK + 10, 2 * BLOCK, 2),
        (Request::Flush, 0, 0, 0),
        (write, 4096, 4096, 3),
        (fua, 4 * BLOCK + 5, 20, 4),
        (Request::Trim, 2 * BLOCK, BLOCK, 0),
        (Request::Zero, 3 * BLOCK + 100, BLOCK, 0),
        (write, 5 * BLOCK, BLOCK, 5),
        // Over a block whose record is not durable yet.
        (fua, 5 * BLOCK + 4096, 512, 12),
        (write, 100, 10, 6),
        (Request::Flush, 0, 0, 0),
        (fua, 5 * BLOCK + 512, 4096, 7),
        (write, 2 * BLOCK + 700, 30, 8),
        (Request::Flush, 0, 0, 0),
        (write, 50, 100, 9),
        (fua, 4 * BLOCK, 512, 10),
        (write, 3 * BLOCK, 4096, 11),
    ];
    for (i, (request, at, len, value)) in script.into_iter().enumerate() {
        if i == 9 || i == 14 {
            let snapshot = format!("s{i}");
            promise(What::Snapshot(snapshot.clone()), &mut || {
                volume.snapshot(&snapshot.parse().unwrap()).unwrap();
            });
        }
        promise(What::Asked(request, at, len, value), &mut || {
            ask(&volume, request, at, len, value).unwrap();
        });
    }
    let from = recorder.moment();
    volume.detach().unwrap();
    promises.push(Promise {
        from,
        until: recorder.moment(),
        what: What::Asked(Request::Flush, 0, 0, 0),
    });
    Story {
        recorder,
        promises,
        _dir: dir,
    }
}

/// What a power loss at a moment may leave.
struct Legal {
    images: Vec<(&'static str, bool)>,
    /// Of `p/clone`.
    content: Sectors,
    /// What each snapshot holds.
    snapshots: Vec<(String, Sectors)>,
}

fn legal(promises: &[Promise], moment: usize) -> Legal {
    let blank = Sectors::of(&parent());
    let mut legal = Legal {
        images: Vec::new(),
        content: blank.clone(),
        snapshots: Vec::new(),
    };
    let mut now = blank;
    for promise in promises.iter().filter(|p| p.from < moment) {
        let kept = promise.until <= moment;
        match &promise.what {
            What::Image(name) => legal.images.push((name, kept)),
            What::Snapshot(name) if kept => {
                legal.content.clone_from(&now);
                legal.snapshots.push((name.clone(), now.clone()));
            }
            What::Asked(Request::Flush, ..) if kept => legal.content.clone_from(&now),
            What::Snapshot(_) | What::Asked(Request::Flush, ..) => {}
            What::Asked(request, at, len, value) => {
                legal.content.may(*at..at + len, *value);
                if kept {
                    now.set(*at..at + len, *value);
                }
                if kept && *request == (Request::Write { fua: true }) {
                    legal.content.set(*at..at + len, *value);
                }
            }
        }
    }
    legal
}

/// Opens what a power loss left; says what is wrong with it.
fn check(dir: &Path, legal: &Legal, moment: usize) -> Result<(), String> {
    let store: Arc<Store> = open(dir, 2, Faults::default());
    for (image, kept) in &legal.images {
        let Ok(meta) = store.find(&format!("p/{image}").parse().unwrap()) else {
            if *kept {
                return Err(format!("image {image} is gone"));
            }
            continue;
        };
        let volume = attach(&store, &format!("p/{image}"), meta.record.epoch.0 + 1);
        let got = read_all(&volume);
        if *image == "parent" {
            let fits = |(got, full): (&u8, &u8)| got == full || (!kept && *got == 0);
            if !got.iter().zip(&parent()).all(fits) {
                return Err("the parent holds something else".into());
            }
            volume.detach().map_err(|err| err.to_string())?;
            continue;
        }
        legal.content.check(&got)?;
        // Bytes of writes that were lost do not come back when their block is written again.
        let block = (moment as u64 % (SIZE / BLOCK)) * BLOCK;
        let mut expect = got;
        ask(&volume, Request::Write { fua: false }, block + 1536, 512, 0xee).unwrap();
        expect[block as usize + 1536..block as usize + 2048].fill(0xee);
        if read_all(&volume) != expect {
            return Err(format!("writing to the block at {block} changed other bytes"));
        }
        volume.detach().map_err(|err| err.to_string())?;
        for (i, (snapshot, content)) in legal.snapshots.iter().enumerate() {
            let name = format!("p/of-{snapshot}");
            store
                .clone_image(meta.id, &snapshot.parse().unwrap(), &name.parse().unwrap())
                .map_err(|err| format!("snapshot {snapshot}: {err}"))?;
            let volume = attach(&store, &name, 1);
            content
                .check(&read_all(&volume))
                .map_err(|why| format!("snapshot {i}, {snapshot}: {why}"))?;
        }
    }
    Ok(())
}

fn run() -> (usize, usize, usize) {
    let story = story();
    let moments = story.recorder.moment();
    let (mut seen, mut checked) = (HashSet::new(), 0);
    for moment in 0..=moments {
        let legal = legal(&story.promises, moment);
        let mut n = 0;
        story.recorder.states(moment, long(), |disk: Disk| {
            n += 1;
            // The same disk at another moment may have another promise to keep.
            if !seen.insert((disk.digest(), moment))
                || (!long() && n > 2 && !(n + moment as u64).is_multiple_of(ONE_IN))
            {
                return;
            }
            let dir = fast_dir();
            disk.write_to(dir.path());
            checked += 1;
            if let Err(why) = check(dir.path(), &legal, moment) {
                panic!("power lost at moment {moment} of {moments}, state {n}: {why}");
            }
        });
    }
    (moments, seen.len(), checked)
}

#[test]
fn the_store_opens_to_a_legal_state_after_every_power_loss() {
    let (moments, states, checked) = run();
    println!("{moments} moments, {states} different states, {checked} opened");
    assert!(
        moments > 100 && checked > 300,
        "{moments} moments and {checked} states are too few"
    );
}
