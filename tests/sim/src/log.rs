//! The log: one order of all images' changes. The schedulers' log follows it closely and is what an operator puts back.
//!
//! It takes a change only if it counts, or now and then one that does not, as compare-and-publish only spares it those. It
//! may lose its end: then what a scheduler has seen of it is missed, and nothing is published or read behind it until it is
//! put back; what nobody has seen is gone for good.

use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::Record;

/// See the module.
#[derive(Debug)]
pub struct Log {
    first: Vec<Aggregate>,
    /// Every entry: which image, what.
    pub entries: Vec<(usize, Change)>,
    /// How much of it there is.
    pub len: usize,
    /// How much a scheduler has seen, which is what nodes may read.
    pub seen: usize,
    /// What counts now, per image.
    pub now: Vec<Aggregate>,
}

/// What became of a published change.
pub enum Published {
    /// It counts; it replaced this record.
    Counts(Arc<Record>),
    /// It is in the log and void.
    Void,
    /// It is not in the log.
    Refused,
}

impl Log {
    /// A log with the first record of each image.
    pub fn new(first: Vec<Aggregate>) -> Self {
        Self {
            now: first.clone(),
            first,
            entries: Vec::new(),
            len: 0,
            seen: 0,
        }
    }

    /// Whether it misses something that was seen.
    pub fn is_rolled_back(&self) -> bool {
        self.len < self.seen
    }

    /// A change arrives.
    pub fn publish(&mut self, image: usize, change: Change, takes_void: bool) -> Published {
        if self.is_rolled_back() {
            return Published::Refused;
        }
        let before = self.now[image].record.clone();
        let published = match self.now[image].judge(&change) {
            Ok(()) => Published::Counts(before),
            Err(_) if takes_void => Published::Void,
            Err(_) => return Published::Refused,
        };
        self.entries.push((image, change));
        self.len = self.entries.len();
        published
    }

    /// What counts after so many entries.
    pub fn at(&self, image: usize, len: usize) -> Aggregate {
        let mut aggregate = self.first[image].clone();
        for (_, change) in self.entries[..len].iter().filter(|(of, _)| *of == image) {
            // A void one changes nothing.
            let _ = aggregate.judge(change);
        }
        aggregate
    }

    /// It loses its end from `len` on. Says whether something that was seen is missed.
    pub fn lose(&mut self, len: usize) -> bool {
        self.len = len;
        if self.len < self.seen {
            // Entries behind what was seen are gone for good; those before are put back one day.
            self.entries.truncate(self.seen);
        } else {
            self.entries.truncate(len);
        }
        self.now = (0..self.first.len())
            .map(|image| self.at(image, self.entries.len()))
            .collect();
        self.len < self.seen
    }

    /// It is put back.
    pub fn recover(&mut self) {
        self.len = self.entries.len();
    }
}
