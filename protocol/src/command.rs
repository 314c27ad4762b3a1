//! Orders to nodes. A command leaves no choice to the node, and carries its reason.

use serde::{Deserialize, Serialize};

use crate::ids::{CommandId, ImageId, LayerId, NodeId};
use crate::record::Extent;
use crate::units::{BlockIndex, ByteLen, Epoch, HeatScore, Seq, SetVersion, Term, TickNo};

/// One order to one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Repeating an id gets the same answer and no second execution.
    pub id: CommandId,
    /// The node that executes it.
    pub node: NodeId,
    /// Leadership under which it was given; void if a higher term precedes it.
    pub term: Term,
    /// The tick that decided it.
    pub tick: TickNo,
    /// The tick after which an unanswered command counts as expired; a node refuses it once it has seen that tick.
    pub expires: TickNo,
    /// What to do.
    pub order: Order,
    /// Why.
    pub reason: Reason,
}

/// What to do. The closing event of every order is [`crate::Event::CommandFinished`] with the command's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Copy blocks of a layer into the main region of the RAM tier.
    Promote {
        /// The layer.
        layer: LayerId,
        /// Its epoch when decided; a growing layer under another epoch refuses.
        epoch: Epoch,
        /// Location map version when decided.
        set_version: SetVersion,
        /// The node to read from; the executing node itself when it holds the layer.
        from: NodeId,
        /// The blocks, hottest first, at most [`crate::limits::BLOCKS_PER_COMMAND_MAX`].
        blocks: Vec<Promotion>,
        /// Bytes to be read, at most.
        bytes: ByteLen,
    },
    /// Drop blocks of a layer from the main region.
    Demote {
        /// The layer.
        layer: LayerId,
        /// The blocks, coldest first.
        blocks: Vec<Demotion>,
        /// Bytes that become free.
        bytes: ByteLen,
    },
    /// Begin to give another node a replica of an image. It goes to the image's owner, and is done once the owner has
    /// begun: the joiner then stands in the image's record, and in the end as a member.
    Replicate {
        /// The image's top layer when decided.
        layer: LayerId,
        /// Which image.
        image: ImageId,
        /// Its epoch when decided; an owner under another epoch refuses.
        epoch: Epoch,
        /// Location map version that the decision saw.
        set_version: SetVersion,
        /// The node that is to get the replica; a member of none of the blocks.
        to: NodeId,
        /// Which blocks; `None` for all of the image.
        blocks: Option<Extent>,
        /// Bytes to be copied, at most.
        bytes: ByteLen,
        /// Of a move: the member that goes once the new one is in sync.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        replaces: Option<NodeId>,
    },
    /// Take a node's replica of an image away. It goes to the image's owner, and is done once the smaller set is in the
    /// log; the owner refuses if any block would have fewer members than `keep`.
    Drop {
        /// The image's top layer when decided.
        layer: LayerId,
        /// Which image.
        image: ImageId,
        /// Its epoch when decided; an owner under another epoch refuses.
        epoch: Epoch,
        /// Location map version that the decision saw.
        set_version: SetVersion,
        /// The member that goes; never the owner itself.
        from: NodeId,
        /// Members that each block keeps at least.
        keep: u64,
    },
}

impl Order {
    /// The word users see.
    pub fn verb(&self) -> &'static str {
        match self {
            Order::Promote { .. } => "promote",
            Order::Demote { .. } => "demote",
            Order::Replicate { .. } => "replicate",
            Order::Drop { .. } => "drop",
        }
    }

    /// The layer concerned.
    pub fn layer(&self) -> LayerId {
        match self {
            Order::Promote { layer, .. }
            | Order::Demote { layer, .. }
            | Order::Replicate { layer, .. }
            | Order::Drop { layer, .. } => *layer,
        }
    }

    /// How many blocks it names; 0 where it is about a whole image.
    pub fn block_count(&self) -> usize {
        match self {
            Order::Promote { blocks, .. } => blocks.len(),
            Order::Demote { blocks, .. } => blocks.len(),
            Order::Replicate { blocks, .. } => blocks.map_or(0, |extent| {
                usize::try_from(extent.last.0.saturating_sub(extent.first.0).saturating_add(1)).unwrap_or(usize::MAX)
            }),
            Order::Drop { .. } => 0,
        }
    }
}

/// One block to promote and the numbers that chose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promotion {
    /// The block.
    pub block: BlockIndex,
    /// Its score at the tick.
    pub score: HeatScore,
    /// The resident it displaces, if the region was full.
    pub displaces: Option<Resident>,
    /// The log position of the newest heat event that counted it.
    pub heat_seq: Seq,
}

/// One block to demote and the numbers that chose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demotion {
    /// The block.
    pub block: BlockIndex,
    /// Its score at the tick.
    pub score: HeatScore,
}

/// A block that is in a main region, with its score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Resident {
    /// Its score at the tick.
    pub score: HeatScore,
    /// Its layer.
    pub layer: LayerId,
    /// The block.
    pub block: BlockIndex,
}

/// Why a command was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// The rule, such as `tier/promote`.
    pub rule: String,
    /// Version of the policy under which it was decided.
    pub policy_version: u64,
    /// The numbers of the rule by name, in the order in which a person reads them; scores are fixed point.
    pub numbers: Vec<(String, u64)>,
    /// Log positions of the events it rests on, ascending.
    pub rests_on: Vec<Seq>,
    /// What was not chosen and why, best first, at most [`crate::limits::ALTERNATIVES_MAX`]. Of several commands of
    /// one rule, node and tick the first carries it for all.
    pub lost: Vec<Alternative>,
    /// Nodes that were not chosen and why, best first, at most [`crate::limits::ALTERNATIVES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost_nodes: Vec<LostNode>,
}

/// A block that was considered and not chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    /// Its layer.
    pub layer: LayerId,
    /// The block.
    pub block: BlockIndex,
    /// Its score.
    pub score: HeatScore,
    /// Why it lost, such as `below_margin` or `over_budget`.
    pub why: String,
}

/// A node that was considered and not chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostNode {
    /// Which node.
    pub node: NodeId,
    /// Why it lost, such as `same_fault_domain`, `fuller` or `absent`.
    pub why: String,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, as far as `done` says: a promote may find some blocks written meanwhile. A replicate has begun, a drop is
    /// committed; they name no blocks here.
    Done {
        /// Blocks now in the ordered state, ascending. A block to promote that was there before counts as done.
        done: Vec<BlockIndex>,
        /// The other blocks, each with a short reason. Promote: not in the main region now, such as
        /// `written_during_fill`; the scheduler lets them rest. Demote: there was no copy to drop.
        skipped: Vec<(BlockIndex, String)>,
        /// Bytes moved.
        bytes: ByteLen,
        /// Microseconds from first to last step.
        took_us: u64,
    },
    /// Not done; nothing changed.
    Refused {
        /// Why, for people.
        why: String,
    },
}
