//! Everything at a glance: the nodes' RAM tiers, how well it pays, the images, the latest decisions.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span};

use hearth_protocol::Order;
use hearth_protocol::view::{DecisionView, NodeView};

use super::{panel, panels, parts, title};
use crate::fmt;
use crate::model::Model;
use crate::narrate;
use crate::snapshot::Snapshot;
use crate::tables;
use crate::theme::Tone;

pub fn draw(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let nodes = snapshot.view.nodes.len() as u16;
    let top_height = (nodes + 2).clamp(6, (area.height / 3).max(6));
    let images = snapshot.view.images.len() as u16;
    let left = area.height.saturating_sub(top_height);
    let image_height = (images + 3).clamp(4, (left / 2).max(4));
    let [top, middle, bottom] = Layout::vertical([
        Constraint::Length(top_height),
        Constraint::Length(image_height),
        Constraint::Min(3),
    ])
    .areas(area);
    let [nodes_area, cluster_area] = Layout::horizontal([Constraint::Percentage(58), Constraint::Min(30)]).areas(top);
    node_gauges(model, &snapshot.view.nodes, nodes_area, buffer);
    cluster(model, snapshot, cluster_area, buffer);

    panels::images(model, middle, buffer);
    decisions(model, snapshot, bottom, buffer);
}

/// One line per node: its RAM tier as a gauge.
pub fn node_gauges(model: &Model, nodes: &[NodeView], area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let mut heading = title(theme, format!("RAM tier of {} nodes", nodes.len()));
    for (span, name) in parts::gauge(theme, 1, 1, 2, 2).into_iter().zip(["main", "front"]) {
        heading.push_span(span);
        heading.push_span(Span::styled(format!(" {name} "), theme.tone(Tone::Dim)));
    }
    let inner = panel(theme, heading, area, buffer);
    let longest = nodes
        .iter()
        .map(|n| n.id.as_str().len())
        .max()
        .unwrap_or(4)
        .clamp(4, 16);
    let shown = usize::from(inner.height);
    let cut = nodes.len() > shown;
    for (i, n) in nodes
        .iter()
        .take(if cut { shown.saturating_sub(1) } else { shown })
        .enumerate()
    {
        let used = n.tier.main.0 + n.tier.front.0;
        let share = fmt::permille(fmt::share(used, n.tier.capacity.0));
        let size = format!("{share:>6} of {:>7}", fmt::bytes(n.tier.capacity));
        let detail = format!(
            "  main {:>7}  front {:>7}  disk p99 {:>7}",
            fmt::bytes(n.tier.main),
            fmt::bytes(n.tier.front),
            if n.disk_read.count == 0 {
                "-".into()
            } else {
                fmt::us(n.disk_read.p99_us)
            }
        );
        let fixed = longest + 3 + size.chars().count();
        let room = usize::from(inner.width).saturating_sub(fixed + 1);
        let (bar, detail) = if room > detail.len() + 16 {
            (room - detail.len(), detail)
        } else {
            (room, String::new())
        };
        let tone = if n.present { Tone::Accent } else { Tone::Bad };
        let mut spans = vec![Span::styled(
            format!(" {:<longest$} ", fmt::cut(n.id.as_str(), longest)),
            theme.tone(tone),
        )];
        if n.present {
            spans.extend(parts::gauge(
                theme,
                n.tier.main.0,
                n.tier.front.0,
                n.tier.capacity.0,
                bar,
            ));
            spans.push(Span::raw(format!(" {size}")));
            spans.push(Span::styled(detail, theme.tone(Tone::Dim)));
        } else {
            let text = format!("absent, last heard of at tick {}", fmt::count(n.last_report.0));
            spans.push(Span::styled(text, theme.tone(Tone::Bad)));
        }
        buffer.set_line(inner.x, inner.y + i as u16, &Line::from(spans), inner.width);
    }
    if cut {
        let more = nodes.len() - shown.saturating_sub(1);
        buffer.set_string(
            inner.x + 1,
            inner.bottom() - 1,
            format!("and {more} more: 2 shows all"),
            theme.tone(Tone::Dim),
        );
    }
}

/// How well it pays: hit ratio and the worst p99 over time, what was moved.
fn cluster(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let inner = panel(theme, title(theme, "Does it pay"), area, buffer);
    let label_width = 20;
    let width = usize::from(inner.width).saturating_sub(label_width + 1);
    let hits = model.series(width, Snapshot::hit_permille);
    let p99 = model.series(width, Snapshot::read_p99_us);
    let hit = snapshot.hit_permille();
    let totals = &snapshot.view.totals;
    let reads: u64 = snapshot.view.images.iter().map(|i| i.reads_per_s).sum();
    let rows = [
        (
            "read hits",
            hit.map_or_else(|| "-".into(), fmt::permille),
            parts::spark(theme, &hits, 1000),
            hit.map_or(Tone::Dim, tables::hit_tone),
        ),
        (
            "worst p99",
            snapshot.read_p99_us().map_or_else(|| "-".into(), fmt::us),
            parts::spark(theme, &p99, 0),
            Tone::Accent,
        ),
    ];
    for (i, (label, value, line, tone)) in rows.into_iter().enumerate() {
        let line = Line::from(vec![
            Span::styled(format!(" {label} "), theme.tone(Tone::Dim)),
            Span::styled(format!("{value:>8} "), theme.tone(tone)),
            Span::styled(line, theme.tone(tone)),
        ]);
        buffer.set_line(inner.x, inner.y + i as u16, &line, inner.width);
    }
    let moved = Line::from(vec![
        Span::styled(" reads ", theme.tone(Tone::Dim)),
        Span::raw(format!("{}/s ", fmt::short(reads))),
        Span::styled(" blocks ", theme.tone(Tone::Dim)),
        Span::styled(
            format!("↑{} ", fmt::short(totals.blocks_promoted)),
            theme.tone(Tone::Ram),
        ),
        Span::styled(format!("↓{}", fmt::short(totals.blocks_demoted)), theme.tone(Tone::Dim)),
    ]);
    buffer.set_line(inner.x, inner.y + 2, &moved, inner.width);
    let events = Line::from(vec![
        Span::styled(" events ", theme.tone(Tone::Dim)),
        Span::raw(fmt::short(totals.events)),
        Span::styled("  void ", theme.tone(Tone::Dim)),
        Span::raw(fmt::short(totals.void)),
        Span::styled("  gaps ", theme.tone(Tone::Dim)),
        Span::styled(
            fmt::short(totals.report_gaps),
            theme.tone(if totals.report_gaps > 0 {
                Tone::Warn
            } else {
                Tone::Plain
            }),
        ),
    ]);
    buffer.set_line(inner.x, inner.y + 3, &events, inner.width);
}

/// The latest decisions, a sentence each.
fn decisions(model: &Model, snapshot: &Snapshot, area: Rect, buffer: &mut Buffer) {
    let theme = model.theme;
    let policy = if snapshot.view.policy.1.enabled {
        format!("Decisions under policy {}", snapshot.view.policy.0)
    } else {
        format!("Decisions: policy {} is switched off", snapshot.view.policy.0)
    };
    let inner = panel(theme, title(theme, policy), area, buffer);
    if snapshot.decisions.is_empty() {
        let text = " none yet: blocks must reach the threshold first";
        buffer.set_stringn(inner.x, inner.y, text, inner.width.into(), theme.tone(Tone::Dim));
    }
    let mut y = inner.y;
    for d in snapshot.decisions.iter().rev() {
        if y >= inner.bottom() {
            break;
        }
        y += sentence(model, d, Rect::new(inner.x, y, inner.width, inner.bottom() - y), buffer);
    }
}

/// One decision in one line, or two where one is too short; gives the lines used.
fn sentence(model: &Model, d: &DecisionView, area: Rect, buffer: &mut Buffer) -> u16 {
    let theme = model.theme;
    let (arrow, tone) = match d.command.order {
        Order::Promote { .. } => ("▲", Tone::Ram),
        Order::Demote { .. } => ("▼", Tone::Dim),
        Order::Replicate { .. } => ("+", Tone::Warn),
        Order::Drop { .. } => ("-", Tone::Warn),
    };
    let ended = narrate::ended(d);
    let head = format!(" {} ", fmt::clock(d.time));
    let room = usize::from(area.width).saturating_sub(head.len() + 3);
    let text = narrate::sentence(d);
    let whole = text.chars().count() + 3 + ended.chars().count();
    let fits = whole <= room;
    let mut spans = vec![
        Span::styled(head, theme.tone(Tone::Dim)),
        Span::styled(format!("{arrow} "), theme.tone(tone)),
        Span::raw(fmt::cut(&text, room)),
    ];
    let end = Span::styled(ended.clone(), theme.tone(tables::ended_tone(d)));
    if fits {
        spans.push(Span::styled(" · ", theme.tone(Tone::Dim)));
        spans.push(end);
        buffer.set_line(area.x, area.y, &Line::from(spans), area.width);
        return 1;
    }
    // One line: the result stays readable, the sentence gives way.
    let keep = room.saturating_sub(ended.chars().count() + 3);
    if keep >= 40 || area.height < 2 {
        spans[2] = Span::raw(format!("{} ", fmt::cut(&text, keep)));
        spans.push(Span::styled("· ", theme.tone(Tone::Dim)));
        spans.push(end);
        buffer.set_line(area.x, area.y, &Line::from(spans), area.width);
        return 1;
    }
    buffer.set_line(area.x, area.y, &Line::from(spans), area.width);
    let line = Line::from(vec![Span::raw(" ".repeat(12)), end]);
    buffer.set_line(area.x, area.y + 1, &line, area.width);
    2
}
