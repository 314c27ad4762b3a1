//! What a tracked block costs in memory.

#[path = "../../../node-daemon/tests/nbd_support/counting.rs"]
mod counting;
mod sim;

use std::sync::atomic::Ordering;

use counting::{Counting, LIVE_BYTES};
use sim::{Sim, reads};

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_million_tracked_blocks_cost_what_is_stated() {
    const BLOCKS: u64 = 1_000_000;
    const PER_REPORT: u64 = 10_000;
    let mut sim = Sim::default();
    sim.join("n1", 64);
    sim.image("n1", 1, BLOCKS);
    for first in (0..BLOCKS).step_by(PER_REPORT as usize) {
        let records: Vec<_> = (first..first + PER_REPORT).map(|block| reads(block, 1)).collect();
        sim.heat("n1", 1, 1, &records);
    }
    let tracked = sim.state.tracked_blocks();
    assert_eq!(tracked, BLOCKS);
    let before = LIVE_BYTES.load(Ordering::SeqCst);
    let copy = sim.state.clone();
    let bytes = LIVE_BYTES.load(Ordering::SeqCst) - before;
    println!(
        "{tracked} tracked blocks: {bytes} bytes, {} each",
        bytes / tracked as i64
    );
    assert!(bytes < 70 * tracked as i64, "{bytes} bytes for {tracked} blocks");
    drop(copy);
}
