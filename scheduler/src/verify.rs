//! Whether a log can be believed: contiguous, chained, of one mind with its witnesses, and every decision and digest in
//! it follows from what stands before it.
//!
//! The chain shows every change that was made without computing it anew; re-derivation shows a changed decision also
//! then; witnesses, who saw the chain's value while the cluster ran, show any other history and a cut end.
//!
//! A thinned log (heat payloads dropped) is verified by its chain as a whole. What rested on the dropped heat cannot be
//! derived again: it is counted, and derivation goes on from the snapshot behind it.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{DecodeError, Event, Message, Publisher, Seq, WallMs, subject};
use scheduler_core::replay::{ReplayReport, Replayer, Until};
use serde::Serialize;

use crate::log::{EventLog, Head, LogError, Record};
use crate::snapshot::{self, Snapshot};

/// Findings kept; all are counted.
const FINDINGS_MAX: usize = 16;

/// Chain values remembered for digests that name them: a leader records one within a few events.
const CHAIN_VALUES_MAX: usize = 4_096;

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where.
    pub seq: Seq,
    /// What, in one sentence.
    pub what: String,
}

/// What cannot be derived again, because heat was thinned.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct NotDerivable {
    /// Heat events without their payload.
    pub heat: u64,
    /// Commands that rested on it.
    pub commands: u64,
    /// Digests that cover it.
    pub digests: u64,
    /// The first and last position left out.
    pub positions: (Seq, Seq),
    /// The tick times between which they lie, where known.
    pub times: (Option<WallMs>, Option<WallMs>),
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Nothing is wrong.
    pub verified: bool,
    /// Messages whose chain was checked; contiguous from 1.
    pub events: u64,
    /// Chain value after the last one, computed; hexadecimal.
    pub chain: String,
    /// What is wrong with the records themselves; the first few.
    pub findings: Vec<Finding>,
    /// All of them.
    pub findings_total: u64,
    /// Witnessed chain values that agree.
    pub witnesses_same: u64,
    /// What disagrees within the state that the log gives.
    pub audit: Option<String>,
    /// Decisions and digests, derived again.
    pub replay: ReplayReport,
    /// What was not, and why that is no finding.
    pub not_derivable: Option<NotDerivable>,
}

/// See the module. Feed it the whole log in order.
#[derive(Debug)]
pub struct Verifier {
    head: Head,
    replayer: Replayer,
    base: Option<Snapshot>,
    witnesses: BTreeMap<Seq, Hash>,
    witnesses_same: u64,
    recent: VecDeque<Head>,
    /// Positions from which on nothing can be derived, until the base.
    blind: bool,
    left_out: Option<NotDerivable>,
    time: Option<WallMs>,
    findings: Vec<Finding>,
    findings_total: u64,
    stopped: bool,
}

impl Verifier {
    /// A verification against what witnesses saw; `base` is where derivation goes on behind thinned heat.
    pub fn new(witnesses: &[Head], base: Option<Snapshot>) -> Self {
        Self {
            head: Head::default(),
            replayer: Replayer::new(Until::End),
            base,
            witnesses: witnesses.iter().map(|w| (w.seq, w.chain)).collect(),
            witnesses_same: 0,
            recent: VecDeque::new(),
            blind: false,
            left_out: None,
            time: None,
            findings: Vec::new(),
            findings_total: 0,
            stopped: false,
        }
    }

    fn find(&mut self, seq: Seq, what: impl Into<String>) {
        self.findings_total += 1;
        if self.findings.len() < FINDINGS_MAX {
            let what = what.into();
            self.findings.push(Finding { seq, what });
        }
    }

    /// Something is wrong with the log at a position, and nothing behind it can be read.
    pub fn stop(&mut self, seq: Seq, what: impl Into<String>) {
        self.find(seq, what);
        self.stopped = true;
    }

    /// Takes a record with the chain value kept for it; false when the log cannot be followed any further.
    pub fn push(&mut self, record: &Record) -> bool {
        if self.stopped {
            return false;
        }
        match record.check(&self.head) {
            Ok(head) => self.follow(head, &record.message, record.thinned.is_some()),
            Err(why) => self.stop(self.head.seq.next(), why),
        }
        !self.stopped
    }

    /// Takes a message of the stream, which keeps no chain values.
    pub fn push_message(&mut self, seq: Seq, message: &Message) -> bool {
        if seq != self.head.seq.next() {
            self.stop(
                self.head.seq.next(),
                format!("the message is missing, the next one is {seq}"),
            );
        }
        if !self.stopped {
            let parts = (chain::part(&message.envelope), chain::part(&message.payload));
            let chain = chain::link(&self.head.chain, seq, &parts.0, &parts.1);
            self.follow(Head { seq, chain }, message, false);
        }
        !self.stopped
    }

    fn follow(&mut self, head: Head, message: &Message, thinned: bool) {
        let seq = head.seq;
        self.head = head.clone();
        if self.recent.len() == CHAIN_VALUES_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(head);
        self.ask_witnesses();
        let event = match message.envelope().map(|e| (e, message.event())) {
            Err(newer @ DecodeError::Newer { .. }) => return self.stop(seq, newer.to_string()),
            Ok((envelope, event)) => {
                let is_heat = matches!(&envelope.publisher, Publisher::Scheduler(id) if subject::folded_heat(id) == envelope.subject);
                if thinned && !is_heat {
                    self.find(
                        seq,
                        format!("its payload was dropped, but {} is no heat", envelope.subject),
                    );
                }
                event.ok().filter(|_| !thinned)
            }
            Err(_) => {
                if thinned {
                    self.find(seq, "its payload was dropped, but it is no heat");
                }
                None
            }
        };
        match &event {
            Some(Event::Ticked { time, .. }) => self.time = Some(*time),
            Some(Event::DigestRecorded {
                at, chain: Some(chain), ..
            }) => self.check_recorded_chain(seq, *at, chain),
            _ => {}
        }
        if thinned {
            self.leave_out(seq);
        }
        if !self.blind {
            self.replayer.step(seq, message);
            return;
        }
        let left_out = self.left_out.get_or_insert_default();
        left_out.positions.1 = seq;
        left_out.heat += u64::from(thinned);
        left_out.commands += u64::from(matches!(event, Some(Event::CommandGiven(_))));
        left_out.digests += u64::from(matches!(event, Some(Event::DigestRecorded { .. })));
        if self.base.as_ref().is_some_and(|base| base.taken.at == seq) {
            let base = self.base.take().expect("just seen");
            left_out.times.1 = self.time;
            self.replayer.skip_to(base.state);
            self.blind = false;
        }
    }

    /// A thinned record: nothing can be derived until the base.
    fn leave_out(&mut self, seq: Seq) {
        if self.blind {
            return;
        }
        self.blind = true;
        if self.base.as_ref().is_none_or(|base| base.taken.at < seq) {
            self.find(
                seq,
                "its payload was dropped, and no sound snapshot stands behind it: nothing from here on can be derived",
            );
        }
        if self.left_out.is_none() {
            self.left_out = Some(NotDerivable {
                positions: (seq, seq),
                times: (self.time, None),
                ..NotDerivable::default()
            });
        }
    }

    fn check_recorded_chain(&mut self, seq: Seq, at: Seq, recorded: &Hash) {
        let first = self.recent.front().map_or(Seq(0), |head| head.seq);
        let kept =
            at.0.checked_sub(first.0)
                .and_then(|index| self.recent.get(index as usize));
        if let Some(kept) = kept.filter(|kept| kept.chain != *recorded) {
            let what = format!(
                "its leader saw the chain value {} at {at}, the log has {}",
                chain::hex(recorded),
                chain::hex(&kept.chain)
            );
            self.find(seq, what);
        }
    }

    fn ask_witnesses(&mut self) {
        let Some(witnessed) = self.witnesses.remove(&self.head.seq) else {
            return;
        };
        if witnessed == self.head.chain {
            self.witnesses_same += 1;
        } else {
            let what = format!(
                "a witness saw the chain value {} here, the log has {}",
                chain::hex(&witnessed),
                chain::hex(&self.head.chain)
            );
            self.find(self.head.seq, what);
        }
    }

    /// Ends the verification.
    pub fn finish(mut self) -> Verified {
        if !self.stopped
            && let Some(last) = self.witnesses.keys().next_back().copied()
        {
            self.find(
                self.head.seq.next(),
                format!(
                    "the log ends at {}, a witness saw {last}: its end is missing",
                    self.head.seq
                ),
            );
        }
        let (state, replay) = self.replayer.finish();
        let audit = state.audit().err();
        Verified {
            verified: replay.is_sound() && audit.is_none() && self.findings_total == 0,
            events: self.head.seq.0,
            chain: chain::hex(&self.head.chain),
            findings: self.findings,
            findings_total: self.findings_total,
            witnesses_same: self.witnesses_same,
            audit,
            replay,
            not_derivable: self.left_out,
        }
    }
}

/// Verifies a scheduler's own log.
///
/// # Errors
/// Never for damage, which is a finding; for failures of the store that say nothing about a position.
pub fn verify_log(log: &dyn EventLog, witnesses: &[Head]) -> Result<Verified, LogError> {
    let thinned = log.thinned()?;
    let base = if thinned > Seq(0) {
        snapshot::oldest_from(log, thinned)?
    } else {
        None
    };
    let mut verifier = Verifier::new(witnesses, base);
    let scanned = log.scan(Seq(1), &mut |record| verifier.push(&record));
    match scanned {
        Ok(()) => {}
        Err(LogError::Damaged { seq, why, .. }) => verifier.stop(seq, why),
        Err(LogError::Store { source, .. }) => {
            let seq = verifier.head.seq.next();
            verifier.stop(seq, format!("the store cannot read it: {source}"));
        }
        Err(other) => return Err(other),
    }
    let wanted = log.head();
    if !verifier.stopped && verifier.head != wanted {
        let seq = verifier.head.seq.next();
        let what = format!(
            "the log ends here, its head says {} with chain {}",
            wanted.seq,
            chain::hex(&wanted.chain)
        );
        verifier.stop(seq, what);
    }
    Ok(verifier.finish())
}
