//! Shadow simulation: what a front of another shape would have hit, on a sample of the units.
//!
//! No shape wins everywhere (POLICY §4): little RAM wants a large window, much wants a small one; some loads reward
//! counting, others only recency. So fronts without bytes follow a sample of the units, chosen by hash, one of each
//! shape; the real front takes the shape of the one that hits most. What they hit is what the tier would hit without
//! a main region and without prefetch: it tells whether the main region earns its room, and it is what the account of
//! prefetch is measured by.
//!
//! Memory is bounded by [`SAMPLE_BYTES`] and [`SAMPLE_SMALL_UNITS`], however large the tier is and however small its units:
//! shadows that grow beyond go on with half of the sample (Waldspurger et al., SHARDS, FAST 2015). Locked on sampled
//! accesses only.

use hashbrown::HashTable;

use super::burst::{BurstClock, Heat};
use super::front::{FrontPolicy, Marks, Shape};
use super::front_burst::BurstFront;

/// RAM that each shadow pretends to have, at most: 4,096 units of 64 KiB.
const SAMPLE_BYTES: u64 = 256 << 20;

/// Units smaller than this are small.
const SMALL_BYTES: u64 = 32 << 10;

/// Small units that each shadow holds, at most: more of them tell little more, and each sampled access costs as much as
/// an access.
const SAMPLE_SMALL_UNITS: usize = 2560;

/// The shapes tried.
pub const SHAPES: [Shape; 3] = [
    Shape {
        window_percent: 10,
        duel: true,
    },
    Shape {
        window_percent: 90,
        duel: true,
    },
    Shape {
        window_percent: 10,
        duel: false,
    },
];

/// Sampled accesses between two decisions.
const DECIDE_EVERY: u32 = 256;

/// The lead that makes the tier change its shape, in accesses per thousand of what is remembered, where a shadow holds
/// [`LEAD_UNITS`] or fewer. With more it is less, as the root of their number: so does the noise shrink.
const LEAD_PERMILLE: i64 = 20;
const LEAD_UNITS: usize = 512;

/// A change of shape costs the front what it kept in the old one, and that is read again: the lead, in hits of 64 KiB
/// each, must be this part of what a shadow holds, in bytes. Small units hardly feel it.
const LEAD_PAYS: i64 = 6;

/// What is remembered fades by this part with each decision: some 16,000 sampled accesses count.
const FADE: i64 = 64;

struct Entry {
    key: u64,
    heat: Heat,
    touched: bool,
    log: u8,
}

struct Entries {
    all: Vec<Entry>,
    now: u16,
}

impl Marks for Entries {
    fn take_touched(&mut self, id: u32) -> bool {
        std::mem::take(&mut self.all[id as usize].touched)
    }

    fn key(&self, id: u32) -> u64 {
        self.all[id as usize].key
    }

    fn heat(&self, id: u32) -> Heat {
        self.all[id as usize].heat
    }

    fn is_ahead(&self, _: u32) -> bool {
        false
    }

    fn now(&self) -> u16 {
        self.now
    }
}

/// One front without bytes.
struct Replica {
    front: BurstFront,
    table: HashTable<u32>,
    entries: Entries,
    free: Vec<u32>,
    clock: BurstClock,
    bytes: u64,
    capacity: u64,
}

impl Replica {
    fn new(capacity: u64, shape: Shape) -> Self {
        Self {
            front: BurstFront::new(shape),
            table: HashTable::new(),
            entries: Entries {
                all: Vec::new(),
                now: 0,
            },
            free: Vec::new(),
            clock: BurstClock::new(capacity),
            bytes: 0,
            capacity,
        }
    }

    fn access(&mut self, key: u64, log: u8, read: bool) -> bool {
        let bytes = 1u64 << log;
        let now = self.clock.now();
        self.entries.now = now;
        let all = &mut self.entries.all;
        if let Some(id) = self.table.find(key, |id| all[*id as usize].key == key) {
            let entry = &mut all[*id as usize];
            if let Some(heat) = entry.heat.touched(now) {
                entry.heat = heat;
                entry.touched = true;
                self.clock.count(bytes);
            }
            return true;
        }
        if !read {
            if self.front.passed_by(key, now) {
                self.clock.count(bytes);
            }
            return false;
        }
        while self.bytes + bytes > self.capacity {
            let Some(id) = self.front.choose(&mut self.entries) else {
                return false;
            };
            self.drop_entry(id);
        }
        self.clock.count(bytes);
        let remembered = self.front.recall(key);
        let entry = Entry {
            key,
            heat: remembered.counted(now),
            touched: false,
            log,
        };
        let id = self.free.pop().unwrap_or(self.entries.all.len() as u32);
        match self.entries.all.get_mut(id as usize) {
            Some(place) => *place = entry,
            None => self.entries.all.push(entry),
        }
        let all = &self.entries.all;
        self.table.insert_unique(key, id, |id| all[*id as usize].key);
        self.bytes += bytes;
        self.front.admitted(id, bytes as usize, now, remembered);
        false
    }

    /// Forgets a unit that the front has let go.
    fn drop_entry(&mut self, id: u32) {
        let gone = &self.entries.all[id as usize];
        self.bytes -= 1 << gone.log;
        if let Ok(found) = self.table.find_entry(gone.key, |other| *other == id) {
            found.remove();
        }
        self.free.push(id);
    }

    /// Whether it holds more units than a sampled access should cost.
    fn is_large(&self) -> bool {
        let units = self.table.len();
        units > SAMPLE_SMALL_UNITS && self.bytes < units as u64 * SMALL_BYTES
    }

    /// Goes on with half of the capacity, and those units only that stay in the sample.
    fn halve(&mut self, stays: impl Fn(u64) -> bool) {
        self.capacity /= 2;
        self.clock.halve();
        let all = &self.entries.all;
        let out: Vec<u32> = self
            .table
            .iter()
            .copied()
            .filter(|id| !stays(all[*id as usize].key))
            .collect();
        for id in out {
            self.front.removed(id);
            self.drop_entry(id);
        }
        while self.bytes > self.capacity {
            let id = self.front.choose(&mut self.entries).expect("what has bytes has units");
            self.drop_entry(id);
        }
    }
}

/// The same for what is said of the main region, which must answer soon.
const FADE_LATELY: i64 = 4;

/// What a decision says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Advice {
    /// The better shape, by its place in [`SHAPES`].
    pub shape: u8,
    /// Sampled reads in a thousand that the better shadow hit and the tier did not; negative if the tier hit more.
    pub missed_permille: i64,
    /// Units sampled from now on; see [`Shadows::sampled_below`].
    pub sampled_below: u32,
}

/// The shadows.
pub struct Shadows {
    replicas: [Replica; 3],
    sampled_below: u32,
    /// Sampled reads, and hits of each replica; faded.
    reads: i64,
    hits: [i64; 3],
    /// The last few decisions' reads, and how many the better shadow hit and the tier did not; faded faster.
    lately: [i64; 2],
    since: u32,
    better: usize,
    /// Sampled reads so far, and how many of them the shadow of the tier's shape hit.
    predicted: (u64, u64),
}

impl Shadows {
    /// Shadows of a tier of `capacity` bytes, which begins with the first shape.
    pub fn new(capacity: u64) -> Self {
        let sample = capacity.min(SAMPLE_BYTES);
        Self {
            replicas: SHAPES.map(|shape| Replica::new(sample, shape)),
            sampled_below: Self::sampled_below(capacity),
            reads: 0,
            hits: [0; 3],
            lately: [0; 2],
            since: 0,
            predicted: (0, 0),
            better: 0,
        }
    }

    /// Of 65,536 units those that are sampled at first, by [`Self::is_sampled`].
    pub fn sampled_below(capacity: u64) -> u32 {
        (SAMPLE_BYTES.saturating_mul(1 << 16) / capacity.max(1)).clamp(1, 1 << 16) as u32
    }

    /// Whether a unit of this hash is sampled.
    #[inline]
    pub fn is_sampled(hash: u64, sampled_below: u32) -> bool {
        u32::from((hash >> 16) as u16) < sampled_below
    }

    /// Halves the sample if a shadow holds too many small units.
    fn halve_if_large(&mut self) {
        if self.sampled_below < 2 || !self.replicas.iter().any(Replica::is_large) {
            return;
        }
        self.sampled_below /= 2;
        let below = self.sampled_below;
        for replica in &mut self.replicas {
            replica.halve(|key| Self::is_sampled(key, below));
        }
        // So that a read counts for as many before and after.
        self.predicted = (self.predicted.0 / 2, self.predicted.1 / 2);
    }

    /// A sampled unit was read or written; `hit` says whether the tier had it by demand. Says whether the tier's
    /// shadow had it, and gives advice now and then.
    pub fn access(&mut self, key: u64, log: u8, read: bool, hit: bool) -> (bool, Option<Advice>) {
        let mut better_hit = false;
        for (i, replica) in self.replicas.iter_mut().enumerate() {
            let found = replica.access(key, log, read) && read;
            self.hits[i] += i64::from(found);
            if i == self.better {
                better_hit = found;
                self.predicted.0 += u64::from(read);
                self.predicted.1 += u64::from(found);
                self.lately[1] += i64::from(found) - i64::from(hit && read);
            }
        }
        self.reads += i64::from(read);
        self.lately[0] += i64::from(read);
        self.since += 1;
        if self.since < DECIDE_EVERY {
            return (better_hit, None);
        }
        self.since = 0;
        let best = (0..SHAPES.len()).max_by_key(|i| self.hits[*i]).unwrap_or(0);
        let lead = self.hits[best] - self.hits[self.better];
        let units = self.replicas[best].table.len().max(LEAD_UNITS) as i64;
        let pays = (lead * LEAD_PAYS) << 16 >= self.replicas[best].bytes as i64;
        // The squares of lead and limit, times the number of units.
        if pays && lead.pow(2) * units > (self.reads * LEAD_PERMILLE / 1000).pow(2) * LEAD_UNITS as i64 {
            self.better = best;
        }
        self.halve_if_large();
        let advice = Advice {
            sampled_below: self.sampled_below,
            shape: self.better as u8,
            missed_permille: self.lately[1] * 1000 / self.lately[0].max(1),
        };
        for sum in self.hits.iter_mut().chain([&mut self.reads]) {
            *sum -= *sum / FADE;
        }
        for sum in &mut self.lately {
            *sum -= *sum / FADE_LATELY;
        }
        (better_hit, Some(advice))
    }

    /// Sampled reads so far, and how many of them the shadow of the tier's shape hit.
    pub fn predicted(&self) -> (u64, u64) {
        self.predicted
    }

    /// Bytes that the shadows take.
    pub fn bytes(&self) -> usize {
        let one = |r: &Replica| {
            let (residents, ghosts) = r.front.overhead_bytes();
            residents + ghosts + r.table.allocation_size() + r.entries.all.capacity() * size_of::<Entry>()
        };
        self.replicas.iter().map(one).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 64 << 10;

    fn advice(units: u64, accesses: impl Iterator<Item = u64>) -> (Advice, [i64; 3]) {
        let mut shadows = Shadows::new(units * UNIT);
        let last = accesses
            .filter_map(|unit| shadows.access(super::super::mix(unit), 16, true, false).1)
            .last();
        (last.expect("enough accesses for a decision"), shadows.hits)
    }

    /// Hot units read in turns with a scan want a small window, units that are read twice at some distance and never
    /// again a larger one; when other units become hot every now and then, counts of the past mislead.
    #[test]
    fn the_best_shape_is_found() {
        let hot = (0..40_000u64).map(|i| if i % 4 == 0 { i / 4 % 80 } else { 1_000 + i });
        assert_eq!(advice(100, hot).0.shape, 0);
        let twice = (0..40_000u64).map(|i| if i % 2 == 0 { i } else { (i - 1).saturating_sub(60) });
        assert_ne!(
            advice(100, twice).0.shape,
            0,
            "both other shapes keep a window as large as it needs"
        );
        let moving = (0..40_000u64).map(|i| {
            if i % 2 == 0 {
                100_000 + i / 2_000 * 100 + i / 2 % 70
            } else {
                1_000 + i
            }
        });
        assert_eq!(advice(100, moving).0.shape, 2);
    }

    #[test]
    fn a_tier_that_hits_less_than_its_shadow_is_told_so() {
        let (advice, _) = advice(100, (0..4_000u64).map(|i| i % 50));
        assert!(advice.missed_permille > 900, "{advice:?}");
    }

    #[test]
    fn a_large_tier_is_sampled() {
        assert_eq!(Shadows::sampled_below(1 << 20), 1 << 16);
        assert_eq!(Shadows::sampled_below(32 << 30), (1 << 16) / 128);
        let mut shadows = Shadows::new(1 << 40);
        for i in 0..200_000u64 {
            shadows.access(super::super::mix(i), 16, true, false);
        }
        assert!(shadows.bytes() < 1 << 20, "{} bytes", shadows.bytes());
    }

    /// Small units: the sample is halved until the shadows hold no more than they may, and still says what a front of
    /// the tier's size hits.
    #[test]
    fn a_tier_of_small_units_is_sampled_less() {
        let small = SAMPLE_BYTES >> 12;
        let mut shadows = Shadows::new(SAMPLE_BYTES);
        let mut below = Shadows::sampled_below(SAMPLE_BYTES);
        // Three quarters of the reads go to units that fit, a quarter to ones that never come again.
        for i in 0..40 * small {
            let unit = if i % 4 == 0 {
                1_000_000 + i
            } else {
                i * 7_919 % (small / 2)
            };
            let key = super::super::mix(unit);
            if Shadows::is_sampled(key, below)
                && let (_, Some(advice)) = shadows.access(key, 12, true, false)
            {
                below = advice.sampled_below;
            }
        }
        // Halved until as many units as a shadow may hold stand for those of the whole tier.
        let halvings = (small as usize).div_ceil(SAMPLE_SMALL_UNITS).next_power_of_two();
        assert_eq!(below, (1 << 16) / halvings as u32);
        let held = shadows.replicas.iter().map(|r| r.table.len()).max().unwrap();
        assert!(
            (SAMPLE_SMALL_UNITS / 2..=SAMPLE_SMALL_UNITS).contains(&held),
            "{held} units"
        );
        let (reads, hits) = shadows.predicted();
        let percent = hits * 100 / reads;
        assert!((70..=75).contains(&percent), "{percent} % of {reads}");
    }
}
