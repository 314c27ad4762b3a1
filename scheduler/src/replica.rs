//! The state as this scheduler folded it from its log, and what every scheduler watches while it folds.
//!
//! Synchronous, and without a choice of its own: whether an event counts, and what to do, is `scheduler-core`'s.

use hearth_bus::new_incarnation;
use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{Envelope, Event, Incarnation, Publisher, SchedulerId, Seq, Term, TickNo};
use scheduler_core::{DigestBook, DigestCheck, Judged, State};

use crate::log::{Content, Entry, EventLog, Head, LogError, Record};
use crate::snapshot::{self, Snapshot, Taken};

/// The folded log.
#[derive(Debug)]
pub struct Replica {
    me: SchedulerId,
    incarnation: Incarnation,
    state: State,
    book: DigestBook,
    /// The last message folded, foreign ones included, and the chain value there.
    head: Head,
    /// The last message on the leadership subjects: what the next term or tick compares with.
    last_lead: Seq,
    /// This scheduler's previous incarnation and the last seq seen of it.
    previous: Option<(Incarnation, Seq)>,
    /// The last event of this scheduler, of any incarnation.
    own_last: Option<(Incarnation, Seq)>,
    /// Ticks between two snapshots at least, the tick from which on another one is due, and one that waits for its
    /// digest to be recorded.
    snapshot_every: u64,
    snapshot_at: TickNo,
    taken: Option<Taken>,
    /// Where the snapshot was taken from which this replica went on; `None` if it folded from nothing.
    started_at: Option<Seq>,
    /// Set for good when a leader's digest differs from ours.
    diverged: Option<String>,
}

/// What one message did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Its position.
    pub seq: Seq,
    /// The verdict; `None` for a foreign message.
    pub judged: Option<Judged>,
    /// A scheduler leads: a valid term or tick.
    pub leader_sign: bool,
    /// A term began: which, and whether this very process won it.
    pub term_started: Option<(Term, bool)>,
    /// A valid tick of this term was folded: its leader decides now.
    pub decide: Option<Term>,
    /// The digests after it (state, decisions), when they are due.
    pub digests: Option<(Hash, Hash)>,
    /// The chain value after it.
    pub chain: Hash,
    /// A snapshot to keep: its position and bytes.
    pub snapshot: Option<(Seq, Vec<u8>)>,
}

/// Ticks between two snapshots at least, unless told otherwise.
pub const SNAPSHOT_EVERY_TICKS: u64 = 60;

/// Tracked blocks that put the next snapshot off by one more tick: taking one stays below a thousandth of the time.
const SNAPSHOT_BLOCKS_PER_TICK: u64 = 4_096;

impl Replica {
    /// A replica of nothing yet.
    pub fn new(me: SchedulerId) -> Self {
        Self {
            me,
            incarnation: new_incarnation(),
            state: State::default(),
            book: DigestBook::default(),
            head: Head::default(),
            last_lead: Seq(0),
            previous: None,
            own_last: None,
            snapshot_every: SNAPSHOT_EVERY_TICKS,
            snapshot_at: TickNo(SNAPSHOT_EVERY_TICKS),
            taken: None,
            started_at: None,
            diverged: None,
        }
    }

    /// A replica that starts at a snapshot.
    fn at(me: SchedulerId, snapshot: Snapshot) -> Self {
        let head = snapshot.head();
        let Snapshot { taken, state } = snapshot;
        let own_last = taken.own_last.filter(|_| taken.by == me);
        let mut replica = Self {
            // Snapshots are taken after ticks, which are published on the leadership subjects.
            last_lead: head.seq,
            started_at: Some(head.seq),
            head,
            previous: own_last,
            own_last,
            snapshot_at: TickNo(state.tick().0 + SNAPSHOT_EVERY_TICKS),
            state,
            ..Self::new(me)
        };
        replica.book.note(&replica.state);
        replica
    }

    /// Opens a log: goes on from its newest sound snapshot, else from nothing, checking the chain on the way.
    ///
    /// # Errors
    /// [`LogError::Damaged`] at the first record that does not follow from the one before, or whose payload is needed
    /// and was thinned; [`LogError::Newer`] for an event that this build cannot read.
    pub fn open(me: SchedulerId, log: &dyn EventLog) -> Result<Self, LogError> {
        let start = match snapshot::newest(log)? {
            Some(snapshot) => Self::at(me, snapshot),
            None => Self::new(me),
        };
        start.follow(log)
    }

    /// Replays a log from nothing.
    ///
    /// # Errors
    /// As [`Replica::open`].
    pub fn replay(me: SchedulerId, log: &dyn EventLog) -> Result<Self, LogError> {
        Self::new(me).follow(log)
    }

    /// Sets how many ticks at least lie between two snapshots. One is due at once if the last is older than that.
    pub fn with_snapshots_every(mut self, ticks: u64) -> Self {
        let last = self.snapshot_at.0.saturating_sub(self.snapshot_every);
        self.snapshot_at = TickNo(last.saturating_add(ticks));
        self.snapshot_every = ticks;
        self
    }

    /// Folds the rest of a log.
    fn follow(mut self, log: &dyn EventLog) -> Result<Self, LogError> {
        let replica = &mut self;
        let mut wrong = None;
        log.scan(replica.head.seq.next(), &mut |record| {
            let taken = record.check(&replica.head).and_then(|_| replica.take_record(&record));
            match taken {
                Ok(_) => true,
                Err(why) => {
                    wrong = Some((record.seq, why));
                    false
                }
            }
        })?;
        if wrong.is_none() && self.head != log.head() {
            wrong = Some((self.head.seq.next(), "the log ends before its head".into()));
        }
        let replica = self;
        match wrong {
            None => Ok(replica),
            Some((seq, why)) => Err(log.damage_at(seq, why)),
        }
    }

    /// This process's start.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Where the snapshot was taken from which this replica went on; `None` if it folded the log from nothing.
    pub fn started_at(&self) -> Option<Seq> {
        self.started_at
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The last message folded.
    pub fn position(&self) -> Seq {
        self.head.seq
    }

    /// The chain value there.
    pub fn chain(&self) -> Hash {
        self.head.chain
    }

    /// The last message on the leadership subjects.
    pub fn last_lead(&self) -> Seq {
        self.last_lead
    }

    /// This scheduler's previous incarnation, and the last seq that the log has of it.
    pub fn previous(&self) -> Option<(Incarnation, Seq)> {
        self.previous
    }

    /// Why this replica must not lead: its state differs from what a leader recorded.
    pub fn diverged(&self) -> Option<&str> {
        self.diverged.as_deref()
    }

    /// Folds an entry of the log, just appended.
    pub fn take(&mut self, entry: &Entry) -> Step {
        let head = entry.after(&self.head);
        let step = self.fold(head, &entry.subject, entry.event.as_ref());
        if step.digests.is_some() {
            self.take_snapshot();
        }
        step
    }

    fn take_record(&mut self, record: &Record) -> Result<Step, String> {
        let head = Head {
            seq: record.seq,
            chain: record.chain,
        };
        let event = match record.content() {
            Ok(Content::Event(event)) => Some(event),
            Ok(Content::Foreign) => None,
            Ok(Content::Thinned) => {
                return Err("its payload was thinned, and no sound snapshot is left behind it".into());
            }
            Err(newer) => return Err(newer.to_string()),
        };
        Ok(self.fold(head, &record.subject(), event.as_deref()))
    }

    fn fold(&mut self, head: Head, subject: &str, event: Option<&(Envelope, Event)>) -> Step {
        let seq = head.seq;
        self.head = head;
        if is_lead(subject) {
            self.last_lead = seq;
        }
        let mut step = Step {
            seq,
            judged: None,
            leader_sign: false,
            term_started: None,
            decide: None,
            digests: None,
            chain: self.head.chain,
            snapshot: None,
        };
        let Some((envelope, event)) = event else {
            return step;
        };
        let mine = matches!(&envelope.publisher, Publisher::Scheduler(id) if *id == self.me);
        if mine {
            self.own_last = Some((envelope.incarnation, seq));
            if envelope.incarnation != self.incarnation {
                self.previous = self.own_last;
            }
        }
        let applied = self.state.apply(seq, envelope, event);
        step.judged = Some(applied.judged);
        if applied.gap > 0 {
            tracing::warn!(%seq, publisher = %envelope.publisher, missing = applied.gap, "events of a publisher are missing");
        }
        if let Judged::Void(why) = applied.judged {
            tracing::info!(%seq, kind = event.kind(), publisher = %envelope.publisher, why, "void event");
        }
        if applied.digest {
            step.digests = Some(self.book.note(&self.state));
        }
        if applied.judged == Judged::Valid {
            match event {
                Event::TermStarted { term, .. } => {
                    step.leader_sign = true;
                    step.term_started = Some((*term, mine && envelope.incarnation == self.incarnation));
                }
                Event::Ticked { term, .. } => {
                    step.leader_sign = true;
                    step.decide = applied.decide.then_some(*term);
                }
                Event::DigestRecorded {
                    at, state, decisions, ..
                } => {
                    self.compare(*at, state, decisions);
                    step.snapshot = self.seal_snapshot(*at, seq);
                }
                _ => {}
            }
        }
        step
    }

    /// Takes a snapshot if one is due; it is kept once its digest stands in the log.
    fn take_snapshot(&mut self) {
        let tick = self.state.tick();
        if tick < self.snapshot_at {
            return;
        }
        let pause = self
            .snapshot_every
            .max(self.state.tracked_blocks() / SNAPSHOT_BLOCKS_PER_TICK);
        self.snapshot_at = TickNo(tick.0.saturating_add(pause));
        self.taken = Some(Taken::of(&self.state, &self.head, self.me.clone(), self.own_last));
    }

    fn seal_snapshot(&mut self, at: Seq, recorded: Seq) -> Option<(Seq, Vec<u8>)> {
        let taken = self.taken.take_if(|taken| taken.at == at && self.diverged.is_none())?;
        Some((at, taken.seal(recorded)))
    }

    fn compare(&mut self, at: Seq, state: &Hash, decisions: &Hash) {
        let differs = match self.book.check(at, state, decisions) {
            DigestCheck::Same | DigestCheck::Unknown => return,
            DigestCheck::StateDiffers { here } => format!(
                "the state at {at} is {} here, the leader recorded {}",
                chain::hex(&here),
                chain::hex(state)
            ),
            DigestCheck::DecisionsDiffer { here } => format!(
                "the decisions up to {at} are {} here, the leader recorded {}",
                chain::hex(&here),
                chain::hex(decisions)
            ),
        };
        tracing::error!(
            "{differs}: two schedulers fold one log differently. This one will not lead. Check that all run the same \
             version, and `hearth log verify` on each"
        );
        self.diverged = Some(differs);
    }
}

/// Whether a subject falls under [`hearth_protocol::subject::LEAD_ALL`].
fn is_lead(subject: &str) -> bool {
    subject
        .strip_prefix("hearth.log.scheduler.")
        .and_then(|rest| rest.strip_suffix(".lead"))
        .is_some_and(|id| !id.is_empty() && !id.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lead_subjects_are_those_of_the_filter() {
        let id = "s1".parse().unwrap();
        assert!(is_lead(&hearth_protocol::subject::lead(&id)));
        assert!(!is_lead(&hearth_protocol::subject::record(&id)));
        assert!(!is_lead("hearth.log.scheduler..lead"));
        assert!(!is_lead("hearth.log.scheduler.a.b.lead"));
    }
}
