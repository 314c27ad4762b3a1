//! How often a unit is read, counted in bursts: touches that follow each other closely are one burst, because counts
//! inside a moment say nothing about the next hour (POLICY, "correlation window").
//!
//! Time is measured in bursts too: the clock of a tier ticks 32 times while as many bytes are touched anew as the tier
//! holds. So a tier of any size under any load ages its counts at the pace at which it turns over, and no clock is
//! read. Stamps have 16 bits: they tell ages apart up to 2,048 turnovers.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Ticks in which as many bytes are touched anew as the tier holds.
pub const TICKS_PER_TURNOVER: u64 = 32;

/// A touch less than half a turnover after the last counted one belongs to the same burst.
const CORRELATED_TICKS: u16 = 16;

/// A count halves for every 8 turnovers since its last burst.
const HALF_LIFE_TICKS: u16 = 256;

/// Largest count.
pub const COUNT_MAX: u8 = 15;

/// The clock.
pub struct BurstClock {
    bytes: AtomicU64,
    tick: AtomicU32,
    /// Bytes at which the next tick begins.
    next: AtomicU64,
    bytes_per_tick: u64,
}

impl BurstClock {
    /// The clock of a tier of `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        let bytes_per_tick = (capacity / TICKS_PER_TURNOVER).max(1);
        Self {
            bytes: AtomicU64::new(0),
            tick: AtomicU32::new(0),
            next: AtomicU64::new(bytes_per_tick),
            bytes_per_tick,
        }
    }

    /// The current tick.
    #[inline]
    pub fn now(&self) -> u16 {
        self.tick.load(Ordering::Relaxed) as u16
    }

    /// Goes on as the clock of a tier of half the capacity, at the same tick.
    pub fn halve(&mut self) {
        self.bytes_per_tick = (self.bytes_per_tick / 2).max(1);
        let tick = u64::from(self.tick.load(Ordering::Relaxed));
        self.bytes.store(tick * self.bytes_per_tick, Ordering::Relaxed);
        self.next.store((tick + 1) * self.bytes_per_tick, Ordering::Relaxed);
    }

    /// A unit of so many bytes was touched anew.
    #[inline]
    pub fn count(&self, bytes: u64) {
        let bytes = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if bytes >= self.next.load(Ordering::Relaxed) {
            let tick = bytes / self.bytes_per_tick;
            self.tick.store(tick as u32, Ordering::Relaxed);
            self.next.store((tick + 1) * self.bytes_per_tick, Ordering::Relaxed);
        }
    }
}

/// Bursts of one unit, and the tick of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Heat {
    /// At most [`COUNT_MAX`].
    pub count: u8,
    /// When it was counted last.
    pub stamp: u16,
}

impl Heat {
    /// What the count is worth now, in quarters, so that one burst outlives two half-lives.
    pub fn quarters(self, now: u16) -> u32 {
        let halves = now.wrapping_sub(self.stamp) / HALF_LIFE_TICKS;
        (u32::from(self.count) * 4).checked_shr(halves.into()).unwrap_or(0)
    }

    /// With a touch now; `None` if it belongs to the last burst.
    #[inline]
    pub fn touched(self, now: u16) -> Option<Self> {
        let fresh = self.count == 0 || now.wrapping_sub(self.stamp) >= CORRELATED_TICKS;
        fresh.then(|| self.counted(now))
    }

    /// With one more burst.
    pub fn counted(self, now: u16) -> Self {
        Self {
            count: ((self.quarters(now) / 4) as u8 + 1).min(COUNT_MAX),
            stamp: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touches_close_together_are_one_burst_and_old_ones_fade() {
        let first = Heat::default().touched(7).unwrap();
        assert_eq!(first, Heat { count: 1, stamp: 7 });
        assert_eq!(first.touched(7 + CORRELATED_TICKS - 1), None);
        let second = first.touched(7 + CORRELATED_TICKS).unwrap();
        assert_eq!(second.count, 2);
        assert_eq!(second.quarters(second.stamp), 8);
        assert_eq!(second.quarters(second.stamp + HALF_LIFE_TICKS), 4);
        assert_eq!(second.quarters(second.stamp.wrapping_add(40 * HALF_LIFE_TICKS)), 0);
        assert_eq!(second.counted(second.stamp + 3 * HALF_LIFE_TICKS).count, 1);
        let wrapped = Heat {
            count: 3,
            stamp: u16::MAX,
        };
        assert_eq!(wrapped.touched(CORRELATED_TICKS).unwrap().count, 4);
    }

    #[test]
    fn the_clock_ticks_32_times_a_turnover() {
        let clock = BurstClock::new(3200);
        (0..32).for_each(|_| clock.count(100));
        assert_eq!(clock.now(), 32);
    }
}
