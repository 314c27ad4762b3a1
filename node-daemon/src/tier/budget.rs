//! What may be read ahead: every read ahead that nobody uses is a read below that would not have been, so waste is
//! paid out of an account, and each kind of guess must earn its place.
//!
//! Guesses come in *classes* (a run of sequential reads so long, a replay that held so long). A class whose use share
//! pays for its own waste is always allowed; the others may draw on what the account holds. So the reads below stay
//! within [`WASTE_PERCENT`] of those without prefetch, whatever the workload.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Unused reads ahead that are allowed, in percent of the reads below that there would be without prefetch.
const WASTE_PERCENT: u64 = 13;

/// Classes of guesses: sequential ones by length of the run, replays by length of the match.
pub const CLASSES: usize = 16;

/// First class of replays; those below are sequential.
pub const REPLAY: u8 = 8;

/// Outcomes of one class after which they are halved, so that a class can win or lose its place.
const OUTCOMES_MAX: u32 = 512;

/// Outcomes of all, after which they are halved.
const ACCOUNT_MAX: u64 = 1 << 20;

/// A new class is taken to have this many used and wasted units.
const PRIOR: (u64, u64) = (8, 2);

/// Least use share, in percent, of a class that draws on the account.
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
#[derive(Default)]
pub struct Budget {
    classes: [Class; CLASSES],
    /// Units that were read below, or would have been without prefetch.
    demand: AtomicU64,
    wasted: AtomicU64,
    used_total: AtomicU64,
    wasted_total: AtomicU64,
}

/// The class of a guess that has held `length` times: a logarithm, from the first class of its kind.
pub fn class_of(first: u8, length: u32) -> u8 {
    first + (32 - length.leading_zeros()).min(7) as u8
}

impl Budget {
    /// A read missed RAM.
    pub fn missed(&self) {
        self.demand.fetch_add(1, Ordering::Relaxed);
    }

    /// A unit read ahead was used.
    pub fn used(&self, class: u8) {
        let class = &self.classes[usize::from(class) % CLASSES];
        class.used.fetch_add(1, Ordering::Relaxed);
        settle(&class.out);
        self.used_total.fetch_add(1, Ordering::Relaxed);
        self.demand.fetch_add(1, Ordering::Relaxed);
    }

    /// A unit read ahead left RAM unused.
    pub fn wasted(&self, class: u8) {
        let class = &self.classes[usize::from(class) % CLASSES];
        let wasted = class.wasted.fetch_add(1, Ordering::Relaxed) + 1;
        settle(&class.out);
        let used = class.used.load(Ordering::Relaxed);
        if used + wasted > OUTCOMES_MAX {
            class.used.store(used / 2, Ordering::Relaxed);
            class.wasted.store(wasted / 2, Ordering::Relaxed);
        }
        self.wasted_total.fetch_add(1, Ordering::Relaxed);
        let wasted = self.wasted.fetch_add(1, Ordering::Relaxed);
        let demand = self.demand.load(Ordering::Relaxed);
        if demand + wasted > ACCOUNT_MAX {
            self.demand.store(demand / 2, Ordering::Relaxed);
            self.wasted.store(wasted / 2, Ordering::Relaxed);
        }
    }

    /// A unit that was asked for was not read after all, or a reader came first.
    pub fn unread(&self, class: u8) {
        settle(&self.classes[usize::from(class) % CLASSES].out);
    }

    /// How many of `count` units of a class may be read ahead now; they count as asked for. Together at most `room`
    /// units are out, so that they are not pushed out before their use.
    pub fn grant(&self, class: u8, count: u32, room: u32) -> u32 {
        let out: u32 = self.classes.iter().map(|c| c.out.load(Ordering::Relaxed)).sum();
        let count = count.min(room.saturating_sub(out));
        let at = &self.classes[usize::from(class) % CLASSES];
        let (used, wasted) = at.outcomes();
        let granted = if wasted * 100 <= used * WASTE_PERCENT {
            count
        } else if used * 100 < (used + wasted) * SHARE_MIN_PERCENT {
            0
        } else {
            let balance = self.balance();
            if balance <= 0 {
                0
            } else {
                // In the account's unit: expected waste is `count * wasted / (used + wasted)`.
                let most = balance as u64 / 100 * (used + wasted) / wasted;
                u64::from(count).min(most) as u32
            }
        };
        at.out.fetch_add(granted, Ordering::Relaxed);
        granted
    }

    /// What may still be wasted, in hundredths of a unit.
    fn balance(&self) -> i64 {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let mut balance = (get(&self.demand) * WASTE_PERCENT) as i64 - (get(&self.wasted) * 100) as i64;
        for class in &self.classes {
            let out = u64::from(class.out.load(Ordering::Relaxed));
            if out > 0 {
                let (used, wasted) = class.outcomes();
                balance -= (out * 100 * wasted / (used + wasted)) as i64;
            }
        }
        balance
    }

    /// Units read ahead that were used, and that were not, since the tier was built.
    pub fn totals(&self) -> (u64, u64) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (get(&self.used_total), get(&self.wasted_total))
    }
}

fn settle(out: &AtomicU32) {
    let _ = out.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guesses of one class of which every `hits_in`th is used, beside as many plain misses.
    fn play(hits_in: u32, rounds: u32) -> (u64, u64) {
        let budget = Budget::default();
        for i in 0..rounds {
            budget.missed();
            for guess in 0..budget.grant(3, 4, 64) {
                if (i * 4 + guess) % hits_in == 0 {
                    budget.used(3)
                } else {
                    budget.wasted(3)
                }
            }
        }
        budget.totals()
    }

    #[test]
    fn waste_stays_within_its_share_whatever_is_guessed() {
        for hits_in in [1, 2, 3, 5, 1000] {
            let rounds = 20_000;
            let (used, wasted) = play(hits_in, rounds);
            let demand = u64::from(rounds) + used;
            assert!(
                wasted * 100 <= demand * WASTE_PERCENT + 1000,
                "1 in {hits_in}: {wasted} of {demand} wasted"
            );
        }
        let (used, wasted) = play(1, 1000);
        assert!(
            used > 3_900 && wasted == 0,
            "guesses that are always right are soon always allowed: {used}"
        );
        assert!(
            play(1000, 20_000).1 < 100,
            "a class that is never right is soon asked no more"
        );
    }

    #[test]
    fn what_is_out_takes_its_room() {
        let budget = Budget::default();
        (0..1000).for_each(|_| budget.missed());
        assert_eq!(budget.grant(1, 10, 16), 10);
        assert_eq!(budget.grant(2, 10, 16), 6);
        budget.unread(1);
        assert_eq!(budget.grant(2, 10, 16), 1);
    }

    #[test]
    fn classes_are_logarithms() {
        assert_eq!([1, 2, 3, 4, 64, u32::MAX].map(|n| class_of(0, n)), [1, 2, 2, 3, 7, 7]);
        assert_eq!(class_of(REPLAY, 1), REPLAY + 1);
    }
}
