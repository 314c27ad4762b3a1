//! Fields of the kernel's structures, at the offsets that the loader took from the running kernel's own type data.
//!
//! The offsets are read-only data, frozen before the programs are verified: the verifier sees constants and checks
//! each load against the structure's type, so a wrong offset is a refused program, never a wrong number.

use aya_ebpf::Global;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;

/// A word of each program's own, by which a typed pointer becomes a number.
#[map]
static ADDRESSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(5, 0);

macro_rules! offsets {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub static $name: Global<u32> = Global::new(0);
    )*};
}

offsets! {
    /// `bio.bi_iter.bi_sector`, u64
    BIO_SECTOR
    /// `bio.bi_iter.bi_size`, u32
    BIO_SIZE
    /// `bio.bi_opf`, u32
    BIO_OPF
    /// `bio.bi_bdev`, pointer to `block_device`
    BIO_BDEV
    /// `bio.bi_next`, pointer to `bio`
    BIO_NEXT
    /// `bio.bi_private`, pointer
    BIO_PRIVATE
    /// `block_device.bd_disk`, pointer to `gendisk`
    BDEV_DISK
    /// `gendisk.major`, int
    DISK_MAJOR
    /// `gendisk.first_minor`, int
    DISK_FIRST_MINOR
    /// `request.q`, pointer to `request_queue`
    REQUEST_QUEUE
    /// `request_queue.disk`, pointer to `gendisk`
    QUEUE_DISK
    /// `request.bio`, pointer to `bio`
    REQUEST_BIO
    /// `request.cmd_flags`, u32
    REQUEST_OPF
    /// `request.__data_len`, u32
    REQUEST_LENGTH
}

/// A kernel structure that the verifier knows the type of.
#[derive(Clone, Copy)]
pub struct Kernel(*const u8);

impl Kernel {
    /// Takes a typed argument of a tracepoint.
    #[inline(always)]
    pub fn new(address: *const u8) -> Self {
        Self(address)
    }

    /// The address as a number. The verifier allows no arithmetic on typed pointers, but it lets a program that may
    /// see addresses write one into a map and read it back. Each program has its own word per CPU, and never interrupts
    /// itself there.
    #[inline(always)]
    pub fn address(self, program: u32) -> Option<u64> {
        let word = ADDRESSES.get_ptr_mut(program)?;
        // SAFETY: the pointer is to a value of the map that only this program on this CPU uses.
        unsafe {
            word.cast::<*const u8>().write_volatile(self.0);
            Some(word.read_volatile())
        }
    }

    /// Reads a field.
    #[inline(always)]
    pub fn load<T: Copy>(self, offset: &Global<u32>) -> T {
        // SAFETY: the verifier proves that a `T` lies at the offset; a load from memory that went away reads zero.
        unsafe { self.0.add(offset.load() as usize).cast::<T>().read_volatile() }
    }

    /// Follows a pointer field.
    #[inline(always)]
    pub fn follow(self, offset: &Global<u32>) -> Self {
        Self(self.load(offset))
    }

    /// The `dev_t` of a `gendisk`: I/O to a partition belongs to its disk, and its sectors are the disk's by then.
    #[inline(always)]
    pub fn disk_device(self) -> u32 {
        let (major, minor): (u32, u32) = (self.load(&DISK_MAJOR), self.load(&DISK_FIRST_MINOR));
        major << 20 | minor
    }
}

/// Reads a field of a structure known by its address only; zero if it is gone.
#[inline(always)]
pub fn load_at<T: Copy + Default>(address: u64, offset: &Global<u32>) -> T {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_kernel((address + u64::from(offset.load())) as *const T) }.unwrap_or_default()
}

/// Which way a bio's or request's bytes go; `None` for what is neither (zone management, driver commands).
/// Writes, trims and zeroes have the lowest bit (`op_is_write`, `include/linux/blk_types.h`).
#[inline(always)]
pub fn is_write(opf: u32) -> Option<bool> {
    match opf & 0xff {
        0 => Some(false),
        op if op & 1 == 1 && op < 32 => Some(true),
        _ => None,
    }
}
