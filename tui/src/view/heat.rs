//! One image: its figures over time, its heat map with the RAM tier, and what is under the cursor.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use hearth_protocol::view::{ImageHeatView, ImageView};
use hearth_protocol::{ByteLen, HeatScore, ImageId};

use super::{panel, parts, title};
use crate::fmt;
use crate::heatmap::{self, Grid};
use crate::model::Model;
use crate::snapshot::Snapshot;
use crate::tables;
use crate::theme::{HEAT_LEVELS, Tone};
use crate::update;

/// Lines above the map: figures, two sparklines, a rest.
const ABOVE: u16 = 4;
/// Lines under the map: legend, cursor.
const BELOW: u16 = 3;

/// Where the map itself lies.
pub fn map_area(body: Rect) -> Rect {
    Rect::new(
        body.x + 2,
        body.y + 1 + ABOVE,
        body.width.saturating_sub(4),
        body.height.saturating_sub(2 + ABOVE + BELOW),
    )
}

pub fn draw(model: &Model, snapshot: &Snapshot, id: ImageId, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let Some(image) = snapshot.image(id) else {
        let inner = panel(theme, title(theme, "Heat map"), area, buffer);
        let text = "this image does not exist at this moment: Esc goes back";
        buffer.set_stringn(
            inner.x + 1,
            inner.y + 1,
            text,
            inner.width.into(),
            theme.tone(Tone::Dim),
        );
        return;
    };
    let heading = match model.map.window {
        None => image.name.to_string(),
        Some((first, count)) => format!("{} blocks {first}-{}", image.name, first + count - 1),
    };
    let inner = panel(theme, title(theme, heading), area, buffer);
    figures(model, image, inner, buffer);

    let Some(heat) = model.heat(id) else {
        let text = if model.is_live() || model.wanted_event().is_some() {
            "asking for its heat …"
        } else {
            "its heat was not looked at then; L goes back to live"
        };
        let at = map_area(area);
        buffer.set_stringn(at.x, at.y + 1, text, at.width.into(), theme.tone(Tone::Dim));
        return;
    };
    let Some(grid) = update::map_grid(model) else { return };
    let at = map_area(area);
    let cursor = grid.cell_of(model.map.block);
    heatmap::draw(&grid, heat, Some(cursor), theme, at, buffer);
    legend(model, heat, &grid, Rect::new(at.x, at.bottom(), at.width, 1), buffer);
    under_cursor(
        model,
        heat,
        &grid,
        cursor,
        Rect::new(at.x, at.bottom() + 1, at.width, 2),
        buffer,
    );
}

fn figures(model: &Model, image: &ImageView, inner: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let dim = theme.tone(Tone::Dim);
    let blocks = image.size.0.div_ceil(image.block_size.0.max(1));
    let resident = ByteLen(image.resident_blocks.saturating_mul(image.block_size.0));
    let line = Line::from(vec![
        Span::raw(format!(" {}", fmt::bytes(image.size))),
        Span::styled(
            format!(" = {} × {}  on ", fmt::count(blocks), fmt::bytes(image.block_size)),
            dim,
        ),
        Span::styled(image.node.to_string(), theme.tone(Tone::Accent)),
        Span::styled("  in RAM ", dim),
        Span::styled(fmt::bytes(resident), theme.tone(Tone::Ram)),
        Span::styled("  counted by ", dim),
        Span::raw(image.origin.map_or("nobody yet", |o| o.as_str())),
    ]);
    buffer.set_line(inner.x, inner.y, &line, inner.width);

    let label = 23;
    let width = usize::from(inner.width).saturating_sub(label + 12);
    let id = image.id;
    let hits = model.series(width, |s| s.image(id).and_then(|i| i.hit_permille));
    let p99 = model.series(width, |s| {
        s.image(id)
            .filter(|i| i.read_latency.count > 0)
            .map(|i| i.read_latency.p99_us)
    });
    let most = p99.iter().flatten().max().copied().unwrap_or(0);
    let rows = [
        (
            format!("reads {:>6}/s   hits", fmt::short(image.reads_per_s)),
            image.hit_permille.map_or_else(|| "-".into(), fmt::permille),
            parts::spark(theme, &hits, 1000),
            image.hit_permille.map_or(Tone::Dim, tables::hit_tone),
        ),
        (
            format!("writes {:>5}/s    p99", fmt::short(image.writes_per_s)),
            if image.read_latency.count == 0 {
                "-".into()
            } else {
                fmt::us(image.read_latency.p99_us)
            },
            parts::spark(theme, &p99, most),
            Tone::Accent,
        ),
    ];
    for (i, (text, value, line, tone)) in rows.into_iter().enumerate() {
        let line = Line::from(vec![
            Span::styled(format!(" {text:<label$}"), dim),
            Span::styled(format!("{value:>7}  "), theme.tone(tone)),
            Span::styled(line, theme.tone(tone)),
        ]);
        buffer.set_line(inner.x, inner.y + 1 + i as u16, &line, inner.width);
    }
}

/// The ramp with its scale, and the lane's marks.
fn legend(model: &Model, heat: &ImageHeatView, grid: &Grid, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let dim = theme.tone(Tone::Dim);
    let mut spans = vec![Span::styled("heat 0 ", dim)];
    for level in 0..HEAT_LEVELS {
        let (glyph, style) = theme.heat(level);
        spans.push(Span::styled(glyph, style));
    }
    spans.push(Span::styled(format!(" {}", fmt::score(heatmap::hottest(heat))), dim));
    spans.push(Span::styled("   RAM ", dim));
    for (resident, text) in [(2, " all  "), (1, " half  "), (0, "")] {
        if text.is_empty() {
            let (glyph, style) = theme.lane(1, 8);
            spans.push(Span::styled(glyph.repeat(2), style));
            spans.push(Span::styled(" some", dim));
        } else {
            let (glyph, style) = theme.lane(resident, 2);
            spans.push(Span::styled(glyph.repeat(2), style));
            spans.push(Span::styled(text, dim));
        }
    }
    let cell = ByteLen(grid.per_cell.saturating_mul(heat.block_size.0));
    spans.push(Span::styled(format!("   cell {}", fmt::bytes(cell)), dim));
    buffer.set_line(area.x, area.y, &Line::from(spans), area.width);
}

fn under_cursor(model: &Model, heat: &ImageHeatView, grid: &Grid, at: usize, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let Some(cell) = grid.cells.get(at) else { return };
    let range = grid.blocks_of(at);
    let address = |block: u64| fmt::bytes(ByteLen(block.saturating_mul(heat.block_size.0)));
    let blocks = if range.end - range.first == 1 {
        format!("block {}", range.first)
    } else {
        format!("blocks {}-{}", range.first, range.end - 1)
    };
    let what = match cell.hottest {
        None => "no heat".to_owned(),
        Some(_) if cell.score == HeatScore(0) => format!("cold, {} of {} in RAM", cell.resident, cell.warm),
        Some(block) => format!(
            "hottest {block} at {}, {} of {} warm in RAM",
            fmt::score(cell.score),
            cell.resident,
            cell.warm
        ),
    };
    let line = Line::from(vec![
        Span::styled("▸ ", theme.tone(Tone::Title)),
        Span::raw(blocks),
        Span::styled(format!(" at {}  ", address(range.first)), theme.tone(Tone::Dim)),
        Span::raw(what),
    ]);
    buffer.set_line(area.x, area.y, &line, area.width);
    let warm = heat.cells.len();
    let resident = heat.cells.iter().filter(|c| c.ram).count();
    let mut text = format!(
        "  image: {} of {} blocks warm, {} in RAM ({} of the warm)",
        fmt::count(warm as u64),
        fmt::count(heat.blocks),
        fmt::count(resident as u64),
        fmt::permille(fmt::share(resident as u64, warm as u64))
    );
    if heat.omitted > 0 {
        text += &format!(", {} coldest left out", fmt::count(heat.omitted));
    }
    buffer.set_stringn(area.x, area.y + 1, text, area.width.into(), theme.tone(Tone::Dim));
}
