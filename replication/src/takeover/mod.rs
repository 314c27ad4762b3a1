//! How a node becomes the owner: ask, publish the next epoch, raise the fence everywhere, make equal, wait, open.
//!
//! Invariants:
//! - It starts only from a member of the newest record found, and the log has that record; else the log lost its end.
//! - The blocks in doubt are those the members name *behind* the fence, and they are equal and durable before it opens.
//! - It opens when every member of its record has recorded it, and either the old owner's seal of the epoch before is known,
//!   or there was none before, or 1.25 T have passed since the last member recorded it.
//! - A member that may have lost acknowledged writes is copied from only if every member of the newest record may have.
//! - What was acknowledged is given up only where an operator forced it, and only if no copy of the newest record answers.
//!
//! It gives up with a reason rather than go on from less; then another one, under another lease, may begin. An earlier
//! epoch of the same node counts as a seal only if it was sealed: an epoch that was granted may never have opened, and then
//! the one before it may still answer reads.

mod force;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId};

pub use self::words::{Input, Output, Setback};
use crate::mutants::{Mutant, Rules};
use crate::owner::Owner;
use crate::request::{Answer, Bytes, Extent, Nodes, Refusal, Reply, Request, RequestId, Stamp, Standing, Work};
use crate::time::{BootMs, TAKEOVER_WAIT_MS};
use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::{Age, Record, Run};

/// Why it is known that the old owner answers nobody.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// It is not known: a takeover after a fault.
    Fault,
    /// It is not known either, and an operator accepted that what this node's copy does not have is given up.
    Forced,
    /// The source of a live migration handed over this sealed epoch and the lives of its members' stores. Its guest goes
    /// on, so nothing that was acknowledged may be missing.
    Handover {
        /// What it sealed.
        sealed: (Epoch, LeaseId),
        /// The stores.
        stores: BTreeMap<NodeId, Incarnation>,
    },
}

/// Blocks of one run to be made equal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Unequal {
    block: BlockIndex,
    from: NodeId,
    to: Nodes,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Phase {
    Asking,
    Proposed,
    Installing,
    /// The last of the list is under way: read first, then written to `waiting`.
    Equalizing {
        left: Vec<Unequal>,
        reading: bool,
        waiting: Nodes,
    },
    Flushing {
        waiting: Nodes,
    },
    Waiting,
    Over,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Takeover {
    me: NodeId,
    rules: Rules,
    lease: LeaseId,
    mode: Mode,
    /// The log's record that is to be replaced, and what was before it.
    log: Aggregate,
    told: BTreeMap<NodeId, Standing>,
    to: Option<Arc<Record>>,
    raised: BTreeMap<NodeId, Standing>,
    raised_at: BootMs,
    next: RequestId,
    phase: Phase,
}

impl Takeover {
    /// Begins: ask every node for its standing and bring the answers. `lease` is drawn anew for each one.
    pub fn new(me: NodeId, rules: Rules, lease: LeaseId, mode: Mode, log: Aggregate) -> Self {
        Self {
            me,
            rules,
            lease,
            mode,
            log,
            told: BTreeMap::new(),
            to: None,
            raised: BTreeMap::new(),
            raised_at: BootMs(0),
            next: RequestId(1),
            phase: Phase::Asking,
        }
    }

    /// The same one, begun anew over a newer record: nothing was published yet.
    pub fn over(self, log: Aggregate) -> Self {
        Self::new(self.me, self.rules, self.lease, self.mode, log)
    }

    /// Whether a record in the log is another grant than the one that is to be replaced.
    pub fn is_rivalled(&self, record: &Record) -> bool {
        record.grant() != self.log.record.grant()
    }

    /// The lease that it wants the epoch for.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// Whether an operator forced it.
    pub fn is_forced(&self) -> bool {
        self.mode == Mode::Forced
    }

    /// Whether it still asks.
    pub fn is_asking(&self) -> bool {
        self.phase == Phase::Asking
    }

    /// Whether it only waits for time to pass.
    pub fn is_waiting(&self) -> bool {
        self.phase == Phase::Waiting
    }

    /// When it opens if nothing else happens; `None` while it waits for something else than time.
    pub fn opens_at(&self) -> Option<BootMs> {
        self.is_waiting().then(|| self.raised_at.after(TAKEOVER_WAIT_MS))
    }

    /// Takes an input; `now` is this node's boot-time clock.
    pub fn step(&mut self, now: BootMs, input: Input) -> Vec<Output> {
        let stepped = match input {
            Input::Told { from, standing } => {
                if self.phase == Phase::Asking {
                    self.told.insert(from, standing);
                }
                Ok(Vec::new())
            }
            Input::Reached if self.phase == Phase::Asking => self.publish(),
            Input::Reached => Ok(Vec::new()),
            Input::Committed(record) => self.committed(record),
            Input::Reply { from, reply } => self.reply(now, from, reply),
            Input::MemberFailed(node) => match &self.to {
                Some(to) if to.members().contains(&node) => Err(Setback::MemberLost { node }),
                _ => {
                    self.told.remove(&node);
                    Ok(Vec::new())
                }
            },
            Input::Tick => Ok(Vec::new()),
        };
        if self.phase == Phase::Over {
            return Vec::new();
        }
        match stepped {
            Ok(mut out) => {
                self.open(now, &mut out);
                out
            }
            Err(setback) => {
                self.phase = Phase::Over;
                vec![Output::GivenUp(setback)]
            }
        }
    }

    fn reply(&mut self, now: BootMs, from: NodeId, reply: Reply) -> Result<Vec<Output>, Setback> {
        match reply {
            Reply::Answered { id, stamp, answer } => self.answered(from, id, stamp, answer),
            Reply::Raised(standing) => self.raised(now, from, standing),
            Reply::NotRaised { stamp, .. } if self.to.as_ref().is_none_or(|to| to.stamp() != stamp) => Ok(Vec::new()),
            Reply::NotRaised { refusal, .. } => match refusal {
                Refusal::EpochEnded { .. } | Refusal::OtherLease { .. } => Err(Setback::Overtaken),
                Refusal::GrantedOverOlder { .. } => Err(Setback::RolledBack { node: from }),
                _ => Err(Setback::MemberLost { node: from }),
            },
        }
    }

    /// Chooses the members and proposes the next epoch.
    fn publish(&mut self) -> Result<Vec<Output>, Setback> {
        for (node, standing) in &self.told {
            let Some(record) = &standing.record else { continue };
            if !self.log.knows(record) && !self.rules.breaks(Mutant::OlderRecordTaken) {
                return Err(Setback::RolledBack { node: node.clone() });
            }
        }
        if self.mode == Mode::Forced {
            let (to, taken) = self.forced()?;
            return Ok(self.propose(to, Some(taken)));
        }
        let usable: Nodes = self
            .told
            .iter()
            .filter(|(_, standing)| !standing.failed && standing.record.is_some())
            .map(|(node, _)| node.clone())
            .collect();
        for run in self.log.record.runs() {
            self.sound(run, &self.told)?;
        }
        let no_member = |first| Setback::NoMember {
            first,
            members: self.log.record.members().into_iter().collect(),
        };
        let to = self
            .log
            .record
            .granted(self.lease, &usable)
            .map_err(|_| no_member(BlockIndex(0)))?;
        Ok(self.propose(to, None))
    }

    fn propose(&mut self, to: Record, stale: Option<Stamp>) -> Vec<Output> {
        let to = Arc::new(to);
        self.to = Some(to.clone());
        self.phase = Phase::Proposed;
        vec![Output::Publish(Change {
            by: self.me.clone(),
            from: self.log.record.stamp(),
            to,
            stale,
        })]
    }

    /// The member of a run of the old record that the others are made equal to.
    fn sound(&self, run: &Run, standings: &BTreeMap<NodeId, Standing>) -> Result<NodeId, Setback> {
        let first = run.first;
        let here: Vec<(&NodeId, &Standing)> = run
            .members
            .iter()
            .filter_map(|node| standings.get_key_value(node))
            .filter(|(_, standing)| !standing.failed && standing.record.is_some())
            .collect();
        if here.is_empty() {
            return Err(Setback::NoMember {
                first,
                members: run.members.iter().cloned().collect(),
            });
        }
        if let Some((node, _)) = here.iter().find(|(node, standing)| !self.lost(run, node, standing)) {
            return Ok((*node).clone());
        }
        if matches!(self.mode, Mode::Handover { .. }) && !self.rules.breaks(Mutant::GapTaken) {
            return Err(Setback::Gap { first });
        }
        let missing: Vec<NodeId> = run
            .members
            .iter()
            .filter(|node| !standings.contains_key(*node))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(Setback::InDoubt { first, missing });
        }
        let set_version = |node: &NodeId| {
            let record = self.told.get(node).and_then(|standing| standing.record.as_ref());
            record.map(|record| record.stamp())
        };
        // The newest record; of equals the lowest id.
        let mut best = here[0].0;
        for (node, _) in &here[1..] {
            if set_version(node) > set_version(best) {
                best = node;
            }
        }
        Ok(best.clone())
    }

    /// Whether a member may miss acknowledged writes to a run. What it has marked elsewhere says nothing of this run: it may
    /// have left those blocks long ago.
    fn lost(&self, run: &Run, node: &NodeId, standing: &Standing) -> bool {
        let other_store = match &self.mode {
            Mode::Fault | Mode::Forced => false,
            Mode::Handover { stores, .. } => stores.get(node).is_some_and(|store| *store != standing.store),
        };
        let marked = if other_store { &standing.doubt } else { &standing.lost };
        let next = self.log.record.runs().iter().map(|other| other.first);
        let next = next.filter(|first| *first > run.first).min();
        marked
            .range(run.first..)
            .next()
            .is_some_and(|block| next.is_none_or(|next| *block < next))
    }

    fn committed(&mut self, record: Arc<Record>) -> Result<Vec<Output>, Setback> {
        let overtaken = match &self.to {
            None => record.age(&self.log.record) != Age::Same,
            Some(to) => !matches!(record.age(to), Age::Same | Age::Older),
        };
        if overtaken {
            return Err(Setback::Overtaken);
        }
        match &self.to {
            Some(to) if *to == record && self.phase == Phase::Proposed => {
                self.phase = Phase::Installing;
                let over = self.log.record.stamp();
                let raise = |to| Output::Raise {
                    to,
                    record: record.clone(),
                    over,
                };
                Ok(record.members().into_iter().map(raise).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn raised(&mut self, now: BootMs, from: NodeId, standing: Standing) -> Result<Vec<Output>, Setback> {
        let Some(to) = self.to.clone() else {
            return Ok(Vec::new());
        };
        if self.phase != Phase::Installing || standing.record.as_ref() != Some(&to) {
            return Ok(Vec::new());
        }
        self.raised.insert(from, standing);
        if !to.members().iter().all(|node| self.raised.contains_key(node)) {
            return Ok(Vec::new());
        }
        self.raised_at = now;
        let mut left = Vec::new();
        let mut behind = None;
        // A copy that was forced is alone: there is nothing to make equal.
        let runs = if self.mode == Mode::Forced {
            &[]
        } else {
            self.log.record.runs()
        };
        for run in runs.iter().rev() {
            let from = self.sound(run, &self.raised)?;
            let members = to.members_of(Extent::block(run.first));
            let mut doubt: BTreeSet<BlockIndex> = BTreeSet::new();
            for node in &members {
                let marked = self.raised.get(node).map(|standing| standing.doubt.clone());
                doubt.extend(marked.unwrap_or_default());
            }
            let within = |block: &BlockIndex| *block >= run.first && behind.is_none_or(|next| *block < next);
            for block in doubt.into_iter().filter(within) {
                let mut to = members.clone();
                to.remove(&from);
                let from = from.clone();
                left.push(Unequal { block, from, to });
            }
            behind = Some(run.first);
        }
        if left.is_empty() || self.rules.breaks(Mutant::DoubtIgnored) {
            self.phase = Phase::Waiting;
            return Ok(Vec::new());
        }
        Ok(self.read_next(left))
    }

    fn read_next(&mut self, left: Vec<Unequal>) -> Vec<Output> {
        let Some(next) = left.last() else {
            if self.rules.breaks(Mutant::EqualUnflushed) {
                self.phase = Phase::Waiting;
                return Vec::new();
            }
            let waiting: Nodes = self.raised.keys().cloned().collect();
            let keep = BTreeSet::new();
            let out = self.ask(&waiting, &Work::Flush { keep }, &Bytes::None);
            self.phase = Phase::Flushing { waiting };
            return out;
        };
        let out = self.ask(
            &Nodes::from([next.from.clone()]),
            &Work::Read(Extent::block(next.block)),
            &Bytes::None,
        );
        self.phase = Phase::Equalizing {
            left,
            reading: true,
            waiting: Nodes::new(),
        };
        out
    }

    /// Sends one request, under one number, to some members.
    fn ask(&mut self, nodes: &Nodes, work: &Work, bytes: &Bytes) -> Vec<Output> {
        self.next = RequestId(self.next.0 + 1);
        let Some(to) = &self.to else { return Vec::new() };
        let send = |(node, standing): (&NodeId, &Standing)| Output::Send {
            to: node.clone(),
            request: Request {
                id: self.next,
                stamp: to.stamp(),
                store: standing.store,
                work: work.clone(),
            },
            bytes: bytes.clone(),
        };
        let asked = self.raised.iter().filter(|(node, _)| nodes.contains(*node));
        asked.map(send).collect()
    }

    fn answered(&mut self, from: NodeId, id: RequestId, stamp: Stamp, answer: Answer) -> Result<Vec<Output>, Setback> {
        if id != self.next || self.to.as_ref().is_none_or(|to| to.stamp() != stamp) {
            return Ok(Vec::new());
        }
        if answer != Answer::Done {
            return Err(Setback::MemberLost { node: from });
        }
        match &mut self.phase {
            Phase::Equalizing { left, reading, waiting } => {
                if *reading {
                    let Some(next) = left.last() else { return Ok(Vec::new()) };
                    let (to, block) = (next.to.clone(), next.block);
                    if !to.is_empty() {
                        *reading = false;
                        *waiting = to.clone();
                        let extent = Extent::block(block);
                        let bytes = Bytes::OfAnswer { from, id };
                        return Ok(self.ask(&to, &Work::Write { extent, fua: false }, &bytes));
                    }
                } else {
                    waiting.remove(&from);
                    if !waiting.is_empty() {
                        return Ok(Vec::new());
                    }
                }
                let mut left = std::mem::take(left);
                left.pop();
                Ok(self.read_next(left))
            }
            Phase::Flushing { waiting } => {
                waiting.remove(&from);
                if waiting.is_empty() {
                    self.phase = Phase::Waiting;
                }
                Ok(Vec::new())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Opens once nobody else can answer.
    fn open(&mut self, now: BootMs, out: &mut Vec<Output>) {
        let (Phase::Waiting, Some(to)) = (&self.phase, &self.to) else {
            return;
        };
        let grant = Some(self.log.record.grant());
        let sealed = match &self.mode {
            Mode::Handover { sealed, .. } => Some(*sealed) == grant,
            Mode::Fault | Mode::Forced => false,
        } || self
            .told
            .values()
            .chain(self.raised.values())
            .any(|standing| standing.sealed == grant);
        let own = self.rules.breaks(Mutant::OwnEpochSeals) && self.log.owner.as_ref() == Some(&self.me);
        // Every member of the first record has told that it knows no other, and who ever owned it had them all record his.
        let first = self.log.owner.is_none() && self.log.record.epoch() == Epoch(0);
        let waited = now >= self.raised_at.after(TAKEOVER_WAIT_MS);
        if !sealed && !waited && !own && !first && !self.rules.breaks(Mutant::NoWait) {
            return;
        }
        let stores = self
            .raised
            .iter()
            .map(|(node, standing)| (node.clone(), standing.store));
        let next = RequestId(self.next.0 + 1);
        let owner = Owner::open(self.me.clone(), self.rules, to.clone(), stores.collect(), next);
        self.phase = Phase::Over;
        out.push(Output::Opened(Box::new(owner)));
    }
}
