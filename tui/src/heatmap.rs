//! The heat map: an image's blocks in a grid of cells, each as hot as its hottest block, with the RAM tier in a lane of
//! its own under every row.
//!
//! Row-major, because a disk is read along its addresses: a scan is a line, a file system's hot tables are spots.

use hearth_protocol::view::ImageHeatView;
use hearth_protocol::{BlockIndex, HeatScore};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;

use crate::fmt;
use crate::theme::{HEAT_LEVELS, Theme, Tone};

/// Columns taken by the address in front of every row.
pub const LABEL_WIDTH: u16 = 9;

/// Blocks `first..end` of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first block.
    pub first: u64,
    /// The block after the last.
    pub end: u64,
}

/// What lies in one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GridCell {
    /// The highest score.
    pub score: HeatScore,
    /// The block that has it.
    pub hottest: Option<BlockIndex>,
    /// Blocks with any heat or in RAM.
    pub warm: u64,
    /// Of those, in the main region.
    pub resident: u64,
}

/// A range of blocks in cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// The blocks.
    pub range: Range,
    /// Blocks in one cell.
    pub per_cell: u64,
    /// Cells in one row.
    pub columns: u64,
    /// Cells, row by row.
    pub cells: Vec<GridCell>,
}

impl Grid {
    /// Puts blocks into at most `columns * rows` cells.
    pub fn new(heat: &ImageHeatView, range: Range, columns: u64, rows: u64) -> Self {
        let end = range.end.min(heat.blocks);
        let range = Range {
            first: range.first.min(end),
            end,
        };
        let len = range.end - range.first;
        let columns = columns.max(1);
        let per_cell = len.div_ceil(columns * rows.max(1)).max(1);
        let mut cells = vec![GridCell::default(); len.div_ceil(per_cell) as usize];
        let from = heat.cells.partition_point(|c| c.block.0 < range.first);
        for block in heat.cells[from..].iter().take_while(|c| c.block.0 < range.end) {
            let cell = &mut cells[((block.block.0 - range.first) / per_cell) as usize];
            cell.warm += 1;
            cell.resident += u64::from(block.ram);
            if cell.hottest.is_none() || block.score > cell.score {
                cell.score = block.score;
                cell.hottest = Some(block.block);
            }
        }
        Self {
            range,
            per_cell,
            columns,
            cells,
        }
    }

    /// The cell that holds a block of the range.
    pub fn cell_of(&self, block: u64) -> usize {
        let last = self.cells.len().saturating_sub(1);
        ((block.saturating_sub(self.range.first) / self.per_cell) as usize).min(last)
    }

    /// The blocks of a cell.
    pub fn blocks_of(&self, cell: usize) -> Range {
        let first = self.range.first + cell as u64 * self.per_cell;
        Range {
            first,
            end: (first + self.per_cell).min(self.range.end),
        }
    }
}

/// The level of a score on a logarithmic scale that ends at `most`: 0 for none, else 1 to 15.
pub fn level(score: HeatScore, most: HeatScore) -> u8 {
    if score.0 == 0 {
        return 0;
    }
    let unit = f64::from(1u32 << (HeatScore::FRACTION_BITS - 4));
    let log = |s: HeatScore| (1.0 + s.0 as f64 / unit).ln();
    let top = f64::from(HEAT_LEVELS - 1);
    (log(score) / log(most.max(score)) * top).ceil().clamp(1.0, top) as u8
}

/// The hottest score of an image, the end of the scale.
pub fn hottest(heat: &ImageHeatView) -> HeatScore {
    heat.cells.iter().map(|c| c.score).max().unwrap_or_default()
}

/// How many cells fit an area, and whether there is room for the RAM lanes.
pub fn fit(area: Rect) -> (u64, u64, bool) {
    let columns = u64::from(area.width.saturating_sub(LABEL_WIDTH)).max(1);
    let lanes = area.height >= 4;
    let rows = u64::from(if lanes { area.height / 2 } else { area.height }).max(1);
    (columns, rows, lanes)
}

/// Paints the grid.
pub fn draw(grid: &Grid, heat: &ImageHeatView, cursor: Option<usize>, theme: Theme, area: Rect, buffer: &mut Buffer) {
    let most = hottest(heat);
    let (_, _, lanes) = fit(area);
    let step = if lanes { 2 } else { 1 };
    for (row, cells) in grid.cells.chunks(grid.columns as usize).enumerate() {
        let y = area.y + row as u16 * step;
        if y >= area.bottom() {
            break;
        }
        let first = grid.range.first + row as u64 * grid.columns * grid.per_cell;
        let address = hearth_protocol::ByteLen(first.saturating_mul(heat.block_size.0));
        let label = format!("{:>8} ", fmt::bytes(address));
        buffer.set_stringn(
            area.x,
            y,
            &label,
            usize::from(LABEL_WIDTH.min(area.width)),
            theme.tone(Tone::Dim),
        );
        for (column, cell) in cells.iter().enumerate() {
            let x = area.x + LABEL_WIDTH + column as u16;
            if x >= area.right() {
                break;
            }
            let (glyph, style) = if cursor == Some(row * grid.columns as usize + column) {
                theme.map_cursor()
            } else {
                theme.heat(level(cell.score, most))
            };
            buffer.set_string(x, y, glyph, style);
            if lanes && y + 1 < area.bottom() {
                let (glyph, style) = theme.lane(cell.resident, cell.warm);
                buffer.set_string(x, y + 1, glyph, style);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::view::HeatCell;
    use hearth_protocol::{ByteLen, ImageId};

    use super::*;

    fn heat(blocks: u64, hot: &[(u64, u64, bool)]) -> ImageHeatView {
        ImageHeatView {
            image: ImageId(1),
            blocks,
            block_size: ByteLen(65536),
            cells: hot
                .iter()
                .map(|(block, bursts, ram)| HeatCell {
                    block: BlockIndex(*block),
                    score: HeatScore::whole(*bursts),
                    ram: *ram,
                })
                .collect(),
            omitted: 0,
        }
    }

    #[test]
    fn every_block_lands_in_the_cell_that_names_it() {
        let view = heat(1000, &[(0, 1, false), (37, 9, true), (38, 2, true), (999, 4, false)]);
        for (columns, rows) in [(1, 1), (10, 10), (80, 20), (7, 3)] {
            let grid = Grid::new(&view, Range { first: 0, end: 1000 }, columns, rows);
            assert!(grid.cells.len() as u64 <= columns * rows);
            assert_eq!(grid.cells.iter().map(|c| c.warm).sum::<u64>(), 4);
            assert_eq!(grid.cells.iter().map(|c| c.resident).sum::<u64>(), 2);
            for block in [0, 37, 38, 999] {
                let cell = grid.blocks_of(grid.cell_of(block));
                assert!(cell.first <= block && block < cell.end);
            }
            assert_eq!(grid.cells[grid.cell_of(37)].hottest, Some(BlockIndex(37)));
        }
    }

    #[test]
    fn ranges_beyond_the_image_are_cut() {
        let view = heat(10, &[(9, 1, false)]);
        let grid = Grid::new(&view, Range { first: 8, end: 99 }, 4, 4);
        assert_eq!(grid.cells.len(), 2);
        assert_eq!(grid.cells[1].warm, 1);
        let none = Grid::new(&heat(0, &[]), Range { first: 0, end: 0 }, 4, 4);
        assert!(none.cells.is_empty());
        assert_eq!(none.cell_of(5), 0);
    }

    #[test]
    fn levels_grow_with_the_score_and_use_the_whole_scale() {
        let most = HeatScore::whole(1000);
        assert_eq!(level(HeatScore(0), most), 0);
        assert_eq!(level(HeatScore(1), most), 1);
        assert_eq!(level(most, most), 15);
        let levels: Vec<u8> = (0..=1000).map(|b| level(HeatScore::whole(b), most)).collect();
        assert!(levels.windows(2).all(|w| w[0] <= w[1]));
        assert_eq!(level(HeatScore(1), HeatScore(0)), 15, "never divides by nothing");
    }
}
