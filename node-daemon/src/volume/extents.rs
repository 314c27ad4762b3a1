//! What clients can ask about ranges: allocation, tier, synced, heat; and an image's map.

use std::collections::HashMap;
use std::sync::Mutex;

use hearth_protocol::BlockIndex;
use hearth_protocol::rpc::MapRun;

use super::Volume;
use super::stack::{Stack, Where};
use crate::disk::{DiskError, Extent, ExtentKind};
use crate::store::LayerRef;
use crate::tier::{LayerHandle, RamTier, Region};

const ALLOCATION_HOLE_AND_ZERO: u32 = 3;
const TIER_RAM: u32 = 0;
const TIER_DISK: u32 = 1;
const TIER_REMOTE: u32 = 2;
const TIER_HOLE: u32 = 3;

/// Blocks whose heat is remembered for `hearth:heat`, at most; the coldest half goes when there are more.
const HEAT_BLOCKS_MAX: usize = 1 << 18;

/// Calls of [`Volume::note_heat`] after which heat has halved.
const HEAT_HALF_LIFE: u64 = 60;

/// Heat per block as clients see it: 0 to 15, logarithmic.
#[derive(Default)]
pub(super) struct HeatScale {
    inner: Mutex<HeatInner>,
}

#[derive(Default)]
struct HeatInner {
    calls: u64,
    bursts: HashMap<u64, u32>,
}

impl HeatScale {
    fn note(&self, blocks: impl IntoIterator<Item = (BlockIndex, u32)>) {
        let mut inner = self.inner.lock().expect("heat scale lock");
        inner.calls += 1;
        if inner.calls.is_multiple_of(HEAT_HALF_LIFE) || inner.bursts.len() > HEAT_BLOCKS_MAX {
            inner.bursts.retain(|_, n| {
                *n /= 2;
                *n > 0
            });
        }
        for (block, bursts) in blocks {
            // Sixteenths, so that a single burst is not forgotten at the first halving.
            let sum = inner.bursts.entry(block.0).or_default();
            *sum = sum.saturating_add(bursts.saturating_mul(16));
        }
    }

    fn level(&self, block: u64) -> u32 {
        let inner = self.inner.lock().expect("heat scale lock");
        match inner.bursts.get(&block) {
            None => 0,
            Some(n) => (n.max(&1).ilog2() + 1).min(15),
        }
    }
}

/// Whether all units of a block are in RAM.
pub(super) fn block_in_ram(tier: &RamTier, handle: LayerHandle, block: u64, block_size: u64) -> bool {
    block_regions(tier, handle, block, block_size).all(|r| r.is_some())
}

/// The region of each unit of a block.
pub(super) fn block_regions(
    tier: &RamTier,
    handle: LayerHandle,
    block: u64,
    block_size: u64,
) -> impl Iterator<Item = Option<Region>> {
    let units = block_size / handle.unit_bytes();
    (block * units..(block + 1) * units).map(move |unit| tier.region(handle, unit as u32))
}

impl Volume {
    /// Tells what the heat source counted since the last call, once a second, for `hearth:heat`.
    pub fn note_heat(&self, blocks: impl IntoIterator<Item = (BlockIndex, u32)>) {
        self.heat.note(blocks);
    }

    fn tier_of(&self, stack: &Stack, block: u64) -> u32 {
        match stack.find(block, 0) {
            Where::Hole => TIER_HOLE,
            Where::Local(i) | Where::Remote(i) if block_in_ram(&self.tier, stack.handle(i), block, self.block_size) => {
                TIER_RAM
            }
            Where::Local(_) => TIER_DISK,
            Where::Remote(_) => TIER_REMOTE,
        }
    }

    pub(super) fn extents_of(
        &self,
        offset: u64,
        length: u64,
        kind: ExtentKind,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        self.check_range(offset, length)?;
        let stack = self.stack();
        let end = offset + length;
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        while at < end {
            let block = at / self.block_size;
            let blocks = (end - 1) / self.block_size - block + 1;
            let (status, run) = match kind {
                ExtentKind::Synced => (1, blocks),
                ExtentKind::Allocation => match stack.find_run(block, blocks) {
                    (Where::Hole, run) => (ALLOCATION_HOLE_AND_ZERO, run),
                    (_, run) => (0, run),
                },
                ExtentKind::Tier => match stack.find_run(block, blocks) {
                    (Where::Hole, run) => (TIER_HOLE, run),
                    _ => (self.tier_of(&stack, block), 1),
                },
                ExtentKind::Heat => (self.heat.level(block), 1),
            };
            let until = ((block + run) * self.block_size).min(end);
            let full = extents.len() >= extents_max;
            match extents.last_mut() {
                Some(last) if last.status == status => last.length += until - at,
                _ if full => break,
                _ => extents.push(Extent {
                    length: until - at,
                    status,
                }),
            }
            at = until;
        }
        Ok(extents)
    }

    /// The image's map: runs of (layer, tier) that cover it.
    pub fn map(&self) -> Vec<MapRun> {
        map_stack(&self.stack(), self.size().div_ceil(self.block_size), &self.tier)
    }
}

/// The map of an image that is not attached; see [`crate::store::Store::look_at`].
pub fn map_of(layers: Vec<LayerRef>, size: u64, block_size: u64, tier: &RamTier) -> Vec<MapRun> {
    map_stack(&Stack::new(layers, block_size, tier), size.div_ceil(block_size), tier)
}

fn map_stack(stack: &Stack, blocks: u64, tier: &RamTier) -> Vec<MapRun> {
    let mut runs: Vec<MapRun> = Vec::new();
    let mut at = 0;
    while at < blocks {
        let (found, run) = stack.find_run(at, blocks - at);
        let (layer, word, count) = match found {
            Where::Hole => (None, "hole", run),
            Where::Local(i) | Where::Remote(i) => {
                let in_ram = |block| block_in_ram(tier, stack.handle(i), block, stack.block_size);
                let first = in_ram(at);
                let count = (at + 1..at + run).find(|b| in_ram(*b) != first).map_or(run, |b| b - at);
                let word = match found {
                    _ if first => "ram",
                    Where::Remote(_) => "remote",
                    _ => "disk",
                };
                (Some(stack.levels[i].layer.id()), word, count)
            }
        };
        match runs.last_mut() {
            Some(last) if last.layer == layer && last.tier == word => last.count += count,
            _ => runs.push(MapRun {
                first: BlockIndex(at),
                count,
                layer,
                tier: word.into(),
            }),
        }
        at += count;
    }
    runs
}
