//! Images with replicas: one [`Replica`] per image drives the protocol of `hearth-replication` on this node.
//!
//! | file | what it is |
//! |---|---|
//! | [`shape`] | what an image looks like, in bytes and blocks |
//! | [`piece`] | the bytes that go with a request, and how they travel |
//! | [`image`] | one image's session: inputs in, outputs carried out, operations waited for |
//! | [`hash`] | what this node's disk holds, for a comparison of copies |
//! | `image/work` | what the session wants of this node's disk, and on which threads that is done |
//! | [`disk`] | the image as its exports see it, while this node owns it |
//! | [`felt`] | how long its clients wait |
//! | [`set`] | all images with replicas of this node, what arrives for them, and their clock |
//! | `turns` | clients' writes that wait for each other, and join meanwhile |
//! | `through` | reads at the destination of a hand-over |
//! | [`pool`] | threads that wait for this node's disk on behalf of other nodes |
//!
//! What may be done, and when, is decided in `hearth-replication` alone; here bytes and messages are moved. Like all of the
//! data path it never calls NATS: changes to be published leave as [`Notice`]s, and the log comes in as
//! [`image::Replica::step`]s.

pub mod disk;
pub mod felt;
pub mod hash;
pub mod image;
pub mod piece;
pub mod pool;
pub mod set;
pub mod shape;
mod through;
mod turns;

use hearth_protocol::aggregate::Change;
use hearth_protocol::{ImageId, NodeId};
use hearth_replication::owner::Denial;
use hearth_replication::takeover::Setback;

pub use disk::ReplicatedDisk;
pub use image::Replica;
pub use pool::Pool;
pub use set::{Opening, Replicas};

/// What the agent is to know or to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Publish a change of the image's record; it comes again until the log shows it or another one.
    Publish(Change),
    /// This node owns the image.
    Opened,
    /// This node did not become the owner.
    GivenUp(Setback),
    /// This node owns the image no more.
    Ended(Denial),
    /// A node became a member.
    Joined(NodeId),
    /// A node does not join, or a member does not leave.
    NotChanged(NodeId, Denial),
    /// A member is out of the set.
    Left(NodeId),
    /// This node's copy is gone: others hold all of it.
    Forgotten,
}

/// A notice and the image that it is about.
pub type Noticed = (ImageId, Notice);
