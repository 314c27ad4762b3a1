//! The tables of Hearth: nodes, images, decisions, health, events.

use std::sync::Arc;

use hearth_protocol::command::Outcome;
use hearth_protocol::view::{DecisionView, HealthItem, ImageView, NodeView, ReplicasView};
use hearth_protocol::{ByteLen, HeatScore, Order, Seq, WallMs};

use crate::fmt;
use crate::narrate;
use crate::table::{Cell, Column, Row, RowId, Table};
use crate::theme::Tone;

/// One event of the log, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// Its log position.
    pub seq: Seq,
    /// Its publisher's wall clock.
    pub time: WallMs,
    /// Its kind, such as `command_given`.
    pub kind: String,
    /// Who published it.
    pub by: String,
    /// What it says.
    pub text: String,
    /// Why it does not count, if so.
    pub void: Option<String>,
    /// Everything in it, for the describe panel.
    pub details: Vec<String>,
}

/// Nodes.
pub fn nodes(nodes: &[NodeView]) -> Table {
    let columns = vec![
        Column::text("NODE").sort('N'),
        Column::text("STATE").sort('S'),
        Column::number("IMAGES").sort('I'),
        Column::number("RAM").sort('R').minor(),
        Column::number("USED").sort('U'),
        Column::number("MAIN").sort('M'),
        Column::number("FRONT").sort('F').minor(),
        Column::number("IN FLIGHT").sort('O').minor(),
        Column::text("HEAT").minor(),
        Column::number("PROBE LOST").sort('X').minor(),
        Column::number("DISK P99").sort('D'),
        Column::text("DOMAIN").wide(),
        Column::number("PROBE EVENTS").wide(),
        Column::number("LAST TICK").wide(),
    ];
    let rows = nodes
        .iter()
        .map(|n| {
            let used = n.tier.front.0 + n.tier.main.0;
            let share = fmt::share(used, n.tier.capacity.0);
            Row {
                id: RowId::Node(n.id.clone()),
                cells: vec![
                    Cell::text(n.id.as_str()).tone(Tone::Accent),
                    node_state(n),
                    Cell::number(n.images, n.images.to_string()),
                    Cell::number(n.tier.capacity.0, fmt::bytes(n.tier.capacity)),
                    Cell::number(share, fmt::permille(share)),
                    Cell::number(n.tier.main.0, fmt::bytes(n.tier.main)).tone(Tone::Ram),
                    Cell::number(n.tier.front.0, fmt::bytes(n.tier.front)),
                    Cell::number(n.in_flight.0, fmt::bytes(n.in_flight)),
                    Cell::text(n.heat_source.clone()),
                    Cell::number(n.probe_lost_total, fmt::count(n.probe_lost_total)).tone(if n.probe_lost_total > 0 {
                        Tone::Warn
                    } else {
                        Tone::Plain
                    }),
                    if n.disk_read.count == 0 {
                        Cell::number(0, "-").tone(Tone::Dim)
                    } else {
                        Cell::number(n.disk_read.p99_us, fmt::us(n.disk_read.p99_us))
                    },
                    Cell::text(n.fault_domain.clone()),
                    Cell::number(n.probe_events_total, fmt::count(n.probe_events_total)),
                    Cell::number(n.last_report.0, fmt::count(n.last_report.0)),
                ],
            }
        })
        .collect();
    Table { columns, rows }
}

fn node_state(n: &NodeView) -> Cell {
    match (n.present, &n.drain) {
        (false, _) => Cell::text("ABSENT").tone(Tone::Bad),
        (true, None) => Cell::text("present").tone(Tone::Good),
        (true, Some(drain)) if drain.is_done() => Cell::text("drained").tone(Tone::Warn),
        (true, Some(drain)) => {
            let left = drain.replicas + drain.owned + drain.alone;
            Cell::text(format!("draining, {left} left")).tone(Tone::Warn)
        }
    }
}

/// Images.
pub fn images(images: &[ImageView]) -> Table {
    // A column of its own only where it says something.
    let with_replicas = images.iter().any(|i| !i.replicas.is_none());
    let mut columns = vec![
        Column::text("IMAGE").sort('N'),
        Column::text("NODE").sort('O'),
        Column::text("STATE").sort('S'),
        Column::number("SIZE").sort('Z').minor(),
        Column::number("READ/S").sort('R'),
        Column::number("WRITE/S").sort('W').minor(),
        Column::number("HIT").sort('H'),
        Column::number("P50").sort('M').minor(),
        Column::number("P99").sort('P'),
        Column::number("IN RAM").sort('I'),
        Column::number("TRACKED").sort('K').minor(),
        Column::text("PARENT").wide(),
        Column::number("BLOCK").wide(),
        Column::text("HEAT").wide(),
        Column::number("EPOCH").wide(),
    ];
    if with_replicas {
        columns.insert(REPLICAS_AT, Column::number("REPLICAS").sort('E'));
    }
    let rows = images
        .iter()
        .map(|i| {
            let latency = |value: u64| {
                if i.read_latency.count == 0 {
                    Cell::number(0, "-").tone(Tone::Dim)
                } else {
                    Cell::number(value, fmt::us(value))
                }
            };
            let resident = ByteLen(i.resident_blocks.saturating_mul(i.block_size.0));
            let mut row = Row {
                id: RowId::Image(i.id),
                cells: vec![
                    Cell::text(i.name.as_str()).tone(Tone::Accent),
                    Cell::text(i.node.as_str()),
                    if i.attached {
                        Cell::text("attached").tone(Tone::Good)
                    } else {
                        Cell::text("detached").tone(Tone::Dim)
                    },
                    Cell::number(i.size.0, fmt::bytes(i.size)),
                    Cell::number(i.reads_per_s, fmt::short(i.reads_per_s)),
                    Cell::number(i.writes_per_s, fmt::short(i.writes_per_s)),
                    match i.hit_permille {
                        None => Cell::number(0, "-").tone(Tone::Dim),
                        Some(p) => Cell::number(p + 1, fmt::permille(p)).tone(hit_tone(p)),
                    },
                    latency(i.read_latency.p50_us),
                    latency(i.read_latency.p99_us),
                    Cell::number(resident.0, fmt::bytes(resident)).tone(Tone::Ram),
                    Cell::number(i.tracked_blocks, fmt::short(i.tracked_blocks)),
                    Cell::text(
                        i.parent
                            .as_ref()
                            .map_or_else(|| "-".into(), |(name, snapshot)| format!("{name}@{snapshot}")),
                    ),
                    Cell::number(i.block_size.0, fmt::bytes(i.block_size)),
                    Cell::text(i.origin.map_or("-", |o| o.as_str())),
                    Cell::number(i.epoch.0, i.epoch.to_string()),
                ],
            };
            if with_replicas {
                row.cells.insert(REPLICAS_AT, replicas_cell(&i.replicas));
            }
            row
        })
        .collect();
    Table { columns, rows }
}

/// The column of the replicas, behind the state.
const REPLICAS_AT: usize = 3;

/// Sorts those that miss most first.
fn replicas_cell(r: &ReplicasView) -> Cell {
    if r.is_none() {
        return Cell::number(0, "-").tone(Tone::Dim);
    }
    let missing = r.wanted.saturating_sub(r.in_sync);
    let tone = match (missing, r.in_sync) {
        (0, _) => Tone::Good,
        (_, 0..=1) => Tone::Bad,
        _ => Tone::Warn,
    };
    Cell::number(missing + 1, format!("{}/{}", r.in_sync, r.wanted)).tone(tone)
}

/// How good a hit ratio is.
pub fn hit_tone(permille: u64) -> Tone {
    match permille {
        0..=299 => Tone::Bad,
        300..=699 => Tone::Warn,
        _ => Tone::Good,
    }
}

/// Decisions, newest first.
pub fn decisions(decisions: &[Arc<DecisionView>]) -> Table {
    let columns = vec![
        Column::number("SEQ").sort('S'),
        Column::text("TIME"),
        Column::text("ORDER").sort('O'),
        Column::text("NODE").sort('N'),
        Column::text("IMAGE").sort('I'),
        Column::number("BLOCKS").sort('K'),
        Column::number("SCORE").sort('C'),
        Column::text("RESULT").sort('R'),
        Column::text("RULE").wide(),
        Column::number("TICK").wide(),
    ];
    let rows = decisions
        .iter()
        .rev()
        .map(|d| {
            let c = &d.command;
            let score = match &c.order {
                Order::Promote { blocks, .. } => blocks.iter().map(|p| p.score).max(),
                Order::Demote { blocks, .. } => blocks.iter().map(|b| b.score).max(),
                Order::Replicate { .. } | Order::Drop { .. } => None,
            };
            let blocks = match &c.order {
                Order::Replicate { blocks: None, .. } | Order::Drop { .. } => Cell::number(0, "all"),
                order => Cell::number(order.block_count() as u64, fmt::count(order.block_count() as u64)),
            };
            Row {
                id: RowId::Decision(d.seq),
                cells: vec![
                    Cell::number(d.seq.0, format!("#{}", d.seq)).tone(Tone::Dim),
                    Cell::text(fmt::clock(d.time)),
                    order_cell(&c.order),
                    Cell::text(c.node.as_str()),
                    Cell::text(narrate::whose(c.order.layer(), &d.images)).tone(Tone::Accent),
                    blocks,
                    score.map_or_else(|| no_score(&c.order), |score| Cell::number(score.0, fmt::score(score))),
                    Cell::text(narrate::ended(d)).tone(ended_tone(d)),
                    Cell::text(c.reason.rule.clone()),
                    Cell::number(c.tick.0, c.tick.to_string()),
                ],
            }
        })
        .collect();
    Table { columns, rows }
}

fn order_cell(order: &Order) -> Cell {
    Cell::text(order.verb()).tone(match order {
        Order::Promote { .. } => Tone::Ram,
        Order::Demote { .. } => Tone::Dim,
        Order::Replicate { .. } | Order::Drop { .. } => Tone::Warn,
    })
}

/// The score of an order that names no blocks: none at all if it rests on no heat.
fn no_score(order: &Order) -> Cell {
    match order {
        Order::Replicate { .. } | Order::Drop { .. } => Cell::number(0, "-").tone(Tone::Dim),
        Order::Promote { .. } | Order::Demote { .. } => Cell::number(0, fmt::score(HeatScore(0))),
    }
}

/// What the end of a decision means.
pub fn ended_tone(d: &DecisionView) -> Tone {
    match &d.ended {
        Some((_, Outcome::Done { .. })) if d.done_skipped.1 == 0 => Tone::Good,
        Some((_, Outcome::Done { .. })) => Tone::Warn,
        Some((_, Outcome::Refused { .. })) => Tone::Bad,
        None if d.expired => Tone::Bad,
        None => Tone::Dim,
    }
}

/// What is wrong, worst first.
pub fn health(items: &[HealthItem]) -> Table {
    let columns = vec![
        Column::text("SEVERITY").sort('S'),
        Column::text("CODE").sort('C'),
        Column::text("WHAT IS WRONG"),
        Column::text("WHAT TO DO"),
    ];
    let rows = items
        .iter()
        .enumerate()
        .map(|(at, h)| Row {
            id: RowId::Health(at),
            cells: vec![
                Cell::text(h.severity.clone()).tone(severity_tone(h)),
                Cell::text(h.code.clone()),
                Cell::text(h.message.clone()),
                Cell::text(h.fix.clone()).tone(Tone::Accent),
            ],
        })
        .collect();
    Table { columns, rows }
}

/// What a severity means.
pub fn severity_tone(item: &HealthItem) -> Tone {
    if item.severity == "error" {
        Tone::Bad
    } else {
        Tone::Warn
    }
}

/// Events in the order given.
pub fn log<'a>(lines: impl IntoIterator<Item = &'a LogLine>) -> Table {
    let columns = vec![
        Column::number("SEQ").sort('S'),
        Column::text("TIME"),
        Column::text("KIND").sort('K'),
        Column::text("WHAT"),
        Column::text("BY").sort('B').wide(),
    ];
    let rows = lines
        .into_iter()
        .map(|l| {
            let tone = if l.void.is_some() { Tone::Dim } else { Tone::Plain };
            let text = match &l.void {
                None => l.text.clone(),
                Some(why) => format!("VOID ({why}): {}", l.text),
            };
            Row {
                id: RowId::Event(l.seq),
                cells: vec![
                    Cell::number(l.seq.0, format!("#{}", l.seq)).tone(Tone::Dim),
                    Cell::text(fmt::clock(l.time)),
                    Cell::text(l.kind.clone()).tone(match l.kind.as_str() {
                        "command_given" | "command_finished" => Tone::Ram,
                        "ticked" | "heat_folded" => Tone::Dim,
                        _ => Tone::Accent,
                    }),
                    Cell::text(text).tone(tone),
                    Cell::text(l.by.clone()),
                ],
            }
        })
        .collect();
    Table { columns, rows }
}
