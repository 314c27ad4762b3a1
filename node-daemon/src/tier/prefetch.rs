//! Sequential prefetch: finds streams in one image's reads and says which units to read ahead of them.
//!
//! Pure: knows no disk and no clock. A stream is read ahead a quarter as far as it has run, so that a short run risks
//! little and a long one is never caught up with; half of the distance is read at a time, so that requests below are
//! large. Whether a guess is worth its risk is the budget's question.

use std::ops::Range;

/// Streams followed at once per image: a guest with more concurrent sequential readers falls back to plain misses.
const STREAMS: usize = 16;

/// Largest distance, in units: 4 MiB of 64 KiB units covers 5 ms of latency at 800 MB/s.
const DISTANCE_MAX: u32 = 64;

/// Units that a stream must have run for each unit read ahead of it. Files end without notice: what was read past the
/// end is at most this share of what was wanted, so that a boot storm reads little more than its boot set.
const RUN_PER_AHEAD: u32 = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// Units before this one were asked for.
    ahead: u32,
    run: u32,
}

/// Follows a few streams of ascending reads. What every read is compared with stands apart, close together.
#[derive(Debug, Default)]
pub struct Sequential {
    /// Per stream the unit that continues it.
    next: [u32; STREAMS],
    /// Per stream when it went on last.
    used_at: [u64; STREAMS],
    streams: [Stream; STREAMS],
    /// Streams begun so far, up to all of them.
    begun: usize,
    now: u64,
}

impl Sequential {
    /// A read touched units `first..=last`. Answers with units to read ahead, none of which it named for the same
    /// stream before. `grant` is asked with the stream's run and a number of units, and says how many it allows.
    pub fn observe(&mut self, first: u32, last: u32, grant: impl FnOnce(u32, u32) -> u32) -> Range<u32> {
        self.now += 1;
        if let Some(at) = self.continued(first) {
            self.used_at[at] = self.now;
            let next = &mut self.next[at];
            if last < *next {
                return 0..0;
            }
            let stream = &mut self.streams[at];
            stream.run += last + 1 - *next;
            *next = last + 1;
            return stream.advance(*next, grant);
        }
        let at = if self.begun < STREAMS {
            self.begun += 1;
            self.begun - 1
        } else {
            let oldest = (0..STREAMS).min_by_key(|at| self.used_at[*at]);
            oldest.expect("there are streams")
        };
        self.next[at] = last + 1;
        self.used_at[at] = self.now;
        self.streams[at] = Stream {
            ahead: last + 1,
            run: 1,
        };
        0..0
    }

    /// The stream that a read goes on with: it begins in the stream's last unit, or right after it, or skips one.
    fn continued(&self, first: u32) -> Option<usize> {
        let mut found = 0u32;
        for (at, next) in self.next.iter().enumerate() {
            let near = first.wrapping_add(1).wrapping_sub(*next) <= 2;
            found |= u32::from(near) << at;
        }
        let found = found & ((1 << self.begun) - 1);
        (found != 0).then_some(found.trailing_zeros() as usize)
    }
}

impl Stream {
    fn advance(&mut self, next: u32, grant: impl FnOnce(u32, u32) -> u32) -> Range<u32> {
        if self.run < RUN_PER_AHEAD {
            return 0..0;
        }
        let distance = (self.run / RUN_PER_AHEAD).min(DISTANCE_MAX);
        self.ahead = self.ahead.max(next);
        if self.ahead - next > distance / 2 {
            return 0..0;
        }
        let from = self.ahead;
        let count = next.saturating_add(distance).saturating_sub(from);
        self.ahead = from + grant(self.run, count).min(count);
        from..self.ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(_: u32, count: u32) -> u32 {
        count
    }

    #[test]
    fn a_stream_is_read_ahead_once_and_without_gaps() {
        let mut prefetch = Sequential::default();
        let mut asked = Vec::new();
        for unit in 100..400 {
            asked.extend(prefetch.observe(unit, unit, all));
        }
        assert!(asked.windows(2).all(|w| w[1] == w[0] + 1), "{asked:?}");
        assert_eq!(asked[0], 104, "four units in a row start the stream");
        assert!((400..=400 + DISTANCE_MAX).contains(asked.last().unwrap()));
    }

    #[test]
    fn several_streams_and_repeated_reads_within_a_unit_are_followed() {
        let mut prefetch = Sequential::default();
        let mut asked = 0;
        for step in 0..64u32 {
            for stream in 0..6u32 {
                for _ in 0..4 {
                    let unit = stream * 10_000 + step;
                    asked += prefetch.observe(unit, unit, all).len();
                }
            }
        }
        assert!((6 * 60..=6 * 80).contains(&asked), "{asked}");
    }

    #[test]
    fn little_is_read_past_the_end_of_files() {
        for length in 1..=200u32 {
            let mut prefetch = Sequential::default();
            let end = 1_000 + length;
            let past: u32 = (1_000..end)
                .flat_map(|unit| prefetch.observe(unit, unit, all))
                .filter(|unit| *unit >= end)
                .count() as u32;
            assert!(past <= length / 4, "{past} units past the end of {length}");
        }
    }

    #[test]
    fn random_reads_cause_next_to_nothing() {
        let mut prefetch = Sequential::default();
        let asked: usize = (0..10_000u64)
            .map(|i| {
                let unit = (super::super::mix(i) % 100_000) as u32;
                prefetch.observe(unit, unit, all).len()
            })
            .sum();
        assert!(asked < 100, "{asked}");
    }

    #[test]
    fn what_was_not_granted_is_asked_for_again() {
        let mut prefetch = Sequential::default();
        (0..20).for_each(|unit| assert!(prefetch.observe(unit, unit, |_, _| 0).is_empty()));
        assert_eq!(prefetch.observe(20, 20, all), 21..26);
    }
}
