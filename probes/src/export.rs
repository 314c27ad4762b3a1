//! The `export` arm: the NBD export counts its own requests, where no kernel device stands between guest and daemon.
//!
//! [`ExportCounter`] is on the hot path of every request: one short lock on one of several shards per touched run of
//! blocks, no allocation once its tables have grown to the window's working set.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hearth_probes_common::latency;
use hearth_protocol::heat::HeatOrigin;
use hearth_protocol::{ByteLen, ImageId, units};

use crate::source::{HeatError, HeatSource, Op, Window};
use crate::tally::{BLOCKS_PER_WINDOW_MAX, BlockTable, ImageTally, burst_bit, record_latency, touches};

/// Shards of a counter's block table, so that connections rarely meet on one lock.
const SHARDS: usize = 16;

/// Neighbouring blocks that share a shard, as a shift: a request takes one or two locks, not one per block.
const SHARD_RUN_SHIFT: u32 = 6;

/// Blocks of one shard in one window; further ones are counted as lost.
const BLOCKS_PER_SHARD_MAX: usize = BLOCKS_PER_WINDOW_MAX / SHARDS;

/// Blocks counted at once for one request. Longer ones (a trim of a whole disk) are noted as a range and counted when
/// the window is drained, so that no request holds up its connection.
const TOUCHES_AT_ONCE_MAX: usize = 1024;

/// Blocks for which a shard keeps room however few were touched.
const KEPT_BLOCKS_MIN: usize = 512;

/// Ranges noted per window; the touches of further ones are counted as lost.
const RANGES_MAX: usize = 256;

/// Locks even if a holder panicked: counts are plain numbers and always consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request too long to be counted at once.
#[derive(Debug, Clone, Copy)]
struct Range {
    op: Op,
    offset: u64,
    length: u64,
    burst: u64,
}

/// Latencies of one direction on the common scale.
#[derive(Debug)]
struct Latencies([AtomicU64; latency::BUCKETS]);

impl Latencies {
    fn new() -> Self {
        Self([const { AtomicU64::new(0) }; latency::BUCKETS])
    }

    fn drain_into(&self, histogram: &mut hdrhistogram::Histogram<u64>) {
        for (bucket, count) in (0u32..).zip(&self.0) {
            if count.load(Ordering::Relaxed) != 0 {
                record_latency(histogram, bucket, count.swap(0, Ordering::Relaxed));
            }
        }
    }
}

/// Counts the requests of one export of one image. Share it between connections.
#[derive(Debug)]
pub struct ExportCounter {
    image: ImageId,
    block_size: ByteLen,
    started: Instant,
    /// Start of the current window in nanoseconds after `started`.
    window_start_ns: AtomicU64,
    shards: [Mutex<BlockTable>; SHARDS],
    ranges: Mutex<Vec<Range>>,
    events: AtomicU64,
    lost: AtomicU64,
    read_latency: Latencies,
    write_latency: Latencies,
}

impl ExportCounter {
    /// A counter for an image whose blocks have `block_size` bytes.
    ///
    /// # Panics
    /// If `block_size` is no power of two between 4 KiB and 4 MiB.
    pub fn new(image: ImageId, block_size: ByteLen) -> Arc<Self> {
        assert!(units::is_block_size(block_size.get()), "{block_size} is no block size");
        Arc::new(Self {
            image,
            block_size,
            started: Instant::now(),
            window_start_ns: AtomicU64::new(0),
            shards: Default::default(),
            ranges: Mutex::new(Vec::with_capacity(RANGES_MAX)),
            events: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            read_latency: Latencies::new(),
            write_latency: Latencies::new(),
        })
    }

    /// Which image it counts.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// Counts one request in every block it touches. A request without bytes (a flush) counts nothing.
    pub fn count(&self, op: Op, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        self.events.fetch_add(1, Ordering::Relaxed);
        let now_ns = self.started.elapsed().as_nanos() as u64;
        let burst = burst_bit(now_ns.saturating_sub(self.window_start_ns.load(Ordering::Relaxed)));
        let mut parts = touches(offset, length, self.block_size.get().trailing_zeros()).peekable();
        if parts.len() > TOUCHES_AT_ONCE_MAX {
            let mut ranges = lock(&self.ranges);
            if ranges.len() < RANGES_MAX {
                ranges.push(Range {
                    op,
                    offset,
                    length,
                    burst,
                });
            } else {
                self.lost.fetch_add(parts.len() as u64, Ordering::Relaxed);
            }
            return;
        }
        while let Some(first) = parts.peek() {
            let run = first.block >> SHARD_RUN_SHIFT;
            let mut table = lock(&self.shards[run as usize % SHARDS]);
            while let Some(touch) = parts.next_if(|touch| touch.block >> SHARD_RUN_SHIFT == run) {
                if table.len() >= BLOCKS_PER_SHARD_MAX && !table.contains_key(&touch.block) {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                } else {
                    table.entry(touch.block).or_default().touch(op, touch.bytes, burst);
                }
            }
        }
    }

    /// Counts how long one request took as the guest felt it, microseconds.
    pub fn latency(&self, op: Op, us: u64) {
        let bucket = latency::bucket_of_ns(us.saturating_mul(1000)) as usize;
        let latencies = match op {
            Op::Read => &self.read_latency,
            Op::Write => &self.write_latency,
        };
        latencies.0[bucket].fetch_add(1, Ordering::Relaxed);
    }

    /// Moves everything counted into `tally` and starts a new window. Every request ends up in exactly one window.
    fn drain_into(&self, tally: &mut ImageTally) {
        self.window_start_ns
            .store(self.started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        for shard in &self.shards {
            let mut table = lock(shard);
            let touched = table.len();
            // `drain` keeps the table's memory for the next window.
            for (block, counts) in table.drain() {
                tally.add(block, &counts);
            }
            if table.capacity() > KEPT_BLOCKS_MIN.max(4 * touched) {
                // One scan of a disk must not hold its memory for ever.
                table.shrink_to(KEPT_BLOCKS_MIN.max(2 * touched));
            }
        }
        for range in lock(&self.ranges).drain(..) {
            tally.add_request(range.op, range.offset, range.length, range.burst);
        }
        tally.events += self.events.swap(0, Ordering::Relaxed);
        tally.lost += self.lost.swap(0, Ordering::Relaxed);
        self.read_latency.drain_into(&mut tally.read_latency);
        self.write_latency.drain_into(&mut tally.write_latency);
    }
}

#[derive(Debug, Default)]
struct Registry {
    counters: Vec<Arc<ExportCounter>>,
    /// Unregistered, with counts that the next window still takes.
    leaving: Vec<Arc<ExportCounter>>,
    events_total: u64,
    lost_total: u64,
}

/// Drains the counters of a node's exports. Clones share one registry: keep one to register, give one to the drain.
#[derive(Debug, Clone, Default)]
pub struct ExportSource {
    registry: Arc<Mutex<Registry>>,
}

impl ExportSource {
    /// No counters yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a counter. Several counters of one image are reported as one.
    pub fn register(&self, counter: Arc<ExportCounter>) {
        lock(&self.registry).counters.push(counter);
    }

    /// Removes all counters of an image; what they counted so far is in the next window.
    pub fn unregister(&self, image: ImageId) {
        let registry = &mut *lock(&self.registry);
        registry
            .leaving
            .extend(registry.counters.extract_if(.., |counter| counter.image == image));
    }
}

impl HeatSource for ExportSource {
    fn origin(&self) -> HeatOrigin {
        HeatOrigin::Export
    }

    fn drain(&mut self) -> Result<Window, HeatError> {
        let registry = &mut *lock(&self.registry);
        let mut images = BTreeMap::new();
        let leaving = std::mem::take(&mut registry.leaving);
        for counter in registry.counters.iter().chain(&leaving) {
            let tally = images
                .entry(counter.image)
                .or_insert_with(|| ImageTally::new(counter.block_size));
            counter.drain_into(tally);
        }
        registry.events_total += images.values().map(|tally| tally.events).sum::<u64>();
        registry.lost_total += images.values().map(|tally| tally.lost).sum::<u64>();
        Ok(Window {
            images: images
                .into_iter()
                .filter(|(_, tally)| !tally.is_empty())
                .map(|(image, tally)| tally.into_window(image))
                .collect(),
            disks: Vec::new(),
            events_total: registry.events_total,
            lost_total: registry.lost_total,
            untimed_total: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    const IMAGE: ImageId = ImageId(7);

    fn touches_of(window: &Window) -> u64 {
        let counted = |heat: &hearth_protocol::heat::BlockHeat| u64::from(heat.reads) + u64::from(heat.writes);
        window.images.iter().flat_map(|image| &image.blocks).map(counted).sum()
    }

    #[test]
    fn a_request_counts_once_in_each_block_it_touches() {
        let counter = ExportCounter::new(IMAGE, ByteLen(4096));
        let mut source = ExportSource::new();
        source.register(counter.clone());
        counter.count(Op::Read, 4095, 4098);
        counter.count(Op::Write, 4096, 10);
        counter.count(Op::Write, 0, 0);
        counter.latency(Op::Read, 100);
        let window = source.drain().unwrap();
        let image = &window.images[0];
        let blocks: Vec<_> = image
            .blocks
            .iter()
            .map(|b| (b.block.0, b.reads, b.writes, b.bytes, b.bursts))
            .collect();
        assert_eq!(blocks, [(0, 1, 0, 1, 1), (1, 1, 1, 4106, 1), (2, 1, 0, 1, 1)]);
        assert_eq!((window.events_total, window.lost_total), (2, 0));
        assert_eq!(image.read_latency.len(), 1);
        assert!(
            image.read_latency.max().abs_diff(100) <= 7,
            "{}",
            image.read_latency.max()
        );
        assert!(source.drain().unwrap().images.is_empty());
    }

    #[test]
    fn nothing_is_lost_while_connections_count_and_the_window_is_drained() {
        const PER_THREAD: u64 = 50_000;
        let counters = [
            ExportCounter::new(IMAGE, ByteLen(4096)),
            ExportCounter::new(IMAGE, ByteLen(4096)),
        ];
        let mut source = ExportSource::new();
        counters.iter().for_each(|counter| source.register(counter.clone()));
        let done = AtomicBool::new(false);
        let mut touched = 0;
        thread::scope(|scope| {
            let writers: Vec<_> = counters
                .iter()
                .map(|counter| {
                    scope.spawn(|| {
                        for i in 0..PER_THREAD {
                            counter.count(Op::Read, (i * 7919 % 5000) * 4096, 8192);
                        }
                    })
                })
                .collect();
            scope.spawn(|| {
                writers.into_iter().for_each(|writer| writer.join().unwrap());
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                touched += touches_of(&source.drain().unwrap());
            }
        });
        let last = source.drain().unwrap();
        touched += touches_of(&last);
        assert_eq!(touched, 2 * 2 * PER_THREAD);
        assert_eq!((last.events_total, last.lost_total), (2 * PER_THREAD, 0));
    }

    #[test]
    fn a_trim_of_a_whole_disk_is_counted_within_the_bound_and_the_rest_is_lost() {
        let counter = ExportCounter::new(IMAGE, ByteLen(4096));
        let mut source = ExportSource::new();
        source.register(counter.clone());
        counter.count(Op::Write, 0, 8 << 30);
        let window = source.drain().unwrap();
        assert_eq!(touches_of(&window), BLOCKS_PER_WINDOW_MAX as u64);
        assert_eq!(touches_of(&window) + window.lost_total, (8 << 30) / 4096);
        for _ in 0..RANGES_MAX + 1 {
            counter.count(Op::Write, 0, 2000 * 4096);
        }
        let window = source.drain().unwrap();
        assert_eq!(touches_of(&window), 2000 * RANGES_MAX as u64);
        assert_eq!(window.images[0].lost, 2000);
    }

    #[test]
    fn what_an_image_counted_before_it_left_is_in_the_next_window() {
        let counter = ExportCounter::new(IMAGE, ByteLen(65536));
        let mut source = ExportSource::new();
        source.register(counter.clone());
        counter.count(Op::Write, 0, 4096);
        source.unregister(IMAGE);
        assert_eq!(touches_of(&source.drain().unwrap()), 1);
        counter.count(Op::Write, 0, 4096);
        assert!(source.drain().unwrap().images.is_empty());
    }
}
