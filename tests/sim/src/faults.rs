//! What goes wrong, and when it is over.

use hearth_protocol::BlockIndex;

use crate::event::Event;
use crate::plan::Fault;
use crate::world::World;

impl World {
    /// Something goes wrong.
    pub fn fault(&mut self) -> Result<(), String> {
        if self.healed {
            return Ok(());
        }
        let us = self.chance.within(50_000, self.plan.fault_us);
        self.after(us, Event::Fault);
        let faults = self.plan.faults.clone();
        let Some(fault) = self.chance.pick(&faults) else {
            return Ok(());
        };
        let mut node = self.chance.index(self.nodes.len());
        if self.chance.happens(400) {
            // An owner is hit more often than others.
            let image = self.chance.index(self.images.len());
            let serves = |node: &crate::node::Node| {
                let daemon = node.daemon.as_ref();
                daemon.is_some_and(|daemon| daemon.shells[image].session.is_open())
            };
            node = self.nodes.iter().position(serves).unwrap_or(node);
        }
        let other = self.chance.index(self.nodes.len());
        if self.goes_wrong(fault, node, other)? && fault != Fault::KillWithin {
            let name = Fault::ALL
                .iter()
                .find(|(known, _)| *known == fault)
                .map_or("", |(_, name)| name);
            self.counters.count(name);
            self.note(|| format!("fault: {name} (n{node}, n{other})"));
        }
        Ok(())
    }

    /// Says whether it could happen.
    fn goes_wrong(&mut self, fault: Fault, node: usize, other: usize) -> Result<bool, String> {
        let down_us = self.chance.delay(1_000_000, 20_000_000, 200);
        match fault {
            Fault::Kill => {
                if self.nodes[node].daemon.is_none() {
                    return Ok(false);
                }
                self.dies(node)?;
                let us = self.chance.delay(300_000, 10_000_000, 100);
                self.after(us, Event::Starts { node });
            }
            Fault::KillWithin => {
                let left = self.chance.within(0, 40);
                let Some(daemon) = &mut self.nodes[node].daemon else {
                    return Ok(false);
                };
                daemon.dies_in = Some(left);
            }
            Fault::PowerLoss => {
                if !self.nodes[node].power {
                    return Ok(false);
                }
                self.loses_power(node)?;
                self.after(down_us, Event::Starts { node });
            }
            Fault::SiteLoss => {
                for node in 0..self.nodes.len() {
                    if self.nodes[node].power {
                        self.loses_power(node)?;
                    }
                    let us = self.chance.delay(1_000_000, 10_000_000, 100);
                    self.after(us, Event::Starts { node });
                }
            }
            Fault::Stop => {
                if self.nodes[node].running().is_none() {
                    return Ok(false);
                }
                self.nodes[node].stopped = Some(Vec::new());
                let us = self.chance.delay(4_000_000, 15_000_000, 200);
                self.after(us, Event::Continues { node });
            }
            Fault::Clock => {
                let rate = self.chance.within(980_000, 1_020_000);
                let missed_ms = self.chance.within(0, 400);
                self.nodes[node].clock.disturb(self.now_us, rate, missed_ms);
            }
            Fault::Partition => {
                // One node against all others, often without the log, or against another one.
                let both = self.chance.happens(500);
                let down_us = self.chance.delay(2_000_000, 20_000_000, 400);
                if both && self.chance.happens(700) {
                    self.nodes[node].log_cut = true;
                    self.after(down_us, Event::Reaches { node });
                }
                for peer in 0..self.nodes.len() {
                    if peer != node && (both || peer == other) {
                        self.cuts(node, peer, down_us);
                        self.cuts(peer, node, down_us);
                    }
                }
                return Ok(both || node != other);
            }
            Fault::OneWay => {
                if node == other {
                    return Ok(false);
                }
                self.cuts(node, other, down_us);
            }
            Fault::Break => {
                let keys: Vec<_> = self.net.connections.keys().copied().collect();
                let Some(key) = self.chance.pick(&keys) else {
                    return Ok(false);
                };
                self.break_connection(key, 0);
            }
            Fault::DiskError => self.nodes[node].failing = true,
            Fault::DiskFull => {
                self.nodes[node].full = true;
                let us = self.chance.within(100_000, 3_000_000);
                self.after(us, Event::HasRoom { node });
            }
            Fault::BitFlip => {
                let image = self.chance.index(self.images.len());
                let block = BlockIndex(self.chance.below(self.plan.blocks));
                let Some(disk) = &mut self.nodes[node].disks[image] else {
                    return Ok(false);
                };
                disk.flipped.insert(block);
            }
            Fault::LogCut => {
                self.nodes[node].log_cut = true;
                self.after(down_us, Event::Reaches { node });
            }
            Fault::LogLoss => {
                if self.log.is_rolled_back() || self.log.len == self.log.begins() {
                    return Ok(false);
                }
                let most = if self.chance.happens(500) { 3 } else { 20 };
                let lost = self.chance.within(1, most) as usize;
                if self.log.lose(lost) {
                    self.after(down_us, Event::Recovered);
                }
            }
            // It waits for a hand-over.
            Fault::HandOver => return Ok(false),
            Fault::SchedulerKill | Fault::SchedulerStop | Fault::SchedulerCut | Fault::SchedulerClock => {
                return Ok(self.scheduler_fault(fault));
            }
        }
        Ok(true)
    }

    fn scheduler_fault(&mut self, fault: Fault) -> bool {
        let mut scheduler = self.chance.index(self.schedulers.len());
        if self.chance.happens(500) {
            // A leader is hit more often.
            let leads =
                |of: &crate::scheduler::Scheduler| of.running().is_some_and(|process| process.leads().is_some());
            scheduler = self.schedulers.iter().position(leads).unwrap_or(scheduler);
        }
        let us = self.chance.delay(2_000_000, 15_000_000, 300);
        let here = &mut self.schedulers[scheduler];
        match fault {
            Fault::SchedulerKill => {
                if here.process.is_none() {
                    return false;
                }
                self.scheduler_dies(scheduler);
                self.after(us, Event::SchedulerStarts { scheduler });
            }
            Fault::SchedulerStop => {
                if here.running().is_none() {
                    return false;
                }
                here.stopped = Some(Vec::new());
                self.after(us, Event::SchedulerContinues { scheduler });
            }
            Fault::SchedulerCut => {
                here.cut = true;
                self.after(us, Event::SchedulerReaches { scheduler });
            }
            _ => {
                let off = self.chance.within(0, 7_200_000) as i64 - 3_600_000;
                here.off_ms = off;
            }
        }
        true
    }

    /// Nothing passes from one node to another for a time.
    pub fn cuts(&mut self, from: usize, to: usize, us: u64) {
        self.net.cut.insert((from, to));
        self.after(us, Event::Heals { from, to });
    }
}
