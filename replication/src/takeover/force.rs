//! A takeover that an operator forced: from this node's copy, though it is not in the newest set, or may have lost writes.
//!
//! Invariants:
//! - It takes one copy, whole: this node's. All others, newer or not, are no members of what follows and are synced anew.
//! - It is refused where a takeover without force would do, and where a node that answers has a newer copy.
//! - The log says which record was known and which was taken; both were in it before.

use super::{Setback, Takeover};
use crate::request::{Nodes, Stamp, Standing};
use hearth_protocol::BlockIndex;
use hearth_protocol::record::{Age, Record, Run};

impl Takeover {
    /// The record to propose, and that of the copy which is taken.
    pub(super) fn forced(&self) -> Result<(Record, Stamp), Setback> {
        let works = |standing: &&Standing| !standing.failed;
        let mine = self
            .told
            .get(&self.me)
            .filter(works)
            .and_then(|standing| standing.record.clone());
        let whole = |record: &Record| record.runs().iter().all(|run| run.members.contains(&self.me));
        let Some(mine) = mine.filter(|record| whole(record)) else {
            return Err(Setback::NothingToTake);
        };
        if self
            .log
            .record
            .runs()
            .iter()
            .all(|run| self.sound(run, &self.told).is_ok())
        {
            return Err(Setback::NotNeeded);
        }
        let members = self.log.record.members();
        for (node, standing) in self
            .told
            .iter()
            .filter(|(node, standing)| **node != self.me && works(standing))
        {
            let Some(record) = &standing.record else { continue };
            let newer = record.age(&mine) == Age::Newer && record.members().contains(node);
            let counts = members.contains(node) && !members.contains(&self.me);
            if newer || counts {
                return Err(Setback::NewerThere { node: node.clone() });
            }
        }
        let stamp = Stamp {
            epoch: self.log.record.epoch().next(),
            lease: self.lease,
            set_version: self.log.record.stamp().set_version.next(),
        };
        let run = Run {
            first: BlockIndex(0),
            members: Nodes::from([self.me.clone()]),
            joiners: Nodes::new(),
        };
        let to = Record::new(stamp, vec![run]).map_err(|_| Setback::NothingToTake)?;
        Ok((to, mine.stamp()))
    }
}
