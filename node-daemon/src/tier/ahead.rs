//! Reading ahead, as the tier sees it: what may be guessed, what became of a guess, and the recorded order of misses.
//!
//! The recorded order is the node's, not an image's: a clone boots as its siblings did.

use super::budget::{REPLAY, class_of};
use super::guard::FillToken;
use super::resident::{Key, key_of};
use super::{Filled, LayerHandle, Policy, RamTier, Region, SLOT};

/// Misses remembered for each slot of 64 KiB.
const MISSES_PER_SLOT: u64 = 4;

/// Misses remembered at least and at most: at 16 bytes 1 MiB, and 64 MiB.
const MISSES: (u64, u64) = (1 << 16, 1 << 22);

/// Misses that a tier of `capacity` bytes remembers: a power of two.
pub(super) fn history_misses(capacity: u64) -> usize {
    let wanted = (capacity / SLOT as u64 * MISSES_PER_SLOT).clamp(MISSES.0, MISSES.1);
    1 << wanted.ilog2()
}

/// What a replay asks for: units of some layers, guesses of one class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// The class of the guess.
    pub class: u8,
    /// Layer numbers and units, in the order of their use.
    pub units: Vec<(u32, u32)>,
}

impl LayerHandle {
    /// Whether a [`Replayed`] unit's layer is this one.
    pub fn is_number(self, number: u32) -> bool {
        self.number == number
    }
}

impl RamTier {
    /// Units that may be out at once: half of the front's window.
    fn ahead_room(&self, unit_bytes: u64) -> u32 {
        let window = self.capacity / 100 * u64::from(self.shape().window_percent);
        (window / 2 / unit_bytes).min(u64::from(u32::MAX)) as u32
    }

    /// How many of `count` units a sequential stream that ran for `run` units may read ahead, and their class. Each
    /// must end in [`Self::fill_ahead`] or [`Self::unread`].
    pub fn grant_sequential(&self, run: u32, count: u32, unit_bytes: u64) -> (u8, u32) {
        let class = class_of(0, run);
        if self.front_capacity == 0 {
            return (class, 0);
        }
        (class, self.budget.grant(class, count, self.ahead_room(unit_bytes)))
    }

    /// A unit was read and was not in RAM, or was there only because it was read ahead. Records it, and says what
    /// followed it last time; each of those must end in [`Self::fill_ahead`] or [`Self::unread`].
    pub fn missed(&self, layer: LayerHandle, unit: u32) -> Option<Replayed> {
        if self.front_capacity == 0 {
            return None;
        }
        let mut replayed = None;
        let room = self.ahead_room(layer.unit_bytes());
        let mut history = self.history.lock().expect("history lock");
        history.missed(key_of(layer, unit).name, |keys, count, matches| {
            let class = class_of(REPLAY, matches);
            let granted = self.budget.grant(class, count, room);
            if granted > 0 {
                let unit_of = |key: u64| ((key >> 32) as u32, key as u32);
                let units = keys.take(granted as usize).map(unit_of).collect();
                replayed = Some(Replayed { class, units });
            }
            granted
        });
        replayed
    }

    /// Offers a unit that was read ahead of its use.
    pub fn fill_ahead(&self, layer: LayerHandle, unit: u32, token: FillToken, data: &[u8], class: u8) -> Filled {
        let filled = self.fill_as(layer, unit, token, data, Region::Front, Some(class));
        if filled != Filled::Done {
            self.budget.unread(class, 1);
        }
        filled
    }

    /// `count` units that might have been read ahead were not.
    pub fn unread(&self, class: u8, count: u32) {
        self.budget.unread(class, count);
    }

    /// A unit that is not resident was written: its history knows it, RAM does not.
    pub(super) fn passed_by(&self, layer: LayerHandle, key: Key) {
        // A writer does not wait for the queues; a burst that is not counted is no harm.
        if let Ok(mut policy) = self.policy.try_lock() {
            self.count_passed(&mut policy, layer, key);
        }
    }

    fn count_passed(&self, policy: &mut Policy, layer: LayerHandle, key: Key) {
        if policy.front.passed_by(key.hash, self.residents.clock.now()) {
            self.residents.clock.count(layer.unit_bytes());
        }
    }

    /// A read asks for part of a unit that is not resident, and nothing makes it worth bringing in whole: says whether
    /// the unit is remembered, which does, and remembers it otherwise. The shadows do not hear of it: they stand for
    /// units that come in.
    pub fn pass(&self, layer: LayerHandle, unit: u32) -> bool {
        let key = key_of(layer, unit);
        let mut policy = self.policy();
        if policy.front.remembers(key.hash) {
            return true;
        }
        self.count_passed(&mut policy, layer, key);
        false
    }

    /// Sampled reads so far, and how many of them the tier would have hit without prefetch, as its shadows say.
    pub fn predicted(&self) -> (u64, u64) {
        self.shadows.lock().expect("shadow lock").predicted()
    }

    /// Bytes that do not grow with the number of residents: shadows, recorded misses.
    pub fn fixed_overhead(&self) -> (u64, u64) {
        let shadows = self.shadows.lock().expect("shadow lock").bytes() as u64;
        (shadows, self.history.lock().expect("history lock").bytes() as u64)
    }
}
