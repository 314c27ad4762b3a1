//! `hearth node`.

use hearth_protocol::NodeId;
use hearth_protocol::rpc::{Failure, FailureKind, NodeInfo, NodeReply, NodeRequest, SchedulerReply, SchedulerRequest};
use hearth_protocol::view::{NodeView, StopView};
use hearth_tui::{fmt, narrate, tables};
use serde::Serialize;

use super::{Context, plan, watch};
use crate::Outcome;
use crate::cli::{Change, Node};
use crate::cluster::{Cluster, unexpected};
use crate::output;

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
        Node::Drain { node, change } => return drain(context, &cluster, node, true, change).await,
        Node::Undrain { node, change } => return drain(context, &cluster, node, false, change).await,
        Node::OkToStop { node } => return ok_to_stop(context, &cluster, node).await,
        Node::Set {
            node,
            fault_domain,
            change,
        } => {
            let what = match fault_domain.as_str() {
                "" => format!("have {node} in the fault domain that it says itself"),
                name => format!("have {node} in fault domain {name}"),
            };
            let request = SchedulerRequest::NodeSet {
                node,
                fault_domain,
                reason: change.reason,
            };
            return ask(context, &cluster, &what, request, change.dry_run).await;
        }
    }
    Ok(())
}

async fn drain(context: &Context, cluster: &Cluster, node: NodeId, draining: bool, change: Change) -> Outcome {
    let what = match draining {
        true => format!("drain {node}"),
        false => format!("end the drain of {node}"),
    };
    let request = SchedulerRequest::NodeDrain {
        node: node.clone(),
        draining,
        reason: change.reason,
    };
    ask(context, cluster, &what, request, change.dry_run).await?;
    if draining && !change.dry_run {
        output::note(&format!(
            "it is emptied a few replicas at a time: hearth node list shows how far, hearth node ok-to-stop {node} what keeps it"
        ));
    }
    Ok(())
}

/// Asks the scheduler for a change, or prints the plan.
async fn ask(context: &Context, cluster: &Cluster, what: &str, request: SchedulerRequest, dry_run: bool) -> Outcome {
    if dry_run {
        plan::scheduler(context, what, &request);
        return Ok(());
    }
    let reply = cluster.scheduler(&request).await?;
    let SchedulerReply::Done { seq } = &reply else {
        return Err(unexpected("the scheduler", &reply));
    };
    context.out.one(&reply, || format!("done at #{seq}: {what}\n"));
    Ok(())
}

async fn ok_to_stop(context: &Context, cluster: &Cluster, node: NodeId) -> Outcome {
    let stop = match cluster.scheduler(&SchedulerRequest::OkToStop { node }).await? {
        SchedulerReply::Stop(stop) => stop,
        other => return Err(unexpected("the scheduler", &other)),
    };
    context.out.one(&stop, || stop_text(&stop));
    if stop.is_ok() {
        return Ok(());
    }
    let node = &stop.node;
    Err(Failure::new(
        FailureKind::Refused,
        format!(
            "{} would suffer if {node} stopped",
            narrate::plural(stop.images.len() as u64 + stop.omitted, "image")
        ),
        match stop.draining {
            true => format!("it drains: look again, or see hearth health --detail; nothing was done to {node}"),
            false => format!("hearth node drain {node} moves what can be moved"),
        },
    ))
}

fn stop_text(stop: &StopView) -> String {
    let node = &stop.node;
    if stop.is_ok() {
        return match stop.present {
            true => format!("{node} can be stopped: no image needs it\n"),
            false => format!("{node} is not there, and no image needs it\n"),
        };
    }
    let mut text = String::new();
    for image in &stop.images {
        text += &format!(
            "{}: {}, {}\n  {}\n",
            image.image,
            image.harm.as_str(),
            image.why,
            image.fix
        );
    }
    if stop.omitted > 0 {
        text += &format!("and {} more\n", narrate::plural(stop.omitted, "image"));
    }
    text
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
