//! Sequential prefetch: finds streams in one image's reads and says which units to read ahead of them.
//!
//! Pure: knows no disk and no clock. The distance doubles while a stream goes on, from `DISTANCE_MIN` up to what
//! [`ahead_max`] and the stream's length so far allow; half of it is read ahead at a time, so that requests below are large and the reader never
//! catches up with them.

use std::ops::Range;

/// Streams followed at once per image: a guest with more concurrent sequential readers falls back to plain misses.
const STREAMS: usize = 8;

/// First distance of a new stream, in units.
const DISTANCE_MIN: u32 = 2;

/// Largest distance, in units: 4 MiB of 64 KiB units covers 5 ms of latency at 800 MB/s.
const DISTANCE_MAX: u32 = 64;

/// Units that a stream must have run for each unit read ahead of it. Files end without notice: what was read past the
/// end is at most this share of what was wanted, so that a boot storm reads little more than its boot set.
const RUN_PER_AHEAD: u32 = 4;

/// Says which units to read ahead. One implementation per file.
pub trait Prefetch: Send {
    /// A read touched units `first..=last`. Answers with units to read ahead, none of which it named for the same
    /// stream before. `distance_max` is in units.
    fn observe(&mut self, first: u32, last: u32, distance_max: u32) -> Range<u32>;
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The unit that continues it.
    next: u32,
    /// Units before this one were asked for.
    ahead: u32,
    run: u32,
    distance: u32,
    used_at: u64,
}

/// Follows a few streams of ascending reads.
#[derive(Debug, Default)]
pub struct Sequential {
    streams: [Stream; STREAMS],
    now: u64,
}

impl Prefetch for Sequential {
    fn observe(&mut self, first: u32, last: u32, distance_max: u32) -> Range<u32> {
        self.now += 1;
        let now = self.now;
        // A read that begins in the stream's last unit, or right after it, or skips one, goes on with it.
        let continues = |s: &&mut Stream| s.used_at > 0 && first + 1 >= s.next && first <= s.next.saturating_add(1);
        if let Some(stream) = self.streams.iter_mut().find(continues) {
            stream.used_at = now;
            if last < stream.next {
                return 0..0;
            }
            stream.run += last + 1 - stream.next;
            stream.next = last + 1;
            return stream.advance(distance_max);
        }
        let oldest = self.streams.iter_mut().min_by_key(|s| s.used_at);
        *oldest.expect("there are streams") = Stream {
            next: last + 1,
            ahead: last + 1,
            run: 1,
            distance: DISTANCE_MIN,
            used_at: now,
        };
        0..0
    }
}

impl Stream {
    fn advance(&mut self, distance_max: u32) -> Range<u32> {
        let proven = self.run / RUN_PER_AHEAD;
        let distance = self.distance.min(distance_max).min(DISTANCE_MAX).min(proven);
        if distance == 0 {
            return 0..0;
        }
        self.ahead = self.ahead.max(self.next);
        if self.ahead - self.next > distance / 2 {
            return 0..0;
        }
        let from = self.ahead;
        self.ahead = self.next.saturating_add(distance);
        self.distance = (self.distance * 2).min(DISTANCE_MAX);
        from..self.ahead
    }
}

/// How far streams may be read ahead, in units: an eighth of the front, less when many units went unused.
pub fn ahead_max(front_units: u64, used: u64, wasted: u64) -> u32 {
    let room = (front_units / 8).min(DISTANCE_MAX.into()) as u32;
    // The first waste says little: count it against some imagined uses.
    let used = used + 64;
    (u64::from(room) * used / (used + wasted)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_read_ahead_once_and_without_gaps() {
        let mut prefetch = Sequential::default();
        let mut asked = Vec::new();
        for unit in 100..400 {
            asked.extend(prefetch.observe(unit, unit, 16));
        }
        assert!(asked.windows(2).all(|w| w[1] == w[0] + 1), "{asked:?}");
        assert_eq!(asked[0], 104, "four units in a row start the stream");
        assert!((400..=416).contains(asked.last().unwrap()));
    }

    #[test]
    fn several_streams_and_repeated_reads_within_a_unit_are_followed() {
        let mut prefetch = Sequential::default();
        let mut asked = 0;
        for step in 0..64u32 {
            for stream in 0..6u32 {
                for _ in 0..4 {
                    asked += prefetch
                        .observe(stream * 10_000 + step, stream * 10_000 + step, 8)
                        .len();
                }
            }
        }
        assert!((6 * 60..=6 * 72).contains(&asked), "{asked}");
    }

    #[test]
    fn little_is_read_past_the_end_of_files() {
        for length in 1..=200u32 {
            let mut prefetch = Sequential::default();
            let end = 1_000 + length;
            let past: u32 = (1_000..end)
                .flat_map(|unit| prefetch.observe(unit, unit, 64))
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
                prefetch.observe(unit, unit, 32).len()
            })
            .sum();
        assert!(asked < 100, "{asked}");
    }

    #[test]
    fn waste_shortens_the_distance() {
        assert_eq!(ahead_max(256, 0, 0), 32);
        assert!(ahead_max(256, 1_000, 9_000) < 5);
        assert_eq!(ahead_max(4, 0, 0), 0);
        assert_eq!(Sequential::default().observe(1, 1, 0), 0..0);
    }
}
