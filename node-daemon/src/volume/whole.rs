//! Whether a miss that asks for part of a unit brings in the whole.
//!
//! A whole unit costs the disk several times what 4 KiB cost, and pays only if its other parts are asked for while it
//! is in RAM. That differs from image to image, so each finds out by itself: a share of its units, chosen by hash, is
//! always brought in whole, and the share doubles or halves with what reads of just these units found in RAM. It
//! settles where one more unit in RAM is worth about what it costs. Of the others only what is asked is read, until
//! they are asked for again while the tier still remembers them.

use std::sync::atomic::{AtomicU32, Ordering};

/// Reads of units in the share between two decisions.
const DECIDE_EVERY: u32 = 256;

/// The share grows if at least this many of them found their unit in RAM. A whole unit is priced at two parts: disks
/// take 1.7 times as long for 64 KiB as for 4 KiB when nobody waits, and up to ten times when many do.
const HITS_WORTH_IT: u32 = DECIDE_EVERY / 2;

/// The share is 2^-n of the units, and never less than this.
const HALVINGS_MAX: u32 = 4;

/// One image's share. Counts may miss a read when several threads count at once: they steer, and are shown nowhere.
#[derive(Default)]
pub(super) struct WholeUnits {
    halvings: AtomicU32,
    reads: AtomicU32,
    hits: AtomicU32,
}

impl WholeUnits {
    /// Whether a unit belongs to the share.
    pub(super) fn covers(&self, unit: u32) -> bool {
        // The upper bits of a product are well mixed.
        let hash = unit.wrapping_mul(0x9e37_79b9);
        let halvings = self.halvings.load(Ordering::Relaxed);
        halvings == 0 || hash >> (u32::BITS - halvings) == 0
    }

    /// Counts a read of a unit.
    pub(super) fn note(&self, unit: u32, hit: bool) {
        if !self.covers(unit) {
            return;
        }
        let hits = self.hits.load(Ordering::Relaxed) + u32::from(hit);
        let reads = self.reads.load(Ordering::Relaxed) + 1;
        if reads < DECIDE_EVERY {
            self.hits.store(hits, Ordering::Relaxed);
            self.reads.store(reads, Ordering::Relaxed);
            return;
        }
        self.hits.store(0, Ordering::Relaxed);
        self.reads.store(0, Ordering::Relaxed);
        let halvings = self.halvings.load(Ordering::Relaxed);
        let next = if hits >= HITS_WORTH_IT {
            halvings.saturating_sub(1)
        } else {
            (halvings + 1).min(HALVINGS_MAX)
        };
        self.halvings.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share_after(reads: u32, hit: impl Fn(u32) -> bool) -> usize {
        let whole = WholeUnits::default();
        (0..reads).for_each(|i| whole.note(i, hit(i)));
        (0..1_600).filter(|unit| whole.covers(*unit)).count()
    }

    #[test]
    fn units_that_are_used_again_come_in_whole_and_others_in_part() {
        assert_eq!(share_after(0, |_| false), 1_600, "all at the beginning");
        assert_eq!(share_after(10_000, |i| i % 4 != 0), 1_600, "three of four hit");
        let few = share_after(20_000, |_| false);
        assert!(
            (60..=140).contains(&few),
            "{few} of 1,600 go on showing what the rest would do"
        );
    }

    #[test]
    fn the_share_returns_with_the_hits() {
        let whole = WholeUnits::default();
        (0..20_000).for_each(|i| whole.note(i, false));
        assert!(!(0..100).all(|unit| whole.covers(unit)));
        (0..200_000).for_each(|i| whole.note(i, true));
        assert!((0..100).all(|unit| whole.covers(unit)));
    }
}
