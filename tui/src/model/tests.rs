//! Models for the tests of this crate.

use hearth_protocol::ImageId;
use hearth_protocol::view::ClusterView;

use super::*;
use crate::theme::Depth;

#[allow(dead_code, missing_docs)]
#[path = "../../tests/sample/mod.rs"]
pub mod sample;

/// The sample's view number `n`, at log position `n`.
pub fn view_at(n: u64) -> ClusterView {
    let mut view = sample::view(40);
    view.seq = Seq(n);
    view.time = hearth_protocol::WallMs(1_000_000 + n * 1_000);
    view
}

/// A dashboard with some past.
pub fn sample_model() -> Model {
    let theme = Theme {
        depth: Depth::Ansi256,
        ascii: false,
    };
    let mut model = Model::new(theme, "nats://127.0.0.1:4222", Can { why: true, step: true });
    for s in 1..=40 {
        model.history.push(sample::view(s));
    }
    model.history.push_heat(sample::heat(0, 40));
    model.connection = Connection::Up;
    model.size = (120, 40);
    model
}

/// The sample on every view.
pub fn every_screen() -> Vec<Model> {
    let mut screens: Vec<Screen> = Screen::TABS.iter().map(|(s, _, _)| s.clone()).collect();
    screens.push(Screen::Heat(ImageId(0xa000)));
    screens
        .into_iter()
        .map(|screen| {
            let mut model = sample_model();
            model.screen = screen;
            model
        })
        .collect()
}

#[test]
fn the_cursor_stays_on_its_thing() {
    let mut model = sample_model();
    model.screen = Screen::Images(None);
    let table = model.table().unwrap();
    let id = table.rows[2].id.clone();
    model.looks.entry(2).or_default().row = Some(id.clone());
    model.looks.entry(2).or_default().sort = Some(Sort {
        key: 'R',
        reversed: false,
    });
    assert_eq!(model.selected(), Some(id));
}

#[test]
fn the_past_shows_the_events_of_the_past() {
    let mut model = sample_model();
    model.screen = Screen::Log;
    for seq in 1..=300 {
        model.log.push_back(LogLine {
            seq: Seq(seq),
            time: hearth_protocol::WallMs(seq),
            kind: "ticked".into(),
            by: "scheduler-a".into(),
            text: String::new(),
            void: None,
            details: vec![],
        });
    }
    assert_eq!(model.table().unwrap().rows.len(), 300);
    model.position = Position::At(model.history.get(9).unwrap().view.seq);
    assert_eq!(model.table().unwrap().rows.len() as u64, 10 * 6 + 4);
}
