//! The front: a window that newcomers pass through, and a kept queue that they enter only if they were touched in
//! more bursts than what would leave for them.
//!
//! It takes the frequency filter of W-TinyLFU (Einziger et al., 2017), the FIFO queues with one mark of S3-FIFO (Yang
//! et al., 2023), so that a hit moves nothing, and the correlation window of Clock2Q+; counts outlive a unit's stay in
//! a ghost table. `docs/adr/0004` has what each part was worth.

use super::burst::Heat;
use super::front::{FrontPolicy, Marks};
use super::ghost::Ghost;

/// Units of the kept queue that are given a second chance before one leaves all the same.
const CHANCES: usize = 64;

/// Times that a unit read ahead may pass the window again unused: its reader may be slow.
const ROUNDS: u8 = 3;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    None,
    Window,
    Kept,
}

#[derive(Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

/// Per id: its queue, the logarithm of its size, and its rounds.
#[derive(Clone, Copy)]
struct Tag {
    queue: Queue,
    log: u8,
    rounds: u8,
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
pub struct BurstFront {
    links: Vec<Link>,
    tags: Vec<Tag>,
    window: List,
    kept: List,
    window_percent: u8,
    ghost: Ghost,
}

impl BurstFront {
    /// A policy whose window is so many percent of the front.
    pub fn new(window_percent: u8) -> Self {
        Self {
            links: Vec::new(),
            tags: Vec::new(),
            window: EMPTY,
            kept: EMPTY,
            window_percent,
            ghost: Ghost::new(),
        }
    }

    fn list(&mut self, queue: Queue) -> &mut List {
        match queue {
            Queue::Window => &mut self.window,
            Queue::Kept => &mut self.kept,
            Queue::None => unreachable!("an id in no queue has no list"),
        }
    }

    fn push(&mut self, id: u32, queue: Queue) {
        let bytes = 1usize << self.tags[id as usize].log;
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
        self.tags[id as usize].queue = queue;
    }

    fn unlink(&mut self, id: u32) {
        let Tag { queue, log, .. } = self.tags[id as usize];
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
        self.tags[id as usize].queue = Queue::None;
    }

    fn move_to(&mut self, id: u32, queue: Queue) {
        self.unlink(id);
        self.push(id, queue);
    }

    /// The unit of the kept queue that would leave next.
    fn kept_victim(&mut self, marks: &mut dyn Marks) -> Option<u32> {
        for _ in 0..CHANCES {
            let id = self.kept.head;
            if id == NONE {
                return None;
            }
            if !marks.take_touched(id) {
                return Some(id);
            }
            self.move_to(id, Queue::Kept);
        }
        Some(self.kept.head)
    }

    fn leave(&mut self, id: u32, marks: &mut dyn Marks) -> Option<u32> {
        self.unlink(id);
        self.ghost.put(marks.key(id), marks.heat(id), marks.now());
        Some(id)
    }
}

impl FrontPolicy for BurstFront {
    fn recall(&mut self, key: u64) -> Heat {
        self.ghost.take(key)
    }

    fn admitted(&mut self, id: u32, bytes: usize, now: u16) {
        let at = id as usize;
        if self.links.len() <= at {
            let none = Link {
                previous: NONE,
                next: NONE,
            };
            self.links.resize(at + 1, none);
            let none = Tag {
                queue: Queue::None,
                log: 0,
                rounds: 0,
            };
            self.tags.resize(at + 1, none);
        }
        assert!(self.tags[at].queue == Queue::None, "unit {id} is admitted twice");
        self.tags[at].log = bytes.ilog2() as u8;
        self.tags[at].rounds = 0;
        self.push(id, Queue::Window);
        self.ghost.make_room(self.window.count + self.kept.count, now);
    }

    fn passed_by(&mut self, key: u64, now: u16) -> bool {
        let heat = self.ghost.take(key);
        let touched = heat.touched(now);
        self.ghost.put(key, touched.unwrap_or(heat), now);
        touched.is_some()
    }

    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32> {
        let room = self.window.bytes + self.kept.bytes;
        let window_max = room / 100 * usize::from(self.window_percent);
        // Each step moves a unit out of the window, clears a mark or uses up a round; marks that readers set meanwhile
        // buy two more rounds at most.
        let mut patience = (2 + usize::from(ROUNDS)) * (self.window.count + self.kept.count);
        loop {
            let id = self.window.head;
            patience = patience.saturating_sub(1);
            if patience == 0 && id != NONE {
                return self.leave(id, marks);
            }
            if id == NONE || (self.window.bytes < window_max && self.kept.head != NONE) {
                let victim = self.kept_victim(marks)?;
                return self.leave(victim, marks);
            }
            if marks.is_ahead(id) {
                let rounds = &mut self.tags[id as usize].rounds;
                if *rounds < ROUNDS && self.window.bytes > window_max / 2 {
                    *rounds += 1;
                    self.move_to(id, Queue::Window);
                    continue;
                }
                return self.leave(id, marks);
            }
            let touched = marks.take_touched(id);
            // Room that the kept queue has not filled yet is given away unasked, in whole units.
            if self.kept.bytes + window_max + (1 << self.tags[id as usize].log) <= room {
                self.move_to(id, Queue::Kept);
                continue;
            }
            let Some(rival) = self.kept_victim(marks) else {
                return self.leave(id, marks);
            };
            let now = marks.now();
            if marks.heat(id).quarters(now) > marks.heat(rival).quarters(now) {
                self.move_to(id, Queue::Kept);
                return self.leave(rival, marks);
            }
            if touched {
                self.move_to(id, Queue::Window);
                continue;
            }
            return self.leave(id, marks);
        }
    }

    fn removed(&mut self, id: u32) {
        self.unlink(id);
    }

    fn set_window(&mut self, percent: u8) {
        self.window_percent = percent;
    }

    fn overhead_bytes(&self) -> (usize, usize) {
        (
            self.links.len() * size_of::<Link>() + self.tags.len() * size_of::<Tag>(),
            self.ghost.bytes(),
        )
    }
}
