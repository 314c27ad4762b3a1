//! `hearth image scrub` and `hearth image sync`.

use hearth_protocol::rpc::NodeRequest;
use hearth_protocol::{BlockIndex, ImageName, NodeId};
use hearth_tui::fmt;

use super::ask::Ask;
use super::{Context, job};
use crate::Outcome;
use crate::cli::{Change, Throttle};
use crate::cluster::Cluster;

fn part(blocks: Option<(BlockIndex, BlockIndex)>) -> String {
    blocks.map_or_else(String::new, |(first, last)| format!(", blocks {first} to {last}"))
}

pub async fn scrub(
    context: &Context,
    cluster: &Cluster,
    image: ImageName,
    check: bool,
    throttle: Throttle,
    node: Option<NodeId>,
    change: Change,
) -> Outcome {
    let node = cluster.node_of(&image, node).await?;
    let then = if check { "" } else { " and repair what differs" };
    let ask = Ask {
        what: format!(
            "compare the copies of {image}{}{then}, at {} a second",
            part(throttle.blocks),
            fmt::bytes(throttle.rate)
        ),
        request: NodeRequest::ImageScrub {
            image,
            blocks: throttle.blocks,
            repair: !check,
            rate: throttle.rate,
        },
        node,
    };
    job::start(context, cluster, change, ask, throttle.detach).await
}

pub async fn sync(
    context: &Context,
    cluster: &Cluster,
    image: ImageName,
    only: Option<NodeId>,
    throttle: Throttle,
    change: Change,
) -> Outcome {
    let node = cluster.node_of(&image, None).await?;
    let on = only.as_ref().map_or_else(String::new, |node| format!(" on {node}"));
    let ask = Ask {
        what: format!(
            "write the copies of {image}{on} anew{}, at {} a second",
            part(throttle.blocks),
            fmt::bytes(throttle.rate)
        ),
        request: NodeRequest::ImageSync {
            image,
            blocks: throttle.blocks,
            node: only,
            rate: throttle.rate,
        },
        node,
    };
    job::start(context, cluster, change, ask, throttle.detach).await
}
