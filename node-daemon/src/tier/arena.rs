//! The RAM itself: one anonymous mapping, locked if the system lets us, so that its size is known and stays.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap_anonymous, munmap};

/// One mapping of fixed size.
pub struct Arena {
    start: NonNull<libc::c_void>,
    bytes: usize,
    lock_refused: Option<String>,
}

// SAFETY: the mapping belongs to the arena alone and lives as long as it; access to its bytes is ordered by the
// callers of `read` and `write`, as their contracts say.
unsafe impl Send for Arena {}
// SAFETY: see `Send`.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps `bytes`, at least one page, and locks them if `lock`.
    ///
    /// # Errors
    /// The operating system's, when there is no address space; a refused lock is no error.
    pub fn new(bytes: usize, lock: bool) -> std::io::Result<Self> {
        let length = NonZeroUsize::new(bytes.max(4096)).expect("at least one page");
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        // Large pages save half the time of a read: a random 4 KiB copy otherwise waits for address translation. A
        // kernel without them refuses, and goes on with small ones.
        // SAFETY: the range was mapped just above; the advice changes no content.
        let _ = unsafe { nix::sys::mman::madvise(start, length.get(), nix::sys::mman::MmapAdvise::MADV_HUGEPAGE) };
        let lock_refused = if lock {
            // SAFETY: the range was mapped just above.
            unsafe { mlock(start, length.get()) }.err().map(|err| {
                format!("cannot lock {bytes} bytes of RAM: {err}; raise LimitMEMLOCK of the daemon's unit, or hot blocks may be swapped out")
            })
        } else {
            None
        };
        Ok(Self {
            start,
            bytes,
            lock_refused,
        })
    }

    /// Why the memory is not locked, if that was asked for and refused.
    pub fn lock_refused(&self) -> Option<&str> {
        self.lock_refused.as_deref()
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.bytes),
            "{len} bytes at {offset} lie outside the arena of {}",
            self.bytes
        );
        // SAFETY: the assertion keeps the result within the mapping.
        unsafe { self.start.as_ptr().cast::<u8>().add(offset) }
    }

    /// Copies out.
    ///
    /// # Safety
    /// Nobody writes these bytes meanwhile.
    pub unsafe fn read(&self, offset: usize, buf: &mut [u8]) {
        let from = self.at(offset, buf.len());
        // SAFETY: in range (checked), not overlapping with a Rust slice, not written meanwhile (contract).
        unsafe { std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) }
    }

    /// Copies in.
    ///
    /// # Safety
    /// Nobody else reads or writes these bytes meanwhile.
    pub unsafe fn write(&self, offset: usize, data: &[u8]) {
        let to = self.at(offset, data.len());
        // SAFETY: in range (checked), not overlapping with a Rust slice, exclusive (contract).
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    /// Writes zeros.
    ///
    /// # Safety
    /// Nobody else reads or writes these bytes meanwhile.
    pub unsafe fn zero(&self, offset: usize, len: usize) {
        let to = self.at(offset, len);
        // SAFETY: in range (checked), exclusive (contract).
        unsafe { std::ptr::write_bytes(to, 0, len) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; nothing refers to it any more.
        let _ = unsafe { munmap(self.start, self.bytes.max(4096)) };
    }
}
