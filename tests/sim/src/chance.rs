//! The one source of chance. ChaCha's stream is fixed by its specification, so a seed means the same run everywhere.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// See the module.
pub struct Chance(ChaCha8Rng);

impl Chance {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        // A bias of n in 2^64 is of no matter here.
        self.0.next_u64() % n
    }

    /// A number from `low` to `high`, both included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// An index of something with `n` entries.
    pub fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// Whether something of so many in a thousand happens.
    pub fn happens(&mut self, per_mille: u64) -> bool {
        self.below(1_000) < per_mille
    }

    /// One of several, if there are any.
    pub fn pick<T: Clone>(&mut self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.index(of.len())].clone())
    }

    /// A duration that is mostly about `usual` and sometimes, in so many of a thousand, up to `long`.
    pub fn delay(&mut self, usual: u64, long: u64, per_mille: u64) -> u64 {
        if self.happens(per_mille) {
            self.within(usual, long)
        } else {
            self.within(usual / 4 + 1, usual * 2)
        }
    }
}
