//! Writes, trims, zeroes and flush: always into the top layer.
//!
//! A write to part of a block that the top layer does not hold copies the rest of the block up first, as one write of
//! the whole block: the block is recorded as held only when all of it is there.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::Volume;
use super::range_lock::Range;
use super::stack::{Stack, Where};
use super::stats::add;
use crate::disk::DiskError;
use crate::mutants;
use crate::store::direct::{ALIGN, AlignedBuf, with_buffer};
use crate::store::{BlockState, Layer};
use crate::tier::WriteTicket;

const PAGE: u64 = ALIGN as u64;

/// Bytes trimmed or zeroed under one range lock; a multiple of every block size.
const ZERO_STEP: u64 = 1 << 30;

thread_local! {
    /// One block being copied up.
    static BLOCK: RefCell<AlignedBuf> = RefCell::default();
    /// One 4,096-byte page that a write covers in part.
    static EDGE: RefCell<AlignedBuf> = RefCell::default();
}

/// What a write puts there.
#[derive(Clone, Copy)]
enum Content<'a> {
    Bytes(&'a [u8]),
    Zeros { keep_allocated: bool },
}

impl Content<'_> {
    /// Copies the part that begins `skip` bytes into the write.
    fn copy_to(self, skip: usize, to: &mut [u8]) {
        match self {
            Content::Bytes(bytes) => to.copy_from_slice(&bytes[skip..skip + to.len()]),
            Content::Zeros { .. } => to.fill(0),
        }
    }
}

/// A write's blocks, locked and counted in for rule 11.
struct Section<'a> {
    stack: std::sync::Arc<Stack>,
    ticket: WriteTicket<'a>,
    /// Every block was in the top layer when the range was locked.
    plain: bool,
    _range: Range<'a>,
}

impl Volume {
    /// The top layer with the stack of this moment. The caller holds `gate`.
    fn section(&self, stack: &std::sync::Arc<Stack>, offset: u64, length: u64, whole_blocks: bool) -> RangeAndKind<'_> {
        let end = offset + length;
        let first = offset / self.block_size;
        let last = (end - 1) / self.block_size;
        let plain = |top: &Layer| {
            let (state, run) = top.map().run(first, last - first + 1);
            state == BlockState::Data && run == last - first + 1
        };
        let top = Self::top(stack);
        if !whole_blocks && plain(top) {
            // Only the pages it touches: other writes to the same block may go on.
            let range = self.ranges.lock(offset / PAGE * PAGE, end.next_multiple_of(PAGE));
            if plain(top) {
                return (range, true);
            }
        }
        let range = self.ranges.lock(first * self.block_size, (last + 1) * self.block_size);
        let plain = plain(top);
        (range, plain)
    }

    fn begin(&self, offset: u64, length: u64, whole_blocks: bool) -> Section<'_> {
        let stack = self.stack();
        let (range, plain) = self.section(&stack, offset, length, whole_blocks);
        let handle = stack.handle(0);
        let first = offset / handle.unit_bytes();
        let last = (offset + length - 1) / handle.unit_bytes();
        let ticket = self.tier.begin_write(handle, first as u32, (last - first + 1) as u32);
        Section {
            stack,
            ticket,
            plain,
            _range: range,
        }
    }

    /// Writes bytes.
    pub(super) fn write_any(&self, offset: u64, data: &[u8], fua: bool) -> Result<(), DiskError> {
        self.check_range(offset, data.len() as u64)?;
        let _shared = self.gate.read().expect("gate lock");
        self.check_open()?;
        if data.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let section = self.begin(offset, data.len() as u64, false);
        let top = Self::top(&section.stack);
        let durable = fua && section.plain && (top.is_committed() || mutants::DURABLE_UNCOMMITTED.is_on());
        let content = Content::Bytes(data);
        if section.plain {
            self.overwrite(top, offset, content, data.len(), durable)
        } else {
            self.write_blocks(&section.stack, offset, content, data.len() as u64)
                .inspect(|()| self.trouble.found_room())
        }
        .inspect_err(|_| self.note_poison(top))?;
        if self.marks.is_none() || !mutants::MEMBER_RAM_STALE.is_on() {
            section.ticket.update(offset, data);
        }
        if fua && !durable {
            self.flush_layer(top)?;
        }
        section.ticket.keep();
        self.stats.writes.record(start.elapsed());
        Ok(())
    }

    /// Writes into blocks that the top layer holds, or whose rest is a hole; pages covered in part keep the rest.
    fn overwrite(
        &self,
        top: &Layer,
        offset: u64,
        content: Content<'_>,
        length: usize,
        durable: bool,
    ) -> Result<(), DiskError> {
        let end = offset + length as u64;
        let mut at = offset;
        while at < end {
            let skip = (at - offset) as usize;
            if at.is_multiple_of(PAGE) && end - at >= PAGE {
                let whole = (end / PAGE * PAGE - at) as usize;
                match content {
                    Content::Bytes(bytes) => top.write(at, &bytes[skip..skip + whole], durable)?,
                    Content::Zeros { keep_allocated } => top.zero(at, whole as u64, keep_allocated)?,
                }
                at += whole as u64;
            } else {
                let page = at / PAGE * PAGE;
                let within = (at - page) as usize;
                let take = ((PAGE as usize) - within).min(length - skip);
                with_buffer(&EDGE, ALIGN, |edge| {
                    top.read(page, edge)?;
                    content.copy_to(skip, &mut edge[within..within + take]);
                    top.write(page, edge, durable)
                })?;
                at += take as u64;
            }
        }
        Ok(())
    }

    /// The whole blocks that begin at `at` and end by `end`: the first, how many, and where they end. The image's last
    /// block may be shorter.
    fn whole_blocks(&self, at: u64, end: u64) -> Option<(u64, u64, u64)> {
        let run_end = if end == self.size() {
            end
        } else {
            end / self.block_size * self.block_size
        };
        let begins = at.is_multiple_of(self.block_size) && at < run_end;
        begins.then(|| (at / self.block_size, (run_end - at).div_ceil(self.block_size), run_end))
    }

    /// Bytes from `at` to the end of its block, or to `end` if that comes first.
    fn left_of_block(&self, at: u64, end: u64) -> u64 {
        end.min((at / self.block_size + 1) * self.block_size) - at
    }

    /// Writes block by block, runs of whole blocks at once. The caller holds the blocks' lock.
    fn write_blocks(&self, stack: &Stack, offset: u64, content: Content<'_>, length: u64) -> Result<(), DiskError> {
        let top = Self::top(stack);
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let skip = (at - offset) as usize;
            if let Some((block, count, run_end)) = self.whole_blocks(at, end) {
                let len = (run_end - at) as usize;
                self.put(top, block, count, || {
                    self.overwrite(top, at, content.skip(skip), len, false)
                })?;
                at = run_end;
                continue;
            }
            let block = at / self.block_size;
            let take = self.left_of_block(at, end) as usize;
            if top.map().get(block) == BlockState::Data {
                self.overwrite(top, at, content.skip(skip), take, false)?;
            } else {
                let below = match top.map().get(block) {
                    BlockState::Zero => Where::Hole,
                    _ => stack.find(block, 1),
                };
                if below == Where::Hole {
                    self.put(top, block, 1, || {
                        self.overwrite(top, at, content.skip(skip), take, false)
                    })?;
                } else {
                    self.copy_up(
                        stack,
                        below,
                        block,
                        (at % self.block_size) as usize,
                        content.skip(skip),
                        take,
                    )?;
                }
            }
            at += take as u64;
        }
        Ok(())
    }

    /// Reads a block from below, changes part of it and writes it whole into the top layer.
    fn copy_up(
        &self,
        stack: &Stack,
        below: Where,
        block: u64,
        within: usize,
        content: Content<'_>,
        length: usize,
    ) -> Result<(), DiskError> {
        let top = Self::top(stack);
        let start = block * self.block_size;
        let len = self.block_size.min(self.size() - start) as usize;
        with_buffer(&BLOCK, len, |whole| {
            if !self.copy_from_ram(stack, below, start, whole) {
                self.fetch(stack, below, start, whole)?;
            }
            content.copy_to(0, &mut whole[within..within + length]);
            self.put(top, block, 1, || top.write(start, whole, false))
        })?;
        add(&self.stats.copied_up, 1);
        Ok(())
    }

    /// Fills `buf` from RAM copies of the level where the block was found, if all are there.
    fn copy_from_ram(&self, stack: &Stack, below: Where, start: u64, buf: &mut [u8]) -> bool {
        let (Where::Local(level) | Where::Remote(level)) = below else {
            return false;
        };
        let handle = stack.handle(level);
        let unit_bytes = handle.unit_bytes() as usize;
        let first = (start / handle.unit_bytes()) as u32;
        buf.chunks_mut(unit_bytes)
            .enumerate()
            .all(|(i, part)| self.tier.read(handle, first + i as u32, 0, part))
    }

    /// Runs a write that completes `count` blocks, and records those that the top layer did not hold. If it fails,
    /// their places become holes again, so that no half-written bytes show up later.
    fn put(
        &self,
        top: &Layer,
        block: u64,
        count: u64,
        write: impl FnOnce() -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let result = write().and_then(|()| self.mark_new(top, block, count, BlockState::Data));
        if result.is_err() {
            self.restore_holes(top, block, count);
        }
        result
    }

    /// Records a state for those blocks that have another.
    fn mark_new(&self, top: &Layer, first: u64, count: u64, state: BlockState) -> Result<(), DiskError> {
        let mut at = first;
        while at < first + count {
            let (old, run) = top.map().run(at, first + count - at);
            if old != state {
                top.mark(at, run, state)?;
            }
            at += run;
        }
        Ok(())
    }

    fn restore_holes(&self, top: &Layer, first: u64, count: u64) {
        let mut at = first;
        while at < first + count {
            let (state, run) = top.map().run(at, first + count - at);
            if state != BlockState::Data {
                let start = at * self.block_size;
                let length = (run * self.block_size).min(self.size() - start);
                if let Err(err) = top.zero(start, length, false) {
                    top.poison(format!("a failed write could not be undone: {err}"), false);
                    return;
                }
            }
            at += run;
        }
    }

    /// Trims or zeroes.
    pub(super) fn zero_any(&self, offset: u64, length: u64, keep_allocated: bool, fua: bool) -> Result<(), DiskError> {
        self.check_range(offset, length)?;
        let _shared = self.gate.read().expect("gate lock");
        self.check_open()?;
        if length == 0 {
            return Ok(());
        }
        let start = Instant::now();
        let mut at = offset;
        while at < offset + length {
            // Bounded steps, so that a trim of a whole disk does not keep every write to it waiting.
            let next = (at / ZERO_STEP + 1) * ZERO_STEP;
            let step = next.min(offset + length) - at;
            self.zero_step(at, step, keep_allocated)?;
            at += step;
        }
        if fua {
            self.flush_layer(Self::top(&self.stack()))?;
        }
        self.stats.writes.record(start.elapsed());
        Ok(())
    }

    fn zero_step(&self, offset: u64, length: u64, keep_allocated: bool) -> Result<(), DiskError> {
        let section = self.begin(offset, length, true);
        let stack = &*section.stack;
        let end = offset + length;
        let mut at = offset;
        while at < end {
            if let Some((block, count, run_end)) = self.whole_blocks(at, end) {
                self.zero_blocks(stack, block, count, keep_allocated)?;
                self.drop_copies(&section.ticket, at, run_end - at);
                at = run_end;
            } else {
                let take = self.left_of_block(at, end);
                let is_hole = !keep_allocated && stack.find(at / self.block_size, 0) == Where::Hole;
                if !is_hole {
                    self.write_blocks(stack, at, Content::Zeros { keep_allocated }, take)?;
                    section.ticket.update_zero(at, take as usize);
                }
                at += take;
            }
        }
        section.ticket.keep();
        Ok(())
    }

    /// Whole zero blocks need no RAM.
    fn drop_copies(&self, ticket: &WriteTicket<'_>, offset: u64, length: u64) {
        let unit_bytes = self.block_size.min(64 << 10);
        let first = offset / unit_bytes;
        ticket.invalidate(first as u32, (length.div_ceil(unit_bytes)) as u32);
    }

    /// Makes whole blocks read as zero.
    fn zero_blocks(&self, stack: &Stack, first: u64, count: u64, keep_allocated: bool) -> Result<(), DiskError> {
        let top = Self::top(stack);
        let mut at = first;
        while at < first + count {
            let (state, run) = top.map().run(at, first + count - at);
            let start = at * self.block_size;
            let length = (run * self.block_size).min(self.size() - start);
            if keep_allocated {
                self.put(top, at, run, || top.zero(start, length, true))?;
            } else if state == BlockState::Data {
                top.zero(start, length, false)?;
                top.mark(at, run, BlockState::Zero)?;
            } else if state == BlockState::Absent && stack.levels.len() > 1 {
                // A record keeps the blocks of lower layers from showing through.
                top.mark(at, run, BlockState::Zero)?;
            }
            at += run;
        }
        Ok(())
    }

    /// Makes everything acknowledged durable.
    pub(super) fn flush_top(&self) -> Result<(), DiskError> {
        let _shared = self.gate.read().expect("gate lock");
        if self.read_only.is_some() {
            return Ok(());
        }
        self.check_open()?;
        self.flush_layer(Self::top(&self.stack()))
    }

    fn flush_layer(&self, top: &Layer) -> Result<(), DiskError> {
        let flushed = top.flush();
        // Also after one that succeeded: shortening the journal behind it may have failed.
        self.note_poison(top);
        flushed
    }

    /// Remembers durably that a layer was found poisoned, once: a restart of the daemon repairs nothing.
    pub(super) fn note_poison(&self, top: &Layer) {
        let Some(closed) = top.poisoned() else { return };
        if self.poison_noted.load(Ordering::Acquire) {
            return;
        }
        match self.store.close_for_writes(self.image, closed.clone()) {
            Ok(()) => self.poison_noted.store(true, Ordering::Release),
            Err(err) => tracing::error!(image = %self.image, %err, "cannot record that the image is closed for writes"),
        }
    }
}

type RangeAndKind<'a> = (Range<'a>, bool);

impl<'a> Content<'a> {
    /// What is left after `skip` bytes.
    fn skip(self, skip: usize) -> Content<'a> {
        match self {
            Content::Bytes(bytes) => Content::Bytes(&bytes[skip..]),
            Content::Zeros { .. } => self,
        }
    }
}
