//! One served image: puts store, RAM tier and peers together behind [`Disk`].
//!
//! Reads go RAM, then local layer, then peer. Writes go to the top layer and to the RAM copy, and are acknowledged
//! when the store has handed them to the device. RAM holds clean copies only: the death of the daemon loses nothing.
//!
//! Called from many threads. A write holds `gate` shared and its byte range alone; snapshot and detach hold `gate`
//! alone, so they wait for writes in flight and keep later ones out.

mod ahead;
mod copy_out;
mod extents;
mod promote;
mod range_lock;
mod read;
mod stack;
mod stats;
mod trouble;
mod whole;
mod write;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Duration;

use hearth_protocol::heat::LatencySummary;
use hearth_protocol::{BlockIndex, Epoch, ImageId, Incarnation, LayerId, LeaseId, SetVersion, SnapshotName};
use hearth_replication::member::Durable;

use crate::disk::{Disk, DiskError, Extent, ExtentKind, FileRead};
use crate::store::{ImageMeta, Layer, LayerRef, Marks, Recovery, Store, StoreError, disk_io};
use crate::tier::RamTier;

pub use copy_out::copy_out;
pub use extents::map_of;
pub use promote::{Demoted, Promoted};
use range_lock::RangeLock;
use stack::Stack;
pub use stack::{BlockSource, NoPeers};
pub use stats::VolumeCounters;
use stats::{Stats, add};
pub use trouble::{Ailment, STORE_FULL, in_words};

/// An image (or a sealed layer, read-only) being served.
pub struct Volume {
    store: Arc<Store>,
    tier: Arc<RamTier>,
    remote: Arc<dyn BlockSource>,
    image: ImageId,
    epoch: CurrentEpoch,
    /// Of a replica, its marks: they end when the volume does.
    marks: Option<Arc<Marks>>,
    /// Grows, never shrinks, and after the stack did.
    size: AtomicU64,
    block_size: u64,
    read_only: Option<&'static str>,
    recovery: Option<Recovery>,
    stack: RwLock<Arc<Stack>>,
    gate: RwLock<()>,
    ranges: RangeLock,
    closing: AtomicBool,
    closed: Mutex<bool>,
    stats: Stats,
    heat: extents::HeatScale,
    ahead: ahead::Ahead,
    poison_noted: AtomicBool,
    trouble: trouble::Trouble,
    /// Which units reads of parts let into RAM, which they do when they ask again, and which reads of whole units do.
    parts: whole::WholeUnits,
    again: whole::WholeUnits,
    wholes: whole::WholeUnits,
    /// Reads that somebody else does for this image: [`Disk::file_read`].
    file_reads: AtomicU32,
    me: Weak<Volume>,
}

/// The epoch under which an image is served, which changes only for a replica.
struct CurrentEpoch(AtomicU64);

impl CurrentEpoch {
    fn get(&self) -> Epoch {
        Epoch(self.0.load(Ordering::Acquire))
    }
}

impl PartialEq<CurrentEpoch> for Epoch {
    fn eq(&self, other: &CurrentEpoch) -> bool {
        *self == other.get()
    }
}

impl fmt::Display for CurrentEpoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// A replica being served to its member.
pub struct MemberVolume {
    /// Its blocks. Every request to it has passed the member's gate, and every write its marks.
    pub volume: Arc<Volume>,
    /// Its intent marks. [`Volume::detach`] closes them.
    pub marks: Arc<Marks>,
    /// What the member kept.
    pub durable: Durable,
    /// Whether its disk failed, in this life or an earlier one: it takes no writes.
    pub failed: bool,
    /// The store's life now.
    pub incarnation: Incarnation,
}

/// What the ways to open a volume differ in.
struct Opening {
    image: ImageId,
    epoch: Epoch,
    marks: Option<Arc<Marks>>,
    size: u64,
    block_size: u64,
    read_only: Option<&'static str>,
    recovery: Option<Recovery>,
    layers: Vec<LayerRef>,
}

impl Volume {
    /// Starts serving an image under an epoch and lease, after recovering it from a crash if needed.
    ///
    /// # Errors
    /// [`StoreError::Replicated`] for an image with members; [`StoreError`]. The image is then not attached.
    pub fn attach(
        store: Arc<Store>,
        tier: Arc<RamTier>,
        image: ImageId,
        epoch: Epoch,
        lease: LeaseId,
        remote: Arc<dyn BlockSource>,
    ) -> Result<Arc<Self>, StoreError> {
        let opened = store.open_image(image, epoch, lease, SetVersion(1))?;
        let opening = Opening {
            image,
            epoch,
            marks: None,
            size: opened.meta.size,
            block_size: opened.meta.block_size,
            read_only: None,
            recovery: opened.recovery,
            layers: opened.stack(),
        };
        let volume = Self::assemble(store, tier, remote, opening);
        // Copies of a growing layer are valid for one epoch.
        volume.tier.forget_layer(volume.stack().handle(0));
        Ok(volume)
    }

    /// Starts serving a replica to its member, after recovering it from a crash if needed. Its epoch is that of the
    /// member's record, and follows it by [`Volume::set_epoch`].
    ///
    /// # Errors
    /// [`StoreError`]; the image is then not attached.
    pub fn attach_member(
        store: Arc<Store>,
        tier: Arc<RamTier>,
        image: ImageId,
        remote: Arc<dyn BlockSource>,
    ) -> Result<MemberVolume, StoreError> {
        let replica = store.open_replica(image)?;
        let epoch = replica.durable.record.as_ref().map(|record| record.epoch());
        let opening = Opening {
            image,
            epoch: epoch.unwrap_or_default(),
            marks: Some(replica.marks.clone()),
            size: replica.opened.meta.size,
            block_size: replica.opened.meta.block_size,
            read_only: None,
            recovery: replica.opened.recovery,
            layers: replica.opened.stack(),
        };
        let volume = Self::assemble(store, tier, remote, opening);
        volume.tier.forget_layer(volume.stack().handle(0));
        Ok(MemberVolume {
            volume,
            marks: replica.marks,
            durable: replica.durable,
            failed: replica.failed,
            incarnation: replica.incarnation,
        })
    }

    /// Goes on under another epoch. What the scheduler promoted was for the epoch before, and is dropped. What the node
    /// itself has in RAM stays: every write to this replica, whoever owns it, passes by here, so a copy is what the
    /// replica has; and a replica that is not in sync is not asked.
    pub fn set_epoch(&self, epoch: Epoch) {
        self.epoch.0.store(epoch.0, Ordering::Release);
        self.tier.forget_promoted(self.stack().handle(0));
    }

    /// Bytes of RAM that the node may fill by itself: so much of the image can be warmed.
    pub fn warmable_bytes(&self) -> u64 {
        self.tier.usage().front_capacity.0
    }

    fn assemble(store: Arc<Store>, tier: Arc<RamTier>, remote: Arc<dyn BlockSource>, opening: Opening) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            image: opening.image,
            epoch: CurrentEpoch(AtomicU64::new(opening.epoch.0)),
            marks: opening.marks,
            size: AtomicU64::new(opening.size),
            block_size: opening.block_size,
            read_only: opening.read_only,
            recovery: opening.recovery,
            stack: RwLock::new(Arc::new(Stack::new(opening.layers, opening.block_size, &tier))),
            gate: RwLock::new(()),
            ranges: RangeLock::default(),
            closing: AtomicBool::new(false),
            // What takes no writes has nothing to close.
            closed: Mutex::new(opening.read_only.is_some()),
            stats: Stats::default(),
            heat: extents::HeatScale::default(),
            ahead: ahead::Ahead::default(),
            poison_noted: AtomicBool::new(false),
            trouble: trouble::Trouble::default(),
            parts: whole::WholeUnits::for_parts(),
            again: whole::WholeUnits::for_parts(),
            wholes: whole::WholeUnits::for_wholes(),
            file_reads: AtomicU32::new(0),
            me: me.clone(),
            store,
            tier,
            remote,
        })
    }

    /// Serves a sealed layer with everything below it, read-only: what peers read.
    ///
    /// # Errors
    /// [`StoreError::NoLayer`] if this store does not hold it.
    pub fn open_sealed(
        store: Arc<Store>,
        tier: Arc<RamTier>,
        layer: LayerId,
        remote: Arc<dyn BlockSource>,
    ) -> Result<Arc<Self>, StoreError> {
        let (meta, layers) = store.sealed_stack(layer)?;
        let size = match &layers[0] {
            LayerRef::Local(layer) => layer.size(),
            LayerRef::Remote(_) => return Err(StoreError::NoLayer(layer)),
        };
        let opening = Opening {
            image: meta.id,
            epoch: meta.record.epoch,
            marks: None,
            size,
            block_size: meta.block_size,
            read_only: Some("it is a sealed layer"),
            recovery: None,
            layers,
        };
        Ok(Self::assemble(store, tier, remote, opening))
    }

    fn stack(&self) -> Arc<Stack> {
        self.stack.read().expect("stack lock").clone()
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn top(stack: &Stack) -> &Arc<Layer> {
        match &stack.levels[0].layer {
            LayerRef::Local(layer) => layer,
            LayerRef::Remote(_) => unreachable!("the top layer is always here"),
        }
    }

    /// The image's metadata as it is now.
    ///
    /// # Errors
    /// [`StoreError::NoImage`].
    pub fn meta(&self) -> Result<ImageMeta, StoreError> {
        self.store.image(self.image)
    }

    /// The epoch under which it is served.
    pub fn epoch(&self) -> Epoch {
        self.epoch.get()
    }

    /// What a crash before this attach left to do; `None` after a clean detach.
    pub fn recovery(&self) -> Option<Recovery> {
        self.recovery
    }

    /// The RAM tier that serves it.
    pub fn tier(&self) -> &Arc<RamTier> {
        &self.tier
    }

    /// Its layers, top first.
    pub fn layers(&self) -> Vec<LayerId> {
        self.stack().levels.iter().map(|l| l.layer.id()).collect()
    }

    /// Which layer holds a block now; `None` for a hole. Heat is reported under that layer.
    pub fn resolve(&self, block: BlockIndex) -> Option<LayerId> {
        if block.0 >= self.size().div_ceil(self.block_size) {
            return None;
        }
        self.stack().layer_of(block)
    }

    /// Bytes that the top layer takes up on disk.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn allocated(&self) -> Result<u64, StoreError> {
        Self::top(&self.stack()).allocated()
    }

    /// Counters since attach.
    pub fn counters(&self) -> VolumeCounters {
        self.stats.counters()
    }

    /// Latency of reads since attach, as seen at this interface.
    pub fn read_latency(&self) -> LatencySummary {
        self.stats.reads.total()
    }

    /// Latency of reads and writes since the last call.
    pub fn take_latency_window(&self) -> (LatencySummary, LatencySummary) {
        (self.stats.reads.take_window(), self.stats.writes.take_window())
    }

    /// Why the image takes no more writes, if a flush failed.
    pub fn poisoned(&self) -> Option<String> {
        Self::top(&self.stack()).poisoned().map(|closed| closed.why.clone())
    }

    /// Seals the top layer under a name and puts an empty one on top, while I/O goes on: writes wait meanwhile,
    /// reads do not. Everything acknowledged before is in the snapshot.
    ///
    /// # Errors
    /// [`StoreError`]; the image then goes on as before.
    pub fn snapshot(&self, name: &SnapshotName) -> Result<ImageMeta, StoreError> {
        self.push(Some(name), None)
    }

    /// Makes the image larger while I/O goes on, on top of a new layer. Whoever asks for the size from now on sees
    /// the new one; a client that asked before keeps to the old.
    ///
    /// # Errors
    /// [`StoreError::Unfit`] for a size that is no larger; [`StoreError`]. The image then goes on as before.
    pub fn grow(&self, size: u64) -> Result<ImageMeta, StoreError> {
        let meta = self.push(None, Some(size))?;
        self.size.store(meta.size, Ordering::Release);
        Ok(meta)
    }

    fn push(&self, name: Option<&SnapshotName>, size: Option<u64>) -> Result<ImageMeta, StoreError> {
        let _alone = self.gate.write().expect("gate lock");
        let old = self.stack();
        self.check_open().map_err(|err| from_disk(&err))?;
        let meta = self.store.image(self.image)?;
        self.store.check_snapshot(&meta, name)?;
        if let Some(size) = size {
            meta.check_growth(size)?;
        }
        let top = Self::top(&old);
        let pushed = top
            .checkpoint()
            .map_err(|err| from_disk(&err))
            .and_then(|()| self.store.push_layer(self.image, name, size, Some(top)));
        let (meta, new_top) = pushed.inspect_err(|_| self.note_poison(top))?;
        top.retire();
        let mut layers = vec![LayerRef::Local(new_top)];
        layers.extend(old.levels.iter().map(|l| l.layer.clone()));
        *self.stack.write().expect("stack lock") = Arc::new(Stack::new(layers, self.block_size, &self.tier));
        Ok(meta)
    }

    /// Stops serving: waits for writes in flight, makes everything durable and leaves the clean mark. Requests that
    /// come later get [`DiskError::ShuttingDown`].
    ///
    /// An image that was closed for writes before has said so; its detach is what repairs it, and succeeds.
    ///
    /// # Errors
    /// [`DiskError`] if not everything could be made durable; the image is detached all the same, and the next
    /// attach recovers it.
    pub fn detach(&self) -> Result<(), DiskError> {
        self.closing.store(true, Ordering::SeqCst);
        let _alone = self.gate.write().expect("gate lock");
        let mut closed = self.closed.lock().expect("close lock");
        if *closed {
            return Ok(());
        }
        *closed = true;
        let stack = self.stack();
        let top = Self::top(&stack);
        if top.poisoned().is_some() {
            self.note_poison(top);
            self.tier.forget_layer(stack.handle(0));
            self.end_marks();
            return Ok(self.store.close_image(self.image, false)?);
        }
        let sealed = top.seal().inspect_err(|_| self.note_poison(top));
        self.tier.forget_layer(stack.handle(0));
        let unmarked = match (&self.marks, &sealed) {
            (Some(marks), Ok(())) => marks.close(),
            _ => Ok(()),
        };
        self.end_marks();
        let closed = self.store.close_image(self.image, sealed.is_ok());
        sealed?;
        closed?;
        unmarked
    }

    /// Whoever still has the marks marks nothing more: the image may be opened anew.
    fn end_marks(&self) {
        if let Some(marks) = &self.marks {
            marks.end();
        }
    }

    fn check_open(&self) -> Result<(), DiskError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(DiskError::ShuttingDown);
        }
        match self.read_only {
            Some(why) => Err(DiskError::ReadOnly(why)),
            None => Ok(()),
        }
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if offset.checked_add(length).is_none_or(|end| end > self.size()) {
            return Err(DiskError::OutOfRange {
                offset,
                length,
                size: self.size(),
            });
        }
        Ok(())
    }
}

fn from_disk(err: &DiskError) -> StoreError {
    match err {
        DiskError::NoSpace(what) => StoreError::NoSpace(what.clone()),
        other => StoreError::Io {
            what: "cannot seal the top layer".into(),
            source: std::io::Error::other(other.to_string()),
        },
    }
}

impl Drop for Volume {
    /// Without [`Volume::detach`] this is a crash of the image: the next attach recovers it.
    fn drop(&mut self) {
        let closed = self.closed.get_mut().expect("close lock");
        if !*closed {
            if let Some(marks) = &self.marks {
                marks.end();
            }
            let _ = self.store.close_image(self.image, false);
        }
    }
}

impl Disk for Volume {
    fn image(&self) -> ImageId {
        self.image
    }

    fn size_bytes(&self) -> u64 {
        self.size()
    }

    fn block_size_bytes(&self) -> u64 {
        self.block_size
    }

    fn is_read_only(&self) -> bool {
        self.read_only.is_some()
    }

    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        self.read_ram(offset, buf)
    }

    fn file_read(&self, offset: u64, length: usize) -> Option<FileRead> {
        self.range_in_file(offset, length)
    }

    fn file_read_done(
        &self,
        offset: u64,
        length: usize,
        took: Duration,
        read: io::Result<()>,
    ) -> Result<(), DiskError> {
        self.file_reads.fetch_sub(1, Ordering::Relaxed);
        if let Err(err) = read {
            let what = format!("cannot read {length} bytes at {offset} of image {}", self.image);
            let err = disk_io(what, err);
            self.trouble.note_read(&err);
            return Err(err);
        }
        add(&self.stats.store_bytes, length as u64);
        self.stats.reads.record(took);
        Ok(())
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.read_any(offset, buf)
            .inspect_err(|err| self.trouble.note_read(err))
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), DiskError> {
        self.write_any(offset, data, fua)
            .inspect_err(|err| self.trouble.note_write(err))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.flush_top().inspect_err(|err| self.trouble.note_write(err))
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), DiskError> {
        self.zero_any(offset, length, false, fua)
            .inspect_err(|err| self.trouble.note_write(err))
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError> {
        self.zero_any(offset, length, keep_allocated, fua)
            .inspect_err(|err| self.trouble.note_write(err))
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.cache_range(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        self.extents_of(offset, length, kind, extents_max)
    }
}
