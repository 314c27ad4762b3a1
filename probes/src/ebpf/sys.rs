//! What aya does not wrap: a map in this process's memory, waiting until no program can still be using what it looked
//! up before, and what the kernel knows about a program.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

const BPF_MAP_CREATE: u32 = 0;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// A kernel structure that may be passed to `bpf`: plain numbers without padding.
trait Attributes {}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries_max: u32,
    flags: u32,
    inner_map_fd: u32,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct GetInfo {
    fd: u32,
    length: u32,
    info: u64,
}

impl Attributes for MapCreate {}
impl Attributes for MapUpdate {}
impl Attributes for GetInfo {}

/// Calls `bpf`.
///
/// # Safety
/// Every address in `attributes` is valid for what the command reads or writes there.
unsafe fn bpf<A: Attributes>(command: u32, attributes: &mut A) -> io::Result<i32> {
    // SAFETY: the attributes are a structure of the kernel's form and of the stated size; the caller vouches for the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<A>()) };
    match result {
        0.. => Ok(result as i32),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An array map made with `BPF_F_MMAPABLE`, as words that this process shares with the programs.
#[derive(Debug)]
pub struct SharedWords {
    address: NonNull<AtomicU64>,
    words: usize,
    mapped_bytes: usize,
}

// SAFETY: the memory belongs to the mapping, not to a thread, and is only accessed atomically.
unsafe impl Send for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words of a map.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn map(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        // SAFETY: asks for a number of the system.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let mapped_bytes = (words * size_of::<AtomicU64>()).next_multiple_of(page);
        // SAFETY: a new mapping, placed by the kernel; the kernel refuses lengths beyond the map.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self {
            address,
            words,
            mapped_bytes,
        })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: that many aligned words are mapped while `self` lives, and all sides access them atomically.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.address.as_ptr().cast(), self.mapped_bytes) };
    }
}

/// Waits until every run of a program that began before has ended.
///
/// Replacing a map within a map does this, as the kernel's documented promise to user space (`maybe_wait_bpf_programs`
/// in `kernel/bpf/syscall.c`), also where `membarrier` refuses.
#[derive(Debug)]
pub struct Grace {
    outer: OwnedFd,
    inner: OwnedFd,
}

fn create_map(map_type: u32, inner: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let mut attributes = MapCreate {
        map_type,
        key_bytes: 4,
        value_bytes: 4,
        entries_max: 1,
        flags: 0,
        inner_map_fd: inner.map_or(0, |inner| inner.as_raw_fd() as u32),
    };
    // SAFETY: the attributes hold no addresses; the new descriptor is ours alone.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(BPF_MAP_CREATE, &mut attributes)?)) }
}

impl Grace {
    /// Makes the two maps it needs.
    ///
    /// # Errors
    /// The kernel's error, `EPERM` without the right to use eBPF.
    pub fn new() -> io::Result<Self> {
        let inner = create_map(BPF_MAP_TYPE_ARRAY, None)?;
        let outer = create_map(BPF_MAP_TYPE_ARRAY_OF_MAPS, Some(&inner))?;
        Ok(Self { outer, inner })
    }

    /// Waits; some 10 ms.
    ///
    /// # Errors
    /// The kernel's error; then nothing is known about running programs.
    pub fn wait(&self) -> io::Result<()> {
        let (key, value) = (0u32, self.inner.as_raw_fd() as u32);
        let mut attributes = MapUpdate {
            map_fd: self.outer.as_raw_fd() as u32,
            padding: 0,
            key: &raw const key as u64,
            value: &raw const value as u64,
            flags: 0,
        };
        // SAFETY: key and value are four bytes each, as the map was made, and outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }
}

/// What the kernel counts about a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Runs {
    /// Time spent in it, nanoseconds; only counted while statistics are on.
    pub time_ns: u64,
    /// Runs; only counted while statistics are on.
    pub count: u64,
    /// Runs left out because the program was already running on that CPU; always counted.
    pub missed: u64,
}

/// Offset in words of `run_time_ns` in `struct bpf_prog_info`; `run_cnt` and `recursion_misses` follow it.
const INFO_RUN_TIME: usize = 192 / 8;

/// Asks for a program's counts.
///
/// # Errors
/// The kernel's error.
pub fn runs(program: BorrowedFd<'_>) -> io::Result<Runs> {
    let mut info = [0u64; 64];
    let mut attributes = GetInfo {
        fd: program.as_raw_fd() as u32,
        length: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes of plain numbers to `info`; zeroes in it ask for nothing more.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(Runs {
        time_ns: info[INFO_RUN_TIME],
        count: info[INFO_RUN_TIME + 1],
        missed: info[INFO_RUN_TIME + 2],
    })
}

/// The clock that programs read, nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills in the structure; this clock exists everywhere.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
