//! What every Hearth process agrees on: ids, units, events, commands, subjects, the codec and the limits.
//!
//! This crate knows no clock, no runtime, no network and no disk. It is not a place for behaviour, with three
//! exceptions that must be one piece of code for everybody: the hash [`chain`]; [`validity`], the rule that says which
//! events of the stream count; and [`publishers`], which says which of them are repeats.

pub mod aggregate;
pub mod chain;
pub mod codec;
pub mod command;
pub mod event;
pub mod heat;
pub mod ids;
pub mod limits;
pub mod policy;
pub mod publishers;
pub mod record;
pub mod rpc;
pub mod size;
pub mod subject;
pub mod units;
pub mod validity;
pub mod view;

pub use codec::{DecodeError, Envelope, Message};
pub use command::{Command, Order, Reason};
pub use event::Event;
pub use ids::{
    CommandId, ImageId, ImageName, Incarnation, LayerId, LeaseId, NodeId, Publisher, SchedulerId, SnapshotName,
};
pub use units::{BlockIndex, ByteLen, Epoch, HeatScore, Seq, SetVersion, Term, TickNo, WallMs};
