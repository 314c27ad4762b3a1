//! The policies that the RAM tier is compared with, as their papers describe them. Blocks are numbered densely.

use std::collections::BinaryHeap;

use super::list::Lists;

/// A cache of a fixed number of blocks.
pub trait Cache {
    /// Accesses a block and says whether it was there; lets it in if not.
    fn access(&mut self, block: u32) -> bool;
}

/// Least recently used.
pub struct Lru {
    room: usize,
    list: Lists<1>,
}

impl Lru {
    /// An empty cache.
    pub fn new(room: usize, blocks: usize) -> Self {
        Self {
            room,
            list: Lists::new(blocks),
        }
    }
}

impl Cache for Lru {
    fn access(&mut self, block: u32) -> bool {
        let hit = self.list.of(block).is_some();
        if !hit && self.list.len(0) == self.room {
            self.list.pop(0);
        }
        self.list.push(0, block);
        hit
    }
}

/// ARC (Megiddo and Modha, FAST 2003).
pub struct Arc {
    room: usize,
    /// Target size of T1.
    target: usize,
    lists: Lists<4>,
}

const T1: usize = 0;
const T2: usize = 1;
const B1: usize = 2;
const B2: usize = 3;

impl Arc {
    /// An empty cache.
    pub fn new(room: usize, blocks: usize) -> Self {
        Self {
            room,
            target: 0,
            lists: Lists::new(blocks),
        }
    }

    fn replace(&mut self, in_b2: bool) {
        let t1 = self.lists.len(T1);
        let from_t1 = t1 > 0 && (t1 > self.target || (in_b2 && t1 == self.target));
        let (from, to) = if from_t1 || self.lists.len(T2) == 0 {
            (T1, B1)
        } else {
            (T2, B2)
        };
        if let Some(victim) = self.lists.pop(from) {
            self.lists.push(to, victim);
        }
    }
}

impl Cache for Arc {
    fn access(&mut self, block: u32) -> bool {
        let len = |list| self.lists.len(list);
        match self.lists.of(block) {
            Some(T1 | T2) => {
                self.lists.push(T2, block);
                return true;
            }
            Some(B1) => {
                let step = (len(B2) / len(B1)).max(1);
                self.target = (self.target + step).min(self.room);
                self.replace(false);
                self.lists.push(T2, block);
            }
            Some(_) => {
                let step = (len(B1) / len(B2)).max(1);
                self.target = self.target.saturating_sub(step);
                self.replace(true);
                self.lists.push(T2, block);
            }
            None => {
                let recent = len(T1) + len(B1);
                let all = recent + len(T2) + len(B2);
                if recent == self.room {
                    if len(T1) < self.room {
                        self.lists.pop(B1);
                        self.replace(false);
                    } else {
                        self.lists.pop(T1);
                    }
                } else if all >= self.room {
                    if all == 2 * self.room {
                        self.lists.pop(B2);
                    }
                    self.replace(false);
                }
                self.lists.push(T1, block);
            }
        }
        false
    }
}

/// S3-FIFO (Yang et al., SOSP 2023): a small queue of 10 %, a ghost queue as long as the main one.
pub struct S3Fifo {
    room: usize,
    small: usize,
    lists: Lists<3>,
    uses: Vec<u8>,
}

const SMALL: usize = 0;
const MAIN: usize = 1;
const GHOST: usize = 2;

impl S3Fifo {
    /// An empty cache.
    pub fn new(room: usize, blocks: usize) -> Self {
        Self {
            room,
            small: (room / 10).max(1),
            lists: Lists::new(blocks),
            uses: vec![0; blocks],
        }
    }

    fn evict(&mut self) {
        loop {
            let from_small = self.lists.len(SMALL) >= self.small || self.lists.len(MAIN) == 0;
            let from = if from_small { SMALL } else { MAIN };
            let Some(block) = self.lists.pop(from) else { return };
            let uses = &mut self.uses[block as usize];
            if from_small {
                if *uses > 1 {
                    *uses = 0;
                    self.lists.push(MAIN, block);
                    continue;
                }
                if self.lists.len(GHOST) >= self.room - self.small {
                    self.lists.pop(GHOST);
                }
                if self.room > self.small {
                    self.lists.push(GHOST, block);
                }
            } else if *uses > 0 {
                *uses -= 1;
                self.lists.push(MAIN, block);
                continue;
            }
            return;
        }
    }
}

impl Cache for S3Fifo {
    fn access(&mut self, block: u32) -> bool {
        let uses = &mut self.uses[block as usize];
        let ghost = match self.lists.of(block) {
            Some(SMALL | MAIN) => {
                *uses = (*uses + 1).min(3);
                return true;
            }
            other => other.is_some(),
        };
        *uses = 0;
        self.lists.remove(block);
        while self.lists.len(SMALL) + self.lists.len(MAIN) >= self.room {
            self.evict();
        }
        self.lists.push(if ghost { MAIN } else { SMALL }, block);
        false
    }
}

/// W-TinyLFU (Einziger et al., ACM ToS 2017): a window of 1 %, a segmented LRU behind it, and a frequency filter.
/// The filter counts exactly where the original uses a sketch, so it is the policy at its best.
pub struct WTinyLfu {
    window: usize,
    main: usize,
    protected: usize,
    lists: Lists<3>,
    counts: Vec<u8>,
    accesses: usize,
    age_after: usize,
}

const WINDOW: usize = 0;
const PROBATION: usize = 1;
const PROTECTED: usize = 2;

impl WTinyLfu {
    /// An empty cache.
    pub fn new(room: usize, blocks: usize) -> Self {
        let window = (room / 100).max(1);
        let main = room - window;
        Self {
            window,
            main,
            protected: main * 8 / 10,
            lists: Lists::new(blocks),
            counts: vec![0; blocks],
            accesses: 0,
            age_after: room * 10,
        }
    }

    fn settle(&mut self) {
        if self.lists.len(WINDOW) <= self.window {
            return;
        }
        let Some(candidate) = self.lists.pop(WINDOW) else {
            return;
        };
        if self.lists.len(PROBATION) + self.lists.len(PROTECTED) < self.main {
            self.lists.push(PROBATION, candidate);
            return;
        }
        let from = if self.lists.len(PROBATION) > 0 {
            PROBATION
        } else {
            PROTECTED
        };
        if let Some(victim) = self.lists.oldest(from)
            && self.counts[candidate as usize] > self.counts[victim as usize]
        {
            self.lists.pop(from);
            self.lists.push(PROBATION, candidate);
        }
    }
}

impl Cache for WTinyLfu {
    fn access(&mut self, block: u32) -> bool {
        let count = &mut self.counts[block as usize];
        *count = (*count + 1).min(15);
        self.accesses += 1;
        if self.accesses == self.age_after {
            self.accesses = 0;
            self.counts.iter_mut().for_each(|c| *c /= 2);
        }
        match self.lists.of(block) {
            Some(WINDOW) => self.lists.push(WINDOW, block),
            Some(_) => {
                self.lists.push(PROTECTED, block);
                if self.lists.len(PROTECTED) > self.protected
                    && let Some(old) = self.lists.pop(PROTECTED)
                {
                    self.lists.push(PROBATION, old);
                }
            }
            None => {
                self.lists.push(WINDOW, block);
                self.settle();
                return false;
            }
        }
        true
    }
}

/// LIRS (Jiang and Zhang, SIGMETRICS 2002): 1 % for blocks of high inter-reference recency, the stack bounded to
/// three times the cache.
pub struct Lirs {
    room: usize,
    low_room: usize,
    /// The stack S.
    stack: Lists<1>,
    /// The queue Q of resident HIR blocks, and non-resident ones by age, to bound the stack.
    queues: Lists<2>,
    low: Vec<bool>,
    lows: usize,
}

const Q: usize = 0;
const GONE: usize = 1;

impl Lirs {
    /// An empty cache.
    pub fn new(room: usize, blocks: usize) -> Self {
        let high = (room / 100).max(2).min(room.max(2) - 1);
        Self {
            room,
            low_room: room - high.min(room),
            stack: Lists::new(blocks),
            queues: Lists::new(blocks),
            low: vec![false; blocks],
            lows: 0,
        }
    }

    /// Takes blocks off the bottom of the stack until a LIR block lies there.
    fn prune(&mut self) {
        while let Some(bottom) = self.stack.oldest(0) {
            if self.low[bottom as usize] {
                return;
            }
            self.stack.pop(0);
            if self.queues.of(bottom) == Some(GONE) {
                self.queues.remove(bottom);
            }
        }
    }

    fn demote_bottom(&mut self) {
        if let Some(bottom) = self.stack.pop(0) {
            self.low[bottom as usize] = false;
            self.lows -= 1;
            self.queues.push(Q, bottom);
            self.prune();
        }
    }

    fn raise(&mut self, block: u32) {
        self.low[block as usize] = true;
        self.lows += 1;
        self.queues.remove(block);
        self.stack.push(0, block);
    }
}

impl Cache for Lirs {
    fn access(&mut self, block: u32) -> bool {
        if self.low[block as usize] {
            self.stack.push(0, block);
            self.prune();
            return true;
        }
        let in_stack = self.stack.of(block).is_some();
        if self.queues.of(block) == Some(Q) {
            if in_stack {
                self.raise(block);
                self.demote_bottom();
            } else {
                self.stack.push(0, block);
                self.queues.push(Q, block);
            }
            return true;
        }
        if self.lows < self.low_room {
            self.raise(block);
            return false;
        }
        if self.lows + self.queues.len(Q) >= self.room
            && let Some(victim) = self.queues.pop(Q)
            && self.stack.of(victim).is_some()
        {
            self.queues.push(GONE, victim);
            if self.queues.len(GONE) > 2 * self.room
                && let Some(old) = self.queues.pop(GONE)
            {
                self.stack.remove(old);
            }
        }
        if in_stack && self.stack.of(block).is_some() {
            self.raise(block);
            self.demote_bottom();
        } else {
            self.stack.push(0, block);
            self.queues.push(Q, block);
        }
        false
    }
}

/// Belady's MIN: evicts what is used farthest in the future, which it is told.
pub struct Belady {
    room: usize,
    /// Per access the number of the next one to the same block.
    next: Vec<u32>,
    now: usize,
    /// Per block its next access if it is resident.
    due: Vec<u32>,
    heap: BinaryHeap<(u32, u32)>,
    count: usize,
}

const NEVER: u32 = u32::MAX;
const OUT: u32 = 0;

impl Belady {
    /// An empty cache for exactly these accesses.
    pub fn new(room: usize, blocks: usize, accesses: impl DoubleEndedIterator<Item = u32> + ExactSizeIterator) -> Self {
        let mut next = vec![NEVER; accesses.len()];
        let mut seen = vec![NEVER; blocks];
        for (i, block) in accesses.enumerate().rev() {
            next[i] = std::mem::replace(&mut seen[block as usize], i as u32);
        }
        Self {
            room,
            next,
            now: 0,
            due: vec![OUT; blocks],
            heap: BinaryHeap::new(),
            count: 0,
        }
    }
}

impl Cache for Belady {
    fn access(&mut self, block: u32) -> bool {
        let next = self.next[self.now];
        self.now += 1;
        let hit = self.due[block as usize] != OUT;
        if !hit {
            while self.count == self.room {
                let Some((due, victim)) = self.heap.pop() else { break };
                // Older entries of a block that was used since are void.
                if self.due[victim as usize] == due {
                    self.due[victim as usize] = OUT;
                    self.count -= 1;
                }
            }
            self.count += 1;
        }
        self.due[block as usize] = next;
        self.heap.push((next, block));
        hit
    }
}
