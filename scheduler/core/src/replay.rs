//! Replay: folds a log from its start, or from a snapshot, and checks that its decisions and digests follow from it.
//!
//! After each valid tick the decision is made again; the `CommandGiven` events that carry that tick must be its
//! commands, in order. Recorded digests are compared with the ones computed here. Nothing is trusted but the events.
//!
//! A leader that dies between a tick and its last command leaves commands *withheld*: that is no difference, and is
//! counted by itself.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::chain::hex;
use hearth_protocol::{Command, Envelope, Event, Message, Seq, Term, TickNo, WallMs};
use serde::{Deserialize, Serialize};

use crate::digest::{DigestBook, DigestCheck};
use crate::state::{Applied, Judged, State};

/// Differences kept in a report; all are counted.
const DIFFERENCES_MAX: usize = 16;

/// Ticks for which undelivered decisions are waited for: a leader publishes them in order, within a few ticks.
const PENDING_TICKS: u64 = 8;

/// Where a replay ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Until {
    /// With the log.
    #[default]
    End,
    /// After this log position.
    Seq(Seq),
    /// Before the first tick that is later than this: the state as of that time.
    Time(WallMs),
}

/// What a step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The event was folded, with this result.
    Folded {
        /// Its envelope.
        envelope: Envelope,
        /// The event.
        event: Box<Event>,
        /// What [`State::apply`] said.
        applied: Applied,
    },
    /// The message is no event of ours: kept in the log, skipped by every fold.
    Foreign,
    /// The end that was asked for is reached: the message was not folded, and none will be.
    Stopped,
}

/// One place where the log does not follow from its prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "difference", rename_all = "snake_case")]
pub enum Difference {
    /// A command is not the one that follows from its tick.
    Command {
        /// Position of the command in the log.
        seq: Seq,
        /// Position of the tick that should have decided it; `None` if that tick was not seen.
        tick_seq: Option<Seq>,
        /// What follows; `None` if nothing more does.
        derived: Option<Box<Command>>,
        /// What the log says.
        logged: Box<Command>,
    },
    /// A recorded digest of the state is not the one computed here.
    State {
        /// Position of the record.
        seq: Seq,
        /// The position it covers.
        at: Seq,
        /// Computed, hexadecimal.
        derived: String,
        /// Recorded, hexadecimal.
        logged: String,
    },
    /// A recorded digest of the decisions is not the one computed here.
    Decisions {
        /// Position of the record.
        seq: Seq,
        /// The position it covers.
        at: Seq,
        /// Computed, hexadecimal.
        derived: String,
        /// Recorded, hexadecimal.
        logged: String,
    },
}

/// What a replay found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplayReport {
    /// First and last position folded; 0 if none was.
    pub first: Seq,
    /// See `first`.
    pub last: Seq,
    /// Events folded, void ones and repeats included.
    pub events: u64,
    /// Void events.
    pub void: u64,
    /// Repeats.
    pub repeats: u64,
    /// Messages that are no event of ours; the first of them.
    pub foreign: u64,
    /// Position of the first foreign message and the decoder's complaint.
    pub first_foreign: Option<(Seq, String)>,
    /// Ticks decided again.
    pub ticks: u64,
    /// Commands that the log holds and that follow from it.
    pub commands_same: u64,
    /// Commands that follow from the log but were never given: their leader stopped first.
    pub commands_withheld: u64,
    /// Digests that agree.
    pub digests_same: u64,
    /// Digests at positions where none was computed here.
    pub digests_unchecked: u64,
    /// Differences, all of them counted.
    pub differences_total: u64,
    /// The first differences.
    pub differences: Vec<Difference>,
    /// The newest digest computed: position, state, decisions; hexadecimal.
    pub newest_digest: Option<(Seq, String, String)>,
}

impl ReplayReport {
    /// Whether everything in the log follows from it.
    pub fn is_sound(&self) -> bool {
        self.differences_total == 0
    }
}

#[derive(Debug, Clone)]
struct Pending {
    term: Term,
    seq: Seq,
    commands: VecDeque<Command>,
}

/// See the module. Feed it the log in order with [`Replayer::step`].
#[derive(Debug, Clone, Default)]
pub struct Replayer {
    state: State,
    until: Until,
    stopped: bool,
    book: DigestBook,
    pending: BTreeMap<TickNo, Pending>,
    report: ReplayReport,
}

impl Replayer {
    /// A replay from nothing.
    pub fn new(until: Until) -> Self {
        Self {
            until,
            ..Self::default()
        }
    }

    /// A replay that goes on from a state right after a tick with its digests due, as snapshots are taken: what
    /// follows from that very tick is expected behind it.
    pub fn from_snapshot(state: State, until: Until) -> Self {
        let mut replayer = Self {
            until,
            ..Self::default()
        };
        replayer.skip_to(state);
        replayer
    }

    /// Leaves out a part of the log: goes on from a snapshot behind it, as [`Replayer::from_snapshot`]. What was
    /// decided before and not given yet is not asked for any more.
    pub fn skip_to(&mut self, state: State) {
        self.pending.clear();
        self.state = state;
        self.derive(self.state.seq(), true, true);
    }

    /// The state so far.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What was found so far.
    pub fn report(&self) -> &ReplayReport {
        &self.report
    }

    /// Ends the replay: what was decided and never given is counted as withheld.
    pub fn finish(mut self) -> (State, ReplayReport) {
        self.give_up_before(TickNo(u64::MAX));
        (self.state, self.report)
    }

    /// Takes the next message of the log.
    pub fn step(&mut self, seq: Seq, message: &Message) -> Step {
        if self.stopped || matches!(self.until, Until::Seq(last) if seq > last) {
            self.stopped = true;
            return Step::Stopped;
        }
        let decoded = message.envelope().and_then(|e| Ok((e, message.event()?)));
        let (envelope, event) = match decoded {
            Ok(decoded) => decoded,
            Err(error) => {
                self.report.foreign += 1;
                self.report
                    .first_foreign
                    .get_or_insert_with(|| (seq, error.to_string()));
                return Step::Foreign;
            }
        };
        if let (Event::Ticked { time, .. }, Until::Time(end)) = (&event, self.until)
            && *time > end
        {
            self.stopped = true;
            return Step::Stopped;
        }
        let applied = self.state.apply(seq, &envelope, &event);
        if self.report.events == 0 {
            self.report.first = seq;
        }
        self.report.last = seq;
        self.report.events += 1;
        match applied.judged {
            Judged::Void(_) => self.report.void += 1,
            Judged::Repeat | Judged::Behind => self.report.repeats += 1,
            Judged::Valid => self.check(seq, &event, applied),
        }
        Step::Folded {
            envelope,
            event: Box::new(event),
            applied,
        }
    }

    fn derive(&mut self, seq: Seq, decide: bool, digest: bool) {
        if decide {
            let tick = self.state.tick();
            self.report.ticks += 1;
            self.give_up_before(TickNo(tick.0.saturating_sub(PENDING_TICKS)));
            let commands: VecDeque<_> = self.state.decide().into();
            let term = self.state.term();
            self.pending.insert(tick, Pending { term, seq, commands });
        }
        if digest {
            let (state, decisions) = self.book.note(&self.state);
            self.report.newest_digest = Some((seq, hex(&state), hex(&decisions)));
        }
    }

    fn check(&mut self, seq: Seq, event: &Event, applied: Applied) {
        self.derive(seq, applied.decide, applied.digest);
        match event {
            Event::CommandGiven(command) => self.check_command(seq, command),
            Event::DigestRecorded {
                at, state, decisions, ..
            } => match self.book.check(*at, state, decisions) {
                DigestCheck::Same => self.report.digests_same += 1,
                DigestCheck::Unknown => self.report.digests_unchecked += 1,
                DigestCheck::StateDiffers { here } => self.differs(Difference::State {
                    seq,
                    at: *at,
                    derived: hex(&here),
                    logged: hex(state),
                }),
                DigestCheck::DecisionsDiffer { here } => self.differs(Difference::Decisions {
                    seq,
                    at: *at,
                    derived: hex(&here),
                    logged: hex(decisions),
                }),
            },
            _ => {}
        }
    }

    fn check_command(&mut self, seq: Seq, logged: &Command) {
        let pending = self.pending.get_mut(&logged.tick).filter(|p| p.term == logged.term);
        let tick_seq = pending.as_ref().map(|p| p.seq);
        match pending.and_then(|p| p.commands.pop_front()) {
            Some(derived) if derived == *logged => self.report.commands_same += 1,
            derived => self.differs(Difference::Command {
                seq,
                tick_seq,
                derived: derived.map(Box::new),
                logged: Box::new(logged.clone()),
            }),
        }
    }

    fn differs(&mut self, difference: Difference) {
        self.report.differences_total += 1;
        if self.report.differences.len() < DIFFERENCES_MAX {
            self.report.differences.push(difference);
        }
    }

    fn give_up_before(&mut self, tick: TickNo) {
        let keep = self.pending.split_off(&tick);
        for pending in std::mem::replace(&mut self.pending, keep).into_values() {
            self.report.commands_withheld += pending.commands.len() as u64;
        }
    }
}
