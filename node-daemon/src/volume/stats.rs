//! Counters of one served image, cheap enough for every read.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hearth_protocol::heat::LatencySummary;

/// Buckets per power of two: values are known to within 1/8.
const STEPS: usize = 8;
const BUCKETS: usize = 40 * STEPS;

/// A histogram of microseconds that many threads fill at once.
pub struct Latency {
    buckets: Box<[AtomicU64]>,
    max_us: AtomicU64,
    /// Bucket counts at the end of the last window.
    last: Mutex<Vec<u64>>,
}

impl Default for Latency {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            max_us: AtomicU64::new(0),
            last: Mutex::new(vec![0; BUCKETS]),
        }
    }
}

fn bucket(us: u64) -> usize {
    if us < STEPS as u64 {
        return us as usize;
    }
    let log = us.ilog2() as usize;
    let step = (us >> (log - 3)) as usize & (STEPS - 1);
    ((log - 2) * STEPS + step).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn top_of(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let log = bucket / STEPS + 2;
    let step = (bucket % STEPS) as u64;
    ((STEPS as u64 + step + 1) << (log - 3)) - 1
}

fn summary(counts: &[u64], max_us: u64) -> LatencySummary {
    let count: u64 = counts.iter().sum();
    let at = |percent: u64| {
        let mut left = (count * percent).div_ceil(100);
        counts
            .iter()
            .position(|n| {
                let here = left <= *n;
                left = left.saturating_sub(*n);
                here
            })
            .map_or(0, |b| top_of(b).min(max_us))
    };
    if count == 0 {
        return LatencySummary::default();
    }
    LatencySummary {
        count,
        p50_us: at(50),
        p99_us: at(99),
        max_us,
    }
}

impl Latency {
    /// Counts one request.
    pub fn record(&self, took: Duration) {
        let us = took.as_micros() as u64;
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
        if us > self.max_us.load(Ordering::Relaxed) {
            self.max_us.fetch_max(us, Ordering::Relaxed);
        }
    }

    fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect()
    }

    /// Since attach.
    pub fn total(&self) -> LatencySummary {
        summary(&self.counts(), self.max_us.load(Ordering::Relaxed))
    }

    /// Since the last call. The maximum is that of its highest bucket.
    pub fn take_window(&self) -> LatencySummary {
        let now = self.counts();
        let mut last = self.last.lock().expect("latency window lock");
        let window: Vec<u64> = now.iter().zip(last.iter()).map(|(n, l)| n - l).collect();
        *last = now;
        let max = window.iter().rposition(|n| *n > 0).map_or(0, top_of);
        summary(&window, max.min(self.max_us.load(Ordering::Relaxed)))
    }
}

/// What a volume counted since attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VolumeCounters {
    /// Block reads answered from RAM.
    pub ram_hits: u64,
    /// Block reads that went to the disk or to a peer. (Holes are neither.)
    pub ram_misses: u64,
    /// Bytes read from the local store to answer reads, prefetch excluded.
    pub store_bytes: u64,
    /// Bytes read from peers.
    pub remote_bytes: u64,
    /// Units read ahead of their use.
    pub prefetched: u64,
    /// Blocks copied up from a lower layer because part of them was written.
    pub copied_up: u64,
}

#[derive(Default)]
pub(super) struct Stats {
    pub ram_hits: AtomicU64,
    pub ram_misses: AtomicU64,
    pub store_bytes: AtomicU64,
    pub remote_bytes: AtomicU64,
    pub prefetched: AtomicU64,
    pub copied_up: AtomicU64,
    pub reads: Latency,
    pub writes: Latency,
}

impl Stats {
    pub fn counters(&self) -> VolumeCounters {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        VolumeCounters {
            ram_hits: get(&self.ram_hits),
            ram_misses: get(&self.ram_misses),
            store_bytes: get(&self.store_bytes),
            remote_bytes: get(&self.remote_bytes),
            prefetched: get(&self.prefetched),
            copied_up: get(&self.copied_up),
        }
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_within_an_eighth() {
        for us in (0..5_000).chain([1 << 20, 1 << 30, (1 << 38) + 7]) {
            let top = top_of(bucket(us));
            assert!(top >= us && top <= us + us / 8, "{us} is counted as {top}");
        }
        let latency = Latency::default();
        (1..=1_000).for_each(|us| latency.record(Duration::from_micros(us)));
        let total = latency.total();
        assert_eq!((total.count, total.max_us), (1_000, 1_000));
        assert!((500..=563).contains(&total.p50_us) && (990..=1_000).contains(&total.p99_us));
        assert_eq!(latency.take_window().count, 1_000);
        assert_eq!(latency.take_window(), LatencySummary::default());
    }
}
