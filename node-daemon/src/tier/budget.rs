//! What may be read ahead: every read ahead that nobody uses is a read below that would not have been, so reads are
//! held to an account, and each kind of guess must earn its place.
//!
//! The account compares the reads below with those that there would be without prefetch. Both are counted on the
//! sampled units only: the shadows say what a tier without prefetch would have read. So what a guess pushes out of RAM
//! counts as well as a guess that nobody uses, and nothing that prefetch does can hide in what it is measured by.
//!
//! Guesses come in *classes* (a run of sequential reads so long, a replay that held so long). A class that is seldom
//! right is asked no more. It is judged together with the class of the same kind below it: what held longer is no worse
//! a guess, and one replay that breaks off must not shut out the longest ones, which nobody would try again.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Reads below that prefetch may add, in percent of those that there would be without.
const OVER_PERCENT: i64 = 14;

/// The same for the first [`COLD_UNITS`]: while nothing has left RAM no guess is known to be wrong, and fifty guests
/// that boot at once are to read little more than their boot set.
const COLD_OVER_PERCENT: i64 = 6;

/// Units read below, of all, until outcomes tell good guesses from bad ones: 256 MiB of 64 KiB units.
const COLD_UNITS: i64 = 4096;

/// Classes of guesses: sequential ones by length of the run, replays by length of the match.
pub const CLASSES: usize = 16;

/// First class of replays; those below are sequential.
pub const REPLAY: u8 = 8;

/// Outcomes of one class after which they are halved, so that a class can win or lose its place.
const OUTCOMES_MAX: u32 = 512;

/// Reads of the account, after which they are halved.
const ACCOUNT_MAX: u64 = 1 << 20;

/// The share of units that are sampled is counted in this many.
const SAMPLED_ALL: i64 = 1 << 16;

/// A new class is taken to have this many used and wasted units.
const PRIOR: (u64, u64) = (8, 2);

/// Outcomes of the class below that count for a class, at most.
const BELOW_MAX: u64 = 64;

/// Least use share, in percent, of a class that is asked.
const SHARE_MIN_PERCENT: u64 = 30;

#[derive(Default)]
struct Class {
    used: AtomicU32,
    wasted: AtomicU32,
    /// Asked for, and neither used nor wasted yet.
    out: AtomicU32,
}

impl Class {
    /// Used and wasted, with the prior.
    fn outcomes(&self) -> (u64, u64) {
        let get = |n: &AtomicU32| u64::from(n.load(Ordering::Relaxed));
        (get(&self.used) + PRIOR.0, get(&self.wasted) + PRIOR.1)
    }
}

/// The account. Counters only: shared by all readers of a tier.
pub struct Budget {
    classes: [Class; CLASSES],
    /// Of the sampled units: reads below that there would have been without prefetch, and those that there were.
    expected: AtomicU64,
    below: AtomicU64,
    /// Of 65,536 units so many are sampled.
    sampled: AtomicU32,
    used_total: AtomicU64,
    wasted_total: AtomicU64,
}

/// The class of a guess that has held `length` times: a logarithm, from the first class of its kind.
pub fn class_of(first: u8, length: u32) -> u8 {
    first + (32 - length.leading_zeros()).min(7) as u8
}

impl Budget {
    /// An account that is told of `sampled` in 65,536 units.
    pub fn new(sampled: u32) -> Self {
        Self {
            classes: Default::default(),
            expected: AtomicU64::new(0),
            below: AtomicU64::new(0),
            sampled: AtomicU32::new(sampled.max(1)),
            used_total: AtomicU64::new(0),
            wasted_total: AtomicU64::new(0),
        }
    }

    /// A sampled unit was read: without prefetch there would have been a read below, and there was one.
    pub fn sampled(&self, expected: bool, below: bool) {
        let expected = self.expected.fetch_add(expected.into(), Ordering::Relaxed);
        let below = self.below.fetch_add(below.into(), Ordering::Relaxed);
        if expected + below > ACCOUNT_MAX {
            self.expected.store(expected / 2, Ordering::Relaxed);
            self.below.store(below / 2, Ordering::Relaxed);
        }
    }

    /// From now on `sampled` in 65,536 units are told of; what was counted before is brought to that scale.
    pub fn resample(&self, sampled: u32) {
        let before = u64::from(self.sampled.swap(sampled.max(1), Ordering::Relaxed));
        for sum in [&self.expected, &self.below] {
            let scaled = sum.load(Ordering::Relaxed) * u64::from(sampled) / before;
            sum.store(scaled, Ordering::Relaxed);
        }
    }

    /// A unit read ahead was used.
    pub fn used(&self, class: u8) {
        let class = &self.classes[usize::from(class) % CLASSES];
        class.used.fetch_add(1, Ordering::Relaxed);
        settle(&class.out, 1);
        self.used_total.fetch_add(1, Ordering::Relaxed);
    }

    /// A unit read ahead left RAM unused.
    pub fn wasted(&self, class: u8) {
        let class = &self.classes[usize::from(class) % CLASSES];
        let wasted = class.wasted.fetch_add(1, Ordering::Relaxed) + 1;
        settle(&class.out, 1);
        let used = class.used.load(Ordering::Relaxed);
        if used + wasted > OUTCOMES_MAX {
            class.used.store(used / 2, Ordering::Relaxed);
            class.wasted.store(wasted / 2, Ordering::Relaxed);
        }
        self.wasted_total.fetch_add(1, Ordering::Relaxed);
    }

    /// Units that were asked for were not read after all, or a reader came first.
    pub fn unread(&self, class: u8, count: u32) {
        if count > 0 {
            settle(&self.classes[usize::from(class) % CLASSES].out, count);
        }
    }

    /// How many of `count` units of a class may be read ahead now; they count as asked for. Together at most `room`
    /// units are out, so that they are not pushed out before their use.
    pub fn grant(&self, class: u8, count: u32, room: u32) -> u32 {
        let out: u32 = self.classes.iter().map(|c| c.out.load(Ordering::Relaxed)).sum();
        let count = count.min(room.saturating_sub(out));
        let at = &self.classes[usize::from(class) % CLASSES];
        let (used, wasted) = self.outcomes(class);
        let granted = if used * 100 < (used + wasted) * SHARE_MIN_PERCENT {
            0
        } else {
            self.balance().clamp(0, count.into()) as u32
        };
        at.out.fetch_add(granted, Ordering::Relaxed);
        granted
    }

    /// Used and wasted, as a class is judged by them.
    fn outcomes(&self, class: u8) -> (u64, u64) {
        let of = |class: u8| self.classes[usize::from(class) % CLASSES].outcomes();
        let (used, wasted) = of(class);
        if class.is_multiple_of(REPLAY) {
            return (used, wasted);
        }
        let below = of(class - 1);
        let all = (below.0 + below.1).max(BELOW_MAX);
        (used + below.0 * BELOW_MAX / all, wasted + below.1 * BELOW_MAX / all)
    }

    /// Units that may still be read ahead.
    fn balance(&self) -> i64 {
        let sampled = i64::from(self.sampled.load(Ordering::Relaxed));
        let units = |n: &AtomicU64| n.load(Ordering::Relaxed) as i64 * SAMPLED_ALL / sampled;
        let expected = units(&self.expected);
        let cold = expected.min(COLD_UNITS);
        let over = cold * COLD_OVER_PERCENT + (expected - cold) * OVER_PERCENT;
        expected + over / 100 - units(&self.below)
    }

    /// Units read ahead that were used, and that were not, since the tier was built.
    pub fn totals(&self) -> (u64, u64) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (get(&self.used_total), get(&self.wasted_total))
    }
}

fn settle(out: &AtomicU32, count: u32) {
    let _ = out.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n.saturating_sub(count)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u32 = SAMPLED_ALL as u32;

    /// Guesses of one class of which every `hits_in`th is used, beside as many plain misses; used and wasted.
    fn play(hits_in: u32, rounds: u32) -> (u64, u64) {
        let budget = Budget::new(ALL);
        for i in 0..rounds {
            budget.sampled(true, true);
            for guess in 0..budget.grant(3, 4, 64) {
                budget.sampled(false, true);
                if (i * 4 + guess) % hits_in == 0 {
                    budget.used(3);
                    // The shadow missed what was read ahead.
                    budget.sampled(true, false);
                } else {
                    budget.wasted(3)
                }
            }
        }
        budget.totals()
    }

    #[test]
    fn reads_below_stay_within_their_share_whatever_is_guessed() {
        for hits_in in [1, 2, 3, 5, 1000] {
            let rounds = 20_000;
            let (used, wasted) = play(hits_in, rounds);
            let without = u64::from(rounds) + used;
            assert!(
                wasted * 100 <= without * OVER_PERCENT as u64 + 400,
                "1 in {hits_in}: {wasted} wasted, {without} reads without"
            );
        }
        let (used, wasted) = play(1, 1000);
        assert!(
            used > 3_800 && wasted == 0,
            "guesses that are always right are soon always allowed: {used}"
        );
        assert!(
            play(1000, 20_000).1 < 100,
            "a class that is never right is soon asked no more"
        );
    }

    #[test]
    fn a_class_is_tried_again_while_the_one_below_it_is_right() {
        let budget = Budget::new(ALL);
        (0..1000).for_each(|_| budget.sampled(true, true));
        (0..40).for_each(|_| budget.wasted(7));
        assert_eq!(budget.grant(7, 1, 16), 0, "nothing speaks for it");
        (0..40).for_each(|_| budget.used(6));
        assert_eq!(budget.grant(7, 1, 16), 1);
        (0..100).for_each(|_| budget.wasted(7));
        assert_eq!(budget.grant(7, 1, 16), 0, "its own outcomes weigh more");
        (0..40).for_each(|_| budget.used(7));
        (0..40).for_each(|_| budget.wasted(REPLAY));
        assert_eq!(budget.grant(REPLAY, 1, 16), 0, "the longest run is no shorter replay");
    }

    #[test]
    fn what_prefetch_pushes_out_counts_too() {
        let budget = Budget::new(ALL);
        (0..1000).for_each(|_| budget.sampled(true, true));
        assert_eq!(budget.grant(1, 10, 16), 10);
        // Reads below that the shadow would have hit.
        (0..200).for_each(|_| budget.sampled(false, true));
        budget.unread(1, 1);
        assert_eq!(budget.grant(1, 1, 16), 0);
    }

    #[test]
    fn a_sample_stands_for_all() {
        let budget = Budget::new(ALL / 1000);
        (0..10).for_each(|_| budget.sampled(true, true));
        assert!(budget.grant(1, 2000, 2000) > 800);
    }

    #[test]
    fn what_is_out_takes_its_room() {
        let budget = Budget::new(ALL);
        (0..1000).for_each(|_| budget.sampled(true, true));
        assert_eq!(budget.grant(1, 10, 16), 10);
        assert_eq!(budget.grant(2, 10, 16), 6);
        budget.unread(1, 1);
        assert_eq!(budget.grant(2, 10, 16), 1);
    }

    #[test]
    fn classes_are_logarithms() {
        assert_eq!([1, 2, 3, 4, 64, u32::MAX].map(|n| class_of(0, n)), [1, 2, 2, 3, 7, 7]);
        assert_eq!(class_of(REPLAY, 1), REPLAY + 1);
    }
}
