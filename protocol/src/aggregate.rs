//! Which changes of an image's record count: one function of the log's prefix.
//!
//! A change names the record it replaces. So of two that were published against one record the first counts and the other
//! is void, in whatever order they arrive and whatever became of the publisher; compare-and-publish only spares the log
//! the void ones. The invariant: a record that counts was never lower in epoch or set version than the one before, gains
//! members only by way of joiners, and each run keeps a member it had. The one exception names itself: a takeover that an
//! operator forced ([`Change::stale`]) leaves the image with its publisher's copy alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{LeaseId, NodeId};
use crate::record::{Age, Extent, Nodes, Record, RecordError, Run, Stamp};
use crate::units::{BlockIndex, Epoch, SetVersion};

/// A change as it is published.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Change {
    /// Who publishes it.
    pub by: NodeId,
    /// The record it replaces.
    pub from: Stamp,
    /// The record that is to count.
    pub to: Arc<Record>,
    /// Of a takeover that an operator forced: the record of the copy that is taken though newer ones may be elsewhere. What
    /// was acknowledged since is given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale: Option<Stamp>,
}

/// Why a change does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.why())]
pub enum Void {
    /// It replaces a record that is not the last.
    NotLast,
    /// Epoch, lease or set version is not the next.
    NotNext,
    /// A set change by another node than the owner.
    NotOwner,
    /// A member that was not synced.
    NotSynced,
    /// No member of a run stays.
    LastCopy,
    /// A forced takeover that takes more than its own copy, or one that this log never had.
    NotForced,
}

impl Void {
    /// In words.
    pub const fn why(self) -> &'static str {
        match self {
            Void::NotLast => "another change came first: read the image's record again",
            Void::NotNext => "its epoch, lease or set version is not the next one",
            Void::NotOwner => "only the owner changes the set",
            Void::NotSynced => "a node becomes a member only after it has joined and was synced",
            Void::LastCopy => "a run would keep none of its members",
            Void::NotForced => "a forced takeover takes one copy, its publisher's, of a record that the log knows",
        }
    }
}

/// An image's record as the log has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Aggregate {
    /// The last record that counts.
    pub record: Arc<Record>,
    /// The node its epoch was granted to; `None` before the first.
    pub owner: Option<NodeId>,
    /// Epochs that ended: to which lease each was granted, and its last set version.
    pub ended: BTreeMap<Epoch, (LeaseId, SetVersion)>,
}

impl Aggregate {
    /// The record of a new image: nobody owns it, and everybody holds all of it.
    ///
    /// # Errors
    /// Nobody does.
    pub fn new(set_version: SetVersion, members: Nodes) -> Result<Self, RecordError> {
        let stamp = Stamp {
            epoch: Epoch(0),
            lease: LeaseId(0),
            set_version,
        };
        let run = Run {
            first: BlockIndex(0),
            members,
            joiners: Nodes::new(),
        };
        Ok(Self {
            record: Arc::new(Record::new(stamp, vec![run])?),
            owner: None,
            ended: BTreeMap::new(),
        })
    }

    /// Whether a record stands in this log. One that does not was recorded from an end that the log lost.
    pub fn knows(&self, record: &Record) -> bool {
        if record.grant() == self.record.grant() {
            return matches!(record.age(&self.record), Age::Same | Age::Older);
        }
        self.had(record.stamp())
    }

    /// Whether a record of this stamp stands in this log.
    fn had(&self, stamp: Stamp) -> bool {
        let now = self.record.stamp();
        if (stamp.epoch, stamp.lease) == (now.epoch, now.lease) {
            return stamp.set_version <= now.set_version;
        }
        let ended = self.ended.get(&stamp.epoch);
        ended.is_some_and(|(lease, last)| *lease == stamp.lease && stamp.set_version <= *last)
    }

    /// Judges the next change in the log and remembers what it changes.
    ///
    /// # Errors
    /// The change is void.
    pub fn judge(&mut self, change: &Change) -> Result<(), Void> {
        let (old, new) = (&self.record, &change.to);
        let (was, is) = (old.stamp(), new.stamp());
        if change.from != was {
            return Err(Void::NotLast);
        }
        if is.set_version != was.set_version.next() {
            return Err(Void::NotNext);
        }
        let grant = is.epoch != was.epoch;
        if grant && (is.epoch != was.epoch.next() || is.lease == was.lease) || !grant && is.lease != was.lease {
            return Err(Void::NotNext);
        }
        if !grant && self.owner.as_ref() != Some(&change.by) {
            return Err(Void::NotOwner);
        }
        if let Some(stale) = change.stale {
            let alone = Nodes::from([change.by.clone()]);
            let known = self.had(stale) && stale.epoch <= was.epoch;
            if !grant || !known || new.everyone() != alone {
                return Err(Void::NotForced);
            }
        }
        let pairs = match change.stale {
            // Its copy need not be in the set: that is what an operator accepted.
            Some(_) => Vec::new(),
            None => pairs(old, new),
        };
        for (before, after) in pairs {
            let synced = if grant { before.0.clone() } else { before.0 | before.1 };
            if !after.0.is_subset(&synced) {
                return Err(Void::NotSynced);
            }
            if before.0.is_disjoint(after.0) {
                return Err(Void::LastCopy);
            }
        }
        self.record = new.clone();
        if grant {
            self.ended.insert(was.epoch, (was.lease, was.set_version));
            self.owner = Some(change.by.clone());
        }
        Ok(())
    }
}

/// Members and joiners.
type Held<'a> = (&'a Nodes, &'a Nodes);

/// Who holds each piece of the image before and after, over the borders of both maps.
fn pairs<'a>(old: &'a Record, new: &'a Record) -> Vec<(Held<'a>, Held<'a>)> {
    let mut starts: Vec<_> = old.runs().iter().chain(new.runs()).map(|run| run.first).collect();
    starts.sort();
    starts.dedup();
    let at = |record: &'a Record, block| {
        let run = record.touched(Extent::block(block)).next();
        run.map(|run| (&run.members, &run.joiners))
    };
    let both = |block| Some((at(old, block)?, at(new, block)?));
    starts.into_iter().filter_map(both).collect()
}
