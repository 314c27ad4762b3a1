//! The pure view: a model in, a painted frame out.

use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Widget};

use crate::fmt;
use crate::heatmap;
use crate::keys;
use crate::model::{Connection, Model, Overlay, PromptKind, Screen};
use crate::tables::LogLine;
use crate::theme::{Theme, Tone};

mod heat;
mod overview;
mod panels;
mod parts;

pub use parts::{gauge, spark};

/// The least terminal that shows everything.
pub const WIDTH_MIN: u16 = 80;
/// The least terminal that shows everything.
pub const HEIGHT_MIN: u16 = 24;
/// Under this nothing readable fits.
const UNREADABLE: (u16, u16) = (40, 12);
const FOOTER: u16 = 1;

/// Lines of the header: one more where it says which event is shown.
fn header_height(model: &Model) -> u16 {
    if model.event().is_some() { 4 } else { 3 }
}

/// Paints one frame.
pub fn draw(model: &Model, frame: &mut Frame) {
    let area = frame.area();
    paint(model, area, frame.buffer_mut());
}

/// Paints into a buffer.
pub fn paint(model: &Model, area: Rect, buffer: &mut Buffer) {
    if area.width < UNREADABLE.0 || area.height < UNREADABLE.1 {
        let text = format!("hearth top needs {WIDTH_MIN}x{HEIGHT_MIN}");
        buffer.set_stringn(area.x, area.y, text, area.width.into(), model.theme.tone(Tone::Warn));
        model.theme.finish(buffer);
        return;
    }
    let [head, body, foot] = Layout::vertical([
        Constraint::Length(header_height(model)),
        Constraint::Min(1),
        Constraint::Length(FOOTER),
    ])
    .areas(area);
    header(model, head, buffer);
    match (&model.screen, model.snapshot()) {
        (_, None) => waiting(model, body, buffer),
        (Screen::Overview, Some(s)) => overview::draw(model, s, body, buffer),
        (Screen::Nodes, Some(s)) => panels::nodes(model, s, body, buffer),
        (Screen::Images(_), Some(_)) => panels::images(model, body, buffer),
        (Screen::Heat(image), Some(s)) => heat::draw(model, s, *image, body, buffer),
        (Screen::Decisions, Some(s)) => panels::decisions(model, s, body, buffer),
        (Screen::Health, Some(s)) => panels::health(model, s, body, buffer),
        (Screen::Log, Some(_)) => panels::log(model, body, buffer),
    }
    footer(model, foot, buffer);
    overlay(model, area, buffer);
    model.theme.finish(buffer);
}

fn body(model: &Model) -> Rect {
    let header = header_height(model);
    let height = model.size.1.saturating_sub(header + FOOTER);
    Rect::new(0, header, model.size.0, height)
}

/// How many rows of the current table are on the screen.
pub fn rows_shown(model: &Model) -> usize {
    usize::from(body(model).height.saturating_sub(3))
}

/// How many columns and rows of cells the heat map has.
pub fn map_fit(model: &Model) -> (u64, u64) {
    let (columns, rows, _) = heatmap::fit(heat::map_area(body(model)));
    (columns, rows)
}

/// A panel's frame; gives the area within.
fn panel(theme: Theme, title: Line<'_>, area: Rect, buffer: &mut Buffer) -> Rect {
    let block = Block::bordered()
        .border_set(theme.border())
        .border_style(theme.frame())
        .title(title);
    let inner = block.inner(area);
    block.render(area, buffer);
    inner
}

fn title(theme: Theme, text: impl Into<String>) -> Line<'static> {
    Line::from(vec![
        Span::raw(" "),
        Span::styled(text.into(), theme.tone(Tone::Title)),
        Span::raw(" "),
    ])
}

fn waiting(model: &Model, area: Rect, buffer: &mut Buffer) {
    let text = match &model.connection {
        Connection::Lost(why) => format!("no view of the cluster yet: {why}"),
        _ => format!("asking {} for the cluster …", model.source),
    };
    let lines: Vec<Line> = fmt::wrap(&text, usize::from(area.width.saturating_sub(4)), 0)
        .into_iter()
        .map(Line::from)
        .collect();
    let y = area.y + area.height / 2;
    let height = (area.bottom() - y).min(lines.len() as u16);
    Paragraph::new(lines)
        .centered()
        .style(model.theme.tone(Tone::Dim))
        .render(Rect::new(area.x, y, area.width, height), buffer);
}

/// Writes `left` at the left and `right` at the right of one line; `right` wins if both do not fit.
fn both(left: Line<'_>, right: Line<'_>, area: Rect, buffer: &mut Buffer) {
    let right_width = (right.width() as u16).min(area.width);
    let left_width = area.width - right_width;
    buffer.set_line(area.x, area.y, &left, left_width.saturating_sub(1));
    buffer.set_line(area.x + left_width, area.y, &right, right_width);
}

fn header(model: &Model, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let row = |n: u16| Rect::new(area.x, area.y + n, area.width, 1);
    buffer.set_style(row(0), theme.bar());
    let name = Span::styled(" ▲ hearth ", theme.badge(Tone::Title));
    let left = Line::from(vec![name, Span::raw(format!(" {}", model.source))]);
    both(left, mode(model), row(0), buffer);
    if let Some(snapshot) = model.snapshot() {
        let v = &snapshot.view;
        let dim = theme.tone(Tone::Dim);
        let mut spans = vec![Span::raw(" ")];
        let leader = v.leader.as_ref().map_or("none", |l| l.as_str());
        for (label, value) in [
            ("term", v.term.to_string()),
            ("leader", leader.to_owned()),
            ("tick", fmt::count(v.tick.0)),
            ("seq", fmt::count(v.seq.0)),
            ("digest", v.digest.chars().take(8).collect()),
        ] {
            spans.push(Span::styled(format!("{label} "), dim));
            spans.push(Span::raw(format!("{value}  ")));
        }
        both(Line::from(spans), health_badge(model, &v.health), row(1), buffer);
    }
    let mut tabs = vec![Span::raw(" ")];
    for (i, (_, name, _)) in Screen::TABS.iter().enumerate() {
        let text = format!(" {} {name} ", i + 1);
        if i == model.screen.tab() {
            tabs.push(Span::styled(text, theme.badge(Tone::Accent)));
        } else {
            tabs.push(Span::styled(text, theme.tone(Tone::Dim)));
        }
    }
    buffer.set_line(area.x, area.y + 2, &Line::from(tabs), area.width);
    if let Some(moment) = model.event() {
        buffer.set_line(area.x, area.y + 3, &event(theme, &moment.event), area.width);
    }
}

/// The event that is shown: where it stands in the log, what it is, who published it, what it says.
fn event(theme: Theme, event: &LogLine) -> Line<'static> {
    let mut spans = vec![
        Span::styled(format!(" ▸ #{} ", fmt::count(event.seq.0)), theme.tone(Tone::Title)),
        Span::raw(format!("{} ", fmt::clock(event.time))),
        Span::styled(format!("{} ", event.kind), theme.tone(Tone::Accent)),
    ];
    if let Some(why) = &event.void {
        spans.push(Span::styled(format!("VOID: {why} "), theme.tone(Tone::Warn)));
    }
    spans.push(Span::styled(format!("by {} ", event.by), theme.tone(Tone::Dim)));
    spans.push(Span::raw(event.text.clone()));
    Line::from(spans)
}

/// Live, held or lost, and the time shown.
fn mode(model: &Model) -> Line<'static> {
    let theme = model.theme;
    let shown = model.snapshot().map(|s| s.view.time);
    let clock = shown.map_or_else(String::new, |t| format!("{} UTC ", fmt::clock(t)));
    let (text, tone) = match (&model.connection, model.is_live()) {
        (Connection::Connecting, _) => (" connecting ".to_owned(), Tone::Warn),
        (_, false) => {
            let newest = model.history.len().checked_sub(1).and_then(|i| model.history.get(i));
            let behind = match (shown, newest) {
                (Some(shown), Some(newest)) => newest.view.time.0.saturating_sub(shown.0) / 1_000,
                _ => 0,
            };
            (format!(" HELD −{} ", fmt::seconds(behind)), Tone::Accent)
        }
        (Connection::Lost(_), true) => (" LOST ".to_owned(), Tone::Bad),
        (Connection::Up, true) => (" ● LIVE ".to_owned(), Tone::Good),
    };
    Line::from(vec![Span::raw(clock), Span::styled(text, theme.badge(tone))])
}

fn health_badge(model: &Model, health: &[hearth_protocol::view::HealthItem]) -> Line<'static> {
    let errors = health.iter().filter(|h| h.severity == "error").count();
    let warnings = health.len() - errors;
    let (text, tone) = match (errors, warnings) {
        (0, 0) => ("✔ healthy ".to_owned(), Tone::Good),
        (0, w) => (format!("● {w} warning{} ", if w == 1 { "" } else { "s" }), Tone::Warn),
        (e, 0) => (format!("✖ {e} error{} ", if e == 1 { "" } else { "s" }), Tone::Bad),
        (e, w) => (
            format!("✖ {e} error{}, {w} more ", if e == 1 { "" } else { "s" }),
            Tone::Bad,
        ),
    };
    Line::from(Span::styled(text, model.theme.tone(tone)))
}

fn footer(model: &Model, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    if let Some(prompt) = &model.prompt {
        let lead = match prompt.kind {
            PromptKind::Command => ":",
            PromptKind::Filter => "/",
            PromptKind::Jump => "jump to (-90s, 14:03:20, #seq): ",
        };
        let line = Line::from(vec![
            Span::styled(lead, theme.tone(Tone::Accent)),
            Span::raw(prompt.text.clone()),
            Span::styled(" ", theme.badge(Tone::Plain)),
        ]);
        buffer.set_line(area.x, area.y, &line, area.width);
        return;
    }
    if let Some(notice) = &model.notice {
        let text = fmt::cut(notice, area.width.saturating_sub(2).into());
        buffer.set_string(area.x + 1, area.y, text, theme.tone(Tone::Warn));
        return;
    }
    if let Connection::Lost(why) = &model.connection
        && !model.history.is_empty()
    {
        let text = format!("no answer: {why}");
        let text = fmt::cut(&text, area.width.saturating_sub(2).into());
        buffer.set_string(area.x + 1, area.y, text, theme.tone(Tone::Bad));
        return;
    }
    let mut spans = vec![Span::raw(" ")];
    let mut width = 1;
    const LOOK: [(&str, &str); 9] = [
        ("?", "help"),
        ("Enter", "open"),
        ("Esc", "back"),
        ("/", "filter"),
        (":", "view"),
        ("d", "describe"),
        ("w", "why"),
        ("+", "closer"),
        ("-", "farther"),
    ];
    let time = [
        ("T", "earlier"),
        ("t", "later"),
        ("L", "live"),
        ("Space", if model.is_live() { "hold" } else { "go on" }),
        ("b", "jump"),
    ];
    // Who looks at the past wants to move in it; not all fits into a narrow terminal.
    let (first, then) = LOOK.split_at(if model.is_live() { LOOK.len() } else { 1 });
    for (label, word) in first.iter().chain(&time).chain(then).chain(&[("q", "quit")]) {
        let works = keys::BINDINGS.iter().any(|b| b.label == *label && (b.when)(model));
        let text = format!(" {word}  ");
        let more = label.len() + text.len();
        if !works || width + more > usize::from(area.width) {
            continue;
        }
        width += more;
        spans.push(Span::styled(*label, theme.tone(Tone::Accent)));
        spans.push(Span::styled(text, theme.tone(Tone::Dim)));
    }
    buffer.set_line(area.x, area.y, &Line::from(spans), area.width);
}

fn overlay_area(model: &Model, area: Rect) -> Rect {
    let width = area.width.saturating_sub(6).min(100);
    let height = match &model.overlay {
        Some(Overlay::Text { lines, .. }) => {
            let inner = usize::from(width.saturating_sub(4));
            let needed: usize = lines.iter().map(|l| fmt::wrap(l, inner, 10).len()).sum();
            (needed as u16).saturating_add(2)
        }
        _ => u16::MAX,
    }
    .min(area.height.saturating_sub(4));
    Rect::new(
        area.x + (area.width - width) / 2,
        area.y + (area.height - height) / 2,
        width,
        height,
    )
}

/// The farthest that the open panel can scroll.
pub fn overlay_scroll_max(model: &Model) -> usize {
    let area = overlay_area(model, Rect::new(0, 0, model.size.0, model.size.1));
    let inner = usize::from(area.width.saturating_sub(4));
    let lines = overlay_lines(model, inner).len();
    lines.saturating_sub(usize::from(area.height.saturating_sub(2)))
}

fn overlay_lines(model: &Model, width: usize) -> Vec<Line<'static>> {
    let theme = model.theme;
    match &model.overlay {
        None => Vec::new(),
        Some(Overlay::Text { lines, .. }) => lines
            .iter()
            .flat_map(|l| fmt::wrap(l, width, 10))
            .map(Line::from)
            .collect(),
        Some(Overlay::Help { .. }) => {
            // Two columns of keys where they fit: the help of a full screen then needs no scrolling.
            let columns = if width >= 70 { 2 } else { 1 };
            let cell = width / columns;
            let mut lines = Vec::new();
            for (section, keys) in keys::help(model) {
                if keys.is_empty() {
                    continue;
                }
                if !lines.is_empty() {
                    lines.push(Line::default());
                }
                lines.push(Line::from(Span::styled(section, theme.tone(Tone::Title))));
                let rows = keys.len().div_ceil(columns);
                for row in 0..rows {
                    let mut spans = Vec::new();
                    for column in 0..columns {
                        if let Some((label, help)) = keys.get(column * rows + row) {
                            spans.push(Span::styled(format!("{label:>9}  "), theme.tone(Tone::Accent)));
                            let room = cell.saturating_sub(12);
                            spans.push(Span::raw(format!("{:<room$} ", fmt::cut(help, room))));
                        }
                    }
                    lines.push(Line::from(spans));
                }
            }
            lines
        }
    }
}

fn overlay(model: &Model, area: Rect, buffer: &mut Buffer) {
    let (name, scroll) = match &model.overlay {
        None => return,
        Some(Overlay::Help { scroll }) => ("Keys", *scroll),
        Some(Overlay::Text { title, scroll, .. }) => (title.as_str(), *scroll),
    };
    let area = overlay_area(model, area);
    Clear.render(area, buffer);
    let inner = panel(model.theme, title(model.theme, name), area, buffer);
    let inner = Rect::new(inner.x + 1, inner.y, inner.width.saturating_sub(2), inner.height);
    let lines = overlay_lines(model, inner.width.into());
    let hidden = lines.len().saturating_sub(scroll + usize::from(inner.height));
    if hidden > 0 || scroll > 0 {
        let text = format!(" {} more below, Esc closes ", hidden);
        let x = area.right().saturating_sub(text.chars().count() as u16 + 2);
        buffer.set_string(x, area.bottom() - 1, text, model.theme.tone(Tone::Dim));
    }
    let shown: Vec<Line> = lines.into_iter().skip(scroll).take(inner.height.into()).collect();
    Paragraph::new(shown).render(inner, buffer);
}
