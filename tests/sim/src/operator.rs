//! The operator: what people do in production, from what nodes report.
//!
//! It attaches an image elsewhere when nobody serves it, sometimes too early; replaces failed disks, moves copies, hands over
//! and detaches. Where the plan does not leave that to the schedulers' policy, it gives blocks the copies they are to have.
//! When faults are over it only repairs.

use hearth_protocol::record::{Extent, Nodes, Record};
use hearth_protocol::{BlockIndex, NodeId};
use hearth_replication::member::Durable;
use hearth_replication::session::Input;

use crate::disk::{Disk, NOTHING};
use crate::event::Event;
use crate::handover::Migration;
use crate::node::Phase;
use crate::world::World;

/// How long a takeover may take before it is called off.
const PATIENCE_US: u64 = 12_000_000;

/// How long an image may be served by nobody before disks that failed are put back as they are.
const DESPAIR_US: u64 = 25_000_000;

/// What it remembers of an image.
#[derive(Debug, Default)]
pub struct Operator {
    /// Since when nobody serves it.
    unserved_us: Option<u64>,
    /// A guest that moves.
    pub migration: Option<Migration>,
    /// The last look of a healed world: everything was read, and all copies are to be equal once that is answered.
    pub read_back: bool,
}

impl World {
    /// What a node reports; nothing if it is down, stopped, or cannot reach the log or most others.
    pub fn phase(&self, node: usize, image: usize) -> Option<(Phase, u64)> {
        let here = &self.nodes[node];
        let others = (0..self.nodes.len()).filter(|other| *other != node);
        let cut = others.filter(|other| self.net.is_cut(node, *other)).count();
        let reports = !here.log_cut && 2 * cut < self.nodes.len();
        let shell = &here.running().filter(|_| reports)?.shells[image];
        Some((shell.phase, self.now_us - shell.since_us))
    }

    /// The nodes that report one of some phases.
    pub fn in_phase(&self, image: usize, wanted: &[Phase]) -> Vec<usize> {
        let is = |node: &usize| {
            self.phase(*node, image)
                .is_some_and(|(phase, _)| wanted.contains(&phase))
        };
        (0..self.nodes.len()).filter(is).collect()
    }

    /// Looks at an image.
    pub fn operate(&mut self, image: usize) -> Result<(), String> {
        let us = self.chance.within(100_000, 700_000);
        self.after(us, Event::Operator { image });
        self.replace_disks(image)?;
        let open = self.in_phase(image, &[Phase::Open]);
        let Some(owner) = self.newest(image, &open) else {
            return self.attach(image);
        };
        self.images[image].operator.unserved_us = None;
        for node in 0..self.nodes.len() {
            let Some((phase, since)) = self.phase(node, image).filter(|_| node != owner) else {
                continue;
            };
            let over = match phase {
                Phase::Stalled => self.healed || self.chance.happens(300),
                Phase::Taking => since > PATIENCE_US,
                Phase::Incoming => self.images[image].operator.migration.is_none(),
                Phase::Open => self.healed,
                Phase::Detached | Phase::Ended => false,
            };
            if over {
                self.step(node, image, Input::Seal { to: None }, None)?;
            }
        }
        self.hands_over(image, owner)?;
        if !self.healed && self.chance.happens(self.plan.moves) {
            return self.moves(image, owner);
        }
        if self.plan.by_policy {
            return Ok(());
        }
        self.repair(image, owner)
    }

    /// Of the nodes that serve, the one with the newest epoch.
    fn newest(&self, image: usize, open: &[usize]) -> Option<usize> {
        let epoch = |node: &usize| {
            let daemon = self.nodes[*node].daemon.as_ref()?;
            daemon.shells[image].by.as_ref().map(|by| by.epoch)
        };
        open.iter().copied().max_by_key(epoch)
    }

    /// Nobody serves it.
    fn attach(&mut self, image: usize) -> Result<(), String> {
        let now_us = self.now_us;
        let since = *self.images[image].operator.unserved_us.get_or_insert(now_us);
        if now_us - since > DESPAIR_US {
            self.images[image].operator.unserved_us = None;
            self.put_back(image)?;
        }
        if self.takes_back(image)? {
            return Ok(());
        }
        for node in self.in_phase(image, &[Phase::Taking, Phase::Incoming]) {
            if self.phase(node, image).is_some_and(|(_, since)| since > PATIENCE_US) {
                self.step(node, image, Input::Seal { to: None }, None)?;
            }
        }
        let busy = !self.in_phase(image, &[Phase::Taking, Phase::Incoming]).is_empty();
        if busy && (self.healed || !self.chance.happens(30)) {
            return Ok(());
        }
        let members = self.log.now[image].record.members();
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|node| self.nodes[*node].running().is_some())
            .collect();
        let holding: Vec<usize> = running
            .iter()
            .copied()
            .filter(|node| members.contains(&self.nodes[*node].id))
            .collect();
        let stalled = self.in_phase(image, &[Phase::Stalled]);
        let from = match self.chance.below(10) {
            0..4 if !stalled.is_empty() => stalled,
            0..8 if !holding.is_empty() => holding,
            _ => running,
        };
        let Some(node) = self.chance.pick(&from) else {
            return Ok(());
        };
        self.takes(node, image)
    }

    /// A node takes the image over.
    pub fn takes(&mut self, node: usize, image: usize) -> Result<(), String> {
        let now_us = self.now_us;
        let lease = self.lease();
        let Some(shell) = self.shell(node, image) else {
            return Ok(());
        };
        if matches!(shell.phase, Phase::Open | Phase::Taking) {
            return Ok(());
        }
        shell.guest_goes_on = false;
        shell.enter(Phase::Taking, now_us);
        self.step(node, image, Input::Take { lease }, None)
    }

    /// Every copy of some blocks failed: the disks are put back with what is on them.
    fn put_back(&mut self, image: usize) -> Result<(), String> {
        for node in 0..self.nodes.len() {
            let failed = self.nodes[node].disks[image].as_mut().is_some_and(|disk| {
                let failed = disk.failed;
                disk.failed = false;
                disk.flipped.clear();
                failed
            });
            if failed {
                self.counters.count("failed disk put back as it is");
            }
            if failed && self.nodes[node].daemon.is_some() {
                self.dies(node)?;
                self.after(100_000, Event::Starts { node });
            }
        }
        Ok(())
    }

    /// A failed disk that is in no set any more is replaced by an empty one, here by none.
    fn replace_disks(&mut self, image: usize) -> Result<(), String> {
        let everyone = self.log.now[image].record.everyone();
        for node in 0..self.nodes.len() {
            let here = &self.nodes[node];
            let replaceable = |disk: &Disk| disk.failed && disk.is_quiet();
            if here.running().is_some()
                && !everyone.contains(&here.id)
                && here.disks[image].as_ref().is_some_and(replaceable)
                && self.chance.happens(300)
            {
                self.prepare(node, image)?;
            }
        }
        Ok(())
    }

    /// A store is made for a copy.
    pub fn prepare(&mut self, node: usize, image: usize) -> Result<(), String> {
        let disk = Disk::new(self.plan.blocks, NOTHING, Durable::default());
        let replica = disk.replica(self.nodes[node].store());
        self.nodes[node].disks[image] = Some(disk);
        self.step(node, image, Input::Prepare(replica), None)
    }

    /// Something is moved without need.
    fn moves(&mut self, image: usize, owner: usize) -> Result<(), String> {
        if self.chance.happens(250) {
            return self.compare_copies(image, owner);
        }
        let other = self.chance.index(self.nodes.len());
        let record = self.log.now[image].record.clone();
        match self.chance.below(10) {
            0..3 => {
                let members: Vec<NodeId> = record.members().into_iter().collect();
                let Some(leaver) = self.chance.pick(&members) else {
                    return Ok(());
                };
                self.step(owner, image, Input::Leave(leaver), None)
            }
            3..6 => {
                let first = self.chance.below(self.plan.blocks);
                let last = self.chance.within(first, self.plan.blocks - 1);
                let extent = Extent {
                    first: BlockIndex(first),
                    last: BlockIndex(last),
                };
                self.join(image, owner, other, extent)
            }
            6..8 if other != owner && self.images[image].operator.migration.is_none() => {
                self.begins_migration(image, other)
            }
            8 => self.step(owner, image, Input::Seal { to: None }, None),
            _ if self.nodes[other].running().is_some() => self.takes(other, image),
            _ => Ok(()),
        }
    }

    /// Blocks with too few copies get another one.
    fn repair(&mut self, image: usize, owner: usize) -> Result<(), String> {
        let record = self.log.now[image].record.clone();
        let Some((extent, holders)) = self.thin(&record) else {
            return Ok(());
        };
        let others: Vec<usize> = (0..self.nodes.len())
            .filter(|node| self.nodes[*node].running().is_some() && !holders.contains(&self.nodes[*node].id))
            .collect();
        let Some(node) = self.chance.pick(&others) else {
            return Ok(());
        };
        let extent = if self.chance.happens(300) { self.whole() } else { extent };
        self.join(image, owner, node, extent)
    }

    /// A run with too few copies, and who holds it.
    pub fn thin(&self, record: &Record) -> Option<(Extent, Nodes)> {
        let runs = record.runs();
        let at = runs.iter().position(|run| run.members.len() < self.plan.copies)?;
        let end = runs.get(at + 1).map_or(self.plan.blocks, |next| next.first.0) - 1;
        let extent = Extent {
            first: runs[at].first,
            last: BlockIndex(end),
        };
        Some((extent, runs[at].members.clone()))
    }

    fn join(&mut self, image: usize, owner: usize, node: usize, extent: Extent) -> Result<(), String> {
        let here = &self.nodes[node];
        if here.running().is_none() || here.disks[image].as_ref().is_some_and(|disk| disk.failed) {
            return Ok(());
        }
        if here.disks[image].is_none() {
            self.prepare(node, image)?;
        }
        self.begins_join(owner, image, node, extent)
    }

    /// The owner begins to copy.
    pub fn begins_join(&mut self, owner: usize, image: usize, node: usize, extent: Extent) -> Result<(), String> {
        let id = self.nodes[node].id.clone();
        let blocks = self.chance.within(1, 8);
        let Some(shell) = self.shell(owner, image) else {
            return Ok(());
        };
        let free = shell.session.owner().is_some_and(|owner| owner.join().is_none());
        if free {
            shell.joining = Some((id.clone(), extent));
        }
        let join = Input::Join {
            node: id,
            extent,
            end: BlockIndex(self.plan.blocks - 1),
            blocks,
            allowed: None,
        };
        self.step(owner, image, join, None)
    }
}
