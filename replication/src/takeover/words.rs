//! What goes into a takeover, what comes out, and why it may not go on.

use std::sync::Arc;

use hearth_protocol::aggregate::Change;
use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, NodeId};

use crate::owner::Owner;
use crate::request::{Bytes, Reply, Request, Stamp, Standing};

/// What happens to a takeover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A node told where it stands.
    Told {
        /// Which node.
        from: NodeId,
        /// Where.
        standing: Standing,
    },
    /// Every node that can be reached has told.
    Reached,
    /// The log's last record of this image that counts.
    Committed(Arc<Record>),
    /// A member replied.
    Reply {
        /// Which member.
        from: NodeId,
        /// What.
        reply: Reply,
    },
    /// A member's connection is lost, or it takes too long.
    MemberFailed(NodeId),
    /// Time passed.
    Tick,
}

/// What a takeover wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Publish the new epoch, by compare-and-publish, until the log shows it or another one.
    Publish(Change),
    /// Have a member record the new record. May be sent again.
    Raise {
        /// Which member.
        to: NodeId,
        /// What.
        record: Arc<Record>,
        /// The record that it replaces in the log.
        over: Stamp,
    },
    /// Send a request to a member.
    Send {
        /// Which member.
        to: NodeId,
        /// What.
        request: Request,
        /// What a write carries.
        bytes: Bytes,
    },
    /// This node owns the image.
    Opened(Box<Owner>),
    /// It ends here.
    GivenUp(Setback),
}

/// Why a takeover does not go on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Setback {
    /// A node has a record that the log does not have.
    #[error("node {node} has a newer record than the log, so the log lost its end: run `hearth log recover`")]
    RolledBack {
        /// Which node.
        node: NodeId,
    },
    /// No member of some blocks answered.
    #[error("none of {members:?}, which hold block {first} and those behind it, can be reached: start one of them")]
    NoMember {
        /// The run.
        first: BlockIndex,
        /// Who holds it.
        members: Vec<NodeId>,
    },
    /// Only members that may have lost acknowledged writes answered.
    #[error(
        "every reachable copy of block {first} and those behind it lost power with unflushed writes, and {missing:?} may \
         still have them: start those nodes, or remove their locations if they are gone for good"
    )]
    InDoubt {
        /// The run.
        first: BlockIndex,
        /// Who else is to be asked.
        missing: Vec<NodeId>,
    },
    /// A running guest would silently lose acknowledged writes.
    #[error(
        "every copy of block {first} and those behind it lost power since the guest's writes were acknowledged: stop the \
         guest and attach the image anew"
    )]
    Gap {
        /// The run.
        first: BlockIndex,
    },
    /// A forced takeover on a node without a copy.
    #[error(
        "this node holds no working copy of all blocks: force the takeover on a node that does, see hearth image map"
    )]
    NothingToTake,
    /// A forced takeover where another one would do.
    #[error("the newest copy can be reached, so nothing has to be given up: take over without accepting a loss")]
    NotNeeded,
    /// A forced takeover although another node has more.
    #[error("node {node} can be reached and has a newer copy than this one: take over there instead")]
    NewerThere {
        /// Which node.
        node: NodeId,
    },
    /// Somebody else's change came first.
    #[error("another change of this image came first: look who owns it now, and ask again if this node is to own it")]
    Overtaken,
    /// A member refused or was lost on the way.
    #[error("member {node} was lost before the image opened: ask again, without it")]
    MemberLost {
        /// Which member.
        node: NodeId,
    },
}
