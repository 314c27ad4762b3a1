//! The `bpf` system calls that aya does not wrap: draining a map in batches, waiting until no program can still be
//! using what it looked up before, and what the kernel knows about a program.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use hearth_probes_common::abi::Heat;

const BPF_MAP_CREATE: u32 = 0;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_OBJ_GET_INFO_BY_FD: u32 = 15;
const BPF_MAP_LOOKUP_AND_DELETE_BATCH: u32 = 25;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

/// Entries asked for at a time; a map's bucket must fit, and the kernel says so when it does not.
const BATCH: usize = 8192;

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
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
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
impl Attributes for Batch {}
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

/// A map value of plain numbers, for which every bit pattern is valid.
///
/// # Safety
/// The type has no padding and no invalid bit patterns.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: three u64.
unsafe impl Plain for Heat {}
// SAFETY: three u64 and two u32, without padding.
unsafe impl Plain for hearth_probes_common::abi::Range {}

/// Takes every entry out of a hash map with eight-byte keys. What was taken before a failure has been handed to `take`.
///
/// # Errors
/// The kernel's error; entries not handed over are still in the map.
pub fn drain_hash<V: Plain>(map: BorrowedFd<'_>, mut take: impl FnMut(u64, V)) -> io::Result<()> {
    let mut keys = vec![0u64; BATCH];
    let mut values = vec![V::default(); BATCH];
    let mut position = 0u32;
    let mut begun = false;
    loop {
        let mut next = 0u32;
        let mut batch = Batch {
            in_batch: if begun { &raw const position as u64 } else { 0 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: keys.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the position words and both arrays outlive the call, the arrays have `count` entries, keys have eight
        // bytes and values the size the map was loaded with.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_AND_DELETE_BATCH, &mut batch) };
        let last = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                let longer = keys.len() * 2;
                keys.resize(longer, 0);
                values.resize(longer, V::default());
                continue;
            }
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => return Err(error),
        };
        for (key, value) in keys.iter().zip(&values).take(batch.count as usize) {
            take(*key, *value);
        }
        if last {
            return Ok(());
        }
        (position, begun) = (next, true);
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
        fd: program.as_fd().as_raw_fd() as u32,
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
