//! Printing: tables for people, JSON for programs, failures for both.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use hearth_protocol::rpc::Failure;
use hearth_tui::table::Table;
use hearth_tui::theme::{Depth, Theme};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns
    Table,
    /// More columns
    Wide,
    /// One JSON document
    Json,
    /// One JSON document per line
    Jsonl,
}

/// Where data goes.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// How.
    pub format: Format,
    /// Only ASCII.
    pub ascii: bool,
}

impl Output {
    /// Whether a program reads it.
    pub fn is_json(self) -> bool {
        matches!(self.format, Format::Json | Format::Jsonl)
    }

    /// Text for people. A reader that has gone away (`| head`) ends the command quietly.
    pub fn text(self, text: &str) {
        let theme = Theme {
            depth: Depth::Mono,
            ascii: self.ascii,
        };
        raw(theme.text(text).as_bytes());
    }

    /// One document: indented for `json`, on one line for `jsonl`.
    pub fn json(self, value: &impl Serialize) {
        let text = match self.format {
            Format::Jsonl => serde_json::to_string(value),
            _ => serde_json::to_string_pretty(value),
        };
        // Views and answers of the protocol always encode.
        raw((text.unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}")) + "\n").as_bytes());
    }

    /// Many things: a table, an array, or a line each.
    pub fn many<T: Serialize>(self, items: &[T], table: impl FnOnce() -> Table) {
        if self.is_json() {
            self.list(items);
        } else {
            self.table(&table());
        }
    }

    /// Many documents: an array for `json`, a line each for `jsonl`.
    pub fn list<T: Serialize>(self, items: &[T]) {
        match self.format {
            Format::Jsonl => items.iter().for_each(|item| self.json(item)),
            _ => self.json(&items),
        }
    }

    /// One thing: text, or a document.
    pub fn one(self, item: &impl Serialize, text: impl FnOnce() -> String) {
        if self.is_json() {
            self.json(item);
        } else {
            self.text(&text());
        }
    }

    /// A bar on stderr for bytes that are under way; nothing where stderr is no terminal.
    pub fn bar(self) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style =
            "{msg} {wide_bar} {percent:>3} %  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(if self.ascii { style.progress_chars("#>-") } else { style });
        }
        bar
    }

    /// A table; as wide as it takes for `wide` and where no terminal is.
    pub fn table(self, table: &Table) {
        self.text(&table.to_text(width(), self.format == Format::Wide));
    }
}

/// Columns of the terminal; 0 where there is none.
pub fn width() -> usize {
    if io::stdout().is_terminal() {
        hearth_tui::terminal::width()
    } else {
        0
    }
}

fn raw(bytes: &[u8]) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        eprintln!("error: cannot print: {error}");
        std::process::exit(1);
    }
}

/// A failure on stderr: what failed, and what to do.
pub fn report(failure: &Failure) {
    eprintln!("error: {}", one_line(&failure.message));
    if !failure.hint.is_empty() {
        eprintln!("hint: {}", one_line(&failure.hint));
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Something worth knowing that is no data.
pub fn note(text: &str) {
    eprintln!("{text}");
}
