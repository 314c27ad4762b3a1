//! A trace in memory: its requests, and the blocks they touch, numbered densely.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use hearth_probes::source::Op;
use hearth_probes::tally::touches;
use hearth_probes::trace::{TraceReader, TraceRequest};

/// One trace, cut into blocks of one size.
pub struct Trace {
    /// Name of its file, without the ending.
    pub name: String,
    /// The requests, in order; none without bytes.
    pub requests: Vec<TraceRequest>,
    /// Logarithm of the block size.
    pub block_log: u32,
    /// What each request touches, one after the other: dense block number, and whether it was read.
    pub accesses: Vec<(u32, bool)>,
    /// Distinct blocks, read or written: the footprint.
    pub blocks: usize,
    /// Block reads: what hit ratios are a share of.
    pub reads: u64,
}

impl Trace {
    /// Reads a trace file.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(path: &Path) -> Result<Vec<TraceRequest>> {
        let requests: Result<Vec<_>, _> = TraceReader::open(path)?.collect();
        let mut requests = requests.with_context(|| format!("reading {}", path.display()))?;
        requests.retain(|r| r.length > 0);
        Ok(requests)
    }

    /// Cuts requests into blocks of `1 << block_log` bytes.
    pub fn new(name: &str, requests: &[TraceRequest], block_log: u32) -> Self {
        let mut numbers: HashMap<(u16, u64), u32> = HashMap::new();
        let mut accesses = Vec::new();
        for request in requests {
            for touch in touches(request.offset, request.length.into(), block_log) {
                let next = numbers.len() as u32;
                let number = *numbers.entry((request.volume, touch.block)).or_insert(next);
                accesses.push((number, request.op == Op::Read));
            }
        }
        Self {
            name: name.into(),
            requests: requests.to_vec(),
            block_log,
            reads: accesses.iter().filter(|(_, read)| *read).count() as u64,
            blocks: numbers.len(),
            accesses,
        }
    }
}
