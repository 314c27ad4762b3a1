//! Submits direct I/O and keeps an exact log of it. What a request touches is worked out here a second time, in the
//! plainest way, so that the test shares no arithmetic with what it tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

/// Requests one after the other, or anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Each where the last one ended.
    Sequential,
    /// Uniformly distributed.
    Random,
}

/// One stream of requests of equal length.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Bytes of each request, a multiple of 512.
    pub length: u64,
    /// Where requests begin, apart from a multiple of `align`.
    pub shift: u64,
    /// Requests begin at multiples of this.
    pub align: u64,
    /// In which order.
    pub order: Order,
    /// Of a hundred requests, how many write.
    pub write_percent: u64,
    /// How many requests.
    pub count: u64,
}

/// One request as submitted.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// Whether it wrote.
    pub write: bool,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// Reads, writes and bytes by block.
pub type Counts = BTreeMap<u64, (u64, u64, u64)>;

/// What was submitted.
#[derive(Debug, Default)]
pub struct Log {
    /// Every request.
    pub requests: Vec<Request>,
    /// How long it took.
    pub took: Duration,
}

impl Log {
    /// Requests a second.
    pub fn iops(&self) -> f64 {
        self.requests.len() as f64 / self.took.as_secs_f64()
    }

    /// What each block must have seen.
    pub fn counts(&self, block_size: u64) -> Counts {
        let mut counts = Counts::new();
        for request in &self.requests {
            let mut at = request.offset;
            while at < request.offset + request.length {
                let block = at / block_size;
                let end = ((block + 1) * block_size).min(request.offset + request.length);
                let entry = counts.entry(block).or_default();
                if request.write {
                    entry.1 += 1;
                } else {
                    entry.0 += 1;
                }
                entry.2 += end - at;
                at = end;
            }
        }
        counts
    }
}

/// Steps a small generator of random numbers (xorshift64*).
fn random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

fn run_one(device: &File, size_bytes: u64, load: Load, mut seed: u64) -> io::Result<Vec<Request>> {
    let places = (size_bytes - load.length - load.shift) / load.align;
    let requests: Vec<_> = (0..load.count)
        .map(|number| {
            let place = match load.order {
                Order::Sequential => number * load.length.div_ceil(load.align) % places,
                Order::Random => random(&mut seed) % places,
            };
            let write = random(&mut seed) % 100 < load.write_percent;
            Request {
                write,
                offset: place * load.align + load.shift,
                length: load.length,
            }
        })
        .collect();
    let mut memory = vec![0x5au8; load.length as usize + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..start + load.length as usize];
    for request in &requests {
        let done = match request.write {
            true => device.write_at(buffer, request.offset)?,
            false => device.read_at(buffer, request.offset)?,
        };
        if done as u64 != load.length {
            return Err(io::Error::other(format!("{request:?} was cut to {done} bytes")));
        }
    }
    Ok(requests)
}

/// Runs each load in a thread of its own, against the first `size_bytes` of `device`, which is open for direct I/O.
///
/// # Errors
/// The first request that failed, or that was cut short.
///
/// # Panics
/// If a request of a load does not fit into `size_bytes`.
pub fn run(device: &File, size_bytes: u64, loads: &[Load], seed: u64) -> io::Result<Log> {
    let started = Instant::now();
    let parts: Vec<io::Result<Vec<Request>>> = thread::scope(|scope| {
        let threads: Vec<_> = loads
            .iter()
            .enumerate()
            .map(|(number, load)| {
                scope.spawn(move || run_one(device, size_bytes, *load, seed + 1 + number as u64 * 7919))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a generator does not panic"))
            .collect()
    });
    let took = started.elapsed();
    let mut requests = Vec::new();
    for part in parts {
        requests.append(&mut part?);
    }
    Ok(Log { requests, took })
}
