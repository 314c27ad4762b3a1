//! The node's connection to the log: follows it into [`ClusterFacts`] and publishes the node's own events.
//!
//! An image's event counts only if the shared validity rule says so at its place in the stream: [`Link::publish_image`]
//! returns when this node has read its own event back and knows.

use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::Duration;

use hearth_bus::{Bus, BusError, LogPublisher, PublishError, Reader};
use hearth_protocol::aggregate::Change;
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
    /// The stream is known to hold what this node has read before.
    pub belongs: bool,
    /// How often an operator's word replaced what was read before by another history.
    pub histories: u64,
    /// Images of store and log were compared since: changes are possible.
    pub reconciled: bool,
}

impl Progress {
    /// Whether the node has read everything that was there when it joined.
    pub fn caught_up(&self) -> bool {
        self.joined.is_some_and(|joined| self.applied >= joined)
    }
}

/// What reads the log.
struct Follower {
    reader: Reader,
    seen: Seen,
    /// The opening of the reader whose stream is known to be the one read before.
    checked_opening: Option<u64>,
    /// While it is not: that stream, read from its beginning.
    anew: Option<Anew>,
}

/// A stream that does not hold what was read before, read from its beginning to find an operator's word that it counts.
struct Anew {
    reader: Reader,
    opening: Option<u64>,
    facts: ClusterFacts,
    seen: Seen,
    released: bool,
}

impl Anew {
    fn new(reader: Reader, seen: &Seen) -> Self {
        Self {
            reader,
            opening: None,
            facts: ClusterFacts::default(),
            seen: seen.anew(),
            released: false,
        }
    }

    /// Reads on. At the end of what is there: whether an operator released this node from what `former` saw. `None` when
    /// the stream is another one than before.
    async fn on(&mut self, own: &NodeId, former: &Seen) -> Result<Option<bool>, BusError> {
        let fetched = self.reader.fetch(FETCH_MAX, FETCH_WAIT).await?;
        if *self.opening.get_or_insert(self.reader.openings()) != self.reader.openings() {
            return Ok(None);
        }
        for message in &fetched {
            self.facts.saw(message.seq, &message.subject);
            let decoded = message.decode().ok();
            if let Some(decoded) = &decoded {
                self.facts.apply(own, message.seq, &decoded.envelope, &decoded.event);
                let valid = self.facts.verdict(message.seq).is_some_and(Verdict::is_valid);
                self.released |= valid && former.is_released_by(message, &decoded.event);
            }
            self.seen.note(message, decoded.as_ref().map(|d| &d.event));
        }
        Ok(Some(self.released && fetched.len() < FETCH_MAX))
    }
}

/// What a batch of the log was about.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Images, layers or nodes came, went or moved: not so for the ticks and orders of every second.
    pub places: bool,
    /// Changes of images' records, valid or not, in the log's order.
    pub changes: Vec<(ImageId, Change)>,
    /// The log is another one than the batch before.
    pub anew: bool,
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
            | Event::LossAccepted { .. }
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

    /// The operator's words; may be empty.
    pub fn reason(&self) -> &str {
        self.publisher.reason()
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
    /// about. Reads nothing from a stream that does not hold what `seen` remembers, until it does, or until an operator
    /// has written into it that this counts no more.
    pub async fn follow(&self, seen: Seen, applied: impl Fn(Batch)) {
        let mut follower = Follower {
            reader: self.reader(Seq(1)),
            seen,
            checked_opening: None,
            anew: None,
        };
        let mut said = String::new();
        loop {
            let followed = self.follow_once(&mut follower).await;
            match followed {
                Ok(None) => {}
                Ok(Some(batch)) => {
                    said.clear();
                    applied(batch);
                }
                Err(error @ BusError::RolledBack { .. }) => {
                    self.freeze(error.to_string());
                    follower.checked_opening = None;
                }
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

    fn reader(&self, from: Seq) -> Reader {
        self.bus.log_reader(from, subject::node_filters(&self.own))
    }

    fn freeze(&self, why: String) {
        let fresh = self.progress.borrow().frozen.as_ref() != Some(&why);
        if fresh {
            tracing::error!("changes to images are frozen, their I/O goes on: {why}");
            self.progress.send_modify(|p| {
                p.belongs = false;
                p.frozen = Some(why);
            });
        }
    }

    /// Whether a reader that began anew reads the stream that this node has read before; freezes if not.
    async fn belongs(&self, seen: &Seen) -> Result<bool, BusError> {
        if let Err(why) = seen.is_in(&self.bus).await? {
            self.freeze(why);
            return Ok(false);
        }
        let frozen = self.progress.borrow().frozen.is_some();
        self.progress.send_if_modified(|p| {
            let changes = !p.belongs || p.frozen.is_some();
            p.belongs = true;
            p.frozen = None;
            changes
        });
        if frozen {
            tracing::info!("the stream continues what this node has read; changes are possible again");
        }
        Ok(true)
    }

    async fn follow_once(&self, follower: &mut Follower) -> Result<Option<Batch>, BusError> {
        let Follower {
            reader,
            seen,
            checked_opening,
            anew,
        } = follower;
        if checked_opening.is_none() {
            // Before anything is read: what an earlier process saw must be there.
            while !self.belongs(seen).await? {
                let read = anew.get_or_insert_with(|| Anew::new(self.reader(Seq(1)), seen));
                match read.on(&self.own, seen).await {
                    Ok(Some(released)) if released => {
                        let read = anew.take().expect("just read");
                        self.begin_anew(read, follower);
                        return Ok(Some(Batch {
                            places: true,
                            anew: true,
                            ..Batch::default()
                        }));
                    }
                    Ok(Some(_)) => {}
                    // Another stream again, or none: from its beginning.
                    Ok(None) | Err(BusError::RolledBack { .. }) => {
                        *anew = None;
                        tokio::time::sleep(FETCH_WAIT).await;
                    }
                    Err(error) => return Err(error),
                }
            }
            *anew = None;
            *checked_opening = Some(reader.openings());
        }
        let fetched = reader.fetch(FETCH_MAX, FETCH_WAIT).await?;
        if *checked_opening != Some(reader.openings()) {
            if !self.belongs(seen).await? {
                // What was fetched comes from a stream that does not count: read again from where the facts end.
                *reader = self.reader(self.facts().seq().next());
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
                        if let Event::LocationsChanged { image, change } = decoded.event {
                            batch.changes.push((image, change));
                        }
                    }
                    Err(error) => tracing::warn!(seq = %message.seq, %error, "a message in the log counts for nothing"),
                }
            }
        }
        self.progress.send_modify(|p| p.applied = last);
        Ok(Some(batch))
    }

    /// Takes a history that an operator said counts, read from its beginning, in place of the one read before.
    fn begin_anew(&self, read: Anew, follower: &mut Follower) {
        let applied = read.facts.seq();
        tracing::warn!(
            %applied,
            "an operator accepted that what this node read before counts no more: it goes on with the stream as it is"
        );
        *self.facts.write().expect("facts lock") = read.facts;
        follower.checked_opening = read.opening;
        follower.reader = read.reader;
        follower.seen = read.seen;
        self.progress.send_modify(|p| {
            *p = Progress {
                applied,
                belongs: true,
                histories: p.histories + 1,
                ..Progress::default()
            };
        });
    }

    /// Publishes the event that says this process started, until it is in the log; not into a stream that is not known
    /// to hold what was read before.
    pub async fn join(&self, event: &Event) {
        let mut progress = self.progress();
        let seq = loop {
            // The sender lives as long as this.
            let _ = progress.wait_for(|p| p.belongs).await;
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
        if let Some(why) = self.frozen() {
            return Err(PublishError::Unknown {
                subject: subject::node(&self.own),
                reason: format!("not sent, changes are frozen: {why}"),
            });
        }
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

    /// Why changes are frozen, if they are.
    pub fn frozen(&self) -> Option<String> {
        self.progress.borrow().frozen.clone()
    }

    /// Store and log were compared.
    pub fn reconciled(&self) {
        self.progress.send_modify(|p| p.reconciled = true);
    }

    /// Says whether requests for changes are taken now: as [`Link::ready`], and store and log were compared.
    ///
    /// # Errors
    /// As [`Link::ready`].
    pub fn takes_changes(&self) -> Result<(), Failure> {
        self.ready()?;
        if self.progress.borrow().reconciled {
            Ok(())
        } else {
            Err(still_reading())
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
                "put back what the stream lost, or accept the loss: hearth log recover; running images are not affected",
            ));
        }
        if !progress.caught_up() {
            return Err(still_reading());
        }
        Ok(())
    }
}

fn still_reading() -> Failure {
    Failure::new(
        FailureKind::Running,
        "the node is still reading the log",
        "try again in a few seconds",
    )
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
