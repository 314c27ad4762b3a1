//! Policies as data: what the log records and a decision names.

use serde::{Deserialize, Serialize};

/// The tier policy's numbers (POLICY "Design that the measurements recommend").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierPolicy {
    /// False leaves the main regions as they are: nothing is promoted or demoted.
    pub enabled: bool,
    /// Seconds in which a block's score halves without new bursts.
    pub half_life_s: u64,
    /// A candidate displaces a resident only at this percentage of its score or more (≥ 100).
    pub margin_percent: u64,
    /// Least score, in whole bursts, that is worth a promotion.
    pub threshold_bursts: u64,
    /// Bytes a node may be told to promote per second.
    pub promote_bytes_per_s_max: u64,
    /// Score, in hundredths of a burst, under which a resident is demoted though nobody wants its place.
    pub demote_below_centibursts: u64,
    /// Bytes a node may have ordered and unfinished.
    pub in_flight_bytes_max: u64,
}

impl Default for TierPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            half_life_s: 3_600,
            margin_percent: 150,
            threshold_bursts: 2,
            promote_bytes_per_s_max: 64 << 20,
            demote_below_centibursts: 25,
            in_flight_bytes_max: 256 << 20,
        }
    }
}

impl TierPolicy {
    /// Says what is wrong with the numbers, if anything.
    ///
    /// # Errors
    /// One sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=604_800).contains(&self.half_life_s) {
            return Err(format!("half_life_s is {}, use 1 to 604800 (a week)", self.half_life_s));
        }
        if !(100..=10_000).contains(&self.margin_percent) {
            return Err(format!("margin_percent is {}, use 100 to 10000", self.margin_percent));
        }
        if !(1..=1_000_000).contains(&self.threshold_bursts) {
            return Err(format!(
                "threshold_bursts is {}, use 1 to 1000000",
                self.threshold_bursts
            ));
        }
        Ok(())
    }
}
