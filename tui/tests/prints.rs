//! What the `hearth` command prints of a cluster: the tables as `-o table` on a narrow terminal and `-o wide`, the
//! overview, the health; `BLESS=1` writes the golden files anew.

use std::path::PathBuf;
use std::sync::Arc;

use hearth_tui::theme::{Depth, Theme};
use hearth_tui::{headless, tables};

#[allow(dead_code)]
mod sample;

fn check(name: &str, got: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/print-{name}.txt"));
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, got).unwrap();
        return;
    }
    let expect = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(got, expect, "{name} changed; look at it, then run with BLESS=1");
}

#[test]
fn tables_narrow_and_wide() {
    let view = sample::view(95);
    let decisions: Vec<_> = view.decisions.iter().rev().take(5).cloned().map(Arc::new).collect();
    for (name, table) in [
        ("nodes", tables::nodes(&view.nodes)),
        ("images", tables::images(&view.images)),
        ("decisions", tables::decisions(&decisions)),
        ("health", tables::health(&view.health)),
    ] {
        let narrow = table.to_text(80, false);
        let longest = narrow.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(
            longest <= 80,
            "{name} has {longest} columns on a terminal of 80:\n{narrow}"
        );
        let (full, wide) = (table.to_text(0, false), table.to_text(0, true));
        let columns = |text: &str| {
            text.lines()
                .next()
                .map_or(0, |heading| heading.split_whitespace().count())
        };
        assert!(columns(&wide) >= columns(&full) && columns(&full) >= columns(&narrow));
        check(name, &format!("{narrow}\n{full}\n{wide}"));
    }
}

#[test]
fn the_overview_and_the_health() {
    let view = sample::view(95);
    let text = headless::overview(&view, 0);
    check("overview", &text);
    check("health-detail", &headless::health(&view.health, true));
    let ascii = Theme {
        depth: Depth::Mono,
        ascii: true,
    };
    let printed = ascii.text(&text);
    assert!(printed.is_ascii(), "{printed}");
    assert!(
        !printed.contains('?'),
        "a character has no ASCII one to stand for it: {printed}"
    );
}
