//! What the node itself works for each access, apart from the copying that any cache has to do.

use std::time::Duration;

use anyhow::Result;
use hearth_node::tier::prefetch::Sequential;
use hearth_node::tier::{LayerHandle, Look, RamTier, Region, TierOptions};
use hearth_probes::source::Op;
use hearth_protocol::LayerId;

use super::hearth::{LOOK_BYTES, cpu_time};
use super::trace::Trace;

/// Processor time for each block that is read or written, nanoseconds.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Tier and prefetchers, without the copying of let-in blocks.
    pub node_ns: f64,
    /// That copying, measured by itself.
    pub copying_ns: f64,
}

/// Measures a trace against RAM for `room` blocks.
///
/// # Errors
/// There is no memory for the arena.
pub fn measure(trace: &Trace, room: usize) -> Result<Work> {
    let unit_bytes = 1usize << trace.block_log;
    let capacity = (room * unit_bytes).max(1 << 16);
    let longest = trace.requests.iter().map(|r| r.length as usize).max();
    let data = vec![1; longest.unwrap_or(0).max(unit_bytes)];
    let (whole, fills) = play(trace, capacity as u64, &data)?;
    let copying = copy(capacity, &data[..unit_bytes], fills)?;
    let each = |time: Duration| time.as_nanos() as f64 / trace.accesses.len().max(1) as f64;
    Ok(Work {
        node_ns: each(whole.saturating_sub(copying)),
        copying_ns: each(copying),
    })
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

/// The time of `count` copies of a block into memory of `capacity` bytes, from its beginning on.
fn copy(capacity: usize, block: &[u8], count: u64) -> Result<Duration> {
    let mut arena = vec![0u8; capacity];
    let places = capacity / block.len();
    let started = cpu_time()?;
    for i in 0..count as usize {
        let at = i % places * block.len();
        std::hint::black_box(&mut arena[at..at + block.len()]).copy_from_slice(block);
    }
    Ok(cpu_time()?.saturating_sub(started))
}
