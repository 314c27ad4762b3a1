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

/// The table: buckets of four cells, the longest untouched of a bucket gives way.
pub struct Ghost {
    cells: Vec<Cell>,
}

impl Ghost {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            cells: vec![Cell::default(); 64],
        }
    }

    fn bucket_start(&self, fingerprint: u32) -> usize {
        (fingerprint as usize % (self.cells.len() / BUCKET)) * BUCKET
    }

    fn bucket(&mut self, fingerprint: u32) -> &mut [Cell] {
        let start = self.bucket_start(fingerprint);
        &mut self.cells[start..start + BUCKET]
    }

    /// Grows for a front of so many units.
    pub fn make_room(&mut self, units: usize, now: u16) {
        while units * PER_RESIDENT > self.cells.len() {
            let larger = vec![Cell::default(); self.cells.len() * 2];
            for cell in std::mem::replace(&mut self.cells, larger) {
                if cell.heat.count > 0 {
                    self.insert(cell, now);
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
        let start = self.bucket_start(fingerprint);
        let bucket = &self.cells[start..start + BUCKET];
        bucket.iter().any(|c| c.heat.count > 0 && c.fingerprint == fingerprint)
    }

    /// Bytes that the table takes.
    pub fn bytes(&self) -> usize {
        self.cells.len() * size_of::<Cell>()
    }
}

const _: () = assert!(size_of::<Cell>() == 8);
