//! Colours and characters: how much the terminal can show, and what stands for what.
//!
//! Invariant: nothing is told by colour alone. Heat has a glyph ramp beside its colour ramp, states have words.

use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::border;

/// How many colours the terminal shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// None (`NO_COLOR`): bold, dim, reverse and underline only.
    Mono,
    /// The sixteen of every terminal.
    Ansi16,
    /// The 256 of xterm.
    Ansi256,
}

/// What a piece of text means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tone {
    /// Ordinary.
    #[default]
    Plain,
    /// Less important.
    Dim,
    /// Fine.
    Good,
    /// Needs attention soon.
    Warn,
    /// Needs attention now.
    Bad,
    /// Names, the thing looked at.
    Accent,
    /// Headings.
    Title,
    /// The RAM tier.
    Ram,
}

/// Levels of heat, 0 (none) to 15.
pub const HEAT_LEVELS: u8 = 16;

/// An inferno-like ramp in the 256 colours: each level is brighter than the one before, so it reads without hue.
pub const HEAT_256: [u8; 16] = [
    236, 17, 18, 54, 90, 126, 161, 197, 202, 208, 214, 220, 226, 228, 230, 231,
];
const HEAT_16: [Color; 16] = [
    Color::DarkGray,
    Color::Blue,
    Color::Blue,
    Color::Blue,
    Color::Magenta,
    Color::Magenta,
    Color::Magenta,
    Color::Red,
    Color::Red,
    Color::Red,
    Color::LightRed,
    Color::LightRed,
    Color::Yellow,
    Color::Yellow,
    Color::LightYellow,
    Color::White,
];
const GLYPHS: [&str; 16] = [
    "·", "▁", "▁", "▂", "▂", "▃", "▃", "▄", "▄", "▅", "▅", "▆", "▆", "▇", "▇", "█",
];
const GLYPHS_ASCII: [&str; 16] = [
    ".", "`", "'", "-", ":", ";", "=", "+", "i", "c", "o", "x", "*", "X", "%", "@",
];

/// How to paint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Theme {
    /// Colours.
    pub depth: Depth,
    /// Only ASCII characters.
    pub ascii: bool,
}

const ASCII_BORDER: border::Set<'static> = border::Set {
    top_left: "+",
    top_right: "+",
    bottom_left: "+",
    bottom_right: "+",
    vertical_left: "|",
    vertical_right: "|",
    horizontal_top: "-",
    horizontal_bottom: "-",
};

impl Theme {
    /// What the environment allows: `NO_COLOR`, `TERM`, `COLORTERM`, and the locale for anything but ASCII.
    pub fn from_env(env: impl Fn(&str) -> Option<String>, ascii: bool) -> Self {
        let set = |name: &str| env(name).filter(|v| !v.is_empty());
        let term = set("TERM").unwrap_or_default();
        let depth = if set("NO_COLOR").is_some() || term == "dumb" {
            Depth::Mono
        } else if term.contains("256") || set("COLORTERM").is_some() || term.contains("kitty") {
            Depth::Ansi256
        } else {
            Depth::Ansi16
        };
        let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG"));
        let utf8 = locale.is_none_or(|l| {
            let l = l.to_ascii_lowercase();
            l.contains("utf-8") || l.contains("utf8")
        });
        Self {
            depth,
            ascii: ascii || !utf8 || term == "linux",
        }
    }

    /// The style of a tone.
    pub fn tone(self, tone: Tone) -> Style {
        let plain = Style::new();
        let (c256, c16, modifier) = match tone {
            Tone::Plain => return plain,
            Tone::Dim => (Some(245), Some(Color::DarkGray), Modifier::DIM),
            Tone::Good => (Some(114), Some(Color::Green), Modifier::empty()),
            Tone::Warn => (Some(221), Some(Color::Yellow), Modifier::BOLD),
            Tone::Bad => (Some(203), Some(Color::LightRed), Modifier::BOLD),
            Tone::Accent => (Some(216), Some(Color::Cyan), Modifier::empty()),
            Tone::Title => (Some(209), Some(Color::White), Modifier::BOLD),
            Tone::Ram => (Some(80), Some(Color::LightCyan), Modifier::empty()),
        };
        match self.depth {
            Depth::Mono => plain.add_modifier(modifier),
            Depth::Ansi16 => plain
                .fg(c16.unwrap_or(Color::Reset))
                .add_modifier(modifier.difference(Modifier::DIM)),
            Depth::Ansi256 => plain
                .fg(c256.map_or(Color::Reset, Color::Indexed))
                .add_modifier(modifier.difference(Modifier::DIM)),
        }
    }

    /// The style of a panel's frame.
    pub fn frame(self) -> Style {
        match self.depth {
            Depth::Mono => Style::new().add_modifier(Modifier::DIM),
            Depth::Ansi16 => Style::new().fg(Color::DarkGray),
            Depth::Ansi256 => Style::new().fg(Color::Indexed(239)),
        }
    }

    /// The style laid over the row under the cursor.
    pub fn cursor(self) -> Style {
        match self.depth {
            Depth::Mono => Style::new().add_modifier(Modifier::REVERSED),
            Depth::Ansi16 => Style::new()
                .bg(Color::Blue)
                .fg(Color::White)
                .add_modifier(Modifier::BOLD),
            Depth::Ansi256 => Style::new().bg(Color::Indexed(237)).add_modifier(Modifier::BOLD),
        }
    }

    /// The style of the header bar.
    pub fn bar(self) -> Style {
        match self.depth {
            Depth::Mono => Style::new().add_modifier(Modifier::BOLD),
            Depth::Ansi16 => Style::new().fg(Color::White).add_modifier(Modifier::BOLD),
            Depth::Ansi256 => Style::new().bg(Color::Indexed(235)).fg(Color::Indexed(252)),
        }
    }

    /// The style of the selected tab and of the mode badge.
    pub fn badge(self, tone: Tone) -> Style {
        match self.depth {
            Depth::Mono => Style::new().add_modifier(Modifier::REVERSED | Modifier::BOLD),
            _ => {
                let style = self.tone(tone);
                Style::new()
                    .fg(Color::Black)
                    .bg(style.fg.unwrap_or(Color::White))
                    .add_modifier(Modifier::BOLD)
            }
        }
    }

    /// Glyph and style of a heat level; levels over 15 count as 15.
    pub fn heat(self, level: u8) -> (&'static str, Style) {
        let i = usize::from(level.min(HEAT_LEVELS - 1));
        let glyph = if self.ascii { GLYPHS_ASCII[i] } else { GLYPHS[i] };
        let style = match self.depth {
            Depth::Mono if level == 0 => Style::new().add_modifier(Modifier::DIM),
            Depth::Mono => Style::new(),
            Depth::Ansi16 => Style::new().fg(HEAT_16[i]),
            Depth::Ansi256 => Style::new()
                .fg(Color::Indexed(HEAT_256[i]))
                .bg(Color::Indexed(if i == 0 { 233 } else { 234 })),
        };
        (glyph, style)
    }

    /// Glyph and style of the heat map's cursor: a colour and a glyph that the map has nowhere else.
    pub fn map_cursor(self) -> (&'static str, Style) {
        let style = match self.depth {
            Depth::Mono => Style::new().add_modifier(Modifier::REVERSED),
            Depth::Ansi16 => Style::new().fg(Color::Black).bg(Color::LightGreen),
            Depth::Ansi256 => Style::new().fg(Color::Indexed(16)).bg(Color::Indexed(118)),
        };
        (if self.ascii { "X" } else { "╳" }, style.add_modifier(Modifier::BOLD))
    }

    /// Glyph and style of a RAM lane cell: of the `warm` blocks with heat, `resident` are in RAM.
    pub fn lane(self, resident: u64, warm: u64) -> (&'static str, Style) {
        let glyph = match (resident, self.ascii) {
            (0, _) => " ",
            (r, false) if r >= warm => "▀",
            (r, false) if r * 2 >= warm => "▔",
            (_, false) => "╌",
            (r, true) if r >= warm => "#",
            (r, true) if r * 2 >= warm => "=",
            (_, true) => "-",
        };
        (glyph, self.tone(Tone::Ram))
    }

    /// One step of a bar of eight heights.
    pub fn bar_glyph(self, eighths: u64) -> &'static str {
        const BARS: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
        const ASCII: [&str; 9] = [" ", "_", ".", ",", "-", "=", "+", "*", "#"];
        let i = eighths.min(8) as usize;
        if self.ascii { ASCII[i] } else { BARS[i] }
    }

    /// The characters of panel frames.
    pub fn border(self) -> border::Set<'static> {
        if self.ascii { ASCII_BORDER } else { border::ROUNDED }
    }

    /// The last step of every frame: with `ascii` no other character leaves, without colours no colour does.
    pub fn finish(self, buffer: &mut Buffer) {
        for cell in &mut buffer.content {
            if self.ascii && !cell.symbol().is_ascii() {
                let c = cell.symbol().chars().next().unwrap_or('?');
                cell.set_char(ascii(c));
            }
            if self.depth == Depth::Mono {
                cell.fg = Color::Reset;
                cell.bg = Color::Reset;
            }
        }
    }

    /// The same for text that is printed.
    pub fn text(self, text: &str) -> String {
        if self.ascii {
            text.chars().map(|c| if c.is_ascii() { c } else { ascii(c) }).collect()
        } else {
            text.to_owned()
        }
    }
}

/// The nearest ASCII character.
pub fn ascii(c: char) -> char {
    match c {
        'µ' => 'u',
        '≥' => '>',
        '≤' => '<',
        '→' | '▶' | '›' | '▸' => '>',
        '←' | '‹' => '<',
        '↑' | '▲' => '^',
        '↓' | '▼' => 'v',
        '…' => '~',
        '·' | '•' => '.',
        '×' => 'x',
        '−' | '–' | '─' | '╌' => '-',
        '│' => '|',
        '●' | '■' | '▪' | '✔' => '*',
        '✖' => '!',
        '⏸' => '=',
        '█' => '#',
        '▓' => '+',
        '░' => '.',
        '▏' => '|',
        '▔' | '▀' => '=',
        _ => '?',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn luminance(index: u8) -> u64 {
        let rgb = if index >= 232 {
            let v = 8 + u64::from(index - 232) * 10;
            [v, v, v]
        } else {
            let i = usize::from(index) - 16;
            let steps = [0, 95, 135, 175, 215, 255];
            [steps[i / 36], steps[i / 6 % 6], steps[i % 6]]
        };
        // Gamma 2 is close enough to order colours of the cube.
        2126 * rgb[0] * rgb[0] + 7152 * rgb[1] * rgb[1] + 722 * rgb[2] * rgb[2]
    }

    #[test]
    fn every_heat_level_is_brighter_than_the_one_below() {
        for pair in HEAT_256[1..].windows(2) {
            assert!(luminance(pair[0]) < luminance(pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn ascii_glyphs_differ_level_by_level() {
        for (i, a) in GLYPHS_ASCII.iter().enumerate() {
            assert!(a.is_ascii());
            assert!(!GLYPHS_ASCII[..i].contains(a), "{a} stands for two levels");
        }
    }

    #[test]
    fn the_environment_decides() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
        };
        let theme = |pairs| Theme::from_env(env(pairs), false);
        assert_eq!(theme(&[("TERM", "xterm-256color")]).depth, Depth::Ansi256);
        assert_eq!(theme(&[("TERM", "xterm")]).depth, Depth::Ansi16);
        assert_eq!(
            theme(&[("TERM", "xterm-256color"), ("NO_COLOR", "1")]).depth,
            Depth::Mono
        );
        assert_eq!(
            theme(&[("TERM", "xterm-256color"), ("NO_COLOR", "")]).depth,
            Depth::Ansi256
        );
        assert!(!theme(&[("LANG", "en_US.UTF-8")]).ascii);
        assert!(theme(&[("LANG", "C")]).ascii);
        assert!(Theme::from_env(env(&[]), true).ascii);
    }
}
