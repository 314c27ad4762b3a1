//! The shell around the model: the real terminal, the keys, and a feed behind two channels.

use std::io;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use hearth_protocol::{BlockIndex, ImageId, ImageName, Seq};

use crate::keys::Key;
use crate::model::Model;
use crate::update::{Effect, Feed, Msg, update};
use crate::view;

/// Least time between two frames that only new data asks for: four a second, so that a slow line keeps up.
const FRAME: Duration = Duration::from_millis(250);
/// Longest wait for a key before the feed is looked at.
const POLL: Duration = Duration::from_millis(50);

/// What the dashboard asks of its feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Bring this image's heat with every view, or no image's.
    Watch(Option<ImageId>),
    /// Tell of the cluster right after this event, with this image's heat then; or of none any more.
    Event(Option<(Seq, Option<ImageId>)>),
    /// Explain a block.
    Why {
        /// The image.
        image: ImageName,
        /// The block.
        block: BlockIndex,
        /// As of this log position, now without.
        at: Option<Seq>,
    },
}

/// Why the dashboard ended.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The terminal could not be set up, read or written.
    #[error("cannot use the terminal for the dashboard: {0}; `hearth top -b -n1` prints it as text")]
    Terminal(#[from] io::Error),
}

/// A key press in our words.
fn key(event: KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    Some(match event.code {
        KeyCode::Char('c') if event.modifiers.contains(KeyModifiers::CONTROL) => Key::CtrlC,
        KeyCode::Char(_) if event.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) => return None,
        KeyCode::Char(c) => Key::Char(c),
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Esc,
        KeyCode::Backspace => Key::Backspace,
        KeyCode::Tab => Key::Tab,
        KeyCode::BackTab => Key::BackTab,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::Left => Key::Left,
        KeyCode::Right => Key::Right,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        _ => return None,
    })
}

/// Runs the dashboard until the user leaves. The feed sends what it has into `feed` and takes wishes from `wishes`;
/// when it goes away, the last screen stays.
///
/// # Errors
/// [`TopError::Terminal`]; the terminal is put back in order first.
pub fn run(mut model: Model, feed: &Receiver<Feed>, wishes: &Sender<Wish>) -> Result<(), TopError> {
    let mut terminal = ratatui::try_init()?;
    let result = run_in(&mut terminal, &mut model, feed, wishes);
    ratatui::restore();
    Ok(result?)
}

fn run_in(
    terminal: &mut ratatui::DefaultTerminal,
    model: &mut Model,
    feed: &Receiver<Feed>,
    wishes: &Sender<Wish>,
) -> io::Result<()> {
    let size = terminal.size()?;
    model.size = (size.width, size.height);
    let mut watched = None;
    let mut stepped = None;
    let mut changed = true;
    let mut at_once = true;
    let mut last_frame = Instant::now();
    loop {
        // A feed that is gone has nothing more: the last screen stays.
        while let Ok(news) = feed.try_recv() {
            // A held screen does not change with new data.
            at_once |= matches!(
                news,
                Feed::Text { .. } | Feed::Event { .. } | Feed::NoEvent(_) | Feed::Reading(_)
            );
            changed |= model.is_live() || at_once || matches!(news, Feed::Lost(_));
            update(model, Msg::Feed(news));
        }
        if changed && (at_once || last_frame.elapsed() >= FRAME) {
            terminal.draw(|frame| view::draw(model, frame))?;
            last_frame = Instant::now();
            changed = false;
            at_once = false;
        }
        // All keys that are there already are taken before the next frame, so that a held key never lags behind.
        let mut wait = POLL;
        while event::poll(wait)? {
            wait = Duration::ZERO;
            let msg = match event::read()? {
                Event::Key(event) => key(event).map(Msg::Key),
                Event::Resize(width, height) => Some(Msg::Resize(width, height)),
                _ => None,
            };
            let Some(msg) = msg else { continue };
            changed = true;
            at_once = true;
            match update(model, msg) {
                Some(Effect::Quit) => return Ok(()),
                // A feed that is gone cannot fulfil wishes; the header says so already.
                Some(Effect::Why { image, block, at }) => {
                    let _ = wishes.send(Wish::Why { image, block, at });
                }
                None => {}
            }
        }
        if model.wanted_heat() != watched {
            watched = model.wanted_heat();
            let _ = wishes.send(Wish::Watch(watched));
        }
        if model.wanted_event() != stepped {
            stepped = model.wanted_event();
            let _ = wishes.send(Wish::Event(stepped));
        }
    }
}

/// Columns of the terminal, 80 where it does not say.
pub fn width() -> usize {
    crossterm::terminal::size().map_or(80, |(columns, _)| columns.into())
}
