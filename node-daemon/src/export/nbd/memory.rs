//! A disk in plain memory: what load measurements and tests of exports run against. It keeps nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use hearth_protocol::ImageId;

use super::{ExportEntry, ExportTable, page};
use crate::disk::{Disk, DiskError, Extent, ExtentKind};

struct Block {
    /// `None` reads as zero.
    bytes: RwLock<Option<Box<[u8]>>>,
    in_ram: AtomicBool,
}

/// A sparse disk in memory. Each block says whether [`Disk::try_read_ram`] finds it, so that both ways through an
/// export can be taken.
pub struct MemoryDisk {
    image: ImageId,
    block_size: u64,
    blocks: Vec<Block>,
    read_only: bool,
}

impl MemoryDisk {
    /// An empty disk of `size_bytes` with blocks of 64 KiB, all of them found in RAM.
    pub fn new(size_bytes: u64) -> Self {
        Self::with_blocks(size_bytes, 64 << 10)
    }

    /// An empty disk with blocks of `block_size` bytes, all of them found in RAM.
    ///
    /// # Panics
    /// If the size is not a number of whole blocks.
    pub fn with_blocks(size_bytes: u64, block_size: u64) -> Self {
        assert!(
            size_bytes.is_multiple_of(block_size),
            "a memory disk holds whole blocks"
        );
        let block = |_| Block {
            bytes: RwLock::new(None),
            in_ram: AtomicBool::new(true),
        };
        let blocks = (0..size_bytes / block_size).map(block).collect();
        Self {
            image: ImageId(1),
            block_size,
            blocks,
            read_only: false,
        }
    }

    /// The same disk, refusing writes.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same disk under another image id.
    pub fn with_image(mut self, image: ImageId) -> Self {
        self.image = image;
        self
    }

    /// Says whether block `index` is found in RAM from now on.
    pub fn set_in_ram(&self, index: usize, in_ram: bool) {
        self.blocks[index].in_ram.store(in_ram, Ordering::Release);
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Calls `each` with block, offset within it, and range within the request, for each block of the range.
    fn pieces(&self, offset: u64, length: u64, mut each: impl FnMut(&Block, usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let within = at % self.block_size;
            let take = (self.block_size - within).min(length - done);
            let block = &self.blocks[(at / self.block_size) as usize];
            each(block, within as usize, done as usize..(done + take) as usize);
            done += take;
        }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let size = self.size_bytes();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(DiskError::OutOfRange { offset, length, size }),
        }
    }

    fn check_write(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly("it was made so"));
        }
        self.check(offset, length)
    }

    fn copy_out(&self, offset: u64, buf: &mut [u8]) {
        self.pieces(offset, buf.len() as u64, |block, within, range| {
            let length = range.len();
            match &*block.bytes.read().expect("no panic under this lock") {
                Some(bytes) => buf[range].copy_from_slice(&bytes[within..within + length]),
                None => buf[range].fill(0),
            }
        });
    }

    fn zero(&self, offset: u64, length: u64, keep_allocated: bool) {
        self.pieces(offset, length, |block, within, range| {
            let mut bytes = block.bytes.write().expect("no panic under this lock");
            match &mut *bytes {
                whole if range.len() as u64 == self.block_size && !keep_allocated => *whole = None,
                Some(bytes) => bytes[within..within + range.len()].fill(0),
                None if keep_allocated => *bytes = Some(vec![0; self.block_size as usize].into()),
                None => {}
            }
        });
    }
}

impl Disk for MemoryDisk {
    fn image(&self) -> ImageId {
        self.image
    }

    fn size_bytes(&self) -> u64 {
        self.blocks.len() as u64 * self.block_size
    }

    fn block_size_bytes(&self) -> u64 {
        self.block_size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn try_read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        let mut all = self.check(offset, buf.len() as u64).is_ok();
        if all {
            self.pieces(offset, buf.len() as u64, |block, _, _| {
                all &= block.in_ram.load(Ordering::Acquire)
            });
        }
        if all {
            self.copy_out(offset, buf);
        }
        all
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        self.copy_out(offset, buf);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8], _fua: bool) -> Result<(), DiskError> {
        self.check_write(offset, data.len() as u64)?;
        self.pieces(offset, data.len() as u64, |block, within, range| {
            let mut bytes = block.bytes.write().expect("no panic under this lock");
            let bytes = bytes.get_or_insert_with(|| vec![0; self.block_size as usize].into());
            bytes[within..within + range.len()].copy_from_slice(&data[range]);
        });
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64, _fua: bool) -> Result<(), DiskError> {
        self.check_write(offset, length)?;
        self.zero(offset, length, false);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, length: u64, keep_allocated: bool, _fua: bool) -> Result<(), DiskError> {
        self.check_write(offset, length)?;
        self.zero(offset, length, keep_allocated);
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check(offset, length)?;
        self.pieces(offset, length, |block, _, _| {
            block.in_ram.store(true, Ordering::Release)
        });
        Ok(())
    }

    fn extents(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        self.check(offset, length)?;
        let mut runs: Vec<Extent> = Vec::new();
        let mut full = false;
        self.pieces(offset, length, |block, _, range| {
            let hole = block.bytes.read().expect("no panic under this lock").is_none();
            let status = match (kind, block.in_ram.load(Ordering::Acquire)) {
                (ExtentKind::Allocation, _) => 3 * u32::from(hole),
                (ExtentKind::Tier, _) if hole => 3,
                (ExtentKind::Tier, in_ram) => u32::from(!in_ram),
                (ExtentKind::Synced, _) => 1,
                (ExtentKind::Heat, in_ram) => 15 * u32::from(in_ram),
            };
            let length = range.len() as u64;
            let at_limit = runs.len() == extents_max;
            match runs.last_mut() {
                _ if full => {}
                Some(last) if last.status == status => last.length += length,
                _ if at_limit => full = true,
                _ => runs.push(Extent { length, status }),
            }
        });
        Ok(runs)
    }
}

/// A table of one export.
pub struct OneExport {
    name: String,
    disk: Arc<dyn Disk>,
}

impl OneExport {
    /// Serves `disk` under `name`.
    pub fn new(name: &str, disk: impl Disk) -> Self {
        Self::shared(name, Arc::new(disk))
    }

    /// Serves a disk that the caller keeps too.
    pub fn shared(name: &str, disk: Arc<dyn Disk>) -> Self {
        Self {
            name: name.to_owned(),
            disk,
        }
    }
}

impl ExportTable for OneExport {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        (name == self.name).then(|| ExportEntry::new(Arc::clone(&self.disk)).described("a disk in memory"))
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        page([self.name.clone()].into_iter(), after, max)
    }
}
