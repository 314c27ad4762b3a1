//! The views that are a table: nodes, images, decisions, health, log.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Widget};

use super::{overview, panel, parts, title};
use crate::fmt;
use crate::model::{Model, Screen};
use crate::narrate;
use crate::snapshot::Snapshot;
use crate::table::RowId;
use crate::theme::Tone;

fn whole(model: &Model, name: &str, area: Rect, buffer: &mut Buffer) {
    let table = model.table().unwrap_or_default();
    let heading = format!("{name} {}", parts::place(model, &table));
    let inner = panel(model.theme, title(model.theme, heading), area, buffer);
    parts::table(model, &table, model.look().sort, None, inner, buffer);
}

pub fn nodes(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let rows = snapshot.view.nodes.len() as u16;
    let upper = (rows + 3).clamp(5, (area.height / 2).max(5));
    let [top, bottom] = Layout::vertical([Constraint::Length(upper), Constraint::Min(3)]).areas(area);
    whole(model, "Nodes", top, buffer);
    overview::node_gauges(model, &snapshot.view.nodes, bottom, buffer);
}

pub fn images(model: &Model, area: Rect, buffer: &mut Buffer) {
    let table = model.table().unwrap_or_default();
    let of = match &model.screen {
        Screen::Images(Some(node)) => format!(" of {node}"),
        _ => String::new(),
    };
    let heading = format!("Images{of} {}", parts::place(model, &table));
    let inner = panel(model.theme, title(model.theme, heading), area, buffer);
    let trend = image_trend(model);
    parts::table(
        model,
        &table,
        model.look().sort,
        Some(("HIT RATIO", &trend)),
        inner,
        buffer,
    );
}

/// The hit ratio of an image over the last snapshots.
fn image_trend(model: &Model) -> impl Fn(&RowId, usize) -> Option<String> + '_ {
    move |row, width| {
        let RowId::Image(id) = row else { return None };
        let values = model.series(width, |s| s.image(*id).and_then(|i| i.hit_permille));
        Some(parts::spark(model.theme, &values, 1000))
    }
}

pub fn decisions(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let lower = (area.height * 2 / 5).max(6);
    let [top, bottom] = Layout::vertical([Constraint::Min(5), Constraint::Length(lower)]).areas(area);
    whole(model, "Decisions", top, buffer);
    let Some(RowId::Decision(seq)) = model.selected() else {
        panel(model.theme, title(model.theme, "Reason"), bottom, buffer);
        return;
    };
    let Some(decision) = snapshot.decisions.iter().find(|d| d.seq == seq) else {
        return;
    };
    let inner = panel(
        model.theme,
        title(model.theme, format!("Reason of #{seq}")),
        bottom,
        buffer,
    );
    let width = usize::from(inner.width.saturating_sub(2));
    let sentence = narrate::sentence(decision);
    let mut lines: Vec<Line> = fmt::wrap(&sentence, width, 2)
        .into_iter()
        .map(|l| Line::from(Span::styled(l, model.theme.tone(Tone::Accent))))
        .collect();
    for line in narrate::reason(&decision.command.reason) {
        lines.extend(fmt::wrap(&line, width, 10).into_iter().map(Line::from));
    }
    let inner = Rect::new(inner.x + 1, inner.y, inner.width.saturating_sub(2), inner.height);
    Paragraph::new(lines).render(inner, buffer);
}

pub fn health(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    if snapshot.view.health.is_empty() {
        let inner = panel(model.theme, title(model.theme, "Health"), area, buffer);
        let text = format!(
            "✔ nothing is wrong: {} nodes present, {} images, no reports missing",
            snapshot.view.nodes.iter().filter(|n| n.present).count(),
            snapshot.view.images.len()
        );
        buffer.set_stringn(
            inner.x + 1,
            inner.y + 1,
            text,
            inner.width.saturating_sub(2).into(),
            model.theme.tone(Tone::Good),
        );
        return;
    }
    let inner = panel(
        model.theme,
        title(model.theme, format!("Health {}", snapshot.view.health.len())),
        area,
        buffer,
    );
    let table = model.table().unwrap_or_default();
    let cursor = model.cursor(&table).unwrap_or(0);
    let width = usize::from(inner.width.saturating_sub(4));
    let mut lines: Vec<Line> = Vec::new();
    let mut at_cursor = 0;
    for (n, row) in table.rows.iter().enumerate() {
        let RowId::Health(at) = row.id else { continue };
        let Some(item) = snapshot.view.health.get(at) else {
            continue;
        };
        if n == cursor {
            at_cursor = lines.len();
        }
        let tone = crate::tables::severity_tone(item);
        let mark = if n == cursor { "▸ " } else { "  " };
        lines.push(Line::from(vec![
            Span::styled(mark, model.theme.tone(Tone::Title)),
            Span::styled(
                format!("{} {}", item.severity.to_uppercase(), item.code),
                model.theme.tone(tone),
            ),
        ]));
        for text in fmt::wrap(&item.message, width, 0) {
            lines.push(Line::from(format!("    {text}")));
        }
        for text in fmt::wrap(&format!("→ {}", item.fix), width, 2) {
            lines.push(Line::from(Span::styled(
                format!("    {text}"),
                model.theme.tone(Tone::Accent),
            )));
        }
        lines.push(Line::default());
    }
    let first = at_cursor.saturating_sub(usize::from(inner.height) / 2);
    let first = first.min(lines.len().saturating_sub(inner.height.into()));
    let shown: Vec<Line> = lines.into_iter().skip(first).take(inner.height.into()).collect();
    Paragraph::new(shown).render(inner, buffer);
}

pub fn log(model: &Model, area: Rect, buffer: &mut Buffer) {
    whole(model, "Log, newest first", area, buffer);
}
