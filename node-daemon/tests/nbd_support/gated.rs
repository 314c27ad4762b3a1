//! A disk whose calls wait at a gate, or fail on purpose.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use hearth_node::disk::{Disk, DiskError, Extent, ExtentKind};
use hearth_node::export::nbd::memory::MemoryDisk;
use hearth_protocol::ImageId;

/// From here on reads are found in RAM, whatever the gate.
pub const IN_RAM_FROM: u64 = 1 << 20;

/// Reads and writes that pass the gate only once it is open. With `fails`, every other call fails, each its own way.
pub struct Gated {
    disk: MemoryDisk,
    fails: bool,
    reached: AtomicBool,
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gated {
    /// A closed gate before a disk of 8 MiB.
    pub fn new(image: u128, fails: bool) -> Arc<Self> {
        let disk = MemoryDisk::new(8 << 20).with_image(ImageId(image));
        let (reached, open) = (AtomicBool::new(false), Mutex::new(false));
        Arc::new(Self {
            disk,
            fails,
            reached,
            open,
            changed: Condvar::new(),
        })
    }

    /// Opens the gate for good.
    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Waits until a call stands at the gate, or went through.
    pub fn wait_reached(&self) {
        while !self.reached.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    /// What is on the disk, past the gate.
    pub fn peek(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.disk.read(offset, &mut bytes).unwrap();
        bytes
    }

    fn pass(&self) {
        self.reached.store(true, Ordering::Release);
        drop(
            self.changed
                .wait_while(self.open.lock().unwrap(), |open| !*open)
                .unwrap(),
        );
    }
}

impl Disk for Gated {
    fn image(&self) -> ImageId {
        self.disk.image()
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn block_size_bytes(&self) -> u64 {
        self.disk.block_size_bytes()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        offset >= IN_RAM_FROM && self.disk.try_read_ram(offset, buf)
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.pass();
        self.disk.read(offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), DiskError> {
        self.pass();
        self.disk.write(offset, data, fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.fails {
            return Err(DiskError::Io {
                what: "flush".into(),
                source: std::io::Error::other("on purpose"),
            });
        }
        self.disk.flush()
    }

    fn trim(&self, offset: u64, length: u64, fua: bool) -> Result<(), DiskError> {
        assert!(!self.fails, "on purpose");
        self.disk.trim(offset, length, fua)
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError> {
        if self.fails {
            return Err(DiskError::ShuttingDown);
        }
        self.disk.write_zeroes(offset, length, keep_allocated, fua)
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.fails {
            return Err(DiskError::Poisoned("on purpose".into()));
        }
        self.disk.cache(offset, length)
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        self.disk.extents(offset, length, kind, extents_max)
    }
}
