//! Requests and answers between the `hearth` command, the nodes and the leading scheduler: JSON over NATS
//! request/reply. Administration only: no I/O of a guest ever passes here.

use serde::{Deserialize, Serialize};

use crate::event::CopiesChecked;
use crate::heat::LatencySummary;
use crate::ids::{ImageId, ImageName, LayerId, NodeId, SnapshotName};
use crate::policy::TierPolicy;
use crate::record::{Record, Run, Stamp};
use crate::units::{BlockIndex, ByteLen, Epoch, Seq, WallMs};
use crate::view::{ClusterView, HealthItem, ImageHeatView, StopView};

/// What kind of failure, as the exit code that scripts rely on (FIELD "CLI").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Exit 1: it did not work.
    Failed,
    /// Exit 2: the request makes no sense.
    Usage,
    /// Exit 3: no such image, node, job.
    NotFound,
    /// Exit 4: this node or build cannot do it.
    NotSupported,
    /// Exit 5: it could lose data or hurt a guest.
    Refused,
    /// Exit 6: the name is taken, or someone else changed it first.
    Conflict,
    /// Exit 7: not finished yet.
    Running,
    /// Exit 20: no connection.
    CannotConnect,
    /// Exit 21: no answer in time.
    Timeout,
}

impl FailureKind {
    /// The process exit code.
    pub const fn exit_code(self) -> u8 {
        match self {
            FailureKind::Failed => 1,
            FailureKind::Usage => 2,
            FailureKind::NotFound => 3,
            FailureKind::NotSupported => 4,
            FailureKind::Refused => 5,
            FailureKind::Conflict => 6,
            FailureKind::Running => 7,
            FailureKind::CannotConnect => 20,
            FailureKind::Timeout => 21,
        }
    }
}

/// A failure that tells the user what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Which kind.
    pub kind: FailureKind,
    /// What was attempted, on what, and why it failed.
    pub message: String,
    /// What to do next, often a command line; may be empty.
    pub hint: String,
}

impl Failure {
    /// A failure with its hint.
    pub fn new(kind: FailureKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: hint.into(),
        }
    }
}

/// How an image is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportKind {
    /// NBD on the node's unix socket only.
    Socket,
    /// NBD and a kernel block device under `/dev/hearth/<project>/<image>`.
    Device,
}

/// As what a node is to serve an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachHow {
    /// Its owner; refused while another node is.
    #[default]
    Plain,
    /// Its owner, also if the log says that another node is: that one is fenced off.
    Takeover,
    /// Its owner from this node's copy, though newer ones may be elsewhere: what was written since is given up. Refused while
    /// [`AttachHow::Takeover`] would do, or a newer copy answers.
    AcceptDataLoss,
    /// The destination of a live migration: another node owns it until that hands it over.
    Incoming,
}

/// A request with the operator's words for it, which go into the log with every event that it causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked<R> {
    /// The request.
    #[serde(flatten)]
    pub request: R,
    /// Why, at most [`crate::limits::REASON_BYTES_MAX`]; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// Format of a disk image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageFormat {
    /// The disk's bytes, sparse.
    Raw,
    /// QEMU's own, version 3.
    Qcow2,
}

impl ImageFormat {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

/// How fast a replica is copied to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// So that the image's guest does not feel it, and within what a link may carry for moves.
    #[default]
    Gentle,
    /// So many bytes per second.
    AtMost(ByteLen),
    /// As fast as it can.
    Full,
}

/// Requests to one node, on `hearth.rpc.node.<id>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum NodeRequest {
    /// Creates an empty image.
    ImageCreate {
        /// Its name.
        name: ImageName,
        /// Its size; a multiple of 4,096.
        size: ByteLen,
        /// Its block size; a power of two, 4 KiB to 4 MiB.
        block_size: ByteLen,
        /// Nodes that hold it, this one among them; the scheduler chooses the others.
        #[serde(default = "one")]
        replicas: u64,
    },
    /// Creates an image from a raw file on the node; answers at once with a job.
    ImageImport {
        /// Its name.
        name: ImageName,
        /// Absolute path on the node.
        path: String,
        /// Its block size.
        block_size: ByteLen,
    },
    /// Creates an image on top of a snapshot; takes no space.
    ImageClone {
        /// The parent.
        source: ImageName,
        /// Its snapshot.
        snapshot: SnapshotName,
        /// The clone's name.
        name: ImageName,
    },
    /// Seals the top layer under a name and puts an empty one on top.
    ImageSnapshot {
        /// Which image.
        image: ImageName,
        /// The snapshot's name.
        name: SnapshotName,
    },
    /// Deletes an image that is not attached and has no clones.
    ImageDelete {
        /// Which image.
        image: ImageName,
    },
    /// Starts serving an image.
    ImageAttach {
        /// Which image.
        image: ImageName,
        /// How.
        export: ExportKind,
        /// As what.
        #[serde(default)]
        how: AttachHow,
    },
    /// Hands an image over to the node that attached it as incoming, asked of its owner.
    ImageHandOver {
        /// Which image.
        image: ImageName,
        /// The destination.
        to: NodeId,
    },
    /// Adds a node to those that hold an image, asked of its owner; answers at once with a job.
    LocationAdd {
        /// Which image.
        image: ImageName,
        /// The node.
        node: NodeId,
        /// First and last block; `None` for all.
        #[serde(default)]
        blocks: Option<(BlockIndex, BlockIndex)>,
        /// How fast.
        #[serde(default)]
        pace: Pace,
    },
    /// Compares the copies of blocks while the guest goes on, asked of the image's owner; answers at once with a job.
    ImageScrub {
        /// Which image.
        image: ImageName,
        /// First and last block; `None` for all.
        #[serde(default)]
        blocks: Option<(BlockIndex, BlockIndex)>,
        /// Writes blocks that differ anew, from the copy that the guest reads.
        repair: bool,
        /// Bytes of the image a second, at most.
        rate: ByteLen,
    },
    /// Writes the copies of blocks anew from the one that the guest reads, asked of the owner; answers at once with a job.
    ImageSync {
        /// Which image.
        image: ImageName,
        /// First and last block; `None` for all.
        #[serde(default)]
        blocks: Option<(BlockIndex, BlockIndex)>,
        /// Only this node's copy; `None` for all but the one that is read.
        #[serde(default)]
        node: Option<NodeId>,
        /// Bytes of the image a second, at most.
        rate: ByteLen,
    },
    /// Sets how many replicas an image is to have, asked of a node that holds it.
    ImageSet {
        /// Which image.
        image: ImageName,
        /// How many.
        replicas: u64,
    },
    /// Takes a node's copy of an image away, asked of its owner.
    LocationRemove {
        /// Which image.
        image: ImageName,
        /// The node.
        node: NodeId,
    },
    /// One node asks another to make an empty replica.
    ReplicaPrepare(ReplicaSpec),
    /// One node asks another to give up a replica of an image that did not come to be.
    ReplicaForget {
        /// Which image.
        image: ImageId,
    },
    /// Stops serving it.
    ImageDetach {
        /// Which image.
        image: ImageName,
    },
    /// Makes an image larger. Takes a layer of its stack.
    ImageResize {
        /// Which image.
        image: ImageName,
        /// The new size.
        size: ByteLen,
    },
    /// Copies an image into a file on the node, as a job.
    ImageExport {
        /// Which image.
        image: ImageName,
        /// As of this snapshot; without, the image itself, which must not be attached then.
        snapshot: Option<SnapshotName>,
        /// The file, an absolute path on the node.
        path: String,
        /// Its format.
        format: ImageFormat,
        /// Replaces a file of that name.
        replace: bool,
    },
    /// Brings into this node's RAM what its owner has in RAM, as a job: before a hand-over.
    ImagePrewarm {
        /// Which image.
        image: ImageName,
    },
    /// Where the image's blocks are: runs of (layer, tier).
    ImageMap {
        /// Which image.
        image: ImageName,
    },
    /// The images this node holds.
    ImageList,
    /// Progress of a job.
    JobShow {
        /// Its id, from [`NodeReply::Job`].
        job: u64,
    },
    /// The jobs of this node: those that run, and the last ones that ended.
    JobList,
    /// Has a job stand still, or go on.
    JobPause {
        /// Its id.
        job: u64,
        /// Whether it is to stand still.
        paused: bool,
    },
    /// Stops a job; what it made so far is removed.
    JobCancel {
        /// Its id.
        job: u64,
    },
    /// What the node is.
    NodeShow,
    /// What is wrong on the node, as it knows by itself. Also asked of all nodes at once
    /// ([`crate::subject::NODES_RPC`]).
    Health,
}

const fn one() -> u64 {
    1
}

/// What a replica is made from: the same on every node that holds one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaSpec {
    /// The image.
    pub image: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Its size.
    pub size: ByteLen,
    /// Its block size.
    pub block_size: ByteLen,
    /// Its only layer.
    pub layer: LayerId,
    /// The first record, for a new image; a node that joins later gets one when it is in the set.
    pub record: Option<Record>,
}

/// Answers of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum NodeReply {
    /// Done; the log position of the event that says so, where there is one.
    Done {
        /// The log position.
        seq: Option<Seq>,
    },
    /// The image as it is now.
    Image(ImageInfo),
    /// All images.
    Images {
        /// Ascending by name.
        images: Vec<ImageInfo>,
    },
    /// Started; ask again with [`NodeRequest::JobShow`].
    Job(JobInfo),
    /// The node's jobs.
    Jobs {
        /// Ascending by id.
        jobs: Vec<JobInfo>,
    },
    /// The image's map.
    Map {
        /// Runs in ascending order that cover the whole image.
        runs: Vec<MapRun>,
    },
    /// The node.
    Node(NodeInfo),
    /// What is wrong on it.
    Health(NodeHealth),
}

/// One image on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Its size.
    pub size: ByteLen,
    /// Its block size.
    pub block_size: ByteLen,
    /// Bytes allocated in its own top layer.
    pub allocated: ByteLen,
    /// The stack, top first.
    pub layers: Vec<LayerId>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<SnapshotName>,
    /// Parent of a clone.
    pub parent: Option<String>,
    /// The node.
    pub node: NodeId,
    /// The nodes that hold it, if it has replicas, as this node's record says: runs of the location map.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locations: Vec<Run>,
    /// The record that these are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Stamp>,
    /// How it is served, if it is.
    pub attached: Option<AttachInfo>,
    /// What is wrong with it and what to do, in words; absent while all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// How an image is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachInfo {
    /// The epoch.
    pub epoch: Epoch,
    /// The NBD unix socket.
    pub socket: String,
    /// The NBD export name on it.
    pub export: String,
    /// The kernel block device, if asked for.
    pub device: Option<String>,
    /// Another node owns it still, and is to hand it over.
    #[serde(default)]
    pub incoming: bool,
    /// Whether guests on the device survive a restart of the daemon.
    pub device_survives_restart: bool,
    /// Read latency since attach, as the guest felt it.
    pub read_latency: LatencySummary,
}

/// One run of an image's map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRun {
    /// First block.
    pub first: BlockIndex,
    /// How many.
    pub count: u64,
    /// The layer that holds them; `None` for a hole.
    pub layer: Option<LayerId>,
    /// `ram`, `disk`, `remote` or `hole`.
    pub tier: String,
}

/// What a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// An image comes from a file.
    Import,
    /// An image goes into a file.
    Export,
    /// A node comes to hold an image.
    Join,
    /// Blocks are brought into RAM.
    Prewarm,
    /// Copies are compared.
    Scrub,
    /// Copies are written anew.
    Sync,
}

impl JobKind {
    /// The word users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            JobKind::Import => "import",
            JobKind::Export => "export",
            JobKind::Join => "join",
            JobKind::Prewarm => "prewarm",
            JobKind::Scrub => "scrub",
            JobKind::Sync => "sync",
        }
    }
}

/// A long operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its id on this node.
    pub id: u64,
    /// What it is.
    pub kind: JobKind,
    /// The image that it is about.
    pub image: ImageName,
    /// When it began.
    pub began: WallMs,
    /// Whether it stands still until it is resumed.
    #[serde(default)]
    pub paused: bool,
    /// What a comparison of copies found so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<CopiesChecked>,
    /// What it does, for people.
    pub what: String,
    /// Bytes done.
    pub done: ByteLen,
    /// Bytes in all.
    pub total: ByteLen,
    /// `None` while it runs; then the failure or nothing.
    pub ended: Option<Result<(), Failure>>,
}

/// What a node finds wrong on itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHealth {
    /// The node.
    pub node: NodeId,
    /// What is wrong, errors first; [`crate::limits::NODE_HEALTH_MAX`] at most.
    pub items: Vec<HealthItem>,
    /// How many more there are.
    pub omitted: u64,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its id.
    pub id: NodeId,
    /// Its NBD unix socket.
    pub socket: String,
    /// Where peers reach it.
    pub peer_address: String,
    /// Directory of its store.
    pub store: String,
    /// RAM tier size.
    pub ram: ByteLen,
    /// Bytes of it in use.
    pub ram_used: ByteLen,
    /// `ebpf` or `export`.
    pub heat_source: String,
    /// Why not `ebpf`, if so.
    pub heat_source_why: String,
    /// Version of the daemon.
    pub version: String,
}

/// Requests to the leading scheduler, on `hearth.rpc.scheduler`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum SchedulerRequest {
    /// The cluster as the log says it is.
    View,
    /// Heat and tiers of one image.
    ImageHeat {
        /// Which image.
        image: ImageId,
    },
    /// Where the replicas of a new image go.
    Place {
        /// The node that holds it in any case.
        near: NodeId,
        /// How many nodes in all.
        replicas: u64,
    },
    /// What would happen if a node stopped.
    OkToStop {
        /// The node.
        node: NodeId,
    },
    /// Has a node drained, or no longer.
    NodeDrain {
        /// The node.
        node: NodeId,
        /// Whether it is to drain.
        draining: bool,
        /// The operator's words.
        reason: String,
    },
    /// Says in which fault domain a node is.
    NodeSet {
        /// The node.
        node: NodeId,
        /// The fault domain; empty for what the node's own configuration says.
        fault_domain: String,
        /// The operator's words.
        reason: String,
    },
    /// Replaces the tier policy.
    PolicySet {
        /// The new policy.
        policy: TierPolicy,
        /// The operator's words.
        reason: String,
    },
    /// Writes down in the log that an operator put back what the stream had lost.
    LogRecovered {
        /// The first and last position put back.
        positions: (Seq, Seq),
        /// The operator's words.
        reason: String,
    },
    /// Writes down in the log that an operator accepted the loss of a former history's end.
    LossAccepted {
        /// The first position lost, and the last one known.
        positions: (Seq, Seq),
        /// The chain value of the former history at its last position.
        #[serde(with = "serde_bytes")]
        chain: [u8; 32],
        /// The operator's words.
        reason: String,
    },
}

/// Answers of the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum SchedulerReply {
    /// See [`SchedulerRequest::View`].
    View(Box<ClusterView>),
    /// See [`SchedulerRequest::ImageHeat`].
    ImageHeat(ImageHeatView),
    /// See [`SchedulerRequest::Place`].
    Placed {
        /// The nodes, the one that was named first.
        nodes: Vec<NodeId>,
    },
    /// See [`SchedulerRequest::OkToStop`].
    Stop(StopView),
    /// The log position of the change.
    Done {
        /// The log position.
        seq: Seq,
    },
}

/// Every answer on the wire.
pub type Answer<T> = Result<T, Failure>;
