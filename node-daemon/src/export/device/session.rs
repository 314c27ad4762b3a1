//! One image as one mounted file: the FUSE connection, its negotiation, and the threads that answer it.
//!
//! The mount's root *is* the file, so there is nothing to look up. Each image has a connection of its own: one that
//! waits for a slow disk or peer takes nothing from another.
//!
//! Threads: at most `readers` of them read requests at a time. A reader answers what is in RAM at once and goes on
//! reading; before anything that may wait it gives its place up, and another thread takes it, so a request never
//! waits behind a miss, while a stream of hits costs no hand-over. Nothing here allocates per request.
//!
//! Invariant: a request that was read is answered exactly once by this process, or, if the process dies, by the next
//! one after [`Session::resend`].

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};

use super::process;
use super::wire::{self, Fallocate, InHeader, InitIn, InitOut, Range, cap, op};
use crate::disk::{Disk, DiskError};

/// Bytes of one READ or WRITE: the largest the kernel allows without a changed sysctl.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Asynchronous requests in flight, far over what a loop device queues (128), so the limit is never the kernel's.
const BACKGROUND_REQUESTS_MAX: u16 = 1024;
/// File system block size, hence the loop device's discard granularity.
const FS_BLOCK_BYTES: u32 = 4096;
/// An idle thread over the number of readers ends after this long and gives its buffer back.
const IDLE_THREAD: Duration = Duration::from_secs(10);
/// Stack of a thread; it calls the volume and the store, nothing deep.
const STACK_BYTES: usize = 512 << 10;
/// Alignment of the data of a request, as direct I/O on the store wants it.
const ALIGN: usize = 4096;

/// The type under which the mounts appear in `/proc/self/mountinfo`.
pub(super) const MOUNT_TYPE: &str = "fuse.hearth";

/// How many threads serve an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Threads {
    /// Threads that read requests at the same time; at least 1.
    pub readers: usize,
    /// All threads, so the requests that may wait for a disk at the same time; at least `readers`.
    pub max: usize,
}

/// A mounted file and the disk behind it.
pub(super) struct Session {
    fuse: File,
    disk: Arc<dyn Disk>,
    label: String,
    threads: Threads,
    pool: Mutex<Pool>,
    idle: Condvar,
}

#[derive(Default)]
struct Pool {
    /// Threads that read requests or are about to.
    readers: usize,
    /// Threads waiting for a reader's place.
    idle: usize,
    /// All threads.
    threads: usize,
    /// The connection ended.
    closed: bool,
}

/// Opens `/dev/fuse` and mounts it on the file `at`. The kernel's INIT waits on the result until [`negotiate`] answers.
pub(super) fn mount_file(at: &Path, image: &str, read_only: bool) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    // A read that found nothing must wait, so the descriptor stays blocking.
    let fuse = File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode={},user_id={},group_id={},default_permissions,max_read={REQUEST_BYTES_MAX}",
        fuse.as_raw_fd(),
        if read_only { "100400" } else { "100600" },
        nix::unistd::geteuid(),
        nix::unistd::getegid(),
    );
    let source = format!("hearth:{image}");
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, read_only);
    mount(
        Some(source.as_str()),
        at,
        Some(MOUNT_TYPE),
        flags,
        Some(options.as_str()),
    )?;
    Ok(fuse)
}

/// What the kernel agreed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreed {
    /// Requests that a dead daemon left unanswered can be had again.
    pub can_resend: bool,
}

/// Answers the kernel's INIT, the first request after [`mount_file`].
pub(super) fn negotiate(mut fuse: &File) -> io::Result<Agreed> {
    let mut buf = vec![0; wire::IN_HEADER_BYTES + wire::WRITE_IN_BYTES + REQUEST_BYTES_MAX];
    let length = loop {
        match fuse.read(&mut buf) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    let bad = |what: String| io::Error::new(ErrorKind::InvalidData, what);
    let header = InHeader::parse(&buf[..length]).map_err(|e| bad(e.to_string()))?;
    if header.opcode != op::INIT {
        return Err(bad(format!("the kernel's first request is {header:?}, not INIT")));
    }
    let offer = InitIn::parse(&buf[wire::IN_HEADER_BYTES..length]).map_err(|e| bad(e.to_string()))?;
    let needed = cap::ASYNC_DIO | cap::MAX_PAGES | cap::BIG_WRITES;
    if offer.major != wire::MAJOR || offer.caps & needed != needed {
        return Err(bad(format!(
            "this kernel speaks FUSE {}.{} with capabilities {:#x}; Hearth's device export needs 7.31 or later (Linux 5.4)",
            offer.major, offer.minor, offer.caps
        )));
    }
    let wanted =
        needed | cap::ASYNC_READ | cap::PARALLEL_DIROPS | cap::HANDLE_KILLPRIV_V2 | cap::INIT_EXT | cap::HAS_RESEND;
    let answer = InitOut {
        minor: wire::MINOR.min(offer.minor),
        caps: offer.caps & wanted,
        max_background: BACKGROUND_REQUESTS_MAX,
        congestion_threshold: BACKGROUND_REQUESTS_MAX,
        max_write_bytes: REQUEST_BYTES_MAX as u32,
        max_pages: (REQUEST_BYTES_MAX / 4096) as u16,
        max_readahead: offer.max_readahead,
    };
    reply(fuse, header.unique, &answer.encode())?;
    Ok(Agreed {
        can_resend: offer.caps & cap::HAS_RESEND != 0,
    })
}

/// Sends the answer to one request.
fn reply(mut fuse: &File, unique: u64, body: &[u8]) -> io::Result<()> {
    let header = wire::out_header(unique, 0, body.len());
    fuse.write_vectored(&[IoSlice::new(&header), IoSlice::new(body)])
        .map(drop)
}

fn reply_error(mut fuse: &File, unique: u64, errno: i32) -> io::Result<()> {
    fuse.write(&wire::out_header(unique, errno, 0)).map(drop)
}

/// The errno under which a guest's kernel sees a failure.
fn errno(error: &DiskError) -> i32 {
    match error {
        DiskError::OutOfRange { .. } => libc::EINVAL,
        DiskError::ReadOnly(_) => libc::EPERM,
        DiskError::NoSpace(_) => libc::ENOSPC,
        DiskError::Io { .. } | DiskError::Poisoned(_) => libc::EIO,
        DiskError::ShuttingDown => libc::ESHUTDOWN,
    }
}

/// One thread's space for a request and, as a READ brings no data, for its answer.
struct Buffer {
    space: Vec<u8>,
    /// Where a request starts, so that a WRITE's data is aligned.
    start: usize,
}

impl Buffer {
    fn new() -> Self {
        let headers = wire::IN_HEADER_BYTES + wire::WRITE_IN_BYTES;
        let space = vec![0; 2 * ALIGN + REQUEST_BYTES_MAX];
        let first_aligned = space.as_ptr().align_offset(ALIGN);
        Self {
            space,
            start: first_aligned + ALIGN - headers,
        }
    }

    fn request(&mut self) -> &mut [u8] {
        let length = wire::IN_HEADER_BYTES + wire::WRITE_IN_BYTES + REQUEST_BYTES_MAX;
        &mut self.space[self.start..self.start + length]
    }

    fn data(&mut self, length: usize) -> &mut [u8] {
        let start = self.start + wire::IN_HEADER_BYTES + wire::WRITE_IN_BYTES;
        &mut self.space[start..start + length]
    }
}

impl Session {
    /// A session over a negotiated connection; nothing is read before [`Session::start`].
    pub fn new(fuse: File, disk: Arc<dyn Disk>, label: String, threads: Threads) -> Arc<Self> {
        assert!(threads.readers >= 1 && threads.max >= threads.readers, "{threads:?}");
        Arc::new(Self {
            fuse,
            disk,
            label,
            threads,
            pool: Mutex::default(),
            idle: Condvar::new(),
        })
    }

    /// The `/dev/fuse` descriptor.
    pub fn fuse(&self) -> &File {
        &self.fuse
    }

    /// Makes the kernel queue again what an earlier process read and did not answer. To be called before
    /// [`Session::start`], when that process is gone.
    pub fn resend(&self) -> io::Result<()> {
        (&self.fuse).write(&wire::notification(wire::NOTIFY_RESEND)).map(drop)
    }

    /// Starts the readers.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let mut pool = self.pool();
        for _ in 0..self.threads.readers {
            self.spawn(&mut pool)?;
        }
        Ok(())
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // Plain counters, changed in single steps: a panic elsewhere leaves them true.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that holds a reader's place.
    fn spawn(self: &Arc<Self>, pool: &mut Pool) -> io::Result<()> {
        let session = Arc::clone(self);
        thread::Builder::new()
            .name("hearth-device".into())
            .stack_size(STACK_BYTES)
            .spawn(move || session.run())?;
        pool.threads += 1;
        pool.readers += 1;
        Ok(())
    }

    fn run(self: Arc<Self>) {
        process::mark_thread();
        let mut buffer = Buffer::new();
        loop {
            let request = buffer.request();
            let length = match (&self.fuse).read(request) {
                Ok(length) => length,
                // ENOENT: the request was taken back between being queued and being read.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ENOENT)) => continue,
                Err(e) => {
                    if e.raw_os_error() != Some(libc::ENODEV) {
                        tracing::error!(image = self.label, "the device's connection failed: {e}");
                    }
                    self.close();
                    return;
                }
            };
            let mut place = Place {
                session: &self,
                held: true,
            };
            if let Err(e) = self.answer(&mut buffer, length, &mut place) {
                // ENOENT: the kernel gave the request up meanwhile. Anything else is a broken connection, which the
                // next read reports.
                if e.raw_os_error() != Some(libc::ENOENT) {
                    tracing::warn!(image = self.label, "an answer was not taken by the kernel: {e}");
                }
            }
            if !place.take_back() {
                return;
            }
        }
    }

    /// The connection is over: all threads end.
    fn close(&self) {
        let mut pool = self.pool();
        pool.closed = true;
        pool.readers -= 1;
        pool.threads -= 1;
        drop(pool);
        self.idle.notify_all();
    }

    /// Answers the request of `length` bytes in `buffer`.
    fn answer(&self, buffer: &mut Buffer, length: usize, place: &mut Place<'_>) -> io::Result<()> {
        let request = &buffer.request()[..length];
        let header = match InHeader::parse(request) {
            Ok(header) => header,
            Err(e) => return Err(io::Error::new(ErrorKind::InvalidData, e)),
        };
        let unique = header.unique;
        let outcome = catch_unwind(AssertUnwindSafe(|| self.perform(header, buffer, length, place)));
        match outcome {
            Ok(Ok(sent)) => sent,
            Ok(Err(errno)) => reply_error(&self.fuse, unique, errno),
            Err(_) => {
                tracing::error!(image = self.label, "{header:?} panicked; the guest gets an I/O error");
                reply_error(&self.fuse, unique, libc::EIO)
            }
        }
    }

    /// Carries a request out; the outer error is the errno to answer with.
    fn perform(
        &self,
        header: InHeader,
        buffer: &mut Buffer,
        length: usize,
        place: &mut Place<'_>,
    ) -> Result<io::Result<()>, i32> {
        let unique = header.unique;
        let fuse = &self.fuse;
        let size_bytes = self.disk.size_bytes();
        let read_only = self.disk.is_read_only();
        let body = &buffer.request()[wire::IN_HEADER_BYTES..length];
        let malformed = |e: wire::Short| {
            tracing::error!(image = self.label, "{header:?}: {e}");
            libc::EINVAL
        };
        match header.opcode {
            op::READ => {
                let range = Range::parse(body).map_err(malformed)?;
                let left = size_bytes.saturating_sub(range.offset);
                let wanted = (u64::from(range.length)).min(left).min(REQUEST_BYTES_MAX as u64) as usize;
                let data = buffer.data(wanted);
                if wanted != 0 && !self.disk.try_read_ram(range.offset, data) {
                    place.give_up();
                    self.disk
                        .read(range.offset, data)
                        .map_err(|e| self.failed("read", range.offset, wanted, &e))?;
                }
                Ok(reply(fuse, unique, data))
            }
            op::WRITE => {
                let range = Range::parse(body).map_err(malformed)?;
                let data = body.get(wire::WRITE_IN_BYTES..).unwrap_or_default();
                if data.len() != range.length as usize {
                    return Err(libc::EINVAL);
                }
                place.give_up();
                self.disk
                    .write(range.offset, data, false)
                    .map_err(|e| self.failed("write", range.offset, data.len(), &e))?;
                Ok(reply(fuse, unique, &wire::written(range.length)))
            }
            op::FSYNC => {
                place.give_up();
                if !read_only {
                    self.disk.flush().map_err(|e| self.failed("flush", 0, 0, &e))?;
                }
                Ok(reply(fuse, unique, &[]))
            }
            op::FALLOCATE => {
                let ask = Fallocate::parse(body).map_err(malformed)?;
                place.give_up();
                self.fallocate(ask)?;
                Ok(reply(fuse, unique, &[]))
            }
            op::GETATTR => Ok(reply(fuse, unique, &wire::attributes(size_bytes, read_only))),
            op::SETATTR if wire::setattr_valid(body).map_err(malformed)? & wire::FATTR_SIZE != 0 => Err(libc::EPERM),
            op::SETATTR => Ok(reply(fuse, unique, &wire::attributes(size_bytes, read_only))),
            op::OPEN => Ok(reply(
                fuse,
                unique,
                &wire::opened(wire::FOPEN_DIRECT_IO | wire::FOPEN_PARALLEL_DIRECT_WRITES),
            )),
            op::STATFS => Ok(reply(fuse, unique, &wire::file_system(size_bytes, FS_BLOCK_BYTES))),
            // Closing a descriptor promises nothing; what must be stable is asked for with FSYNC.
            op::FLUSH | op::RELEASE | op::ACCESS | op::DESTROY => Ok(reply(fuse, unique, &[])),
            // These take no answer. An interrupted request is answered all the same when it is done.
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT => Ok(Ok(())),
            _ => Err(libc::ENOSYS),
        }
    }

    fn fallocate(&self, ask: Fallocate) -> Result<(), i32> {
        const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE.cast_unsigned();
        const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE.cast_unsigned();
        const ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE.cast_unsigned();
        let Fallocate { offset, length, mode } = ask;
        let result = match mode & !KEEP_SIZE {
            PUNCH_HOLE => self.disk.trim(offset, length, false),
            ZERO_RANGE => self.disk.write_zeroes(offset, length, true, false),
            // Not ENOSYS: the kernel would take that as "never ask again" and discards would end.
            _ => return Err(libc::EOPNOTSUPP),
        };
        result.map_err(|e| self.failed("zero or discard", offset, length as usize, &e))
    }

    /// Logs a failure of the disk and says which errno the guest's kernel gets.
    fn failed(&self, what: &str, offset: u64, length: usize, error: &DiskError) -> i32 {
        tracing::error!(image = self.label, "{what} of {length} bytes at {offset}: {error}");
        errno(error)
    }
}

/// A thread's right to read the next request.
struct Place<'a> {
    session: &'a Arc<Session>,
    held: bool,
}

impl Place<'_> {
    /// Lets another thread read, because this one may wait now.
    fn give_up(&mut self) {
        let session = self.session;
        let mut pool = session.pool();
        pool.readers -= 1;
        self.held = false;
        if pool.readers > 0 {
            return;
        }
        if pool.idle > 0 {
            drop(pool);
            session.idle.notify_one();
        } else if pool.threads < session.threads.max
            && let Err(e) = session.spawn(&mut pool)
        {
            // Requests wait until a busy thread comes back; nothing is lost.
            tracing::warn!(image = session.label, "no further thread for the device: {e}");
        }
    }

    /// Waits for a reader's place; false if this thread should end.
    fn take_back(&mut self) -> bool {
        let session = self.session;
        if self.held {
            return true;
        }
        let mut pool = session.pool();
        while pool.readers >= session.threads.readers && !pool.closed {
            pool.idle += 1;
            let (guard, waited) = session
                .idle
                .wait_timeout(pool, IDLE_THREAD)
                .unwrap_or_else(PoisonError::into_inner);
            pool = guard;
            pool.idle -= 1;
            if waited.timed_out() && pool.readers >= session.threads.readers {
                break;
            }
        }
        if pool.closed || pool.readers >= session.threads.readers {
            pool.threads -= 1;
            return false;
        }
        pool.readers += 1;
        self.held = true;
        true
    }
}
