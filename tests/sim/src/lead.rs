//! Schedulers read the log, campaign, tick and publish what the production core decides.
//!
//! The rules are those of the scheduler's own loop: it campaigns after three seconds without a sign of a leader and only
//! with all of the log folded; terms and ticks compare with the last one; one thing is published at a time, and nothing is
//! read meanwhile; what has no answer is sent again, under the same number, before anything else.

use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::limits::TICK_MS;
use hearth_protocol::{Envelope, Event as Fact, Incarnation, Publisher, Seq, Term, WallMs, subject};

use crate::event::Event;
use crate::log::Published;
use crate::plan::Fault;
use crate::scheduler::{Outgoing, Process, Role, Step};
use crate::world::World;

const TICK_US: u64 = TICK_MS * 1_000;

/// Without a sign of a leader, after which a standby campaigns.
pub const TAKEOVER_US: u64 = 3_000_000;

/// How soon something is tried again that waits for the log to catch up.
const LOOK_AGAIN_US: u64 = 20_000;

/// How long an answer to something published is waited for.
const PATIENCE_US: u64 = 5_000_000;

/// The wall clocks' reading when a simulation begins.
const BEGAN_MS: u64 = 1_700_000_000_000;

/// Why something published was not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Another entry came first, or the log takes nothing now.
    Refused,
    /// It may stand there or not.
    Unknown,
}

impl World {
    /// A scheduler's process, if it runs.
    pub fn process(&mut self, scheduler: usize) -> Option<&mut Process> {
        self.schedulers[scheduler].process.as_mut()
    }

    /// It looks at the log.
    pub fn ingests(&mut self, scheduler: usize, life: u64) -> Result<(), String> {
        let us = self.chance.delay(40_000, 1_000_000, 10);
        self.after(us, Event::Ingests { scheduler, life });
        self.ingest(scheduler)
    }

    fn ingest(&mut self, scheduler: usize) -> Result<(), String> {
        let snapshot_ticks = self.plan.snapshot_ticks;
        let (len, readable) = (self.log.len, self.log.len.min(self.log.seen));
        let here = &mut self.schedulers[scheduler];
        let id = here.id.clone();
        let Some(process) = here.process.as_mut().filter(|_| !here.cut) else {
            return Ok(());
        };
        if len < process.read {
            process.frozen = true;
            return self.follow_if_leading(scheduler);
        }
        process.frozen = false;
        for report in &self.heard[process.heard.min(self.heard.len())..] {
            process.reports.push(report.clone(), &process.state);
        }
        process.heard = self.heard.len();
        loop {
            let here = &mut self.schedulers[scheduler];
            let Some(process) = here.process.as_mut().filter(|process| !process.waits) else {
                return Ok(());
            };
            if process.read >= readable {
                return Ok(());
            }
            let entry = self.log.entries[process.read].clone();
            let step = process.take(&id, &entry, snapshot_ticks)?;
            if let Some(snapshot) = process.sealed(&entry) {
                here.snapshot = Some(snapshot);
            }
            let read = process.read;
            here.kept = here.kept.max(read);
            self.compare(&id, read, &step)?;
            self.minds(scheduler, &step)?;
            self.decides(scheduler, &step, Seq(read as u64));
        }
    }

    fn minds(&mut self, scheduler: usize, step: &Step) -> Result<(), String> {
        let now_us = self.now_us;
        match step.term_started {
            Some((term, true)) => {
                let Some(process) = self.process(scheduler) else {
                    return Ok(());
                };
                process.reports.restart();
                process.role = Role::Leading {
                    term,
                    ticked: Seq(0),
                    lost_behind: None,
                    waits_us: None,
                };
                self.counters.count("scheduler leads");
                self.note(|| format!("s{scheduler} leads term {term}"));
                self.due(scheduler, now_us + 1);
            }
            Some((_, false)) => self.follow(scheduler),
            None => {
                let follows = self.process(scheduler).is_some_and(|process| process.leads().is_none());
                if step.leader_sign && follows {
                    self.due(scheduler, now_us + TAKEOVER_US);
                }
            }
        }
        Ok(())
    }

    /// It leads no more, or waits anew.
    fn follow(&mut self, scheduler: usize) {
        let now_us = self.now_us;
        let Some(process) = self.process(scheduler) else {
            return;
        };
        if process.leads().is_some() {
            process.role = Role::Following;
            self.counters.count("scheduler leads no more");
            self.note(|| format!("s{scheduler} leads no more"));
        }
        self.due(scheduler, now_us + TAKEOVER_US);
    }

    fn follow_if_leading(&mut self, scheduler: usize) -> Result<(), String> {
        if self.process(scheduler).is_some_and(|process| process.leads().is_some()) {
            self.follow(scheduler);
        }
        Ok(())
    }

    fn due(&mut self, scheduler: usize, at_us: u64) {
        if let Some(process) = self.process(scheduler) {
            process.due_us = at_us;
            let life = process.life;
            self.at(at_us, Event::Acts { scheduler, life });
        }
    }

    fn decides(&mut self, scheduler: usize, step: &Step, seq: Seq) {
        let Some(process) = self.process(scheduler) else {
            return;
        };
        let Some(term) = process.leads().filter(|term| step.decide == Some(*term)) else {
            return;
        };
        for command in process.state.decide() {
            process.todo.push_back(Outgoing {
                fact: Fact::CommandGiven(command),
                expecting: None,
            });
        }
        if let Some((state, decisions)) = step.digests {
            process.todo.push_back(Outgoing {
                fact: Fact::DigestRecorded {
                    term,
                    at: seq,
                    state,
                    decisions,
                    chain: None,
                },
                expecting: None,
            });
        }
        self.sends(scheduler);
    }

    /// A campaign or a tick may be due.
    pub fn acts(&mut self, scheduler: usize) -> Result<(), String> {
        let now_us = self.now_us;
        let Some(process) = self.process(scheduler) else {
            return Ok(());
        };
        if now_us < process.due_us {
            return Ok(());
        }
        if process.waits {
            self.due(scheduler, now_us + LOOK_AGAIN_US);
            return Ok(());
        }
        if process.frozen {
            self.follow_if_leading(scheduler)?;
            self.due(scheduler, now_us + LOOK_AGAIN_US);
            return Ok(());
        }
        match process.role {
            Role::Following => self.campaigns(scheduler),
            Role::Leading { .. } => self.ticks(scheduler),
        }
        Ok(())
    }

    fn campaigns(&mut self, scheduler: usize) {
        let (now_us, len, cut) = (self.now_us, self.log.len, self.schedulers[scheduler].cut);
        let Some(process) = self.process(scheduler) else {
            return;
        };
        if cut {
            return self.due(scheduler, now_us + TICK_US);
        }
        if process.read != len {
            return self.due(scheduler, now_us + LOOK_AGAIN_US);
        }
        let (term, read, last_lead, incarnation) = (
            process.state.term().next(),
            process.read,
            process.last_lead,
            process.incarnation,
        );
        let previous = self.previous(scheduler, read, incarnation);
        let Some(process) = self.process(scheduler) else {
            return;
        };
        process.todo.push_back(Outgoing {
            fact: Fact::TermStarted { term, previous },
            expecting: Some(last_lead),
        });
        self.counters.count("scheduler campaigned");
        self.sends(scheduler);
        self.due(scheduler, now_us + TAKEOVER_US);
    }

    /// Its process before this one, and the last entry that the log has of it.
    fn previous(&self, scheduler: usize, read: usize, not: Incarnation) -> Option<(Incarnation, Seq)> {
        let me = Publisher::Scheduler(self.schedulers[scheduler].id.clone());
        let entries = self.log.entries[..read].iter().map(|entry| &entry.envelope);
        let at = entries
            .rev()
            .position(|of| of.publisher == me && of.incarnation != not)?;
        let at = read - 1 - at;
        Some((self.log.entries[at].envelope.incarnation, Seq(at as u64 + 1)))
    }

    fn ticks(&mut self, scheduler: usize) {
        let now_us = self.now_us;
        let wall = BEGAN_MS as i64 + (now_us / 1_000) as i64 + self.schedulers[scheduler].off_ms;
        let Some(process) = self.process(scheduler) else {
            return;
        };
        let (read, last_lead, due_us) = (Seq(process.read as u64), process.last_lead, process.due_us);
        let Role::Leading {
            term,
            ticked,
            lost_behind,
            waits_us,
        } = &mut process.role
        else {
            return;
        };
        if read < *ticked || lost_behind.is_some_and(|behind| last_lead <= behind) {
            let since = *waits_us.get_or_insert(now_us);
            if now_us - since < TAKEOVER_US {
                return self.due(scheduler, now_us + LOOK_AGAIN_US);
            }
            self.counters.count("leader gave up a tick that the log lost");
            return self.follow(scheduler);
        }
        (*lost_behind, *waits_us) = (None, None);
        let term: Term = *term;
        for heat in process.reports.fold(&process.state, term) {
            process.todo.push_back(Outgoing {
                fact: Fact::HeatFolded(heat),
                expecting: None,
            });
        }
        process.todo.push_back(Outgoing {
            fact: Fact::Ticked {
                term,
                tick: process.state.tick().next(),
                time: WallMs(u64::try_from(wall).unwrap_or(0)).max(process.state.time()),
            },
            expecting: Some(last_lead),
        });
        self.sends(scheduler);
        // A cadence: late ticks do not make later ones late, and missed ones are not made up for.
        self.due(scheduler, (due_us + TICK_US).max(now_us + 1));
    }

    /// Publishes the next thing.
    fn sends(&mut self, scheduler: usize) {
        let (cut, id, now_us) = (
            self.schedulers[scheduler].cut,
            self.schedulers[scheduler].id.clone(),
            self.now_us,
        );
        let Some(process) = self.schedulers[scheduler].process.as_mut() else {
            return;
        };
        if process.waits {
            return;
        }
        let Some(out) = process.todo.pop_front() else {
            return;
        };
        process.waits = true;
        process.numbers += 1;
        let subject = match &out.fact {
            Fact::TermStarted { .. } | Fact::Ticked { .. } => subject::lead(&id),
            Fact::HeatFolded(_) => subject::folded_heat(&id),
            Fact::CommandGiven(command) => subject::command(&command.node),
            _ => subject::record(&id),
        };
        let envelope = Envelope {
            codec: CODEC_VERSION,
            subject,
            publisher: Publisher::Scheduler(id),
            incarnation: process.incarnation,
            publisher_seq: process.numbers,
            time: WallMs(BEGAN_MS + now_us / 1_000),
            reason: String::new(),
        };
        let life = process.life;
        let doubtful = process.in_doubt.replace((envelope.clone(), out.clone()));
        let gives = matches!(out.fact, Fact::CommandGiven(_));
        let us = if gives && self.plan.faults.contains(&Fault::SchedulerStop) && self.chance.happens(200) {
            self.stops_with_a_command(scheduler)
        } else {
            self.chance.delay(2_000, 300_000, 10)
        };
        if let Some((envelope, out)) = doubtful.filter(|_| !cut) {
            self.counters.count("scheduler published again what was in doubt");
            let posted = self.posted_by(envelope, out, None, true);
            self.after(us, posted);
        }
        let arrives = !cut || self.chance.happens(300);
        if arrives {
            let answer = (!cut).then_some((scheduler, life));
            let posted = self.posted_by(envelope, out.clone(), answer, false);
            self.after(us + 1, posted);
        }
        if cut {
            let result = Err(Failure::Unknown);
            self.after(
                PATIENCE_US,
                Event::Acked {
                    scheduler,
                    life,
                    out: Box::new(out),
                    result,
                },
            );
        }
    }

    /// It stops between a decision and its commands, one of which arrives long after; says when.
    fn stops_with_a_command(&mut self, scheduler: usize) -> u64 {
        let us = self.chance.within(3_000_000, 8_000_000);
        self.schedulers[scheduler].stopped = Some(Vec::new());
        self.after(us + 1, Event::SchedulerContinues { scheduler });
        self.counters.count("f16 scheduler stopped and continued");
        us
    }

    fn posted_by(&self, envelope: Envelope, out: Outgoing, answer: Option<(usize, u64)>, again: bool) -> Event {
        Event::PostedBy {
            envelope: Box::new(envelope),
            out: Box::new(out),
            answer,
            again,
        }
    }

    /// What a scheduler published arrives at the log.
    pub fn posted_by_scheduler(
        &mut self,
        envelope: Envelope,
        out: Outgoing,
        answer: Option<(usize, u64)>,
        again: bool,
    ) -> Result<(), String> {
        let known = again.then(|| self.log.find(&envelope)).flatten();
        let result = match known {
            Some(seq) => Ok(seq),
            None => match self.posts(envelope, out.fact.clone(), out.expecting)? {
                Published::Counts(seq, _) | Published::Void(seq) => Ok(seq),
                Published::Refused => Err(Failure::Refused),
            },
        };
        let Some((scheduler, life)) = answer else {
            return Ok(());
        };
        let us = self.chance.delay(2_000, 300_000, 10);
        let (us, result) = if self.schedulers[scheduler].cut {
            (PATIENCE_US, Err(Failure::Unknown))
        } else {
            (us, result)
        };
        self.after(
            us,
            Event::Acked {
                scheduler,
                life,
                out: Box::new(out),
                result,
            },
        );
        Ok(())
    }

    /// The answer comes back, or is waited for no more.
    pub fn acked(&mut self, scheduler: usize, out: &Outgoing, result: Result<Seq, Failure>) -> Result<(), String> {
        let Some(process) = self.process(scheduler) else {
            return Ok(());
        };
        process.waits = false;
        if result != Err(Failure::Unknown) {
            process.in_doubt = None;
        }
        if result.is_err() {
            process.todo.clear();
        }
        if let (
            Fact::Ticked { .. },
            Role::Leading {
                ticked, lost_behind, ..
            },
        ) = (&out.fact, &mut process.role)
        {
            match result {
                Ok(seq) => *ticked = seq,
                Err(Failure::Refused) => *lost_behind = out.expecting,
                Err(Failure::Unknown) => {}
            }
        }
        self.sends(scheduler);
        self.ingest(scheduler)
    }
}
