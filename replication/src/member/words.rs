//! What goes into a member and what comes out.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, Epoch, LeaseId, NodeId};

use super::Durable;
use crate::request::{Answer, Bytes, Hashes, Refusal, Request, RequestId, Stamp, Standing, Work};

/// What happens to a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// An owner asks for something.
    Request {
        /// Its node.
        from: NodeId,
        /// What.
        request: Request,
    },
    /// An admitted request ended on the disk.
    Finished {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
        /// Whether it worked. What failed is never tried again (rule 5).
        ok: bool,
    },
    /// What the blocks of an admitted request for their hashes hold.
    Hashed {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
        /// The hashes.
        hashes: Hashes,
    },
    /// An admitted write ended because the disk has no room for it. What the disk holds otherwise is sound.
    NoRoom {
        /// The asking node.
        from: NodeId,
        /// Its request.
        id: RequestId,
    },
    /// A record that counts in the log is to be recorded.
    Raise {
        /// Who asks.
        from: NodeId,
        /// The record.
        record: Arc<Record>,
        /// The record that it replaces in the log.
        over: Stamp,
    },
    /// The owner on this node has drained and seals its epoch.
    Seal {
        /// What it seals.
        grant: (Epoch, LeaseId),
    },
    /// [`Output::Persist`] is on stable storage, or failed.
    Persisted {
        /// Whether it worked.
        ok: bool,
    },
    /// A node that wants to become the owner asks where this one stands.
    Ask {
        /// Who asks.
        from: NodeId,
        /// The lease it asks for.
        lease: LeaseId,
    },
    /// The set of this record, which counts and is in force, does not have this node.
    Drop {
        /// The record's stamp.
        stamp: Stamp,
    },
}

/// What a member wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Carry this out on the disk, then report [`Input::Finished`].
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
        /// durably marks of this life. What such a mark stands for is over with the flush; left to stand, it would say after
        /// the next start that writes are missing here.
        anew: BTreeSet<BlockIndex>,
    },
    /// Make this durable, then report [`Input::Persisted`].
    Persist(Durable),
    /// These blocks are everywhere and durable here: their marks may go whenever that is cheap.
    Unmark(BTreeSet<BlockIndex>),
    /// Answer a request.
    Answer {
        /// Whom.
        to: NodeId,
        /// Which.
        id: RequestId,
        /// The request's stamp.
        stamp: Stamp,
        /// How.
        answer: Answer,
        /// What a read found.
        bytes: Bytes,
    },
    /// The record counts here.
    Raised {
        /// Who asked for it.
        to: NodeId,
        /// Where this node stands behind the fence.
        standing: Standing,
    },
    /// The record does not count here.
    NotRaised {
        /// Who asked for it.
        to: NodeId,
        /// Which record.
        stamp: Stamp,
        /// Why.
        refusal: Refusal,
    },
    /// Where this node stands.
    Told {
        /// Who asked.
        to: NodeId,
        /// For which lease.
        lease: LeaseId,
        /// The answer.
        standing: Standing,
    },
    /// Requests of an older epoch are admitted no more: tell the owner on this node before anything else. It may hold bytes
    /// in RAM and answers of other members, and neither passes this gate again.
    Fenced(Epoch),
    /// Delete record, marks and blocks in one piece: others hold all of it.
    Forget,
    /// The seal of the owner on this node is durable; `false`: it is not, and a newer record or a failed disk is why.
    Sealed(bool),
}
