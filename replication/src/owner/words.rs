//! What goes into an owner and what comes out.

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId};

pub use crate::request::OpId;

use crate::handover::HELD_WRITES_MAX;
use crate::request::{Bytes, Extent, Hashes, Nodes, Reply, Request, Stamp};
use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::Record;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ask {
    /// Read blocks.
    Read(Extent),
    /// Write blocks; with `fua`, durably.
    Write {
        /// Which blocks.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
    },
    /// Make every acknowledged write durable.
    Flush,
}

/// What is asked about the copies of blocks, by whoever looks after them. A client's writes to these blocks wait, so that one
/// under way is no difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// What every member of the blocks has on its disk.
    Compare(Extent),
    /// Write to members what another one gives when it is read. None of them leaves the set for that: what it brings to
    /// them is what the image holds anyway.
    Rewrite {
        /// Which blocks.
        extent: Extent,
        /// Whose copy counts.
        from: NodeId,
        /// Who is written to.
        to: Nodes,
    },
}

impl Check {
    /// Its blocks.
    pub fn extent(&self) -> Extent {
        match self {
            Check::Compare(extent) | Check::Rewrite { extent, .. } => *extent,
        }
    }
}

/// What happens to an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client asks.
    Client {
        /// Its operation's number.
        op: OpId,
        /// What.
        ask: Ask,
    },
    /// Somebody asks about copies.
    Check {
        /// The operation's number.
        op: OpId,
        /// What.
        check: Check,
    },
    /// A member replied.
    Reply {
        /// Which member.
        from: NodeId,
        /// What.
        reply: Reply,
    },
    /// A member's connection is lost, or it takes too long.
    MemberFailed(NodeId),
    /// The log's last record of this image that counts.
    Committed(Arc<Record>),
    /// The member on this node stopped to admit epochs below this one.
    Fenced(Epoch),
    /// The log ends before what this node has seen.
    RolledBack,
    /// The log was recovered.
    Rebased(Aggregate),
    /// Time to renew the read leases.
    Renew,
    /// A node is to get a copy of an extent.
    Join {
        /// Which node.
        node: NodeId,
        /// Which blocks; may reach beyond the image's end.
        extent: Extent,
        /// The image's last block.
        end: BlockIndex,
        /// Blocks of one copy.
        blocks: u64,
        /// Blocks that may be copied before [`Input::Allow`] says how many more; `None`: all.
        allowed: Option<u64>,
    },
    /// So many blocks more may be copied to a joining node, whatever was left; `None`: all. What is written goes to it anyway.
    Allow {
        /// Which node.
        node: NodeId,
        /// How many.
        blocks: Option<u64>,
    },
    /// The join under way is to copy nothing for now, or to go on.
    Pause(bool),
    /// A member's copy is to go.
    Leave(NodeId),
    /// The image is handed over: drain, then seal.
    Seal,
    /// The local member's answer to [`Output::SealHere`].
    SealedHere(bool),
}

/// What an owner wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send a request to a member, the local one included.
    Send {
        /// Which member.
        to: NodeId,
        /// What.
        request: Request,
        /// What a write carries.
        bytes: Bytes,
    },
    /// Publish a change of the set, by compare-and-publish, until the log shows it or another one.
    Publish(Change),
    /// Have a member record a change that the log has. May be sent again.
    Raise {
        /// Which member.
        to: NodeId,
        /// What.
        record: Arc<Record>,
        /// The record that it replaces in the log.
        over: Stamp,
    },
    /// Answer a client: done.
    Acknowledge {
        /// Which operation.
        op: OpId,
        /// What a read found.
        bytes: Bytes,
    },
    /// Answer [`Check::Compare`].
    Compared {
        /// Which operation.
        op: OpId,
        /// What each member has.
        hashes: BTreeMap<NodeId, Hashes>,
    },
    /// Answer a client: not done, or not known to be done.
    Deny {
        /// Which operation.
        op: OpId,
        /// Why.
        denial: Denial,
    },
    /// A node became a member.
    Joined(NodeId),
    /// A node does not join, or a member does not leave.
    NotChanged {
        /// Which node.
        node: NodeId,
        /// Why.
        denial: Denial,
    },
    /// The node's copy may be deleted, unless the node has a record at least this new.
    DropCopy {
        /// Which node.
        node: NodeId,
        /// The record without it.
        stamp: Stamp,
    },
    /// Have the local member seal.
    SealHere((Epoch, LeaseId)),
    /// Drained and durably sealed: the destination may take over with this.
    Sealed {
        /// The sealed record.
        stamp: Stamp,
        /// The lives of the members' stores in this session.
        stores: BTreeMap<NodeId, Incarnation>,
    },
}

/// Why a client is not served.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Denial {
    /// Another node owns the image.
    #[error("another node became the owner of this image: attach it where it is to run")]
    Deposed,
    /// The image was handed over.
    #[error("epoch {epoch} is sealed for a hand-over: attach the image again to serve it here")]
    Sealed {
        /// The epoch.
        epoch: Epoch,
    },
    /// The image is not attached here.
    #[error("the image is not attached on this node: attach it to serve it")]
    Detached,
    /// Too many operations wait for the image to open.
    #[error("{HELD_WRITES_MAX} operations wait for the image to open here: wait until it is open, or detach")]
    Full,
    /// The last copy of some blocks lies on a disk that is full.
    #[error(
        "the last copy of these blocks has no room for the write: make room in that node's store, then write again"
    )]
    NoRoom,
    /// No member is left that holds what was acknowledged.
    #[error(
        "every copy of some blocks failed or started anew since this session began, so acknowledged writes may be \
         missing: detach the image, check it, attach it again"
    )]
    NoMember,
    /// The last copy never goes.
    #[error("{0}")]
    Map(String),
    /// No member holds all of what is to be read.
    #[error("no member holds all these blocks: read them run by run")]
    Split,
    /// The copy that was to be read is none.
    #[error("the copy that was to be read is not in the set of these blocks any more: look at hearth location list")]
    CopyGone,
    /// Another change is under way.
    #[error("another change of this image's locations is under way: ask again when it is done")]
    Busy,
    /// The log lost its end.
    #[error("the log ends before what this node has seen, so sets do not change: run `hearth log recover`")]
    RolledBack,
    /// The joining node failed.
    #[error("the node failed while it was synced: look at it, then add the location again")]
    JoinerFailed,
}
