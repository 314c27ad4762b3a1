//! Whether a miss lets the unit it touches into RAM.
//!
//! What that costs differs: for a read of a whole unit one copy, for a read of 4 KiB a read of the whole unit, several
//! times what the disk needs for the part. It pays only if the unit is asked for again, or its other parts are, while
//! it is in RAM. That differs from image to image, so each finds out by itself: a share of its units, chosen by hash,
//! is always let in, and the share doubles or halves with what reads of just these units found in RAM. It settles
//! where one more unit in RAM is worth about what it costs. The others can be let in when they are asked for again
//! while the tier still remembers them, again as far as that shows to be worth it; until then only what is asked is
//! read, and handed out.

use std::sync::atomic::{AtomicU32, Ordering};

/// Reads of units in the share between two decisions.
const DECIDE_EVERY: u32 = 64;

/// The share is 2^-n of the units, and never less than this: at a disk with no rest to spare a whole unit costs as much
/// as five parts, so that a sixty-fourth of them costs a sixteenth.
const HALVINGS_MAX: u32 = 6;

/// One image's share, for one kind of reads. Counts may miss a read when several threads count at once: they steer,
/// and are shown nowhere.
pub(super) struct WholeUnits {
    /// The share grows if at least this many of [`DECIDE_EVERY`] reads found their unit in RAM.
    hits_worth_it: u32,
    halvings: AtomicU32,
    reads: AtomicU32,
    hits: AtomicU32,
}

impl WholeUnits {
    /// For reads of parts. A whole unit is priced at two parts: disks take 1.7 times as long for 64 KiB as for 4 KiB
    /// when nobody waits, and up to ten times when many do.
    pub(super) fn for_parts() -> Self {
        Self::worth_from(DECIDE_EVERY / 2)
    }

    /// For reads of whole units: a copy is cheap beside a read of a disk.
    pub(super) fn for_wholes() -> Self {
        Self::worth_from(DECIDE_EVERY / 16)
    }

    fn worth_from(hits_worth_it: u32) -> Self {
        Self {
            hits_worth_it,
            halvings: AtomicU32::new(0),
            reads: AtomicU32::new(0),
            hits: AtomicU32::new(0),
        }
    }

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
        let next = if hits >= self.hits_worth_it {
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
        let whole = WholeUnits::for_parts();
        (0..reads).for_each(|i| whole.note(i, hit(i)));
        (0..1_600).filter(|unit| whole.covers(*unit)).count()
    }

    #[test]
    fn units_that_are_used_again_come_in_whole_and_others_in_part() {
        assert_eq!(share_after(0, |_| false), 1_600, "all at the beginning");
        assert_eq!(share_after(10_000, |i| i % 4 != 0), 1_600, "three of four hit");
        let few = share_after(40_000, |_| false);
        assert!(
            (10..=40).contains(&few),
            "{few} of 1,600 go on showing what the rest would do"
        );
    }

    #[test]
    fn reads_of_whole_units_ask_for_fewer_hits() {
        let (parts, wholes) = (WholeUnits::for_parts(), WholeUnits::for_wholes());
        for i in 0..40_000 {
            parts.note(i, i % 8 == 0);
            wholes.note(i, i % 8 == 0);
        }
        let all = |whole: &WholeUnits| (0..100).all(|unit| whole.covers(unit));
        assert!(all(&wholes) && !all(&parts));
    }

    #[test]
    fn the_share_returns_with_the_hits() {
        let whole = WholeUnits::for_parts();
        (0..40_000).for_each(|i| whole.note(i, false));
        assert!(!(0..100).all(|unit| whole.covers(unit)));
        (0..200_000).for_each(|i| whole.note(i, true));
        assert!((0..100).all(|unit| whole.covers(unit)));
    }
}
