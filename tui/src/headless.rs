//! The dashboard as text, for `hearth top -b` and `hearth status`: the same tables and sentences.

use hearth_protocol::view::{ClusterView, HealthItem};

use crate::fmt;
use crate::narrate;
use crate::snapshot::Snapshot;
use crate::tables;

/// Decisions shown in text.
const DECISIONS: usize = 10;

/// The one-line state of the cluster.
pub fn summary(view: &ClusterView) -> String {
    let present = view.nodes.iter().filter(|n| n.present).count();
    let attached = view.images.iter().filter(|i| i.attached).count();
    format!(
        "{}  seq {}  tick {}  term {}  leader {}  digest {}  nodes {present}/{}  images {} ({attached} attached)",
        fmt::time(view.time),
        view.seq,
        view.tick,
        view.term,
        view.leader.as_ref().map_or("none", |l| l.as_str()),
        view.digest.chars().take(12).collect::<String>(),
        view.nodes.len(),
        view.images.len()
    )
}

/// What is wrong, one line each with its remedy, or that nothing is.
pub fn health(items: &[HealthItem], detail: bool) -> String {
    if items.is_empty() {
        return "health: ok\n".into();
    }
    let mut out = String::new();
    for item in items {
        out += &format!("{} {}: {}\n", item.severity, item.code, item.message);
        if detail {
            out += &format!("  to do: {}\n", item.fix);
        }
    }
    out
}

/// Everything the overview shows.
pub fn overview(view: &ClusterView, width: usize) -> String {
    let snapshot = Snapshot::new(view.clone(), None);
    let view = &snapshot.view;
    let totals = &view.totals;
    let mut out = summary(view) + "\n" + &health(&view.health, false);
    out += &format!(
        "reads from RAM: {}  worst read p99: {}  blocks promoted {} demoted {} skipped {}  events {} void {} gaps {}\n",
        snapshot.hit_permille().map_or_else(|| "-".into(), fmt::permille),
        snapshot.read_p99_us().map_or_else(|| "-".into(), fmt::us),
        totals.blocks_promoted,
        totals.blocks_demoted,
        totals.blocks_skipped,
        totals.events,
        totals.void,
        totals.report_gaps
    );
    out += "\n";
    out += &tables::nodes(&view.nodes).to_text(width, false);
    out += "\n";
    out += &tables::images(&view.images).to_text(width, false);
    if !snapshot.decisions.is_empty() {
        out += "\n";
        for d in snapshot.decisions.iter().rev().take(DECISIONS) {
            let line = format!(
                "#{} {} {} [{}]",
                d.seq,
                fmt::clock(d.time),
                narrate::sentence(d),
                narrate::ended(d)
            );
            for part in if width == 0 {
                vec![line]
            } else {
                fmt::wrap(&line, width, 4)
            } {
                out += &part;
                out.push('\n');
            }
        }
    }
    out
}
