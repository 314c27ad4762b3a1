//! `hearth image map` of an image with replicas: which nodes hold which blocks, in runs or block by block.

use hearth_protocol::record::Run;
use hearth_protocol::rpc::{Failure, FailureKind, ImageInfo};
use hearth_protocol::{BlockIndex, ByteLen, Epoch, ImageName, NodeId, SetVersion};
use hearth_tui::table::{Cell, Column, Row, RowId, Table};
use serde::Serialize;

use super::{Context, location};
use crate::Outcome;
use crate::cluster::Cluster;

/// Blocks told one by one at a time: some megabytes of JSON.
const BLOCKS_MAX: u64 = 65_536;

/// A node that holds blocks.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Location {
    node: NodeId,
    /// Whether it holds every acknowledged write, and counts.
    synced: bool,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Block {
    index: BlockIndex,
    locations: Vec<Location>,
}

/// Block by block.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Blocks {
    name: ImageName,
    size: ByteLen,
    block_size: ByteLen,
    blocks: Vec<Block>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Extent {
    first: BlockIndex,
    count: u64,
    locations: Vec<Location>,
}

/// In runs, with the record that they are of.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Runs {
    name: ImageName,
    size: ByteLen,
    block_size: ByteLen,
    epoch: Epoch,
    set_version: SetVersion,
    runs: Vec<Extent>,
}

/// Shows which nodes hold an image with replicas; `false` for one without.
///
/// # Errors
/// The node does not answer, or blocks are named that the image does not have, or too many.
pub async fn show(
    context: &Context,
    cluster: &Cluster,
    image: &ImageName,
    node: &NodeId,
    blocks: Option<Option<(BlockIndex, BlockIndex)>>,
) -> Outcome<bool> {
    let info = cluster.image_info(image, Some(node.clone())).await?;
    match blocks {
        None if info.locations.is_empty() => return Ok(false),
        None => {
            let runs = in_runs(&info);
            if context.out.is_json() {
                context.out.json(&runs);
            } else {
                context.out.table(&runs_table(&info, &runs));
            }
        }
        Some(part) => {
            let blocks = one_by_one(&info, part)?;
            if context.out.is_json() {
                context.out.json(&blocks);
            } else {
                context.out.table(&blocks_table(&blocks));
            }
        }
    }
    Ok(true)
}

fn locations(run: &Run) -> Vec<Location> {
    let of = |synced: bool| {
        move |node: &NodeId| Location {
            node: node.clone(),
            synced,
        }
    };
    run.members
        .iter()
        .map(of(true))
        .chain(run.joiners.iter().map(of(false)))
        .collect()
}

fn in_runs(info: &ImageInfo) -> Runs {
    let extent = |(at, run): (usize, &Run)| {
        let (first, count) = location::blocks(info, at, run);
        let first = BlockIndex(first);
        let locations = locations(run);
        Extent {
            first,
            count,
            locations,
        }
    };
    let stamp = info.record;
    Runs {
        name: info.name.clone(),
        size: info.size,
        block_size: info.block_size,
        epoch: stamp.map_or(Epoch(0), |stamp| stamp.epoch),
        set_version: stamp.map_or(SetVersion(0), |stamp| stamp.set_version),
        runs: info.locations.iter().enumerate().map(extent).collect(),
    }
}

/// An image without replicas is on one node, block by block as well.
fn one_by_one(info: &ImageInfo, part: Option<(BlockIndex, BlockIndex)>) -> Outcome<Blocks> {
    let end = info.size.0.div_ceil(info.block_size.0.max(1)).max(1) - 1;
    let (first, last) = part.map_or((0, end), |(first, last)| (first.0, last.0));
    let usage = |message: String, hint: String| Err(Failure::new(FailureKind::Usage, message, hint));
    if last > end {
        return usage(
            format!("{} has blocks 0 to {end}, not {first} to {last}", info.name),
            String::new(),
        );
    }
    if last - first >= BLOCKS_MAX {
        return usage(
            format!(
                "these are {} blocks, and one answer tells of {BLOCKS_MAX}",
                last - first + 1
            ),
            format!(
                "name fewer: --blocks {first}-{}; without --blocks they come in runs",
                first + BLOCKS_MAX - 1
            ),
        );
    }
    let alone = || Location {
        node: info.node.clone(),
        synced: true,
    };
    let at = |index: u64| {
        let run = info
            .locations
            .partition_point(|run| run.first.0 <= index)
            .checked_sub(1);
        let run = run.and_then(|at| info.locations.get(at));
        Block {
            index: BlockIndex(index),
            locations: run.map_or_else(|| vec![alone()], locations),
        }
    };
    Ok(Blocks {
        name: info.name.clone(),
        size: info.size,
        block_size: info.block_size,
        blocks: (first..=last).map(at).collect(),
    })
}

fn held(locations: &[Location], synced: bool) -> Cell {
    let nodes = locations
        .iter()
        .filter(|at| at.synced == synced)
        .map(|at| at.node.clone());
    Cell::text(location::names(&nodes.collect()))
}

fn runs_table(info: &ImageInfo, runs: &Runs) -> Table {
    let row = |extent: &Extent| Row {
        id: RowId::None,
        cells: vec![
            Cell::number(extent.first.0, extent.first.to_string()),
            Cell::number(extent.count, extent.count.to_string()),
            held(&extent.locations, true),
            held(&extent.locations, false),
            Cell::number(runs.set_version.0, runs.set_version.to_string()),
            Cell::number(runs.epoch.0, runs.epoch.to_string()),
            Cell::text(info.node.as_str()),
        ],
    };
    Table {
        columns: vec![
            Column::number("FIRST"),
            Column::number("BLOCKS"),
            Column::text("IN SYNC"),
            Column::text("BEING SYNCED"),
            Column::number("SET"),
            Column::number("EPOCH").wide(),
            Column::text("SAID BY").wide(),
        ],
        rows: runs.runs.iter().map(row).collect(),
    }
}

fn blocks_table(blocks: &Blocks) -> Table {
    let row = |block: &Block| Row {
        id: RowId::None,
        cells: vec![
            Cell::number(block.index.0, block.index.to_string()),
            held(&block.locations, true),
            held(&block.locations, false),
        ],
    };
    Table {
        columns: vec![
            Column::number("BLOCK"),
            Column::text("IN SYNC"),
            Column::text("BEING SYNCED"),
        ],
        rows: blocks.blocks.iter().map(row).collect(),
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::record::Nodes;

    use super::*;

    fn info(runs: &[(u64, &str, &str)]) -> ImageInfo {
        let nodes = |names: &str| -> Nodes { names.split_whitespace().map(|name| name.parse().unwrap()).collect() };
        let run = |(first, members, joiners): &(u64, &str, &str)| Run {
            first: BlockIndex(*first),
            members: nodes(members),
            joiners: nodes(joiners),
        };
        ImageInfo {
            id: hearth_protocol::ImageId(1),
            name: "a/b".parse().unwrap(),
            size: ByteLen(5 << 16),
            block_size: ByteLen(1 << 16),
            allocated: ByteLen(0),
            layers: vec![],
            snapshots: vec![],
            parent: None,
            node: "n1".parse().unwrap(),
            locations: runs.iter().map(run).collect(),
            record: None,
            attached: None,
            trouble: None,
        }
    }

    #[test]
    fn a_block_is_where_its_run_is() {
        let info = info(&[(0, "n1 n2", ""), (3, "n1", "n3")]);
        let blocks = one_by_one(&info, Some((BlockIndex(2), BlockIndex(3)))).unwrap();
        let json = serde_json::to_value(&blocks).unwrap();
        let expect = serde_json::json!({
            "name": "a/b",
            "size": 327_680,
            "block_size": 65_536,
            "blocks": [
                {"index": 2, "locations": [{"node": "n1", "synced": true}, {"node": "n2", "synced": true}]},
                {"index": 3, "locations": [{"node": "n1", "synced": true}, {"node": "n3", "synced": false}]},
            ],
        });
        assert_eq!(json, expect);
        let counts: Vec<_> = in_runs(&info).runs.iter().map(|run| run.count).collect();
        assert_eq!(counts, [3, 2]);
    }

    #[test]
    fn only_so_many_blocks_are_told_of_and_none_past_the_end() {
        let mut info = info(&[]);
        assert_eq!(one_by_one(&info, None).unwrap().blocks.len(), 5);
        assert!(one_by_one(&info, Some((BlockIndex(4), BlockIndex(5)))).is_err());
        info.size = ByteLen((BLOCKS_MAX + 1) << 16);
        let failure = one_by_one(&info, None).unwrap_err();
        assert!(failure.hint.contains("--blocks 0-65535"), "{failure:?}");
        assert!(one_by_one(&info, Some((BlockIndex(1), BlockIndex(BLOCKS_MAX)))).is_ok());
    }
}
