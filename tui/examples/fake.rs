//! The dashboard over a made-up cluster that warms up: `cargo run -p hearth-tui --example fake`.

use std::sync::mpsc;
use std::time::Duration;

use hearth_tui::model::{Can, Model};
use hearth_tui::tables::LogLine;
use hearth_tui::terminal::{self, Wish};
use hearth_tui::theme::Theme;
use hearth_tui::update::Feed;

#[allow(missing_docs)]
#[path = "../tests/sample/mod.rs"]
mod sample;

fn main() -> Result<(), terminal::TopError> {
    let theme = Theme::from_env(
        |name| std::env::var(name).ok(),
        std::env::args().any(|a| a == "--ascii"),
    );
    let (feed, news) = mpsc::channel();
    let (wishes, wanted) = mpsc::channel();
    std::thread::spawn(move || {
        let mut watched = None;
        for s in 1.. {
            while let Ok(wish) = wanted.try_recv() {
                match wish {
                    Wish::Watch(image) => watched = image,
                    Wish::Event(None) => {}
                    Wish::Event(Some((seq, image))) => {
                        // Six events a second.
                        let second = seq.0.div_ceil(6);
                        let mut view = sample::view(second);
                        view.seq = seq;
                        let event = LogLine {
                            seq,
                            time: view.time,
                            kind: "made_up".into(),
                            by: "nobody".into(),
                            text: format!("event {seq} of second {second}"),
                            void: None,
                            details: vec!["This cluster is made up.".into()],
                        };
                        let heat = image.map(|image| sample::heat((image.0 & 0xf) as usize, second));
                        let _ = feed.send(Feed::Event {
                            event: Box::new(event),
                            view: Box::new(view),
                            heat,
                        });
                    }
                    Wish::Why { image, block, .. } => {
                        let _ = feed.send(Feed::Text {
                            title: format!("Why {image}:{block}"),
                            lines: vec!["This cluster is made up: there is no log to ask.".into()],
                        });
                    }
                }
            }
            let heat = watched.map(|image| Feed::Heat(sample::heat((image.0 & 0xf) as usize, s)));
            for news in [Some(Feed::View(Box::new(sample::view(s)))), heat]
                .into_iter()
                .flatten()
            {
                if feed.send(news).is_err() {
                    return;
                }
            }
            // Two seconds of the made-up cluster in one of ours.
            std::thread::sleep(Duration::from_millis(500));
        }
    });
    terminal::run(
        Model::new(theme, "made up", Can { why: true, step: true }),
        &news,
        &wishes,
    )
}
