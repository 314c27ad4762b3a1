//! `hearth node`.

use hearth_protocol::rpc::{NodeInfo, NodeReply, NodeRequest};
use hearth_protocol::view::NodeView;
use hearth_tui::{fmt, narrate, tables};
use serde::Serialize;

use super::{Context, watch};
use crate::Outcome;
use crate::cli::Node;
use crate::cluster::unexpected;

/// What the node and the scheduler know of a node.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    info: NodeInfo,
    /// None when the scheduler does not answer.
    activity: Option<NodeView>,
}

pub async fn run(context: &Context, verb: Node) -> Outcome {
    let cluster = context.cluster().await?;
    match verb {
        Node::List { watch } => {
            let list = async || {
                let view = cluster.view().await?;
                context.out.many(&view.nodes, || tables::nodes(&view.nodes));
                Ok(())
            };
            watch::run(context, watch, list).await?;
        }
        Node::Show { node } => {
            let node = cluster.some_node(node).await?;
            let info = match cluster.node(&node, &NodeRequest::NodeShow).await? {
                NodeReply::Node(info) => info,
                other => return Err(unexpected(&format!("node {node}"), &other)),
            };
            // The node alone can show itself; without a scheduler its activity is missing.
            let activity = match cluster.view().await {
                Ok(view) => view.nodes.into_iter().find(|n| n.id == node),
                Err(_) => None,
            };
            let shown = Shown { info, activity };
            context.out.one(&shown, || text(&shown));
        }
    }
    Ok(())
}

fn text(shown: &Shown) -> String {
    let info = &shown.info;
    let mut lines = match &shown.activity {
        Some(view) => narrate::node(view),
        None => vec![format!("node           {}", info.id)],
    };
    lines.push(String::new());
    lines.push(format!("version        {}", info.version));
    lines.push(format!("store          {}", info.store));
    lines.push(format!("NBD socket     {}", info.socket));
    lines.push(format!("peers reach it {}", info.peer_address));
    lines.push(format!(
        "RAM tier       {} of {} in use",
        fmt::bytes(info.ram_used),
        fmt::bytes(info.ram)
    ));
    lines.push(match info.heat_source_why.as_str() {
        "" => format!("heat source    {}", info.heat_source),
        why => format!("heat source    {} ({why})", info.heat_source),
    });
    lines.join("\n") + "\n"
}
