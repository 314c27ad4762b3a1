//! Rule 11, deterministically: a fill whose read straddles a write must not leave old bytes in RAM.
//!
//! The store's fault hook stops the fill right after its bytes were read; the write runs to its end meanwhile.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use hearth_node::disk::Disk;
use hearth_node::mutants;
use hearth_node::store::fault::{Faults, Site, Verdict};
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{BlockIndex, Epoch, LeaseId};

const BLOCK: u64 = 64 << 10;

/// Stops the thread that asked for it after its next read of the data file.
struct Pause {
    armed: Mutex<Option<std::thread::ThreadId>>,
    reached: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

struct Scene {
    volume: Arc<Volume>,
    pause: Arc<Pause>,
    reached: Receiver<()>,
    go_on: Sender<()>,
    _dir: tempfile::TempDir,
}

fn scene() -> Scene {
    let (reached_in, reached) = channel();
    let (go_on, go_on_out) = channel();
    let pause = Arc::new(Pause {
        armed: Mutex::new(None),
        reached: Mutex::new(reached_in),
        go_on: Mutex::new(go_on_out),
    });
    let hook = pause.clone();
    let faults = Faults::hook(move |call| {
        let mine = Some(std::thread::current().id());
        if call.site == Site::DataReadDone && *hook.armed.lock().unwrap() == mine {
            *hook.armed.lock().unwrap() = None;
            hook.reached.lock().unwrap().send(()).unwrap();
            hook.go_on.lock().unwrap().recv().unwrap();
        }
        Ok(Verdict::Go)
    });
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        faults,
        ..StoreOptions::default()
    };
    let store = Arc::new(Store::open(dir.path(), options).unwrap());
    let tier = RamTier::new(TierOptions {
        capacity_bytes: 16 * BLOCK,
        front_percent: 50,
        lock: false,
    })
    .unwrap();
    let image = store.create(&"p/i".parse().unwrap(), 8 * BLOCK, BLOCK).unwrap().id;
    let volume = Volume::attach(store, tier, image, Epoch(1), LeaseId(1), Arc::new(NoPeers)).unwrap();
    volume.write(0, &vec![1; 4 * BLOCK as usize], false).unwrap();
    Scene {
        volume,
        pause,
        reached,
        go_on,
        _dir: dir,
    }
}

impl Scene {
    /// Runs `fill` until its read is done, then `write` to its end, then the rest of `fill`.
    fn straddle<T: Send>(&self, fill: impl FnOnce(&Volume) -> T + Send, write: impl FnOnce(&Volume)) -> T {
        let (pause, volume) = (&self.pause, &self.volume);
        std::thread::scope(|scope| {
            let filling = scope.spawn(move || {
                *pause.armed.lock().unwrap() = Some(std::thread::current().id());
                fill(volume)
            });
            self.reached.recv().unwrap();
            write(&self.volume);
            self.go_on.send(()).unwrap();
            filling.join().unwrap()
        })
    }

    fn first_byte(&self) -> u8 {
        let mut buf = [0; 512];
        self.volume.read(0, &mut buf).unwrap();
        buf[0]
    }
}

/// Each way of filling against each way of changing; answers with the byte read afterwards and the byte written.
fn play(promote: bool, change: &str) -> (u8, u8) {
    let scene = scene();
    let fill = |volume: &Volume| {
        if promote {
            let layer = volume.resolve(BlockIndex(0)).unwrap();
            let got = volume.promote(layer, &[BlockIndex(0)], Epoch(1), u64::MAX).unwrap();
            if !is_mutant() {
                assert_eq!(got.skipped, [(BlockIndex(0), "written_during_fill")]);
            }
        } else {
            volume.read(4096, &mut [0; 4096]).unwrap();
        }
    };
    let expect = if change == "write" { 2 } else { 0 };
    scene.straddle(fill, |volume| match change {
        "write" => volume.write(0, &[2; 512], false).unwrap(),
        "zero" => volume.write_zeroes(0, 512, false, false).unwrap(),
        // A trim of the whole block, then a write elsewhere in it: the block is data again, and byte 0 is zero.
        "trim" => {
            volume.trim(0, BLOCK, false).unwrap();
            volume.write(8192, &[3; 512], false).unwrap();
        }
        _ => unreachable!(),
    });
    (scene.first_byte(), expect)
}

fn is_mutant() -> bool {
    mutants::FILL_UNCHECKED.is_on()
}

#[test]
fn a_fill_that_straddles_a_write_leaves_no_old_bytes_in_ram() {
    for promote in [true, false] {
        for change in ["write", "zero", "trim"] {
            let (read, written) = play(promote, change);
            assert_eq!(read, written, "promote: {promote}, change: {change}");
        }
    }
}
