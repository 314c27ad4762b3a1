//! Reads that need only bytes of a file, done by the kernel while the I/O thread goes on.
//!
//! A worker costs a request two changes of thread, each longer than the request itself takes on a fast disk. Where the
//! bytes of a read lie in one place of one file, and RAM is not to keep them ([`Disk::file_read`]), the I/O thread
//! hands the read to an io_uring of its own and gets it back with the next look at its sockets. Everything else, and
//! everything where the system allows no io_uring, goes to the [workers](super::workers).
//!
//! The kernel writes into a buffer until its read has ended: buffers are owned here until then, whatever becomes of
//! their connection, and [`close`] waits.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::unix::AsyncFd;

use super::buffer::Buffer;
use super::job::{Failure, Outcome};
use super::proto::Request;
use super::workers::{Completion, Completions};
use crate::disk::{Disk, FileRead};

/// Reads of one thread at a time; the rest goes to the workers.
const READS_MAX: u32 = 256;

/// Time that a thread's last reads get when the server stops.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// A read on its way to the kernel, and where its completion goes.
pub struct Pending {
    /// Which.
    pub request: Request,
    /// When it was received.
    pub received: Instant,
    /// Budget bytes it holds.
    pub reserved: usize,
    /// Its room, as long as the request.
    pub buffer: Buffer,
    /// Where its bytes are.
    pub from: FileRead,
    /// Whose they are.
    pub disk: Arc<dyn Disk>,
    /// Where its completion arrives.
    pub completions: Arc<Completions>,
}

struct Ring {
    ring: IoUring,
    /// By the number that the kernel gives back.
    reads: Vec<Option<Pending>>,
    free: Vec<u32>,
    /// Whether something was begun that the kernel was not told of.
    untold: bool,
}

thread_local! {
    static RING: RefCell<Option<Ring>> = const { RefCell::new(None) };
}

/// Whether this thread can take one more.
pub fn has_room() -> bool {
    RING.with_borrow(|ring| ring.as_ref().is_some_and(|ring| !ring.free.is_empty()))
}

/// Takes a read. The kernel hears of it with [`submit`].
///
/// # Panics
/// If there is no room.
pub fn begin(mut pending: Pending) {
    RING.with_borrow_mut(|ring| {
        let ring = ring.as_mut().expect("the caller asked for room");
        let number = ring.free.pop().expect("the caller asked for room");
        let fd = types::Fd(pending.from.file.as_fd().as_raw_fd());
        let length = pending.buffer.len() as u32; // a request's length fits 32 bits
        let read = opcode::Read::new(fd, pending.buffer.as_mut_ptr(), length)
            .offset(pending.from.offset)
            .build()
            .user_data(number.into());
        ring.reads[number as usize] = Some(pending);
        // SAFETY: the file stays open and the buffer stays in place until the kernel reports the end: both are owned by
        // `reads`, which gives them up only then.
        unsafe { ring.ring.submission().push(&read) }.expect("the queue is as long as there are numbers");
        ring.untold = true;
    });
}

/// Tells the kernel of all reads that were begun since the last call.
pub fn submit() {
    RING.with_borrow_mut(|ring| {
        if let Some(ring) = ring.as_mut().filter(|ring| ring.untold) {
            match ring.ring.submit() {
                Ok(_) => ring.untold = false,
                // Told again with the next batch, or when a read ends.
                Err(error) => tracing::warn!(%error, "io_uring takes no reads at the moment"),
            }
        }
    });
}

impl Ring {
    fn new(event: &EventFd) -> io::Result<Self> {
        let ring = IoUring::new(READS_MAX)?;
        ring.submitter().register_eventfd(event.as_fd().as_raw_fd())?;
        Ok(Self {
            ring,
            reads: (0..READS_MAX).map(|_| None).collect(),
            free: (0..READS_MAX).rev().collect(),
            untold: false,
        })
    }

    /// Hands out what has ended.
    fn reap(&mut self) {
        for ended in self.ring.completion() {
            let number = ended.user_data() as usize;
            let pending = self.reads[number].take().expect("the kernel ends a read once");
            self.free.push(number as u32);
            pending.end(ended.result());
        }
    }
}

impl Pending {
    /// `result`: bytes read, or an error's number below zero.
    fn end(self, result: i32) {
        let read = match usize::try_from(result) {
            Ok(read) if read == self.buffer.len() => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        let (offset, length) = (self.request.offset, self.buffer.len());
        let outcome = match self.disk.file_read_done(offset, length, self.received.elapsed(), read) {
            Ok(()) => Outcome::Data(self.buffer),
            Err(error) => Outcome::Failed(Failure::of(&error, false)),
        };
        drop(self.from); // first: who hears of the completion may count on the file being released
        drop(self.disk);
        self.completions.push(Completion {
            request: self.request,
            received: self.received,
            reserved: self.reserved,
            outcome,
        });
    }
}

/// Gives this thread a ring and hands out what it has read. Ends only if the system allows no ring.
pub async fn serve() {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(io::Error::from);
    let made = event.and_then(|event| {
        let ring = Ring::new(&event)?;
        // SAFETY: the descriptor is owned by what is registered, and closed with it.
        let event = unsafe { AsyncFd::register(OwnedFd::from(event)) }?;
        Ok((ring, event))
    });
    let event = match made {
        Ok((ring, event)) => {
            RING.set(Some(ring));
            event
        }
        Err(error) => {
            tracing::info!(%error, "no io_uring here: reads of disks go through threads, which takes longer");
            return std::future::pending().await;
        }
    };
    loop {
        let Ok(mut ready) = event.readable().await else {
            return std::future::pending().await; // the runtime is going down
        };
        // The counter only says that there is something, at each step anew; what, the ring knows. So it is never read.
        ready.clear_ready();
        RING.with_borrow_mut(|ring| ring.as_mut().expect("made above").reap());
        submit();
    }
}

/// Waits for this thread's reads and takes its ring away. A disk that does not answer in time keeps the buffers for ever.
pub fn close() {
    let Some(mut ring) = RING.take() else { return };
    let patience = types::Timespec::from(CLOSE_WITHIN);
    let begun = Instant::now();
    while ring.free.len() < READS_MAX as usize && begun.elapsed() < CLOSE_WITHIN {
        let waits = types::SubmitArgs::new().timespec(&patience);
        // An error is the end of the patience, or a signal.
        let _ = ring.ring.submitter().submit_with_args(1, &waits);
        ring.reap();
    }
    let left = READS_MAX as usize - ring.free.len();
    if left > 0 {
        tracing::error!(left, "reads of a disk do not end; their memory is not used again");
        std::mem::forget(ring);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::buffer::BufferPool;
    use super::super::memory::MemoryDisk;
    use super::super::proto::{Errno, command};
    use super::*;

    /// Reads 4 KiB at `offset` of a file of 6,000 bytes.
    async fn outcome(offset: u64) -> Outcome {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 6_000]).unwrap();
        let completions = Arc::new(Completions::default());
        begin(Pending {
            request: Request {
                flags: 0,
                command: command::READ,
                cookie: 1,
                offset,
                length: 4_096,
                payload_length: 0,
            },
            received: Instant::now(),
            reserved: 4_096,
            buffer: BufferPool::new(0).take(4_096),
            from: FileRead {
                file: Arc::new(file),
                offset,
            },
            disk: Arc::new(MemoryDisk::new(1 << 20)),
            completions: Arc::clone(&completions),
        });
        submit();
        completions.arrived().await;
        let mut arrived = Vec::new();
        completions.take(&mut arrived);
        assert_eq!(arrived.len(), 1);
        arrived.remove(0).outcome
    }

    #[tokio::test]
    async fn a_read_brings_all_of_its_bytes_or_fails() {
        let reads = async {
            while !has_room() {
                tokio::task::yield_now().await;
            }
            assert!(matches!(outcome(1_000).await, Outcome::Data(buffer) if *buffer == [7; 4_096]));
            for offset in [4_096, 8_192] {
                let cut = outcome(offset).await;
                assert!(
                    matches!(&cut, Outcome::Failed(failure) if failure.errno == Errno::Io),
                    "{cut:?}"
                );
            }
        };
        tokio::select! {
            () = reads => {}
            () = serve() => {}
        }
        close();
        assert!(!has_room());
    }
}
