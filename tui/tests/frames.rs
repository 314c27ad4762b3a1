//! Every view as text, at both sizes and in every depth of colour; `BLESS=1` writes the golden files anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use hearth_protocol::{Seq, WallMs};
use hearth_tui::keys::Key;
use hearth_tui::model::{Can, Model};
use hearth_tui::tables::LogLine;
use hearth_tui::theme::{Depth, Theme};
use hearth_tui::update::{Feed, Msg, update};
use hearth_tui::view;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::{Color, Modifier};

mod sample;

const COLOUR: Theme = Theme {
    depth: Depth::Ansi256,
    ascii: false,
};
const SIXTEEN: Theme = Theme {
    depth: Depth::Ansi16,
    ascii: false,
};
const MONO: Theme = Theme {
    depth: Depth::Mono,
    ascii: false,
};
const ASCII: Theme = Theme {
    depth: Depth::Mono,
    ascii: true,
};

fn model(theme: Theme, size: (u16, u16), seconds: u64) -> Model {
    let mut model = Model::new(theme, "nats://127.0.0.1:4222", Can { why: true, step: true });
    update(&mut model, Msg::Resize(size.0, size.1));
    for s in 1..=seconds {
        update(&mut model, Msg::Feed(Feed::View(Box::new(sample::view(s)))));
    }
    for n in 0..2 {
        update(&mut model, Msg::Feed(Feed::Heat(sample::heat(n, seconds))));
    }
    let log = (1..=seconds * 6).map(|seq| LogLine {
        seq: Seq(seq),
        time: WallMs(1_763_660_000_000 + seq * 166),
        kind: ["ticked", "heat_folded", "command_given", "command_finished"][seq as usize % 4].into(),
        by: "scheduler-sched-1".into(),
        text: format!("event number {seq}"),
        void: (seq % 50 == 0).then(|| "the term is not the highest".into()),
        details: vec![format!("everything about {seq}")],
    });
    update(&mut model, Msg::Feed(Feed::Log(log.collect())));
    model
}

fn keys(model: &mut Model, keys: &str) {
    for c in keys.chars() {
        let key = match c {
            '\n' => Key::Enter,
            '↓' => Key::Down,
            '→' => Key::Right,
            c => Key::Char(c),
        };
        update(model, Msg::Key(key));
    }
}

/// Holds the screen right after the `back`-th event before the newest.
fn step(model: &mut Model, back: usize, void: bool) {
    keys(model, &"T".repeat(back));
    let (seq, image) = model.wanted_event().unwrap();
    let mut view = sample::view(seq.0 / 6);
    view.seq = seq;
    let event = model.log.iter().find(|line| line.seq == seq).unwrap().clone();
    let event = LogLine {
        void: void.then(|| "the term is not the highest".into()),
        ..event
    };
    let heat = image.map(|image| sample::heat((image.0 & 0xf) as usize, seq.0 / 6));
    update(
        model,
        Msg::Feed(Feed::Event {
            event: Box::new(event),
            view: Box::new(view),
            heat,
        }),
    );
}

fn colour(color: Color) -> String {
    match color {
        Color::Reset => "-".into(),
        Color::Indexed(i) => i.to_string(),
        other => format!("{other:?}"),
    }
}

/// The characters, and below them per line the runs of style as `length:foreground/background/modifier`.
fn frame(model: &Model) -> String {
    let mut terminal = Terminal::new(TestBackend::new(model.size.0, model.size.1)).unwrap();
    terminal.draw(|f| view::draw(model, f)).unwrap();
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    let mut styles = String::new();
    for y in 0..model.size.1 {
        let mut line = String::new();
        let mut runs: Vec<(u16, String)> = Vec::new();
        for x in 0..model.size.0 {
            let cell = &buffer[(x, y)];
            line.push_str(cell.symbol());
            let mut style = format!("{}/{}", colour(cell.fg), colour(cell.bg));
            if cell.modifier != Modifier::empty() {
                write!(style, "/{:?}", cell.modifier).unwrap();
            }
            match runs.last_mut() {
                Some((n, last)) if *last == style => *n += 1,
                _ => runs.push((1, style)),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
        let runs: Vec<_> = runs.into_iter().map(|(n, style)| format!("{n}:{style}")).collect();
        styles.push_str(&runs.join(" "));
        styles.push('\n');
    }
    format!("{text}--- styles\n{styles}")
}

fn check(name: &str, model: &Model) {
    let got = frame(model);
    if model.theme.ascii {
        assert!(got.is_ascii(), "{name} is not ASCII");
    }
    if model.theme.depth == Depth::Mono {
        let (_, styles) = got.split_once("--- styles\n").unwrap();
        // Modifiers may have spaces between them: a run starts with its length.
        let mut runs = styles.split_whitespace().filter_map(|word| word.split_once(':'));
        assert!(runs.all(|(_, style)| style.starts_with("-/-")), "{name} has a colour");
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &got).unwrap();
        return;
    }
    let expect = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        got == expect,
        "{name} changed; look at it, then run with BLESS=1\n--- got\n{}\n--- expected\n{}",
        got.split("--- styles").next().unwrap(),
        expect.split("--- styles").next().unwrap()
    );
}

const SCREENS: [(&str, &str); 9] = [
    ("overview", ""),
    ("nodes", "2"),
    ("images", "3R"),
    ("heat", ":appl/vm-1\n↓↓→→→"),
    ("heat-zoomed", ":appl/vm-1\n↓↓→→→++"),
    ("decisions", "4↓↓"),
    ("health", "5"),
    ("log", "6"),
    ("help", "?"),
];

/// Every view at both sizes, in what the terminal can show.
fn every_view(theme: Theme, name: &str) {
    for (view, press) in SCREENS {
        for size in [(80, 24), (120, 40)] {
            let mut model = model(theme, size, 40);
            keys(&mut model, press);
            check(&format!("{view}-{}x{}-{name}", size.0, size.1), &model);
        }
    }
}

#[test]
fn every_view_in_256_colours() {
    every_view(COLOUR, "colour");
}

#[test]
fn every_view_in_sixteen_colours() {
    every_view(SIXTEEN, "sixteen");
}

#[test]
fn every_view_without_colours() {
    every_view(MONO, "mono");
}

#[test]
fn every_view_in_ascii() {
    every_view(ASCII, "ascii");
}

#[test]
fn an_event_at_both_sizes_in_what_the_terminal_can_show() {
    for (theme, name) in [
        (COLOUR, "colour"),
        (SIXTEEN, "sixteen"),
        (MONO, "mono"),
        (ASCII, "ascii"),
    ] {
        for (view, press, void) in [
            ("overview", "", false),
            ("log", "6", true),
            ("heat", ":appl/vm-1\n", false),
        ] {
            for size in [(80, 24), (120, 40)] {
                let mut model = model(theme, size, 40);
                keys(&mut model, press);
                step(&mut model, 9, void);
                check(&format!("event-{view}-{}x{}-{name}", size.0, size.1), &model);
            }
        }
    }
}

#[test]
fn trouble_and_the_past() {
    let mut away = model(COLOUR, (80, 24), 95);
    check("overview-80x24-absent", &away);
    keys(&mut away, "5");
    check("health-80x24-absent", &away);
    keys(&mut away, "1 ");
    update(&mut away, Msg::Feed(Feed::View(Box::new(sample::view(99)))));
    check("overview-80x24-held", &away);
    let mut stepped = model(COLOUR, (80, 24), 40);
    step(&mut stepped, 8, false);
    keys(&mut stepped, "?");
    check("help-80x24-event", &stepped);
    let mut lost = model(COLOUR, (80, 24), 40);
    update(
        &mut lost,
        Msg::Feed(Feed::Lost("no scheduler answered within 5 s".into())),
    );
    check("overview-80x24-lost", &lost);
    let mut described = model(COLOUR, (80, 24), 40);
    keys(&mut described, "4d");
    check("describe-80x24-colour", &described);
    let empty = Model::new(COLOUR, "nats://127.0.0.1:4222", Can::default());
    check("waiting-80x24-colour", &empty);
}
