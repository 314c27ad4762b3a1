//! Idempotence: per publisher incarnation, each event counts once, and what never arrived is counted.
//!
//! Numbers run from 1 without holes. A repeat is ignored before it is judged. A number that comes late, after a
//! higher one, still counts, once: it was reported as missing meanwhile.
//!
//! Its memory is bounded, whatever the log holds. Publishers beyond the bound are not remembered: nothing that invents
//! names can push out one that is known.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::codec::Envelope;
use crate::ids::{Incarnation, Publisher};

/// Publishers remembered: eight times a cluster of a thousand nodes.
const PUBLISHERS_MAX: usize = 8_192;

/// Incarnations remembered per publisher, some 40 bytes each: enough that a process in a restart loop, once a minute,
/// cannot push out within 17 hours one whose events might still be resent.
const INCARNATIONS_MAX: usize = 1_024;

/// Ranges of missing numbers remembered per incarnation. Beyond that the oldest is given up: it stays counted.
const MISSING_RANGES_MAX: usize = 32;

/// What an envelope's number says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// The next one.
    Next,
    /// Some before it have not arrived.
    Gap {
        /// How many.
        missing: u64,
    },
    /// It was missing, and now came.
    Late,
    /// It was applied before.
    Repeat,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Numbers {
    incarnation: Incarnation,
    last: u64,
    /// First and last number of each hole, ascending.
    missing: Vec<(u64, u64)>,
}

/// The memory of the rule.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Publishers {
    /// Newest incarnation last.
    by_publisher: BTreeMap<Publisher, Vec<Numbers>>,
}

impl Publishers {
    /// Takes note of an event's number.
    pub fn arrive(&mut self, envelope: &Envelope) -> Arrival {
        if !self.by_publisher.contains_key(&envelope.publisher) {
            if self.by_publisher.len() == PUBLISHERS_MAX {
                return Arrival::Next;
            }
            self.by_publisher.insert(envelope.publisher.clone(), Vec::new());
        }
        let known = self.by_publisher.get_mut(&envelope.publisher).expect("just inserted");
        let index = known.iter().rposition(|n| n.incarnation == envelope.incarnation);
        let numbers = match index {
            Some(index) => &mut known[index],
            None => {
                if known.len() == INCARNATIONS_MAX {
                    known.remove(0);
                }
                known.push(Numbers {
                    incarnation: envelope.incarnation,
                    last: 0,
                    missing: Vec::new(),
                });
                known.last_mut().expect("just pushed")
            }
        };
        numbers.arrive(envelope.publisher_seq)
    }

    /// Numbers that an incarnation has not delivered.
    #[cfg(test)]
    fn missing(&self, publisher: &Publisher) -> u64 {
        self.by_publisher.get(publisher).map_or(0, |all| {
            all.iter()
                .flat_map(|n| &n.missing)
                .map(|(from, to)| to - from + 1)
                .sum()
        })
    }
}

impl Numbers {
    fn arrive(&mut self, number: u64) -> Arrival {
        if number > self.last {
            let missing = number - self.last - 1;
            if missing > 0 {
                if self.missing.len() == MISSING_RANGES_MAX {
                    self.missing.remove(0);
                }
                self.missing.push((self.last + 1, number - 1));
            }
            self.last = number;
            return if missing > 0 {
                Arrival::Gap { missing }
            } else {
                Arrival::Next
            };
        }
        let Some(at) = self
            .missing
            .iter()
            .position(|(from, to)| (*from..=*to).contains(&number))
        else {
            return Arrival::Repeat;
        };
        let (from, to) = self.missing.remove(at);
        if number < to {
            self.missing.insert(at, (number + 1, to));
        }
        if from < number {
            self.missing.insert(at, (from, number - 1));
        }
        Arrival::Late
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WallMs;

    fn envelope(incarnation: u128, number: u64) -> Envelope {
        Envelope {
            codec: 1,
            subject: String::new(),
            publisher: Publisher::Node("n1".parse().unwrap()),
            incarnation: Incarnation(incarnation),
            publisher_seq: number,
            time: WallMs(0),
            reason: String::new(),
        }
    }

    #[test]
    fn every_number_counts_once() {
        let mut publishers = Publishers::default();
        let mut check = |incarnation, number, expect| {
            assert_eq!(
                publishers.arrive(&envelope(incarnation, number)),
                expect,
                "{incarnation} {number}"
            );
        };
        check(1, 1, Arrival::Next);
        check(1, 1, Arrival::Repeat);
        check(1, 2, Arrival::Next);
        check(1, 6, Arrival::Gap { missing: 3 });
        check(1, 4, Arrival::Late);
        check(1, 4, Arrival::Repeat);
        check(1, 5, Arrival::Late);
        check(1, 3, Arrival::Late);
        check(1, 3, Arrival::Repeat);
        check(2, 1, Arrival::Next);
        check(1, 7, Arrival::Next);
        check(2, 1, Arrival::Repeat);
        check(1, 0, Arrival::Repeat);
        assert_eq!(publishers.missing(&envelope(1, 1).publisher), 0);
    }

    #[test]
    fn garbage_takes_bounded_memory_and_no_place_from_who_is_known() {
        let mut publishers = Publishers::default();
        assert_eq!(publishers.arrive(&envelope(1, 1)), Arrival::Next);
        for n in 0..2 * PUBLISHERS_MAX {
            let mut invented = envelope(1, 1);
            invented.publisher = Publisher::Node(format!("invented-{n}").parse().unwrap());
            assert_eq!(publishers.arrive(&invented), Arrival::Next);
        }
        assert_eq!(publishers.by_publisher.len(), PUBLISHERS_MAX);
        assert_eq!(publishers.arrive(&envelope(1, 1)), Arrival::Repeat);
        for n in 2..2 * INCARNATIONS_MAX as u128 {
            publishers.arrive(&envelope(n, 1));
        }
        for n in 0..2 * MISSING_RANGES_MAX as u64 {
            publishers.arrive(&envelope(7, 3 + 2 * n));
        }
        let known = &publishers.by_publisher[&envelope(1, 1).publisher];
        assert_eq!(known.len(), INCARNATIONS_MAX);
        assert!(known.iter().all(|n| n.missing.len() <= MISSING_RANGES_MAX));
    }
}
