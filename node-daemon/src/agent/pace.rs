//! How fast a copy to a joining node goes: as fast as it can, or so that the image's guest does not feel it.
//!
//! A gentle copy stops for a moment in each second. The guest's waits then are compared with those while it goes on: where
//! the 99th percentile of reads or of writes is higher by more than [`DISTURBED_PERCENT`], the copy slows down by half, else it
//! gains a little. It
//! never goes faster than the bytes that one link may carry for moves, and never slower than [`SLOWEST_MOVE`], so that it ends.
//! Reads that RAM answers are not counted: a copy does not touch them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use hearth_protocol::NodeId;
use hearth_protocol::rpc::Pace;
use hearth_replication::session::Input;

use crate::config::SLOWEST_MOVE;
use crate::replica::Replica;
use crate::replica::felt::Waits;

/// Bytes of one copy at full pace; a guest's write to these blocks waits for it.
const FULL_COPY: u64 = 1 << 20;
/// Bytes of one gentle copy.
const GENTLE_COPY: u64 = 128 << 10;
/// Bytes per second with which a gentle copy begins.
const FIRST: u64 = 16 << 20;
/// Bytes per second that it gains when the guest does not feel it, besides an eighth.
const GAIN: u64 = 1 << 20;
/// How much higher the guest's 99th percentile may be than without the copy.
const DISTURBED_PERCENT: u64 = 10;
/// Waits from which a percentile is told, in each of the two counts.
const WAITS_MIN: u64 = 100;
/// One turn: first still, then copying.
const TURN: Duration = Duration::from_millis(1_000);
/// How long it is still in each turn.
const STILL: Duration = Duration::from_millis(250);
/// What is waited for at first after each change between both: what is under way belongs to the other.
const SETTLE: Duration = Duration::from_millis(20);
/// How often it is decided how much may be copied.
const STEP: Duration = Duration::from_millis(5);
/// Zeros are not sent, so the parts of a disk without data pass as many times faster at most.
const DENSITY_MIN: f64 = 1.0 / 64.0;
/// Unused bytes that a link keeps, as time at its rate: a copy that was held up does not come back as a burst.
const SAVED: Duration = Duration::from_millis(20);

/// Bytes that each link may carry for moves, over all of this node's copies to one node.
#[derive(Debug, Default)]
pub struct Links {
    /// What may be sent now, in bytes, which may be less than nothing, and as of when.
    left: Mutex<BTreeMap<NodeId, (i64, Instant)>>,
}

impl Links {
    /// What may be sent to a node now, at so many bytes per second; `sent` bytes were since it was last asked.
    fn ask(&self, to: &NodeId, rate: u64, sent: u64, now: Instant) -> i64 {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, since) = left.entry(to.clone()).or_insert((0, now));
        refill(bytes, since, rate, now);
        *bytes -= sent as i64;
        *bytes
    }
}

fn refill(bytes: &mut i64, since: &mut Instant, rate: u64, now: Instant) {
    let gained = now.saturating_duration_since(*since).as_secs_f64() * rate as f64;
    *bytes = (*bytes + gained as i64).min((SAVED.as_secs_f64() * rate as f64) as i64);
    *since = now;
}

/// The rate that the guest bears.
struct Throttle {
    rate: u64,
    most: u64,
    /// The guest's waits, halved at the end of each turn.
    still: Waits,
    moving: Waits,
}

impl Throttle {
    fn new(most: u64) -> Self {
        Self {
            rate: FIRST.min(most),
            most,
            still: Waits::default(),
            moving: Waits::default(),
        }
    }

    /// A turn is over.
    fn turn(&mut self) {
        let disturbed = worse(&self.still.reads, &self.moving.reads) || worse(&self.still.writes, &self.moving.writes);
        let rate = match disturbed {
            true => self.rate / 2,
            false => self.rate + self.rate / 8 + GAIN,
        };
        self.rate = rate.clamp(SLOWEST_MOVE.0.min(self.most), self.most);
        for waits in [&mut self.still, &mut self.moving] {
            waits.reads = halved(&waits.reads);
            waits.writes = halved(&waits.writes);
        }
    }
}

fn worse(still: &Histogram<u64>, moving: &Histogram<u64>) -> bool {
    let told = still.len() >= WAITS_MIN && moving.len() >= WAITS_MIN;
    let p99 = |waits: &Histogram<u64>| waits.value_at_quantile(0.99);
    told && p99(moving) * 100 > p99(still) * (100 + DISTURBED_PERCENT)
}

fn halved(waits: &Histogram<u64>) -> Histogram<u64> {
    let mut half = waits.clone();
    half.reset();
    for value in waits.iter_recorded() {
        half.saturating_record_n(value.value_iterated_to(), value.count_at_value() / 2);
    }
    half
}

enum Limits {
    None,
    /// An operator's own: bytes left, as of when, bytes per second.
    Own(i64, Instant, u64),
    Guest {
        throttle: Box<Throttle>,
        links: Arc<Links>,
        turn: Instant,
        still: bool,
        /// Since when the counts belong to what is done now.
        changed: Instant,
    },
}

/// Paces one join.
pub(super) struct Pacer {
    replica: Arc<Replica>,
    to: NodeId,
    limits: Limits,
    /// As of the last step: how far the copy was, and bytes that were not zero.
    copied: u64,
    sent: u64,
    /// How much of what is copied is not zero, between [`DENSITY_MIN`] and 1.
    density: f64,
}

impl Pacer {
    /// For a copy to a node; `most` is what a link may carry for moves, in bytes per second.
    pub(super) fn new(replica: Arc<Replica>, to: NodeId, pace: Pace, links: Arc<Links>, most: u64) -> Self {
        let now = Instant::now();
        let limits = match pace {
            Pace::Full => Limits::None,
            Pace::AtMost(rate) => Limits::Own(0, now, rate.0),
            Pace::Gentle => {
                replica.felt().count(true);
                Limits::Guest {
                    throttle: Box::new(Throttle::new(most)),
                    links,
                    turn: now,
                    still: true,
                    changed: now,
                }
            }
        };
        let sent = replica.copied_bytes();
        Self {
            replica,
            to,
            limits,
            copied: 0,
            sent,
            density: 1.0,
        }
    }

    /// Blocks of one copy.
    pub(super) fn blocks(&self) -> u64 {
        let bytes = match self.limits {
            Limits::None => FULL_COPY,
            Limits::Own(..) | Limits::Guest { .. } => GENTLE_COPY,
        };
        (bytes / self.replica.shape().block_size).max(1)
    }

    /// Blocks that may be copied before the first [`Pacer::step`].
    pub(super) fn first(&self) -> Option<u64> {
        match self.limits {
            Limits::None => None,
            Limits::Own(..) | Limits::Guest { .. } => Some(0),
        }
    }

    /// Says how much more may be copied, given how far it is in bytes; sleeps until it is to be asked again.
    pub(super) fn step(&mut self, copied: u64, idle: Duration) {
        let total = self.replica.copied_bytes();
        let (sent, passed) = (total.saturating_sub(self.sent), copied.saturating_sub(self.copied));
        (self.sent, self.copied) = (total, copied);
        if passed > 0 {
            let density = (sent as f64 / passed as f64).clamp(DENSITY_MIN, 1.0);
            self.density = (self.density + density) / 2.0;
        }
        let now = Instant::now();
        let left = match &mut self.limits {
            Limits::None => return std::thread::sleep(idle),
            Limits::Own(bytes, since, rate) => {
                refill(bytes, since, *rate, now);
                *bytes -= sent as i64;
                *bytes
            }
            Limits::Guest {
                throttle,
                links,
                turn,
                still,
                changed,
            } => {
                let felt = self.replica.felt().take();
                if now - *changed >= SETTLE {
                    let waits = if *still {
                        &mut throttle.still
                    } else {
                        &mut throttle.moving
                    };
                    // Bounds of both are the same.
                    let _ = waits.reads.add(&felt.reads);
                    let _ = waits.writes.add(&felt.writes);
                }
                let in_turn = now - *turn;
                if in_turn >= TURN {
                    throttle.turn();
                    *turn = now;
                }
                let stops = in_turn >= TURN || in_turn < STILL;
                if stops != *still {
                    (*still, *changed) = (stops, now);
                }
                let left = links.ask(&self.to, throttle.rate, sent, now);
                if *still { 0 } else { left }
            }
        };
        let block = self.replica.shape().block_size;
        let blocks = u64::try_from((left as f64 / self.density) as i64)
            .unwrap_or(0)
            .div_ceil(block);
        let (node, blocks) = (self.to.clone(), Some(blocks));
        self.replica.step(Input::Allow { node, blocks });
        std::thread::sleep(STEP);
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        if matches!(self.limits, Limits::Guest { .. }) {
            self.replica.felt().count(false);
        }
        // Nobody paces it any more: should it still go on, it goes on to its end.
        let node = self.to.clone();
        self.replica.step(Input::Allow { node, blocks: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn throttle(still_us: u64, moving_us: u64, waits: u64, turns: usize) -> u64 {
        let mut throttle = Throttle::new(100 << 20);
        for turn in 0..turns {
            // Reads that feel nothing hide no writes, and the other way round.
            let (feel, others) = match turn % 2 {
                0 => (
                    (&mut throttle.still.reads, &mut throttle.moving.reads),
                    (&mut throttle.still.writes, &mut throttle.moving.writes),
                ),
                _ => (
                    (&mut throttle.still.writes, &mut throttle.moving.writes),
                    (&mut throttle.still.reads, &mut throttle.moving.reads),
                ),
            };
            feel.0.record_n(still_us, waits).unwrap();
            feel.1.record_n(moving_us, waits).unwrap();
            others.0.record_n(100, 10 * waits).unwrap();
            others.1.record_n(100, 10 * waits).unwrap();
            throttle.turn();
            (throttle.still, throttle.moving) = Default::default();
        }
        throttle.rate
    }

    #[test]
    fn a_copy_slows_down_while_its_guest_feels_it() {
        let check = |still, moving, waits, turns, expect| {
            let rate = throttle(still, moving, waits, turns);
            assert_eq!(rate, expect, "{still} {moving} {waits} {turns}");
        };
        check(1_000, 1_050, 200, 1, FIRST + FIRST / 8 + GAIN);
        check(1_000, 1_200, 200, 1, FIRST / 2);
        check(1_000, 9_000, 200, 20, SLOWEST_MOVE.0);
        check(1_000, 1_000, 200, 40, 100 << 20);
        // Of a guest that asks for nothing nothing is known.
        check(1_000, 9_000, 10, 1, FIRST + FIRST / 8 + GAIN);
    }

    #[test]
    fn what_a_guest_felt_long_ago_counts_less_and_less() {
        let mut throttle = Throttle::new(100 << 20);
        throttle.still.writes.record_n(1_000, 200).unwrap();
        throttle.moving.writes.record_n(50_000, 200).unwrap();
        throttle.turn();
        assert_eq!(throttle.rate, FIRST / 2);
        for _ in 0..20 {
            throttle.still.writes.record_n(1_000, 200).unwrap();
            throttle.moving.writes.record_n(1_000, 200).unwrap();
            throttle.turn();
        }
        assert!(throttle.rate > FIRST, "{}", throttle.rate);
    }

    #[test]
    fn copies_to_one_node_share_its_link() {
        let links = Links::default();
        let (a, b): (NodeId, NodeId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let rate = 1_000_000;
        let at = |ms| Instant::now() + Duration::from_millis(ms);
        assert_eq!(links.ask(&a, rate, 0, at(0)), 0);
        let near = |left: i64, expect: i64| assert!((left - expect).abs() < 2_000, "{left}, not {expect}");
        near(links.ask(&a, rate, 0, at(10)), 10_000);
        near(links.ask(&a, rate, 30_000, at(10)), -20_000);
        assert_eq!(links.ask(&b, rate, 0, at(10)), 0);
        near(links.ask(&a, rate, 0, at(30)), 0);
        near(links.ask(&a, rate, 0, at(9_000)), 20_000);
    }
}
