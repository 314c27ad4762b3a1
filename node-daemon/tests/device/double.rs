//! Disks for the tests: in memory, or in a file that outlives the process. They count what reaches them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use hearth_node::disk::{Disk, DiskError, Extent, ExtentKind};
use hearth_protocol::ImageId;

/// Where the bytes are.
enum Bytes {
    Memory(Mutex<Vec<u8>>),
    File(File),
}

/// Lets reads go on only when a number of them are inside at once.
#[derive(Default)]
struct Gate {
    inside: Mutex<usize>,
    changed: Condvar,
}

pub struct Double {
    bytes: Bytes,
    image: ImageId,
    size_bytes: u64,
    read_only: bool,
    /// Reads that must be inside together before any returns; 0 for no gate.
    gate_reads: usize,
    gate: Gate,
    /// Every 64 KiB block with an even number counts as in RAM.
    half_in_ram: bool,
    pub writes_fail: AtomicBool,
    pub reads: AtomicU64,
    pub ram_reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub trimmed: Mutex<Vec<(u64, u64)>>,
    pub zeroed: Mutex<Vec<(u64, u64)>>,
}

impl Double {
    fn new(bytes: Bytes, size_bytes: u64) -> Self {
        Self {
            bytes,
            image: ImageId(0x1234),
            size_bytes,
            read_only: false,
            gate_reads: 0,
            gate: Gate::default(),
            half_in_ram: false,
            writes_fail: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            ram_reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            trimmed: Mutex::default(),
            zeroed: Mutex::default(),
        }
    }

    pub fn in_memory(size_bytes: u64) -> Self {
        Self::new(Bytes::Memory(Mutex::new(vec![0; size_bytes as usize])), size_bytes)
    }

    pub fn in_file(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let size_bytes = file.metadata().unwrap().len();
        Self::new(Bytes::File(file), size_bytes)
    }

    pub fn half_in_ram(mut self) -> Self {
        self.half_in_ram = true;
        self
    }

    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    pub fn gated(mut self, reads: usize) -> Self {
        self.gate_reads = reads;
        self
    }

    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::SeqCst)
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if offset.checked_add(length).is_none_or(|end| end > self.size_bytes) {
            return Err(DiskError::OutOfRange {
                offset,
                length,
                size: self.size_bytes,
            });
        }
        Ok(())
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        match &self.bytes {
            Bytes::Memory(bytes) => {
                let bytes = bytes.lock().unwrap();
                buf.copy_from_slice(&bytes[offset as usize..][..buf.len()]);
                Ok(())
            }
            Bytes::File(file) => file.read_exact_at(buf, offset).map_err(|source| DiskError::Io {
                what: "reading the double".into(),
                source,
            }),
        }
    }

    fn put(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check(offset, data.len() as u64)?;
        if self.read_only {
            return Err(DiskError::ReadOnly("the double is"));
        }
        if self.writes_fail.load(Ordering::SeqCst) {
            return Err(DiskError::Io {
                what: "writing the double".into(),
                source: io::Error::other("as told"),
            });
        }
        match &self.bytes {
            Bytes::Memory(bytes) => {
                bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
                Ok(())
            }
            Bytes::File(file) => file.write_all_at(data, offset).map_err(|source| DiskError::Io {
                what: "writing the double".into(),
                source,
            }),
        }
    }
}

impl Disk for Double {
    fn image(&self) -> ImageId {
        self.image
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn block_size_bytes(&self) -> u64 {
        64 << 10
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        let block = |at: u64| at >> 16;
        let hit = self.half_in_ram
            && block(offset).is_multiple_of(2)
            && block(offset) == block(offset + buf.len() as u64 - 1)
            && self.fill(offset, buf).is_ok();
        if hit {
            self.ram_reads.fetch_add(1, Ordering::SeqCst);
        }
        hit
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.gate_reads != 0 {
            let mut inside = self.gate.inside.lock().unwrap();
            *inside += 1;
            self.gate.changed.notify_all();
            while *inside < self.gate_reads {
                inside = self.gate.changed.wait(inside).unwrap();
            }
        }
        self.fill(offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8], _fua: bool) -> Result<(), DiskError> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        self.put(offset, data)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        if self.writes_fail.load(Ordering::SeqCst) {
            return Err(DiskError::Poisoned("a write failed".into()));
        }
        match &self.bytes {
            Bytes::Memory(_) => Ok(()),
            Bytes::File(file) => file.sync_data().map_err(|source| DiskError::Io {
                what: "syncing the double".into(),
                source,
            }),
        }
    }

    fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), DiskError> {
        self.put(offset, &vec![0; length as usize])?;
        self.trimmed.lock().unwrap().push((offset, length));
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, _keep_allocated: bool, _fua: bool) -> Result<(), DiskError> {
        self.put(offset, &vec![0; length as usize])?;
        self.zeroed.lock().unwrap().push((offset, length));
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check(offset, length)
    }

    fn extents(
        &self,
        _offset: u64,
        length: u64,
        _kind: ExtentKind,
        _extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        Ok(vec![Extent { length, status: 0 }])
    }
}
