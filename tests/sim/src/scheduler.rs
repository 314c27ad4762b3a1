//! One scheduler: the production fold and decisions over the simulated log, and whether it leads.
//!
//! It keeps an event log and now and then a snapshot of its state, as the scheduler does, and starts again from these. It
//! leads from the moment its own term comes back from the log until another one does.

use std::collections::VecDeque;
use std::sync::Arc;

use hearth_protocol::chain::Hash;
use hearth_protocol::{Envelope, Event as Fact, Incarnation, Publisher, SchedulerId, Seq, Term};
use scheduler_core::{DigestBook, DigestCheck, Judged, State};

use crate::event::Event;
use crate::log::Entry;
use crate::reports::Reports;

/// A snapshot and where it was taken.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Behind so many entries.
    pub read: usize,
    /// The state.
    pub bytes: Vec<u8>,
}

/// Whether it leads. Times are the simulation's.
#[derive(Debug)]
pub enum Role {
    /// It folds, and campaigns when no sign of a leader came for a while.
    Following,
    /// Its term stands in the log.
    Leading {
        /// Which.
        term: Term,
        /// Its last own tick; the next one waits until this one came back.
        ticked: Seq,
        /// Something else came before a tick; nothing is compared again until the log has passed this one.
        lost_behind: Option<Seq>,
        /// Since when a tick is due and waits for the log.
        waits_us: Option<u64>,
    },
}

/// What it publishes.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// What.
    pub fact: Fact,
    /// The last entry on the leadership subjects, of a term or a tick.
    pub expecting: Option<Seq>,
}

/// What folding one entry did.
#[derive(Debug, Default)]
pub struct Step {
    /// A term or a tick that counts.
    pub leader_sign: bool,
    /// A term began: which, and whether this process won it.
    pub term_started: Option<(Term, bool)>,
    /// A tick of this term counts: its leader decides now.
    pub decide: Option<Term>,
    /// The digests behind it, when they are due.
    pub digests: Option<(Hash, Hash)>,
}

/// A running scheduler.
#[derive(Debug)]
pub struct Process {
    /// Counts starts.
    pub life: u64,
    /// Its start.
    pub incarnation: Incarnation,
    /// The production state.
    pub state: State,
    book: DigestBook,
    /// How many entries it has folded.
    pub read: usize,
    /// The last entry on the leadership subjects that it has read.
    pub last_lead: Seq,
    /// How many heat reports of the stream it has read.
    pub heard: usize,
    /// Reports not folded yet.
    pub reports: Reports,
    /// Numbers what it publishes.
    pub numbers: u64,
    /// Whether it leads.
    pub role: Role,
    /// When it campaigns or ticks next.
    pub due_us: u64,
    /// The log ends before what it has read.
    pub frozen: bool,
    /// What is to be published after what is under way.
    pub todo: VecDeque<Outgoing>,
    /// Something is being published; until its end it reads nothing.
    pub waits: bool,
    /// Published without an answer; sent again before anything else is.
    pub in_doubt: Option<(Envelope, Outgoing)>,
    /// The tick from which on a snapshot is due, and one that waits until its digest stands in the log.
    snapshot_at: u64,
    taken: Option<Snapshot>,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    /// Its name.
    pub id: SchedulerId,
    /// Its process, while it runs.
    pub process: Option<Process>,
    /// Whether it is stopped, and what happened to it meanwhile.
    pub stopped: Option<Vec<Event>>,
    /// It does not reach the log.
    pub cut: bool,
    /// Counts starts.
    pub starts: u64,
    /// How many entries its event log holds.
    pub kept: usize,
    /// Its newest snapshot.
    pub snapshot: Option<Snapshot>,
    /// What its wall clock is off, in milliseconds.
    pub off_ms: i64,
}

impl Scheduler {
    /// One that never ran.
    pub fn new(number: usize) -> Self {
        Self {
            id: format!("s{number}").parse().expect("a scheduler's name"),
            process: None,
            stopped: None,
            cut: false,
            starts: 0,
            kept: 0,
            snapshot: None,
            off_ms: 0,
        }
    }

    /// Its process, if it runs and is not stopped.
    pub fn running(&self) -> Option<&Process> {
        self.process.as_ref().filter(|_| self.stopped.is_none())
    }
}

impl Process {
    /// A process that goes on from a snapshot, or from nothing.
    ///
    /// # Errors
    /// The snapshot cannot be read.
    pub fn new(life: u64, snapshot: Option<&Snapshot>) -> Result<Self, String> {
        let mut process = Self {
            life,
            incarnation: Incarnation(u128::from(life)),
            state: State::default(),
            book: DigestBook::default(),
            read: 0,
            last_lead: Seq(0),
            heard: 0,
            reports: Reports::default(),
            numbers: 0,
            role: Role::Following,
            due_us: 0,
            frozen: false,
            todo: VecDeque::new(),
            waits: false,
            in_doubt: None,
            snapshot_at: 0,
            taken: None,
        };
        if let Some(snapshot) = snapshot {
            process.state = State::decode(&snapshot.bytes)?;
            process.read = snapshot.read;
            // Snapshots are taken behind ticks.
            process.last_lead = Seq(snapshot.read as u64);
            process.book.note(&process.state);
        }
        Ok(process)
    }

    /// The term it leads.
    pub fn leads(&self) -> Option<Term> {
        match self.role {
            Role::Leading { term, .. } => Some(term),
            Role::Following => None,
        }
    }

    /// Folds the next entry.
    ///
    /// # Errors
    /// It judges it otherwise than the log, or its digest is not what the leader recorded.
    pub fn take(&mut self, me: &SchedulerId, entry: &Arc<Entry>, snapshot_ticks: u64) -> Result<Step, String> {
        self.read += 1;
        let seq = Seq(self.read as u64);
        let Entry { envelope, event, .. } = &**entry;
        if let Fact::TermStarted { .. } | Fact::Ticked { .. } = event {
            self.last_lead = seq;
        }
        let applied = self.state.apply(seq, envelope, event);
        if (applied.judged == Judged::Valid) != entry.counts {
            return Err(format!(
                "{me}: {seq} is {:?} here, and counts: {}",
                applied.judged, entry.counts
            ));
        }
        let mut step = Step::default();
        if applied.digest {
            step.digests = Some(self.book.note(&self.state));
            let tick = self.state.tick().0;
            if tick >= self.snapshot_at {
                self.snapshot_at = tick + snapshot_ticks;
                self.taken = Some(Snapshot {
                    read: self.read,
                    bytes: self.state.encode(),
                });
            }
        }
        if applied.judged != Judged::Valid {
            return Ok(step);
        }
        match event {
            Fact::TermStarted { term, .. } => {
                let mine = envelope.publisher == Publisher::Scheduler(me.clone());
                step.leader_sign = true;
                step.term_started = Some((*term, mine && envelope.incarnation == self.incarnation));
            }
            Fact::Ticked { term, .. } => {
                step.leader_sign = true;
                step.decide = applied.decide.then_some(*term);
            }
            Fact::DigestRecorded {
                at, state, decisions, ..
            } => match self.book.check(*at, state, decisions) {
                DigestCheck::Same | DigestCheck::Unknown => {}
                differs => return Err(format!("{me}: the digest of {at} recorded at {seq}: {differs:?}")),
            },
            Fact::HeatFolded(heat) => self.reports.folded(heat),
            _ => {}
        }
        Ok(step)
    }

    /// The snapshot whose digest stands in the log now, if an entry records it.
    pub fn sealed(&mut self, entry: &Entry) -> Option<Snapshot> {
        let Fact::DigestRecorded { at, .. } = &entry.event else {
            return None;
        };
        let recorded = |taken: &mut Snapshot| entry.counts && taken.read as u64 == at.0;
        self.taken.take_if(recorded)
    }
}
