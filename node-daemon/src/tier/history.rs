//! History prefetch: replays the order in which misses followed each other last time. Boots, batch jobs and table
//! scans repeat; what they read is seldom sequential on the disk.
//!
//! One ring of units in the order in which they were missed (or would have been: the first use of a unit read ahead
//! counts), and an index from a unit to its last place in the ring. A miss that was seen before starts a *replay*
//! there; while the misses go on as recorded, the replay reads ahead, further with each match.
//!
//! Pure: knows no disk and no clock. Memory: 12 bytes per recorded miss, allocated as they come.

/// Replays followed at once.
const REPLAYS: usize = 8;

/// A miss this far from where a replay stands still belongs to it: guests' threads change places.
const SLACK: u64 = 8;

/// Largest distance read ahead, in units.
const DISTANCE_MAX: u32 = 64;

/// Index cells in a row that are looked at.
const PROBES: usize = 4;

#[derive(Debug, Clone, Copy, Default)]
struct Replay {
    /// Ring position that should come next.
    next: u64,
    /// Positions before this one were asked for.
    ahead: u64,
    /// Misses that came as recorded.
    matches: u32,
    /// Misses recorded when it was last of use; 0 for none.
    used_at: u64,
}

/// The recorded order. Keys are (layer, unit) as the tier names them.
pub struct History {
    ring: Vec<u64>,
    capacity: usize,
    /// Keys recorded so far; the newest stands at `count - 1`.
    count: u64,
    /// Low 32 bits of position + 1 per cell, 0 for none; twice the ring's cells. Verified against the ring.
    index: Vec<u32>,
    replays: [Replay; REPLAYS],
}

fn spread(key: u64) -> usize {
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24) as usize
}

impl History {
    /// Remembers the last `capacity` misses, at least 64.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: Vec::new(),
            capacity: capacity.clamp(64, 1 << 28),
            count: 0,
            index: vec![0; 128],
            replays: [Replay::default(); REPLAYS],
        }
    }

    fn at(&self, position: u64) -> u64 {
        self.ring[(position % self.capacity as u64) as usize]
    }

    fn oldest(&self) -> u64 {
        self.count - self.ring.len() as u64
    }

    /// Whole position of an index cell, if the ring still holds it.
    fn position(&self, cell: u32) -> Option<u64> {
        let low = cell.checked_sub(1)?;
        let back = (self.count as u32).wrapping_sub(low);
        let position = self.count.checked_sub(u64::from(back))?;
        (back > 0 && position >= self.oldest()).then_some(position)
    }

    fn find(&self, key: u64) -> Option<u64> {
        let mask = self.index.len() - 1;
        (0..PROBES).find_map(|i| {
            let position = self.position(self.index[(spread(key) + i) & mask])?;
            (self.at(position) == key).then_some(position)
        })
    }

    fn put(&mut self, key: u64, position: u64) {
        let mask = self.index.len() - 1;
        let mut best = (u64::MAX, 0);
        for i in 0..PROBES {
            let at = (spread(key) + i) & mask;
            let age = match self.position(self.index[at]) {
                Some(held) if self.at(held) == key => 0,
                Some(held) => held + 1,
                None => 0,
            };
            if age < best.0 {
                best = (age, at);
            }
        }
        self.index[best.1] = position.wrapping_add(1) as u32;
    }

    fn record(&mut self, key: u64) {
        if self.ring.len() < self.capacity {
            self.ring.push(key);
        } else {
            self.ring[(self.count % self.capacity as u64) as usize] = key;
        }
        let position = self.count;
        self.count += 1;
        if self.ring.len() * 2 > self.index.len() && self.index.len() < self.capacity.next_power_of_two() {
            self.index = vec![0; self.index.len() * 2];
            for position in self.oldest()..self.count {
                self.put(self.at(position), position);
            }
        } else {
            self.put(key, position);
        }
    }

    /// A unit was missed. Gives what to read ahead to `want`, with the number of misses that came as recorded; it
    /// answers how many of the units it was given it takes.
    pub fn missed(&mut self, key: u64, mut want: impl FnMut(&mut dyn Iterator<Item = u64>, u32, u32) -> u32) {
        let found = self.find(key);
        self.record(key);
        let Some(found) = found else { return };
        let follows = |r: &Replay| r.used_at > 0 && found + SLACK >= r.next && found <= r.ahead.max(r.next) + SLACK;
        let at = match self.replays.iter().position(follows) {
            Some(at) => {
                let replay = &mut self.replays[at];
                replay.matches += 1;
                replay.next = replay.next.max(found + 1);
                at
            }
            None => {
                let oldest = (0..REPLAYS).min_by_key(|i| self.replays[*i].used_at);
                let at = oldest.expect("there are replays");
                self.replays[at] = Replay {
                    next: found + 1,
                    ahead: found + 1,
                    matches: 1,
                    used_at: 0,
                };
                at
            }
        };
        self.replays[at].used_at = self.count;
        let mut replay = self.replays[at];
        let distance = u64::from((2 * replay.matches).min(DISTANCE_MAX));
        replay.ahead = replay.ahead.max(replay.next);
        if replay.ahead - replay.next <= distance / 2 {
            let end = (replay.next + distance).min(self.count - 1);
            if replay.ahead < end {
                let from = replay.ahead.max(self.oldest());
                let count = end.saturating_sub(from) as u32;
                let mut units = (from..end).map(|p| self.at(p));
                let taken = want(&mut units, count, replay.matches);
                replay.ahead = from + u64::from(taken.min(count));
            }
        }
        self.replays[at] = replay;
    }

    /// Bytes it holds now, and at most per recorded miss.
    pub fn bytes(&self) -> usize {
        self.ring.capacity() * size_of::<u64>() + self.index.len() * size_of::<u32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays misses and returns what was read ahead at each.
    fn play(history: &mut History, misses: &[u64]) -> Vec<Vec<u64>> {
        let one = |key: &u64| {
            let mut asked = Vec::new();
            history.missed(*key, |units, count, _| {
                asked.extend(units.take(count as usize));
                count
            });
            asked
        };
        misses.iter().map(one).collect()
    }

    #[test]
    fn the_second_time_it_reads_ahead_in_the_recorded_order() {
        let mut history = History::new(1000);
        let boot: Vec<u64> = (0..100u64).map(super::super::mix).collect();
        assert!(play(&mut history, &boot).iter().all(Vec::is_empty));
        let asked: Vec<u64> = play(&mut history, &boot).concat();
        assert_eq!(asked[..99], boot[1..], "once each, in order");
    }

    #[test]
    fn threads_that_change_places_do_not_end_a_replay() {
        let mut history = History::new(1000);
        let recorded: Vec<u64> = (1..200).collect();
        play(&mut history, &recorded);
        let mut swapped = recorded.clone();
        swapped.chunks_mut(2).for_each(|pair| pair.reverse());
        let asked = play(&mut history, &swapped).concat();
        assert!(asked.len() > 180, "{}", asked.len());
    }

    #[test]
    fn it_forgets_the_oldest_and_stays_within_its_bytes() {
        let mut history = History::new(1000);
        for round in 0..50u64 {
            let misses: Vec<u64> = (0..700).map(|i| super::super::mix(round * 700 + i)).collect();
            assert!(play(&mut history, &misses).concat().is_empty());
        }
        assert!(
            history.bytes() <= 16 * 1024,
            "{} bytes for 1000 misses",
            history.bytes()
        );
        let last: Vec<u64> = (0..700).map(|i| super::super::mix(49 * 700 + i)).collect();
        assert!(play(&mut history, &last).concat().len() > 600);
    }
}
