//! Exponential decay of scores in integers, so that every machine gets the same number.
//!
//! Scores are stored *forward-decayed*: instead of shrinking every block's score each second, what is added later
//! weighs more (Cormode et al., "Forward decay", ICDE 2009). A stored weight `w` stands for the score
//! `w / 2^((now - landmark) / half_life)`. Two stored weights compare like their scores at any time, so an order by
//! weight never has to be redone because time passed.
//!
//! Invariant: weights stay below 2^63, because the landmark moves up every [`REBASE_HALF_LIVES`] half-lives and all
//! weights are shifted down with it.

use hearth_protocol::HeatScore;
use serde::{Deserialize, Serialize};

/// Half-lives after which the landmark moves. A score of 10 bursts a second under the longest half-life (a week)
/// stays under 2^24 bursts, 2^40 in fixed point: 16 doublings leave 7 bits of room.
pub(crate) const REBASE_HALF_LIVES: u64 = 16;

const STEPS: usize = 256;
const Q: u32 = 32;

/// `2^(i / 256)` in fixed point with 32 fractional bits.
static POW2: [u64; STEPS + 1] = pow2_table();

const fn pow2_table() -> [u64; STEPS + 1] {
    const P: u32 = 60;
    // Eight square roots of two give 2^(1/256).
    let mut root: u128 = 2 << P;
    let mut i = 0;
    while i < 8 {
        root = (root << P).isqrt();
        i += 1;
    }
    let mut table = [0; STEPS + 1];
    let mut value: u128 = 1 << P;
    let mut i = 0;
    while i < STEPS {
        table[i] = (value >> (P - Q)) as u64;
        value = (value * root) >> P;
        i += 1;
    }
    table[STEPS] = 2 << Q;
    table
}

/// A forward-decayed score; compares like the score itself.
pub(crate) type Weight = u64;

/// The heat clock: milliseconds of event time since the log began, and the landmark of all weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DecayClock {
    now_ms: u64,
    landmark_ms: u64,
    half_life_ms: u64,
    /// Doublings since the landmark: whole ones, and the rest as a factor in [1, 2) with 32 fractional bits.
    doublings: u32,
    factor: u64,
    /// `2^95 / factor`, so that reading a weight multiplies instead of dividing.
    inverse: u64,
}

impl DecayClock {
    pub(crate) fn new(half_life_s: u64) -> Self {
        Self {
            now_ms: 0,
            landmark_ms: 0,
            half_life_ms: half_life_s.max(1).saturating_mul(1_000),
            doublings: 0,
            factor: 1 << Q,
            inverse: 1 << 63,
        }
    }

    /// Moves the clock on; returns by how many bits all weights must be shifted down, if the landmark moved.
    #[must_use]
    pub(crate) fn advance(&mut self, by_ms: u64) -> Option<u32> {
        self.now_ms = self.now_ms.saturating_add(by_ms);
        let halves = (self.now_ms - self.landmark_ms) / self.half_life_ms;
        let moved = halves - halves % REBASE_HALF_LIVES;
        self.landmark_ms += moved * self.half_life_ms;
        self.update();
        (moved > 0).then(|| u32::try_from(moved).unwrap_or(u32::MAX))
    }

    /// Puts the landmark at now under another half-life. Every weight must be replaced by its score first.
    pub(crate) fn restart(&mut self, half_life_s: u64) {
        self.half_life_ms = half_life_s.max(1).saturating_mul(1_000);
        self.landmark_ms = self.now_ms;
        self.update();
    }

    fn update(&mut self) {
        let since = self.now_ms - self.landmark_ms;
        self.doublings = u32::try_from(since / self.half_life_ms).expect("fewer than REBASE_HALF_LIVES");
        let rest = u128::from(since % self.half_life_ms);
        // Sixteen bits of the rest of a half-life: eight choose the step, eight interpolate within it.
        let part = (rest << 16) / u128::from(self.half_life_ms);
        let (step, within) = ((part >> 8) as usize, (part & 0xff) as u64);
        let (low, high) = (POW2[step], POW2[step + 1]);
        self.factor = low + (((high - low) * within) >> 8);
        self.inverse = ((1u128 << 95) / u128::from(self.factor)) as u64;
    }

    /// The weight of a score that is earned now.
    pub(crate) fn weight(&self, score: HeatScore) -> Weight {
        let scaled = ((u128::from(score.0) * u128::from(self.factor)) >> Q) << self.doublings;
        u64::try_from(scaled).unwrap_or(u64::MAX >> 1).min(u64::MAX >> 1)
    }

    /// The score that a weight stands for now.
    pub(crate) fn score(&self, weight: Weight) -> HeatScore {
        let whole = (u128::from(weight) * u128::from(self.inverse)) >> 63;
        HeatScore((whole >> self.doublings) as u64)
    }
}

/// A weight after the landmark moved up by `bits` doublings.
pub(crate) fn shifted(weight: Weight, bits: u32) -> Weight {
    weight.checked_shr(bits).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(half_life_s: u64, after_ms: u64, bursts: u64, expect: u64) {
        let mut clock = DecayClock::new(half_life_s);
        let mut weight = clock.weight(HeatScore::whole(bursts));
        if let Some(bits) = clock.advance(after_ms) {
            weight = shifted(weight, bits);
        }
        let got = clock.score(weight).0;
        assert!(got.abs_diff(expect) <= expect / 5_000 + 1, "{got} against {expect}");
    }

    #[test]
    fn a_score_halves_every_half_life() {
        check(3_600, 0, 8, 8 << 16);
        check(3_600, 3_600_000, 8, 4 << 16);
        check(3_600, 3 * 3_600_000, 8, 1 << 16);
        check(3_600, 1_800_000, 8, 370_728);
        check(1, 17_000, 1_000_000, (1_000_000 << 16) >> 17);
        check(1, u64::MAX / 2, 1_000_000, 0);
    }

    #[test]
    fn what_is_earned_now_reads_back_at_any_time() {
        let mut clock = DecayClock::new(7);
        for step in [1, 999, 6_000, 7_001, 100_000, 123_456_789] {
            let _ = clock.advance(step);
            let score = HeatScore::whole(37);
            let got = clock.score(clock.weight(score)).0;
            assert!(got.abs_diff(score.0) <= 1, "{got}");
        }
    }
}
