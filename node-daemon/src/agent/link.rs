//! The node's connection to the log: follows it into [`ClusterFacts`] and publishes the node's own events.
//!
//! An image's event counts only if the shared validity rule says so at its place in the stream: [`Link::publish_image`]
//! returns when this node has read its own event back and knows.

use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::Duration;

use hearth_bus::{Bus, BusError, LogPublisher, PublishError, Reader};
use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_protocol::validity::Verdict;
use hearth_protocol::{Event, ImageId, Incarnation, NodeId, Publisher, Seq, subject};
use tokio::sync::watch;

use super::facts::ClusterFacts;
use super::seen::Seen;

/// Messages taken from the stream at once.
const FETCH_MAX: usize = 512;
/// How long one fetch waits.
const FETCH_WAIT: Duration = Duration::from_secs(1);
/// How long a request waits for this node to read back what it published.
const READ_BACK: Duration = Duration::from_secs(10);
/// Times that a change is published again because only garbage came before it.
const GARBAGE_MAX: u32 = 100;

/// How far the node has read, and whether it may go on.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The last message applied.
    pub applied: Seq,
    /// This process's own joining event, once published: everything before it is known when `applied` reaches it.
    pub joined: Option<Seq>,
    /// Set when the stream was rolled back: changes are frozen, I/O goes on.
    pub frozen: Option<String>,
}

impl Progress {
    /// Whether the node has read everything that was there when it joined.
    pub fn caught_up(&self) -> bool {
        self.joined.is_some_and(|joined| self.applied >= joined)
    }
}

/// What a batch of the log was about.
#[derive(Debug, Clone, Copy, Default)]
pub struct Batch {
    /// Images, layers or nodes came, went or moved: not so for the ticks and orders of every second.
    pub places: bool,
}

fn is_about_places(event: &Event) -> bool {
    !matches!(
        event,
        Event::TermStarted { .. }
            | Event::Ticked { .. }
            | Event::CommandGiven(_)
            | Event::CommandFinished { .. }
            | Event::HeatFolded(_)
            | Event::PolicySet { .. }
            | Event::DigestRecorded { .. }
            | Event::LogRecovered { .. }
    )
}

/// The connection. Cheap to clone.
#[derive(Clone)]
pub struct Link {
    own: NodeId,
    bus: Bus,
    publisher: LogPublisher,
    facts: Arc<RwLock<ClusterFacts>>,
    progress: Arc<watch::Sender<Progress>>,
}

impl Link {
    /// A link over a connected bus.
    pub fn new(own: NodeId, bus: Bus, incarnation: Incarnation) -> Self {
        let publisher = LogPublisher::new(bus.clone(), Publisher::Node(own.clone()), incarnation);
        Self {
            own,
            bus,
            publisher,
            facts: Arc::default(),
            progress: Arc::new(watch::Sender::default()),
        }
    }

    /// The same link; what it publishes carries an operator's words.
    #[must_use]
    pub fn because(&self, reason: &str) -> Self {
        Self {
            publisher: self.publisher.because(reason),
            ..self.clone()
        }
    }

    /// The bus below.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// What is known of the cluster.
    pub fn facts(&self) -> RwLockReadGuard<'_, ClusterFacts> {
        self.facts.read().expect("facts lock")
    }

    /// Notifies of progress.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Reads the log for ever; `applied` is called after each batch, outside all locks, and told what the batch was
    /// about. Reads nothing from a stream that does not hold what `seen` remembers, until it does.
    pub async fn follow(&self, mut seen: Seen, applied: impl Fn(Batch)) {
        let mut reader = self.bus.log_reader(Seq(1), subject::node_filters(&self.own));
        let mut said = String::new();
        let mut checked_opening = None;
        loop {
            let followed = self.follow_once(&mut reader, &mut seen, &mut checked_opening).await;
            match followed {
                Ok(None) => {}
                Ok(Some(batch)) => {
                    said.clear();
                    applied(batch);
                }
                Err(error @ BusError::RolledBack { .. }) => self.freeze(error.to_string()),
                Err(error) => {
                    let text = error.to_string();
                    if text != said {
                        tracing::warn!(error = text, "cannot read the log; trying again");
                        said = text;
                    }
                }
            }
        }
    }

    fn freeze(&self, why: String) {
        let fresh = self.progress.borrow().frozen.as_ref() != Some(&why);
        if fresh {
            tracing::error!("changes to images are frozen, their I/O goes on: {why}");
            self.progress.send_modify(|p| p.frozen = Some(why));
        }
    }

    /// Whether a reader that began anew reads the stream that this node has read before; freezes if not.
    async fn belongs(&self, seen: &Seen) -> Result<bool, BusError> {
        if let Err(why) = seen.is_in(&self.bus).await? {
            self.freeze(why);
            return Ok(false);
        }
        let thawed = self.progress.send_if_modified(|p| p.frozen.take().is_some());
        if thawed {
            tracing::info!("the stream continues what this node has read; changes are possible again");
        }
        Ok(true)
    }

    async fn follow_once(
        &self,
        reader: &mut Reader,
        seen: &mut Seen,
        checked_opening: &mut Option<u64>,
    ) -> Result<Option<Batch>, BusError> {
        if checked_opening.is_none() {
            // Before anything is read: what an earlier process saw must be there.
            while !self.belongs(seen).await? {
                tokio::time::sleep(FETCH_WAIT).await;
            }
            *checked_opening = Some(reader.openings());
        }
        let fetched = reader.fetch(FETCH_MAX, FETCH_WAIT).await?;
        if *checked_opening != Some(reader.openings()) {
            if !self.belongs(seen).await? {
                // What was fetched comes from a stream that does not count: read again from where the facts end.
                *reader = self
                    .bus
                    .log_reader(self.facts().seq().next(), subject::node_filters(&self.own));
                *checked_opening = None;
                return Ok(None);
            }
            *checked_opening = Some(reader.openings());
        }
        let Some(last) = fetched.last().map(|f| f.seq) else {
            return Ok(None);
        };
        let mut batch = Batch::default();
        {
            let mut facts = self.facts.write().expect("facts lock");
            for message in &fetched {
                facts.saw(message.seq, &message.subject);
                let decoded = message.decode();
                if let Err(error) = seen.take(message, decoded.as_ref().ok().map(|d| &d.event)) {
                    tracing::warn!(%error, "cannot write down what was seen of the log");
                }
                match decoded {
                    Ok(decoded) => {
                        batch.places |= is_about_places(&decoded.event);
                        facts.apply(&self.own, message.seq, &decoded.envelope, &decoded.event);
                    }
                    Err(error) => tracing::warn!(seq = %message.seq, %error, "a message in the log counts for nothing"),
                }
            }
        }
        self.progress.send_modify(|p| p.applied = last);
        Ok(Some(batch))
    }

    /// Publishes the event that says this process started, until it is in the log.
    pub async fn join(&self, event: &Event) {
        let seq = loop {
            match self.publisher.publish(subject::node(&self.own), event).await {
                Ok(seq) => break seq,
                Err(error) => {
                    tracing::warn!(%error, "cannot join yet; trying again");
                    tokio::time::sleep(FETCH_WAIT).await;
                }
            }
        };
        self.progress.send_modify(|p| p.joined = Some(seq));
    }

    /// Publishes a fact about this node.
    ///
    /// # Errors
    /// [`PublishError`].
    pub async fn publish_node(&self, event: &Event) -> Result<Seq, PublishError> {
        self.publisher.publish(subject::node(&self.own), event).await
    }

    /// Publishes a layer's event.
    ///
    /// # Errors
    /// As a [`Failure`].
    pub async fn publish_layer(&self, layer: hearth_protocol::LayerId, event: &Event) -> Result<Seq, Failure> {
        let subject = subject::layer(layer, self.publisher.publisher());
        self.publisher
            .publish(subject, event)
            .await
            .map_err(|error| publish_failure(&error))
    }

    /// Publishes an image's event by compare-and-publish and waits until it is known to count.
    ///
    /// # Errors
    /// `Conflict` when someone else was first or the event is void; `Timeout` when its fate is not known in time.
    pub async fn publish_image(&self, image: ImageId, event: &Event) -> Result<Seq, Failure> {
        self.ready()?;
        let subject = subject::image(image, self.publisher.publisher());
        let known = self.facts().aggregate(image);
        let mut lost = 0;
        let seq = loop {
            let expected = self.facts().tail(image);
            let filter = subject::image_all(image);
            match self
                .publisher
                .publish_expecting(subject.clone(), event, filter, expected)
                .await
            {
                Ok(seq) => break seq,
                Err(PublishError::Conflict { .. })
                    if lost < GARBAGE_MAX && self.only_garbage_came(image, expected, known).await =>
                {
                    lost += 1;
                }
                Err(error) => return Err(publish_failure(&error)),
            }
        };
        match self.verdict(seq).await? {
            Verdict::Valid => Ok(seq),
            Verdict::Void(why) => Err(Failure::new(
                FailureKind::Conflict,
                format!("the log holds the change at {seq}, but it does not count: {why}"),
                "look at what came first: hearth log list",
            )),
        }
    }

    /// Reads what came on an image's subjects after `expected`, and says whether no event was among it.
    async fn only_garbage_came(&self, image: ImageId, expected: Seq, known: Seq) -> bool {
        let mut progress = self.progress();
        let read = progress.wait_for(|_| self.facts().tail(image) > expected);
        let came = tokio::time::timeout(READ_BACK, read).await.is_ok();
        came && self.facts().aggregate(image) == known
    }

    async fn verdict(&self, seq: Seq) -> Result<Verdict, Failure> {
        let mut progress = self.progress();
        let read = progress.wait_for(|p| p.applied >= seq || p.frozen.is_some());
        let late = || {
            Failure::new(
                FailureKind::Timeout,
                format!("the change is in the log at {seq}, but this node could not read it back in time"),
                "look before you repeat it: hearth image list",
            )
        };
        match tokio::time::timeout(READ_BACK, read).await {
            Ok(Ok(_)) => self.facts().verdict(seq).ok_or_else(late),
            _ => Err(late()),
        }
    }

    /// Says whether changes are possible now.
    ///
    /// # Errors
    /// `Refused` while frozen, `Running` while the node still reads the log.
    pub fn ready(&self) -> Result<(), Failure> {
        let progress = self.progress.borrow();
        if let Some(why) = &progress.frozen {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("changes are frozen: {why}"),
                "restore the stream; running images are not affected",
            ));
        }
        if !progress.caught_up() {
            return Err(Failure::new(
                FailureKind::Running,
                "the node is still reading the log",
                "try again in a few seconds",
            ));
        }
        Ok(())
    }
}

fn publish_failure(error: &PublishError) -> Failure {
    let (kind, hint) = match error {
        PublishError::Conflict { .. } => (
            FailureKind::Conflict,
            "someone else changed it at the same time: look and try again",
        ),
        PublishError::Unknown { .. } => (FailureKind::Timeout, "look before you repeat it: hearth image list"),
        PublishError::Refused { .. } => (
            FailureKind::Failed,
            "make room in the stream HEARTH, or raise its limits",
        ),
        PublishError::TooLong { .. } => (FailureKind::Failed, "report this as a bug of Hearth"),
    };
    Failure::new(kind, error.to_string(), hint)
}
