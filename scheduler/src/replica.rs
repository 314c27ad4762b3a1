//! The state as this scheduler folded it from its log, and what every scheduler watches while it folds.
//!
//! Synchronous, and without a choice of its own: whether an event counts, and what to do, is `scheduler-core`'s.

use hearth_bus::new_incarnation;
use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{Envelope, Event, Incarnation, Publisher, SchedulerId, Seq, Term};
use scheduler_core::{DigestBook, DigestCheck, Judged, State};

use crate::log::{Entry, EventLog, Head, LogError, Record};

/// The folded log.
#[derive(Debug)]
pub struct Replica {
    me: SchedulerId,
    incarnation: Incarnation,
    state: State,
    book: DigestBook,
    /// The last message folded, foreign ones included.
    position: Seq,
    /// The last message on the leadership subjects: what the next term or tick compares with.
    last_lead: Seq,
    /// This scheduler's previous incarnation and the last seq seen of it.
    previous: Option<(Incarnation, Seq)>,
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
}

impl Replica {
    /// A replica of nothing yet.
    pub fn new(me: SchedulerId) -> Self {
        Self {
            me,
            incarnation: new_incarnation(),
            state: State::default(),
            book: DigestBook::default(),
            position: Seq(0),
            last_lead: Seq(0),
            previous: None,
            diverged: None,
        }
    }

    /// Replays a log from nothing, checking its chain on the way.
    ///
    /// # Errors
    /// [`LogError::Damaged`] at the first record that does not follow from the one before.
    pub fn replay(me: SchedulerId, log: &dyn EventLog) -> Result<Self, LogError> {
        let mut replica = Self::new(me);
        let mut head = Head::default();
        let mut wrong = None;
        log.scan(Seq(1), &mut |record| match record.check(&head) {
            Ok(next) => {
                head = next;
                replica.take_record(&record);
                true
            }
            Err(why) => {
                wrong = Some((record.seq, why));
                false
            }
        })?;
        if wrong.is_none() && head != log.head() {
            wrong = Some((head.seq.next(), "the log ends before its head".into()));
        }
        match wrong {
            None => Ok(replica),
            Some((seq, why)) => Err(log.damage_at(seq, why)),
        }
    }

    /// This process's start.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The last message folded.
    pub fn position(&self) -> Seq {
        self.position
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

    /// Folds an entry of the log.
    pub fn take(&mut self, entry: &Entry) -> Step {
        self.fold(entry.seq, &entry.subject, entry.event.as_ref())
    }

    fn take_record(&mut self, record: &Record) -> Step {
        self.fold(record.seq, &record.subject(), record.event().as_ref())
    }

    fn fold(&mut self, seq: Seq, subject: &str, event: Option<&(Envelope, Event)>) -> Step {
        self.position = seq;
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
        };
        let Some((envelope, event)) = event else {
            return step;
        };
        let mine = matches!(&envelope.publisher, Publisher::Scheduler(id) if *id == self.me);
        if mine && envelope.incarnation != self.incarnation {
            self.previous = Some((envelope.incarnation, seq));
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
                } => self.compare(*at, state, decisions),
                _ => {}
            }
        }
        step
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
