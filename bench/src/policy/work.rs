//! What an access costs: the node's work for it, apart from the copying that any cache has to do, and the scheduler's
//! for each block that is reported to it.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use anyhow::Result;
use hearth_node::tier::prefetch::Sequential;
use hearth_node::tier::{LayerHandle, Look, RamTier, Region, TierOptions};
use hearth_probes::source::Op;
use hearth_protocol::LayerId;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::hearth::{self, LOOK_BYTES};
use super::scheduler::Scheduler;
use super::trace::Trace;

/// Each figure is the middle one of so many runs.
const RUNS: usize = 5;

/// Processor time, nanoseconds: the middle of [`RUNS`] runs, between the least and the most.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// For each block that is read or written: tier and prefetchers, without the copying of let-in blocks.
    pub node: Spread,
    /// That copying, measured by itself.
    pub copying: Spread,
    /// For each block in a report: folding and deciding, with prefetch.
    pub scheduler: Spread,
}

/// Of several runs.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Least.
    pub least: f64,
    /// Middle one.
    pub middle: f64,
    /// Most.
    pub most: f64,
}

impl Spread {
    fn of(mut runs: Vec<f64>) -> Self {
        runs.sort_unstable_by(f64::total_cmp);
        Self {
            least: runs[0],
            middle: runs[runs.len() / 2],
            most: runs[runs.len() - 1],
        }
    }
}

/// Measures a trace against RAM for `room` blocks.
///
/// # Errors
/// There is no memory for the arena.
pub fn measure(trace: &Trace, room: usize) -> Result<Work> {
    let (mut node, mut copying) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (whole, copied) = node_ns(trace, room)?;
        node.push(whole);
        copying.push(copied);
    }
    Ok(Work {
        node: Spread::of(node),
        copying: Spread::of(copying),
        scheduler: Spread::of(scheduler_ns(trace, room)?),
    })
}

/// Time in the scheduler for each reported block, in several runs over what it heard in one. It is by itself then: a
/// clock that is read at every tick would be a good part of what it measures.
fn scheduler_ns(trace: &Trace, room: usize) -> Result<Vec<f64>> {
    let mut heard = Vec::new();
    let played = hearth::play(trace, room, true, |input| heard.push(input.clone()))?;
    let run = || {
        let mut scheduler = Scheduler::new(hearth::node_id()?)?;
        let heard = heard.clone();
        let started = cpu_time()?;
        for input in heard {
            scheduler.hear(input)?;
        }
        let took = cpu_time()?.saturating_sub(started);
        Ok(took.as_nanos() as f64 / played.reported.max(1) as f64)
    };
    (0..RUNS).map(|_| run()).collect()
}

/// Processor time of this thread: other work on the machine does not count.
///
/// # Errors
/// The operating system's.
fn cpu_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let of = |t: TimeVal| Duration::from_micros((t.tv_sec() * 1_000_000 + t.tv_usec()) as u64);
    Ok(of(usage.user_time()) + of(usage.system_time()))
}

/// The node's work for each access, and the copying that is taken off.
fn node_ns(trace: &Trace, room: usize) -> Result<(f64, f64)> {
    let unit_bytes = 1usize << trace.block_log;
    let capacity = (room * unit_bytes).max(1 << 16);
    let longest = trace.requests.iter().map(|r| r.length as usize).max();
    let data = vec![1; longest.unwrap_or(0).max(unit_bytes)];
    let (whole, fills) = play(trace, capacity as u64, &data)?;
    let copying = copy(capacity, &data[..unit_bytes], fills)?;
    let each = |time: Duration| time.as_nanos() as f64 / trace.accesses.len().max(1) as f64;
    Ok((each(whole.saturating_sub(copying)), each(copying)))
}

/// All accesses, one after the other; the time, and the blocks let in.
fn play(trace: &Trace, capacity: u64, data: &[u8]) -> Result<(Duration, u64)> {
    let unit_bytes = 1u64 << trace.block_log;
    let tier = RamTier::new(TierOptions {
        lock: false,
        ..TierOptions::of_bytes(capacity)
    })?;
    let volumes = trace.requests.iter().map(|r| r.volume).max().unwrap_or(0) + 1;
    let layers: Vec<LayerHandle> = (0..volumes)
        .map(|v| tier.register(LayerId(u128::from(v) + 1), unit_bytes))
        .collect();
    let mut streams: Vec<Sequential> = (0..volumes).map(|_| Sequential::default()).collect();
    let missed = |layer, unit| {
        if let Some(replayed) = tier.missed(layer, unit) {
            tier.unread(replayed.class, replayed.units.len() as u32);
        }
    };
    let mut buf = [0; LOOK_BYTES];
    let mut fills = 0;
    let started = cpu_time()?;
    for request in &trace.requests {
        let layer = layers[usize::from(request.volume)];
        let first = (request.offset >> trace.block_log) as u32;
        let last = ((request.offset + u64::from(request.length) - 1) >> trace.block_log) as u32;
        if request.op == Op::Write {
            let ticket = tier.begin_write(layer, first, last - first + 1);
            ticket.update(request.offset, &data[..request.length as usize]);
            ticket.keep();
            continue;
        }
        for unit in first..=last {
            if tier.look(layer, unit, 0, &mut buf) == Look::Miss {
                let token = tier.begin_fill(layer, unit);
                tier.fill(layer, unit, token, &data[..unit_bytes as usize], Region::Front);
                fills += 1;
                missed(layer, unit);
            }
        }
        let mut class = 0;
        let wanted = streams[usize::from(request.volume)].observe(first, last, |run, count| {
            let (of, granted) = tier.grant_sequential(run, count, unit_bytes);
            class = of;
            granted
        });
        tier.unread(class, wanted.len() as u32);
    }
    Ok((cpu_time()?.saturating_sub(started), fills))
}

/// Places are gone through in strides of so many, a prime: those of units that were evicted do not lie in a row.
const STRIDE: usize = 7_919;

/// The time of `count` copies of a block into memory of `capacity` bytes.
fn copy(capacity: usize, block: &[u8], count: u64) -> Result<Duration> {
    let mut arena = vec![0u8; capacity];
    let places = capacity / block.len();
    let started = cpu_time()?;
    for i in 0..count as usize {
        let at = i.wrapping_mul(STRIDE) % places * block.len();
        std::hint::black_box(&mut arena[at..at + block.len()]).copy_from_slice(block);
        // Until the processor has written it: whoever publishes a copy under a lock waits as long.
        fence(Ordering::SeqCst);
    }
    Ok(cpu_time()?.saturating_sub(started))
}
