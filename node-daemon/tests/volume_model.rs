//! Random writes, trims, zeroes, snapshots, clones, growth, reopens, promotions and demotions against a plain vector of
//! bytes; and at the end its export into a file.

use std::sync::Arc;

use hearth_node::disk::{Disk, ExtentKind};
use hearth_node::imagefile::ImageFile;
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume, copy_out};
use hearth_protocol::rpc::ImageFormat;
use hearth_protocol::{BlockIndex, Epoch, ImageId, LeaseId};
use proptest::prelude::*;

/// Size of a new image.
const PAGES: u64 = 96;

/// Size to which it may grow.
const PAGES_MAX: u64 = 160;

#[derive(Debug, Clone)]
enum Op {
    Write { at: u64, len: u64, fill: u8, fua: bool },
    Trim { at: u64, len: u64 },
    Zero { at: u64, len: u64, keep: bool },
    Read { at: u64, len: u64 },
    ReadRam { at: u64, len: u64 },
    Cache { at: u64, len: u64 },
    Flush,
    Snapshot,
    Grow { pages: u64 },
    Clone,
    Detach,
    Crash,
    PowerLossAfterFlush,
    Promote { first: u64, count: u64 },
    Demote { first: u64, count: u64 },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let size = PAGES_MAX * 4096;
    prop_oneof![
        // Any bytes.
        (0..size, 0..40_000u64),
        // Whole pages.
        (0..PAGES_MAX, 0..40u64).prop_map(|(a, n)| (a * 4096, n * 4096)),
        // Whole 64 KiB blocks.
        (0..PAGES_MAX / 16, 0..4u64).prop_map(|(a, n)| (a << 16, n << 16)),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 1u8.., any::<bool>()).prop_map(|((at, len), fill, fua)| Op::Write { at, len, fill, fua: fua && fill % 4 == 0 }),
        3 => range().prop_map(|(at, len)| Op::Trim { at, len }),
        2 => (range(), any::<bool>()).prop_map(|((at, len), keep)| Op::Zero { at, len, keep }),
        6 => range().prop_map(|(at, len)| Op::Read { at, len }),
        3 => range().prop_map(|(at, len)| Op::ReadRam { at, len }),
        1 => range().prop_map(|(at, len)| Op::Cache { at, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Snapshot),
        1 => (1..40u64).prop_map(|pages| Op::Grow { pages }),
        1 => Just(Op::Clone),
        1 => Just(Op::Detach),
        1 => Just(Op::Crash),
        1 => Just(Op::PowerLossAfterFlush),
        3 => (0..PAGES, 1..20u64).prop_map(|(first, count)| Op::Promote { first, count }),
        2 => (0..PAGES, 1..20u64).prop_map(|(first, count)| Op::Demote { first, count }),
    ]
}

struct World {
    dir: tempfile::TempDir,
    store: Option<Arc<Store>>,
    tier: Arc<RamTier>,
    volume: Option<Arc<Volume>>,
    image: ImageId,
    epoch: u64,
    incarnation: u128,
    names: u32,
    block_size: u64,
    model: Vec<u8>,
    /// Detached images that must keep their content.
    others: Vec<(ImageId, Vec<u8>)>,
}

impl World {
    fn new(block_size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut world = World {
            dir,
            store: None,
            tier: RamTier::new(TierOptions {
                capacity_bytes: 256 << 10,
                front_percent: 50,
                lock: false,
            })
            .unwrap(),
            volume: None,
            image: ImageId(0),
            epoch: 0,
            incarnation: 1,
            names: 0,
            block_size,
            model: vec![0; (PAGES * 4096) as usize],
            others: Vec::new(),
        };
        world.open();
        let name = "p/image".parse().unwrap();
        world.image = world.store().create(&name, PAGES * 4096, block_size).unwrap().id;
        world.attach();
        world
    }

    fn open(&mut self) {
        let options = StoreOptions {
            incarnation: Some(hearth_protocol::Incarnation(self.incarnation)),
            ..StoreOptions::default()
        };
        self.store = Some(Arc::new(Store::open(self.dir.path(), options).unwrap()));
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    fn volume(&self) -> &Arc<Volume> {
        self.volume.as_ref().unwrap()
    }

    fn attach_image(&mut self, image: ImageId) -> Arc<Volume> {
        self.epoch += 1;
        let lease = LeaseId(self.epoch.into());
        Volume::attach(
            self.store().clone(),
            self.tier.clone(),
            image,
            Epoch(self.epoch),
            lease,
            Arc::new(NoPeers),
        )
        .unwrap()
    }

    fn attach(&mut self) {
        let image = self.image;
        self.volume = Some(self.attach_image(image));
    }

    fn fresh_name(&mut self) -> String {
        self.names += 1;
        format!("n{}", self.names)
    }

    fn reopen(&mut self, power_loss: bool) {
        self.volume = None;
        // A prefetch thread may still hold the volume, and with it the store's lock, for a moment.
        while Arc::strong_count(self.store()) > 1 {
            std::thread::yield_now();
        }
        self.store = None;
        self.incarnation += u128::from(power_loss);
        self.open();
        self.attach();
    }

    fn apply(&mut self, op: &Op) {
        let all = |at: u64, len: u64| at as usize..(at + len) as usize;
        match self.within(op) {
            Op::Write { at, len, fill, fua } => {
                let data: Vec<u8> = (0..len).map(|i| fill ^ (i / 512) as u8).collect();
                self.volume().write(at, &data, fua).unwrap();
                self.model[all(at, len)].copy_from_slice(&data);
            }
            Op::Trim { at, len } => {
                self.volume().trim(at, len, false).unwrap();
                self.model[all(at, len)].fill(0);
            }
            Op::Zero { at, len, keep } => {
                self.volume().write_zeroes(at, len, keep, false).unwrap();
                self.model[all(at, len)].fill(0);
            }
            Op::Read { at, len } => {
                let mut buf = vec![0xee; len as usize];
                self.volume().read(at, &mut buf).unwrap();
                assert!(buf == self.model[all(at, len)], "read of {len} at {at} differs");
            }
            Op::ReadRam { at, len } => {
                let mut buf = vec![0xee; len as usize];
                if self.volume().try_read_ram(at, &mut buf) {
                    assert!(buf == self.model[all(at, len)], "RAM read of {len} at {at} differs");
                }
            }
            Op::Cache { at, len } => self.volume().cache(at, len).unwrap(),
            Op::Flush => self.volume().flush().unwrap(),
            Op::Grow { pages } => {
                let size = (self.model.len() as u64 + pages * 4096).min(PAGES_MAX * 4096);
                match self.volume().grow(size) {
                    Ok(meta) => assert_eq!(meta.size, size),
                    Err(err) if size == self.model.len() as u64 => {
                        assert!(err.to_string().contains("already"), "{err}");
                    }
                    Err(err) => {
                        assert!(err.to_string().contains("layers"), "{err}");
                        return;
                    }
                }
                self.model.resize(size as usize, 0);
            }
            Op::Snapshot | Op::Clone => {
                let name = self.fresh_name();
                let meta = match self.volume().snapshot(&name.parse().unwrap()) {
                    Ok(meta) => meta,
                    Err(err) => {
                        assert!(err.to_string().contains("layers"), "{err}");
                        return;
                    }
                };
                assert!(meta.stack.len() > 1);
                if matches!(op, Op::Clone) && self.others.len() < 4 {
                    let clone = self
                        .store()
                        .clone_image(
                            self.image,
                            &name.parse().unwrap(),
                            &format!("p/{name}").parse().unwrap(),
                        )
                        .unwrap();
                    assert!(self.store().allocated(clone.id).unwrap() == 0, "a clone takes no space");
                    // Go on with the clone; the parent must keep what it has.
                    self.volume().detach().unwrap();
                    self.others.push((self.image, self.model.clone()));
                    self.image = clone.id;
                    self.attach();
                }
            }
            Op::Detach => {
                self.volume().detach().unwrap();
                self.reopen(true);
                assert!(
                    self.volume().recovery().is_none(),
                    "a clean detach leaves nothing to recover"
                );
            }
            Op::Crash => self.reopen(false),
            Op::PowerLossAfterFlush => {
                self.volume().flush().unwrap();
                self.reopen(true);
            }
            Op::Promote { first, count } => {
                for block in first..(first + count).min(self.model.len() as u64 / self.block_size) {
                    if let Some(layer) = self.volume().resolve(BlockIndex(block)) {
                        let epoch = self.volume().epoch();
                        let got = self
                            .volume()
                            .promote(layer, &[BlockIndex(block)], epoch, u64::MAX)
                            .unwrap();
                        assert_eq!(got.done.len() + got.skipped.len(), 1);
                    }
                }
            }
            Op::Demote { first, count } => {
                for block in first..(first + count).min(self.model.len() as u64 / self.block_size) {
                    if let Some(layer) = self.volume().resolve(BlockIndex(block)) {
                        self.volume().demote(layer, &[BlockIndex(block)]);
                    }
                }
            }
        }
        let usage = self.tier.usage();
        assert!(usage.front.0 + usage.main.0 <= usage.capacity.0, "{usage:?}");
    }

    /// The operation with its range cut at the image's end.
    fn within(&self, op: &Op) -> Op {
        let size = self.model.len() as u64;
        let mut op = op.clone();
        if let Op::Write { at, len, .. }
        | Op::Trim { at, len }
        | Op::Zero { at, len, .. }
        | Op::Read { at, len }
        | Op::ReadRam { at, len }
        | Op::Cache { at, len } = &mut op
        {
            *at = (*at).min(size);
            *len = (*len).min(size - *at);
        }
        op
    }

    /// The image, detached, as a file.
    fn export(&self) -> Vec<u8> {
        let (meta, layers) = self.store().look_at(self.image).unwrap();
        let path = self.dir.path().join("disk.raw");
        let mut file = ImageFile::create(&path, ImageFormat::Raw, meta.size).unwrap();
        let shape = (meta.size, meta.block_size);
        copy_out(layers, shape, &self.tier, &NoPeers, &mut file, &mut |_, _| true).unwrap();
        file.finish(false).unwrap();
        std::fs::read(&path).unwrap()
    }

    fn check_all(&mut self) {
        let size = self.model.len() as u64;
        assert_eq!(self.volume().size_bytes(), size);
        let mut buf = vec![0; self.model.len()];
        self.volume().read(0, &mut buf).unwrap();
        assert!(buf == self.model, "the image differs from the model");
        // What is called a hole reads as zero, and extents cover the image.
        let extents = self
            .volume()
            .extents(0, size, ExtentKind::Allocation, usize::MAX)
            .unwrap();
        let mut at = 0;
        for extent in extents {
            if extent.status & 2 != 0 {
                assert!(self.model[at..at + extent.length as usize].iter().all(|b| *b == 0));
            }
            at += extent.length as usize;
        }
        assert_eq!(at as u64, size);
        self.volume().detach().unwrap();
        assert!(self.export() == self.model, "the exported file differs from the model");
        for (image, model) in std::mem::take(&mut self.others) {
            let other = self.attach_image(image);
            let mut buf = vec![0; model.len()];
            other.read(0, &mut buf).unwrap();
            assert!(buf == model, "a parent differs from its model");
            other.detach().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_volume_is_a_vector_of_bytes(
        log in prop::sample::select(vec![12u32, 13, 15, 16, 17]),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut world = World::new(1 << log);
        for op in &ops {
            world.apply(op);
        }
        world.check_all();
    }
}
