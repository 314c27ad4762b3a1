//! The hot path allocates nothing: RAM hits and writes over a real socket, server, volume, store and RAM tier are
//! counted by the allocator itself, in the whole process. And what an idle image costs.

#[path = "nbd_support/counting.rs"]
mod counting;
mod nbd_support;

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use counting::{ALLOCATIONS, Counting, LIVE_BYTES};
use hearth_node::disk::Disk;
use hearth_node::export::nbd::proto::{self, command, command_flag};
use hearth_node::export::nbd::{ExportEntry, ExportTable, NbdLimits, page};
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_probes::export::{ExportCounter, ExportSource};
use hearth_probes::source::{HeatSource, Op};
use hearth_protocol::{ByteLen, Epoch, ImageId, LeaseId};
use nbd_support::Served;
use nbd_support::raw::Raw;

#[global_allocator]
static COUNTING: Counting = Counting;

/// The tests count for the whole process: one at a time.
static ONE: Mutex<()> = Mutex::new(());

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;
const NAME: &str = "appl/vm-1";

struct Node {
    _directory: tempfile::TempDir,
    store: Arc<Store>,
    tier: Arc<RamTier>,
}

impl Node {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("hearth-nbd-").tempdir().unwrap();
        let store = Arc::new(Store::open(directory.path(), StoreOptions::default()).unwrap());
        let options = TierOptions {
            capacity_bytes: 32 * MIB,
            front_percent: 100,
            lock: false,
        };
        Self {
            _directory: directory,
            store,
            tier: RamTier::new(options).unwrap(),
        }
    }

    fn attach(&self, name: &str, size: u64) -> Arc<Volume> {
        let image = self.store.create(&name.parse().unwrap(), size, BLOCK).unwrap().id;
        let (store, tier) = (self.store.clone(), self.tier.clone());
        Volume::attach(store, tier, image, Epoch(1), LeaseId(1), Arc::new(NoPeers)).unwrap()
    }
}

struct One(ExportEntry);

impl ExportTable for One {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        (name == NAME).then(|| self.0.clone())
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        page([NAME.to_owned()].into_iter(), after, max)
    }
}

/// `depth` requests at once, `rounds` times, without allocating on this side.
fn exchange(raw: &mut Raw, requests: &[u8], replies: &mut [u8], rounds: usize) {
    for _ in 0..rounds {
        raw.socket.write_all(requests).unwrap();
        raw.socket.read_exact(replies).unwrap();
    }
}

#[test]
fn ram_hits_and_writes_allocate_nothing() {
    const DEPTH: u64 = 16;
    const ROUNDS: usize = 200;
    const PASSES: usize = 6;
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Node::new();
    let volume = node.attach(NAME, 8 * MIB);
    volume.write(0, &vec![7; (4 * MIB) as usize], false).unwrap();
    volume.flush().unwrap();
    volume.cache(0, 4 * MIB).unwrap();
    let counter = ExportCounter::new(volume.image(), ByteLen(BLOCK));
    let entry = ExportEntry::new(volume.clone()).counted(counter);
    let served = Served::with(Arc::new(One(entry)), NbdLimits::default());
    let mut raw = Raw::transmitting(&served.socket, NAME);

    let batch = |command: u16, flags: u16, length: u32, stride: u64| -> Vec<u8> {
        let mut out = Vec::new();
        for cookie in 0..DEPTH {
            out.extend_from_slice(&proto::request_header(command, flags, cookie, cookie * stride, length));
            if command == command::WRITE {
                out.extend_from_slice(&vec![cookie as u8; length as usize]);
            }
        }
        out
    };
    let cases = [
        ("4 KiB reads", command::READ, 0, 4_096, 3 * 65_536 + 4_096),
        ("64 KiB reads", command::READ, 0, 65_536, 131_072),
        ("256 KiB reads", command::READ, 0, 262_144, 4_096),
        ("4 KiB writes", command::WRITE, 0, 4_096, 8_192),
        ("512-byte writes", command::WRITE, 0, 512, 8_192 + 512),
        ("64 KiB writes", command::WRITE, 0, 65_536, 131_072),
        (
            "4 KiB writes with FUA",
            command::WRITE,
            command_flag::FUA,
            4_096,
            65_536,
        ),
    ];
    for (name, command, flags, length, stride) in cases {
        let data = if command == command::READ { length as usize } else { 0 };
        let requests = batch(command, flags, length, stride);
        let mut replies = vec![0; (16 + data) * DEPTH as usize];
        let rounds = if flags == 0 { ROUNDS } else { ROUNDS / 20 };
        // Threads start as work demands, queues and tables grow to their size: the quietest pass is the steady state.
        let least = (0..PASSES).map(|_| {
            let before = ALLOCATIONS.load(Ordering::SeqCst);
            exchange(&mut raw, &requests, &mut replies, rounds);
            ALLOCATIONS.load(Ordering::SeqCst) - before
        });
        let least = least.min().expect("there are passes");
        println!("{name}: {least} allocations in {} requests", rounds as u64 * DEPTH);
        assert_eq!(least, 0, "{name}");
    }
}

#[test]
fn an_idle_image_costs_little_memory() {
    const IMAGES: u64 = 64;
    const SIZE: u64 = 64 << 30;
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let node = Node::new();
    let warm = node.attach("a/first", SIZE);
    let before = LIVE_BYTES.load(Ordering::SeqCst);
    let images: Vec<_> = (0..IMAGES)
        .map(|number| {
            let volume = node.attach(&format!("a/idle-{number}"), SIZE);
            let counter = ExportCounter::new(volume.image(), ByteLen(BLOCK));
            ExportEntry::new(volume).counted(counter)
        })
        .collect();
    let each = (LIVE_BYTES.load(Ordering::SeqCst) - before) / IMAGES as i64;
    let map = SIZE / BLOCK / 4;
    println!("an idle image of 64 GiB: {each} bytes, of which {map} for the map of its blocks");
    assert!(each < map as i64 + (64 << 10), "{each} bytes for an idle image");
    drop((warm, images));
}

#[test]
fn counting_a_million_blocks_takes_bounded_memory() {
    const BLOCKS: u64 = 1 << 20;
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = LIVE_BYTES.load(Ordering::SeqCst);
    let counter = ExportCounter::new(ImageId(1), ByteLen(BLOCK));
    let empty = LIVE_BYTES.load(Ordering::SeqCst) - before;
    (0..BLOCKS).for_each(|block| counter.count(Op::Read, block * BLOCK, 4_096));
    let full = LIVE_BYTES.load(Ordering::SeqCst) - before;
    let mut source = ExportSource::new();
    source.register(Arc::clone(&counter));
    let window = source.drain().unwrap();
    assert_eq!(window.images[0].blocks.len() as u64 + window.images[0].lost, BLOCKS);
    drop((source.drain().unwrap(), window));
    let after = LIVE_BYTES.load(Ordering::SeqCst) - before;
    println!(
        "a counter of one export: {empty} bytes idle, {full} bytes for {BLOCKS} blocks touched in one window, {after} \
         bytes when the next window is over"
    );
    assert!(empty < 32 << 10, "{empty} bytes for a counter that counted nothing");
    assert!(full < 128 << 20, "{full} bytes for {BLOCKS} blocks");
    assert!(after < 2 << 20, "{after} bytes are kept for a scan that is over");
}
