//! Nodes and daemons start, die, stop and go on, and read the log.

use std::collections::BTreeSet;

use hearth_protocol::aggregate::Change;
use hearth_replication::session::{Input, Session};

use crate::event::Event;
use crate::log::Published;
use crate::net::Key;
use crate::node::{Clock, Daemon, Phase, Shell};
use crate::text::text;
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
            self.chance.index(seen + 1)
        };
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
        let (life, store, id) = (here.starts, here.store(), here.id.clone());
        let shells = (0..self.images.len()).map(|image| {
            let replica = self.nodes[node].disks[image].as_ref().map(|disk| disk.replica(store));
            let session = Session::new(id.clone(), self.rules, replica, self.log.at(image, read));
            Shell::new(session, self.now_us)
        });
        let daemon = Daemon {
            life,
            shells: shells.collect(),
            read,
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
        let (read, len, frozen) = (daemon.read, self.log.len.min(self.log.seen), daemon.frozen);
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
                    daemon.read = len;
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
            let (image, change) = self.log.entries[at].clone();
            let here = &mut self.nodes[node];
            here.seen = here.seen.max(at + 1);
            match &mut here.daemon {
                Some(daemon) => daemon.read = at + 1,
                None => return Ok(()),
            }
            self.step(node, image, Input::Logged(change), None)?;
        }
        Ok(())
    }

    pub fn published(&mut self, image: usize, change: Change) -> Result<(), String> {
        let takes_void = self.chance.happens(300);
        let (by, to) = (change.by.clone(), change.to.clone());
        match self.log.publish(image, change, takes_void) {
            Published::Counts(before) => {
                self.note(|| format!("log: image {image}, {by}: {}", text(&to)));
                if before.epoch() != to.epoch() {
                    self.images[image].reference.granted(to.epoch(), before);
                } else if to.members().len() < before.members().len() {
                    self.counters.count("set shrunk");
                }
                if to.runs().len() > 1 {
                    self.counters.count("map of several runs");
                }
            }
            Published::Void => self.counters.count("void change in the log"),
            Published::Refused => return Ok(()),
        }
        let us = self.chance.within(0, 20_000);
        self.after(us, Event::Seen);
        Ok(())
    }
}
