//! The words between an owner and the members: what is asked, under which record, and how it is answered.
//!
//! Bytes are not here: whoever drives the machines keeps them, and [`Bytes`] says which belong to what. The invariant of a
//! number: an owner sends one request of a number to one member at most once under one stamp. So a request that a dying connection
//! still holds can never run behind its own repetition: the repetition has a newer set version, and the fence is between.

use std::collections::BTreeSet;

pub use hearth_protocol::record::{Extent, Nodes, Stamp};

use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use serde::{Deserialize, Serialize};

use crate::time::BootMs;

/// A request's number, counted by one owner over its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// A client's operation, numbered by the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OpId(pub u64);

/// Which bytes belong to what is to be done.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bytes {
    /// None.
    None,
    /// Those that a client wants written or, with a read, where within the blocks it wants to read. They are kept until the
    /// operation is answered.
    OfClient(OpId),
    /// Those that came with the message being taken.
    OfRequest,
    /// Those that a read brought whose answer is being taken: this node's own, or a member's.
    OfAnswer {
        /// The member that read.
        from: NodeId,
        /// The read.
        id: RequestId,
    },
    /// Those that this node's disk gave for a read of another node whose end is being taken.
    OfWork {
        /// Who asked for it.
        from: NodeId,
        /// The read.
        id: RequestId,
    },
}

/// What a member is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Work {
    /// Read blocks.
    Read(Extent),
    /// Say what each block holds on the disk, as a hash.
    Hash(Extent),
    /// Write blocks; with `fua`, to stable storage before the answer.
    Write {
        /// Which blocks.
        extent: Extent,
        /// Durable before the answer.
        fua: bool,
    },
    /// Bring every finished write to stable storage.
    Flush {
        /// Blocks whose writes have not reached every member: their marks stay.
        keep: BTreeSet<BlockIndex>,
    },
    /// Renew the read lease.
    Renew {
        /// The owner's clock before it sent this; comes back with the answer.
        sent: BootMs,
    },
}

/// One request of an owner.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Request {
    /// Its number.
    pub id: RequestId,
    /// The record it was made under.
    pub stamp: Stamp,
    /// The life of the member's store that the session began with.
    pub store: Incarnation,
    /// What to do.
    pub work: Work,
}

/// What a block holds: the first half of its blake3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockHash(pub u128);

/// A member's blocks of an extent, in their order; `None` for one that its disk cannot read.
pub type Hashes = Vec<Option<BlockHash>>;

/// A member's answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// What its blocks hold.
    Hashed(Hashes),
    /// The read lease is renewed.
    Granted {
        /// As in the request.
        sent: BootMs,
    },
    /// The disk failed; this member takes no more requests.
    Failed,
    /// The disk has no room for a write. Of what was to be written anything may be there; everything else goes on.
    NoRoom,
    /// Not admitted; nothing was done.
    Refused(Refusal),
}

/// Why a member does not admit a request.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The node has no record of the image.
    #[error("this node holds no replica of the image: add it to the image's locations first")]
    NoRecord,
    /// The request's epoch is lower.
    #[error(
        "epoch {asked} has ended, epoch {recorded} is recorded: another node became the owner; detach here and attach \
         where the image is to run"
    )]
    EpochEnded {
        /// The request's.
        asked: Epoch,
        /// The member's.
        recorded: Epoch,
    },
    /// The epoch is the recorded one, the lease is not.
    #[error(
        "epoch {epoch} was recorded for another lease: the log gave one epoch twice, so it lost its end; run `hearth log \
         recover`"
    )]
    OtherLease {
        /// The epoch.
        epoch: Epoch,
    },
    /// The epoch was granted over an older record than the member's.
    #[error(
        "epoch {epoch} was granted over an older record than this member has, so the log lost its end: run `hearth log \
         recover`"
    )]
    GrantedOverOlder {
        /// The new epoch.
        epoch: Epoch,
    },
    /// The set version is lower.
    #[error("set version {asked} is over, {recorded} is recorded: send it again under the newer one")]
    SetChanged {
        /// The request's.
        asked: SetVersion,
        /// The member's.
        recorded: SetVersion,
    },
    /// The request's record is newer than the member's.
    #[error("this member has not recorded epoch {epoch}, set version {set_version} yet: install the record first")]
    NotInstalled {
        /// The request's.
        epoch: Epoch,
        /// The request's.
        set_version: SetVersion,
    },
    /// A newer record is being recorded.
    #[error("a newer record, epoch {epoch}, set version {set_version}, is being recorded: ask again under it")]
    Fenced {
        /// The newer record's.
        epoch: Epoch,
        /// The newer record's.
        set_version: SetVersion,
    },
    /// The owner on this node has sealed the epoch.
    #[error("epoch {epoch} is sealed for a hand-over: attach the image again under a new epoch")]
    Sealed {
        /// The epoch.
        epoch: Epoch,
    },
    /// The node holds none of these blocks.
    #[error("this node is not in the set of these blocks: read the location map again")]
    NotInSet,
    /// The store started anew since the session began.
    #[error("this member's store started anew since the session began: it is taken out of the set and synced again")]
    StoreChanged,
    /// The disk failed earlier.
    #[error("this member's disk failed: replace the disk or remove the location")]
    DiskFailed,
}

/// What a node durably knows of an image and the state of its store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Standing {
    /// The record; `None` if the node has none.
    pub record: Option<std::sync::Arc<Record>>,
    /// The record that this one replaced here, if the node joins by this one and the daemon has not started anew since.
    pub before: Option<std::sync::Arc<Record>>,
    /// The life of its store.
    pub store: Incarnation,
    /// Blocks that may differ from other members' after a crash: written, and not yet known to be everywhere.
    pub doubt: BTreeSet<BlockIndex>,
    /// Blocks of these that were marked when the store started anew: acknowledged writes may be missing in their run, and
    /// only there.
    pub lost: BTreeSet<BlockIndex>,
    /// The epoch and lease that the owner on this node sealed.
    pub sealed: Option<(Epoch, LeaseId)>,
    /// Whether its disk failed.
    pub failed: bool,
}

/// What a member says to the node that is or becomes the owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// It answers a request.
    Answered {
        /// Which request.
        id: RequestId,
        /// The request's stamp.
        stamp: Stamp,
        /// How.
        answer: Answer,
    },
    /// It recorded a record; this is where it stands behind the fence.
    Raised(Standing),
    /// It did not record a record.
    NotRaised {
        /// Which.
        stamp: Stamp,
        /// Why.
        refusal: Refusal,
    },
}
