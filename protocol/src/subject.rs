//! NATS subjects and stream names. Subjects carry ids, never names.

use crate::ids::{ImageId, LayerId, NodeId, Publisher, SchedulerId};

/// The stream of the one total order.
pub const LOG_STREAM: &str = "HEARTH";
/// Subjects of [`LOG_STREAM`].
pub const LOG_ALL: &str = "hearth.log.>";
/// The bounded stream of heat reports (`discard: old`).
pub const HEAT_STREAM: &str = "HEARTH_HEAT";
/// Subjects of [`HEAT_STREAM`].
pub const HEAT_ALL: &str = "hearth.heat.*";
/// Terms and ticks of all schedulers: the subject filter on which leadership is compared and published.
pub const LEAD_ALL: &str = "hearth.log.scheduler.*.lead";
/// Policies and digests recorded by all schedulers.
pub const RECORD_ALL: &str = "hearth.log.scheduler.*.record";
/// Where the leading scheduler answers requests ([`crate::rpc::SchedulerRequest`]).
pub const SCHEDULER_RPC: &str = "hearth.rpc.scheduler";

/// Where every node answers [`crate::rpc::NodeRequest::Health`].
pub const NODES_RPC: &str = "hearth.rpc.nodes";

/// An image's own history, as published by `publisher`.
pub fn image(id: ImageId, publisher: &Publisher) -> String {
    format!("hearth.log.image.{id}.{}", publisher.token())
}

/// The image whose history a subject belongs to, if it belongs to one's.
pub fn image_of(subject: &str) -> Option<ImageId> {
    let (image, _) = subject.strip_prefix("hearth.log.image.")?.split_once('.')?;
    image.parse().ok()
}

/// All publishers' events of one image: the filter of its compare-and-publish.
pub fn image_all(id: ImageId) -> String {
    format!("hearth.log.image.{id}.*")
}

/// A sealed layer's own history.
pub fn layer(id: LayerId, publisher: &Publisher) -> String {
    format!("hearth.log.layer.{id}.{}", publisher.token())
}

/// All publishers' events of one layer.
pub fn layer_all(id: LayerId) -> String {
    format!("hearth.log.layer.{id}.*")
}

/// Facts about a node, published by that node only.
pub fn node(id: &NodeId) -> String {
    format!("hearth.log.node.{id}")
}

/// Terms and ticks of one scheduler. A token of its own, so that nodes can follow the term without the heat.
pub fn lead(id: &SchedulerId) -> String {
    format!("hearth.log.scheduler.{id}.lead")
}

/// Heat folded into the log by one scheduler.
pub fn folded_heat(id: &SchedulerId) -> String {
    format!("hearth.log.scheduler.{id}.heat")
}

/// Policies and digests recorded by one scheduler.
pub fn record(id: &SchedulerId) -> String {
    format!("hearth.log.scheduler.{id}.record")
}

/// Orders to one node.
pub fn command(id: &NodeId) -> String {
    format!("hearth.log.command.{id}")
}

/// Heat reports of one node, outside the log.
pub fn heat(id: &NodeId) -> String {
    format!("hearth.heat.{id}")
}

/// Where a node answers requests ([`crate::rpc::NodeRequest`]).
pub fn node_rpc(id: &NodeId) -> String {
    format!("hearth.rpc.node.{id}")
}

/// What one node reads of the log through its ordered consumer: terms and ticks, recorded digests (whose chain values it
/// witnesses), all images, layers and nodes (their addresses), and its commands.
pub fn node_filters(id: &NodeId) -> Vec<String> {
    vec![
        LEAD_ALL.into(),
        RECORD_ALL.into(),
        "hearth.log.image.>".into(),
        "hearth.log.layer.>".into(),
        "hearth.log.node.*".into(),
        command(id),
    ]
}
