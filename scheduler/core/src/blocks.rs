//! What the scheduler knows of the blocks on one node: their heat, and which of them are in the main region of its
//! RAM tier.
//!
//! One cell per block; two orders over the cells are kept up to date with each change, so that a decision looks only
//! at what it can move: `hot` (worth promoting, hottest first) and `cold` (resident, coldest first). The orders are
//! derived: they are rebuilt after loading and are no part of the digest.
//!
//! Memory: a cell is 32 bytes with its key, about 45 in the tree, and 25 more while it stands in one of the orders:
//! at most 70 bytes a tracked block.

use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::heat::BlockHeat;
use hearth_protocol::{BlockIndex, HeatScore, LayerId, Seq};
use serde::{Deserialize, Serialize};

use crate::decay::{DecayClock, Weight, shifted};

/// Bursts that one record may earn per report: a window has ten tenths of a second, more is a lie.
const BURSTS_PER_REPORT_MAX: u64 = 10;

/// Ticks for which a block is not ordered in again after a node skipped or refused it, or a write dropped it.
pub const REST_TICKS: u64 = 8;

/// Doublings of the rest at most: a block that never can be promoted, such as a hole, is tried every nine minutes.
const REST_DOUBLINGS_MAX: u8 = 6;

/// Where a block stands between disk and the main region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// Not in the main region, and nothing ordered.
    Out,
    /// Ordered in, no answer yet.
    Arriving,
    /// In the main region, as the node said.
    Resident,
    /// Ordered out, no answer yet.
    Leaving,
    /// An order expired without an answer: it may be in or out, and must be settled by another order.
    Doubtful,
    /// Out, and not to be ordered in for some ticks: the last attempt was skipped or refused, or a write made the
    /// copy stale.
    Resting,
}

/// One block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub weight: Weight,
    /// Log position of the newest heat event *without losses* that counted it; 0 if there is none.
    pub heat_seq: Seq,
    pub place: Place,
    /// Orders in a row that the node skipped or refused for it: each doubles the rest before the next.
    pub skips: u8,
}

impl Default for Cell {
    fn default() -> Self {
        Self {
            weight: 0,
            heat_seq: Seq(0),
            place: Place::Out,
            skips: 0,
        }
    }
}

impl Cell {
    fn wanted(&self, floor: Weight) -> bool {
        self.place == Place::Out && self.heat_seq.0 > 0 && self.weight >= floor
    }
}

/// The blocks of one layer on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerBlocks {
    /// Block size in bytes.
    pub block_bytes: u64,
    pub cells: BTreeMap<BlockIndex, Cell>,
    /// Cells that are [`Place::Resident`].
    pub resident: u64,
    #[serde(skip)]
    pub hot: BTreeSet<(Reverse<Weight>, BlockIndex)>,
    #[serde(skip)]
    pub cold: BTreeSet<(Weight, BlockIndex)>,
    #[serde(skip)]
    pub doubtful: BTreeSet<BlockIndex>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct NodeBlocks {
    pub layers: BTreeMap<LayerId, LayerBlocks>,
    /// Cells in all layers.
    pub tracked: u64,
    pub resident_bytes: u64,
    pub arriving_bytes: u64,
    pub doubtful_bytes: u64,
    /// Blocks that may be ordered again, by tick.
    pub rests: BTreeMap<u64, Vec<(LayerId, BlockIndex)>>,
    /// Least weight that stands in `hot`.
    #[serde(skip)]
    floor: Weight,
}

impl LayerBlocks {
    fn new(block_bytes: u64) -> Self {
        Self {
            block_bytes,
            cells: BTreeMap::new(),
            resident: 0,
            hot: BTreeSet::new(),
            cold: BTreeSet::new(),
            doubtful: BTreeSet::new(),
        }
    }

    fn unlist(&mut self, block: BlockIndex, cell: &Cell, floor: Weight) {
        if cell.wanted(floor) {
            self.hot.remove(&(Reverse(cell.weight), block));
        }
        match cell.place {
            Place::Resident => {
                self.cold.remove(&(cell.weight, block));
            }
            Place::Doubtful => {
                self.doubtful.remove(&block);
            }
            _ => {}
        }
    }

    fn list(&mut self, block: BlockIndex, cell: &Cell, floor: Weight) {
        if cell.wanted(floor) {
            self.hot.insert((Reverse(cell.weight), block));
        }
        match cell.place {
            Place::Resident => {
                self.cold.insert((cell.weight, block));
            }
            Place::Doubtful => {
                self.doubtful.insert(block);
            }
            _ => {}
        }
    }

    fn relist(&mut self, floor: Weight) {
        self.hot.clear();
        self.cold.clear();
        self.doubtful.clear();
        // Collected first: a sorted bulk build is several times faster than one insertion each.
        let mut hot = Vec::new();
        let mut cold = Vec::new();
        for (block, cell) in &self.cells {
            if cell.wanted(floor) {
                hot.push((Reverse(cell.weight), *block));
            }
            match cell.place {
                Place::Resident => cold.push((cell.weight, *block)),
                Place::Doubtful => {
                    self.doubtful.insert(*block);
                }
                _ => {}
            }
        }
        self.hot = hot.into_iter().collect();
        self.cold = cold.into_iter().collect();
    }
}

/// The share of a window's bursts that reads earned, in 16-bit fixed point: RAM serves reads only, so a block that
/// is only written earns nothing, and one that is mostly written little.
pub(crate) fn earned(record: &BlockHeat, reports: u64) -> HeatScore {
    let touches = u64::from(record.reads) + u64::from(record.writes);
    if record.reads == 0 {
        return HeatScore(0);
    }
    let bursts = u64::from(record.bursts).min(BURSTS_PER_REPORT_MAX.saturating_mul(reports.clamp(1, 3_600)));
    HeatScore(HeatScore::whole(bursts).0.saturating_mul(u64::from(record.reads)) / touches)
}

impl NodeBlocks {
    /// Folds one layer's records of one heat event. `clean` is false when the window lost samples: such heat warms
    /// what is known, but makes no block a candidate (DESIGN §7).
    pub(crate) fn fold(&mut self, at: HeatAt<'_>, records: &[BlockHeat]) {
        let floor = self.floor;
        let layer = self
            .layers
            .entry(at.layer)
            .or_insert_with(|| LayerBlocks::new(at.block_bytes));
        for record in records {
            let add = at.clock.weight(earned(record, at.reports));
            if add == 0 {
                continue;
            }
            let entry = layer.cells.entry(record.block);
            self.tracked += u64::from(matches!(entry, Entry::Vacant(_)));
            let cell = entry.or_default();
            let before = *cell;
            cell.weight = cell.weight.saturating_add(add).min(u64::MAX >> 1);
            if at.clean {
                cell.heat_seq = at.seq;
            }
            let after = *cell;
            layer.unlist(record.block, &before, floor);
            layer.list(record.block, &after, floor);
        }
        if layer.cells.is_empty() {
            self.layers.remove(&at.layer);
        }
    }

    /// The cell of a block.
    pub(crate) fn cell(&self, layer: LayerId, block: BlockIndex) -> Option<&Cell> {
        self.layers.get(&layer)?.cells.get(&block)
    }

    /// Moves a block to another place and keeps the accounts; makes a cell for a block without heat.
    pub(crate) fn place(&mut self, layer_id: LayerId, block_bytes: u64, block: BlockIndex, to: Place) {
        let floor = self.floor;
        let layer = self
            .layers
            .entry(layer_id)
            .or_insert_with(|| LayerBlocks::new(block_bytes));
        let before = layer.cells.get(&block).copied();
        let mut cell = before.unwrap_or_default();
        if let Some(before) = &before {
            layer.unlist(block, before, floor);
        } else {
            self.tracked += 1;
        }
        let bytes = layer.block_bytes;
        match cell.place {
            Place::Resident => {
                layer.resident -= 1;
                self.resident_bytes -= bytes;
            }
            Place::Arriving => self.arriving_bytes -= bytes,
            Place::Doubtful => self.doubtful_bytes -= bytes,
            Place::Out | Place::Leaving | Place::Resting => {}
        }
        match to {
            Place::Resident => {
                layer.resident += 1;
                self.resident_bytes += bytes;
            }
            Place::Arriving => self.arriving_bytes += bytes,
            Place::Doubtful => self.doubtful_bytes += bytes,
            Place::Out | Place::Leaving | Place::Resting => {}
        }
        cell.place = to;
        if to == Place::Out && cell.weight == 0 {
            layer.cells.remove(&block);
            self.tracked -= 1;
            if layer.cells.is_empty() {
                self.layers.remove(&layer_id);
            }
            return;
        }
        layer.cells.insert(block, cell);
        layer.list(block, &cell, floor);
    }

    /// A promotion of the block was skipped or refused: it is out, and rests, twice as long with every skip in a row.
    pub(crate) fn skipped(&mut self, layer: LayerId, block: BlockIndex, tick: u64) {
        let held = |p| matches!(p, Place::Arriving | Place::Doubtful);
        if !self.place_if(layer, block, held, Place::Resting) {
            return;
        }
        let cell = self.layers.get_mut(&layer).and_then(|l| l.cells.get_mut(&block));
        let cell = cell.expect("a resting block is tracked");
        let rest = REST_TICKS << cell.skips.min(REST_DOUBLINGS_MAX);
        cell.skips = cell.skips.saturating_add(1);
        self.rests
            .entry(tick.saturating_add(rest))
            .or_default()
            .push((layer, block));
    }

    /// A promotion of the block is done, as the node said.
    pub(crate) fn arrived(&mut self, layer: LayerId, block_bytes: u64, block: BlockIndex) {
        self.place(layer, block_bytes, block, Place::Resident);
        let cell = self.layers.get_mut(&layer).and_then(|l| l.cells.get_mut(&block));
        cell.expect("a resident is tracked").skips = 0;
    }

    /// A demotion of the block was refused: it stays listed as leaving for a while, so that the order is not repeated
    /// with every tick.
    pub(crate) fn stays(&mut self, layer: LayerId, block: BlockIndex, tick: u64) {
        let leaving = |p| p == Place::Leaving;
        if self.place_if(layer, block, leaving, Place::Leaving) {
            let until = tick.saturating_add(REST_TICKS);
            self.rests.entry(until).or_default().push((layer, block));
        }
    }

    /// Ends the rests that are due.
    pub(crate) fn wake(&mut self, tick: u64) {
        while let Some(entry) = self.rests.first_entry() {
            if *entry.key() > tick {
                break;
            }
            for (layer, block) in entry.remove() {
                self.place_if(layer, block, |p| p == Place::Resting, Place::Out);
                self.place_if(layer, block, |p| p == Place::Leaving, Place::Resident);
            }
        }
    }

    /// Moves a block that is tracked and whose place satisfies `when`; says whether it did.
    pub(crate) fn place_if(
        &mut self,
        layer: LayerId,
        block: BlockIndex,
        when: impl Fn(Place) -> bool,
        to: Place,
    ) -> bool {
        let Some(blocks) = self.layers.get(&layer) else {
            return false;
        };
        let bytes = blocks.block_bytes;
        let moves = blocks.cells.get(&block).is_some_and(|cell| when(cell.place));
        if moves {
            self.place(layer, bytes, block, to);
        }
        moves
    }

    /// Every tracked block with its layer, ascending.
    fn all(&self) -> impl Iterator<Item = (LayerId, &LayerBlocks, BlockIndex, &Cell)> {
        self.layers.iter().flat_map(|(id, layer)| {
            let cells = layer.cells.iter();
            cells.map(move |(block, cell)| (*id, layer, *block, cell))
        })
    }

    /// Everything out of RAM: the node's process started anew.
    pub(crate) fn all_out(&mut self) {
        let held: Vec<_> = self
            .all()
            .filter(|(.., cell)| cell.place != Place::Out)
            .map(|(id, layer, block, _)| (id, layer.block_bytes, block))
            .collect();
        for (layer, bytes, block) in held {
            self.place(layer, bytes, block, Place::Out);
        }
        self.rests.clear();
    }

    /// The copies of one layer are gone, its heat stays: a growing layer came under a new epoch.
    pub(crate) fn layer_out(&mut self, layer: LayerId) {
        let Some(blocks) = self.layers.get(&layer) else {
            return;
        };
        let bytes = blocks.block_bytes;
        let held: Vec<_> = blocks
            .cells
            .iter()
            .filter(|(_, c)| matches!(c.place, Place::Resident | Place::Leaving | Place::Doubtful))
            .map(|(block, _)| *block)
            .collect();
        for block in held {
            self.place(layer, bytes, block, Place::Out);
        }
    }

    /// The layer is gone: its heat counts no more. Copies stay listed, without heat, until a command took them out.
    pub(crate) fn forget_layer(&mut self, layer: LayerId) {
        let Some(blocks) = self.layers.get_mut(&layer) else {
            return;
        };
        let before = blocks.cells.len() as u64;
        blocks.cells.retain(|_, cell| {
            cell.weight = 0;
            cell.heat_seq = Seq(0);
            cell.place != Place::Out
        });
        self.tracked -= before - blocks.cells.len() as u64;
        blocks.relist(self.floor);
        if blocks.cells.is_empty() {
            self.layers.remove(&layer);
        }
    }

    /// The node said that a write made the copy stale: it is out, and rests.
    pub(crate) fn dropped(&mut self, layer: LayerId, block: BlockIndex, tick: u64) {
        let held = |p| !matches!(p, Place::Out | Place::Resting);
        if self.place_if(layer, block, held, Place::Resting) {
            let until = tick.saturating_add(REST_TICKS);
            self.rests.entry(until).or_default().push((layer, block));
        }
    }

    /// Gives a new node its first floor; later ones come with the ticks.
    pub(crate) fn ensure_floor(&mut self, floor: Weight) {
        if self.layers.is_empty() {
            self.floor = floor;
        }
    }

    /// Raises the floor of `hot` to what the threshold weighs now, and drops what fell below it.
    pub(crate) fn raise_floor(&mut self, floor: Weight) {
        self.floor = floor;
        for layer in self.layers.values_mut() {
            while let Some((Reverse(weight), _)) = layer.hot.last() {
                if *weight >= floor {
                    break;
                }
                layer.hot.pop_last();
            }
        }
    }

    /// Rebuilds the derived orders from the cells.
    pub(crate) fn rebuild(&mut self, floor: Weight) {
        self.floor = floor;
        for layer in self.layers.values_mut() {
            layer.relist(floor);
        }
    }

    /// Replaces every weight and rebuilds the orders; drops blocks that have neither weight nor place.
    fn reweigh(&mut self, weight: impl Fn(Weight) -> Weight, floor: Weight) {
        let mut tracked = 0;
        self.layers.retain(|_, layer| {
            layer.cells.retain(|_, cell| {
                cell.weight = weight(cell.weight);
                cell.weight > 0 || cell.place != Place::Out
            });
            tracked += layer.cells.len() as u64;
            !layer.cells.is_empty()
        });
        self.tracked = tracked;
        self.rebuild(floor);
    }

    /// The landmark of all weights moved up by `bits` doublings.
    pub(crate) fn shift(&mut self, bits: u32, floor: Weight) {
        self.reweigh(|w| shifted(w, bits), floor);
    }

    /// The half-life changed: `before` reads the weights, which become scores at the landmark.
    pub(crate) fn restart(&mut self, before: &DecayClock, floor: Weight) {
        self.reweigh(|w| before.score(w).0, floor);
    }

    /// Forgets the coldest blocks that are out of RAM when more than `limit` are tracked. An eighth of the limit at
    /// once, so that the selection costs a constant per forgotten block. Returns how many were forgotten.
    pub(crate) fn forget_coldest(&mut self, limit: u64) -> u64 {
        if self.tracked <= limit {
            return 0;
        }
        let mut out: Vec<(Weight, LayerId, BlockIndex)> = self
            .all()
            .filter(|(.., cell)| cell.place == Place::Out)
            .map(|(id, _, block, cell)| (cell.weight, id, block))
            .collect();
        let surplus = usize::try_from(self.tracked - limit + limit / 8).unwrap_or(usize::MAX);
        if surplus < out.len() {
            out.select_nth_unstable(surplus);
            out.truncate(surplus);
        }
        let floor = self.floor;
        for (_, id, block) in &out {
            let layer = self.layers.get_mut(id).expect("selected from it");
            let cell = layer.cells.remove(block).expect("selected from it");
            layer.unlist(*block, &cell, floor);
            if layer.cells.is_empty() {
                self.layers.remove(id);
            }
        }
        self.tracked -= out.len() as u64;
        out.len() as u64
    }
}

/// Where and when a batch of records was counted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeatAt<'a> {
    pub clock: &'a DecayClock,
    pub layer: LayerId,
    pub block_bytes: u64,
    pub seq: Seq,
    /// Reports folded into the event.
    pub reports: u64,
    /// No sample of the window was lost.
    pub clean: bool,
}
