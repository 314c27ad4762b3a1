//! The destination of a live migration (rule 8).
//!
//! The guest's new QEMU connects and reads long before the old one stops, so nothing that a client does here means that the
//! source has ended. Until the source says that it sealed its epoch, reads pass through to the source and writes are held,
//! a bounded number of them. The seal starts a takeover under the next epoch; its place in the log is the decision. The
//! source drains and seals in [`crate::owner`]; its way back is a takeover too, and finds its own seal.
//!
//! A takeover that gives up leaves a destination behind: it hears the next seal, or takes over again if the log has decided
//! for it already. Invariant: no two takeovers of one destination want the epoch under the same lease.

use std::collections::BTreeMap;

use hearth_protocol::{Epoch, Incarnation, LeaseId, NodeId};

use crate::mutants::{Mutant, Rules};
use hearth_protocol::aggregate::Aggregate;

use crate::takeover::{Mode, Takeover};

/// Writes held for one image before the cut-over; QEMU sends none before the source has stopped, so more than a queue's
/// depth is a client that must not be here.
pub const HELD_WRITES_MAX: u32 = 256;

/// Why a destination does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Denial {
    /// The bound is reached.
    #[error(
        "{HELD_WRITES_MAX} writes wait for the source to hand over: pause the source at pre-switchover and hand over, or \
         detach here"
    )]
    Full,
    /// The seal is of another epoch than the log's.
    #[error("the source sealed epoch {sealed}, the log is at epoch {current}: the source is not the owner any more")]
    OtherEpoch {
        /// What was sealed.
        sealed: Epoch,
        /// The log's.
        current: Epoch,
    },
}

/// What becomes of a client's write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// It waits.
    Waits,
    /// The client is taken for the source's end. Only with a broken rule.
    Begins(Box<Takeover>),
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Incoming {
    me: NodeId,
    rules: Rules,
    /// Of the next takeover.
    lease: LeaseId,
    held: u32,
    /// What a source sealed last, with the lives of the members' stores in its session.
    handed: Option<Handed>,
}

type Handed = ((Epoch, LeaseId), BTreeMap<NodeId, Incarnation>);

impl Incoming {
    /// A destination; `lease` is drawn anew for each one, and those that follow it are of no other.
    pub fn new(me: NodeId, rules: Rules, lease: LeaseId) -> Self {
        Self {
            me,
            rules,
            lease,
            held: 0,
            handed: None,
        }
    }

    /// Writes that wait.
    pub fn held(&self) -> u32 {
        self.held
    }

    /// A client writes here.
    ///
    /// # Errors
    /// Too many wait.
    pub fn write(&mut self, log: &Aggregate) -> Result<Held, Denial> {
        if self.held >= HELD_WRITES_MAX {
            return Err(Denial::Full);
        }
        self.held += 1;
        if self.rules.breaks(Mutant::HandoverFromConnect) {
            let takeover = self.takeover(log, (log.record.grant(), BTreeMap::new()));
            return Ok(Held::Begins(Box::new(takeover)));
        }
        Ok(Held::Waits)
    }

    /// The source has drained and durably sealed; `log` is what counts.
    ///
    /// # Errors
    /// The source sealed another epoch than the log's last.
    pub fn sealed(
        &mut self,
        sealed: (Epoch, LeaseId),
        stores: BTreeMap<NodeId, Incarnation>,
        log: &Aggregate,
    ) -> Result<Takeover, Denial> {
        if log.record.grant() != sealed {
            return Err(Denial::OtherEpoch {
                sealed: sealed.0,
                current: log.record.epoch(),
            });
        }
        let handed = (sealed, stores);
        self.handed = Some(handed.clone());
        Ok(self.takeover(log, handed))
    }

    /// Whether the log gave this node the epoch behind a seal that it has heard: the source is gone for good.
    pub fn is_decided(&self, log: &Aggregate) -> bool {
        let sealed = self.handed.as_ref().map(|((epoch, _), _)| *epoch);
        log.owner.as_ref() == Some(&self.me) && sealed.is_some_and(|sealed| log.record.epoch() > sealed)
    }

    /// The next takeover of an image that the log has decided for this node and that did not open.
    pub fn again(&mut self, log: &Aggregate) -> Option<Takeover> {
        let handed = self.handed.clone().filter(|_| self.is_decided(log))?;
        Some(self.takeover(log, handed))
    }

    fn takeover(&mut self, log: &Aggregate, (sealed, stores): Handed) -> Takeover {
        let lease = self.lease;
        self.lease = LeaseId(lease.0.wrapping_add(1));
        let mode = Mode::Handover { sealed, stores };
        Takeover::new(self.me.clone(), self.rules, lease, mode, log.clone())
    }
}
