//! Changes asked of nodes: one or many at a time, as plans or for real, and what came of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::rpc::{Asked, Failure, FailureKind, NodeReply, NodeRequest};
use hearth_protocol::{ImageName, NodeId};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{Context, image, plan};
use crate::Outcome;
use crate::cli::Change;
use crate::cluster::{Cluster, unexpected};
use crate::output;

/// Requests under way at a time: as many as a node answers at once, so that none waits in a queue while its timeout
/// runs.
const AT_ONCE: usize = 32;

/// One change.
#[derive(Debug, Clone)]
pub struct Ask {
    /// In words, as an infinitive.
    pub what: String,
    /// Who is asked.
    pub node: NodeId,
    /// For what.
    pub request: NodeRequest,
}

impl Ask {
    /// As it travels.
    pub fn asked(&self, reason: &str) -> Asked<NodeRequest> {
        Asked {
            request: self.request.clone(),
            reason: reason.to_owned(),
        }
    }
}

/// A change of each image, asked of the node that has it. A name given twice is asked once.
///
/// # Errors
/// Exit code 3 if nobody has one of the images; nothing was asked then.
pub async fn asks(
    cluster: &Cluster,
    images: Vec<ImageName>,
    named: Option<NodeId>,
    request: impl Fn(&ImageName, &NodeId) -> (String, NodeRequest),
) -> Outcome<Vec<Ask>> {
    let mut asks = Vec::new();
    let nodes = cluster.nodes_of(&images, named).await?;
    let mut seen = std::collections::BTreeSet::new();
    for (image, node) in images.iter().zip(nodes) {
        if seen.insert(image) {
            let (what, request) = request(image, &node);
            asks.push(Ask { what, node, request });
        }
    }
    Ok(asks)
}

/// Asks for every change, or prints the plans, and says what came of each, in the order given. One failure does not
/// keep the others from being asked.
///
/// # Errors
/// The failure; of several the first, after all of them were said.
pub async fn act_each(context: &Context, cluster: &Cluster, change: Change, done: &str, asks: Vec<Ask>) -> Outcome {
    if change.dry_run {
        plan::nodes(context, &asks, &change.reason);
        return Ok(());
    }
    let count = asks.len();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for (index, ask) in asks.iter().enumerate() {
        let (cluster, node, places) = (cluster.clone(), ask.node.clone(), Arc::clone(&places));
        let asked = ask.asked(&change.reason);
        tasks.spawn(async move {
            let _place = places.acquire().await;
            (index, cluster.change(&node, &asked).await)
        });
    }
    let mut replies = BTreeMap::new();
    while let Some(ended) = tasks.join_next().await {
        let (index, reply) = ended.map_err(|error| {
            Failure::new(
                FailureKind::Failed,
                format!("a request was given up: {error}"),
                "this is a bug of Hearth",
            )
        })?;
        replies.insert(index, reply);
    }
    let mut good = Vec::new();
    let mut failures = Vec::new();
    for (ask, reply) in asks.into_iter().zip(replies.into_values()) {
        match reply {
            Ok(reply) => good.push((ask, reply)),
            Err(failure) => failures.push((ask, failure)),
        }
    }
    print(context, done, &good, count)?;
    match failures.len() {
        0 => Ok(()),
        1 if count == 1 => Err(failures.remove(0).1),
        failed => {
            for (ask, failure) in &failures {
                output::note(&format!("cannot {}: {}", ask.what, failure.message));
            }
            let (_, first) = failures.remove(0);
            Err(Failure::new(
                first.kind,
                format!("{failed} of {count} failed, the first with: {}", first.message),
                first.hint,
            ))
        }
    }
}

/// One thing as itself; many as a list.
fn print(context: &Context, done: &str, good: &[(Ask, NodeReply)], asked: usize) -> Outcome {
    let text = |ask: &Ask, reply: &NodeReply| match reply {
        NodeReply::Done { seq: Some(seq) } => Ok(format!("{done} at #{seq}: {}\n", ask.what)),
        NodeReply::Done { seq: None } => Ok(format!("{done}: {}\n", ask.what)),
        NodeReply::Image(_) => Ok(format!("{done}: {}\n", ask.what)),
        other => Err(unexpected(&format!("node {}", ask.node), other)),
    };
    match good {
        [(_, NodeReply::Image(info))] if asked == 1 => {
            context.out.one(info, || format!("{done}\n{}", image::info_text(info)));
        }
        [(ask, reply)] if asked == 1 => {
            let text = text(ask, reply)?;
            context.out.one(reply, || text);
        }
        several if context.out.is_json() => {
            let replies: Vec<_> = several.iter().map(|(_, reply)| reply).collect();
            context.out.list(&replies);
        }
        several => {
            for (ask, reply) in several {
                context.out.text(&text(ask, reply)?);
            }
        }
    }
    Ok(())
}
