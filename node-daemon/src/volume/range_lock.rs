//! Orders writes that overlap: a lock over byte ranges, first come first served.

use std::sync::{Condvar, Mutex};

#[derive(Clone, Copy)]
struct Held {
    ticket: u64,
    start: u64,
    end: u64,
}

#[derive(Default)]
struct State {
    next: u64,
    waiting: usize,
    /// In the order of arrival: those that run and those that wait.
    held: Vec<Held>,
}

/// Ranges being written, and those waiting for them.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
    released: Condvar,
}

/// A range nobody else writes while this lives.
pub struct Range<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl RangeLock {
    /// Waits until every earlier request for a range that overlaps `start..end` is done.
    pub fn lock(&self, start: u64, end: u64) -> Range<'_> {
        let mut state = self.state.lock().expect("range lock");
        let ticket = state.next;
        state.next += 1;
        state.held.push(Held { ticket, start, end });
        let overlaps = |held: &[Held]| {
            held.iter()
                .take_while(|h| h.ticket != ticket)
                .any(|h| h.start < end && start < h.end)
        };
        while overlaps(&state.held) {
            state.waiting += 1;
            state = self.released.wait(state).expect("range lock");
            state.waiting -= 1;
        }
        Range { lock: self, ticket }
    }
}

impl Drop for Range<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock().expect("range lock");
        // `remove`, not `swap_remove`: the order of arrival is what keeps it fair.
        if let Some(at) = state.held.iter().position(|h| h.ticket == self.ticket) {
            state.held.remove(at);
        }
        if state.waiting > 0 {
            self.lock.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    #[test]
    fn ranges_that_overlap_exclude_each_other_and_others_do_not() {
        let lock = RangeLock::default();
        let cells: Vec<AtomicI32> = (0..16).map(|_| AtomicI32::new(0)).collect();
        std::thread::scope(|scope| {
            for t in 0..4u64 {
                let (lock, cells) = (&lock, &cells);
                scope.spawn(move || {
                    for i in 0..2_000u64 {
                        let start = (i * 7 + t * 3) % 15;
                        let end = (start + 1 + i % 4).min(16);
                        let _held = lock.lock(start, end);
                        let mine = &cells[start as usize..end as usize];
                        for cell in mine {
                            assert_eq!(cell.fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for cell in mine {
                            cell.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        let _a = lock.lock(0, 10);
        let _b = lock.lock(10, 20);
    }
}
