//! Recounts what the state keeps as running totals and derived orders.

use crate::blocks::{NodeBlocks, Place};
use crate::state::State;

impl State {
    /// Recounts every account and rebuilds every derived order, and says what disagrees. Costs a pass over all blocks;
    /// `hearth log verify` and the tests run it.
    ///
    /// # Errors
    /// One sentence that names the node and the account.
    pub fn audit(&self) -> Result<(), String> {
        for (node, blocks) in &self.data.blocks {
            audit(blocks).map_err(|what| format!("node {node}: {what}"))?;
            let mut fresh = blocks.clone();
            fresh.rebuild(self.data.facts.floor);
            if fresh != *blocks {
                return Err(format!(
                    "node {node}: the orders of hot and cold blocks are not those of its cells"
                ));
            }
        }
        Ok(())
    }
}

fn audit(blocks: &NodeBlocks) -> Result<(), String> {
    let (mut tracked, mut resident, mut arriving, mut doubtful) = (0, 0, 0, 0);
    for (id, layer) in &blocks.layers {
        if layer.cells.is_empty() {
            return Err(format!("layer {id} is kept without a block"));
        }
        let mut in_layer = 0;
        for (block, cell) in &layer.cells {
            tracked += 1;
            match cell.place {
                Place::Resident => {
                    in_layer += 1;
                    resident += layer.block_bytes;
                }
                Place::Arriving => arriving += layer.block_bytes,
                Place::Doubtful => doubtful += layer.block_bytes,
                Place::Out if cell.weight == 0 => {
                    return Err(format!("block {block} of layer {id} is kept without heat or place"));
                }
                Place::Out | Place::Leaving | Place::Resting => {}
            }
        }
        check("resident blocks of a layer", in_layer, layer.resident)?;
    }
    check("tracked blocks", tracked, blocks.tracked)?;
    check("resident bytes", resident, blocks.resident_bytes)?;
    check("arriving bytes", arriving, blocks.arriving_bytes)?;
    check("doubtful bytes", doubtful, blocks.doubtful_bytes)
}

fn check(what: &str, counted: u64, kept: u64) -> Result<(), String> {
    if counted == kept {
        Ok(())
    } else {
        Err(format!("{what} are {counted}, the account says {kept}"))
    }
}
