//! Drains windows while something runs, and adds them up.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use hearth_protocol::ImageId;

use super::generator::Counts;
use crate::{EbpfSource, HeatSource, Window};

/// How often windows are drained under load: often, so that many bios meet a change of windows.
pub const DRAIN_EVERY: Duration = Duration::from_millis(50);

/// What all windows together said of an image.
#[derive(Debug, Default)]
pub struct Seen {
    /// By block.
    pub counts: Counts,
    /// Touches that were not counted by block.
    pub lost: u64,
    /// Reads whose latency was measured.
    pub read_latencies: u64,
    /// Writes whose latency was measured.
    pub write_latencies: u64,
}

impl Seen {
    /// Touches counted by block.
    pub fn touches(&self) -> u64 {
        self.counts.values().map(|(reads, writes, _)| reads + writes).sum()
    }
}

/// Adds up windows.
#[derive(Debug, Default)]
pub struct Sum {
    /// By image.
    pub images: BTreeMap<ImageId, Seen>,
    /// How many windows.
    pub windows: u64,
    /// As the last of them says.
    pub events_total: u64,
    /// As the last of them says.
    pub lost_total: u64,
    /// As the last of them says.
    pub untimed_total: u64,
}

impl Sum {
    /// Adds one.
    ///
    /// # Panics
    /// If its blocks are out of order, or a block has more bursts than touches.
    pub fn add(&mut self, window: Window) {
        self.windows += 1;
        (self.events_total, self.lost_total) = (window.events_total, window.lost_total);
        self.untimed_total = window.untimed_total;
        for image in window.images {
            assert!(
                image.blocks.is_sorted_by(|a, b| a.block < b.block),
                "blocks ascend strictly"
            );
            let seen = self.images.entry(image.image).or_default();
            seen.lost += image.lost;
            seen.read_latencies += image.read_latency.len();
            seen.write_latencies += image.write_latency.len();
            for heat in image.blocks {
                assert!((1..=heat.reads + heat.writes).contains(&heat.bursts), "{heat:?}");
                let entry = seen.counts.entry(heat.block.0).or_default();
                entry.0 += u64::from(heat.reads);
                entry.1 += u64::from(heat.writes);
                entry.2 += heat.bytes;
            }
        }
    }
}

/// Drains windows while `work` runs, and once more when it has ended.
///
/// # Panics
/// As [`drain_every`].
pub fn drain_during<T: Send>(source: &EbpfSource, work: impl FnOnce() -> T + Send) -> (T, Sum) {
    drain_every(DRAIN_EVERY, source, work)
}

/// As [`drain_during`], with this pause between two drains.
///
/// # Panics
/// If a window cannot be drained, or is not in order.
pub fn drain_every<T: Send>(pause: Duration, source: &EbpfSource, work: impl FnOnce() -> T + Send) -> (T, Sum) {
    let (done, wait) = mpsc::channel::<()>();
    let mut drained = source.clone();
    let drainer = move || {
        let mut sum = Sum::default();
        loop {
            let ended = wait.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
            sum.add(drained.drain().expect("the window can be drained"));
            if ended {
                return sum;
            }
        }
    };
    thread::scope(|scope| {
        let drainer = scope.spawn(drainer);
        let result = work();
        drop(done);
        (result, drainer.join().expect("the drain does not panic"))
    })
}

/// Compares what was counted with what was submitted, block by block.
///
/// # Panics
/// If any block differs: names the first ten.
pub fn check_counts(what: &str, found: &Counts, expect: &Counts) {
    let wrong: Vec<_> = expect
        .keys()
        .chain(found.keys().filter(|block| !expect.contains_key(block)))
        .filter(|block| expect.get(block) != found.get(block))
        .take(10)
        .map(|block| {
            format!(
                "block {block}: submitted {:?}, counted {:?}",
                expect.get(block),
                found.get(block)
            )
        })
        .collect();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
}
