//! What goes into a session, what comes out, and what nodes say to each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, Incarnation, LeaseId, NodeId};
use serde::{Deserialize, Serialize};

use crate::member::{Durable, Marks};
use crate::owner::{Ask, Check, Denial, OpId};
use crate::request::{Answer, Bytes, Extent, Hashes, Refusal, Request, RequestId, Stamp, Standing, Work};
use crate::takeover::Setback;

/// A copy as the disk has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// The life of its store.
    pub store: Incarnation,
    /// The record and the seal.
    pub durable: Durable,
    /// The marks.
    pub marks: Marks,
    /// Whether the disk failed in an earlier life.
    pub failed: bool,
}

/// What one node's session says to another's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// An owner's request.
    Request(Request),
    /// The answer.
    Answer {
        /// To which request.
        id: RequestId,
        /// The request's stamp.
        stamp: Stamp,
        /// How.
        answer: Answer,
    },
    /// Record a record that counts in the log.
    Raise {
        /// The record.
        record: Arc<Record>,
        /// The record that it replaces in the log.
        over: Stamp,
    },
    /// It is recorded.
    Raised(Standing),
    /// It is not.
    NotRaised {
        /// Which record.
        stamp: Stamp,
        /// Why.
        refusal: Refusal,
    },
    /// Where do you stand? The lease tells one takeover's questions from another's.
    Ask(LeaseId),
    /// Here.
    Told {
        /// The lease of the question.
        lease: LeaseId,
        /// Where.
        standing: Standing,
    },
    /// Delete your copy, unless you have a record at least this new.
    Drop {
        /// The record without it.
        stamp: Stamp,
    },
    /// The source of a hand-over has drained and durably sealed.
    Sealed {
        /// The sealed record.
        stamp: Stamp,
        /// The lives of the members' stores in its session.
        stores: BTreeMap<NodeId, Incarnation>,
    },
}

/// What happens to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A client asks.
    Client {
        /// Its operation's number, never used before in this session.
        op: OpId,
        /// What.
        ask: Ask,
    },
    /// Somebody asks about the copies of blocks. Denied at once unless this node owns the image.
    Check {
        /// Its operation's number, of the same count as clients'.
        op: OpId,
        /// What.
        check: Check,
    },
    /// Another node says something: at most once, in any order, maybe late.
    Peer {
        /// Which node.
        from: NodeId,
        /// What.
        message: Message,
    },
    /// The connection to a node broke: what is unanswered there will not be answered.
    Lost(NodeId),
    /// [`Output::Perform`] ended.
    Finished {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
        /// Whether it worked.
        ok: bool,
    },
    /// [`Output::Perform`] of a request for hashes ended.
    Hashed {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
        /// What the blocks hold.
        hashes: Hashes,
    },
    /// [`Output::Perform`] of a write ended because the disk has no room for it.
    NoRoom {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
    },
    /// [`Output::Persist`] ended.
    Persisted {
        /// Whether it is on stable storage.
        ok: bool,
    },
    /// A change of this image in the log, each once, in order, whether it counts or not.
    Logged(Change),
    /// The log ends before what this node has seen. Nothing of it is read until [`Input::Rebased`].
    RolledBack,
    /// The log was recovered, or read anew: this is what counts now.
    Rebased(Aggregate),
    /// Become the owner: an attach, or a takeover after a fault.
    Take {
        /// Drawn anew for each one.
        lease: LeaseId,
    },
    /// Become the owner from this node's copy alone, though it may miss what was acknowledged: an operator accepted that.
    Force {
        /// Drawn anew for each one.
        lease: LeaseId,
    },
    /// Become the destination of a hand-over: hold writes until the source has sealed.
    Incoming {
        /// Drawn anew for each one; those that follow it are for further tries.
        lease: LeaseId,
    },
    /// This node has made a store for a copy: empty for a joining node, with the first record for a new image. Ignored
    /// if it has a working copy; nothing of an earlier copy is under way any more.
    Prepare(Replica),
    /// The store that was made for a copy is not needed: it goes, unless a record is durable in it or the image is in service.
    Unprepare,
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
    /// So many blocks more may be copied to a joining node, whatever was left; `None`: all. Ignored unless it joins. What is
    /// written goes to it anyway.
    Allow {
        /// Which node.
        node: NodeId,
        /// How many.
        blocks: Option<u64>,
    },
    /// A node that joins is to get no copy after all. Ignored once it counts as a member of some blocks: then it finishes.
    Cancel(NodeId),
    /// The join under way is to copy nothing for now, or to go on. Writes go to the joining node all the same.
    Pause(bool),
    /// A member's copy is to go.
    Leave(NodeId),
    /// End here: an owner drains, seals durably and hands over to a node, if one is named. What is not open yet ends at once.
    Seal {
        /// The destination.
        to: Option<NodeId>,
    },
    /// Time passed, see [`super::Session::wake_at`].
    Tick,
}

/// What a session wants done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Carry this out on the disk, then report [`Input::Finished`]. Two writes that overlap are never under way together; a
    /// read and a write only if nobody waits any more for what the read finds.
    Perform {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
        /// What.
        work: Work,
        /// Mark the written blocks durably before the first of them changes.
        mark: bool,
        /// Before a flush is reported as finished, marks of these blocks that were made in an earlier life of the store are
        /// durably marks of this life.
        anew: BTreeSet<BlockIndex>,
        /// What a write carries.
        bytes: Bytes,
    },
    /// Make this durable, then report [`Input::Persisted`]. One at a time.
    Persist(Durable),
    /// The marks of these blocks may go whenever that is cheap. One that has not gone when the block is to be marked again
    /// is a new one.
    Unmark(BTreeSet<BlockIndex>),
    /// Delete record, marks and blocks in one piece, so that after a crash either all or nothing is there.
    Forget,
    /// Send this to another node.
    Send {
        /// Which.
        to: NodeId,
        /// What.
        message: Message,
        /// What a write or the answer to a read carries.
        bytes: Bytes,
    },
    /// Publish a change, by compare-and-publish. May come again for the same change.
    Publish(Change),
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
    /// A client reads at the destination of a hand-over: read it from the source's export and answer the client. If that fails
    /// because the source has sealed, ask here again.
    ReadThrough {
        /// Which operation.
        op: OpId,
        /// The source.
        owner: NodeId,
    },
    /// This node owns the image and serves it.
    Opened,
    /// This node did not become the owner. Operations are held; take again under another lease, or end. The destination of a
    /// hand-over goes on by itself: at the source's next seal, or soon if the log has decided for it.
    GivenUp(Setback),
    /// This node serves the image no more.
    Ended(Denial),
    /// A node became a member.
    Joined(NodeId),
    /// A node does not join, or a member does not leave.
    NotChanged {
        /// Which node.
        node: NodeId,
        /// Why.
        denial: Denial,
    },
    /// A member is out of the set, and its node is told to delete its copy.
    Left(NodeId),
}
