//! Facts in the log. Past tense, except [`Event::CommandGiven`], which records that an order was given.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::aggregate::Change;
use crate::command::{Command, Outcome};
use crate::heat::{DiskUse, ImageHeat, TierUse};
use crate::ids::{CommandId, ImageId, ImageName, Incarnation, LayerId, LeaseId, NodeId, SnapshotName};
use crate::policy::TierPolicy;
use crate::record::Nodes;
use crate::units::{BlockIndex, ByteLen, Epoch, Seq, SetVersion, Term, TickNo, WallMs};

/// Everything that can stand in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    // -- image.<id>: by the owner node ------------------------------------------------------------------------
    /// An image came to be. Void if its name is taken at this point of the stream.
    ImageCreated(ImageCreated),
    /// An image is served on a node; a new epoch and lease.
    ImageAttached(ImageAttached),
    /// It is no longer served.
    ImageDetached {
        /// Which image.
        image: ImageId,
        /// The epoch that ended.
        epoch: Epoch,
    },
    /// The top layer was sealed under a name, and an empty one put on top.
    SnapshotTaken {
        /// Which image.
        image: ImageId,
        /// The snapshot's name.
        name: SnapshotName,
        /// The layer that takes no more writes.
        sealed: LayerId,
        /// The new top layer.
        top: LayerId,
    },
    /// A snapshot's name is gone; its layer stays while an image stands on it.
    SnapshotDeleted {
        /// Which image.
        image: ImageId,
        /// The snapshot's name.
        name: SnapshotName,
    },
    /// An image became larger; an empty layer of the new size was put on top.
    ImageResized {
        /// Which image.
        image: ImageId,
        /// The new size.
        size: ByteLen,
        /// The layer that takes no more writes.
        sealed: LayerId,
        /// The new top layer.
        top: LayerId,
    },
    /// The record of an image with replicas changed: another epoch, or other nodes that hold it. Void unless it replaces
    /// the last one.
    LocationsChanged {
        /// Which image.
        image: ImageId,
        /// Who changes what.
        change: Change,
    },
    /// An image with replicas is to have another number of them.
    ReplicasSet {
        /// Which image.
        image: ImageId,
        /// How many, 1 to [`crate::limits::REPLICAS_MAX`].
        wanted: u64,
    },
    /// The copies of an image with replicas were compared, or written anew from one of them.
    CopiesChecked(CopiesChecked),
    /// An image was copied into a file.
    ImageExported {
        /// Which image.
        image: ImageId,
        /// As of which snapshot; `None` for the image itself, while it was not attached.
        snapshot: Option<SnapshotName>,
        /// The file on the node.
        path: String,
        /// `raw` or `qcow2`.
        format: String,
        /// Bytes that the file takes up.
        allocated: ByteLen,
    },
    /// An image is gone.
    ImageDeleted {
        /// Which image.
        image: ImageId,
    },

    // -- layer.<id> -------------------------------------------------------------------------------------------
    /// A layer takes no more writes; from now on every copy of its blocks stays valid.
    LayerSealed {
        /// Which layer.
        layer: LayerId,
        /// The node that holds it.
        node: NodeId,
        /// Bytes allocated in it.
        allocated: ByteLen,
    },
    /// A node no longer holds the layer.
    LayerDropped {
        /// Which layer.
        layer: LayerId,
        /// The node.
        node: NodeId,
    },

    // -- node.<id>: by that node ------------------------------------------------------------------------------
    /// A node daemon started.
    NodeJoined(NodeJoined),
    /// A node daemon stopped in order.
    NodeLeft {
        /// Which node.
        node: NodeId,
    },
    /// A command ended.
    CommandFinished {
        /// Which command.
        command: CommandId,
        /// The node that executed it.
        node: NodeId,
        /// How.
        outcome: Outcome,
    },

    // -- scheduler.<id>.lead ----------------------------------------------------------------------------------
    /// A scheduler won a term.
    TermStarted {
        /// The term, one more than the highest before it.
        term: Term,
        /// Its previous incarnation and the last seq it is sure of, so that a lost tail is known.
        previous: Option<(Incarnation, Seq)>,
    },
    /// The one-second tick; `decide` runs after it.
    Ticked {
        /// Under which term.
        term: Term,
        /// Which tick.
        tick: TickNo,
        /// The leader's wall clock: the only time that state and decisions know.
        time: WallMs,
    },

    // -- scheduler.<id>.heat ----------------------------------------------------------------------------------
    /// One node's heat report, as the leader folded it in.
    HeatFolded(HeatFolded),

    // -- scheduler.<id>.record --------------------------------------------------------------------------------
    /// The tier policy changed.
    PolicySet {
        /// Under which term.
        term: Term,
        /// Grows by one with each change.
        version: u64,
        /// The policy.
        policy: TierPolicy,
        /// The operator's words, if any.
        reason: String,
    },
    /// An operator has a node drained, or no longer: a draining node gets nothing new, and what can leave it leaves. Void
    /// for a node that never joined.
    NodeDrainSet {
        /// Under which term.
        term: Term,
        /// Which node.
        node: NodeId,
        /// Whether it drains from now on; what it did already changes nothing.
        draining: bool,
        /// The operator's words, if any.
        reason: String,
    },
    /// An operator said in which fault domain a node is; that counts instead of what the node says when it joins. Void for
    /// a node that never joined, and for a name outside the limits.
    FaultDomainSet {
        /// Under which term.
        term: Term,
        /// Which node.
        node: NodeId,
        /// The fault domain; empty for what the node says.
        fault_domain: String,
        /// The operator's words, if any.
        reason: String,
    },
    /// The digest of the state and of all decisions after `at`, for replicas and auditors to compare.
    DigestRecorded {
        /// Under which term.
        term: Term,
        /// The log position the digest covers.
        at: Seq,
        /// blake3 of the canonical state.
        #[serde(with = "serde_bytes")]
        state: [u8; 32],
        /// blake3 chain of the decisions.
        #[serde(with = "serde_bytes")]
        decisions: [u8; 32],
        /// The log's chain value at `at`, for whoever reads the stream to witness; `None` from leaders before it.
        #[serde(default, skip_serializing_if = "Option::is_none", with = "serde_bytes")]
        chain: Option<[u8; 32]>,
    },
    /// An operator put back what the stream had lost, from a scheduler's log.
    LogRecovered {
        /// Under which term.
        term: Term,
        /// The first and last position put back.
        positions: (Seq, Seq),
        /// The operator's words.
        reason: String,
    },

    /// An operator accepted that the stream, rolled back, went on with other messages: what a former history held at
    /// these positions counts no more. Whoever read that history reads this one from its beginning.
    LossAccepted {
        /// Under which term.
        term: Term,
        /// The first position at which the histories differ, and the last that is known of the former one.
        positions: (Seq, Seq),
        /// The chain value of the former history at its last position.
        #[serde(with = "serde_bytes")]
        chain: [u8; 32],
        /// The operator's words.
        reason: String,
    },

    // -- command.<node> ---------------------------------------------------------------------------------------
    /// An order was given.
    CommandGiven(Command),
}

/// See [`Event::ImageCreated`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageCreated {
    /// Its id.
    pub image: ImageId,
    /// Its name, unique in the cluster.
    pub name: ImageName,
    /// Size as the guest sees it.
    pub size: ByteLen,
    /// Block size in bytes.
    pub block_size: ByteLen,
    /// The layer stack, top first. For a clone the rest are its parent's sealed layers.
    pub layers: Vec<LayerId>,
    /// Where a clone came from.
    pub parent: Option<(ImageId, SnapshotName)>,
    /// The node that holds the top layer: the location map's one run, one member.
    pub node: NodeId,
    /// Version of the location map.
    pub set_version: SetVersion,
    /// Of an image with replicas: the nodes that hold them, all empty and in sync. Its record is changed by
    /// [`Event::LocationsChanged`] alone. Empty for an image that only `node` holds.
    #[serde(default, skip_serializing_if = "Nodes::is_empty")]
    pub members: Nodes,
}

/// What was done about copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckHow {
    /// They were compared, and a difference was left as it is.
    Compare,
    /// They were compared, and blocks that differ were written anew.
    Repair,
    /// All blocks were written anew, without a look at them first.
    Rewrite,
}

/// See [`Event::CopiesChecked`]: what was found and done, also if it ended before all blocks were reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiesChecked {
    /// Which image.
    pub image: ImageId,
    /// What was done.
    pub how: CheckHow,
    /// The first block.
    pub first: BlockIndex,
    /// How many blocks from there on were reached.
    pub blocks: u64,
    /// Blocks that not all copies held the same bytes of; of [`CheckHow::Rewrite`] none.
    pub differing: u64,
    /// Blocks that were written anew, and are durably the same everywhere.
    pub repaired: u64,
    /// Of each node, how many of its blocks differed from the copy that counts, or could not be read.
    pub copies: BTreeMap<NodeId, u64>,
    /// The first blocks that differed, at most [`crate::limits::DIFFERENCES_NAMED_MAX`].
    pub named: Vec<BlockIndex>,
}

/// See [`Event::ImageAttached`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAttached {
    /// Which image.
    pub image: ImageId,
    /// The owner.
    pub node: NodeId,
    /// Fencing number, one more than the last.
    pub epoch: Epoch,
    /// The lease.
    pub lease: LeaseId,
    /// Version of the location map.
    pub set_version: SetVersion,
    /// Whether reads and writes are seen by the probes (a kernel device) or counted by the export (a socket).
    pub device: bool,
}

/// See [`Event::NodeJoined`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeJoined {
    /// Which node.
    pub node: NodeId,
    /// Its process start.
    pub incarnation: Incarnation,
    /// Kernel boot id and mount id of its store, hashed.
    pub storage_incarnation: Incarnation,
    /// Its previous process start and that one's last durable publisher seq, so that a lost tail is known.
    pub previous: Option<(Incarnation, u64)>,
    /// RAM tier size.
    pub ram: ByteLen,
    /// Bytes of it that the scheduler's main region may use.
    pub main: ByteLen,
    /// Fault domain, such as a rack.
    pub fault_domain: String,
    /// Where peers reach its NBD export: `unix:/path` or `tcp:127.0.0.1:port`.
    pub peer_address: String,
    /// Sealed layers it holds, ascending.
    pub layers: Vec<LayerId>,
    /// `ebpf` or `export`.
    pub heat_source: String,
}

/// See [`Event::HeatFolded`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatFolded {
    /// Under which term.
    pub term: Term,
    /// Who reported.
    pub node: NodeId,
    /// The node's process start.
    pub incarnation: Incarnation,
    /// Reports folded: first and last report seq.
    pub reports: (u64, u64),
    /// Reports that never arrived between the last fold and this one.
    pub gap: u64,
    /// The node's wall clock at the end of the window.
    pub time: WallMs,
    /// Heat by image.
    pub images: Vec<ImageHeat>,
    /// The RAM tier.
    pub tier: TierUse,
    /// Physical disks.
    pub disks: Vec<DiskUse>,
    /// Records the probes saw since the node daemon started.
    pub probe_events_total: u64,
    /// Records the probes lost since the node daemon started.
    pub probe_lost_total: u64,
    /// Main-region copies that left RAM without an order.
    pub dropped: Vec<(LayerId, Vec<BlockIndex>)>,
}

impl Event {
    /// The word users see and filter by.
    pub fn kind(&self) -> &'static str {
        match self {
            Event::ImageCreated(_) => "image_created",
            Event::ImageAttached(_) => "image_attached",
            Event::ImageDetached { .. } => "image_detached",
            Event::SnapshotTaken { .. } => "snapshot_taken",
            Event::SnapshotDeleted { .. } => "snapshot_deleted",
            Event::ImageResized { .. } => "image_resized",
            Event::LocationsChanged { .. } => "locations_changed",
            Event::ReplicasSet { .. } => "replicas_set",
            Event::CopiesChecked(_) => "copies_checked",
            Event::ImageExported { .. } => "image_exported",
            Event::ImageDeleted { .. } => "image_deleted",
            Event::LayerSealed { .. } => "layer_sealed",
            Event::LayerDropped { .. } => "layer_dropped",
            Event::NodeJoined(_) => "node_joined",
            Event::NodeLeft { .. } => "node_left",
            Event::CommandFinished { .. } => "command_finished",
            Event::TermStarted { .. } => "term_started",
            Event::Ticked { .. } => "ticked",
            Event::HeatFolded(_) => "heat_folded",
            Event::PolicySet { .. } => "policy_set",
            Event::NodeDrainSet { .. } => "node_drain_set",
            Event::FaultDomainSet { .. } => "fault_domain_set",
            Event::DigestRecorded { .. } => "digest_recorded",
            Event::LogRecovered { .. } => "log_recovered",
            Event::LossAccepted { .. } => "loss_accepted",
            Event::CommandGiven(_) => "command_given",
        }
    }

    /// The term under which a scheduler published it; `None` for nodes' events.
    pub fn term(&self) -> Option<Term> {
        match self {
            Event::TermStarted { term, .. }
            | Event::Ticked { term, .. }
            | Event::PolicySet { term, .. }
            | Event::NodeDrainSet { term, .. }
            | Event::FaultDomainSet { term, .. }
            | Event::DigestRecorded { term, .. }
            | Event::LogRecovered { term, .. }
            | Event::LossAccepted { term, .. } => Some(*term),
            Event::HeatFolded(heat) => Some(heat.term),
            Event::CommandGiven(command) => Some(command.term),
            _ => None,
        }
    }
}
