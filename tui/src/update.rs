//! How the model changes: one message at a time, no I/O.

use hearth_protocol::view::{ClusterView, ImageHeatView};
use hearth_protocol::{BlockIndex, ImageName, Order, Seq, WallMs};

use crate::fmt;
use crate::heatmap::{Grid, Range};
use crate::keys::{self, Action, Key};
use crate::model::{Connection, LOG_LINES_MAX, Model, Moment, Overlay, Position, Prompt, PromptKind, Screen};
use crate::narrate;
use crate::snapshot::Snapshot;
use crate::table::{RowId, Sort};
use crate::tables::LogLine;
use crate::view;

/// What happens to the dashboard.
#[derive(Debug, Clone)]
pub enum Msg {
    /// A key was pressed.
    Key(Key),
    /// The terminal has another size.
    Resize(u16, u16),
    /// The feed brought something.
    Feed(Feed),
}

/// What a feed brings.
#[derive(Debug, Clone)]
pub enum Feed {
    /// The cluster now.
    View(Box<ClusterView>),
    /// The heat of the image that is looked at.
    Heat(ImageHeatView),
    /// New events, oldest first.
    Log(Vec<LogLine>),
    /// The cluster right after an event that was asked for, and the heat of the image that is looked at.
    Event {
        /// The event.
        event: Box<LogLine>,
        /// The cluster after it.
        view: Box<ClusterView>,
        /// Heat then.
        heat: Option<ImageHeatView>,
    },
    /// How far the log was read for an event that was asked for.
    Reading(Seq),
    /// An event that was asked for cannot be told of, and why.
    NoEvent(String),
    /// No answer, and why.
    Lost(String),
    /// The answer to [`Effect::Why`].
    Text {
        /// Its heading.
        title: String,
        /// Its lines.
        lines: Vec<String>,
    },
}

/// What the shell must do after an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Leave.
    Quit,
    /// Ask why a block is where it is.
    Why {
        /// The image.
        image: ImageName,
        /// The block.
        block: BlockIndex,
        /// As of this log position, now without.
        at: Option<Seq>,
    },
}

/// Changes the model for one message.
pub fn update(model: &mut Model, msg: Msg) -> Option<Effect> {
    match msg {
        Msg::Resize(width, height) => {
            model.size = (width, height);
            None
        }
        Msg::Feed(feed) => {
            fed(model, feed);
            None
        }
        Msg::Key(Key::CtrlC) => Some(Effect::Quit),
        Msg::Key(key) => {
            model.notice = None;
            if model.prompt.is_some() {
                typed(model, key);
                return None;
            }
            if model.overlay.is_some() {
                over(model, key);
                return None;
            }
            let action = keys::action(model, key)?;
            act(model, action)
        }
    }
}

fn fed(model: &mut Model, feed: Feed) {
    match feed {
        Feed::View(view) => {
            model.connection = Connection::Up;
            model.history.push(*view);
        }
        Feed::Heat(heat) => model.history.push_heat(heat),
        Feed::Log(lines) => {
            let last = model.log.back().map_or(Seq(0), |l| l.seq);
            model.log.extend(lines.into_iter().filter(|l| l.seq > last));
            let over = model.log.len().saturating_sub(LOG_LINES_MAX);
            model.log.drain(..over);
        }
        // Who went back to live meanwhile wants none of these three any more.
        Feed::Event { event, view, heat } => {
            if let Position::Event(wanted) = model.position {
                if event.seq == wanted {
                    model.notice = None;
                }
                let snapshot = Snapshot::new(*view, model.snapshot());
                let snapshot = match heat {
                    Some(heat) => snapshot.with_heat(heat),
                    None => snapshot,
                };
                model.moment = Some(Moment {
                    event: *event,
                    snapshot,
                });
            }
        }
        Feed::Reading(read) => {
            if let Position::Event(wanted) = model.position {
                model.notice = Some(format!(
                    "reading the log from its beginning: #{} of #{}",
                    fmt::count(read.0),
                    fmt::count(wanted.0)
                ));
            }
        }
        Feed::NoEvent(why) => {
            if matches!(model.position, Position::Event(_)) {
                model.notice = Some(why);
                // What is shown stays, and is what the next step starts from.
                match (model.seq(), &model.moment) {
                    (Some(seq), Some(_)) => model.position = Position::Event(seq),
                    (Some(seq), None) => model.position = Position::At(seq),
                    (None, _) => live(model),
                }
            }
        }
        Feed::Lost(why) => model.connection = Connection::Lost(why),
        Feed::Text { title, lines } => {
            // The answer takes the place of the notice that it was asked for.
            model.notice = None;
            model.overlay = Some(Overlay::Text {
                title,
                lines,
                scroll: 0,
            });
        }
    }
}

/// A key while a panel is open: scroll, or close.
fn over(model: &mut Model, key: Key) {
    let page = usize::from(model.size.1.saturating_sub(8)).max(1);
    let Some(Overlay::Help { scroll } | Overlay::Text { scroll, .. }) = &mut model.overlay else {
        return;
    };
    match key {
        Key::Up | Key::Char('k') => *scroll = scroll.saturating_sub(1),
        Key::Down | Key::Char('j') => *scroll += 1,
        Key::PageUp => *scroll = scroll.saturating_sub(page),
        Key::PageDown | Key::Char(' ') => *scroll += page,
        Key::Home | Key::Char('g') => *scroll = 0,
        Key::Esc | Key::Enter | Key::Char('q' | '?' | 'd') => {
            model.overlay = None;
            return;
        }
        _ => {}
    }
    let most = view::overlay_scroll_max(model);
    if let Some(Overlay::Help { scroll } | Overlay::Text { scroll, .. }) = &mut model.overlay {
        *scroll = (*scroll).min(most);
    }
}

/// A key while something is typed.
fn typed(model: &mut Model, key: Key) {
    let Some(mut prompt) = model.prompt.take() else { return };
    match key {
        Key::Esc => {
            if prompt.kind == PromptKind::Filter {
                set_filter(model, "");
            }
            return;
        }
        Key::Enter => {
            match prompt.kind {
                PromptKind::Command => go(model, &prompt.text),
                PromptKind::Filter => {}
                PromptKind::Jump => jump(model, &prompt.text),
            }
            return;
        }
        Key::Backspace if prompt.text.is_empty() => return,
        Key::Backspace => {
            prompt.text.pop();
        }
        Key::Char(c) if prompt.text.len() < 200 => prompt.text.push(c),
        _ => {}
    }
    if prompt.kind == PromptKind::Filter {
        set_filter(model, &prompt.text);
    }
    model.prompt = Some(prompt);
}

fn set_filter(model: &mut Model, text: &str) {
    let tab = model.screen.tab();
    model.looks.entry(tab).or_default().filter = text.to_owned();
}

fn open(model: &mut Model, screen: Screen) {
    if model.screen != screen {
        let old = std::mem::replace(&mut model.screen, screen);
        model.back.push(old);
    }
}

fn tab(model: &mut Model, index: usize) {
    model.back.clear();
    model.screen = Screen::TABS[index % Screen::TABS.len()].0.clone();
}

/// `:` goes to a view: by a name or the start of one; an image's name opens its heat map; `q` leaves nothing open.
fn go(model: &mut Model, text: &str) {
    let text = text.trim().to_lowercase();
    if text.is_empty() {
        return;
    }
    let by_name = |exact: bool| {
        Screen::TABS.iter().position(|(_, _, names)| {
            names
                .iter()
                .any(|n| if exact { *n == text } else { n.starts_with(&text) })
        })
    };
    if let Some(index) = by_name(true).or_else(|| by_name(false)) {
        tab(model, index);
        return;
    }
    let image = model
        .snapshot()
        .and_then(|s| s.view.images.iter().find(|i| i.name.as_str() == text))
        .map(|i| i.id);
    match image {
        Some(id) => open_map(model, id),
        None => {
            let names: Vec<_> = Screen::TABS.iter().map(|(_, _, n)| n[0]).collect();
            model.notice = Some(format!("no view {text:?}: use {} or an image's name", names.join(", ")));
        }
    }
}

fn open_map(model: &mut Model, id: hearth_protocol::ImageId) {
    model.map = Default::default();
    open(model, Screen::Heat(id));
}

/// `b` jumps: `#seq`, `-90s` and the like before the newest, `HH:MM:SS` of its day, or RFC 3339.
fn jump(model: &mut Model, text: &str) {
    let Some(newest) = model.history.len().checked_sub(1).and_then(|i| model.history.get(i)) else {
        return;
    };
    let now = newest.view.time;
    if let (Some(When::Seq(seq)), true) = (when(text, now), model.can.step) {
        return step_to(model, seq);
    }
    let found = match when(text, now) {
        Some(When::Seq(seq)) => model.history.at_or_before(seq),
        Some(When::Time(time)) => model.history.at_time(time),
        None => {
            model.notice = Some(format!(
                "{text:?} is no time: use -90s, 14:03:20, an RFC 3339 time or #seq"
            ));
            return;
        }
    };
    let oldest = model.history.get(0).map_or(WallMs(0), |s| s.view.time);
    match found {
        Some(index) => hold(model, index),
        None => {
            model.notice = Some(format!(
                "this screen remembers from {} on; for earlier use: hearth replay --at {text}",
                fmt::time(oldest)
            ));
        }
    }
}

enum When {
    Seq(Seq),
    Time(WallMs),
}

fn when(text: &str, now: WallMs) -> Option<When> {
    let text = text.trim();
    if let Some(seq) = text.strip_prefix('#') {
        return seq.parse().ok().map(|s| When::Seq(Seq(s)));
    }
    if let Some(ago) = text.strip_prefix('-') {
        let ago = humantime::parse_duration(ago).ok()?;
        let ms = u64::try_from(ago.as_millis()).ok()?;
        return Some(When::Time(WallMs(now.0.saturating_sub(ms))));
    }
    let parts: Vec<_> = text.split(':').collect();
    if let [h, m, rest @ ..] = parts.as_slice()
        && let (Ok(h), Ok(m)) = (h.parse::<u64>(), m.parse::<u64>())
    {
        let s = match rest {
            [] => 0,
            [s] => s.parse::<u64>().ok()?,
            _ => return None,
        };
        let of_day = (h * 3_600 + m * 60 + s) * 1_000;
        let day = now.0 / 86_400_000 * 86_400_000;
        return (h < 24 && m < 60 && s < 60).then_some(When::Time(WallMs(day + of_day + 999)));
    }
    let at = humantime::parse_rfc3339_weak(text).ok()?;
    let ms = at.duration_since(std::time::UNIX_EPOCH).ok()?.as_millis();
    Some(When::Time(WallMs(u64::try_from(ms).ok()?)))
}

fn hold(model: &mut Model, index: usize) {
    if let Some(snapshot) = model.history.get(index) {
        model.position = Position::At(snapshot.view.seq);
        model.moment = None;
    }
}

fn live(model: &mut Model) {
    model.position = Position::Live;
    model.moment = None;
}

/// Holds the screen right after one event.
fn step_to(model: &mut Model, seq: Seq) {
    let Some(newest) = model.newest() else { return };
    if seq < Seq(1) {
        model.notice = Some("the log begins at #1".into());
    } else if seq > newest {
        model.notice = Some(format!("#{newest} is the newest event; L goes back to live"));
    } else {
        model.position = Position::Event(seq);
        model.notice = Some(format!("reading the log up to #{} …", fmt::count(seq.0)));
    }
}

/// The event that the next step counts from: the one asked for last, else what is shown.
fn step_from(model: &Model) -> Option<Seq> {
    match model.position {
        Position::Event(seq) => Some(seq),
        _ => model.seq(),
    }
}

fn act(model: &mut Model, action: Action) -> Option<Effect> {
    match action {
        Action::Quit => return Some(Effect::Quit),
        Action::Help => model.overlay = Some(Overlay::Help { scroll: 0 }),
        Action::Command => prompt(model, PromptKind::Command, String::new()),
        Action::Filter => {
            let text = model.look().filter;
            prompt(model, PromptKind::Filter, text);
        }
        Action::Jump => prompt(model, PromptKind::Jump, String::new()),
        Action::View(n) => tab(model, n.into()),
        Action::NextView => tab(model, model.screen.tab() + 1),
        Action::PreviousView => tab(model, model.screen.tab() + Screen::TABS.len() - 1),
        Action::Pause => {
            if model.is_live() {
                if let Some(index) = model.index() {
                    hold(model, index);
                }
            } else {
                live(model);
            }
        }
        Action::Live => live(model),
        Action::Earlier => {
            if let Some(seq) = step_from(model) {
                step_to(model, Seq(seq.0.saturating_sub(1)));
            }
        }
        Action::Later => {
            if let Some(seq) = step_from(model) {
                step_to(model, seq.next());
            }
        }
        Action::Back => back(model),
        Action::Enter => enter(model),
        Action::Describe => describe(model),
        Action::Why => {
            let effect = why(model);
            model.notice = Some(match &effect {
                Some(Effect::Why { image, block, .. }) => format!("asking the log why {image}:{block} …"),
                _ => "nothing here that the log could explain".into(),
            });
            return effect;
        }
        Action::Sort(key) => {
            let look = model.looks.entry(model.screen.tab()).or_default();
            let reversed = look.sort.is_some_and(|s| s.key == key && !s.reversed);
            look.sort = Some(Sort { key, reversed });
        }
        Action::ZoomIn => zoom(model, true),
        Action::ZoomOut => zoom(model, false),
        Action::Up
        | Action::Down
        | Action::Left
        | Action::Right
        | Action::PageUp
        | Action::PageDown
        | Action::Home
        | Action::End => {
            if matches!(model.screen, Screen::Heat(_)) {
                move_on_map(model, action);
            } else {
                move_in_table(model, action);
            }
        }
    }
    None
}

fn prompt(model: &mut Model, kind: PromptKind, text: String) {
    model.prompt = Some(Prompt { kind, text });
}

fn back(model: &mut Model) {
    if matches!(model.screen, Screen::Heat(_)) && model.map.window.is_some() {
        zoom(model, false);
    } else if !model.look().filter.is_empty() && !matches!(model.screen, Screen::Heat(_)) {
        set_filter(model, "");
    } else if let Some(screen) = model.back.pop() {
        model.screen = screen;
    } else if model.screen != Screen::Overview {
        model.screen = Screen::Overview;
    }
}

fn enter(model: &mut Model) {
    match model.selected() {
        Some(RowId::Node(node)) => open(model, Screen::Images(Some(node))),
        Some(RowId::Image(image)) => open_map(model, image),
        Some(_) => describe(model),
        None => {}
    }
}

fn describe(model: &mut Model) {
    let Some(snapshot) = model.snapshot() else { return };
    let view = &snapshot.view;
    let selected = match model.screen {
        Screen::Heat(image) => Some(RowId::Image(image)),
        _ => model.selected(),
    };
    let (title, lines) = match selected {
        Some(RowId::Node(id)) => match view.nodes.iter().find(|n| n.id == id) {
            Some(n) => (format!("Node {id}"), narrate::node(n)),
            None => return,
        },
        Some(RowId::Image(id)) => match snapshot.image(id) {
            Some(i) => (format!("Image {}", i.name), narrate::image(i)),
            None => return,
        },
        Some(RowId::Decision(seq)) => match snapshot.decisions.iter().find(|d| d.seq == seq) {
            Some(d) => (format!("Decision #{seq}"), narrate::decision(d)),
            None => return,
        },
        Some(RowId::Health(at)) => match view.health.get(at) {
            Some(h) => (
                h.code.clone(),
                vec![
                    format!("{}: {}", h.severity, h.message),
                    String::new(),
                    format!("what to do: {}", h.fix),
                ],
            ),
            None => return,
        },
        Some(RowId::Event(seq)) => match event_line(model, seq) {
            Some(l) => (format!("Event #{seq} {}", l.kind), l.details.clone()),
            None => return,
        },
        Some(RowId::None) | None => return,
    };
    model.overlay = Some(Overlay::Text {
        title,
        lines,
        scroll: 0,
    });
}

fn event_line(model: &Model, seq: Seq) -> Option<&LogLine> {
    let shown = model.event().map(|moment| &moment.event);
    model.log.iter().chain(shown).find(|line| line.seq == seq)
}

/// The hottest block of the cell under the heat map's cursor, or the first block of the decision under the cursor.
fn why(model: &mut Model) -> Option<Effect> {
    let snapshot = model.snapshot()?;
    let at = model.seq().filter(|_| !model.is_live());
    match model.screen {
        Screen::Heat(id) => {
            let image = snapshot.image(id)?.name.clone();
            let grid = map_grid(model)?;
            let cell = grid.cells.get(grid.cell_of(model.map.block))?;
            let block = cell.hottest.unwrap_or(BlockIndex(model.map.block));
            Some(Effect::Why { image, block, at })
        }
        Screen::Decisions => {
            let Some(RowId::Decision(seq)) = model.selected() else {
                return None;
            };
            let decision = snapshot.decisions.iter().find(|d| d.seq == seq)?;
            let image = decision.images.first()?.clone();
            let block = match &decision.command.order {
                Order::Promote { blocks, .. } => blocks.first()?.block,
                Order::Demote { blocks, .. } => blocks.first()?.block,
                Order::Replicate { blocks, .. } => blocks.map_or(BlockIndex(0), |extent| extent.first),
                Order::Drop { .. } => BlockIndex(0),
            };
            Some(Effect::Why { image, block, at })
        }
        _ => None,
    }
}

fn move_in_table(model: &mut Model, action: Action) {
    let Some(table) = model.table() else { return };
    let Some(at) = model.cursor(&table) else { return };
    let page = view::rows_shown(model).max(1);
    let last = table.rows.len() - 1;
    let to = match action {
        Action::Up => at.saturating_sub(1),
        Action::Down => (at + 1).min(last),
        Action::PageUp => at.saturating_sub(page),
        Action::PageDown => (at + page).min(last),
        Action::Home => 0,
        Action::End => last,
        _ => at,
    };
    let look = model.looks.entry(model.screen.tab()).or_default();
    look.index = to;
    // The top row is a place, not a thing: new decisions and events push the old ones down under it.
    look.row = (to > 0).then(|| table.rows[to].id.clone());
}

/// The grid that the heat map shows now.
pub fn map_grid(model: &Model) -> Option<Grid> {
    let Screen::Heat(image) = model.screen else { return None };
    let heat = model.heat(image)?;
    let (columns, rows) = view::map_fit(model);
    let (first, count) = model.map.window.unwrap_or((0, heat.blocks));
    Some(Grid::new(
        heat,
        Range {
            first,
            end: first + count,
        },
        columns,
        rows,
    ))
}

fn move_on_map(model: &mut Model, action: Action) {
    let Some(grid) = map_grid(model) else { return };
    let Some(last) = grid.cells.len().checked_sub(1) else {
        return;
    };
    let (at, width) = (grid.cell_of(model.map.block), grid.columns as usize);
    let to = match action {
        Action::Left => at.saturating_sub(1),
        Action::Right => (at + 1).min(last),
        Action::Up if at >= width => at - width,
        Action::Down if at + width <= last => at + width,
        Action::PageUp => at % width,
        Action::PageDown => at + (last - at) / width * width,
        Action::Home => 0,
        Action::End => last,
        _ => at,
    };
    model.map.block = grid.blocks_of(to).first;
}

/// Zooms by four around the cursor, never closer than a block per cell, never farther than the image.
fn zoom(model: &mut Model, closer: bool) {
    let Screen::Heat(image) = model.screen else { return };
    let Some(blocks) = model.heat(image).map(|h| h.blocks) else {
        return;
    };
    let (columns, rows) = view::map_fit(model);
    let (_, count) = model.map.window.unwrap_or((0, blocks));
    let least = (columns * rows).min(blocks);
    let count = if closer {
        (count / 4).max(least)
    } else {
        count.saturating_mul(4)
    };
    if count >= blocks {
        model.map.window = None;
        if closer {
            model.notice = Some("one cell is one block already".into());
        }
        return;
    }
    // The window starts at a multiple of a row, so that cells stay put while looking around.
    let middle = model.map.block.saturating_sub(count / 2);
    let first = (middle / columns * columns).min(blocks - count);
    model.map.window = Some((first, count));
}

#[cfg(test)]
mod tests;
