//! Random reads of an image much larger than the RAM tier: only what is asked is read from the disk, the bytes are the
//! newest ones, and clients that go away in the middle take nothing with them.

mod nbd_support;

use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::export::nbd::proto::{self, command};
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_protocol::{Epoch, LeaseId};
use nbd_support::raw::Raw;
use nbd_support::{EXPORT, Served};

const PAGE: usize = 4 << 10;
const BLOCK: u64 = 64 << 10;
const SIZE: u64 = 64 << 20;
const PAGES: u64 = SIZE / PAGE as u64;
const DEPTH: usize = 32;

/// A page that says which it is, and in which version.
fn page(number: u64, version: u64) -> Vec<u8> {
    [number.to_le_bytes(), version.to_le_bytes()].concat().repeat(PAGE / 16)
}

struct Scene {
    served: Served,
    volume: Arc<Volume>,
    tier: Arc<RamTier>,
    state: u64,
    _store: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("hearth-nbd-").tempdir().unwrap();
        let store = Arc::new(Store::open(directory.path(), StoreOptions::default()).unwrap());
        let options = TierOptions {
            capacity_bytes: 1 << 20,
            front_percent: 25,
            lock: false,
        };
        let tier = RamTier::new(options).unwrap();
        let image = store.create(&EXPORT.parse().unwrap(), SIZE, BLOCK).unwrap().id;
        let volume = Volume::attach(store, tier.clone(), image, Epoch(1), LeaseId(1), Arc::new(NoPeers)).unwrap();
        for block in 0..SIZE / BLOCK {
            let first = block * BLOCK / PAGE as u64;
            let content: Vec<u8> = (first..first + BLOCK / PAGE as u64).flat_map(|n| page(n, 0)).collect();
            volume.write(block * BLOCK, &content, false).unwrap();
        }
        Self {
            served: Served::new(volume.clone()),
            volume,
            tier,
            state: 1,
            _store: directory,
        }
    }

    fn client(&self) -> Raw {
        Raw::transmitting(&self.served.socket, EXPORT)
    }

    fn any_page(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % PAGES
    }
}

fn ask(pages: &[u64]) -> Vec<u8> {
    let request = |n: &u64| proto::request_header(command::READ, 0, *n, n * PAGE as u64, PAGE as u32);
    pages.iter().flat_map(request).collect()
}

/// Reads pages at once; `check` gets each one's number and content.
fn read(client: &mut Raw, pages: &[u64], mut check: impl FnMut(u64, &[u8])) {
    client.send(&ask(pages));
    for _ in pages {
        let (number, error) = client.simple_reply();
        assert_eq!(error, 0, "page {number}");
        check(number, &client.receive(PAGE).expect("the page's content"));
    }
}

#[test]
fn parts_are_read_where_whole_units_are_not_worth_it() {
    let mut scene = Scene::new();
    let mut client = scene.client();
    let mut rounds = |scene: &mut Scene, count: usize| {
        for _ in 0..count {
            let pages: Vec<u64> = (0..DEPTH).map(|_| scene.any_page()).collect();
            read(&mut client, &pages, |number, content| {
                assert_eq!(content, page(number, 0))
            });
        }
    };
    // Each halving of the share takes twice as many reads as the one before.
    rounds(&mut scene, 200);
    let (before, admitted) = (scene.volume.counters(), scene.tier.counters().admitted);
    rounds(&mut scene, 200);
    let after = scene.volume.counters();
    let reads = after.ram_misses - before.ram_misses;
    let bytes = (after.store_bytes - before.store_bytes) / reads;
    let admitted = scene.tier.counters().admitted - admitted;
    assert!(reads > 5_000, "{reads} reads missed RAM");
    assert!(bytes < 16 << 10, "{bytes} bytes were read below for each read of 4,096");
    assert!(
        (1..reads / 4).contains(&admitted),
        "{admitted} of {reads} units were let into RAM"
    );
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    if disabled.trim() == "0" {
        let mut open = std::fs::read_dir("/proc/self/fd").unwrap();
        let is_ring = |link: std::path::PathBuf| link.to_string_lossy().contains("io_uring");
        assert!(open.any(|fd| fd.is_ok_and(|fd| std::fs::read_link(fd.path()).is_ok_and(is_ring))));
    }
}

/// Reads whole blocks at once, and checks each.
fn read_blocks(client: &mut Raw, blocks: std::ops::Range<u64>) {
    for block in blocks.clone() {
        client.request(command::READ, 0, block, block * BLOCK, BLOCK as u32);
    }
    for _ in blocks {
        let (block, error) = client.simple_reply();
        assert_eq!(error, 0, "block {block}");
        let content = client.receive(BLOCK as usize).expect("the block's content");
        let first = block * BLOCK / PAGE as u64;
        for (number, page_of) in (first..).zip(content.chunks_exact(PAGE)) {
            assert_eq!(page_of, page(number, 0));
        }
    }
}

#[test]
fn a_scan_of_whole_units_leaves_ram_to_what_comes_back() {
    const AT_ONCE: u64 = 8;
    let scene = Scene::new();
    let mut client = scene.client();
    let mut scan = || {
        let before = scene.tier.counters().admitted;
        for first in (0..SIZE / BLOCK).step_by(AT_ONCE as usize) {
            read_blocks(&mut client, first..first + AT_ONCE);
        }
        scene.tier.counters().admitted - before
    };
    let first = scan();
    // The share that is let in halves with each 64 of its reads.
    for _ in 0..4 {
        scan();
    }
    let last = scan();
    println!(
        "{first} of {} units were let in by the first scan, {last} by the sixth",
        SIZE / BLOCK
    );
    assert!(first > SIZE / BLOCK / 16 && last < SIZE / BLOCK / 8);
    // What is asked for again is let in, and then found.
    let before = scene.volume.counters();
    (0..50).for_each(|_| read_blocks(&mut client, 100..104));
    let after = scene.volume.counters();
    let (hits, misses) = (after.ram_hits - before.ram_hits, after.ram_misses - before.ram_misses);
    assert!(hits > 10 * misses, "{hits} hits, {misses} misses");
}

#[test]
fn a_read_after_a_write_brings_the_newest_bytes() {
    let mut scene = Scene::new();
    let (mut client, mut other) = (scene.client(), scene.client());
    for _ in 0..130 {
        let pages: Vec<u64> = (0..DEPTH).map(|_| scene.any_page()).collect();
        read(&mut other, &pages, |_, _| ());
    }
    for version in 1..=100 {
        let mut pages: Vec<u64> = (0..DEPTH).map(|_| scene.any_page()).collect();
        pages.sort_unstable();
        pages.dedup();
        for number in &pages {
            client.request(command::WRITE, 0, *number, number * PAGE as u64, PAGE as u32);
            client.send(&page(*number, version));
        }
        // Meanwhile: either version, never a mixture of more than the two.
        read(&mut other, &pages, |number, content| {
            assert_eq!(&content[..8], number.to_le_bytes())
        });
        for _ in &pages {
            assert_eq!(client.simple_reply().1, 0);
        }
        read(&mut other, &pages, |number, content| {
            assert_eq!(content, page(number, version))
        });
    }
}

#[test]
fn clients_that_leave_in_the_middle_take_nothing_with_them() {
    let mut scene = Scene::new();
    for _ in 0..200 {
        // One image has 64 connections at most, and those that left stay until their reads have ended.
        while scene.served.handle.connections().len() > DEPTH {
            std::thread::yield_now();
        }
        let pages: Vec<u64> = (0..DEPTH).map(|_| scene.any_page()).collect();
        scene.client().send(&ask(&pages)); // and hangs up
    }
    let pages: Vec<u64> = (0..DEPTH).map(|_| scene.any_page()).collect();
    read(&mut scene.client(), &pages, |number, content| {
        assert_eq!(content, page(number, 0))
    });
    // The server stops with reads on their way, and waits for them.
    let mut last = scene.client();
    last.send(&ask(&pages));
    scene.served.stop();
}
