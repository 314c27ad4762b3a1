//! The one task that holds the state: it folds what was ingested, campaigns when nobody leads, ticks while it leads,
//! publishes what the core decides, and answers requests.
//!
//! Whether it leads is said by the log alone: it leads from the moment its own `TermStarted` comes back valid until
//! another one does. A publish that another came before is no verdict by itself; it waits for the log to say why.

use std::time::Duration;

use hearth_bus::{Bus, Fetched, LogPublisher, PublishError, wall_now};
use hearth_protocol::rpc::{Answer, Failure, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_protocol::{Event, NodeId, SchedulerId, Seq, Term, subject};
use scheduler_core::Judged;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::heat::HeatBuffer;
use crate::ingest::Ingested;
use crate::log::Entry;
use crate::replica::{Replica, Step};

/// How soon something is tried again that waits for the log to catch up.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Requests that wait for this task.
const REQUESTS_MAX: usize = 64;

/// The clock of leadership.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Between two ticks.
    pub tick: Duration,
    /// Without a sign of a leader, after which a standby campaigns.
    pub takeover: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            tick: Duration::from_millis(hearth_protocol::limits::TICK_MS),
            takeover: Duration::from_secs(3),
        }
    }
}

/// A request and the way back.
type Asked = (SchedulerRequest, oneshot::Sender<Answer<SchedulerReply>>);

#[derive(Debug)]
enum Role {
    /// Folds, and campaigns when no sign of a leader came for a while.
    Following { campaign_at: Instant },
    /// Its term stands in the log.
    Leading {
        term: Term,
        next_tick: Instant,
        /// Its last own tick; the next one waits until this one came back.
        ticked: Seq,
        /// Another message came before a tick; nothing is compared again until the log has passed this one.
        lost_behind: Option<Seq>,
        /// Since when a tick is due and waits for the log.
        waits_since: Option<Instant>,
        /// Answers requests; ends with the leadership.
        _serving: Serving,
    },
}

/// A task that ends when dropped.
#[derive(Debug)]
struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// See the module.
pub(crate) struct Leader {
    bus: Bus,
    id: SchedulerId,
    timing: Timing,
    publisher: LogPublisher,
    replica: Replica,
    heat: HeatBuffer,
    role: Role,
    /// The stream is not known to continue the log.
    frozen: bool,
    asked: (mpsc::Sender<Asked>, mpsc::Receiver<Asked>),
    /// Snapshots on their way into the log's directory.
    snapshots: mpsc::Sender<(Seq, Vec<u8>)>,
    /// A record asked for on its way through the log, and who waits for it.
    asked_record: Option<(Seq, oneshot::Sender<Answer<SchedulerReply>>)>,
}

/// Inputs of the loop.
enum Input {
    Ingested(Option<Ingested>),
    Heat(Option<Vec<Fetched>>),
    Asked(Asked),
    Due,
}

impl Leader {
    pub(crate) fn new(
        bus: Bus,
        id: SchedulerId,
        replica: Replica,
        publisher: LogPublisher,
        timing: Timing,
        snapshots: mpsc::Sender<(Seq, Vec<u8>)>,
    ) -> Self {
        // Whoever led last and is gone for sure (nobody yet, or an earlier life of this scheduler) is not waited for.
        let at_once = replica.state().leader().is_none_or(|leader| *leader == id);
        let wait = if at_once { Duration::ZERO } else { timing.takeover };
        Self {
            bus,
            id,
            timing,
            publisher,
            replica,
            heat: HeatBuffer::default(),
            role: Role::Following {
                campaign_at: Instant::now() + wait,
            },
            frozen: true,
            asked: mpsc::channel(REQUESTS_MAX),
            snapshots,
            asked_record: None,
        }
    }

    /// Runs until the ingesting task ends.
    pub(crate) async fn run(mut self, mut ingested: mpsc::Receiver<Ingested>, mut heat: mpsc::Receiver<Vec<Fetched>>) {
        loop {
            let due = self.due();
            let input = tokio::select! {
                // What the log says comes before what this scheduler wants.
                biased;
                input = ingested.recv() => Input::Ingested(input),
                input = heat.recv() => Input::Heat(input),
                Some(asked) = self.asked.1.recv() => Input::Asked(asked),
                () = sleep_until(due) => Input::Due,
            };
            match input {
                Input::Ingested(Some(Ingested::Entries(entries))) => self.take(entries).await,
                Input::Ingested(Some(Ingested::Frozen)) => {
                    self.frozen = true;
                    self.follow();
                }
                Input::Ingested(Some(Ingested::Flowing)) => self.frozen = false,
                Input::Ingested(None) | Input::Heat(None) => return,
                Input::Heat(Some(reports)) => {
                    let state = self.replica.state();
                    reports.iter().for_each(|report| self.heat.push(report, state));
                }
                Input::Asked(asked) => self.answer(asked).await,
                Input::Due => self.act().await,
            }
        }
    }

    fn due(&self) -> Instant {
        match &self.role {
            Role::Following { campaign_at } => *campaign_at,
            Role::Leading { next_tick, .. } => *next_tick,
        }
    }

    fn postpone(&mut self, by: Duration) {
        let at = Instant::now() + by;
        match &mut self.role {
            Role::Following { campaign_at } => *campaign_at = at,
            Role::Leading { next_tick, .. } => *next_tick = at,
        }
    }

    /// Stops leading, or waits anew.
    fn follow(&mut self) {
        if let Role::Leading { term, .. } = &self.role {
            tracing::info!(%term, "leads no more");
        }
        self.role = Role::Following {
            campaign_at: Instant::now() + self.timing.takeover,
        };
    }

    async fn take(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            let step = self.replica.take(&entry);
            if let (Some((_, Event::HeatFolded(heat))), Some(Judged::Valid)) = (&entry.event, step.judged) {
                self.heat.folded(heat);
            }
            if let Some(snapshot) = &step.snapshot
                && self.snapshots.try_send(snapshot.clone()).is_err()
            {
                tracing::debug!("the log is busy; a later snapshot will do");
            }
            self.confirm_record(&step);
            self.mind_leadership(&step);
            self.decide(&step).await;
        }
    }

    fn mind_leadership(&mut self, step: &Step) {
        match step.term_started {
            Some((term, true)) => self.lead(term),
            Some((_, false)) => self.follow(),
            None if step.leader_sign => {
                if let Role::Following { campaign_at } = &mut self.role {
                    *campaign_at = Instant::now() + self.timing.takeover;
                }
            }
            None => {}
        }
    }

    fn lead(&mut self, term: Term) {
        self.follow();
        tracing::info!(%term, "leads");
        self.heat.restart();
        let serving = Serving(tokio::spawn(serve(self.bus.clone(), self.asked.0.clone())));
        self.role = Role::Leading {
            term,
            next_tick: Instant::now(),
            ticked: Seq(0),
            lost_behind: None,
            waits_since: None,
            _serving: serving,
        };
    }

    /// After a tick of its own term: decides and publishes; records the digests when they are due.
    async fn decide(&mut self, step: &Step) {
        let Role::Leading { term, .. } = &self.role else {
            return;
        };
        let term = *term;
        if step.decide != Some(term) || self.replica.diverged().is_some() {
            return;
        }
        for command in self.replica.state().decide() {
            let subject = subject::command(&command.node);
            let (id, verb) = (command.id, command.order.verb());
            if let Err(error) = self.publisher.publish(subject, &Event::CommandGiven(command)).await {
                tracing::warn!(command = %id, verb, %error, "a command was not given; it is decided anew");
                return;
            }
        }
        if let Some((state, decisions)) = step.digests {
            let event = Event::DigestRecorded {
                term,
                at: step.seq,
                state,
                decisions,
                chain: Some(step.chain),
            };
            if let Err(error) = self.publisher.publish(subject::record(&self.id), &event).await {
                tracing::warn!(at = %step.seq, %error, "a digest was not recorded");
            }
        }
    }

    async fn act(&mut self) {
        if self.frozen || self.replica.diverged().is_some() {
            if matches!(self.role, Role::Leading { .. }) {
                self.follow();
            }
            return self.postpone(LOOK_AGAIN);
        }
        match self.role {
            Role::Following { .. } => self.campaign().await,
            Role::Leading { .. } => self.tick().await,
        }
    }

    /// Starts a term, if this replica has folded everything that the stream holds.
    async fn campaign(&mut self) {
        match self.bus.bounds().await {
            Ok(bounds) if bounds.last != self.replica.position() => return self.postpone(LOOK_AGAIN),
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "no campaign without the stream");
                return self.postpone(self.timing.tick);
            }
        }
        let event = Event::TermStarted {
            term: self.replica.state().term().next(),
            previous: self.replica.previous(),
        };
        match self.publish_lead(&event).await {
            Ok(seq) => tracing::info!(%seq, "campaigned"),
            Err(error) => tracing::info!(%error, "did not win the term"),
        }
        // It leads when the log says so; else it waits for whoever won.
        self.postpone(self.timing.takeover);
    }

    async fn tick(&mut self) {
        let Role::Leading {
            term,
            ticked,
            lost_behind,
            waits_since,
            next_tick,
            ..
        } = &mut self.role
        else {
            return;
        };
        let waits_for_log =
            self.replica.position() < *ticked || lost_behind.is_some_and(|behind| self.replica.last_lead() <= behind);
        if waits_for_log {
            let since = *waits_since.get_or_insert_with(Instant::now);
            if since.elapsed() < self.timing.takeover {
                return self.postpone(LOOK_AGAIN);
            }
            // The stream acknowledged it and lost it before anybody read it; another term does not wait for it.
            tracing::warn!(%ticked, "what this leader published does not come back from the stream");
            return self.follow();
        }
        (*lost_behind, *waits_since) = (None, None);
        // A cadence, not a pause: late ticks do not make later ones late, and missed ones are not made up for.
        *next_tick = (*next_tick + self.timing.tick).max(Instant::now());
        let term = *term;
        for heat in self.heat.fold(self.replica.state(), term) {
            let node = heat.node.clone();
            let published = self
                .publisher
                .publish(subject::folded_heat(&self.id), &Event::HeatFolded(heat))
                .await;
            if let Err(error) = published {
                tracing::warn!(%node, %error, "heat was not folded into the log");
                return;
            }
        }
        let state = self.replica.state();
        let event = Event::Ticked {
            term,
            tick: state.tick().next(),
            time: wall_now().max(state.time()),
        };
        let expected = self.replica.last_lead();
        let published = self.publish_lead(&event).await;
        let Role::Leading {
            ticked, lost_behind, ..
        } = &mut self.role
        else {
            return;
        };
        match published {
            Ok(seq) => *ticked = seq,
            Err(PublishError::Conflict { .. }) => {
                tracing::info!(%term, "another message came before a tick");
                *lost_behind = Some(expected);
            }
            Err(error) => tracing::warn!(%term, %error, "no tick"),
        }
    }

    /// Publishes on the leadership subject, if the last message there is the last one folded.
    async fn publish_lead(&self, event: &Event) -> Result<Seq, PublishError> {
        let (own, last) = (subject::lead(&self.id), self.replica.last_lead());
        self.publisher
            .publish_expecting(own, event, subject::LEAD_ALL, last)
            .await
    }

    async fn answer(&mut self, (request, reply): Asked) {
        let state = self.replica.state();
        let answer = match request {
            SchedulerRequest::View => Ok(SchedulerReply::View(Box::new(scheduler_core::view(state)))),
            SchedulerRequest::ImageHeat { image } => scheduler_core::image_heat(state, image)
                .map(SchedulerReply::ImageHeat)
                .ok_or_else(|| {
                    Failure::new(
                        FailureKind::NotFound,
                        format!("there is no image {image}"),
                        "list them with: hearth image list",
                    )
                }),
            SchedulerRequest::Place { near, replicas } => scheduler_core::place(state, &near, replicas)
                .map(|nodes| SchedulerReply::Placed { nodes })
                .map_err(|misfit| {
                    Failure::new(
                        FailureKind::Refused,
                        misfit.to_string(),
                        "see who is there: hearth node list",
                    )
                }),
            SchedulerRequest::OkToStop { node } => scheduler_core::ok_to_stop(state, &node)
                .map(SchedulerReply::Stop)
                .ok_or_else(|| no_node(&node)),
            SchedulerRequest::NodeDrain { node, draining, reason } => {
                let asked = self.mark(&node, |term| Event::NodeDrainSet {
                    term,
                    node: node.clone(),
                    draining,
                    reason,
                });
                return self.record(asked, reply).await;
            }
            SchedulerRequest::NodeSet {
                node,
                fault_domain,
                reason,
            } => {
                let asked = self.mark(&node, |term| Event::FaultDomainSet {
                    term,
                    node: node.clone(),
                    fault_domain,
                    reason,
                });
                return self.record(asked, reply).await;
            }
            SchedulerRequest::PolicySet { policy, reason } => {
                let asked = self.policy_set(policy, reason);
                return self.record(asked, reply).await;
            }
            SchedulerRequest::LogRecovered { positions, reason } => {
                let asked = self.term().map(|term| Event::LogRecovered {
                    term,
                    positions,
                    reason,
                });
                return self.record(asked, reply).await;
            }
            SchedulerRequest::LossAccepted {
                positions,
                chain,
                reason,
            } => {
                let asked = self.term().map(|term| Event::LossAccepted {
                    term,
                    positions,
                    chain,
                    reason,
                });
                return self.record(asked, reply).await;
            }
        };
        // Who asked may have given up.
        let _ = reply.send(answer);
    }

    /// What an operator says of a node, if that ever joined.
    fn mark(&self, node: &NodeId, event: impl FnOnce(Term) -> Event) -> Result<Event, Failure> {
        match self.replica.state().knows_node(node) {
            true => self.term().map(event),
            false => Err(no_node(node)),
        }
    }

    fn term(&self) -> Result<Term, Failure> {
        match &self.role {
            Role::Leading { term, .. } => Ok(*term),
            Role::Following { .. } => Err(Failure::new(
                FailureKind::Failed,
                "this scheduler leads no more",
                "ask again",
            )),
        }
    }

    fn policy_set(&self, policy: hearth_protocol::policy::TierPolicy, reason: String) -> Result<Event, Failure> {
        policy
            .check()
            .map_err(|why| Failure::new(FailureKind::Usage, format!("the policy is not valid: {why}"), ""))?;
        Ok(Event::PolicySet {
            term: self.term()?,
            version: self.replica.state().policy().0 + 1,
            policy,
            reason,
        })
    }

    /// Publishes what an operator asked for; answered once the log has judged it.
    async fn record(&mut self, asked: Result<Event, Failure>, reply: oneshot::Sender<Answer<SchedulerReply>>) {
        let published = match asked {
            Err(failure) => Err(failure),
            Ok(_) if self.asked_record.is_some() => Err(Failure::new(
                FailureKind::Conflict,
                "another change is under way",
                "look at it first, then ask again: hearth log tail",
            )),
            Ok(event) => {
                let published = self.publisher.publish(subject::record(&self.id), &event).await;
                published.map_err(|error| {
                    Failure::new(
                        FailureKind::Failed,
                        error.to_string(),
                        "look whether it took effect, then ask again: hearth log tail",
                    )
                })
            }
        };
        match published {
            Ok(seq) => self.asked_record = Some((seq, reply)),
            // Who asked may have given up.
            Err(failure) => drop(reply.send(Err(failure))),
        }
    }

    fn confirm_record(&mut self, step: &Step) {
        if self.asked_record.as_ref().is_none_or(|(seq, _)| *seq > step.seq) {
            return;
        }
        let Some((seq, reply)) = self.asked_record.take() else {
            return;
        };
        let answer = match step.judged {
            Some(Judged::Valid) if step.seq == seq => Ok(SchedulerReply::Done { seq }),
            other => Err(Failure::new(
                FailureKind::Conflict,
                format!("the change did not count: {other:?}"),
                "another scheduler leads by now; ask again",
            )),
        };
        let _ = reply.send(answer);
    }
}

fn no_node(node: &NodeId) -> Failure {
    Failure::new(
        FailureKind::NotFound,
        format!("there is no node {node}"),
        "see who ever joined: hearth node list",
    )
}

/// Answers requests as long as this scheduler leads; a standby stays silent.
async fn serve(bus: Bus, to: mpsc::Sender<Asked>) {
    let handler = move |request: SchedulerRequest| {
        let to = to.clone();
        async move {
            let busy = || Failure::new(FailureKind::Failed, "the leadership has just moved", "ask again");
            let (reply, answer) = oneshot::channel();
            to.send((request, reply)).await.map_err(|_| busy())?;
            answer.await.map_err(|_| busy())?
        }
    };
    if let Err(error) = hearth_bus::rpc::serve(&bus, subject::SCHEDULER_RPC, handler).await {
        tracing::error!(%error, "requests are not answered");
    }
}
