//! One layer on disk: a sparse data file, the map of the blocks it holds, and the journal that keeps the map true
//! over crashes.
//!
//! Invariants, each kept over every crash (docs/adr/0002):
//! - A block is recorded as held only after its whole content was written.
//! - The record is handed to the kernel before the write is acknowledged, and is durable only after the data is.
//! - Where the map does not say `Data`, the data file has a hole: nothing half-written shows up later.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use hearth_protocol::LayerId;
use nix::unistd::{Whence, lseek};

use super::blockmap::{BlockMap, BlockState};
use super::direct::{DirectFile, is_aligned};
use super::doubt::{self, Closed};
use super::error::{StoreError, disk_io};
use super::fault::{Faults, Site};
use super::journal::{Journal, Trust};
use super::layer_meta::{BITMAP, LAYER_META, LayerMeta, apply, damaged, decode_bitmap};
use super::os;
use super::sealed_file;
use crate::disk::DiskError;
use crate::mutants;

/// A journal longer than this is folded into the bitmap file at the next flush: 262,144 records, read back in well
/// under a second. Short in this file's tests, so that they reach it.
const JOURNAL_BYTES_MAX: u64 = if cfg!(test) { 1 << 10 } else { 8 << 20 };

/// An open layer.
pub struct Layer {
    meta: LayerMeta,
    dir: PathBuf,
    data: DirectFile,
    map: BlockMap,
    /// `None` once the layer takes no more writes.
    journal: Mutex<Option<Journal>>,
    /// Counts writes that have returned; a flush covers those it saw.
    written: AtomicU64,
    /// The value of `written` that the last flush covered. Held while a flush runs, so that flushes share one sync.
    flushed: Mutex<u64>,
    poisoned: OnceLock<Closed>,
    writable: AtomicBool,
    faults: Faults,
}

/// What had to be done to open a layer after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Journal records that counted.
    pub replayed: usize,
    /// Journal records of unflushed writes that a power loss made void.
    pub dropped: usize,
    /// Bytes of unrecorded writes that were punched out of the data file.
    pub scrubbed_bytes: u64,
}

impl AsFd for Layer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.data.file().as_fd()
    }
}

fn journal_path(dir: &Path, generation: u32) -> PathBuf {
    dir.join(format!("journal-{generation}"))
}

impl Layer {
    /// Creates an empty layer in `dir`, durable except for the directory's own name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create(dir: &Path, meta: LayerMeta, faults: &Faults) -> Result<Self, StoreError> {
        os::create_dir(Site::LayerDirCreate, dir, faults).map_err(StoreError::at("create", dir))?;
        let body = serde_json::to_vec(&meta).expect("layer metadata always encodes");
        // Its name becomes durable with the bitmap's.
        sealed_file::put(&dir.join("meta"), LAYER_META, &body, faults)?;
        let path = dir.join("data");
        let data = DirectFile::open(&path, true, true, faults).map_err(StoreError::at("create", &path))?;
        data.resize(meta.size).map_err(StoreError::at("size", &path))?;
        let layer = Self::assemble(dir, meta, data, BlockMap::new(meta.blocks()), faults);
        layer.next_generation(&mut layer.journal.lock().expect("journal lock"), 0)?;
        layer.writable.store(true, Ordering::Release);
        Ok(layer)
    }

    fn assemble(dir: &Path, meta: LayerMeta, data: DirectFile, map: BlockMap, faults: &Faults) -> Self {
        Self {
            meta,
            dir: dir.to_owned(),
            data,
            map,
            journal: Mutex::new(None),
            written: AtomicU64::new(0),
            flushed: Mutex::new(0),
            poisoned: OnceLock::new(),
            writable: AtomicBool::new(false),
            faults: faults.clone(),
        }
    }

    fn load(dir: &Path, write: bool, faults: &Faults) -> Result<(Self, u32), StoreError> {
        let path = dir.join("meta");
        let meta = LayerMeta::decode(&path, &sealed_file::read(&path, LAYER_META)?)?;
        let path = dir.join("bitmap");
        let (generation, map) = decode_bitmap(&path, meta.blocks(), &sealed_file::read(&path, BITMAP)?)?;
        let path = dir.join("data");
        let data = DirectFile::open(&path, write, false, faults).map_err(StoreError::at("open", &path))?;
        let len = data.file().metadata().map_err(StoreError::at("look at", &path))?.len();
        if len != meta.size {
            let why = format!("it has {len} bytes and should have {}", meta.size);
            return Err(damaged(&path, why));
        }
        Ok((Self::assemble(dir, meta, data, map, faults), generation))
    }

    /// Opens a layer that takes no more writes.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_sealed(dir: &Path, faults: &Faults) -> Result<Self, StoreError> {
        Ok(Self::load(dir, false, faults)?.0)
    }

    /// Opens a top layer for writing. With `trust`, first brings it back from a crash.
    ///
    /// # Errors
    /// [`StoreError::Unsynced`] if what was written before may be lost; [`StoreError`].
    pub fn open_writable(dir: &Path, trust: Option<Trust>, faults: &Faults) -> Result<(Self, Recovery), StoreError> {
        let (layer, generation) = Self::load(dir, true, faults)?;
        let mut recovery = Recovery::default();
        if let Some(trust) = trust {
            recovery = layer.replay(generation, trust)?;
            if !mutants::UNSCRUBBED.is_on() {
                recovery.scrubbed_bytes = layer.scrub()?;
            }
        }
        layer.next_generation(&mut layer.journal.lock().expect("journal lock"), generation)?;
        layer.writable.store(true, Ordering::Release);
        Ok((layer, recovery))
    }

    /// Opens a top layer that was closed for writes, as it was when it was closed: changes nothing on disk.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open_closed(
        dir: &Path,
        trust: Trust,
        closed: Closed,
        faults: &Faults,
    ) -> Result<(Self, Recovery), StoreError> {
        let (layer, generation) = Self::load(dir, false, faults)?;
        let recovery = layer.replay(generation, trust)?;
        layer.poison(closed.why, closed.doubt);
        Ok((layer, recovery))
    }

    /// Brings the map up to what the journal says.
    fn replay(&self, generation: u32, trust: Trust) -> Result<Recovery, StoreError> {
        let path = journal_path(&self.dir, generation);
        let (records, dropped) = Journal::replay(&path, generation, trust).map_err(StoreError::at("read", &path))?;
        apply(&path, &self.map, &records)?;
        Ok(Recovery {
            replayed: records.len(),
            dropped,
            scrubbed_bytes: 0,
        })
    }

    /// Punches out everything in the data file that the map does not call data.
    fn scrub(&self) -> Result<u64, StoreError> {
        let path = self.dir.join("data");
        let seek = |at: u64, whence| match lseek(self.data.file().as_fd(), at as i64, whence) {
            Ok(found) => Ok(Some(found as u64)),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(err) => Err(StoreError::io(
                format!("cannot find extents of {}", path.display()),
                err.into(),
            )),
        };
        let mut punched = 0;
        let mut at = 0;
        while let Some(start) = seek(at, Whence::SeekData)? {
            let end = seek(start, Whence::SeekHole)?.unwrap_or(self.meta.size);
            let mut block = start / self.meta.block_size;
            let last = end.div_ceil(self.meta.block_size);
            while block < last {
                let (state, run) = self.map.run(block, last - block);
                if state != BlockState::Data {
                    let (from, length) = self.span(block, run);
                    self.data
                        .punch(from, length)
                        .map_err(StoreError::at("punch a hole into", &path))?;
                    punched += length;
                }
                block += run;
            }
            at = end;
        }
        Ok(punched)
    }

    /// Byte range of `count` blocks from `first`, cut at the layer's end.
    fn span(&self, first: u64, count: u64) -> (u64, u64) {
        let from = first * self.meta.block_size;
        (from, (count * self.meta.block_size).min(self.meta.size - from))
    }

    /// Makes the map durable in a bitmap file of the next generation and continues in that generation's journal.
    ///
    /// After an error before the new bitmap took its name, the layer goes on with the old journal. After one later
    /// it is poisoned: which of the two a power loss would leave is unknown. A failed sync poisons it in any case: a
    /// later one that succeeds would hide what the failed one lost.
    fn next_generation(&self, slot: &mut Option<Journal>, old: u32) -> Result<(), StoreError> {
        let closing = |err: &StoreError| {
            if !mutants::COMPACTION_UNCHECKED.is_on() {
                self.poison(format!("shortening the journal failed: {err}"), true);
            }
        };
        let path = self.dir.join("data");
        self.data
            .sync()
            .map_err(|source| StoreError::Unsynced {
                what: format!("cannot sync {}", path.display()),
                source,
            })
            .inspect_err(closing)?;
        let generation = old.wrapping_add(1);
        let path = journal_path(&self.dir, generation);
        let journal = Journal::create(&path, generation, &self.faults).map_err(StoreError::at("create", &path))?;
        let sync_dir = || sealed_file::sync_dir(Site::LayerDirSync, &self.dir, &self.faults).inspect_err(closing);
        sync_dir()?;
        let mut body = generation.to_le_bytes().to_vec();
        body.extend_from_slice(&self.map.encode());
        sealed_file::put(&self.dir.join("bitmap"), BITMAP, &body, &self.faults)?;
        *slot = Some(journal);
        sync_dir()?;
        // A journal that stays behind is never read again.
        os::discard_file(&journal_path(&self.dir, old), &self.faults);
        Ok(())
    }

    /// Its id.
    pub fn id(&self) -> LayerId {
        self.meta.id
    }

    /// Bytes as the guest sees them.
    pub fn size(&self) -> u64 {
        self.meta.size
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> u64 {
        self.meta.block_size
    }

    /// Which blocks it holds.
    pub fn map(&self) -> &BlockMap {
        &self.map
    }

    /// Bytes that its data file takes up on disk.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn allocated(&self) -> Result<u64, StoreError> {
        allocated(&self.dir)
    }

    /// Reads from the data file; holes are zeros. The caller has looked at the map.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.data.read(offset, buf).map_err(|err| {
            disk_io(
                format!("cannot read {} bytes at {offset} of layer {}", buf.len(), self.id()),
                err,
            )
        })
    }

    /// Whether `length` bytes at `offset` can be read from the layer's own file, by whoever has it ([`AsFd`]).
    pub fn is_readable_directly(&self, offset: u64, length: usize) -> bool {
        is_aligned(offset, length) && offset + length as u64 <= self.meta.size && self.data.is_plain()
    }

    /// Writes to the data file, aligned to 4,096 bytes. `durable` needs all journal records committed.
    ///
    /// # Errors
    /// [`DiskError`]. After a failed durable write the layer is poisoned.
    pub fn write(&self, offset: u64, data: &[u8], durable: bool) -> Result<(), DiskError> {
        self.check_writable()?;
        let result = self.data.write(offset, data, durable);
        self.written.fetch_add(1, Ordering::AcqRel);
        result.map_err(|err| {
            let what = format!("cannot write {} bytes at {offset} of layer {}", data.len(), self.id());
            // A durable write is a write and a sync. A full disk fails the write alone, and a plain write too; where
            // that one works, it was the sync that failed. What was asked for is refused either way.
            if durable && (!super::error::is_no_space(&err) || self.data.write(offset, data, false).is_ok()) {
                self.poison(format!("{what}: {err}"), true);
            }
            disk_io(what, err)
        })
    }

    /// Punches a hole, or zeroes in place with `keep_allocated`. Aligned to 4,096 bytes.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn zero(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<(), DiskError> {
        self.check_writable()?;
        let result = if keep_allocated {
            self.data.zero_allocated(offset, length)
        } else {
            self.data.punch(offset, length)
        };
        self.written.fetch_add(1, Ordering::AcqRel);
        result.map_err(|err| {
            disk_io(
                format!("cannot zero {length} bytes at {offset} of layer {}", self.id()),
                err,
            )
        })
    }

    /// Records that blocks took a state. The caller holds their write locks and has written their content.
    ///
    /// # Errors
    /// [`DiskError`]; nothing has changed then.
    ///
    /// # Panics
    /// If the layer takes no more writes.
    pub fn mark(&self, first: u64, count: u64, state: BlockState) -> Result<(), DiskError> {
        let mut journal = self.journal.lock().expect("journal lock");
        let open = journal.as_mut().expect("a sealed layer's blocks never change");
        if let Err(err) = open.append_blocks(first, count, state) {
            let what = format!("cannot append to the journal of layer {}", self.id());
            if let Err(again) = open.cut() {
                self.poison(format!("{what}: {err}; cutting it off failed too: {again}"), true);
            }
            return Err(disk_io(what, err));
        }
        (first..first + count).for_each(|block| self.map.set(block, state));
        self.written.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Whether every recorded change of state would survive a power loss.
    pub fn is_committed(&self) -> bool {
        let journal = self.journal.lock().expect("journal lock");
        journal.as_ref().is_none_or(|j| j.committed() == j.tail())
    }

    /// Puts every write that returned before this call, and the records of its blocks, on stable storage.
    ///
    /// # Errors
    /// [`DiskError`]; the layer is then poisoned: what a failed sync left behind is unknown, and asking again would
    /// hide it.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.check_writable()?;
        let wanted = self.written.load(Ordering::Acquire);
        let mut flushed = self.flushed.lock().expect("flush lock");
        self.check_writable()?;
        if *flushed >= wanted {
            return Ok(());
        }
        let covers = self.written.load(Ordering::Acquire);
        let mut synced = self.sync_both();
        if synced.is_err() && mutants::FSYNC_RETRIED.is_on() {
            synced = self.sync_both();
        }
        synced.map_err(|err| {
            if !mutants::FAILED_FLUSH_FORGOTTEN.is_on() {
                self.poison(format!("a flush failed: {err}"), true);
            }
            disk_io(format!("cannot flush layer {}", self.id()), err)
        })?;
        *flushed = covers;
        let long = {
            let journal = self.journal.lock().expect("journal lock");
            journal.as_ref().is_some_and(|j| j.tail() > JOURNAL_BYTES_MAX)
        };
        if long && let Err(err) = self.compact() {
            // The flush itself is done, and the long journal goes on serving.
            tracing::warn!(layer = %self.id(), %err, "cannot shorten the layer's journal; will try again at a later flush");
        }
        Ok(())
    }

    fn sync_both(&self) -> io::Result<()> {
        if mutants::FLUSH_WITHOUT_FSYNC.is_on() {
            return Ok(());
        }
        let upto = self.with_journal(|j| j.tail());
        if !mutants::COMMIT_WITHOUT_DATA.is_on() {
            self.data.sync()?;
        }
        let Some(upto) = upto else { return Ok(()) };
        let file = {
            let mut journal = self.journal.lock().expect("journal lock");
            match journal.as_mut() {
                Some(j) if j.committed() < upto => {
                    j.append_commit(upto)?;
                    j.file()
                }
                _ => return Ok(()),
            }
        };
        file.sync(Site::JournalSync)?;
        let mut journal = self.journal.lock().expect("journal lock");
        if let Some(j) = journal.as_mut() {
            // The commit is itself a record; with nothing after it, all there is is committed.
            let all = j.tail() == upto + super::journal::RECORD_BYTES;
            j.set_committed(if all { j.tail() } else { upto });
        }
        Ok(())
    }

    fn with_journal<T>(&self, f: impl FnOnce(&Journal) -> T) -> Option<T> {
        self.journal.lock().expect("journal lock").as_ref().map(f)
    }

    /// Folds the journal into the bitmap file.
    fn compact(&self) -> Result<(), StoreError> {
        let mut journal = self.journal.lock().expect("journal lock");
        match journal.as_ref().map(Journal::generation) {
            Some(old) => self.next_generation(&mut journal, old),
            None => Ok(()),
        }
    }

    /// Makes everything durable, in the bitmap file too. The caller lets no write in meanwhile.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn checkpoint(&self) -> Result<(), DiskError> {
        self.flush()?;
        Ok(self.compact()?)
    }

    /// Takes no more writes. Call [`Self::checkpoint`] first.
    pub fn retire(&self) {
        self.writable.store(false, Ordering::Release);
        *self.journal.lock().expect("journal lock") = None;
    }

    /// Makes everything durable and takes no more writes. The caller lets no write in any more.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn seal(&self) -> Result<(), DiskError> {
        self.checkpoint()?;
        self.retire();
        Ok(())
    }

    fn check_writable(&self) -> Result<(), DiskError> {
        if let Some(closed) = self.poisoned.get() {
            return Err(DiskError::Poisoned(closed.why.clone()));
        }
        if !self.writable.load(Ordering::Acquire) {
            return Err(DiskError::ReadOnly("the layer is sealed"));
        }
        Ok(())
    }

    /// Closes the layer for writes until it is opened anew. `doubt`: acknowledged writes may be lost.
    pub fn poison(&self, why: String, doubt: bool) {
        if doubt && self.poisoned.get().is_none() && !mutants::DOUBT_UNMARKED.is_on() {
            doubt::leave(&self.dir, self.id(), &why, &self.faults);
        }
        if self
            .poisoned
            .set(Closed {
                why: why.clone(),
                doubt,
            })
            .is_ok()
        {
            tracing::error!(layer = %self.id(), why, "the layer takes no more writes until its image is detached and attached");
        }
    }

    /// Why it was poisoned, if it was.
    pub fn poisoned(&self) -> Option<&Closed> {
        self.poisoned.get()
    }
}

/// Bytes that the layer in `dir` takes up on disk.
///
/// # Errors
/// [`StoreError::Io`].
pub fn allocated(dir: &Path) -> Result<u64, StoreError> {
    let path = dir.join("data");
    Ok(fs::metadata(&path).map_err(StoreError::at("look at", &path))?.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::fault::{Arm, Failure, Verdict};

    const BLOCK: u64 = 4096;

    fn layer(dir: &Path, arms: Vec<Arm>) -> (Layer, Arc<Mutex<Vec<Arm>>>) {
        let arms = Arc::new(Mutex::new(arms));
        let hook = arms.clone();
        let faults = Faults::hook(move |call| {
            let arms = hook.lock().unwrap();
            arms.iter()
                .try_fold(Verdict::Go, |verdict, arm| match arm.answer(call)? {
                    Verdict::Go => Ok(verdict),
                    short => Ok(short),
                })
        });
        let meta = LayerMeta {
            id: LayerId(1),
            size: 256 * BLOCK,
            block_size: BLOCK,
        };
        let layer = Layer::create(&dir.join("layer"), meta, &Faults::default()).unwrap();
        drop(layer);
        let (layer, _) = Layer::open_writable(&dir.join("layer"), None, &faults).unwrap();
        (layer, arms)
    }

    fn write(layer: &Layer, block: u64, count: u64) {
        let bytes = vec![block as u8 + 1; (count * BLOCK) as usize];
        layer.write(block * BLOCK, &bytes, false).unwrap();
        for block in block..block + count {
            layer.mark(block, 1, BlockState::Data).unwrap();
        }
    }

    /// Folding the journal into the bitmap behind a flush fails: the flush is done all the same, but a sync that
    /// failed must close the layer, because the next one would hide what it lost.
    #[test]
    fn a_sync_that_fails_while_the_journal_is_shortened_closes_the_layer() {
        // The flush itself syncs data and journal once before.
        for (site, skip, closes) in [
            (Site::DataSync, 1, true),
            (Site::JournalCreate, 0, false),
            (Site::JournalCreateSync, 0, false),
            (Site::LayerDirSync, 0, true),
            (Site::BitmapCreate, 0, false),
            (Site::BitmapWrite, 1, false),
            (Site::BitmapSync, 0, false),
            (Site::BitmapRename, 0, false),
            (Site::LayerDirSync, 1, true),
        ] {
            for failure in [Failure::Eio, Failure::Enospc] {
                let dir = tempfile::tempdir().unwrap();
                let (layer, arms) = layer(dir.path(), Vec::new());
                write(&layer, 0, 64);
                arms.lock().unwrap().push(Arm::new(site, failure, skip, false));
                layer.flush().unwrap();
                assert_eq!(arms.lock().unwrap()[0].fired(), 1, "{site}");
                assert_eq!(layer.poisoned().is_some_and(|c| c.doubt), closes, "{site}");
                assert_eq!(layer.write(0, &[9; BLOCK as usize], false).is_err(), closes, "{site}");
                assert_eq!(layer.flush().is_err(), closes, "{site}");
                drop(layer);
                let dir = dir.path().join("layer");
                let (layer, _) = Layer::open_writable(&dir, Some(Trust::Committed), &Faults::default()).unwrap();
                assert_eq!(layer.map().data_blocks(), 64, "{site}: flushed before");
            }
        }
    }

    /// A record that may have been written although its append failed must not count after a crash: its blocks were
    /// made holes again, and would hide what is below.
    #[test]
    fn a_record_whose_append_failed_never_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (layer, arms) = layer(dir.path(), Vec::new());
        write(&layer, 0, 1);
        arms.lock()
            .unwrap()
            .push(Arm::new(Site::JournalAppend, Failure::ShortEio, 0, false));
        layer.mark(7, 1, BlockState::Data).unwrap_err();
        let path = dir.path().join("layer");
        let bitmap = sealed_file::read(&path.join("bitmap"), BITMAP).unwrap();
        let generation = u32::from_le_bytes(*bitmap.first_chunk().unwrap());
        let journal = journal_path(&path, generation);
        let record = super::super::journal::RECORD_BYTES;
        assert_eq!(
            fs::metadata(&journal).unwrap().len(),
            record,
            "half a record stayed behind"
        );
        // Where it cannot be cut off, nothing more is written.
        *arms.lock().unwrap() = vec![
            Arm::new(Site::JournalAppend, Failure::ShortEio, 0, false),
            Arm::new(Site::JournalCut, Failure::Eio, 0, false),
        ];
        layer.mark(7, 1, BlockState::Data).unwrap_err();
        assert!(layer.poisoned().unwrap().doubt);
        assert!(matches!(layer.flush(), Err(DiskError::Poisoned(_))));
    }
}
