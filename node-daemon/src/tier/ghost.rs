//! What is remembered of units that are not in RAM: how often they were touched, and when.

use super::burst::Heat;

const BUCKET: usize = 4;

/// Units remembered for each one the front holds.
const PER_RESIDENT: usize = 4;

/// One unit: 8 bytes. Count 0 marks an empty cell.
#[derive(Clone, Copy, Default)]
struct Cell {
    fingerprint: u32,
    heat: Heat,
}

/// Cells that are looked at together: half a cache line, and never on two.
#[derive(Clone, Copy, Default)]
#[repr(align(32))]
struct Bucket([Cell; BUCKET]);

/// The table: buckets of four cells, the longest untouched of a bucket gives way.
pub struct Ghost {
    /// A power of two of them.
    buckets: Vec<Bucket>,
}

impl Ghost {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            buckets: vec![Bucket::default(); 16],
        }
    }

    fn at(&self, fingerprint: u32) -> usize {
        fingerprint as usize & (self.buckets.len() - 1)
    }

    fn bucket(&mut self, fingerprint: u32) -> &mut [Cell; BUCKET] {
        let at = self.at(fingerprint);
        &mut self.buckets[at].0
    }

    /// Grows for a front of so many units.
    pub fn make_room(&mut self, units: usize, now: u16) {
        while units * PER_RESIDENT > self.buckets.len() * BUCKET {
            let larger = vec![Bucket::default(); self.buckets.len() * 2];
            for bucket in std::mem::replace(&mut self.buckets, larger) {
                for cell in bucket.0.iter().filter(|c| c.heat.count > 0) {
                    self.insert(*cell, now);
                }
            }
        }
    }

    fn insert(&mut self, new: Cell, now: u16) {
        let age = |c: &Cell| match c.heat.count {
            0 => u32::MAX,
            _ if c.fingerprint == new.fingerprint => u32::MAX,
            _ => now.wrapping_sub(c.heat.stamp).into(),
        };
        let oldest = self.bucket(new.fingerprint).iter_mut().max_by_key(|c| age(c));
        *oldest.expect("a bucket has cells") = new;
    }

    /// Remembers a unit.
    pub fn put(&mut self, key: u64, heat: Heat, now: u16) {
        if heat.count > 0 {
            let fingerprint = (key >> 32) as u32;
            self.insert(Cell { fingerprint, heat }, now);
        }
    }

    /// What is known of a unit; forgets it.
    pub fn take(&mut self, key: u64) -> Heat {
        let fingerprint = (key >> 32) as u32;
        let found = self
            .bucket(fingerprint)
            .iter_mut()
            .find(|c| c.heat.count > 0 && c.fingerprint == fingerprint);
        found.map(std::mem::take).unwrap_or_default().heat
    }

    /// Whether a unit is remembered.
    pub fn knows(&self, key: u64) -> bool {
        let fingerprint = (key >> 32) as u32;
        let bucket = &self.buckets[self.at(fingerprint)].0;
        bucket.iter().any(|c| c.heat.count > 0 && c.fingerprint == fingerprint)
    }

    /// Bytes that the table takes.
    pub fn bytes(&self) -> usize {
        self.buckets.len() * size_of::<Bucket>()
    }
}

const _: () = assert!(size_of::<Cell>() == 8 && size_of::<Bucket>() == 32);
