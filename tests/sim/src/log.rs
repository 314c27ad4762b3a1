//! The log: one order of everything that nodes and schedulers publish. The schedulers' event logs follow it closely and are
//! what an operator puts back.
//!
//! It takes a change of an image only if it counts, or now and then one that does not, as compare-and-publish only spares it
//! those; a term or a tick only if it follows the last one; everything else, whether it counts or not. It may lose its end:
//! then what an event log has of it is missed, and nothing is published or read behind it until it is put back; what none
//! has is gone for good.

use std::sync::Arc;

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::Record;
use hearth_protocol::{Envelope, Event, ImageId, Seq};

use crate::facts::Facts;

/// One entry. Its place in the log is its index plus one.
#[derive(Debug)]
pub struct Entry {
    /// Who published it.
    pub envelope: Envelope,
    /// What.
    pub event: Event,
    /// Whether it counts.
    pub counts: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Log {
    /// Every entry.
    pub entries: Vec<Arc<Entry>>,
    /// How much of it there is.
    pub len: usize,
    /// How much an event log has, which is what may be read.
    pub seen: usize,
    /// What counts now, per image.
    pub now: Vec<Aggregate>,
    /// What came before the simulation began; it is never lost.
    begins: usize,
    facts: Facts,
}

/// What became of something published.
pub enum Published {
    /// It counts and stands there. Of a change of an image: the record that it replaced.
    Counts(Seq, Option<Arc<Record>>),
    /// It stands there and is void.
    Void(Seq),
    /// It is not in the log.
    Refused,
}

/// An image's id.
pub fn image_id(image: usize) -> ImageId {
    ImageId(image as u128 + 1)
}

/// An image's number.
pub fn image_of(id: ImageId) -> usize {
    id.0 as usize - 1
}

impl Log {
    /// Everything so far was there before the simulation began.
    pub fn begin(&mut self) {
        self.begins = self.entries.len();
        self.seen = self.begins;
    }

    /// How much was there before the simulation began.
    pub fn begins(&self) -> usize {
        self.begins
    }

    /// Whether it misses something that was seen.
    pub fn is_rolled_back(&self) -> bool {
        self.len < self.seen
    }

    /// What all of it says.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Something arrives. `expecting` is the last entry on the leadership subjects, of a term or a tick.
    pub fn publish(&mut self, envelope: Envelope, event: Event, expecting: Option<Seq>, takes_void: bool) -> Published {
        if self.is_rolled_back() || expecting.is_some_and(|last| last != self.facts.last_lead) {
            return Published::Refused;
        }
        let mut before = None;
        if let Event::LocationsChanged { image, change } = &event {
            let now = &self.now[image_of(*image)];
            before = Some(now.record.clone());
            if now.clone().judge(change).is_err() && !takes_void {
                return Published::Refused;
            }
        }
        let counts = self.append(envelope, event);
        let seq = Seq(self.len as u64);
        if counts {
            Published::Counts(seq, before)
        } else {
            Published::Void(seq)
        }
    }

    fn append(&mut self, envelope: Envelope, event: Event) -> bool {
        let counts = self.facts.apply(&envelope, &event);
        if counts {
            self.note(&event);
        }
        self.entries.push(Arc::new(Entry {
            envelope,
            event,
            counts,
        }));
        self.len = self.entries.len();
        counts
    }

    fn note(&mut self, event: &Event) {
        let image = match event {
            Event::ImageCreated(created) => created.image,
            Event::LocationsChanged { image, .. } => *image,
            _ => return,
        };
        let known = self.facts.validity().image(image);
        let now = known
            .and_then(|known| known.locations.clone())
            .expect("an image with replicas");
        match self.now.get_mut(image_of(image)) {
            Some(known) => *known = now,
            None => self.now.push(now),
        }
    }

    /// What counts after so many entries.
    pub fn at(&self, image: usize, len: usize) -> Aggregate {
        let id = image_id(image);
        let mut aggregate = None;
        for entry in self.entries[..len].iter().filter(|entry| entry.counts) {
            match &entry.event {
                Event::ImageCreated(created) if created.image == id => {
                    let first = Aggregate::new(created.set_version, created.members.clone());
                    aggregate = Some(first.expect("a record"));
                }
                Event::LocationsChanged { image, change } if *image == id => {
                    let known = aggregate.as_mut().expect("a change of a known image");
                    known.judge(change).expect("a change that counts");
                }
                _ => {}
            }
        }
        aggregate.expect("an image")
    }

    /// Where something published stands, if it does.
    pub fn find(&self, envelope: &Envelope) -> Option<Seq> {
        let at = self.entries[..self.len].iter().rposition(|entry| {
            entry.envelope.publisher_seq == envelope.publisher_seq
                && entry.envelope.incarnation == envelope.incarnation
                && entry.envelope.publisher == envelope.publisher
        })?;
        Some(Seq(at as u64 + 1))
    }

    /// It loses its last entries. Says whether something that was seen is missed.
    pub fn lose(&mut self, entries: usize) -> bool {
        self.len = self.entries.len().saturating_sub(entries).max(self.begins);
        // Entries behind what was seen are gone for good; those before are put back one day.
        self.entries.truncate(self.len.max(self.seen));
        self.facts = Facts::default();
        for at in 0..self.entries.len() {
            let entry = Arc::clone(&self.entries[at]);
            self.facts.apply(&entry.envelope, &entry.event);
        }
        self.now = (0..self.now.len())
            .map(|image| self.at(image, self.entries.len()))
            .collect();
        self.len < self.seen
    }

    /// It is put back.
    pub fn recover(&mut self) {
        self.len = self.entries.len();
    }
}
