//! Buffers for payloads: aligned so that a direct-I/O file takes them without a copy, reused, and bounded in number.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use tokio::sync::Notify;

use crate::mutants;

/// Alignment of every buffer: a direct-I/O file's largest usual logical block.
pub const ALIGNMENT_BYTES: usize = 4_096;
/// Free bytes kept per size class for the next request; classes above it keep none.
const FREE_BYTES_PER_CLASS_MAX: usize = 8 << 20;
/// From this size on memory is mapped, not allocated: the system zeroes it page by page where it is first touched, on
/// a worker, instead of all at once on the thread that serves sockets.
const MAPPED_BYTES_MIN: usize = 256 << 10;
/// Size classes: 4 KiB << 0 ..= 4 KiB << 13 (32 MiB).
const CLASSES: usize = 14;

/// Owned, aligned, always initialized memory.
#[derive(Debug)]
struct Block {
    pointer: NonNull<u8>,
    class: usize,
}

// SAFETY: a block owns its memory, nothing else points into it.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

impl Block {
    fn layout(class: usize) -> Layout {
        Layout::from_size_align(ALIGNMENT_BYTES << class, ALIGNMENT_BYTES).expect("a class is a valid layout")
    }

    fn new(class: usize) -> Self {
        let layout = Self::layout(class);
        let pointer = if layout.size() >= MAPPED_BYTES_MIN {
            let length = NonZeroUsize::new(layout.size()).expect("no class is empty");
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new private mapping at an address of the kernel's choice touches no other memory.
            let mapped = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE) };
            mapped.map(NonNull::cast).ok()
        } else {
            // SAFETY: the layout's size is not zero.
            NonNull::new(unsafe { alloc_zeroed(layout) })
        };
        let pointer = pointer.unwrap_or_else(|| handle_alloc_error(layout));
        Self { pointer, class }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let layout = Self::layout(self.class);
        if layout.size() >= MAPPED_BYTES_MIN {
            // SAFETY: mapped in `new` with the same length, and nothing else points into it any more.
            let unmapped = unsafe { munmap(self.pointer.cast(), layout.size()) };
            debug_assert!(unmapped.is_ok());
        } else {
            // SAFETY: allocated in `new` with the same layout, freed once.
            unsafe { dealloc(self.pointer.as_ptr(), layout) }
        }
    }
}

/// The server's buffers and the budget that all connections share.
#[derive(Debug)]
pub struct BufferPool {
    free: [Mutex<Vec<Block>>; CLASSES],
    shared_bytes: AtomicUsize,
    shared_bytes_max: usize,
    waiting: AtomicUsize,
    returned: Notify,
}

impl BufferPool {
    /// A pool whose connections may hold `shared_bytes_max` beyond what each is granted.
    pub fn new(shared_bytes_max: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Default::default(),
            shared_bytes: AtomicUsize::new(0),
            shared_bytes_max,
            waiting: AtomicUsize::new(0),
            returned: Notify::new(),
        })
    }

    /// A buffer of `length` bytes with unspecified content.
    ///
    /// # Panics
    /// If `length` is over 32 MiB: the caller has refused that request.
    pub fn take(self: &Arc<Self>, length: usize) -> Buffer {
        let class = length
            .div_ceil(ALIGNMENT_BYTES)
            .max(1)
            .next_power_of_two()
            .trailing_zeros() as usize;
        assert!(class < CLASSES, "a buffer of {length} bytes is over the payload limit");
        let kept = self.free[class].lock().expect("no panic under this lock").pop();
        Buffer {
            block: Some(kept.unwrap_or_else(|| Block::new(class))),
            length,
            pool: Arc::clone(self),
        }
    }

    fn give_back(&self, block: Block) {
        let kept_max = FREE_BYTES_PER_CLASS_MAX / (ALIGNMENT_BYTES << block.class);
        let mut free = self.free[block.class].lock().expect("no panic under this lock");
        if free.len() < kept_max {
            free.push(block);
        }
    }

    fn try_share(&self, bytes: usize) -> bool {
        self.shared_bytes
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                used.checked_add(bytes).filter(|sum| *sum <= self.shared_bytes_max)
            })
            .is_ok()
    }

    fn unshare(&self, bytes: usize) {
        if bytes > 0 {
            self.shared_bytes.fetch_sub(bytes, Ordering::AcqRel);
            if self.waiting.load(Ordering::Acquire) > 0 {
                self.returned.notify_waiters();
            }
        }
    }

    /// Bytes beyond the grants that are in use now.
    pub fn shared_bytes_used(&self) -> usize {
        self.shared_bytes.load(Ordering::Acquire)
    }

    /// Whether some connection waits for shared bytes.
    pub fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }
}

/// What one connection holds of the budget. Dropping it gives everything back.
#[derive(Debug)]
pub struct Budget {
    pool: Arc<BufferPool>,
    held: usize,
    granted: usize,
    max: usize,
    /// Shared bytes that the last reservation lacked; 0 if it did not fail for that.
    wanted: usize,
}

impl Budget {
    /// A connection's budget: `granted` bytes of its own, up to `max` in all.
    pub fn new(pool: Arc<BufferPool>, granted: usize, max: usize) -> Self {
        Self {
            pool,
            held: 0,
            granted,
            max,
            wanted: 0,
        }
    }

    fn shared(&self, held: usize) -> usize {
        held.saturating_sub(self.granted)
    }

    /// Reserves `bytes`, or says that they are not to be had now. A connection that holds nothing gets its request
    /// whatever the size, as soon as the shared part has room.
    pub fn reserve(&mut self, bytes: usize) -> bool {
        let held = self.held + bytes;
        if mutants::MEMORY_UNCOUNTED.is_on() {
            self.pool
                .shared_bytes
                .fetch_add(self.shared(held) - self.shared(self.held), Ordering::AcqRel);
            self.held = held;
            return true;
        }
        let more = self.shared(held) - self.shared(self.held);
        if self.held > 0 && held > self.max {
            return false; // its own replies make room, nobody else's
        }
        if more > 0 && !self.pool.try_share(more) {
            self.set_wanted(more);
            return false;
        }
        self.set_wanted(0);
        self.held = held;
        true
    }

    /// Gives `bytes` back.
    pub fn release(&mut self, bytes: usize) {
        let held = self
            .held
            .checked_sub(bytes)
            .expect("a connection releases what it reserved");
        let less = self.shared(self.held) - self.shared(held);
        self.held = held;
        self.pool.unshare(less);
    }

    /// Bytes reserved now.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Whether the last reservation failed for want of shared bytes.
    pub fn waits(&self) -> bool {
        self.wanted > 0
    }

    /// Whether it holds bytes that others may be waiting for.
    pub fn holds_shared(&self) -> bool {
        self.held > self.granted
    }

    /// The pool this budget is part of.
    pub fn pool(&self) -> &Arc<BufferPool> {
        &self.pool
    }

    /// Ends when the shared bytes that the last reservation lacked may be there.
    pub async fn room(&self) {
        let returned = self.pool.returned.notified();
        let mut returned = std::pin::pin!(returned);
        // Listen first, look second: a return in between wakes this task.
        returned.as_mut().enable();
        if self.pool.shared_bytes_used() + self.wanted > self.pool.shared_bytes_max {
            returned.await;
        }
    }

    fn set_wanted(&mut self, wanted: usize) {
        match (self.wanted > 0, wanted > 0) {
            (false, true) => drop(self.pool.waiting.fetch_add(1, Ordering::AcqRel)),
            (true, false) => drop(self.pool.waiting.fetch_sub(1, Ordering::AcqRel)),
            _ => {}
        }
        self.wanted = wanted;
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.set_wanted(0);
        self.pool.unshare(self.shared(self.held));
    }
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    block: Option<Block>,
    length: usize,
    pool: Arc<BufferPool>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let block = self.block.as_ref().expect("only drop takes the block");
        // SAFETY: the block is at least `length` bytes (its class was chosen so), zeroed when allocated, and borrowed.
        unsafe { std::slice::from_raw_parts(block.pointer.as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let block = self.block.as_ref().expect("only drop takes the block");
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(block.pointer.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_sized_and_reused() {
        let pool = BufferPool::new(0);
        for length in [1, 4_096, 4_097, 65_536, MAPPED_BYTES_MIN, 8 << 20, 32 << 20] {
            let mut buffer = pool.take(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr() as usize % ALIGNMENT_BYTES, 0);
            buffer.fill(7);
            let address = buffer.as_ptr();
            drop(buffer);
            if length <= FREE_BYTES_PER_CLASS_MAX {
                assert_eq!(pool.take(length).as_ptr(), address);
            }
        }
    }

    #[test]
    fn a_budget_is_exact() {
        let pool = BufferPool::new(100);
        let mut a = Budget::new(Arc::clone(&pool), 10, 80);
        let mut b = Budget::new(Arc::clone(&pool), 10, 80);
        assert!(a.reserve(10) && pool.shared_bytes_used() == 0);
        assert!(a.reserve(60) && pool.shared_bytes_used() == 60);
        assert!(!a.reserve(20) && !a.waits(), "over its own limit");
        assert!(b.reserve(50) && pool.shared_bytes_used() == 100);
        assert!(!b.reserve(1) && b.waits() && pool.is_short());
        a.release(65);
        assert_eq!(pool.shared_bytes_used(), 40);
        assert!(b.reserve(1) && !pool.is_short());
        drop(b);
        assert_eq!(pool.shared_bytes_used(), 0);
        assert!(a.reserve(60));
        drop(a);
        assert_eq!(pool.shared_bytes_used(), 0);
    }

    #[test]
    fn a_request_over_the_limit_of_an_idle_connection_is_taken() {
        let pool = BufferPool::new(100);
        let mut a = Budget::new(pool, 10, 20);
        assert!(a.reserve(90) && a.holds_shared());
    }
}
