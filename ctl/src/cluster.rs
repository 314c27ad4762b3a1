//! The cluster at the other end of NATS: asking nodes and the scheduler, and finding who has an image.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use hearth_bus::{Bus, BusError, NatsOptions, rpc};
use hearth_protocol::rpc::{
    Asked, Failure, FailureKind, ImageInfo, NodeReply, NodeRequest, SchedulerReply, SchedulerRequest,
};
use hearth_protocol::view::{ClusterView, HealthItem, ImageHeatView};
use hearth_protocol::{ImageId, ImageName, NodeId, subject};
use serde::Serialize;

use crate::Outcome;
use crate::cli::Global;

/// How long nodes are waited for that are asked how they are.
const NODES_WAIT: Duration = Duration::from_secs(1);

/// A connection and how long to wait on it.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The streams.
    pub bus: Bus,
    /// Where it is connected.
    pub url: String,
    timeout: std::time::Duration,
}

/// A failure of the bus in the command's words.
pub fn bus_failure(error: &BusError) -> Failure {
    let (kind, hint) = match error {
        BusError::Address { .. } => (
            FailureKind::Usage,
            "write it as nats://host:4222, several separated by commas",
        ),
        BusError::Connect { .. } => (
            FailureKind::CannotConnect,
            "start nats-server, or say where it is with --nats URL or HEARTH_NATS",
        ),
        BusError::Unavailable { .. } => (FailureKind::Timeout, "ask again; if it stays, look at nats-server"),
        BusError::NoStream(_) => (
            FailureKind::NotFound,
            "start a scheduler: hearth-scheduler --nats URL --id sched-1 --dir DIR",
        ),
        BusError::RolledBack { .. } => (
            FailureKind::Refused,
            "restore the stream from its backup or another server",
        ),
        BusError::Unsafe(_) => (FailureKind::Refused, "change the settings it names"),
    };
    Failure::new(kind, error.to_string(), hint)
}

impl Cluster {
    /// Connects.
    ///
    /// # Errors
    /// Exit code 20 without a server, 21 without an answer.
    pub async fn connect(global: &Global) -> Outcome<Self> {
        let mut options = NatsOptions::new(global.nats.clone(), "hearth");
        options.credentials = global.nats_credentials.clone();
        let connecting = tokio::time::timeout(global.timeout, Bus::connect(&options));
        let bus = match connecting.await {
            Ok(result) => result.map_err(|e| bus_failure(&e))?,
            Err(_) => {
                return Err(Failure::new(
                    FailureKind::Timeout,
                    format!("no connection to NATS at {} within {:?}", global.nats, global.timeout),
                    "check the address, or wait longer with --timeout",
                ));
            }
        };
        Ok(Self {
            bus,
            url: global.nats.clone(),
            timeout: global.timeout,
        })
    }

    /// Asks the leading scheduler.
    ///
    /// # Errors
    /// Its failure, or exit codes 20 and 21.
    pub async fn scheduler(&self, request: &SchedulerRequest) -> Outcome<SchedulerReply> {
        rpc::request(&self.bus, subject::SCHEDULER_RPC, request, self.timeout)
            .await
            .map_err(|f| match f.kind {
                FailureKind::CannotConnect => Failure::new(
                    f.kind,
                    format!("no leading scheduler answers at {}", self.url),
                    "start one (hearth-scheduler), or wait some seconds if its leader has just stopped",
                ),
                FailureKind::Timeout => Failure::new(
                    f.kind,
                    format!("the scheduler gave no answer within {:?}", self.timeout),
                    "wait longer with --timeout 30s, and look at the scheduler",
                ),
                _ => f,
            })
    }

    /// Asks a node.
    ///
    /// # Errors
    /// Its failure, or exit codes 20 and 21.
    pub async fn node(&self, node: &NodeId, request: &NodeRequest) -> Outcome<NodeReply> {
        self.ask(node, request).await
    }

    /// Asks a node for a change, with the operator's words for it.
    ///
    /// # Errors
    /// As [`Cluster::node`].
    pub async fn change(&self, node: &NodeId, asked: &Asked<NodeRequest>) -> Outcome<NodeReply> {
        self.ask(node, asked).await
    }

    async fn ask(&self, node: &NodeId, request: &impl Serialize) -> Outcome<NodeReply> {
        rpc::request(&self.bus, subject::node_rpc(node), request, self.timeout)
            .await
            .map_err(|f| match f.kind {
                FailureKind::CannotConnect => Failure::new(
                    f.kind,
                    format!("node {node} does not answer at {}", self.url),
                    format!("is hearth-node running on {node}? `hearth node list` shows who is present"),
                ),
                FailureKind::Timeout => Failure::new(
                    f.kind,
                    format!("node {node} gave no answer within {:?}", self.timeout),
                    "it may still be done: look with `hearth image list` before you repeat it",
                ),
                _ => f,
            })
    }

    /// The cluster now.
    ///
    /// # Errors
    /// As [`Cluster::scheduler`].
    pub async fn view(&self) -> Outcome<ClusterView> {
        match self.scheduler(&SchedulerRequest::View).await? {
            SchedulerReply::View(view) => Ok(*view),
            other => Err(unexpected("the scheduler", &other)),
        }
    }

    /// The cluster now, with what the nodes know by themselves to be wrong on them.
    ///
    /// # Errors
    /// As [`Cluster::scheduler`].
    pub async fn view_with_health(&self) -> Outcome<ClusterView> {
        let mut view = self.view().await?;
        let present: BTreeSet<_> = view.nodes.iter().filter(|n| n.present).map(|n| n.id.clone()).collect();
        view.health.extend(self.nodes_health(&present).await?);
        HealthItem::sort(&mut view.health);
        Ok(view)
    }

    /// What is wrong, as scheduler and nodes know it; without a leading scheduler, that and what the nodes know.
    ///
    /// # Errors
    /// Exit code 20 without NATS.
    pub async fn health(&self) -> Outcome<Vec<HealthItem>> {
        match self.view_with_health().await {
            Ok(view) => Ok(view.health),
            Err(failure) => {
                let mut items = vec![HealthItem::new("NO_LEADER", true, failure.message, failure.hint)];
                items.extend(self.nodes_health(&BTreeSet::new()).await?);
                HealthItem::sort(&mut items);
                Ok(items)
            }
        }
    }

    /// Asks all nodes at once; waits no longer than until those expected have answered.
    async fn nodes_health(&self, expected: &BTreeSet<NodeId>) -> Outcome<Vec<HealthItem>> {
        let all_answered = |answers: &[NodeReply]| {
            let answered = |id: &NodeId| {
                answers
                    .iter()
                    .any(|a| matches!(a, NodeReply::Health(h) if h.node == *id))
            };
            !expected.is_empty() && expected.iter().all(answered)
        };
        let wait = NODES_WAIT.min(self.timeout);
        let answers = rpc::request_all(&self.bus, subject::NODES_RPC, &NodeRequest::Health, wait, all_answered).await?;
        let mut items = Vec::new();
        for answer in answers {
            let NodeReply::Health(health) = answer else { continue };
            if health.omitted > 0 {
                items.push(HealthItem::new(
                    "MORE",
                    false,
                    format!("node {} has {} more things to tell", health.node, health.omitted),
                    format!("hearth image list --node {}", health.node),
                ));
            }
            items.extend(health.items);
        }
        Ok(items)
    }

    /// One image's heat.
    ///
    /// # Errors
    /// As [`Cluster::scheduler`].
    pub async fn heat(&self, image: ImageId) -> Outcome<ImageHeatView> {
        match self.scheduler(&SchedulerRequest::ImageHeat { image }).await? {
            SchedulerReply::ImageHeat(heat) => Ok(heat),
            other => Err(unexpected("the scheduler", &other)),
        }
    }

    /// The images of one node, as the node knows them.
    ///
    /// # Errors
    /// As [`Cluster::node`].
    pub async fn images_of(&self, node: &NodeId) -> Outcome<Vec<ImageInfo>> {
        match self.node(node, &NodeRequest::ImageList).await? {
            NodeReply::Images { images } => Ok(images),
            other => Err(unexpected(&format!("node {node}"), &other)),
        }
    }

    /// The node for something new: the one named, or the only one.
    ///
    /// # Errors
    /// Exit code 2 where there are several, 3 where there is none.
    pub async fn some_node(&self, named: Option<NodeId>) -> Outcome<NodeId> {
        if let Some(node) = named {
            return Ok(node);
        }
        let view = self
            .view()
            .await
            .map_err(|f| Failure::new(f.kind, f.message, format!("{}; or name the node with --node", f.hint)))?;
        let present: Vec<_> = view.nodes.iter().filter(|n| n.present).map(|n| &n.id).collect();
        match present.as_slice() {
            [one] => Ok((*one).clone()),
            [] => Err(Failure::new(
                FailureKind::NotFound,
                "no node is present",
                "start hearth-node on a machine; `hearth node list` shows who was there",
            )),
            several => {
                let names: Vec<_> = several.iter().map(|n| n.as_str()).collect();
                Err(Failure::new(
                    FailureKind::Usage,
                    format!("there are {} nodes, and none was named", names.len()),
                    format!("name one with --node: {}", names.join(", ")),
                ))
            }
        }
    }

    /// The node that holds an image.
    ///
    /// # Errors
    /// As [`Cluster::nodes_of`].
    pub async fn node_of(&self, image: &ImageName, named: Option<NodeId>) -> Outcome<NodeId> {
        let mut nodes = self.nodes_of(std::slice::from_ref(image), named).await?;
        nodes.pop().ok_or_else(|| no_image(image))
    }

    /// The node of each image: the one named, the one the scheduler knows, or the one that says so itself (the
    /// scheduler learns of a new image a moment after its node).
    ///
    /// # Errors
    /// Exit code 3 if nobody has one of them.
    pub async fn nodes_of(&self, images: &[ImageName], named: Option<NodeId>) -> Outcome<Vec<NodeId>> {
        if let Some(node) = named {
            return Ok(vec![node; images.len()]);
        }
        let view = self
            .view()
            .await
            .map_err(|f| Failure::new(f.kind, f.message, format!("{}; or name the node with --node", f.hint)))?;
        let mut known: HashMap<ImageName, NodeId> = view.images.into_iter().map(|i| (i.name, i.node)).collect();
        if !images.iter().all(|image| known.contains_key(image)) {
            for node in view.nodes.iter().filter(|n| n.present) {
                let has = self.images_of(&node.id).await.unwrap_or_default();
                known.extend(has.into_iter().map(|i| (i.name, node.id.clone())));
            }
        }
        let node = |image| known.get(image).cloned().ok_or_else(|| no_image(image));
        images.iter().map(node).collect()
    }

    /// An image as its node knows it.
    ///
    /// # Errors
    /// Exit code 3 if the node does not have it.
    pub async fn image_info(&self, image: &ImageName, named: Option<NodeId>) -> Outcome<ImageInfo> {
        let node = self.node_of(image, named).await?;
        self.images_of(&node)
            .await?
            .into_iter()
            .find(|i| &i.name == image)
            .ok_or_else(|| no_image(image))
    }
}

/// Nobody has it.
pub fn no_image(image: &ImageName) -> Failure {
    Failure::new(
        FailureKind::NotFound,
        format!("there is no image {image}"),
        "`hearth image list` shows all images",
    )
}

/// An answer that does not fit the question.
pub fn unexpected(who: &str, answer: &impl std::fmt::Debug) -> Failure {
    let answer: String = format!("{answer:?}").chars().take(120).collect();
    Failure::new(
        FailureKind::Failed,
        format!("{who} answered something else than was asked: {answer}"),
        "use the same version of Hearth on both sides",
    )
}
