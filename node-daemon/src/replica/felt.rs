//! How long an image's clients wait for what is not in RAM, counted while somebody wants to know.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hdrhistogram::Histogram;

/// The longest wait told from longer ones, microseconds.
const LONGEST_US: u64 = 60_000_000;

/// An empty count of waits in microseconds, each known to 1 %.
pub fn waits() -> Histogram<u64> {
    Histogram::new_with_max(LONGEST_US, 2).expect("bounds of a histogram")
}

/// See the module.
pub struct Felt {
    counting: AtomicBool,
    counts: Mutex<Histogram<u64>>,
}

impl Default for Felt {
    fn default() -> Self {
        Self {
            counting: AtomicBool::new(false),
            counts: Mutex::new(waits()),
        }
    }
}

impl Felt {
    fn counts(&self) -> MutexGuard<'_, Histogram<u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins or ends to count.
    pub fn count(&self, counting: bool) {
        self.counts().reset();
        self.counting.store(counting, Ordering::Relaxed);
    }

    /// An operation begins.
    pub(super) fn begin(&self) -> Option<Instant> {
        self.counting.load(Ordering::Relaxed).then(Instant::now)
    }

    /// It was answered.
    pub(super) fn end(&self, began: Option<Instant>) {
        if let Some(began) = began {
            let waited = u64::try_from(began.elapsed().as_micros()).unwrap_or(LONGEST_US);
            self.counts().saturating_record(waited);
        }
    }

    /// The waits since it was last asked.
    pub fn take(&self) -> Histogram<u64> {
        std::mem::replace(&mut *self.counts(), waits())
    }
}
