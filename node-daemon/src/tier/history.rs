//! History prefetch: replays the order in which misses followed each other last time. Boots, batch jobs and table
//! scans repeat; what they read is seldom sequential on the disk.
//!
//! One ring of units in the order in which they were missed (or would have been: the first use of a unit read ahead
//! counts), and an index from a unit to its last place in the ring. A miss that was seen before starts a *replay*
//! there; while the misses go on as recorded, the replay reads ahead, further with each match.
//!
//! Pure: knows no disk and no clock. Memory: 12 bytes per recorded miss, allocated as they come. A miss costs the lines
//! of the index that it looks at and, if the unit was recorded before, one of the ring: index cells carry a tag.

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

/// An index cell: 24 low bits of a position in the ring, and above them a tag of the key that stands there. 0 is none.
#[derive(Clone, Copy, Default)]
struct Cell(u32);

const POSITION_BITS: u32 = 24;
const POSITION_MASK: u32 = (1 << POSITION_BITS) - 1;

/// Misses recorded at most: a quarter of the positions that a cell can tell apart, so that cells that were left behind
/// are told from new ones.
const CAPACITY_MAX: usize = 1 << (POSITION_BITS - 2);

impl Cell {
    fn new(spread: u64, position: u64) -> Self {
        Self(Self::tag(spread) << POSITION_BITS | (position as u32 & POSITION_MASK))
    }

    fn tag(spread: u64) -> u32 {
        (spread >> 56) as u32 | 1
    }

    fn has_tag(self, spread: u64) -> bool {
        self.0 >> POSITION_BITS == Self::tag(spread)
    }

    fn position(self) -> u32 {
        self.0 & POSITION_MASK
    }
}

/// The recorded order. Keys are (layer, unit) as the tier names them.
pub struct History {
    ring: Vec<u64>,
    /// A power of two.
    capacity: usize,
    /// Keys recorded so far; the newest stands at `count - 1`.
    count: u64,
    /// A power of two of them; verified against the ring.
    index: Vec<Cell>,
    replays: [Replay; REPLAYS],
}

fn spread(key: u64) -> u64 {
    key.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl History {
    /// Remembers the last `capacity` misses, rounded up to a power of two, at least 64.
    pub fn new(capacity: usize) -> Self {
        Self {
            ring: Vec::new(),
            capacity: capacity.clamp(64, CAPACITY_MAX).next_power_of_two(),
            count: 0,
            index: vec![Cell::default(); 128],
            replays: [Replay::default(); REPLAYS],
        }
    }

    fn at(&self, position: u64) -> u64 {
        self.ring[position as usize & (self.capacity - 1)]
    }

    fn oldest(&self) -> u64 {
        self.count - self.ring.len() as u64
    }

    /// How many misses ago an index cell's key was recorded, if the ring still holds it; at least 1.
    fn back(&self, cell: Cell) -> Option<u64> {
        let back = u64::from((self.count as u32).wrapping_sub(cell.position()) & POSITION_MASK);
        (cell.0 != 0 && back > 0 && back <= self.ring.len() as u64).then_some(back)
    }

    /// The cells of a key.
    fn cells(&self, spread: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.index.len() - 1;
        (0..PROBES).map(move |i| ((spread >> 24) as usize + i) & mask)
    }

    /// Where a key was recorded last: the cell that says so, and the position.
    fn find(&self, key: u64, spread: u64) -> Option<(usize, u64)> {
        self.cells(spread).find_map(|at| {
            let cell = self.index[at];
            if !cell.has_tag(spread) {
                return None;
            }
            let position = self.count - self.back(cell)?;
            (self.at(position) == key).then_some((at, position))
        })
    }

    /// The cell of a key that gives way to a new one: an empty one, or the oldest.
    fn oldest_cell(&self, spread: u64) -> usize {
        let age = |at: &usize| self.back(self.index[*at]).unwrap_or(u64::MAX);
        self.cells(spread).max_by_key(age).expect("a key has cells")
    }

    /// Records a miss that was recorded before in `cell`, if anywhere.
    fn record(&mut self, key: u64, spread_key: u64, cell: Option<usize>) {
        let position = self.count;
        let at = cell.unwrap_or_else(|| self.oldest_cell(spread_key));
        self.index[at] = Cell::new(spread_key, position);
        if self.ring.len() < self.capacity {
            self.ring.push(key);
        } else {
            let capacity = self.capacity as u64;
            self.ring[(position & (capacity - 1)) as usize] = key;
        }
        self.count += 1;
        if self.ring.len() * 2 > self.index.len() && self.index.len() < self.capacity {
            self.index = vec![Cell::default(); self.index.len() * 2];
            for position in self.oldest()..self.count {
                let key = self.at(position);
                let spread = spread(key);
                let at = self.find(key, spread).map(|(at, _)| at);
                let at = at.unwrap_or_else(|| self.oldest_cell(spread));
                self.index[at] = Cell::new(spread, position);
            }
        }
    }

    /// A unit was missed. Gives what to read ahead to `want`, with the number of misses that came as recorded; it
    /// answers how many of the units it was given it takes.
    pub fn missed(&mut self, key: u64, mut want: impl FnMut(&mut dyn Iterator<Item = u64>, u32, u32) -> u32) {
        let spread = spread(key);
        let found = self.find(key, spread);
        self.record(key, spread, found.map(|(cell, _)| cell));
        let Some((_, found)) = found else { return };
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
        self.ring.capacity() * size_of::<u64>() + self.index.len() * size_of::<Cell>()
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
