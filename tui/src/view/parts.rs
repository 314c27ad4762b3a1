//! Pieces that several views share: tables in a window, gauges, sparklines.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Modifier, Style};
use ratatui::text::Span;

use crate::fmt;
use crate::model::Model;
use crate::table::{RowId, Sort, Table};
use crate::theme::{Theme, Tone};

/// A sparkline of `values` between 0 and `most` (their own maximum if 0); a gap where there is none.
pub fn spark(theme: Theme, values: &[Option<u64>], most: u64) -> String {
    let most = if most == 0 {
        values.iter().flatten().copied().max().unwrap_or(0)
    } else {
        most
    };
    values
        .iter()
        .map(|value| match value {
            None => " ",
            Some(_) if most == 0 => theme.bar_glyph(1),
            Some(v) => theme.bar_glyph(1 + (u128::from(*v) * 7 / u128::from(most)) as u64),
        })
        .collect()
}

/// A gauge of the RAM tier: the main region, the front, and what is free.
pub fn gauge(theme: Theme, main: u64, front: u64, capacity: u64, width: usize) -> Vec<Span<'static>> {
    let cells = |bytes: u64| {
        if capacity == 0 {
            return 0;
        }
        let exact = u128::from(bytes) * width as u128;
        // Anything at all shows as one cell, so that a little is not mistaken for nothing.
        (exact.div_ceil(u128::from(capacity)) as usize).min(width)
    };
    let main_cells = cells(main);
    let front_cells = cells(front).min(width - main_cells);
    let free = width - main_cells - front_cells;
    let (full, half, empty) = if theme.ascii {
        ("#", "+", ".")
    } else {
        ("█", "▓", "░")
    };
    vec![
        Span::styled(full.repeat(main_cells), theme.tone(Tone::Ram)),
        Span::styled(half.repeat(front_cells), theme.tone(Tone::Accent)),
        Span::styled(empty.repeat(free), theme.frame()),
    ]
}

/// What stands behind each row: a sparkline for a thing, or nothing.
pub type Trend<'a> = dyn Fn(&RowId, usize) -> Option<String> + 'a;

/// Paints a table: the heading and a window of rows around the cursor.
pub fn table(
    model: &Model,
    table: &Table,
    sort: Option<Sort>,
    trend: Option<(&'static str, &Trend<'_>)>,
    area: Rect,
    buffer: &mut Buffer,
) {
    let theme = model.theme;
    if area.height < 2 || area.width < 4 {
        return;
    }
    let width = usize::from(area.width) - 1;
    let shown = table.layout(width, true);
    let used: usize = shown.iter().map(|(_, w)| w + 2).sum::<usize>();
    let spare = width.saturating_sub(used);
    let trend = trend.filter(|_| spare >= 10).map(|(name, f)| (name, f, spare.min(40)));

    let mut x = area.x + 1;
    for (i, w) in &shown {
        let column = &table.columns[*i];
        let mark = match sort {
            Some(s) if column.sort == Some(s.key) => {
                if s.reversed {
                    "▲"
                } else {
                    "▼"
                }
            }
            _ => "",
        };
        let text = Table::aligned(
            &format!(
                "{}{mark}",
                fmt::cut(column.title, w.saturating_sub(mark.chars().count()))
            ),
            *w,
            column.align,
        );
        buffer.set_string(
            x,
            area.y,
            text,
            theme.tone(Tone::Dim).add_modifier(Modifier::UNDERLINED),
        );
        x += *w as u16 + 2;
    }
    if let Some((name, _, w)) = trend {
        buffer.set_string(
            x,
            area.y,
            fmt::cut(name, w),
            theme.tone(Tone::Dim).add_modifier(Modifier::UNDERLINED),
        );
    }

    let room = usize::from(area.height) - 1;
    let cursor = model.cursor(table).unwrap_or(0);
    let first = cursor
        .saturating_sub(room / 2)
        .min(table.rows.len().saturating_sub(room));
    for (n, row) in table.rows.iter().skip(first).take(room).enumerate() {
        let y = area.y + 1 + n as u16;
        let under = first + n == cursor;
        if under {
            buffer.set_style(Rect::new(area.x, y, area.width, 1), theme.cursor());
            buffer.set_string(area.x, y, "▸", theme.tone(Tone::Title));
        }
        let mut x = area.x + 1;
        for (i, w) in &shown {
            let cell = &row.cells[*i];
            let text = Table::aligned(&cell.text, *w, table.columns[*i].align);
            buffer.set_string(x, y, text, over(theme.tone(cell.tone), under, theme));
            x += *w as u16 + 2;
        }
        if let Some((_, trend, w)) = trend
            && let Some(text) = trend(&row.id, w)
        {
            buffer.set_string(x, y, text, over(theme.tone(Tone::Good), under, theme));
        }
    }
    if table.rows.is_empty() {
        let filter = model.look().filter;
        let text = if filter.is_empty() {
            "nothing here".to_owned()
        } else {
            format!("nothing matches /{filter}: Esc clears the filter")
        };
        buffer.set_stringn(area.x + 1, area.y + 1, text, width, theme.tone(Tone::Dim));
    }
}

/// A cell's style on the cursor's row: in sixteen colours the row's own, else only its foreground.
fn over(style: Style, under: bool, theme: Theme) -> Style {
    if !under {
        return style;
    }
    match theme.depth {
        crate::theme::Depth::Ansi16 => theme.cursor(),
        _ => theme.cursor().patch(Style {
            fg: style.fg,
            ..Style::new()
        }),
    }
}

/// `3/120 /filter`, for a table's title.
pub fn place(model: &Model, table: &Table) -> String {
    let at = model.cursor(table).map_or(0, |c| c + 1);
    let filter = model.look().filter;
    if filter.is_empty() {
        format!("{at}/{}", table.rows.len())
    } else {
        format!("{at}/{} /{filter}", table.rows.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::theme::Depth;

    const THEME: Theme = Theme {
        depth: Depth::Mono,
        ascii: true,
    };

    fn check(main: u64, front: u64, capacity: u64, expect: &str) {
        let text: String = gauge(THEME, main, front, capacity, 10)
            .iter()
            .map(|s| s.content.as_ref())
            .collect();
        assert_eq!(text, expect);
    }

    #[test]
    fn gauges_show_a_little_and_never_overflow() {
        check(0, 0, 100, "..........");
        check(1, 0, 1000, "#.........");
        check(50, 25, 100, "#####+++..");
        check(100, 50, 100, "##########");
        check(5, 5, 0, "..........");
    }

    #[test]
    fn sparklines_scale_to_their_most() {
        let unicode = Theme {
            depth: Depth::Ansi256,
            ascii: false,
        };
        assert_eq!(spark(unicode, &[Some(0), Some(500), None, Some(1000)], 1000), "▁▄ █");
        assert_eq!(spark(unicode, &[Some(0)], 0), "▁");
        assert_eq!(spark(unicode, &[], 0), "");
    }
}
