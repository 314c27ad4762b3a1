//! Which events count: one function of the stream's prefix, shared by the scheduler's fold, the nodes and the replicas.
//!
//! An event is *void* (kept in the log, not applied) if
//! - a scheduler's event or command carries a term lower than the highest before it, or a term nobody won;
//! - `TermStarted` does not carry exactly the highest term + 1;
//! - an image event comes from a node that is not the image's owner at that point;
//! - `Ticked` does not carry a number above every tick before it;
//! - `ImageCreated` takes an id or a name that exists, or has a size, block size or stack outside the limits, or
//!   `ImageAttached` carries another epoch than the last + 1;
//! - the publisher has no right to that kind of event at all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::Event;
use crate::ids::{ImageId, ImageName, LeaseId, NodeId, Publisher, SchedulerId};
use crate::limits::{IMAGE_BYTES_MAX, LAYERS_PER_IMAGE_MAX};
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
}

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
                self.names.insert(created.name.clone(), created.image);
                self.images.insert(
                    created.image,
                    Ownership {
                        name: created.name.clone(),
                        home: node.clone(),
                        epoch: Epoch(0),
                        owner: None,
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
                if attached.epoch != image.epoch.next() {
                    return Verdict::Void("the epoch is not the last plus one");
                }
                image.epoch = attached.epoch;
                image.owner = Some((node.clone(), attached.lease));
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
            Some(known) if &known.home == node => Verdict::Valid,
            Some(_) => Verdict::Void("the node does not hold the image"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
