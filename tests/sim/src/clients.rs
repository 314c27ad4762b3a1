//! What clients of an image ask, wherever it is served or about to be, at an old owner's too.

use hearth_protocol::BlockIndex;
use hearth_protocol::record::Extent;
use hearth_replication::owner::Ask;

use crate::event::Event;
use crate::node::Phase;
use crate::world::World;

/// Operations that wait for one image to open at one node; the production bound is higher, but these are never few.
const HELD_MAX: usize = 20;

impl World {
    /// A client asks something.
    pub fn client(&mut self, image: usize) -> Result<(), String> {
        if self.healed {
            return Ok(());
        }
        let us = self.chance.within(1_000, self.plan.client_us);
        self.after(us, Event::Client { image });
        let mut open = Vec::new();
        let mut other = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            // A stopped daemon's clients still ask: it finds that when it goes on.
            let Some(shell) = node.running().map(|daemon| &daemon.shells[image]) else {
                continue;
            };
            match shell.phase {
                // Where writes wait for something, reads are still asked.
                Phase::Open if shell.ops.len() < 3 * self.plan.in_flight => open.push(at),
                Phase::Incoming | Phase::Taking | Phase::Stalled if shell.held.len() < HELD_MAX => other.push(at),
                _ => {}
            }
        }
        let from = if open.is_empty() || self.chance.happens(150) {
            other
        } else {
            open
        };
        let Some(node) = self.chance.pick(&from) else {
            return Ok(());
        };
        let ask = self.any();
        let in_flight = self.plan.in_flight;
        let full = self
            .shell(node, image)
            .is_some_and(|shell| shell.ops.len() >= in_flight);
        if full && !matches!(ask, Ask::Read(_)) {
            return Ok(());
        }
        self.asks(node, image, ask)
    }

    /// Any operation.
    pub fn any(&mut self) -> Ask {
        let blocks = self.chance.within(1, 4);
        let first = self.chance.below(self.plan.blocks);
        let last = (first + blocks - 1).min(self.plan.blocks - 1);
        let extent = Extent {
            first: BlockIndex(first),
            last: BlockIndex(last),
        };
        match self.chance.below(100) {
            0..50 => Ask::Write {
                extent,
                fua: self.chance.happens(150),
            },
            50..90 => Ask::Read(extent),
            _ => Ask::Flush,
        }
    }
}
