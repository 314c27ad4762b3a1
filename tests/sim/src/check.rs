//! Looking after copies: the operator has them compared in between everything else, and what a disk cannot read written anew.
//!
//! Disks here flip bits so that a block cannot be read, and never so that it reads as something else. So members of a set in
//! force that are asked under the lock differ by nothing that can be read: a difference is a broken rule.

use std::collections::BTreeMap;

use hearth_protocol::record::{Extent, Nodes};
use hearth_protocol::{BlockIndex, NodeId};
use hearth_replication::owner::{Check, OpId};
use hearth_replication::request::{BlockHash, Hashes, RequestId};
use hearth_replication::session::Input;

use crate::disk::Value;
use crate::world::World;

impl World {
    /// The operator has some blocks compared.
    pub fn compare_copies(&mut self, image: usize, owner: usize) -> Result<(), String> {
        let first = self.chance.below(self.plan.blocks);
        let last = self.chance.within(first, self.plan.blocks - 1).min(first + 3);
        let extent = Extent {
            first: BlockIndex(first),
            last: BlockIndex(last),
        };
        self.check(owner, image, Check::Compare(extent))
    }

    fn check(&mut self, node: usize, image: usize, check: Check) -> Result<(), String> {
        let state = &mut self.images[image];
        state.ops += 1;
        let op = OpId(state.ops);
        let Some(shell) = self.shell(node, image) else {
            return Ok(());
        };
        shell.checks.insert(op, check.extent());
        self.step(node, image, Input::Check { op, check }, None)
    }

    /// A disk was read for a comparison.
    pub fn hashed(
        &mut self,
        node: usize,
        image: usize,
        from: NodeId,
        id: RequestId,
        extent: Extent,
        found: Option<Vec<Value>>,
    ) -> Result<(), String> {
        let disk = self.nodes[node].disks[image].as_ref();
        let sound = |block: &BlockIndex| disk.is_some_and(|disk| !disk.flipped.contains(block));
        let of = |(at, block): (usize, BlockIndex)| {
            let value = found.as_ref()?.get(at)?;
            sound(&block).then(|| BlockHash(u128::from(*value)))
        };
        let hashes: Hashes = extent.blocks().enumerate().map(of).collect();
        self.step(node, image, Input::Hashed { from, id, hashes }, None)
    }

    /// All members told what they have.
    pub fn compared(
        &mut self,
        node: usize,
        image: usize,
        op: OpId,
        told: &BTreeMap<NodeId, Hashes>,
    ) -> Result<(), String> {
        let Some(extent) = self.shell(node, image).and_then(|shell| shell.checks.remove(&op)) else {
            return Ok(());
        };
        self.counters.count("copies compared");
        let length = told.values().map(Vec::len).max().unwrap_or(0);
        for at in 0..length {
            let of = |(node, hashes): (&NodeId, &Hashes)| Some((node.clone(), hashes.get(at).copied().flatten()?));
            let readable: Vec<(NodeId, BlockHash)> = told.iter().filter_map(of).collect();
            if readable.iter().any(|(_, hash)| *hash != readable[0].1) {
                return Err(format!("n{node} i{image}: members in sync differ: {told:?}"));
            }
            if readable.len() < told.len()
                && let Some((from, _)) = readable.first()
            {
                self.counters.count("unreadable block found");
                let extent = Extent::block(BlockIndex(extent.first.0 + at as u64));
                let (from, to): (NodeId, Nodes) = (from.clone(), told.keys().cloned().collect());
                self.check(node, image, Check::Rewrite { extent, from, to })?;
            }
        }
        Ok(())
    }
}
