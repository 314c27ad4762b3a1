//! The one key table: what each key does and when. Dispatch and the help panel are both made from it, so no key is
//! undocumented and none is documented that does nothing.

use crate::model::{Model, Screen};

/// A key press, free of the terminal library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// A character.
    Char(char),
    /// Return.
    Enter,
    /// Escape.
    Esc,
    /// Backspace.
    Backspace,
    /// Tab.
    Tab,
    /// Shift and Tab.
    BackTab,
    /// Arrow.
    Up,
    /// Arrow.
    Down,
    /// Arrow.
    Left,
    /// Arrow.
    Right,
    /// A page up.
    PageUp,
    /// A page down.
    PageDown,
    /// To the start.
    Home,
    /// To the end.
    End,
    /// Ctrl and C.
    CtrlC,
}

/// What can be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Leave.
    Quit,
    /// Show the keys.
    Help,
    /// Ask for a view by name.
    Command,
    /// Ask for a filter.
    Filter,
    /// Go into the thing under the cursor.
    Enter,
    /// Go back.
    Back,
    /// Show everything about the thing under the cursor.
    Describe,
    /// Cursor.
    Up,
    /// Cursor.
    Down,
    /// Cursor.
    Left,
    /// Cursor.
    Right,
    /// Cursor.
    PageUp,
    /// Cursor.
    PageDown,
    /// Cursor.
    Home,
    /// Cursor.
    End,
    /// The view after this one.
    NextView,
    /// The view before this one.
    PreviousView,
    /// The n-th view.
    View(u8),
    /// Hold the screen, or go on.
    Pause,
    /// One event back.
    Earlier,
    /// One event on.
    Later,
    /// Ask for a time.
    Jump,
    /// Back to live.
    Live,
    /// Explain the block or decision under the cursor.
    Why,
    /// Look closer at the heat map.
    ZoomIn,
    /// Look from farther away.
    ZoomOut,
    /// Sort by the column with this letter.
    Sort(char),
}

/// One line of the table.
pub struct Binding {
    /// The keys.
    pub keys: &'static [Key],
    /// How the help writes them.
    pub label: &'static str,
    /// What they do.
    pub action: Action,
    /// What the help says.
    pub help: &'static str,
    /// The heading it stands under.
    pub section: &'static str,
    /// Whether it works now.
    pub when: fn(&Model) -> bool,
}

fn always(_: &Model) -> bool {
    true
}

fn rows(model: &Model) -> bool {
    !matches!(model.screen, Screen::Heat(_))
}

fn map(model: &Model) -> bool {
    matches!(model.screen, Screen::Heat(_))
}

fn drills(model: &Model) -> bool {
    rows(model)
}

fn past(model: &Model) -> bool {
    model.history.len() > 1 || steps(model)
}

fn held(model: &Model) -> bool {
    !model.is_live()
}

fn steps(model: &Model) -> bool {
    model.can.step && !model.history.is_empty()
}

fn steps_on(model: &Model) -> bool {
    steps(model) && held(model)
}

fn explains(model: &Model) -> bool {
    model.can.why && matches!(model.screen, Screen::Heat(_) | Screen::Decisions)
}

const LOOK: &str = "Look";
const MOVE: &str = "Move";
const TIME: &str = "Time";

macro_rules! bind {
    ($keys:expr, $label:literal, $action:expr, $section:expr, $when:expr, $help:literal) => {
        Binding {
            keys: $keys,
            label: $label,
            action: $action,
            help: $help,
            section: $section,
            when: $when,
        }
    };
}

/// Every key, in the order of the help.
pub const BINDINGS: &[Binding] = &[
    bind!(
        &[Key::Char('1')],
        "1 to 6",
        Action::View(0),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(
        &[Key::Char('2')],
        "1 to 6",
        Action::View(1),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(
        &[Key::Char('3')],
        "1 to 6",
        Action::View(2),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(
        &[Key::Char('4')],
        "1 to 6",
        Action::View(3),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(
        &[Key::Char('5')],
        "1 to 6",
        Action::View(4),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(
        &[Key::Char('6')],
        "1 to 6",
        Action::View(5),
        LOOK,
        always,
        "the views by number"
    ),
    bind!(&[Key::Tab], "Tab", Action::NextView, LOOK, always, "next view"),
    bind!(
        &[Key::BackTab],
        "Shift-Tab",
        Action::PreviousView,
        LOOK,
        always,
        "previous view"
    ),
    bind!(
        &[Key::Char(':')],
        ":",
        Action::Command,
        LOOK,
        always,
        "go to a view by name"
    ),
    bind!(&[Key::Char('/')], "/", Action::Filter, LOOK, rows, "filter the rows"),
    bind!(
        &[Key::Enter],
        "Enter",
        Action::Enter,
        LOOK,
        drills,
        "go in: images, heat map"
    ),
    bind!(&[Key::Enter], "Enter", Action::ZoomIn, LOOK, map, "look closer"),
    bind!(&[Key::Char('+')], "+", Action::ZoomIn, LOOK, map, "look closer"),
    bind!(
        &[Key::Char('-')],
        "-",
        Action::ZoomOut,
        LOOK,
        map,
        "look from farther away"
    ),
    bind!(&[Key::Char('d')], "d", Action::Describe, LOOK, always, "describe it"),
    bind!(
        &[Key::Char('w')],
        "w",
        Action::Why,
        LOOK,
        explains,
        "why is this block here"
    ),
    bind!(&[Key::Esc], "Esc", Action::Back, LOOK, always, "back"),
    bind!(&[Key::Up, Key::Char('k')], "↑ k", Action::Up, MOVE, always, "up"),
    bind!(&[Key::Down, Key::Char('j')], "↓ j", Action::Down, MOVE, always, "down"),
    bind!(&[Key::Left, Key::Char('h')], "← h", Action::Left, MOVE, map, "left"),
    bind!(&[Key::Right, Key::Char('l')], "→ l", Action::Right, MOVE, map, "right"),
    bind!(&[Key::PageUp], "PgUp", Action::PageUp, MOVE, always, "a page up"),
    bind!(&[Key::PageDown], "PgDn", Action::PageDown, MOVE, always, "a page down"),
    bind!(
        &[Key::Home, Key::Char('g')],
        "Home g",
        Action::Home,
        MOVE,
        always,
        "to the start"
    ),
    bind!(&[Key::End], "End", Action::End, MOVE, always, "to the end"),
    bind!(
        &[Key::Char(' ')],
        "Space",
        Action::Pause,
        TIME,
        always,
        "hold the screen, go on"
    ),
    bind!(&[Key::Char('t')], "t", Action::Later, TIME, steps_on, "one event later"),
    bind!(
        &[Key::Char('T')],
        "T",
        Action::Earlier,
        TIME,
        steps,
        "one event earlier"
    ),
    bind!(
        &[Key::Char('b')],
        "b",
        Action::Jump,
        TIME,
        past,
        "jump to a time or #seq"
    ),
    bind!(&[Key::Char('L')], "L", Action::Live, TIME, held, "back to live"),
    bind!(&[Key::Char('?')], "?", Action::Help, LOOK, always, "these keys"),
    bind!(&[Key::Char('q'), Key::CtrlC], "q", Action::Quit, LOOK, always, "leave"),
];

/// What a key does now; a Shift-letter that is not in the table sorts by the column that has it.
pub fn action(model: &Model, key: Key) -> Option<Action> {
    if let Some(binding) = BINDINGS.iter().find(|b| b.keys.contains(&key) && (b.when)(model)) {
        return Some(binding.action);
    }
    match key {
        Key::Char(c) => model
            .table()
            .and_then(|t| t.columns.iter().find(|column| column.sort == Some(c)).copied())
            .map(|_| Action::Sort(c)),
        _ => None,
    }
}

/// The help panel: sections, each with its keys, only those that work now.
pub fn help(model: &Model) -> Vec<(&'static str, Vec<(String, String)>)> {
    let mut sections: Vec<(&'static str, Vec<(String, String)>)> = [LOOK, MOVE, TIME]
        .into_iter()
        .map(|section| {
            let mut lines: Vec<_> = BINDINGS
                .iter()
                .filter(|b| b.section == section && (b.when)(model))
                .map(|b| (b.label.to_owned(), b.help.to_owned()))
                .collect();
            // One line for the six views.
            lines.dedup();
            (section, lines)
        })
        .collect();
    if let Some(table) = model.table() {
        let lines = table
            .columns
            .iter()
            .filter_map(|c| c.sort.map(|k| (k.to_string(), c.title.to_lowercase())))
            .collect();
        sections.push(("Sort by (Shift)", lines));
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{every_screen, sample_model};

    #[test]
    fn a_key_does_one_thing_at_a_time() {
        for model in every_screen() {
            for (i, a) in BINDINGS.iter().enumerate() {
                for b in &BINDINGS[i + 1..] {
                    let clash = a.keys.iter().any(|k| b.keys.contains(k)) && (a.when)(&model) && (b.when)(&model);
                    assert!(!clash, "{} is both {:?} and {:?}", a.label, a.action, b.action);
                }
            }
        }
    }

    #[test]
    fn sort_letters_are_free_and_unique() {
        for model in every_screen() {
            let Some(table) = model.table() else { continue };
            let letters: Vec<char> = table.columns.iter().filter_map(|c| c.sort).collect();
            for (i, letter) in letters.iter().enumerate() {
                assert!(letter.is_ascii_uppercase());
                assert!(!letters[..i].contains(letter), "{letter} sorts two columns");
                assert!(
                    !BINDINGS.iter().any(|b| b.keys.contains(&Key::Char(*letter))),
                    "{letter} is taken"
                );
            }
        }
    }

    #[test]
    fn help_lists_every_key_that_works_and_no_other() {
        let mut model = sample_model();
        model.can.why = false;
        for (_, lines) in help(&model) {
            assert!(lines.iter().all(|(label, _)| label != "w"));
        }
        assert_eq!(action(&model, Key::Char('w')), None);
        assert_eq!(action(&model, Key::Char('x')), None);
        assert_eq!(action(&model, Key::Char('q')), Some(Action::Quit));
    }
}
