//! How long an image's clients wait for what is not in RAM, counted while somebody wants to know.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hdrhistogram::Histogram;

/// The longest wait told from longer ones, microseconds.
const LONGEST_US: u64 = 60_000_000;

/// An empty count of waits in microseconds, each known to 1 %.
fn waits() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST_US, 2).expect("bounds of a histogram")
}

/// Waits of reads, and of writes, which are several times as long: a percentile of both together would say little of
/// either.
#[derive(Clone)]
pub struct Waits {
    /// Of reads.
    pub reads: Histogram<u64>,
    /// Of writes.
    pub writes: Histogram<u64>,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            reads: waits(),
            writes: waits(),
        }
    }
}

/// See the module.
pub struct Felt {
    counting: AtomicBool,
    counts: Mutex<Waits>,
}

impl Default for Felt {
    fn default() -> Self {
        Self {
            counting: AtomicBool::new(false),
            counts: Mutex::default(),
        }
    }
}

impl Felt {
    fn counts(&self) -> MutexGuard<'_, Waits> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins or ends to count.
    pub fn count(&self, counting: bool) {
        *self.counts() = Waits::default();
        self.counting.store(counting, Ordering::Relaxed);
    }

    /// An operation begins.
    pub(super) fn begin(&self) -> Option<Instant> {
        self.counting.load(Ordering::Relaxed).then(Instant::now)
    }

    /// It was answered.
    pub(super) fn end(&self, began: Option<Instant>, writes: bool) {
        if let Some(began) = began {
            let waited = u64::try_from(began.elapsed().as_micros()).unwrap_or(LONGEST_US);
            let mut counts = self.counts();
            let of = if writes { &mut counts.writes } else { &mut counts.reads };
            of.saturating_record(waited);
        }
    }

    /// The waits since it was last asked.
    pub fn take(&self) -> Waits {
        std::mem::take(&mut *self.counts())
    }
}
