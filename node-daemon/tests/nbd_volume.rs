//! Stock clients on real images: store, RAM tier and volume behind the NBD server, blocks promoted and demoted as fast
//! as possible meanwhile, and a second node that reads what it lacks from the first.

mod nbd_support;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::OneExport;
use hearth_node::export::nbd::{ExportName, NbdLimits};
use hearth_node::peer::{PeerLimits, PeerPool};
use hearth_node::store::{Parent, Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{BlockSource, NoPeers, Volume};
use hearth_protocol::{BlockIndex, Epoch, LeaseId};
use nbd_support::{Served, have, noise, ok, text};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;

/// One node: a store in a directory of its own, and a RAM tier.
struct Node {
    _directory: tempfile::TempDir,
    store: Arc<Store>,
    tier: Arc<RamTier>,
}

impl Node {
    fn new(tier_bytes: u64) -> Self {
        let directory = tempfile::Builder::new().prefix("hearth-nbd-").tempdir().unwrap();
        let store = Arc::new(Store::open(directory.path(), StoreOptions::default()).unwrap());
        let options = TierOptions {
            capacity_bytes: tier_bytes,
            front_percent: 25,
            lock: false,
        };
        Self {
            _directory: directory,
            store,
            tier: RamTier::new(options).unwrap(),
        }
    }

    fn attach(&self, image: hearth_protocol::ImageId, peers: Arc<dyn BlockSource>) -> Arc<Volume> {
        let (store, tier) = (self.store.clone(), self.tier.clone());
        Volume::attach(store, tier, image, Epoch(1), LeaseId(1), peers).unwrap()
    }

    fn volume(&self, size: u64) -> Arc<Volume> {
        let name = "appl/vm-1".parse().unwrap();
        let image = self.store.create(&name, size, BLOCK).unwrap().id;
        self.attach(image, Arc::new(NoPeers))
    }
}

/// Promotes and demotes blocks of every layer without pause until it is dropped.
struct Churn {
    done: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Churn {
    fn new(volume: &Arc<Volume>) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (volume, done) = (volume.clone(), done.clone());
            move || {
                let blocks = volume.size_bytes() / BLOCK;
                let (mut moved, mut round) = (0, 0_u64);
                while !done.load(Ordering::Acquire) {
                    for layer in volume.layers() {
                        let some: Vec<_> = (0..8).map(|n| BlockIndex((round * 13 + n * 7) % blocks)).collect();
                        let promoted = volume.promote(layer, &some, volume.epoch(), u64::MAX).unwrap();
                        let others: Vec<_> = some.iter().map(|b| BlockIndex((b.0 + 29) % blocks)).collect();
                        moved += (promoted.done.len() + volume.demote(layer, &others).done.len()) as u64;
                    }
                    round += 1;
                }
                moved
            }
        });
        Self {
            done,
            thread: Some(thread),
        }
    }

    /// Stops, and says how many blocks moved.
    fn stop(&mut self) -> u64 {
        self.done.store(true, Ordering::Release);
        self.thread
            .take()
            .map_or(0, |thread| thread.join().expect("promotions and demotions went well"))
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
    }
}

#[test]
fn fio_verifies_while_blocks_are_promoted_and_demoted_and_snapshots_taken() {
    if !have(&["fio", "fio --enghelp=nbd"]) {
        return;
    }
    let node = Node::new(16 * MIB);
    let volume = node.volume(64 * MIB);
    let served = Served::new(volume.clone());
    let mut churn = Churn::new(&volume);
    let uri = format!("--uri={}", served.uri());
    let state = format!("--aux-path={}", served.directory.path().display());
    for (seed, rw) in [(1, "randwrite"), (2, "randrw")] {
        let rw = format!("--rw={rw}");
        let seed = format!("--randseed={seed}");
        ok(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                &rw,
                &seed,
                &state,
                "--bsrange=4k-96k",
                "--iodepth=32",
                "--numjobs=4",
                "--size=16m",
                "--offset_increment=16m",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=32",
                "--group_reporting",
                "--thread",
            ],
        );
        volume
            .snapshot(&format!("s{}", seed.len() + rw.len()).parse().unwrap())
            .unwrap();
    }
    assert!(churn.stop() > 100, "blocks moved while fio ran");
    drop(served);
    volume.detach().unwrap();
}

#[test]
fn copies_in_and_out_are_equal_while_blocks_are_promoted_and_demoted() {
    if !have(&["nbdcopy", "qemu-img", "nbdinfo"]) {
        return;
    }
    let node = Node::new(8 * MIB);
    let volume = node.volume(32 * MIB);
    let served = Served::new(volume.clone());
    let (uri, source, back) = (served.uri(), served.file("source"), served.file("back"));
    let mut bytes = noise(5, 32 * MIB as usize);
    bytes[7 * MIB as usize..19 * MIB as usize].fill(0);
    fs::write(&source, &bytes).unwrap();
    let mut churn = Churn::new(&volume);
    ok("nbdcopy", &["-C", "4", "-R", "32", "--flush", text(&source), &uri]);
    ok("nbdcopy", &["-C", "4", "-R", "32", &uri, text(&back)]);
    assert!(fs::read(&back).unwrap() == bytes);
    ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
    assert!(churn.stop() > 0);

    // The tier map says what is where, block by block.
    let layer = volume.layers()[0];
    let all: Vec<_> = (0..32 * MIB / BLOCK).map(BlockIndex).collect();
    volume.demote(layer, &all);
    let promoted = volume
        .promote(layer, &[BlockIndex(2), BlockIndex(3)], volume.epoch(), u64::MAX)
        .unwrap();
    assert_eq!(promoted.done.len(), 2);
    let json = ok("nbdinfo", &["--map=hearth:tier", "--json", &uri]);
    let rows: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let number = |row: &serde_json::Value, key: &str| row[key].as_u64().unwrap();
    let tier_at = |offset: u64| {
        let row = rows
            .iter()
            .find(|r| (number(r, "offset")..number(r, "offset") + number(r, "length")).contains(&offset));
        number(row.unwrap(), "type")
    };
    assert_eq!((tier_at(2 * BLOCK), tier_at(4 * BLOCK - 1)), (0, 0), "{json}");
    assert_eq!(tier_at(10 * MIB), 3, "{json}");
    assert_eq!(rows.iter().map(|row| number(row, "length")).sum::<u64>(), 32 * MIB);
    drop(served);
    volume.detach().unwrap();
}

#[test]
fn a_node_without_the_blocks_reads_them_from_the_one_that_has_them() {
    if !have(&["nbdcopy", "qemu-io"]) {
        return;
    }
    let owner = Node::new(8 * MIB);
    let golden = owner.volume(32 * MIB);
    let mut bytes = noise(6, 32 * MIB as usize);
    bytes[4 * MIB as usize..8 * MIB as usize].fill(0);
    golden.write(0, &bytes[..4 * MIB as usize], false).unwrap();
    golden.write(8 * MIB, &bytes[8 * MIB as usize..], false).unwrap();
    let below = golden.layers();
    let sealed = below[0];
    let snapshot = "v1".parse().unwrap();
    golden.snapshot(&snapshot).unwrap();
    golden.write(0, &[0xee; 65_536], false).unwrap(); // after the snapshot: not seen by clones

    // The first node serves the sealed layer under its id, as it does for any client.
    let name = ExportName::sealed_layer(sealed).to_string();
    let open =
        |node: &Node| Volume::open_sealed(node.store.clone(), node.tier.clone(), sealed, Arc::new(NoPeers)).unwrap();
    let layer_server = Served::with(Arc::new(OneExport::shared(&name, open(&owner))), NbdLimits::default());
    let address = format!("unix:{}", layer_server.socket.display());

    let other = Node::new(8 * MIB);
    let parent = Parent {
        image: golden.image(),
        name: "appl/vm-1".parse().unwrap(),
        snapshot,
    };
    let clone = other
        .store
        .clone_remote(&"appl/clone".parse().unwrap(), 32 * MIB, BLOCK, below, parent)
        .unwrap();
    let pool = Arc::new(PeerPool::new(PeerLimits::default(), move |_| vec![address.clone()]));
    let volume = other.attach(clone.id, pool);
    let served = Served::new(volume.clone());
    let mut churn = Churn::new(&volume);
    let (uri, target) = (served.uri(), served.file("clone"));
    ok("nbdcopy", &["-C", "4", &uri, text(&target)]);
    assert!(
        fs::read(&target).unwrap() == bytes,
        "the clone is the image as it was at the snapshot"
    );
    // A partial write over a block that only the peer has: the rest of the block must come from there.
    ok(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 0x77 70000 1000",
            "-c",
            "flush",
            "-c",
            "read -P 0x77 70000 1000",
            &uri,
        ],
    );
    bytes[70_000..71_000].fill(0x77);
    ok("nbdcopy", &["-C", "4", &uri, text(&target)]);
    assert!(fs::read(&target).unwrap() == bytes);
    churn.stop();
    drop(served);
    volume.detach().unwrap();
    golden.detach().unwrap();
}
