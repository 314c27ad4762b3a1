//! One replica: its durable record, and the fence.
//!
//! Every request is admitted under the durable record or refused, one by one. A newer record stops admission, waits until
//! every admitted request has finished or failed, is made durable, and only then counts and is answered. So once a member
//! has answered a raise, nothing of an older record will ever change its blocks.
//!
//! It is not the disk: whoever drives it carries out [`Output::Perform`] and [`Output::Persist`] and reports their end. A
//! member that starts again after a crash is made anew from what the disk holds.

mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId};
use serde::{Deserialize, Serialize};

pub use self::words::{Input, Output};
use crate::mutants::{Mutant, Rules};
use crate::request::{Answer, Bytes, Hashes, Nodes, Refusal, Request, RequestId, Stamp, Standing, Work};
use hearth_protocol::record::{Age, Record};

/// Blocks that were written and may not be everywhere, each with the life of the store in which that was marked first.
pub type Marks = BTreeMap<BlockIndex, Incarnation>;

/// What a member keeps on disk beside its blocks and marks, replaced in one piece.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Durable {
    /// The record.
    pub record: Option<Arc<Record>>,
    /// What the owner on this node sealed.
    pub sealed: Option<(Epoch, LeaseId)>,
}

/// What a member is busy with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    Serving,
    Raising {
        to: Arc<Record>,
        askers: Nodes,
        persisting: bool,
    },
    Sealing {
        grant: (Epoch, LeaseId),
    },
    Failed,
}

/// A request under way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Admitted {
    stamp: Stamp,
    /// A flush has here what it must leave marked.
    work: Work,
    /// Marks of an earlier life that a flush makes anew.
    anew: BTreeSet<BlockIndex>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Member {
    me: NodeId,
    rules: Rules,
    store: Incarnation,
    durable: Durable,
    /// What the durable record replaced, while this node joins by it.
    before: Option<Arc<Record>>,
    marks: Marks,
    /// The last write to each marked block. Those of an earlier life count as the last of all under the record of then.
    last: BTreeMap<BlockIndex, (Stamp, RequestId)>,
    /// Requests under way.
    admitted: BTreeMap<(NodeId, RequestId), Admitted>,
    phase: Phase,
}

impl Member {
    /// A member as its disk has it; `failed` if the disk failed in an earlier life.
    pub fn new(me: NodeId, rules: Rules, store: Incarnation, durable: Durable, marks: Marks, failed: bool) -> Self {
        let then = durable
            .record
            .as_ref()
            .map(|record| (record.stamp(), RequestId(u64::MAX)));
        let last = marks.keys().filter_map(|block| Some((*block, then?))).collect();
        Self {
            me,
            rules,
            store,
            durable,
            before: None,
            marks,
            last,
            admitted: BTreeMap::new(),
            phase: if failed { Phase::Failed } else { Phase::Serving },
        }
    }

    /// The durable record.
    pub fn record(&self) -> Option<&Arc<Record>> {
        self.durable.record.as_ref()
    }

    /// The life of the store.
    pub fn store(&self) -> Incarnation {
        self.store
    }

    /// Where this node stands.
    pub fn standing(&self) -> Standing {
        Standing {
            record: self.durable.record.clone(),
            before: self.before.clone(),
            store: self.store,
            doubt: self.marks.keys().copied().collect(),
            lost: self
                .marks
                .iter()
                .filter(|(_, store)| **store != self.store)
                .map(|(block, _)| *block)
                .collect(),
            sealed: self.durable.sealed,
            failed: self.phase == Phase::Failed,
        }
    }

    /// Whether its disk failed: it takes nothing more.
    pub fn has_failed(&self) -> bool {
        self.phase == Phase::Failed
    }

    /// Whether a request would be admitted now.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, request: &Request) -> Result<(), Refusal> {
        let Some(record) = &self.durable.record else {
            return Err(Refusal::NoRecord);
        };
        if self.phase == Phase::Failed {
            return Err(Refusal::DiskFailed);
        }
        let (asked, recorded) = (request.stamp, record.stamp());
        if asked.epoch < recorded.epoch {
            return Err(Refusal::EpochEnded {
                asked: asked.epoch,
                recorded: recorded.epoch,
            });
        }
        let not_installed = Refusal::NotInstalled {
            epoch: asked.epoch,
            set_version: asked.set_version,
        };
        if asked.epoch > recorded.epoch {
            return Err(not_installed);
        }
        if asked.lease != recorded.lease && !self.rules.breaks(Mutant::EqualEpochAccepted) {
            return Err(Refusal::OtherLease { epoch: asked.epoch });
        }
        if self.durable.sealed == Some((asked.epoch, asked.lease)) {
            return Err(Refusal::Sealed { epoch: asked.epoch });
        }
        if request.store != self.store {
            return Err(Refusal::StoreChanged);
        }
        // A read lease is the epoch's: a change of the set does not end it.
        let renewal = matches!(request.work, Work::Renew { .. });
        if let Phase::Raising { to, .. } = &self.phase
            && !(renewal && to.epoch() == asked.epoch)
        {
            return Err(Refusal::Fenced {
                epoch: to.epoch(),
                set_version: to.stamp().set_version,
            });
        }
        if renewal {
            return Ok(());
        }
        if asked.set_version < recorded.set_version && !self.rules.breaks(Mutant::StaleSetServed) {
            return Err(Refusal::SetChanged {
                asked: asked.set_version,
                recorded: recorded.set_version,
            });
        }
        if asked.set_version > recorded.set_version {
            return Err(not_installed);
        }
        let in_set = match &request.work {
            Work::Read(extent) | Work::Hash(extent) => record.holds(&self.me, *extent),
            Work::Write { extent, .. } => record.concerns(&self.me, *extent),
            Work::Flush { .. } | Work::Renew { .. } => true,
        };
        if in_set { Ok(()) } else { Err(Refusal::NotInSet) }
    }

    /// Takes an input.
    pub fn step(&mut self, input: Input) -> Vec<Output> {
        match input {
            Input::Request { from, request } => self.request(from, request),
            Input::Finished { from, id, ok } => self.finished(from, id, ok),
            Input::Hashed { from, id, hashes } => self.hashed(from, id, hashes),
            Input::NoRoom { from, id } => self.no_room(from, id),
            Input::Raise { from, record, over } => self.raise(from, record, over),
            Input::Seal { grant } => self.seal(grant),
            Input::Persisted { ok } => self.persisted(ok),
            Input::Ask { from, lease } => vec![Output::Told {
                to: from,
                lease,
                standing: self.standing(),
            }],
            Input::Drop { stamp } => self.drop_copy(stamp),
        }
    }

    /// Forgets the image, unless the node was given a record meanwhile that may count on it.
    fn drop_copy(&mut self, stamp: Stamp) -> Vec<Output> {
        let older = self
            .record()
            .is_some_and(|record| record.stamp().set_version < stamp.set_version);
        if !older || self.phase != Phase::Serving || !self.admitted.is_empty() {
            return Vec::new();
        }
        self.durable = Durable::default();
        self.before = None;
        self.marks.clear();
        self.last.clear();
        vec![Output::Forget]
    }

    fn request(&mut self, from: NodeId, request: Request) -> Vec<Output> {
        let (id, stamp) = (request.id, request.stamp);
        let answered = |answer| {
            vec![Output::Answer {
                to: from.clone(),
                id,
                stamp,
                answer,
                bytes: Bytes::None,
            }]
        };
        if let Err(refusal) = self.admits(&request) {
            return answered(Answer::Refused(refusal));
        }
        let mut work = request.work;
        let mut mark = false;
        let mut anew = BTreeSet::new();
        match &mut work {
            Work::Renew { sent } => return answered(Answer::Granted { sent: *sent }),
            Work::Read(_) | Work::Hash(_) => {}
            Work::Write { extent, .. } => {
                for block in extent.blocks() {
                    mark |= !self.marks.contains_key(&block);
                    self.marks.entry(block).or_insert(self.store);
                    let last = self.last.entry(block).or_insert((stamp, id));
                    *last = (stamp, if last.0 == stamp { last.1.max(id) } else { id });
                    for other in self.admitted.values_mut() {
                        if let Work::Flush { keep } = &mut other.work {
                            keep.insert(block);
                        }
                    }
                }
            }
            Work::Flush { keep } => {
                if self.rules.breaks(Mutant::UnmarkedAlone) {
                    keep.clear();
                }
                for other in self.admitted.values() {
                    if let Work::Write { extent, .. } = &other.work {
                        keep.extend(extent.blocks());
                    }
                }
                let earlier = self.marks.iter().filter(|(_, store)| **store != self.store);
                let over = earlier.map(|(block, _)| *block).filter(|block| !keep.contains(block));
                anew = over.filter(|block| self.is_before(*block, stamp, id)).collect();
            }
        }
        let admitted = Admitted {
            stamp,
            work: work.clone(),
            anew: anew.clone(),
        };
        self.admitted.insert((from.clone(), id), admitted);
        vec![Output::Perform {
            from,
            id,
            work,
            mark,
            anew,
        }]
    }

    /// Whether the last write to a block was sent before a flush. One that was sent behind the flush may have come before
    /// it, and others may not have it yet.
    fn is_before(&self, block: BlockIndex, stamp: Stamp, id: RequestId) -> bool {
        match self.last.get(&block) {
            Some((under, last)) => *under != stamp || *last < id,
            None => true,
        }
    }

    fn finished(&mut self, from: NodeId, id: RequestId, ok: bool) -> Vec<Output> {
        let Some(Admitted { stamp, work, anew }) = self.admitted.remove(&(from.clone(), id)) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        let read = ok && matches!(work, Work::Read(_));
        let bytes = match () {
            () if read && from == self.me => Bytes::OfAnswer { from: from.clone(), id },
            () if read => Bytes::OfWork { from: from.clone(), id },
            () => Bytes::None,
        };
        if !ok {
            out.extend(self.fail());
        } else if let Work::Flush { keep } = work {
            for block in anew {
                self.marks.entry(block).and_modify(|store| *store = self.store);
            }
            let everywhere = |block: &&BlockIndex| !keep.contains(block) && self.is_before(**block, stamp, id);
            let gone: BTreeSet<_> = self.marks.keys().filter(everywhere).copied().collect();
            if !gone.is_empty() && self.phase != Phase::Failed {
                self.marks.retain(|block, _| !gone.contains(block));
                self.last.retain(|block, _| !gone.contains(block));
                out.push(Output::Unmark(gone));
            }
        }
        out.push(Output::Answer {
            to: from,
            id,
            stamp,
            answer: if ok { Answer::Done } else { Answer::Failed },
            bytes,
        });
        out.extend(self.drained());
        out
    }

    /// A block that cannot be read is no failure of the disk here: nobody waits for what it holds.
    fn hashed(&mut self, from: NodeId, id: RequestId, hashes: Hashes) -> Vec<Output> {
        let key = (from, id);
        let asked = |admitted: &Admitted| matches!(admitted.work, Work::Hash(_));
        if !self.admitted.get(&key).is_some_and(asked) {
            return Vec::new();
        }
        let Some(Admitted { stamp, .. }) = self.admitted.remove(&key) else {
            return Vec::new();
        };
        let mut out = vec![Output::Answer {
            to: key.0,
            id,
            stamp,
            answer: Answer::Hashed(hashes),
            bytes: Bytes::None,
        }];
        out.extend(self.drained());
        out
    }

    /// The blocks stay marked: what was to be written may be there in part, and elsewhere whole.
    fn no_room(&mut self, from: NodeId, id: RequestId) -> Vec<Output> {
        let key = (from, id);
        let writes = |admitted: &Admitted| matches!(admitted.work, Work::Write { .. });
        if !self.admitted.get(&key).is_some_and(writes) {
            return self.finished(key.0, id, false);
        }
        let Some(Admitted { stamp, .. }) = self.admitted.remove(&key) else {
            return Vec::new();
        };
        let mut out = vec![Output::Answer {
            to: key.0,
            id,
            stamp,
            answer: Answer::NoRoom,
            bytes: Bytes::None,
        }];
        out.extend(self.drained());
        out
    }

    fn raise(&mut self, from: NodeId, record: Arc<Record>, over: Stamp) -> Vec<Output> {
        let refused = |refusal| {
            vec![Output::NotRaised {
                to: from.clone(),
                stamp: record.stamp(),
                refusal,
            }]
        };
        let age = self.record().map_or(Age::Newer, |mine| record.age(mine));
        match age {
            _ if self.phase == Phase::Failed => return refused(Refusal::DiskFailed),
            Age::Same => {
                return vec![Output::Raised {
                    to: from,
                    standing: self.standing(),
                }];
            }
            Age::Older => {
                let recorded = self.record().map_or(record.stamp(), |mine| mine.stamp());
                return refused(if recorded.epoch == record.epoch() {
                    Refusal::SetChanged {
                        asked: record.stamp().set_version,
                        recorded: recorded.set_version,
                    }
                } else {
                    Refusal::EpochEnded {
                        asked: record.epoch(),
                        recorded: recorded.epoch,
                    }
                });
            }
            Age::Conflict if !self.rules.breaks(Mutant::EqualEpochAccepted) => {
                return refused(Refusal::OtherLease { epoch: record.epoch() });
            }
            Age::Conflict | Age::Newer => {}
        }
        let mut out = Vec::new();
        if let Some(mine) = self.record().filter(|mine| mine.grant() != record.grant()) {
            let mine = mine.stamp();
            let later = (mine.epoch, mine.set_version) > (over.epoch, over.set_version);
            let other = mine.epoch == over.epoch && mine.lease != over.lease;
            let kept = !self.rules.breaks(Mutant::StaleGrantTaken) && !self.rules.breaks(Mutant::OlderRecordTaken);
            if (later || other) && kept && age == Age::Newer {
                return refused(Refusal::GrantedOverOlder { epoch: record.epoch() });
            }
            if !self.rules.breaks(Mutant::OwnerNotTold) {
                out.push(Output::Fenced(record.epoch()));
            }
        }
        match &mut self.phase {
            Phase::Raising { to, askers, persisting } => {
                if *to != record && (*persisting || record.age(to) != Age::Newer) {
                    return refused(Refusal::Fenced {
                        epoch: to.epoch(),
                        set_version: to.stamp().set_version,
                    });
                }
                if *to != record {
                    // Whoever asked for the older one learns of it by asking again.
                    askers.clear();
                    *to = record;
                }
                askers.insert(from);
            }
            Phase::Sealing { grant } => return refused(Refusal::Sealed { epoch: grant.0 }),
            Phase::Serving | Phase::Failed => {
                self.phase = Phase::Raising {
                    to: record,
                    askers: Nodes::from([from]),
                    persisting: false,
                };
            }
        }
        out.extend(self.drained());
        out
    }

    /// Goes on to make a newer record durable once nothing admitted is under way.
    fn drained(&mut self) -> Vec<Output> {
        let late = self.rules.breaks(Mutant::LateWriteAfterFence);
        match &mut self.phase {
            Phase::Raising { to, persisting, .. } if !*persisting && (self.admitted.is_empty() || late) => {
                *persisting = true;
                vec![Output::Persist(Durable {
                    record: Some(to.clone()),
                    sealed: self.durable.sealed,
                })]
            }
            _ => Vec::new(),
        }
    }

    fn seal(&mut self, grant: (Epoch, LeaseId)) -> Vec<Output> {
        let current = self.record().is_some_and(|record| record.grant() == grant);
        if self.phase != Phase::Serving || !current {
            return vec![Output::Sealed(false)];
        }
        self.phase = Phase::Sealing { grant };
        vec![Output::Persist(Durable {
            record: self.durable.record.clone(),
            sealed: Some(grant),
        })]
    }

    fn persisted(&mut self, ok: bool) -> Vec<Output> {
        if !ok {
            return self.fail();
        }
        match std::mem::replace(&mut self.phase, Phase::Serving) {
            Phase::Raising { to, askers, .. } => {
                let joins = to.runs().iter().any(|run| run.joiners.contains(&self.me));
                self.before = self.durable.record.replace(to).filter(|_| joins);
                let standing = self.standing();
                let raised = askers.into_iter().map(|to| Output::Raised {
                    to,
                    standing: standing.clone(),
                });
                raised.collect()
            }
            Phase::Sealing { grant } => {
                self.durable.sealed = Some(grant);
                vec![Output::Sealed(true)]
            }
            // A disk that failed meanwhile: what it says now does not count.
            phase @ (Phase::Serving | Phase::Failed) => {
                self.phase = phase;
                Vec::new()
            }
        }
    }

    fn fail(&mut self) -> Vec<Output> {
        let refused = |to, stamp| Output::NotRaised {
            to,
            stamp,
            refusal: Refusal::DiskFailed,
        };
        match std::mem::replace(&mut self.phase, Phase::Failed) {
            Phase::Raising { to, askers, .. } => {
                let stamp = to.stamp();
                askers.into_iter().map(|asker| refused(asker, stamp)).collect()
            }
            Phase::Sealing { .. } => vec![Output::Sealed(false)],
            Phase::Serving | Phase::Failed => Vec::new(),
        }
    }
}
