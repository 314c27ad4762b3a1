//! The column of the replicas: there where an image has some, and nowhere else.

use hearth_protocol::view::{ImageView, ReplicasView};
use hearth_tui::{narrate, tables};

#[allow(dead_code)]
mod sample;

fn with(image: &ImageView, in_sync: u64, wanted: u64, joiners: &[&str]) -> ImageView {
    let nodes = |names: &[&str]| names.iter().map(|name| name.parse().unwrap()).collect();
    ImageView {
        replicas: ReplicasView {
            wanted,
            in_sync,
            members: nodes(&["node-1", "node-2"][..in_sync as usize]),
            joiners: nodes(joiners),
        },
        ..image.clone()
    }
}

#[test]
fn the_column_is_there_only_if_some_image_has_replicas() {
    let mut images = sample::view(95).images;
    assert!(!tables::images(&images).to_text(0, true).contains("REPLICAS"));
    images[0] = with(&images[0], 1, 2, &["node-3"]);
    images[1] = with(&images[1], 2, 2, &[]);
    let table = tables::images(&images);
    let text = table.to_text(80, false);
    let cells: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().nth(3).unwrap())
        .collect();
    assert_eq!(cells[..4], ["REPLICAS", "1/2", "2/2", "-"], "{text}");
    assert!(table.rows.iter().all(|row| row.cells.len() == table.columns.len()));
}

#[test]
fn an_image_says_where_its_replicas_are() {
    let image = &sample::view(95).images[0];
    let line = |image: &ImageView| {
        narrate::image(image)
            .into_iter()
            .find(|line| line.starts_with("replicas"))
    };
    assert_eq!(line(image), None);
    let told = "replicas       1 of 2 in sync on node-1, being synced on node-3";
    assert_eq!(line(&with(image, 1, 2, &["node-3"])).as_deref(), Some(told));
}
