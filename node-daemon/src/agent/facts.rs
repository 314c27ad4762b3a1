//! What a node knows of the cluster: a pure fold of the part of the log that it reads.
//!
//! It keeps names, stacks and addresses, judges every event with the shared validity rule, and holds the commands
//! that were given to this node and are not closed. It performs nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hearth_protocol::command::Outcome;
use hearth_protocol::event::{CopiesChecked, ImageCreated};
use hearth_protocol::publishers::{Arrival, Publishers};
use hearth_protocol::validity::{self, Validity, Verdict};
use hearth_protocol::{
    Command, CommandId, Envelope, Event, ImageId, ImageName, Incarnation, LayerId, NodeId, Seq, SnapshotName, TickNo,
    subject,
};

/// Verdicts remembered for requests that wait for their own event; a request waits for one at a time.
const VERDICTS_MAX: usize = 1_024;
/// Outcomes remembered, so that a repeated command gets the same answer.
const OUTCOMES_MAX: usize = 4_096;

/// An image as the log tells it.
#[derive(Debug, Clone)]
pub struct ImageFacts {
    /// Its creation; `layers` is kept up to date with snapshots.
    pub created: ImageCreated,
    /// Its snapshots and the layers they sealed, oldest first.
    pub snapshots: Vec<(SnapshotName, LayerId)>,
    /// Last event of its aggregate, the expectation of the next compare-and-publish.
    pub last: Seq,
}

impl ImageFacts {
    /// A layer took no more writes, and an empty one was put on top of it; either may be known already.
    fn pushed(&mut self, sealed: LayerId, top: LayerId) {
        for layer in [sealed, top] {
            if !self.created.layers.contains(&layer) {
                self.created.layers.insert(0, layer);
            }
        }
    }
}

/// The fold.
#[derive(Debug, Default)]
pub struct ClusterFacts {
    seq: Seq,
    tick: TickNo,
    validity: Validity,
    publishers: Publishers,
    images: BTreeMap<ImageId, ImageFacts>,
    aggregates: BTreeMap<ImageId, Seq>,
    tails: BTreeMap<ImageId, Seq>,
    holders: BTreeMap<LayerId, BTreeSet<NodeId>>,
    addresses: BTreeMap<NodeId, String>,
    joined: Option<Incarnation>,
    draining: BTreeSet<NodeId>,
    verdicts: VecDeque<(Seq, Verdict)>,
    open: Vec<Command>,
    outcomes: VecDeque<(CommandId, Outcome)>,
}

impl ClusterFacts {
    /// Notes where a message stands, whatever it says: the server compares with the last message of an aggregate, and
    /// counts repeats and garbage among them. Aggregates that never had a valid event are none: their ids are inventions.
    pub fn saw(&mut self, seq: Seq, subject: &str) {
        let tail = subject::image_of(subject).and_then(|image| self.tails.get_mut(&image));
        if let Some(tail) = tail {
            *tail = seq;
        }
    }

    /// Folds the next message. `own` is this node.
    pub fn apply(&mut self, own: &NodeId, seq: Seq, envelope: &Envelope, event: &Event) {
        self.seq = seq;
        if self.publishers.arrive(envelope) == Arrival::Repeat {
            return self.remember(seq, Verdict::Void("the event repeats an earlier one"));
        }
        let verdict = match self.validity.judge(&envelope.publisher, event) {
            Verdict::Valid if validity::marked(event).is_some_and(|node| !self.addresses.contains_key(node)) => {
                Verdict::Void(validity::NO_SUCH_NODE)
            }
            verdict => verdict,
        };
        self.remember(seq, verdict);
        if let Some(image) = image_of(event).filter(|id| verdict.is_valid() || self.aggregates.contains_key(id)) {
            self.aggregates.insert(image, seq);
            self.tails.insert(image, seq);
            if let Some(facts) = self.images.get_mut(&image) {
                facts.last = seq;
            }
        }
        if verdict.is_valid() {
            self.apply_valid(own, seq, event);
        }
    }

    fn remember(&mut self, seq: Seq, verdict: Verdict) {
        if self.verdicts.len() == VERDICTS_MAX {
            self.verdicts.pop_front();
        }
        self.verdicts.push_back((seq, verdict));
    }

    fn apply_valid(&mut self, own: &NodeId, seq: Seq, event: &Event) {
        match event {
            Event::ImageCreated(created) => {
                let facts = ImageFacts {
                    created: created.clone(),
                    snapshots: Vec::new(),
                    last: seq,
                };
                self.images.insert(created.image, facts);
            }
            Event::SnapshotTaken {
                image,
                name,
                sealed,
                top,
            } => {
                if let Some(facts) = self.images.get_mut(image) {
                    if facts.snapshots.iter().all(|(known, _)| known != name) {
                        facts.snapshots.push((name.clone(), *sealed));
                    }
                    facts.pushed(*sealed, *top);
                    self.holders
                        .entry(*sealed)
                        .or_default()
                        .insert(facts.created.node.clone());
                }
            }
            Event::ImageResized {
                image,
                size,
                sealed,
                top,
            } => {
                if let Some(facts) = self.images.get_mut(image) {
                    facts.created.size = *size;
                    facts.pushed(*sealed, *top);
                    self.holders
                        .entry(*sealed)
                        .or_default()
                        .insert(facts.created.node.clone());
                }
            }
            Event::SnapshotDeleted { image, name } => {
                if let Some(facts) = self.images.get_mut(image) {
                    facts.snapshots.retain(|(n, _)| n != name);
                }
            }
            Event::ImageDeleted { image } => {
                self.images.remove(image);
            }
            Event::LayerSealed { layer, node, .. } => {
                self.holders.entry(*layer).or_default().insert(node.clone());
            }
            Event::LayerDropped { layer, node } => {
                if let Some(nodes) = self.holders.get_mut(layer) {
                    nodes.remove(node);
                }
            }
            Event::NodeJoined(joined) => {
                if &joined.node == own {
                    self.joined = Some(joined.incarnation);
                }
                self.addresses.insert(joined.node.clone(), joined.peer_address.clone());
                for layer in &joined.layers {
                    self.holders.entry(*layer).or_default().insert(joined.node.clone());
                }
            }
            Event::NodeDrainSet {
                node, draining: true, ..
            } => drop(self.draining.insert(node.clone())),
            Event::NodeDrainSet {
                node, draining: false, ..
            } => drop(self.draining.remove(node)),
            Event::Ticked { tick, .. } => self.tick = *tick,
            Event::CommandGiven(command) if &command.node == own => {
                let known = self.open.iter().any(|c| c.id == command.id) || self.outcome(command.id).is_some();
                if !known {
                    self.open.push(command.clone());
                }
            }
            Event::CommandFinished { command, node, outcome } if node == own => {
                self.open.retain(|c| c.id != *command);
                if self.outcomes.len() == OUTCOMES_MAX {
                    self.outcomes.pop_front();
                }
                self.outcomes.push_back((*command, outcome.clone()));
            }
            _ => {}
        }
    }

    /// The last message folded.
    pub fn seq(&self) -> Seq {
        self.seq
    }

    /// The process start that this node last joined with.
    pub fn joined(&self) -> Option<Incarnation> {
        self.joined
    }

    /// The last tick.
    pub fn tick(&self) -> TickNo {
        self.tick
    }

    /// The shared rule's memory.
    pub fn validity(&self) -> &Validity {
        &self.validity
    }

    /// How an earlier command ended, if it is remembered.
    pub fn outcome(&self, id: CommandId) -> Option<&Outcome> {
        self.outcomes.iter().find(|(c, _)| *c == id).map(|(_, o)| o)
    }

    /// The verdict on one message, while it is remembered.
    pub fn verdict(&self, seq: Seq) -> Option<Verdict> {
        self.verdicts.iter().rev().find(|(s, _)| *s == seq).map(|(_, v)| *v)
    }

    /// Commands given to this node and not closed, in the order given.
    pub fn open_commands(&self) -> &[Command] {
        &self.open
    }

    /// An image by name.
    pub fn image_named(&self, name: &ImageName) -> Option<(ImageId, &ImageFacts)> {
        let id = self.validity.by_name(name)?;
        Some((id, self.images.get(&id)?))
    }

    /// An image by id.
    pub fn image(&self, id: ImageId) -> Option<&ImageFacts> {
        self.images.get(&id)
    }

    /// All images, ascending by id.
    pub fn images(&self) -> impl Iterator<Item = (ImageId, &ImageFacts)> {
        self.images.iter().map(|(id, facts)| (*id, facts))
    }

    /// The last message of an image's aggregate, the expectation of the next compare-and-publish; 0 if there is none.
    pub fn tail(&self, id: ImageId) -> Seq {
        self.tails.get(&id).copied().unwrap_or_default()
    }

    /// The last event of an image's aggregate; 0 if there is none.
    pub fn aggregate(&self, id: ImageId) -> Seq {
        self.aggregates.get(&id).copied().unwrap_or_default()
    }

    /// Images that stand on a snapshot of `image`.
    pub fn clones_of(&self, image: ImageId) -> impl Iterator<Item = &ImageName> {
        self.images
            .values()
            .filter(move |f| f.created.parent.as_ref().is_some_and(|(p, _)| *p == image))
            .map(|f| &f.created.name)
    }

    /// Whether an operator has a node drained: it gets nothing new.
    pub fn drains(&self, node: &NodeId) -> bool {
        self.draining.contains(node)
    }

    /// How many replicas an image is to have; `None` for one that has none.
    pub fn wanted(&self, id: ImageId) -> Option<u64> {
        let known = self.validity.image(id)?;
        known.locations.as_ref()?;
        let created = self.images.get(&id)?.created.members.len() as u64;
        Some(known.wanted.unwrap_or(created))
    }

    /// Where nodes listen for others.
    pub fn addresses(&self) -> &BTreeMap<NodeId, String> {
        &self.addresses
    }

    /// Where other nodes that hold a sealed layer can be reached, ascending by node.
    pub fn addresses_of(&self, layer: LayerId, own: &NodeId) -> Vec<String> {
        let Some(nodes) = self.holders.get(&layer) else {
            return Vec::new();
        };
        nodes
            .iter()
            .filter(|n| *n != own)
            .filter_map(|n| self.addresses.get(n).cloned())
            .collect()
    }
}

fn image_of(event: &Event) -> Option<ImageId> {
    match event {
        Event::ImageCreated(created) => Some(created.image),
        Event::ImageAttached(attached) => Some(attached.image),
        Event::ImageDetached { image, .. }
        | Event::SnapshotTaken { image, .. }
        | Event::SnapshotDeleted { image, .. }
        | Event::ImageResized { image, .. }
        | Event::LocationsChanged { image, .. }
        | Event::ReplicasSet { image, .. }
        | Event::CopiesChecked(CopiesChecked { image, .. })
        | Event::ImageExported { image, .. }
        | Event::ImageDeleted { image } => Some(*image),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::{ByteLen, Incarnation, Publisher, SetVersion, Term, WallMs};

    use super::*;

    struct Script {
        facts: ClusterFacts,
        seq: u64,
        own: NodeId,
    }

    impl Script {
        fn new() -> Self {
            Self {
                facts: ClusterFacts::default(),
                seq: 0,
                own: "node-1".parse().unwrap(),
            }
        }

        fn event(&mut self, publisher: &Publisher, publisher_seq: u64, event: &Event) -> Verdict {
            self.seq += 1;
            let envelope = Envelope {
                codec: 1,
                subject: "hearth.log.test".into(),
                publisher: publisher.clone(),
                incarnation: Incarnation(7),
                publisher_seq,
                time: WallMs(0),
                reason: String::new(),
            };
            self.facts.apply(&self.own.clone(), Seq(self.seq), &envelope, event);
            self.facts.verdict(Seq(self.seq)).unwrap()
        }
    }

    fn created(image: u128, name: &str, node: &str) -> Event {
        Event::ImageCreated(ImageCreated {
            image: ImageId(image),
            name: name.parse().unwrap(),
            size: ByteLen(1 << 20),
            block_size: ByteLen(65536),
            layers: vec![LayerId(image + 100)],
            parent: None,
            node: node.parse().unwrap(),
            set_version: SetVersion(1),
            members: Default::default(),
        })
    }

    #[test]
    fn a_repeat_is_not_judged_twice_and_a_taken_name_is_void() {
        let mut script = Script::new();
        let one = Publisher::Node("node-1".parse().unwrap());
        let two = Publisher::Node("node-2".parse().unwrap());
        assert!(script.event(&one, 1, &created(1, "a/b", "node-1")).is_valid());
        assert!(!script.event(&one, 1, &created(1, "a/b", "node-1")).is_valid());
        assert!(!script.event(&two, 1, &created(2, "a/b", "node-2")).is_valid());
        assert!(script.event(&two, 2, &created(2, "a/c", "node-2")).is_valid());
        let deleted = Event::ImageDeleted { image: ImageId(1) };
        assert!(!script.event(&two, 3, &deleted).is_valid());
        assert!(script.event(&one, 2, &deleted).is_valid());
        assert!(script.event(&two, 4, &created(3, "a/b", "node-2")).is_valid());
        assert_eq!(script.facts.aggregate(ImageId(1)), Seq(6));
    }

    #[test]
    fn an_event_that_was_overtaken_counts_as_it_does_for_the_scheduler() {
        let mut script = Script::new();
        let one = Publisher::Node("node-1".parse().unwrap());
        assert!(script.event(&one, 2, &created(1, "a/b", "node-1")).is_valid());
        assert!(script.event(&one, 1, &created(2, "a/c", "node-1")).is_valid());
        assert!(!script.event(&one, 1, &created(3, "a/d", "node-1")).is_valid());
    }

    #[test]
    fn invented_images_are_not_remembered() {
        let mut script = Script::new();
        let one = Publisher::Node("node-1".parse().unwrap());
        let two = Publisher::Node("node-2".parse().unwrap());
        script.event(&one, 1, &created(1, "a/b", "node-1"));
        for id in 2..1_000 {
            script.facts.saw(Seq(id), &subject::image(ImageId(id.into()), &two));
            let void = script.event(
                &two,
                id,
                &Event::ImageDeleted {
                    image: ImageId(id.into()),
                },
            );
            assert!(!void.is_valid());
        }
        assert_eq!((script.facts.tails.len(), script.facts.aggregates.len()), (1, 1));
        // Garbage on a known image's subject counts as its tail, and an image that is gone stays known as that.
        script.facts.saw(Seq(5_000), &subject::image(ImageId(1), &two));
        assert_eq!(script.facts.tail(ImageId(1)), Seq(5_000));
        script.event(&one, 2, &Event::ImageDeleted { image: ImageId(1) });
        assert!(script.facts.aggregate(ImageId(1)) > Seq(0));
    }

    #[test]
    fn commands_stay_open_until_this_node_closes_them() {
        use hearth_protocol::command::{Order, Reason};
        let mut script = Script::new();
        let sched = Publisher::Scheduler("s".parse().unwrap());
        let one = Publisher::Node("node-1".parse().unwrap());
        script.event(
            &sched,
            1,
            &Event::TermStarted {
                term: Term(1),
                previous: None,
            },
        );
        let command = |id, node: &str| {
            Event::CommandGiven(Command {
                id: CommandId(id),
                node: node.parse().unwrap(),
                term: Term(1),
                tick: TickNo(1),
                expires: TickNo(9),
                order: Order::Demote {
                    layer: LayerId(1),
                    blocks: vec![],
                    bytes: ByteLen(0),
                },
                reason: Reason {
                    rule: "tier/demote".into(),
                    policy_version: 1,
                    numbers: vec![],
                    rests_on: vec![],
                    lost: vec![],
                    lost_nodes: vec![],
                },
            })
        };
        script.event(&sched, 2, &command(1, "node-1"));
        script.event(&sched, 3, &command(2, "node-2"));
        script.event(&sched, 4, &command(3, "node-1"));
        let ids = |s: &Script| s.facts.open_commands().iter().map(|c| c.id.0).collect::<Vec<_>>();
        assert_eq!(ids(&script), [1, 3]);
        let outcome = Outcome::Refused { why: "no".into() };
        let done = Event::CommandFinished {
            command: CommandId(1),
            node: "node-1".parse().unwrap(),
            outcome,
        };
        script.event(&one, 1, &done);
        assert_eq!(ids(&script), [3]);
        script.event(&sched, 5, &command(1, "node-1"));
        assert_eq!(ids(&script), [3], "a closed command is not executed again");
    }

    #[test]
    fn a_drain_counts_for_nodes_that_joined_as_it_does_for_the_scheduler() {
        let mut script = Script::new();
        let sched = Publisher::Scheduler("s".parse().unwrap());
        let (one, two): (NodeId, NodeId) = ("node-1".parse().unwrap(), "node-2".parse().unwrap());
        let start = Event::TermStarted {
            term: Term(1),
            previous: None,
        };
        assert!(script.event(&sched, 1, &start).is_valid());
        let joined = Event::NodeJoined(hearth_protocol::event::NodeJoined {
            node: one.clone(),
            incarnation: Incarnation(7),
            storage_incarnation: Incarnation(8),
            previous: None,
            ram: ByteLen(0),
            main: ByteLen(0),
            fault_domain: "rack-1".into(),
            peer_address: "tcp:127.0.0.1:10809".into(),
            layers: vec![],
            heat_source: "export".into(),
        });
        assert!(script.event(&Publisher::Node(one.clone()), 1, &joined).is_valid());
        let drain = |node: &NodeId, draining| Event::NodeDrainSet {
            term: Term(1),
            node: node.clone(),
            draining,
            reason: String::new(),
        };
        assert!(!script.event(&sched, 2, &drain(&two, true)).is_valid());
        assert!(script.event(&sched, 3, &drain(&one, true)).is_valid());
        assert_eq!((script.facts.drains(&one), script.facts.drains(&two)), (true, false));
        assert!(script.event(&sched, 4, &drain(&one, false)).is_valid());
        assert!(!script.facts.drains(&one));
    }

    #[test]
    fn as_many_replicas_are_wanted_as_the_image_was_created_with_until_that_is_set() {
        let mut script = Script::new();
        let one = Publisher::Node("node-1".parse().unwrap());
        let Event::ImageCreated(mut with) = created(1, "a/b", "node-1") else {
            unreachable!()
        };
        with.members = ["node-1", "node-2"].iter().map(|id| id.parse().unwrap()).collect();
        script.event(&one, 1, &Event::ImageCreated(with));
        script.event(&one, 2, &created(2, "a/c", "node-1"));
        assert_eq!(
            (script.facts.wanted(ImageId(1)), script.facts.wanted(ImageId(2))),
            (Some(2), None)
        );
        let set = Event::ReplicasSet {
            image: ImageId(1),
            wanted: 3,
        };
        assert!(script.event(&one, 3, &set).is_valid());
        assert_eq!(script.facts.wanted(ImageId(1)), Some(3));
        assert_eq!(script.facts.tail(ImageId(1)), Seq(3));
    }
}
