//! Which parts of the arena are free.
//!
//! The arena is cut into slots of 64 KiB. A slot holds one unit of 64 KiB, or several smaller units of one size:
//! images with small blocks keep RAM dense, and a slot that becomes empty can serve any size. Blocks above 64 KiB
//! are kept as several units.

/// Bytes in a slot, and the largest unit.
pub const SLOT: usize = 64 << 10;

/// Smallest unit, in bytes.
pub const PAGE: usize = 4 << 10;

const CLASSES: usize = (SLOT / PAGE).ilog2() as usize + 1;

/// Place of a unit in the arena, in pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(pub u32);

impl Place {
    /// The first byte.
    pub fn offset(self) -> usize {
        self.0 as usize * PAGE
    }
}

/// The free parts.
pub struct Slots {
    free: Vec<u32>,
    /// Per slot one bit for each unit in use.
    used: Vec<u16>,
    /// Per class the slots that are neither full nor empty, in any order.
    partial: [Vec<u32>; CLASSES],
    /// Per slot its place in `partial`, while it stands there.
    partial_at: Vec<u32>,
}

fn class_of(bytes: usize) -> usize {
    assert!(
        bytes.is_power_of_two() && (PAGE..=SLOT).contains(&bytes),
        "no unit has {bytes} bytes"
    );
    (bytes / PAGE).ilog2() as usize
}

impl Slots {
    /// `count` free slots.
    pub fn new(count: u32) -> Self {
        Self {
            free: (0..count).rev().collect(),
            used: vec![0; count as usize],
            partial: Default::default(),
            partial_at: vec![0; count as usize],
        }
    }

    fn list(&mut self, class: usize, slot: u32) {
        self.partial_at[slot as usize] = self.partial[class].len() as u32;
        self.partial[class].push(slot);
    }

    fn unlist(&mut self, class: usize, slot: u32) {
        let at = self.partial_at[slot as usize];
        let list = &mut self.partial[class];
        list.swap_remove(at as usize);
        if let Some(moved) = list.get(at as usize) {
            self.partial_at[*moved as usize] = at;
        }
    }

    /// Takes room for a unit of `bytes`, or says that there is none.
    pub fn take(&mut self, bytes: usize) -> Option<Place> {
        let class = class_of(bytes);
        let units = (SLOT / bytes) as u32;
        let slot = match self.partial[class].last() {
            Some(slot) => *slot,
            None => self.free.pop()?,
        };
        let used = &mut self.used[slot as usize];
        let unit = used.trailing_ones();
        *used |= 1 << unit;
        match used.count_ones() {
            1 if units > 1 => self.list(class, slot),
            all if all == units && units > 1 => self.unlist(class, slot),
            _ => {}
        }
        Some(Place(slot * (SLOT / PAGE) as u32 + unit * (bytes / PAGE) as u32))
    }

    /// Gives a unit's room back.
    pub fn give(&mut self, place: Place, bytes: usize) {
        let class = class_of(bytes);
        let pages = (SLOT / PAGE) as u32;
        let slot = place.0 / pages;
        let unit = place.0 % pages / (bytes / PAGE) as u32;
        let used = &mut self.used[slot as usize];
        assert!(*used & 1 << unit != 0, "unit {unit} of slot {slot} is freed twice");
        let before = used.count_ones();
        *used &= !(1 << unit);
        let units = (SLOT / bytes) as u32;
        if before == 1 {
            if units > 1 {
                self.unlist(class, slot);
            }
            self.free.push(slot);
        } else if before == units {
            self.list(class, slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn units_never_overlap_and_all_room_comes_back(ops in prop::collection::vec((0usize..5, any::<u16>(), any::<bool>()), 1..300)) {
            let mut slots = Slots::new(8);
            let mut held: Vec<(Place, usize)> = Vec::new();
            for (class, pick, free) in ops {
                if free && !held.is_empty() {
                    let (place, bytes) = held.swap_remove(pick as usize % held.len());
                    slots.give(place, bytes);
                } else if let Some(place) = slots.take(PAGE << class) {
                    let bytes = PAGE << class;
                    prop_assert!(place.offset() + bytes <= 8 * SLOT);
                    for (other, len) in &held {
                        prop_assert!(place.offset() + bytes <= other.offset() || other.offset() + len <= place.offset());
                    }
                    held.push((place, bytes));
                }
            }
            for (place, bytes) in held {
                slots.give(place, bytes);
            }
            prop_assert!((0..8).all(|_| slots.take(SLOT).is_some()) && slots.take(PAGE).is_none());
        }
    }
}
