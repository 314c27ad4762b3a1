//! The tier policy over a fake node that obeys.

mod sim;

use sim::{Sim, reads};

#[test]
fn a_block_over_the_threshold_is_in_ram_after_the_next_tick() {
    let mut sim = Sim::default();
    sim.join("n1", 4);
    sim.image("n1", 1, 100);
    sim.heat("n1", 1, 1, &[reads(3, 1), reads(7, 2), reads(9, 5)]);
    sim.second();
    assert_eq!(sim.ram("n1", 1), [7, 9]);
}
