//! `hearth location`.

use hearth_protocol::record::{Nodes, Run};
use hearth_protocol::rpc::{Failure, FailureKind, ImageInfo, NodeRequest};
use hearth_tui::table::{Cell, Column, Row, RowId, Table};

use super::ask::{Ask, act_each};
use super::{Context, job};
use crate::Outcome;
use crate::cli::Location;
use crate::output;

pub async fn run(context: &Context, verb: Location) -> Outcome {
    let cluster = context.cluster().await?;
    match verb {
        Location::List { image, on } => {
            let info = cluster.image_info(&image, on.node).await?;
            if info.locations.is_empty() {
                return Err(Failure::new(
                    FailureKind::NotSupported,
                    format!("{image} has no replicas: {} alone holds it", info.node),
                    "images get replicas when they are created: hearth image create --replicas 2",
                ));
            }
            context.out.many(&info.locations, || table(&info));
            Ok(())
        }
        Location::Add {
            image,
            location,
            blocks,
            pace,
            detach,
            on,
            change,
        } => {
            let node = cluster.node_of(&image, on.node).await?;
            let part = blocks.map_or_else(String::new, |(first, last)| format!(", blocks {first} to {last}"));
            let ask = Ask {
                what: format!("have {location} hold {image}{part}"),
                request: NodeRequest::LocationAdd {
                    image,
                    node: location,
                    blocks,
                    pace,
                },
                node,
            };
            job::start(context, &cluster, change, ask, detach).await
        }
        Location::Remove {
            image,
            location,
            on,
            change,
        } => {
            let node = cluster.node_of(&image, on.node).await?;
            let ask = Ask {
                what: format!("delete the copy of {image} on {location}"),
                request: NodeRequest::LocationRemove {
                    image: image.clone(),
                    node: location,
                },
                node,
            };
            let dry_run = change.dry_run;
            act_each(context, &cluster, change, "removed", vec![ask]).await?;
            if !dry_run {
                output::note(&format!(
                    "left with fewer replicas than wanted, it gets another one after a grace time; to have fewer for good: \
                     hearth image set {image} --replicas N"
                ));
            }
            Ok(())
        }
    }
}

/// Blocks of an image's run: the first, and how many.
pub(super) fn blocks(info: &ImageInfo, at: usize, run: &Run) -> (u64, u64) {
    let all = info.size.0.div_ceil(info.block_size.0.max(1));
    let end = info.locations.get(at + 1).map_or(all, |next| next.first.0.min(all));
    (run.first.0, end.saturating_sub(run.first.0))
}

pub(super) fn names(nodes: &Nodes) -> String {
    let names: Vec<_> = nodes.iter().map(|node| node.as_str()).collect();
    if names.is_empty() { "-".into() } else { names.join(" ") }
}

/// One run as a line.
pub fn run_text(info: &ImageInfo, at: usize, run: &Run) -> String {
    let (first, count) = blocks(info, at, run);
    let part = match info.locations.len() {
        1 => String::new(),
        _ => format!(" (blocks {first} to {})", (first + count).saturating_sub(1)),
    };
    let joins = match run.joiners.is_empty() {
        true => String::new(),
        false => format!(", being synced: {}", names(&run.joiners)),
    };
    format!("in sync on {}{joins}{part}", names(&run.members))
}

fn table(info: &ImageInfo) -> Table {
    let row = |(at, run): (usize, &Run)| {
        let (first, count) = blocks(info, at, run);
        Row {
            id: RowId::None,
            cells: vec![
                Cell::number(first, first.to_string()),
                Cell::number(count, count.to_string()),
                Cell::text(names(&run.members)),
                Cell::text(names(&run.joiners)),
            ],
        }
    };
    Table {
        columns: vec![
            Column::number("FIRST"),
            Column::number("BLOCKS"),
            Column::text("IN SYNC"),
            Column::text("BEING SYNCED"),
        ],
        rows: info.locations.iter().enumerate().map(row).collect(),
    }
}
