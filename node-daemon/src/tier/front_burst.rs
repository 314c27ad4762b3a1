//! The front: a window that newcomers pass through, and a kept queue that they enter only if they were touched in
//! more bursts than what would leave for them.
//!
//! Where recency says more than counting, the duel is left out: then it is S3-FIFO with bursts for touches.
//!
//! It takes the frequency filter of W-TinyLFU (Einziger et al., 2017), the FIFO queues with one mark of S3-FIFO (Yang
//! et al., 2023), so that a hit moves nothing, and the correlation window of Clock2Q+; counts outlive a unit's stay in
//! a ghost table. `docs/adr/0004` has what each part was worth.

use super::burst::{Heat, TICKS_PER_TURNOVER};
use super::front::{FrontPolicy, Marks, Shape};
use super::ghost::Ghost;
use super::slots::PAGE;

/// Units of the kept queue that are given a second chance before one leaves all the same.
const CHANCES: usize = 64;

/// Times that a unit read ahead may pass the window again unused: its reader may be slow.
const ROUNDS: u8 = 3;

/// Without a duel: a unit whose last burst began at most two turnovers ago came back soon.
const SOON_TICKS: u16 = 2 * TICKS_PER_TURNOVER as u16;

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

/// Per id: its queue in the low two bits, its rounds in the next two, and above them its size as a shift of [`PAGE`].
#[derive(Clone, Copy)]
struct Tag(u8);

impl Tag {
    fn of(bytes: usize) -> Self {
        Self(((bytes / PAGE).ilog2() as u8) << 4)
    }

    fn queue(self) -> Queue {
        match self.0 & 3 {
            0 => Queue::None,
            1 => Queue::Window,
            _ => Queue::Kept,
        }
    }

    fn set_queue(&mut self, queue: Queue) {
        self.0 = self.0 & !3 | queue as u8;
    }

    fn bytes(self) -> usize {
        PAGE << (self.0 >> 4)
    }

    /// Counts one more round; false if it has had them all.
    fn next_round(&mut self) -> bool {
        let more = self.0 >> 2 & 3 < ROUNDS;
        self.0 += u8::from(more) << 2;
        more
    }
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
    shape: Shape,
    ghost: Ghost,
}

impl BurstFront {
    /// A policy of this shape.
    pub fn new(shape: Shape) -> Self {
        Self {
            links: Vec::new(),
            tags: Vec::new(),
            window: EMPTY,
            kept: EMPTY,
            shape,
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
        let bytes = self.tags[id as usize].bytes();
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
        self.tags[id as usize].set_queue(queue);
    }

    fn unlink(&mut self, id: u32) {
        let tag = self.tags[id as usize];
        let Link { previous, next } = self.links[id as usize];
        if previous != NONE {
            self.links[previous as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
        let list = self.list(tag.queue());
        if list.head == id {
            list.head = next;
        }
        if list.tail == id {
            list.tail = previous;
        }
        list.bytes -= tag.bytes();
        list.count -= 1;
        self.tags[id as usize].set_queue(Queue::None);
    }

    fn move_to(&mut self, id: u32, queue: Queue) {
        self.unlink(id);
        self.push(id, queue);
    }

    /// The unit of the kept queue that would leave next.
    fn kept_victim<M: Marks + ?Sized>(&mut self, marks: &mut M) -> Option<u32> {
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

    fn leave<M: Marks + ?Sized>(&mut self, id: u32, marks: &mut M) -> Option<u32> {
        self.unlink(id);
        self.ghost.put(marks.key(id), marks.heat(id), marks.now());
        Some(id)
    }

    /// See [`FrontPolicy::victim`]; a shadow, which knows its marks' type, calls it without an indirection.
    pub fn choose<M: Marks + ?Sized>(&mut self, marks: &mut M) -> Option<u32> {
        let room = self.window.bytes + self.kept.bytes;
        let window_max = room / 100 * usize::from(self.shape.window_percent);
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
                if self.window.bytes > window_max / 2 && self.tags[id as usize].next_round() {
                    self.move_to(id, Queue::Window);
                    continue;
                }
                return self.leave(id, marks);
            }
            let touched = marks.take_touched(id);
            if !self.shape.duel {
                if touched {
                    self.move_to(id, Queue::Kept);
                    continue;
                }
                return self.leave(id, marks);
            }
            // Room that the kept queue has not filled yet is given away unasked, in whole units.
            if self.kept.bytes + window_max + self.tags[id as usize].bytes() <= room {
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
}

impl FrontPolicy for BurstFront {
    fn recall(&mut self, key: u64) -> Heat {
        self.ghost.take(key)
    }

    fn admitted(&mut self, id: u32, bytes: usize, now: u16, remembered: Heat) {
        let at = id as usize;
        if self.links.len() <= at {
            let none = Link {
                previous: NONE,
                next: NONE,
            };
            self.links.resize(at + 1, none);
            self.tags.resize(at + 1, Tag(0));
        }
        assert!(self.tags[at].queue() == Queue::None, "unit {id} is admitted twice");
        self.tags[at] = Tag::of(bytes);
        let soon = remembered.count > 0 && now.wrapping_sub(remembered.stamp) < SOON_TICKS;
        let queue = if soon && !self.shape.duel {
            Queue::Kept
        } else {
            Queue::Window
        };
        self.push(id, queue);
        self.ghost.make_room(self.window.count + self.kept.count, now);
    }

    fn passed_by(&mut self, key: u64, now: u16) -> bool {
        let heat = self.ghost.take(key);
        let touched = heat.touched(now);
        self.ghost.put(key, touched.unwrap_or(heat), now);
        touched.is_some()
    }

    fn remembers(&self, key: u64) -> bool {
        self.ghost.knows(key)
    }

    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32> {
        self.choose(marks)
    }

    fn removed(&mut self, id: u32) {
        self.unlink(id);
    }

    fn set_shape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    fn overhead_bytes(&self) -> (usize, usize) {
        (
            self.links.len() * size_of::<Link>() + self.tags.len() * size_of::<Tag>(),
            self.ghost.bytes(),
        )
    }
}
