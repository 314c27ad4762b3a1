//! A table once, shown three ways: on the dashboard, by `hearth … -o table`, and by `hearth top -b`.

use std::cmp::Ordering;

use hearth_protocol::{ImageId, NodeId, Seq};

use crate::theme::Tone;

/// Which side a column's text leans on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// One column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// Its heading.
    pub title: &'static str,
    /// Alignment of heading and cells.
    pub align: Align,
    /// Shown by `-o wide` and where there is room only.
    pub wide: bool,
    /// Given up, rightmost first, before any text is cut.
    pub minor: bool,
    /// The upper-case letter that sorts by it on the dashboard.
    pub sort: Option<char>,
}

impl Column {
    /// A column of text.
    pub const fn text(title: &'static str) -> Self {
        Self {
            title,
            align: Align::Left,
            wide: false,
            minor: false,
            sort: None,
        }
    }

    /// A column of numbers.
    pub const fn number(title: &'static str) -> Self {
        Self {
            align: Align::Right,
            ..Self::text(title)
        }
    }

    /// Sorted by this letter.
    pub const fn sort(mut self, key: char) -> Self {
        self.sort = Some(key);
        self
    }

    /// Given up before any text is cut.
    pub const fn minor(mut self) -> Self {
        self.minor = true;
        self
    }

    /// Shown where there is room only.
    pub const fn wide(mut self) -> Self {
        self.wide = true;
        self
    }
}

/// What a cell sorts by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SortKey {
    /// Alphabetically, ascending first.
    Text,
    /// By number, largest first.
    Number(u64),
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// What it says.
    pub text: String,
    /// What it means.
    pub tone: Tone,
    /// What it sorts by.
    pub key: SortKey,
}

impl Cell {
    /// Text.
    pub fn text(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            tone: Tone::Plain,
            key: SortKey::Text,
        }
    }

    /// A number and how it is written.
    pub fn number(value: u64, text: impl Into<String>) -> Self {
        Self {
            key: SortKey::Number(value),
            ..Self::text(text)
        }
    }

    /// With a meaning.
    pub fn tone(mut self, tone: Tone) -> Self {
        self.tone = tone;
        self
    }
}

/// What a row stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowId {
    /// A node.
    Node(NodeId),
    /// An image.
    Image(ImageId),
    /// The command at this log position.
    Decision(Seq),
    /// The n-th health item.
    Health(usize),
    /// The event at this log position.
    Event(Seq),
    /// Nothing that can be opened.
    None,
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What it stands for.
    pub id: RowId,
    /// As many as there are columns.
    pub cells: Vec<Cell>,
}

/// Which column sorts, and whether against its natural direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sort {
    /// The column's letter.
    pub key: char,
    /// Turned around.
    pub reversed: bool,
}

/// Columns and rows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// The columns.
    pub columns: Vec<Column>,
    /// The rows.
    pub rows: Vec<Row>,
}

const GAP: usize = 2;

impl Table {
    /// Keeps the rows that contain `needle` in any cell, without regard to case.
    pub fn filtered(mut self, needle: &str) -> Self {
        if !needle.is_empty() {
            let needle = needle.to_lowercase();
            self.rows
                .retain(|r| r.cells.iter().any(|c| c.text.to_lowercase().contains(&needle)));
        }
        self
    }

    /// Sorts rows, equal ones keeping their order.
    pub fn sorted(mut self, sort: Option<Sort>) -> Self {
        let Some(sort) = sort else { return self };
        let Some(at) = self.columns.iter().position(|c| c.sort == Some(sort.key)) else {
            return self;
        };
        self.rows.sort_by(|a, b| {
            let (a, b) = (&a.cells[at], &b.cells[at]);
            let order = match (&a.key, &b.key) {
                (SortKey::Number(a), SortKey::Number(b)) => b.cmp(a),
                (SortKey::Number(_), SortKey::Text) => Ordering::Less,
                (SortKey::Text, SortKey::Number(_)) => Ordering::Greater,
                (SortKey::Text, SortKey::Text) => a.text.cmp(&b.text),
            };
            if sort.reversed { order.reverse() } else { order }
        });
        self
    }

    /// Which columns to show, and how wide, so that a line has at most `width` characters: columns marked wide go first
    /// when there is no room, then minor ones, then the widest text column shrinks, then columns fall off at the right.
    pub fn layout(&self, width: usize, wide: bool) -> Vec<(usize, usize)> {
        let natural = |i: usize| {
            self.rows
                .iter()
                .map(|r| r.cells[i].text.chars().count())
                .chain([self.columns[i].title.chars().count()])
                .max()
                .unwrap_or(0)
        };
        let total = |shown: &[(usize, usize)]| {
            shown.iter().map(|(_, w)| w).sum::<usize>() + GAP * shown.len().saturating_sub(1)
        };
        let mut shown: Vec<(usize, usize)> = (0..self.columns.len())
            .filter(|i| wide || !self.columns[*i].wide)
            .map(|i| (i, natural(i)))
            .collect();
        let given_up: [fn(&Column) -> bool; 2] = [|c| c.wide, |c| c.minor];
        for give_up in given_up {
            while total(&shown) > width
                && let Some(at) = shown.iter().rposition(|(i, _)| give_up(&self.columns[*i]))
            {
                shown.remove(at);
            }
        }
        let over = total(&shown).saturating_sub(width);
        if over > 0
            && let Some(at) = (0..shown.len())
                .filter(|at| self.columns[shown[*at].0].align == Align::Left)
                .max_by_key(|at| (shown[*at].1, *at))
        {
            let least = self.columns[shown[at].0].title.chars().count().max(8);
            shown[at].1 = shown[at].1.saturating_sub(over).max(least.min(shown[at].1));
        }
        while total(&shown) > width && shown.len() > 1 {
            shown.pop();
        }
        shown
    }

    /// One cell's text, cut and aligned to `width`.
    pub fn aligned(text: &str, width: usize, align: Align) -> String {
        let text = crate::fmt::cut(text, width);
        let pad = " ".repeat(width - text.chars().count());
        match align {
            Align::Left => text + &pad,
            Align::Right => pad + &text,
        }
    }

    /// Lines of text: a heading and the rows, no trailing spaces. `width` 0 means as wide as it takes.
    pub fn to_text(&self, width: usize, wide: bool) -> String {
        let shown = self.layout(if width == 0 { usize::MAX } else { width }, wide);
        let mut out = String::new();
        let mut line = |cell: &dyn Fn(usize) -> String| {
            let parts: Vec<String> = shown
                .iter()
                .map(|(i, w)| Self::aligned(&cell(*i), *w, self.columns[*i].align))
                .collect();
            out.push_str(parts.join(&" ".repeat(GAP)).trim_end());
            out.push('\n');
        };
        line(&|i| self.columns[i].title.to_owned());
        for row in &self.rows {
            line(&|i| row.cells[i].text.clone());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Table {
        Table {
            columns: vec![
                Column::text("NAME").sort('N'),
                Column::number("READS").sort('R'),
                Column::text("NOTE").wide(),
            ],
            rows: [("b", 5), ("a-rather-long-name", 700), ("c", 60)]
                .into_iter()
                .map(|(name, reads)| Row {
                    id: RowId::None,
                    cells: vec![
                        Cell::text(name),
                        Cell::number(reads, reads.to_string()),
                        Cell::text(format!("note on {name}")),
                    ],
                })
                .collect(),
        }
    }

    fn check(table: &Table, width: usize, wide: bool, expect: &str) {
        let text = table.to_text(width, wide);
        assert_eq!(text, expect);
        assert!(width == 0 || text.lines().all(|l| l.chars().count() <= width));
    }

    #[test]
    fn text_is_aligned_and_fits() {
        check(
            &sample(),
            0,
            false,
            "NAME                READS\nb                       5\na-rather-long-name    700\nc                      60\n",
        );
        check(
            &sample(),
            16,
            true,
            "NAME       READS\nb              5\na-rather…    700\nc             60\n",
        );
        check(&sample(), 9, false, "NAME\nb\na-rathe…\nc\n");
    }

    #[test]
    fn sorting_and_filtering() {
        let first = |sort, reversed| {
            let table = sample().sorted(Some(Sort { key: sort, reversed }));
            table.rows[0].cells[0].text.clone()
        };
        assert_eq!(first('R', false), "a-rather-long-name");
        assert_eq!(first('R', true), "b");
        assert_eq!(first('N', true), "c");
        assert_eq!(first('Z', true), "b");
        assert_eq!(sample().filtered("RATHER").rows.len(), 1);
        assert_eq!(sample().filtered("").rows.len(), 3);
    }
}
