//! Nodes and daemons start, die, stop and go on, and read the log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::Event as Fact;
use hearth_replication::session::{Input, Session};

use crate::event::Event;
use crate::facts::Facts;
use crate::log::image_of;
use crate::net::Key;
use crate::node::{Clock, Daemon, Phase, Shell};
use crate::world::World;

impl World {
    /// A daemon starts, if there is power and none runs.
    pub fn starts(&mut self, node: usize) -> Result<(), String> {
        let seen = self.log.seen.min(self.log.len);
        let frozen = self.nodes[node].seen > self.log.len;
        // It reads the log from some state it kept on.
        let read = if self.chance.happens(500) {
            seen
        } else {
            let begins = self.log.begins();
            begins + self.chance.index(seen - begins + 1)
        };
        let mut facts = Facts::of(self.nodes[node].id.clone());
        for entry in &self.log.entries[..read] {
            facts.apply(&entry.envelope, &entry.event);
        }
        let here = &mut self.nodes[node];
        if !here.power {
            here.power = true;
            here.clock = Clock::new(self.now_us);
            here.boots += 1;
        }
        if here.daemon.is_some() {
            return Ok(());
        }
        here.starts += 1;
        here.stopped = None;
        here.seen = here.seen.max(read);
        let (life, store, id) = (here.starts, here.store(), here.id.clone());
        let shells = (0..self.images.len()).map(|image| {
            let replica = self.nodes[node].disks[image].as_ref().map(|disk| disk.replica(store));
            let session = Session::new(id.clone(), self.rules, replica, self.log.at(image, read));
            Shell::new(session, self.now_us)
        });
        let daemon = Daemon {
            life,
            shells: shells.collect(),
            facts,
            published: 0,
            joined_at: None,
            reports: 0,
            executing: false,
            answered: BTreeMap::new(),
            frozen,
            dies_in: None,
            late: BTreeSet::new(),
        };
        self.nodes[node].daemon = Some(daemon);
        self.note(|| format!("{id} starts, log read to {read}"));
        if frozen {
            for image in 0..self.images.len() {
                self.step(node, image, Input::RolledBack, None)?;
            }
        }
        self.after(1, Event::Reads { node, life });
        self.joins(node);
        Ok(())
    }

    /// A daemon dies.
    pub fn dies(&mut self, node: usize) -> Result<(), String> {
        let Some(daemon) = self.nodes[node].daemon.take() else {
            return Ok(());
        };
        let id = self.nodes[node].id.clone();
        self.note(|| format!("{id}'s daemon dies"));
        self.nodes[node].stopped = None;
        for (image, shell) in daemon.shells.into_iter().enumerate() {
            for op in shell.ops.into_keys() {
                self.images[image].reference.deny(op)?;
            }
        }
        let here = &mut self.nodes[node];
        let store = here.store();
        for disk in here.disks.iter_mut().flatten() {
            disk.abandon(store, &mut self.chance);
        }
        let keys: Vec<Key> = self.net.connections.keys().copied().collect();
        for key in keys.into_iter().filter(|key| key.1 == node || key.2 == node) {
            self.break_connection(key, 0);
        }
        Ok(())
    }

    /// A node loses power.
    pub fn loses_power(&mut self, node: usize) -> Result<(), String> {
        self.dies(node)?;
        let here = &mut self.nodes[node];
        here.power = false;
        let id = here.id.clone();
        for (image, disk) in here.disks.iter_mut().enumerate() {
            let Some(disk) = disk else { continue };
            if disk.is_marked() {
                self.images[image].reference.lost_power(&id);
            }
            disk.lose_power(&mut self.chance);
        }
        self.note(|| format!("{id} loses power"));
        Ok(())
    }

    /// A stopped daemon goes on: what its clients asked meanwhile comes before what other nodes said.
    pub fn goes_on(&mut self, node: usize) -> Result<(), String> {
        let Some(kept) = self.nodes[node].stopped.take() else {
            return Ok(());
        };
        for image in 0..self.images.len() {
            let current = self.log.now[image].record.epoch();
            let by = self.shell(node, image).filter(|shell| shell.phase == Phase::Open);
            let behind = by
                .and_then(|shell| shell.by.as_ref())
                .is_some_and(|by| by.epoch < current);
            if behind {
                self.counters.count("stopped owner continued behind another one");
                for _ in 0..3 {
                    let ask = self.any();
                    self.asks(node, image, ask)?;
                }
            }
        }
        if self.nodes[node].daemon.is_some() {
            self.nodes[node].stopped = Some(kept);
        }
        Ok(())
    }

    pub fn reads(&mut self, node: usize) -> Result<(), String> {
        let usual = self.chance.delay(20_000, 3_000_000, 20);
        let Some(daemon) = &mut self.nodes[node].daemon else {
            return Ok(());
        };
        let life = daemon.life;
        let (read, len, frozen) = (daemon.facts.read, self.log.len.min(self.log.seen), daemon.frozen);
        self.after(usual, Event::Reads { node, life });
        if self.nodes[node].log_cut {
            return Ok(());
        }
        if !frozen && self.log.len < self.nodes[node].seen {
            self.note(|| format!("n{node} sees that the log lost its end"));
            if let Some(daemon) = &mut self.nodes[node].daemon {
                daemon.frozen = true;
            }
            for image in 0..self.images.len() {
                self.step(node, image, Input::RolledBack, None)?;
            }
            return Ok(());
        }
        if frozen {
            if self.log.len >= self.nodes[node].seen {
                if let Some(daemon) = &mut self.nodes[node].daemon {
                    daemon.frozen = false;
                    for entry in &self.log.entries[read..len] {
                        daemon.facts.apply(&entry.envelope, &entry.event);
                    }
                }
                self.nodes[node].seen = len;
                for image in 0..self.images.len() {
                    let log = self.log.at(image, len);
                    self.step(node, image, Input::Rebased(log), None)?;
                }
            }
            return Ok(());
        }
        for at in read..len {
            let entry = Arc::clone(&self.log.entries[at]);
            let here = &mut self.nodes[node];
            here.seen = here.seen.max(at + 1);
            let counts = match &mut here.daemon {
                Some(daemon) => daemon.facts.apply(&entry.envelope, &entry.event),
                None => return Ok(()),
            };
            if counts != entry.counts {
                return Err(format!("n{node}: entry {} counts: {counts} here", at + 1));
            }
            match &entry.event {
                Fact::LocationsChanged { image, change } => {
                    let change = change.clone();
                    self.step(node, image_of(*image), Input::Logged(change), None)?;
                }
                Fact::CommandGiven(command) if !counts && command.node == self.nodes[node].id => {
                    self.counters.count("command of an ended term left alone");
                }
                _ => {}
            }
        }
        self.joins_again(node);
        self.next_command(node)
    }
}
