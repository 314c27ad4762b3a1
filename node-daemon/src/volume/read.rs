//! Reads: RAM, then the local layer, then a peer; what was missed is offered to the front.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Volume;
use super::stack::{Stack, Where};
use super::stats::add;
use super::whole::WholeUnits;
use crate::disk::{DiskError, FileRead};
use crate::store::LayerRef;
use crate::store::direct::{AlignedBuf, with_buffer};
use crate::tier::{LayerHandle, Look, Region};

/// Whole units that are read below with one request, in bytes.
pub(super) const RUN_BYTES_MAX: u64 = 1 << 20;

/// The same in units, which have 4,096 bytes or more.
pub(super) const RUN_UNITS_MAX: usize = (RUN_BYTES_MAX / 4096) as usize;

/// A client that has so many reads of the disk out at once need not be read ahead for: it does not wait for each.
const PIPELINED_READS_MIN: u32 = 4;

thread_local! {
    /// One unit, for misses that ask for part of it.
    static UNIT: RefCell<AlignedBuf> = RefCell::default();
}

/// A part of a request that lies within one unit.
struct Piece {
    /// Which unit of the image.
    unit: u32,
    /// Where in the unit it starts.
    within: usize,
    /// Bytes.
    len: usize,
}

impl Volume {
    pub(super) fn unit_bytes(&self) -> u64 {
        self.block_size.min(64 << 10)
    }

    fn piece(&self, offset: u64, left: usize) -> Piece {
        let unit_bytes = self.unit_bytes();
        let within = offset % unit_bytes;
        Piece {
            unit: (offset / unit_bytes) as u32,
            within: within as usize,
            len: ((unit_bytes - within) as usize).min(left),
        }
    }

    pub(super) fn block_of(&self, unit: u32) -> u64 {
        u64::from(unit) * self.unit_bytes() / self.block_size
    }

    /// Bytes of a unit; the image's last one may be shorter.
    pub(super) fn unit_len(&self, unit: u32) -> usize {
        let start = u64::from(unit) * self.unit_bytes();
        self.unit_bytes().min(self.size() - start) as usize
    }

    /// Answers from RAM alone, or not at all.
    pub(super) fn read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        if self.check_range(offset, buf.len() as u64).is_err() || self.closing.load(Ordering::Relaxed) {
            return false;
        }
        let start = Instant::now();
        let stack = self.stack.read().expect("stack lock");
        let mut hits = 0;
        let mut at = 0;
        while at < buf.len() {
            let piece = self.piece(offset + at as u64, buf.len() - at);
            let part = &mut buf[at..at + piece.len];
            match stack.find(self.block_of(piece.unit), 0) {
                Where::Hole => part.fill(0),
                Where::Local(level) | Where::Remote(level) => {
                    match self.tier.look(stack.handle(level), piece.unit, piece.within, part) {
                        Look::Miss => return false,
                        look => self.note_hit(&stack, level, &piece, look),
                    }
                    hits += 1;
                }
            }
            at += piece.len;
        }
        drop(stack);
        add(&self.stats.ram_hits, hits);
        self.note_range(offset, buf.len());
        self.stats.reads.record(start.elapsed());
        true
    }

    /// Answers from wherever the bytes are.
    pub(super) fn read_any(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check_range(offset, buf.len() as u64)?;
        if self.closing.load(Ordering::Acquire) {
            return Err(DiskError::ShuttingDown);
        }
        let start = Instant::now();
        let stack = self.stack();
        let mut at = 0;
        while at < buf.len() {
            let from = offset + at as u64;
            let piece = self.piece(from, buf.len() - at);
            let found = stack.find(self.block_of(piece.unit), 0);
            let part = &mut buf[at..at + piece.len];
            at += match found {
                Where::Hole => {
                    part.fill(0);
                    piece.len
                }
                Where::Local(level) | Where::Remote(level) => {
                    let handle = stack.handle(level);
                    let look = self.tier.look(handle, piece.unit, piece.within, part);
                    if look != Look::Miss {
                        self.note_hit(&stack, level, &piece, look);
                        add(&self.stats.ram_hits, 1);
                        piece.len
                    } else {
                        let run = if piece.len == self.unit_len(piece.unit) {
                            self.read_run(&stack, found, handle, piece.unit, &mut buf[at..])?
                        } else {
                            0
                        };
                        if run == 0 {
                            self.read_part(&stack, found, handle, &piece, &mut buf[at..at + piece.len])?;
                        }
                        run.max(piece.len)
                    }
                }
            };
        }
        self.note_range(offset, buf.len());
        self.stats.reads.record(start.elapsed());
        Ok(())
    }

    /// A unit was found in RAM. One that is there only because it was read ahead is no sign that units are used again.
    fn note_hit(&self, stack: &Stack, level: usize, piece: &Piece, look: Look) {
        let share = self.share_for(piece.unit, piece.len);
        share.note(piece.unit, look == Look::Hit);
        if !share.covers(piece.unit) {
            self.again.note(piece.unit, look == Look::Hit);
        }
        if look != Look::Hit {
            self.note_missed(stack, level, piece.unit);
        }
    }

    /// What decides about a read of so many bytes of a unit.
    fn share_for(&self, unit: u32, length: usize) -> &WholeUnits {
        if length < self.unit_len(unit) {
            &self.parts
        } else {
            &self.wholes
        }
    }

    /// The units that a range of at least one byte touches.
    fn units_of(&self, offset: u64, length: usize) -> RangeInclusive<u32> {
        let last = (offset + length as u64 - 1) / self.unit_bytes();
        (offset / self.unit_bytes()) as u32..=last as u32
    }

    fn note_range(&self, offset: u64, length: usize) {
        if length > 0 {
            let units = self.units_of(offset, length);
            self.note_read(*units.start(), *units.end());
        }
    }

    /// Reads whole units from `unit` on that lie in the same place, are not in RAM and that nobody else is reading,
    /// with one request below, and offers each to the front. Returns the bytes read: none if somebody else has the
    /// first.
    fn read_run(
        &self,
        stack: &Stack,
        found: Where,
        handle: LayerHandle,
        unit: u32,
        buf: &mut [u8],
    ) -> Result<usize, DiskError> {
        // A lead and a token per unit, on the stack of this call.
        let mut fills = [const { None }; RUN_UNITS_MAX];
        let (mut count, mut len) = (0, 0);
        while count < RUN_UNITS_MAX && len < buf.len() && (len as u64) < RUN_BYTES_MAX {
            let next = unit + count as u32;
            let next_len = self.unit_len(next);
            if buf.len() - len < next_len || stack.find(self.block_of(next), 0) != found {
                break;
            }
            let Some(lead) = self.tier.try_lead(handle, next) else {
                break;
            };
            // Looked at with the lead in hand: whoever had it before may have brought it in.
            if self.tier.region(handle, next).is_some() {
                break;
            }
            fills[count] = Some((lead, self.tier.begin_fill(handle, next)));
            count += 1;
            len += next_len;
        }
        if count == 0 {
            return Ok(0);
        }
        add(&self.stats.ram_misses, count as u64);
        let buf = &mut buf[..len];
        self.fetch(stack, found, u64::from(unit) * self.unit_bytes(), buf)?;
        for ((i, part), fill) in buf.chunks(self.unit_bytes() as usize).enumerate().zip(&fills) {
            if let Some((_, token)) = fill {
                self.tier.fill(handle, unit + i as u32, *token, part, Region::Front);
            }
        }
        if let Where::Local(level) | Where::Remote(level) = found {
            for unit in unit..unit + count as u32 {
                self.wholes.note(unit, false);
                self.note_missed(stack, level, unit);
            }
        }
        Ok(len)
    }

    /// Answers part of a unit that is not in RAM: reads the whole unit, so that it can be let in, if that is worth it.
    fn read_part(
        &self,
        stack: &Stack,
        found: Where,
        handle: LayerHandle,
        piece: &Piece,
        buf: &mut [u8],
    ) -> Result<(), DiskError> {
        self.parts.note(piece.unit, false);
        if !self.brings_whole(handle, piece.unit, piece.len) {
            // Nobody would keep the rest of the unit, or use it.
            add(&self.stats.ram_misses, 1);
            let offset = u64::from(piece.unit) * self.unit_bytes() + piece.within as u64;
            return self.fetch(stack, found, offset, buf);
        }
        if !self.parts.covers(piece.unit) {
            self.again.note(piece.unit, false);
        }
        let Some(_lead) = self.tier.lead_or_wait(handle, piece.unit) else {
            // Somebody else read it meanwhile; if it is not there now, its fill was dropped.
            let look = self.tier.look(handle, piece.unit, piece.within, buf);
            if look != Look::Miss {
                if let (Look::FirstUse(_), Where::Local(level) | Where::Remote(level)) = (look, found) {
                    self.note_missed(stack, level, piece.unit);
                }
                add(&self.stats.ram_hits, 1);
                return Ok(());
            }
            add(&self.stats.ram_misses, 1);
            let offset = u64::from(piece.unit) * self.unit_bytes() + piece.within as u64;
            return self.fetch_fresh(offset, buf);
        };
        // The last lead may have ended between the look into RAM and this one's beginning.
        if self.tier.read(handle, piece.unit, piece.within, buf) {
            add(&self.stats.ram_hits, 1);
            return Ok(());
        }
        add(&self.stats.ram_misses, 1);
        with_buffer(&UNIT, self.unit_len(piece.unit), |whole| {
            let token = self.tier.begin_fill(handle, piece.unit);
            self.fetch(stack, found, u64::from(piece.unit) * self.unit_bytes(), whole)?;
            buf.copy_from_slice(&whole[piece.within..piece.within + piece.len]);
            self.tier.fill(handle, piece.unit, token, whole, Region::Front);
            if let Where::Local(level) | Where::Remote(level) = found {
                self.note_missed(stack, level, piece.unit);
            }
            Ok(())
        })
    }

    /// Where a range lies, if that is one place of one file here, none of it is in RAM and RAM is to keep none of it;
    /// counts the misses. Ends in [`Disk::file_read_done`](crate::disk::Disk::file_read_done).
    pub(super) fn range_in_file(&self, offset: u64, length: usize) -> Option<FileRead> {
        self.check_range(offset, length as u64).ok()?;
        if length == 0 || self.closing.load(Ordering::Acquire) {
            return None;
        }
        let units = self.units_of(offset, length);
        let stack = self.stack();
        let found = stack.find(self.block_of(*units.start()), 0);
        let Where::Local(level) = found else {
            return None;
        };
        let LayerRef::Local(layer) = &stack.levels[level].layer else {
            return None;
        };
        let handle = stack.handle(level);
        let end = offset + length as u64;
        let passes = |unit| {
            let from = u64::from(unit) * self.unit_bytes();
            let wanted = (from + self.unit_bytes()).min(end) - from.max(offset);
            stack.find(self.block_of(unit), 0) == found
                && self.tier.region(handle, unit).is_none()
                && !self.brings_whole(handle, unit, wanted as usize)
        };
        if !layer.is_readable_directly(offset, length) || !units.clone().all(passes) {
            return None;
        }
        add(&self.stats.ram_misses, units.clone().count() as u64);
        let others = self.file_reads.fetch_add(1, Ordering::Relaxed);
        if others < PIPELINED_READS_MIN {
            self.note_range(offset, length);
        }
        Some(FileRead {
            file: layer.clone(),
            offset,
        })
    }

    /// Whether a miss is to let the whole unit in: somebody would keep it, and it is worth it.
    fn brings_whole(&self, handle: LayerHandle, unit: u32, length: usize) -> bool {
        if !self.tier.has_front() {
            return false;
        }
        let share = self.share_for(unit, length);
        if share.covers(unit) {
            return true;
        }
        if !self.tier.pass(handle, unit) {
            return false;
        }
        length == self.unit_len(unit) || self.again.covers(unit)
    }

    /// Reads below RAM, after looking up anew where the bytes are.
    fn fetch_fresh(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let stack = self.stack();
        let found = stack.find(offset / self.block_size, 0);
        self.fetch(&stack, found, offset, buf)
    }

    /// Reads what the disk holds, past RAM, and leaves no trace in what counts as use.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn read_stored(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check_range(offset, buf.len() as u64)?;
        if self.closing.load(Ordering::Acquire) {
            return Err(DiskError::ShuttingDown);
        }
        let stack = self.stack();
        let mut at = 0;
        while at < buf.len() {
            let piece = self.piece(offset + at as u64, buf.len() - at);
            let found = stack.find(self.block_of(piece.unit), 0);
            let part = &mut buf[at..at + piece.len];
            stack.read_from(found, offset + at as u64, part, &*self.remote)?;
            at += piece.len;
        }
        Ok(())
    }

    /// Reads below RAM.
    pub(super) fn fetch(&self, stack: &Stack, found: Where, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        stack.read_from(found, offset, buf, &*self.remote)?;
        match found {
            Where::Remote(_) => add(&self.stats.remote_bytes, buf.len() as u64),
            Where::Local(_) => add(&self.stats.store_bytes, buf.len() as u64),
            Where::Hole => {}
        }
        Ok(())
    }

    /// Brings whole units that the range touches into the front.
    pub(super) fn cache_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_range(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let stack = self.stack();
        let first = (offset / self.unit_bytes()) as u32;
        let last = ((offset + length - 1) / self.unit_bytes()) as u32;
        // More than the front holds would wash out its own beginning.
        let room = self.tier.usage().front_capacity.0 / self.unit_bytes();
        for unit in first
            ..=last.min(
                first
                    .saturating_add(room.min(u64::from(u32::MAX)) as u32)
                    .saturating_sub(1),
            )
        {
            let found = stack.find(self.block_of(unit), 0);
            let (Where::Local(level) | Where::Remote(level)) = found else {
                continue;
            };
            self.bring_in(&stack, found, stack.handle(level), unit, Region::Front)?;
        }
        Ok(())
    }

    /// Reads a unit below RAM for its own sake; says what became of it, and how many bytes were read.
    pub(super) fn bring_in(
        &self,
        stack: &Stack,
        found: Where,
        handle: LayerHandle,
        unit: u32,
        region: Region,
    ) -> Result<(crate::tier::Filled, u64), DiskError> {
        use crate::tier::Filled;
        match (self.tier.region(handle, unit), region) {
            (Some(_), Region::Front) | (Some(Region::Main), _) => return Ok((Filled::Present, 0)),
            (Some(Region::Front), Region::Main) => {
                if let Some(filled) = self.tier.promote_resident(handle, unit) {
                    return Ok((filled, 0));
                }
            }
            (None, _) => {}
        }
        with_buffer(&UNIT, self.unit_len(unit), |whole| {
            let token = self.tier.begin_fill(handle, unit);
            self.fetch(stack, found, u64::from(unit) * self.unit_bytes(), whole)?;
            Ok((self.tier.fill(handle, unit, token, whole, region), whole.len() as u64))
        })
    }
}
