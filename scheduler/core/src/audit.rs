//! Recounts what the state keeps as running totals and derived orders.

use std::collections::BTreeMap;

use hearth_protocol::record::Nodes;

use crate::blocks::{NodeBlocks, Place};
use crate::moves::{holds_all, is_too_many};
use crate::state::{Facts, State};

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
        audit_replicas(&self.data.facts)
    }
}

/// What repair knows of images is what their records say.
fn audit_replicas(facts: &Facts) -> Result<(), String> {
    let mut short = BTreeMap::new();
    let mut joining = BTreeMap::new();
    for (id, image) in &facts.catalog.images {
        let known = facts.validity.image(*id).and_then(|known| known.locations.as_ref());
        let (Some(locations), Some(replicas)) = (known, &image.replicas) else {
            if known.is_some() || image.replicas.is_some() {
                return Err(format!(
                    "image {id}: its replicas are known to one of record and catalog"
                ));
            }
            continue;
        };
        let runs = locations.record.runs();
        let fewest = runs.iter().map(|run| run.members.len() as u64).min().unwrap_or(0);
        let joiners: Nodes = runs.iter().flat_map(|run| run.joiners.clone()).collect();
        check(&format!("image {id}: members"), fewest, replicas.fewest)?;
        if replicas.members != locations.record.members() || replicas.joiners != joiners {
            return Err(format!("image {id}: its nodes are not those of its record"));
        }
        if fewest < replicas.wanted {
            short.insert(*id, fewest);
        }
        if !joiners.is_empty() {
            joining.insert(*id, joiners);
        }
    }
    let repairs = &facts.repairs;
    let kept: BTreeMap<_, _> = repairs.short.iter().map(|(id, short)| (*id, short.fewest)).collect();
    if kept != short || repairs.joining != joining {
        return Err("the images that repair looks at are not the degraded ones and those with joiners".into());
    }
    let known = |id| facts.catalog.images.contains_key(id);
    if !repairs.ordered.keys().chain(repairs.tried.keys()).all(known) {
        return Err("repair remembers orders for images that are gone".into());
    }
    let moves = &facts.moves;
    let ended = moves.unscored.iter().chain(&moves.recent).map(|ended| &ended.image);
    let kept = moves
        .under_way
        .keys()
        .chain(moves.surplus.keys())
        .chain(moves.dropping.keys());
    if !kept.chain(moves.breakers.keys()).chain(ended).all(known) {
        return Err("moves are remembered of images that are gone".into());
    }
    for (id, at) in &moves.away {
        let image = facts.catalog.images.get(id).filter(|image| image.attached);
        let locations = facts.validity.image(*id).and_then(|known| known.locations.as_ref());
        let held = image
            .zip(locations)
            .is_none_or(|(image, of)| holds_all(&of.record, &image.node));
        if held {
            return Err(format!(
                "image {id} is not served away from its replicas, though noted at {}",
                at.seq
            ));
        }
    }
    for (id, at) in &moves.surplus {
        let replicas = facts.catalog.images.get(id).and_then(|image| image.replicas.as_ref());
        if replicas.is_none_or(|replicas| !is_too_many(replicas)) {
            return Err(format!(
                "image {id} has no replica too many, though noted at {}",
                at.seq
            ));
        }
    }
    Ok(())
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
