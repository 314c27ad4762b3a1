use super::*;
use crate::model::tests::{every_screen, sample, sample_model};

fn press(model: &mut Model, keys: &str) -> Option<Effect> {
    let mut effect = None;
    for c in keys.chars() {
        let key = match c {
            '\n' => Key::Enter,
            '\x1b' => Key::Esc,
            '\t' => Key::Tab,
            '↓' => Key::Down,
            '→' => Key::Right,
            c => Key::Char(c),
        };
        effect = update(model, Msg::Key(key)).or(effect);
    }
    effect
}

#[test]
fn drilling_goes_in_and_back_out() {
    let mut model = sample_model();
    press(&mut model, "2\n");
    assert!(matches!(model.screen, Screen::Images(Some(_))));
    press(&mut model, "\n");
    assert!(matches!(model.screen, Screen::Heat(_)));
    assert!(model.wanted_heat().is_some());
    press(&mut model, "\x1b\x1b");
    assert_eq!(model.screen, Screen::Nodes);
    press(&mut model, "\x1b");
    assert_eq!(model.screen, Screen::Overview);
}

#[test]
fn commands_and_filters_are_typed() {
    let mut model = sample_model();
    press(&mut model, ":dec\n");
    assert_eq!(model.screen, Screen::Decisions);
    press(&mut model, ":appl/vm-1\n");
    assert_eq!(model.screen, Screen::Heat(hearth_protocol::ImageId(0xa000)));
    press(&mut model, ":nonsense\n");
    assert!(model.notice.as_deref().unwrap().contains("overview, nodes"));
    press(&mut model, "3/vm-2");
    assert_eq!(model.table().unwrap().rows.len(), 1, "the filter works while typing");
    press(&mut model, "\n");
    assert_eq!(model.table().unwrap().rows.len(), 1);
    press(&mut model, "\x1b");
    assert_eq!(model.table().unwrap().rows.len(), 5);
}

#[test]
fn holding_and_stepping() {
    let mut model = sample_model();
    let newest = model.snapshot().unwrap().view.seq;
    press(&mut model, " ");
    assert_eq!(
        model.wanted_event(),
        None,
        "what is on the screen is held, nothing is looked up"
    );
    press(&mut model, "TTT");
    assert_eq!(model.wanted_event(), Some((Seq(newest.0 - 3), None)));
    assert_eq!(
        model.snapshot().unwrap().view.seq.0,
        newest.0 - 6,
        "until the answer comes, the last moment seen before it"
    );
    answer(&mut model);
    assert_eq!((model.seq(), &model.notice), (Some(Seq(newest.0 - 3)), &None));
    update(&mut model, Msg::Feed(Feed::View(Box::new(sample::view(41)))));
    assert_eq!(model.seq(), Some(Seq(newest.0 - 3)), "held is held");
    press(&mut model, "t");
    assert_eq!(
        model.seq(),
        Some(Seq(newest.0 - 3)),
        "what was shown stays until the answer comes"
    );
    answer(&mut model);
    assert_eq!(model.seq(), Some(Seq(newest.0 - 2)));
    let event = model.event().unwrap();
    assert_eq!(event.event.text, format!("event {}", newest.0 - 2));
    assert_eq!(event.snapshot.view.seq, Seq(newest.0 - 2));
    press(&mut model, "L");
    assert_eq!(model.snapshot().unwrap().view.seq.0, newest.0 + 6);
    assert!(model.is_live() && model.event().is_none());
}

/// The feed tells of the event that the model wants.
fn answer(model: &mut Model) {
    let (seq, image) = model.wanted_event().unwrap();
    let mut view = sample::view(seq.0.div_ceil(6));
    view.seq = seq;
    let feed = Feed::Event {
        event: Box::new(line(seq)),
        view: Box::new(view),
        heat: image.map(|image| sample::heat((image.0 & 0xf) as usize, 10)),
    };
    update(model, Msg::Feed(feed));
}

fn line(seq: Seq) -> LogLine {
    LogLine {
        seq,
        time: WallMs(seq.0),
        kind: "ticked".into(),
        by: "scheduler-a".into(),
        text: format!("event {seq}"),
        void: None,
        details: vec![format!("all about {seq}")],
    }
}

#[test]
fn steps_end_where_the_log_does() {
    let mut model = sample_model();
    let newest = model.newest().unwrap();
    press(&mut model, "T");
    answer(&mut model);
    press(&mut model, "t");
    answer(&mut model);
    assert_eq!(model.seq(), Some(newest));
    press(&mut model, "t");
    assert_eq!(
        model.wanted_event(),
        Some((newest, None)),
        "there is none after the newest"
    );
    assert!(model.notice.as_deref().unwrap().contains("is the newest event"));
    // The log goes on: so do the steps.
    update(&mut model, Msg::Feed(Feed::Log(vec![line(newest.next())])));
    press(&mut model, "t");
    assert_eq!(model.wanted_event(), Some((newest.next(), None)));
    press(&mut model, "b#1\n");
    answer(&mut model);
    press(&mut model, "T");
    assert_eq!(model.seq(), Some(Seq(1)));
    assert_eq!(model.notice.as_deref(), Some("the log begins at #1"));
}

#[test]
fn an_event_that_cannot_be_told_of_leaves_the_screen_as_it_is() {
    let mut model = sample_model();
    let newest = model.newest().unwrap();
    press(&mut model, "T");
    update(&mut model, Msg::Feed(Feed::NoEvent("the stream begins at #900".into())));
    assert_eq!(model.notice.as_deref(), Some("the stream begins at #900"));
    assert_eq!(model.wanted_event(), None);
    press(&mut model, "L");
    press(&mut model, "T");
    answer(&mut model);
    press(&mut model, "T");
    update(&mut model, Msg::Feed(Feed::NoEvent("gone".into())));
    assert_eq!(model.seq(), Some(Seq(newest.0 - 1)), "the last event told of stays");
    press(&mut model, "T");
    assert_eq!(model.wanted_event(), Some((Seq(newest.0 - 2), None)));
    press(&mut model, "L");
    update(&mut model, Msg::Feed(Feed::NoEvent("late".into())));
    assert_eq!(
        (model.is_live(), &model.notice),
        (true, &None),
        "an answer that came too late says nothing"
    );
}

#[test]
fn an_event_shows_the_heat_and_the_log_of_its_moment() {
    let mut model = sample_model();
    press(&mut model, ":appl/vm-1\n");
    press(&mut model, "b#3\n");
    let image = model.wanted_heat();
    assert_eq!(model.wanted_event(), Some((Seq(3), image)));
    answer(&mut model);
    assert!(map_grid(&model).is_some());
    let Some(Effect::Why { at, .. }) = press(&mut model, "w") else {
        panic!("the log can explain it")
    };
    assert_eq!(at, Some(Seq(3)));
    // From before what this screen remembers: figures without a past, the event alone in the log.
    let lines = (200..240).map(|seq| line(Seq(seq))).collect();
    update(&mut model, Msg::Feed(Feed::Log(lines)));
    press(&mut model, "6");
    assert_eq!(model.wanted_event(), Some((Seq(3), None)));
    answer(&mut model);
    assert_eq!(model.table().unwrap().rows.len(), 1);
    press(&mut model, "d");
    assert!(matches!(&model.overlay, Some(Overlay::Text { lines, .. }) if lines == &["all about 3"]));
    assert!(model.series(10, Snapshot::hit_permille).is_empty());
}

#[test]
fn jumping_to_a_time() {
    let check = |text: &str, second: Option<u64>| {
        let mut model = sample_model();
        press(&mut model, "b");
        press(&mut model, text);
        press(&mut model, "\n");
        let tick = (!model.is_live()).then(|| model.snapshot().unwrap().view.tick.0);
        assert_eq!(tick, second, "{text}: {:?}", model.notice);
        let looks_up = model.wanted_event().is_some();
        assert_eq!(second.is_none() || looks_up, model.notice.is_some());
    };
    check("-10s", Some(30));
    check("#64", Some(10));
    check("2025-11-20T17:33:40Z", Some(20));
    check("17:33:40", Some(20));
    check("#0", None);
    check("#99999", None);
    check("-10h", None);
    check("yesterday", None);
    check("25:00", None);
}

#[test]
fn why_names_the_hottest_block_under_the_cursor() {
    let mut model = sample_model();
    press(&mut model, ":appl/vm-1\n→↓");
    let grid = map_grid(&model).unwrap();
    let cell = grid.cells[grid.cell_of(model.map.block)];
    let effect = press(&mut model, "w");
    match effect {
        Some(Effect::Why { image, block, at }) => {
            assert_eq!(image.as_str(), "appl/vm-1");
            assert_eq!(block, cell.hottest.unwrap_or(BlockIndex(model.map.block)));
            assert_eq!(at, None);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(press(&mut model, "4w"), Some(Effect::Why { .. })));
}

#[test]
fn zooming_keeps_the_cursor_in_sight() {
    let mut model = sample_model();
    press(&mut model, ":appl/vm-1\n");
    model.map.block = 11_000;
    for _ in 0..6 {
        press(&mut model, "+");
        let grid = map_grid(&model).unwrap();
        assert!(grid.range.first <= 11_000 && 11_000 < grid.range.end);
    }
    assert_eq!(map_grid(&model).unwrap().per_cell, 1);
    for _ in 0..10 {
        press(&mut model, "-");
    }
    assert_eq!(model.map.window, None);
}

/// What keys can change.
fn state(model: &Model) -> String {
    format!(
        "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
        model.screen, model.back, model.looks, model.map, model.overlay, model.prompt, model.position, model.notice
    )
}

#[test]
fn every_key_of_the_table_does_something() {
    // Each screen as it opens, in its middle, held in the past, and looked at closely.
    let mut models = Vec::new();
    for model in every_screen() {
        for keys in ["", "↓↓→", " TT", "+↓→"] {
            let mut model = model.clone();
            press(&mut model, keys);
            models.push(model);
        }
    }
    for binding in keys::BINDINGS {
        for key in binding.keys {
            let works = models.iter().filter(|model| (binding.when)(model)).any(|model| {
                let mut pressed = model.clone();
                pressed.notice = None;
                let before = state(&pressed);
                let effect = update(&mut pressed, Msg::Key(*key));
                effect.is_some() || state(&pressed) != before
            });
            assert!(works, "{} ({:?}) does nothing anywhere", binding.label, binding.action);
        }
    }
}

#[test]
fn shift_letters_sort_and_sort_the_other_way() {
    for model in every_screen() {
        let Some(table) = model.table() else { continue };
        for column in table.columns.iter().filter(|column| column.sort.is_some()) {
            let key = column.sort.unwrap();
            let rows = |model: &Model| -> Vec<RowId> {
                let table = model.table().unwrap();
                table.rows.iter().map(|row| row.id.clone()).collect()
            };
            let mut model = model.clone();
            press(&mut model, &key.to_string());
            let one = rows(&model);
            press(&mut model, &key.to_string());
            let mut other = rows(&model);
            assert_eq!(
                model.look().sort.map(|sort| (sort.key, sort.reversed)),
                Some((key, true))
            );
            let (mut first, mut second) = (one.clone(), other.clone());
            first.sort_by_key(|id| format!("{id:?}"));
            second.sort_by_key(|id| format!("{id:?}"));
            assert_eq!(first, second, "{key} lost rows");
            other.reverse();
            if column.title == "IMAGE" && matches!(model.screen, Screen::Images(_)) {
                assert_eq!(one, other, "names are unique, so {key} turns the order round");
            }
        }
    }
}

#[test]
fn the_answer_to_why_takes_the_place_of_the_question() {
    let mut model = sample_model();
    press(&mut model, ":appl/vm-1\n");
    assert!(press(&mut model, "w").is_some());
    assert!(model.notice.is_some());
    let (title, lines) = ("Why".to_owned(), vec!["because".to_owned()]);
    update(&mut model, Msg::Feed(Feed::Text { title, lines }));
    assert_eq!(model.notice, None);
    assert!(matches!(model.overlay, Some(Overlay::Text { .. })));
}

#[test]
fn no_key_panics_on_any_screen() {
    let keys: Vec<Key> = (' '..='~')
        .map(Key::Char)
        .chain([
            Key::Enter,
            Key::Esc,
            Key::Tab,
            Key::BackTab,
            Key::Backspace,
            Key::Up,
            Key::Down,
            Key::Left,
            Key::Right,
            Key::PageUp,
            Key::PageDown,
            Key::Home,
            Key::End,
        ])
        .collect();
    let mut models = every_screen();
    models.push(Model::new(models[0].theme, "nowhere", Default::default()));
    for (width, height) in [(120, 40), (80, 24), (41, 12), (10, 3), (1, 1)] {
        for model in &models {
            for first in &keys {
                let mut model = model.clone();
                update(&mut model, Msg::Resize(width, height));
                update(&mut model, Msg::Key(*first));
                for second in [Key::Enter, Key::Down, Key::PageDown, Key::End, Key::Char('d'), Key::Esc] {
                    update(&mut model, Msg::Key(second));
                }
                let area = ratatui::layout::Rect::new(0, 0, width, height);
                let mut buffer = ratatui::buffer::Buffer::empty(area);
                view::paint(&model, area, &mut buffer);
            }
        }
    }
}

#[test]
fn a_lost_feed_keeps_the_last_screen() {
    let mut model = sample_model();
    update(
        &mut model,
        Msg::Feed(Feed::Lost("no leader answered within 5 s".into())),
    );
    assert!(model.snapshot().is_some());
    assert!(matches!(model.connection, Connection::Lost(_)));
    update(&mut model, Msg::Feed(Feed::View(Box::new(sample::view(50)))));
    assert_eq!(model.connection, Connection::Up);
}
