//! S3-FIFO (Yang et al., SOSP 2023) over the front: a small queue for newcomers, a kept queue for what was read
//! again, one reference bit, and a ghost table of what left the small queue unread.

use super::front::{FrontPolicy, Marks};

/// Part of the front that newcomers may fill before the first of them must leave, in percent.
const SMALL_PERCENT: usize = 25;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    None,
    Small,
    Kept,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

#[derive(Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
    bytes: usize,
    count: usize,
}

const EMPTY: List = List {
    head: NONE,
    tail: NONE,
    bytes: 0,
    count: 0,
};

/// The policy.
pub struct S3Fifo {
    links: Vec<Link>,
    /// Per id: its queue and the logarithm of its size.
    tags: Vec<(Queue, u8)>,
    small: List,
    kept: List,
    small_bytes_max: usize,
    ghost: Ghost,
}

impl S3Fifo {
    /// A policy for a front of `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            links: Vec::new(),
            tags: Vec::new(),
            small: EMPTY,
            kept: EMPTY,
            small_bytes_max: capacity / 100 * SMALL_PERCENT,
            ghost: Ghost::new(),
        }
    }

    fn list(&mut self, queue: Queue) -> &mut List {
        match queue {
            Queue::Small => &mut self.small,
            Queue::Kept => &mut self.kept,
            Queue::None => unreachable!("an id in no queue has no list"),
        }
    }

    fn push(&mut self, id: u32, queue: Queue) {
        let bytes = 1usize << self.tags[id as usize].1;
        let list = self.list(queue);
        let tail = list.tail;
        list.tail = id;
        list.bytes += bytes;
        list.count += 1;
        if tail == NONE {
            list.head = id;
        } else {
            self.links[tail as usize].next = id;
        }
        self.links[id as usize] = Link {
            previous: tail,
            next: NONE,
        };
        self.tags[id as usize].0 = queue;
    }

    fn unlink(&mut self, id: u32) {
        let (queue, log) = self.tags[id as usize];
        let Link { previous, next } = self.links[id as usize];
        if previous != NONE {
            self.links[previous as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
        let list = self.list(queue);
        if list.head == id {
            list.head = next;
        }
        if list.tail == id {
            list.tail = previous;
        }
        list.bytes -= 1 << log;
        list.count -= 1;
        self.tags[id as usize].0 = Queue::None;
    }
}

impl FrontPolicy for S3Fifo {
    fn admitted(&mut self, id: u32, key: u64, bytes: usize) {
        let at = id as usize;
        if self.links.len() <= at {
            let none = Link {
                previous: NONE,
                next: NONE,
            };
            self.links.resize(at + 1, none);
            self.tags.resize(at + 1, (Queue::None, 0));
        }
        assert!(self.tags[at].0 == Queue::None, "unit {id} is admitted twice");
        self.tags[at].1 = bytes.ilog2() as u8;
        let window = self.small.count + self.kept.count;
        self.ghost.make_room(window);
        let queue = if self.ghost.take(key, window) {
            Queue::Kept
        } else {
            Queue::Small
        };
        self.push(id, queue);
    }

    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32> {
        // Each step clears a mark or ends; marks set meanwhile by readers are given two rounds at most.
        let mut patience = 2 * (self.small.count + self.kept.count) + 1;
        loop {
            let from_small =
                self.kept.head == NONE || (self.small.bytes > self.small_bytes_max && self.small.head != NONE);
            let id = if from_small { self.small.head } else { self.kept.head };
            if id == NONE {
                return None;
            }
            self.unlink(id);
            patience = patience.saturating_sub(1);
            if marks.take_touched(id) && patience > 0 {
                self.push(id, Queue::Kept);
                continue;
            }
            if from_small {
                self.ghost.put(marks.key(id));
            }
            return Some(id);
        }
    }

    fn removed(&mut self, id: u32) {
        self.unlink(id);
    }

    fn overhead_bytes(&self) -> (usize, usize) {
        (
            self.links.len() * size_of::<Link>() + self.tags.len() * size_of::<(Queue, u8)>(),
            self.ghost.cells.len() * size_of::<Cell>(),
        )
    }
}

/// What left the small queue unread, with the time it did, counted in departures. Two cells of 8 bytes per entry.
struct Ghost {
    cells: Vec<Cell>,
    now: u32,
}

/// Fingerprint 0 marks an empty cell; a key with that fingerprint is not remembered.
#[derive(Clone, Copy, Default)]
struct Cell {
    fingerprint: u32,
    left_at: u32,
}

const BUCKET: usize = 4;

impl Ghost {
    fn new() -> Self {
        Self {
            cells: vec![Cell::default(); 64],
            now: 0,
        }
    }

    fn bucket(&mut self, fingerprint: u32) -> &mut [Cell] {
        let start = (fingerprint as usize % (self.cells.len() / BUCKET)) * BUCKET;
        &mut self.cells[start..start + BUCKET]
    }

    /// Keeps two cells for each of `window` entries.
    fn make_room(&mut self, window: usize) {
        if window * 2 <= self.cells.len() {
            return;
        }
        let larger = vec![Cell::default(); self.cells.len() * 2];
        let old = std::mem::replace(&mut self.cells, larger);
        old.into_iter().for_each(|cell| self.insert(cell));
    }

    fn insert(&mut self, new: Cell) {
        let now = self.now;
        let age = |c: &Cell| {
            if c.fingerprint == 0 {
                u32::MAX
            } else {
                now.wrapping_sub(c.left_at)
            }
        };
        let oldest = self.bucket(new.fingerprint).iter_mut().max_by_key(|c| age(c));
        *oldest.expect("a bucket has cells") = new;
    }

    fn put(&mut self, key: u64) {
        self.now = self.now.wrapping_add(1);
        self.insert(Cell {
            fingerprint: (key >> 32) as u32,
            left_at: self.now,
        });
    }

    /// Whether the key left within the last `window` departures; forgets it.
    fn take(&mut self, key: u64, window: usize) -> bool {
        let (now, fingerprint) = (self.now, (key >> 32) as u32);
        let found = self.bucket(fingerprint).iter_mut().find(|c| {
            c.fingerprint == fingerprint && fingerprint != 0 && now.wrapping_sub(c.left_at) as usize <= window.max(16)
        });
        found.map(|cell| *cell = Cell::default()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    struct Marked<'a> {
        keys: &'a [u64],
        touched: &'a mut HashSet<u32>,
    }

    impl Marks for Marked<'_> {
        fn take_touched(&mut self, id: u32) -> bool {
            self.touched.remove(&id)
        }

        fn key(&self, id: u32) -> u64 {
            self.keys[id as usize]
        }
    }

    /// Plays accesses to numbered units against a front of `room` units and counts hits.
    fn hits(room: usize, accesses: impl Iterator<Item = u64>) -> usize {
        const UNIT: usize = 64 << 10;
        let mut policy = S3Fifo::new(room * UNIT);
        let mut at = std::collections::HashMap::new();
        let mut keys = vec![0; room];
        let mut free: Vec<u32> = (0..room as u32).collect();
        let mut marks = HashSet::new();
        let mut hits = 0;
        for unit in accesses {
            let key = super::super::mix(unit);
            if let Some(id) = at.get(&key) {
                hits += 1;
                marks.insert(*id);
                continue;
            }
            let id = free.pop().unwrap_or_else(|| {
                let id = policy
                    .victim(&mut Marked {
                        keys: &keys,
                        touched: &mut marks,
                    })
                    .unwrap();
                at.remove(&keys[id as usize]);
                id
            });
            keys[id as usize] = key;
            at.insert(key, id);
            policy.admitted(id, key, UNIT);
        }
        hits
    }

    #[test]
    fn a_scan_does_not_wash_out_what_is_read_again() {
        // A hot set of 40 units read in turns with a long scan that never repeats.
        let mixed = (0..20_000u64).map(|i| if i % 2 == 0 { i / 2 % 40 } else { 1_000 + i });
        let hot_reads = 10_000;
        assert!(hits(100, mixed) > hot_reads * 9 / 10);
    }

    #[test]
    fn everything_fits_when_there_is_room() {
        assert_eq!(hits(50, (0..1_000u64).map(|i| i % 50)), 950);
    }
}
