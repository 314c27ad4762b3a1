//! S3-FIFO (Yang et al., SOSP 2023) over the front: a small queue for newcomers, a kept queue for what was read
//! again, one reference bit, and a ghost table of what left the small queue unread.

use super::front::FrontPolicy;

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
    keys: Vec<u64>,
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
            keys: Vec::new(),
            small: EMPTY,
            kept: EMPTY,
            small_bytes_max: capacity / 100 * SMALL_PERCENT,
            ghost: Ghost::new(capacity / (16 << 10)),
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
            self.keys.resize(at + 1, 0);
        }
        assert!(self.tags[at].0 == Queue::None, "unit {id} is admitted twice");
        self.tags[at].1 = bytes.ilog2() as u8;
        self.keys[at] = key;
        let window = self.small.count + self.kept.count;
        let queue = if self.ghost.take(key, window) {
            Queue::Kept
        } else {
            Queue::Small
        };
        self.push(id, queue);
    }

    fn victim(&mut self, touched: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
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
            if touched(id) && patience > 0 {
                self.push(id, Queue::Kept);
                continue;
            }
            if from_small {
                self.ghost.put(self.keys[id as usize]);
            }
            return Some(id);
        }
    }

    fn removed(&mut self, id: u32) {
        self.unlink(id);
    }

    fn overhead_bytes(&self) -> usize {
        self.links.len() * size_of::<Link>()
            + self.tags.len() * size_of::<(Queue, u8)>()
            + self.keys.len() * size_of::<u64>()
            + self.ghost.cells.len() * size_of::<u64>()
    }
}

/// Fingerprints of what left, with the time they did, counted in departures. 8 bytes each, two cells per entry.
struct Ghost {
    cells: Vec<u64>,
    now: u32,
}

const BUCKET: usize = 4;

impl Ghost {
    fn new(entries: usize) -> Self {
        Self {
            cells: vec![0; (entries * 2).next_power_of_two().max(64)],
            now: 1,
        }
    }

    fn bucket(&self, key: u64) -> std::ops::Range<usize> {
        let start = (key as usize % (self.cells.len() / BUCKET)) * BUCKET;
        start..start + BUCKET
    }

    fn put(&mut self, key: u64) {
        self.now = self.now.wrapping_add(1);
        let (now, range) = (self.now, self.bucket(key));
        let cell = self.cells[range]
            .iter_mut()
            .max_by_key(|c| now.wrapping_sub(**c as u32))
            .expect("a bucket has cells");
        *cell = key & !0xffff_ffff | u64::from(now);
    }

    /// Whether the key left within the last `window` departures; forgets it.
    fn take(&mut self, key: u64, window: usize) -> bool {
        let (now, range) = (self.now, self.bucket(key));
        let found = self.cells[range]
            .iter_mut()
            .find(|c| **c != 0 && **c >> 32 == key >> 32 && (now.wrapping_sub(**c as u32) as usize) <= window.max(16));
        match found {
            Some(cell) => {
                *cell = 0;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

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
                let id = policy.victim(&mut |id| marks.remove(&id)).unwrap();
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
