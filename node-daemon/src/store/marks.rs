//! Intent marks of a replica: which regions of its layer were written and may not be everywhere. After any crash they
//! name every block in which this replica may differ from the others (docs/adr/0007).
//!
//! In memory each block is marked by itself; on disk ([`super::marks_file`]) a region is, while one of its blocks is,
//! and after that until its place is needed or the image is closed in order: a guest that writes the same places again
//! and again pays for their marks once.
//!
//! Invariants:
//! - [`Marks::before_write`] returns once the regions of its blocks are durably marked, also if somebody else marked
//!   them and still waits for the sync.
//! - No region is unmarked on disk while one of its blocks is marked in memory.
//! - On disk a region has the life of the store under which its first block was marked since none was. A region with
//!   no marked block takes the new life with its next one: else a later crash would look like a power loss.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use hearth_protocol::record::Extent;
use hearth_protocol::{BlockIndex, Incarnation};
use hearth_replication::member;

use super::error::{StoreError, disk_io, is_no_space};
use super::fault::Faults;
use super::layer::Layer;
use super::layer_meta::damaged;
use super::marks_file::{self, Change, MARKS, MarksFile, REGION_BYTES, Unwritten, push};
use crate::disk::DiskError;
use crate::mutants;

/// Regions that are kept marked without need. More are marked only while each of them has a marked block, as a guest
/// can have it that writes more than this many regions without a flush.
pub const REGIONS_MAX: usize = 256;

/// Words of 64 bits for the blocks of a region, were they the smallest.
const WORDS: usize = (REGION_BYTES / 4096 / 64) as usize;

/// A region that is marked on disk, or about to be.
struct Region {
    /// The store's life under which it is marked.
    under: Incarnation,
    /// The batch that makes the mark durable.
    batch: u64,
    /// When it was last written, by [`State::clock`].
    used: u64,
    /// Its marked blocks.
    blocks: [u64; WORDS],
    marked: u32,
    /// Those of them whose mark is of an earlier life.
    old: [u64; WORDS],
}

impl Region {
    fn new(under: Incarnation, batch: u64) -> Self {
        Self {
            under,
            batch,
            used: 0,
            blocks: [0; WORDS],
            marked: 0,
            old: [0; WORDS],
        }
    }

    /// Marks blocks, counted within the region, both ends included.
    fn mark(&mut self, first: u64, last: u64) {
        for word in first / 64..=last / 64 {
            let from = first.saturating_sub(word * 64).min(63);
            let to = (last - word * 64).min(63);
            let bits = u64::MAX >> (63 - to) & u64::MAX << from;
            let old = &mut self.blocks[word as usize];
            self.marked += (bits & !*old).count_ones();
            *old |= bits;
        }
    }

    fn unmark(&mut self, block: u64) {
        let (word, bit) = (&mut self.blocks[(block / 64) as usize], 1 << (block % 64));
        self.marked -= u32::from(*word & bit != 0);
        *word &= !bit;
        self.renew(block);
    }

    /// A block's mark is of an earlier life no more. Says whether none is.
    fn renew(&mut self, block: u64) -> bool {
        self.old[(block / 64) as usize] &= !(1 << (block % 64));
        self.old.iter().all(|word| *word == 0)
    }
}

/// Whether marks are taken.
enum Phase {
    Open,
    /// The image is no longer open.
    Ended,
    /// What is on the disk is not known, or the replica failed in an earlier life.
    Failed(String),
}

/// Why the last batch that was not written was not.
struct Refusal {
    batch: u64,
    no_space: bool,
    why: String,
}

struct State {
    regions: HashMap<u64, Region>,
    /// Those without a marked block.
    idle: usize,
    clock: u64,
    /// Changes that the next batch says, and its number.
    pending: Vec<Change>,
    batch: u64,
    /// Up to this one, batches are durable.
    durable: u64,
    refused: Option<Refusal>,
    /// Whoever has taken it writes a batch.
    file: Option<MarksFile>,
    phase: Phase,
}

/// See the module.
pub struct Marks {
    layer: Arc<Layer>,
    blocks_per_region: u64,
    found: BTreeMap<u64, Incarnation>,
    state: Mutex<State>,
    /// A batch ended.
    written: Condvar,
}

impl Marks {
    /// Reads the marks in `dir` and goes on with them in a new file. Without `never_opened`, there has to be one.
    ///
    /// # Errors
    /// [`StoreError`]; the old marks are then still there.
    pub(super) fn open(
        dir: &Path,
        layer: &Arc<Layer>,
        never_opened: bool,
        faults: &Faults,
    ) -> Result<Self, StoreError> {
        let found = find(dir, layer, never_opened)?;
        let marks = Self::with(layer, found, Phase::Open);
        {
            let mut state = marks.state();
            let file = MarksFile::replace(dir, salt(layer), &state.all(), faults).map_err(|err| match err {
                Unwritten::Refused(err) | Unwritten::Lost(err) => StoreError::at("replace", &dir.join(MARKS))(err),
            })?;
            state.file = Some(file);
        }
        Ok(marks)
    }

    /// Reads the marks in `dir` of a replica that failed. Changes nothing, and takes no marks.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(super) fn look(dir: &Path, layer: &Arc<Layer>, never_opened: bool) -> Result<Self, StoreError> {
        let found = find(dir, layer, never_opened)?;
        Ok(Self::with(layer, found, Phase::Failed("the replica failed".into())))
    }

    fn with(layer: &Arc<Layer>, found: BTreeMap<u64, Incarnation>, phase: Phase) -> Self {
        let marks = Self {
            layer: layer.clone(),
            blocks_per_region: REGION_BYTES / layer.block_size(),
            found,
            state: Mutex::new(State {
                regions: HashMap::new(),
                idle: 0,
                clock: 0,
                pending: Vec::new(),
                batch: 1,
                durable: 0,
                refused: None,
                file: None,
                phase,
            }),
            written: Condvar::new(),
        };
        {
            let mut state = marks.state();
            for (&at, &under) in &marks.found {
                let mut region = Region::new(under, 0);
                region.mark(0, marks.blocks_of(at) - 1);
                region.old = region.blocks;
                state.regions.insert(at, region);
            }
        }
        marks
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("marks lock")
    }

    /// Blocks in a region; the layer's last one may be short.
    fn blocks_of(&self, region: u64) -> u64 {
        let left = self.layer.map().blocks() - region * self.blocks_per_region;
        left.min(self.blocks_per_region)
    }

    /// What was found when the replica was opened: every block of every region that was marked, and under which life
    /// of the store it was marked first since it was last unmarked.
    pub fn found(&self) -> member::Marks {
        let of = |(&region, &under): (&u64, &Incarnation)| {
            let first = region * self.blocks_per_region;
            (first..first + self.blocks_of(region)).map(move |block| (BlockIndex(block), under))
        };
        self.found.iter().flat_map(of).collect()
    }

    /// Regions that are marked on disk, or about to be.
    pub fn regions(&self) -> usize {
        self.state().regions.len()
    }

    /// Marks blocks that are about to change, and returns once that is durable; at once if it is already.
    ///
    /// To be called before every write, trim and zeroing, also of blocks that the member calls marked: whoever marked
    /// them first may still be waiting.
    ///
    /// # Errors
    /// [`DiskError`]: the blocks must not change. After a failed sync the layer takes no more writes.
    pub fn before_write(&self, blocks: Extent, incarnation: Incarnation) -> Result<(), DiskError> {
        if blocks.last.0 >= self.layer.map().blocks() {
            let size = self.layer.block_size();
            return Err(DiskError::OutOfRange {
                offset: blocks.first.0.saturating_mul(size),
                length: (blocks.last.0.saturating_sub(blocks.first.0))
                    .saturating_add(1)
                    .saturating_mul(size),
                size: self.layer.size(),
            });
        }
        let mut state = self.state();
        state.check()?;
        state.clock += 1;
        let mut batch = 0;
        let per = self.blocks_per_region;
        for at in blocks.first.0 / per..=blocks.last.0 / per {
            let first = blocks.first.0.saturating_sub(at * per);
            let last = (blocks.last.0 - at * per).min(per - 1);
            batch = batch.max(state.mark(at, (first, last), incarnation));
        }
        if batch <= state.durable {
            return Ok(());
        }
        state.make_room();
        self.wait(state, batch)
    }

    /// Notes that blocks are everywhere and durable here. Never waits; so the member's lock, or whatever else orders
    /// what it says, can be held over it, and has to be: a later write to such a block marks it again.
    pub fn unmark(&self, blocks: &BTreeSet<BlockIndex>) {
        let mut state = self.state();
        let state = &mut *state;
        for block in blocks {
            let at = block.0 / self.blocks_per_region;
            if let Some(region) = state.regions.get_mut(&at)
                && region.marked > 0
            {
                region.unmark(block.0 % self.blocks_per_region);
                state.idle += usize::from(region.marked == 0);
            }
        }
    }

    /// Turns marks of an earlier life of the store into marks of this one, durably: what they stood for is over with the
    /// flush that this is part of. A region turns when all its marks have.
    ///
    /// # Errors
    /// [`DiskError`]: the marks are as before, or after a failed sync the layer takes no more writes.
    pub fn anew(&self, blocks: &BTreeSet<BlockIndex>, now: Incarnation) -> Result<(), DiskError> {
        let mut state = self.state();
        let mut turned = BTreeMap::new();
        for block in blocks {
            let at = block.0 / self.blocks_per_region;
            if let Some(region) = state.regions.get_mut(&at)
                && region.under != now
                && region.renew(block.0 % self.blocks_per_region)
            {
                turned.insert(at, region.under);
            }
        }
        if turned.is_empty() {
            return Ok(());
        }
        let file = loop {
            state.check()?;
            match state.file.take() {
                Some(file) => break file,
                None => state = self.written.wait(state).expect("marks lock"),
            }
        };
        let turn = |state: &mut State, to: Option<Incarnation>| {
            for (at, was) in &turned {
                if let Some(region) = state.regions.get_mut(at) {
                    region.under = to.unwrap_or(*was);
                }
            }
        };
        // Nobody reads the lives of regions before the file is back.
        turn(&mut state, Some(now));
        let number = state.batch;
        let mut state = self.write_batch(state, file, true);
        state.check()?;
        if state.durable < number {
            turn(&mut state, None);
            let refused = state.refused.as_ref().map(|refused| self.refused(refused));
            return Err(refused.unwrap_or(DiskError::ShuttingDown));
        }
        Ok(())
    }

    /// Unmarks on disk what is not marked in memory, and takes no marks from then on. For the image's orderly end,
    /// after a flush.
    ///
    /// # Errors
    /// The operating system's; more is marked then than has to be.
    pub fn close(&self) -> Result<(), DiskError> {
        let mut state = self.state();
        while state.file.is_none() && matches!(state.phase, Phase::Open) {
            state = self.written.wait(state).expect("marks lock");
        }
        if !matches!(state.phase, Phase::Open) {
            return Ok(());
        }
        state.phase = Phase::Ended;
        self.written.notify_all();
        if state.idle == 0 && state.pending.is_empty() {
            return Ok(());
        }
        state.regions.retain(|_, region| region.marked > 0);
        state.idle = 0;
        let (all, mut file) = (state.all(), state.file.take().expect("nobody writes a batch"));
        file.renew(&all).map_err(|err| match err {
            Unwritten::Refused(err) | Unwritten::Lost(err) => disk_io(self.what("unmark regions"), err),
        })
    }

    /// Takes no marks from now on; those on disk stay. For an image that ends without order.
    pub fn end(&self) {
        let mut state = self.state();
        if matches!(state.phase, Phase::Open) {
            state.phase = Phase::Ended;
        }
        self.written.notify_all();
    }

    /// Waits for a batch, and writes what is pending if nobody else does.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, batch: u64) -> Result<(), DiskError> {
        loop {
            if batch <= state.durable {
                return Ok(());
            }
            state.check()?;
            if let Some(refused) = state.refused.as_ref().filter(|refused| batch <= refused.batch) {
                return Err(self.refused(refused));
            }
            state = match state.file.take() {
                Some(file) => self.write_batch(state, file, false),
                None => self.written.wait(state).expect("marks lock"),
            };
        }
    }

    /// Writes what is pending, without the lock; `whole` in a file that replaces the old one in any case.
    fn write_batch<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        mut file: MarksFile,
        whole: bool,
    ) -> MutexGuard<'a, State> {
        let changes = std::mem::take(&mut state.pending);
        let number = state.batch;
        state.batch += 1;
        let all = (whole || file.is_long_with(&changes)).then(|| state.all());
        drop(state);
        let written = match all {
            Some(all) if whole => file.renew(&all),
            Some(all) => file.shorten(&all, &changes),
            None => file.append(&changes),
        };
        let mut state = self.state();
        match written {
            Ok(()) => state.durable = number,
            Err(Unwritten::Refused(err)) => state.take_back(number, changes, &err),
            Err(Unwritten::Lost(err)) => {
                let why = format!("{}: {err}", self.what("make marks durable"));
                state.phase = Phase::Failed(why.clone());
                self.layer.poison(why, true);
            }
        }
        state.file = Some(file);
        self.written.notify_all();
        state
    }

    fn what(&self, action: &str) -> String {
        format!("cannot {action} of layer {}", self.layer.id())
    }

    fn refused(&self, refused: &Refusal) -> DiskError {
        let what = self.what("mark regions");
        if refused.no_space {
            return DiskError::NoSpace(what);
        }
        DiskError::Io {
            what,
            source: io::Error::other(refused.why.clone()),
        }
    }
}

impl State {
    fn check(&self) -> Result<(), DiskError> {
        match &self.phase {
            Phase::Open => Ok(()),
            Phase::Ended => Err(DiskError::ShuttingDown),
            Phase::Failed(why) => Err(DiskError::Poisoned(why.clone())),
        }
    }

    /// Marks blocks of a region, both ends included. Returns the batch that makes it durable.
    fn mark(&mut self, at: u64, (first, last): (u64, u64), now: Incarnation) -> u64 {
        let region = match self.regions.entry(at) {
            Entry::Occupied(entry) => {
                let region = entry.into_mut();
                let idle = region.marked == 0;
                self.idle -= usize::from(idle);
                if region.under != now && (idle || mutants::MARK_RENEWED.is_on()) {
                    push(&mut self.pending, at, None);
                    push(&mut self.pending, at, Some(now));
                    (region.under, region.batch) = (now, self.batch);
                }
                region
            }
            Entry::Vacant(entry) => {
                push(&mut self.pending, at, Some(now));
                entry.insert(Region::new(now, self.batch))
            }
        };
        region.used = self.clock;
        region.mark(first, last);
        region.batch
    }

    /// Unmarks regions that have no marked block, those first that were not written for longest, while there are too
    /// many.
    fn make_room(&mut self) {
        let early = mutants::REGION_UNMARKED_EARLY.is_on();
        let surplus = self.regions.len().saturating_sub(REGIONS_MAX);
        if surplus == 0 || (self.idle == 0 && !early) {
            return;
        }
        let idle = self.regions.iter().filter(|(_, region)| region.marked == 0 || early);
        let mut idle: Vec<_> = idle.map(|(at, region)| (region.used, *at)).collect();
        idle.sort_unstable();
        for (_, at) in idle.into_iter().take(surplus) {
            let region = self.regions.remove(&at).expect("it was found there");
            self.idle -= usize::from(region.marked == 0);
            push(&mut self.pending, at, None);
        }
    }

    /// A batch of which nothing counts: its changes go into the next one.
    fn take_back(&mut self, number: u64, mut changes: Vec<Change>, err: &io::Error) {
        changes.append(&mut self.pending);
        self.pending = changes;
        for region in self.regions.values_mut().filter(|region| region.batch == number) {
            region.batch = self.batch;
        }
        self.refused = Some(Refusal {
            batch: number,
            no_space: is_no_space(err),
            why: err.to_string(),
        });
    }

    /// Everything that is marked.
    fn all(&self) -> Vec<Change> {
        let mut regions: Vec<_> = self.regions.iter().map(|(at, region)| (region.under, *at)).collect();
        regions.sort_unstable();
        let mut all = Vec::new();
        for (under, at) in regions {
            push(&mut all, at, Some(under));
        }
        all
    }
}

fn salt(layer: &Layer) -> u32 {
    layer.id().0 as u32
}

/// The regions that are marked in `dir`, each with the life of the store under which it was marked first.
fn find(dir: &Path, layer: &Layer, never_opened: bool) -> Result<BTreeMap<u64, Incarnation>, StoreError> {
    let regions = layer.size().div_ceil(REGION_BYTES);
    let changes = match marks_file::read(dir, salt(layer), regions)? {
        Some(changes) => changes,
        None if never_opened => Vec::new(),
        None => return Err(damaged(&dir.join(MARKS), "it is missing")),
    };
    let mut found = BTreeMap::new();
    for change in changes {
        match change {
            Change::Mark { first, count, under } => (first..first + count).for_each(|region| {
                found.entry(region).or_insert(under);
            }),
            Change::Unmark { first, count } => (first..first + count).for_each(|region| {
                found.remove(&region);
            }),
        }
    }
    Ok(found)
}
