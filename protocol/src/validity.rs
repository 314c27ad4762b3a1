//! Which events count: one function of the stream's prefix, shared by the scheduler's fold, the nodes and the replicas.
//!
//! An event is *void* (kept in the log, not applied) if
//! - a scheduler's event or command carries a term lower than the highest before it, or a term nobody won;
//! - `TermStarted` does not carry exactly the highest term + 1;
//! - an image event comes from a node that is not the image's owner at that point;
//! - `Ticked` does not carry a number above every tick before it;
//! - `ImageCreated` takes an id or a name that exists, or has a size, block size or stack outside the limits, or
//!   `ImageAttached` carries another epoch than the last + 1;
//! - an image with replicas is attached, or its nodes change, otherwise than by [`Event::LocationsChanged`], or that
//!   does not follow from its record ([`crate::aggregate`]);
//! - the number of replicas is set of an image that has none, or outside the limits;
//! - an operator's mark on a node names one that never joined ([`marked`]), or a fault domain outside the limits;
//! - the publisher has no right to that kind of event at all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::aggregate::Aggregate;
use crate::event::Event;
use crate::ids::{ImageId, ImageName, LeaseId, NodeId, Publisher, SchedulerId};
use crate::limits::{
    DIFFERENCES_NAMED_MAX, FAULT_DOMAIN_BYTES_MAX, IMAGE_BYTES_MAX, LAYERS_PER_IMAGE_MAX, REPLICAS_MAX,
};
use crate::units::{Epoch, Term, TickNo, is_block_size};

/// The verdict on one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It counts.
    Valid,
    /// It is kept and not applied, for this reason.
    Void(&'static str),
}

impl Verdict {
    /// Whether it counts.
    pub fn is_valid(self) -> bool {
        self == Verdict::Valid
    }
}

/// What must be remembered of an image to judge the next event about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// Its name.
    pub name: ImageName,
    /// The node that holds its top layer and may attach it.
    pub home: NodeId,
    /// The highest epoch granted; 0 before the first attach.
    pub epoch: Epoch,
    /// The owner and its lease while attached.
    pub owner: Option<(NodeId, LeaseId)>,
    /// Its record, if it has replicas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locations: Option<Aggregate>,
    /// How many replicas it is to have, if that was set after its creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<u64>,
}

impl Ownership {
    /// Whether a node holds the image: all of it or, of one with replicas, some blocks at least.
    pub fn is_held_by(&self, node: &NodeId) -> bool {
        match &self.locations {
            Some(locations) => locations.record.members().contains(node),
            None => &self.home == node,
        }
    }
}

/// The node that an operator's mark is about. The mark is void, for [`NO_SUCH_NODE`], if that node never joined; who joined
/// is for whoever folds to remember.
pub fn marked(event: &Event) -> Option<&NodeId> {
    match event {
        Event::NodeDrainSet { node, .. } | Event::FaultDomainSet { node, .. } => Some(node),
        _ => None,
    }
}

/// Why a mark on an unknown node is void.
pub const NO_SUCH_NODE: &str = "no node of that id ever joined";

/// The memory of the rule: fold every event of the stream through [`Validity::judge`], in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Validity {
    term: Term,
    leader: Option<SchedulerId>,
    #[serde(default)]
    tick: TickNo,
    images: BTreeMap<ImageId, Ownership>,
    names: BTreeMap<ImageName, ImageId>,
}

impl Validity {
    /// The highest term won.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Who won it.
    pub fn leader(&self) -> Option<&SchedulerId> {
        self.leader.as_ref()
    }

    /// The last valid tick.
    pub fn tick(&self) -> TickNo {
        self.tick
    }

    /// The image of that name.
    pub fn by_name(&self, name: &ImageName) -> Option<ImageId> {
        self.names.get(name).copied()
    }

    /// What is known of an image.
    pub fn image(&self, id: ImageId) -> Option<&Ownership> {
        self.images.get(&id)
    }

    /// All images, ascending by id.
    pub fn images(&self) -> impl Iterator<Item = (ImageId, &Ownership)> {
        self.images.iter().map(|(id, o)| (*id, o))
    }

    /// Judges the next event of the stream and remembers what it changes.
    pub fn judge(&mut self, publisher: &Publisher, event: &Event) -> Verdict {
        match publisher {
            Publisher::Scheduler(id) => self.judge_scheduler(id, event),
            Publisher::Node(id) => self.judge_node(id, event),
        }
    }

    fn judge_scheduler(&mut self, id: &SchedulerId, event: &Event) -> Verdict {
        let Some(term) = event.term() else {
            return Verdict::Void("a scheduler does not publish this kind of event");
        };
        if let Event::TermStarted { .. } = event {
            if term != self.term.next() {
                return Verdict::Void("the term is not the highest plus one");
            }
            self.term = term;
            self.leader = Some(id.clone());
            return Verdict::Valid;
        }
        if term != self.term {
            return Verdict::Void("the term is not the highest");
        }
        if self.leader.as_ref() != Some(id) {
            return Verdict::Void("the term was won by another scheduler");
        }
        if let Event::FaultDomainSet { fault_domain, .. } = event
            && fault_domain.len() > FAULT_DOMAIN_BYTES_MAX
        {
            return Verdict::Void("the fault domain's name is outside the limits");
        }
        if let Event::Ticked { tick, .. } = event {
            if *tick <= self.tick {
                return Verdict::Void("the tick is not above the last");
            }
            self.tick = *tick;
        }
        Verdict::Valid
    }

    fn judge_node(&mut self, node: &NodeId, event: &Event) -> Verdict {
        match event {
            Event::ImageCreated(created) => {
                if &created.node != node {
                    return Verdict::Void("a node creates images on itself only");
                }
                if !is_block_size(created.block_size.0) || created.size.0 > IMAGE_BYTES_MAX {
                    return Verdict::Void("the image's size or block size is outside the limits");
                }
                if created.layers.is_empty() || created.layers.len() > LAYERS_PER_IMAGE_MAX {
                    return Verdict::Void("the image's stack is empty or too deep");
                }
                if self.images.contains_key(&created.image) {
                    return Verdict::Void("the image id exists");
                }
                if self.names.contains_key(&created.name) {
                    return Verdict::Void("the image name is taken");
                }
                let locations = if created.members.is_empty() {
                    None
                } else if let Ok(new) = Aggregate::new(created.set_version, created.members.clone()) {
                    Some(new)
                } else {
                    return Verdict::Void("the image's record is none");
                };
                if locations.is_some() && !created.members.contains(node) {
                    return Verdict::Void("a node creates images on itself only");
                }
                self.names.insert(created.name.clone(), created.image);
                self.images.insert(
                    created.image,
                    Ownership {
                        name: created.name.clone(),
                        home: node.clone(),
                        epoch: Epoch(0),
                        owner: None,
                        locations,
                        wanted: None,
                    },
                );
                Verdict::Valid
            }
            Event::ImageAttached(attached) => {
                let Some(image) = self.images.get_mut(&attached.image) else {
                    return Verdict::Void("no such image");
                };
                if &attached.node != node || &image.home != node {
                    return Verdict::Void("the node is neither owner nor named successor");
                }
                if image.locations.is_some() {
                    return Verdict::Void("an image with replicas is attached by a change of its record");
                }
                if attached.epoch != image.epoch.next() {
                    return Verdict::Void("the epoch is not the last plus one");
                }
                image.epoch = attached.epoch;
                image.owner = Some((node.clone(), attached.lease));
                Verdict::Valid
            }
            Event::LocationsChanged { image, change } => {
                let Some(known) = self.images.get_mut(image) else {
                    return Verdict::Void("no such image");
                };
                let Some(locations) = &mut known.locations else {
                    return Verdict::Void("the image has no replicas");
                };
                if &change.by != node {
                    return Verdict::Void("a node speaks for itself only");
                }
                if let Err(void) = locations.judge(change) {
                    return Verdict::Void(void.why());
                }
                let (epoch, lease) = locations.record.grant();
                if epoch != known.epoch {
                    known.epoch = epoch;
                    known.owner = Some((node.clone(), lease));
                }
                Verdict::Valid
            }
            Event::ImageDetached { image, epoch } => {
                let Some(known) = self.images.get_mut(image) else {
                    return Verdict::Void("no such image");
                };
                if known.owner.as_ref().map(|(n, _)| n) != Some(node) || known.epoch != *epoch {
                    return Verdict::Void("the node is not the owner at this epoch");
                }
                known.owner = None;
                Verdict::Valid
            }
            Event::ImageResized { image, size, .. } => {
                if size.0 > IMAGE_BYTES_MAX {
                    return Verdict::Void("the image's size is outside the limits");
                }
                self.owned_by(*image, node)
            }
            Event::ReplicasSet { image, wanted } => {
                if !(1..=REPLICAS_MAX).contains(wanted) {
                    return Verdict::Void("the number of replicas is outside the limits");
                }
                let verdict = self.owned_by(*image, node);
                match self.images.get_mut(image).filter(|_| verdict.is_valid()) {
                    Some(known) if known.locations.is_none() => Verdict::Void("the image has no replicas"),
                    Some(known) => {
                        known.wanted = Some(*wanted);
                        Verdict::Valid
                    }
                    None => verdict,
                }
            }
            Event::CopiesChecked(checked) => match self.images.get(&checked.image) {
                _ if checked.named.len() > DIFFERENCES_NAMED_MAX => Verdict::Void("it names too many blocks"),
                None => Verdict::Void("no such image"),
                Some(known) if known.owner.as_ref().is_some_and(|(owner, _)| owner == node) => Verdict::Valid,
                Some(_) => Verdict::Void("the node is not the owner"),
            },
            Event::SnapshotTaken { image, .. }
            | Event::SnapshotDeleted { image, .. }
            | Event::ImageExported { image, .. } => self.owned_by(*image, node),
            Event::ImageDeleted { image } => {
                let verdict = self.owned_by(*image, node);
                if verdict.is_valid() {
                    if self.images[image].owner.is_some() {
                        return Verdict::Void("the image is attached");
                    }
                    if let Some(gone) = self.images.remove(image) {
                        self.names.remove(&gone.name);
                    }
                }
                verdict
            }
            Event::LayerSealed { node: n, .. }
            | Event::LayerDropped { node: n, .. }
            | Event::NodeLeft { node: n }
            | Event::CommandFinished { node: n, .. } => {
                if n == node {
                    Verdict::Valid
                } else {
                    Verdict::Void("a node speaks for itself only")
                }
            }
            Event::NodeJoined(joined) => {
                if &joined.node == node {
                    Verdict::Valid
                } else {
                    Verdict::Void("a node speaks for itself only")
                }
            }
            _ => Verdict::Void("a node does not publish this kind of event"),
        }
    }

    fn owned_by(&self, image: ImageId, node: &NodeId) -> Verdict {
        match self.images.get(&image) {
            None => Verdict::Void("no such image"),
            Some(known) if known.is_held_by(node) => Verdict::Valid,
            Some(_) => Verdict::Void("the node does not hold the image"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::aggregate::Change;
    use crate::event::{ImageAttached, ImageCreated};
    use crate::ids::LayerId;
    use crate::record::{Nodes, Record};
    use crate::units::{ByteLen, SetVersion};

    fn sched(id: &str) -> Publisher {
        Publisher::Scheduler(id.parse().unwrap())
    }

    fn check(validity: &mut Validity, by: &Publisher, event: Event, valid: bool) {
        let verdict = validity.judge(by, &event);
        assert_eq!(verdict.is_valid(), valid, "{event:?}: {verdict:?}");
    }

    #[test]
    fn only_the_highest_term_and_its_winner_count() {
        let mut v = Validity::default();
        let tick_no = |term, tick| Event::Ticked {
            term: Term(term),
            tick: TickNo(tick),
            time: crate::WallMs(0),
        };
        let tick = |term| tick_no(term, 1);
        let start = |term| Event::TermStarted {
            term: Term(term),
            previous: None,
        };
        check(&mut v, &sched("a"), tick(1), false);
        check(&mut v, &sched("a"), start(1), true);
        check(&mut v, &sched("a"), tick(1), true);
        check(&mut v, &sched("b"), tick(1), false);
        check(&mut v, &sched("b"), start(1), false);
        check(&mut v, &sched("b"), start(3), false);
        check(&mut v, &sched("b"), start(2), true);
        check(&mut v, &sched("a"), tick(1), false);
        check(&mut v, &sched("b"), tick(2), false);
        check(&mut v, &sched("b"), tick_no(2, 2), true);
        check(&mut v, &sched("b"), tick_no(2, 2), false);
        check(&mut v, &sched("b"), tick_no(2, 5), true);
        check(&mut v, &sched("b"), tick_no(2, 4), false);
        assert_eq!(v.tick(), TickNo(5));
    }

    #[test]
    fn an_image_with_replicas_changes_by_its_record_alone() {
        let node = |id: &str| Publisher::Node(id.parse().unwrap());
        let nodes = |ids: &[&str]| -> Nodes { ids.iter().map(|id| id.parse().unwrap()).collect() };
        let created = |by: &str, members: &[&str]| {
            Event::ImageCreated(ImageCreated {
                image: ImageId(1),
                name: "a/b".parse().unwrap(),
                size: ByteLen(1 << 20),
                block_size: ByteLen(65_536),
                layers: vec![LayerId(2)],
                parent: None,
                node: by.parse().unwrap(),
                set_version: SetVersion(1),
                members: nodes(members),
            })
        };
        let change = |by: &str, from: &Record, to: Record| Event::LocationsChanged {
            image: ImageId(1),
            change: Change {
                by: by.parse().unwrap(),
                from: from.stamp(),
                to: Arc::new(to),
                stale: None,
            },
        };
        let mut v = Validity::default();
        let (a, b, c) = (node("a"), node("b"), node("c"));
        check(&mut v, &a, created("a", &["b", "c"]), false);
        check(&mut v, &a, created("a", &["a", "b"]), true);
        let first = v.image(ImageId(1)).unwrap().locations.clone().unwrap().record;
        let attached = |by: &str| {
            Event::ImageAttached(ImageAttached {
                image: ImageId(1),
                node: by.parse().unwrap(),
                epoch: Epoch(1),
                lease: LeaseId(5),
                set_version: SetVersion(2),
                device: false,
            })
        };
        check(&mut v, &a, attached("a"), false);
        // A node that holds nothing may own the image; nobody speaks for another, and one record has one successor.
        let granted = first.granted(LeaseId(7), &nodes(&["a", "b"])).unwrap();
        check(&mut v, &a, change("c", &first, granted.clone()), false);
        check(&mut v, &c, change("c", &first, granted.clone()), true);
        check(
            &mut v,
            &b,
            change("b", &first, first.granted(LeaseId(8), &nodes(&["b"])).unwrap()),
            false,
        );
        let known = v.image(ImageId(1)).unwrap();
        assert_eq!(
            (known.epoch, &known.owner),
            (Epoch(1), &Some(("c".parse().unwrap(), LeaseId(7))))
        );
        check(
            &mut v,
            &b,
            change("b", &granted, granted.without(&nodes(&["a"])).unwrap()),
            false,
        );
        check(
            &mut v,
            &c,
            change("c", &granted, granted.without(&nodes(&["a"])).unwrap()),
            true,
        );
        // Whoever holds it speaks for it.
        check(
            &mut v,
            &b,
            Event::ImageDetached {
                image: ImageId(1),
                epoch: Epoch(1),
            },
            false,
        );
        check(
            &mut v,
            &c,
            Event::ImageDetached {
                image: ImageId(1),
                epoch: Epoch(1),
            },
            true,
        );
        check(&mut v, &a, Event::ImageDeleted { image: ImageId(1) }, false);
        check(&mut v, &b, Event::ImageDeleted { image: ImageId(1) }, true);
    }

    #[test]
    fn the_number_of_replicas_is_set_by_who_holds_the_image_and_within_the_limits() {
        let node = |id: &str| Publisher::Node(id.parse().unwrap());
        let created = |image, name: &str, members: &[&str]| {
            Event::ImageCreated(ImageCreated {
                image: ImageId(image),
                name: name.parse().unwrap(),
                size: ByteLen(1 << 20),
                block_size: ByteLen(65_536),
                layers: vec![LayerId(image)],
                parent: None,
                node: "a".parse().unwrap(),
                set_version: SetVersion(1),
                members: members.iter().map(|id| id.parse().unwrap()).collect(),
            })
        };
        let mut v = Validity::default();
        let (a, b, c) = (node("a"), node("b"), node("c"));
        check(&mut v, &a, created(1, "a/b", &["a", "b"]), true);
        check(&mut v, &a, created(2, "a/c", &[]), true);
        let set = |image, wanted| Event::ReplicasSet {
            image: ImageId(image),
            wanted,
        };
        check(&mut v, &c, set(1, 3), false);
        check(&mut v, &b, set(1, 3), true);
        check(&mut v, &a, set(1, 0), false);
        check(&mut v, &a, set(1, REPLICAS_MAX + 1), false);
        check(&mut v, &a, set(2, 2), false);
        check(&mut v, &a, set(3, 2), false);
        assert_eq!(v.image(ImageId(1)).unwrap().wanted, Some(3));
        check(&mut v, &sched("s"), set(1, 2), false);
    }

    #[test]
    fn marks_on_nodes_need_the_leader_and_a_name_within_the_limits() {
        let mut v = Validity::default();
        let domain = |term, fault_domain: &str| Event::FaultDomainSet {
            term: Term(term),
            node: "a".parse().unwrap(),
            fault_domain: fault_domain.into(),
            reason: String::new(),
        };
        let drain = |term| Event::NodeDrainSet {
            term: Term(term),
            node: "a".parse().unwrap(),
            draining: true,
            reason: String::new(),
        };
        check(&mut v, &sched("s"), drain(0), false);
        let start = Event::TermStarted {
            term: Term(1),
            previous: None,
        };
        check(&mut v, &sched("s"), start, true);
        check(&mut v, &sched("s"), drain(1), true);
        check(&mut v, &sched("t"), drain(1), false);
        check(&mut v, &Publisher::Node("a".parse().unwrap()), drain(1), false);
        check(&mut v, &sched("s"), domain(1, ""), true);
        check(
            &mut v,
            &sched("s"),
            domain(1, &"d".repeat(FAULT_DOMAIN_BYTES_MAX)),
            true,
        );
        check(
            &mut v,
            &sched("s"),
            domain(1, &"d".repeat(FAULT_DOMAIN_BYTES_MAX + 1)),
            false,
        );
        assert_eq!(marked(&drain(1)).map(NodeId::as_str), Some("a"));
    }
}
