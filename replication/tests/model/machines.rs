//! Carries out what the machines of a node ask for.

use std::sync::Arc;

use hearth_protocol::NodeId;
use hearth_protocol::record::Record;
use hearth_replication::member;
use hearth_replication::owner;
use hearth_replication::request::{Answer, Bytes as Source, Refusal, Reply, Request, RequestId, Stamp, Standing, Work};
use hearth_replication::takeover;

use super::config::{Config, Time};
use super::ghost::{BLOCKS, Bytes, Reached, Value};
use super::world::{Disk, Job, Message, World, name, number};

impl World {
    pub fn member(&mut self, config: &Config, at: usize, input: member::Input, stamp: Option<Stamp>, bytes: Bytes) {
        let out = self.node(at).member.step(input);
        for output in out {
            self.member_wants(config, at, output, stamp, bytes);
        }
    }

    fn member_wants(&mut self, config: &Config, at: usize, output: member::Output, stamp: Option<Stamp>, bytes: Bytes) {
        match output {
            member::Output::Perform {
                from,
                id,
                work,
                mark,
                anew,
            } => {
                let stamp = stamp.expect("a request has a stamp");
                if mark && let Work::Write { extent, .. } = &work {
                    let store = self.nodes[at].member.store();
                    for block in extent.blocks() {
                        self.node(at).disk.marks.entry(block).or_insert(store);
                    }
                }
                match work {
                    Work::Write { extent, .. } => {
                        let job = Job {
                            from,
                            id,
                            stamp,
                            extent,
                            bytes,
                        };
                        if config.async_writes {
                            self.node(at).jobs.push(job);
                        } else {
                            self.carry_out(config, at, job, true);
                        }
                    }
                    Work::Read(_) => {
                        let got = std::array::from_fn(|block| self.nodes[at].disk.cells[block].now);
                        let ended = member::Input::Finished { from, id, ok: true };
                        self.member(config, at, ended, Some(stamp), got);
                    }
                    Work::Flush { .. } => {
                        for cell in &mut self.node(at).disk.cells {
                            cell.stable = cell.now;
                            cell.cached.clear();
                        }
                        let store = self.nodes[at].member.store();
                        for block in anew {
                            self.node(at).disk.marks.entry(block).and_modify(|made| *made = store);
                        }
                        let ended = member::Input::Finished { from, id, ok: true };
                        self.member(config, at, ended, Some(stamp), bytes);
                    }
                    Work::Hash(_) | Work::Renew { .. } => {}
                }
            }
            member::Output::Persist(durable) => {
                if config.async_persist {
                    self.node(at).persisting = Some(durable);
                } else {
                    self.node(at).disk.durable = durable;
                    self.member(config, at, member::Input::Persisted { ok: true }, None, bytes);
                }
            }
            member::Output::Unmark(blocks) => {
                self.node(at).disk.marks.retain(|block, _| !blocks.contains(block));
            }
            member::Output::Answer { to, id, answer, .. } => {
                let stamp = stamp.expect("an answer has a stamp");
                let to = number(&to);
                if to == at || config.quick {
                    self.answer(config, at, to, id, stamp, answer, bytes);
                } else {
                    self.post(Message::Answer {
                        from: at,
                        to,
                        id,
                        stamp,
                        answer,
                        bytes,
                    });
                }
            }
            member::Output::Raised { to, standing } => {
                let (from, to) = (at, number(&to));
                if to == at || config.quick {
                    self.raised(config, at, to, standing);
                } else {
                    self.post(Message::Raised { from, to, standing });
                }
            }
            member::Output::NotRaised { to, stamp, refusal } => {
                let (from, to) = (at, number(&to));
                if to == at || config.quick {
                    self.not_raised(config, at, to, stamp, refusal);
                } else {
                    self.post(Message::NotRaised {
                        from,
                        to,
                        stamp,
                        refusal,
                    });
                }
            }
            member::Output::Told { to, standing, .. } => {
                let to = number(&to);
                self.takeover(
                    config,
                    to,
                    takeover::Input::Told {
                        from: name(at),
                        standing,
                    },
                    bytes,
                );
            }
            member::Output::Fenced(epoch) => self.owner(config, at, owner::Input::Fenced(epoch), bytes),
            member::Output::Forget => {
                let life = self.nodes[at].disk.life;
                self.node(at).disk = Disk {
                    life,
                    ..Disk::default()
                };
                self.ghost().reach(Reached::Dropped);
            }
            member::Output::Sealed(ok) => self.owner(config, at, owner::Input::SealedHere(ok), bytes),
        }
    }

    /// A write reaches the disk, or the disk fails.
    pub fn carry_out(&mut self, config: &Config, at: usize, job: Job, ok: bool) {
        if ok {
            self.apply(at, &job);
        } else {
            self.node(at).disk.failed = true;
        }
        let (from, id) = (job.from, job.id);
        let ended = member::Input::Finished { from, id, ok };
        self.member(config, at, ended, Some(job.stamp), job.bytes);
    }

    pub fn apply(&mut self, at: usize, job: &Job) {
        for block in job.extent.blocks() {
            let block = block.0 as usize;
            let cell = &mut self.node(at).disk.cells[block];
            cell.now = job.bytes[block];
            cell.cached.insert(job.bytes[block]);
        }
    }

    pub fn owner(&mut self, config: &Config, at: usize, input: owner::Input, brought: Bytes) {
        let now = self.now(at);
        let served_by = match &input {
            owner::Input::Reply { from, .. } => number(from),
            _ => at,
        };
        let Some(owner) = &mut self.node(at).owner else { return };
        let force = owner.record().clone();
        let grant = force.grant();
        let out = owner.step(now, input);
        let record = owner.record().clone();
        if owner.ended().is_some() {
            self.node(at).owner = None;
        }
        if record != force && self.ghost.in_force.grant() == grant {
            self.ghost().set_changed(record);
        }
        for output in out {
            match output {
                owner::Output::Send { to, request, bytes } => {
                    let bytes = match bytes {
                        Source::OfClient(op) => [op.0 as Value; BLOCKS],
                        _ => brought,
                    };
                    self.send(config, at, number(&to), request, bytes);
                }
                owner::Output::Publish(change) => {
                    self.post(Message::Publish(change));
                }
                owner::Output::Raise { to, record, over } => self.raise(config, at, number(&to), record, over),
                owner::Output::Acknowledge { op, .. } => {
                    let by = (at, grant.0, grant.1);
                    self.ghost().acknowledge(op.0 as u8, by, served_by, brought);
                }
                owner::Output::Compared { .. } => {}
                owner::Output::Deny { op, .. } => self.ghost().deny(op.0 as u8),
                owner::Output::Joined(node) => {
                    self.ghost().lossy &= !(1 << number(&node));
                    self.ghost().reach(Reached::Joined);
                }
                owner::Output::NotChanged { .. } => {}
                owner::Output::DropCopy { node, stamp } => {
                    let to = number(&node);
                    self.post(Message::Drop { to, stamp });
                }
                owner::Output::SealHere(grant) => {
                    self.member(config, at, member::Input::Seal { grant }, None, brought);
                }
                owner::Output::Sealed { stamp, stores } => {
                    if let Some(to) = config.destination {
                        self.post(Message::Sealed { to, stamp, stores });
                    }
                }
            }
        }
    }

    pub fn takeover(&mut self, config: &Config, at: usize, input: takeover::Input, brought: Bytes) {
        let now = self.now(at);
        let Some(takeover) = &mut self.node(at).takeover else {
            return;
        };
        let out = takeover.step(now, input);
        for output in out {
            match output {
                takeover::Output::Publish(change) => {
                    self.post(Message::Publish(change));
                }
                takeover::Output::Raise { to, record, over } => self.raise(config, at, number(&to), record, over),
                takeover::Output::Send { to, request, .. } => self.send(config, at, number(&to), request, brought),
                takeover::Output::Opened(owner) => {
                    let record = owner.record().clone();
                    let lost = |node: &NodeId| self.ghost.lossy & (1 << number(node)) != 0;
                    // A guest that goes on over a hand-over is told of nothing, so nothing may be missing.
                    let new_guest = self.nodes[at].incoming.is_none();
                    let all_lost = new_guest && self.ghost.replaced.members().iter().all(lost);
                    for member in record.members() {
                        self.ghost().lossy &= !(1 << number(&member));
                    }
                    if self.nodes[at].incoming.is_some() {
                        self.ghost().reach(Reached::HandedOver);
                    }
                    if self.nodes[at].disk.durable.sealed.is_some() {
                        self.ghost().reach(Reached::WayBack);
                    }
                    self.ghost().open(at, &record, all_lost);
                    let node = self.node(at);
                    node.owner = Some(*owner);
                    node.takeover = None;
                    node.incoming = None;
                    if matches!(config.time, Time::Jumps) {
                        self.renew_at_once(config, at);
                    }
                }
                takeover::Output::GivenUp(_) => self.node(at).takeover = None,
            }
        }
    }

    fn send(&mut self, config: &Config, from: usize, to: usize, request: Request, bytes: Bytes) {
        if from == to {
            self.request(config, from, to, request, bytes);
        } else {
            self.post(Message::Request {
                from,
                to,
                request,
                bytes,
            });
        }
    }

    pub fn request(&mut self, config: &Config, from: usize, to: usize, request: Request, bytes: Bytes) {
        let stamp = Some(request.stamp);
        let from = name(from);
        self.member(config, to, member::Input::Request { from, request }, stamp, bytes);
    }

    fn raise(&mut self, config: &Config, from: usize, to: usize, record: Arc<Record>, over: Stamp) {
        if from == to {
            let from = name(from);
            let raise = member::Input::Raise { from, record, over };
            self.member(config, to, raise, None, [0; BLOCKS]);
        } else {
            self.post(Message::Raise { from, to, record, over });
        }
    }

    #[allow(clippy::too_many_arguments, reason = "a message's parts")]
    pub fn answer(
        &mut self,
        config: &Config,
        from: usize,
        to: usize,
        id: RequestId,
        stamp: Stamp,
        answer: Answer,
        bytes: Bytes,
    ) {
        self.reply(config, from, to, Reply::Answered { id, stamp, answer }, bytes);
    }

    /// A member's reply reaches a node.
    pub fn reply(&mut self, config: &Config, from: usize, to: usize, reply: Reply, bytes: Bytes) {
        let from = name(from);
        let input = takeover::Input::Reply {
            from: from.clone(),
            reply: reply.clone(),
        };
        self.takeover(config, to, input, bytes);
        self.owner(config, to, owner::Input::Reply { from, reply }, bytes);
    }

    pub fn raised(&mut self, config: &Config, from: usize, to: usize, standing: Standing) {
        self.reply(config, from, to, Reply::Raised(standing), [0; BLOCKS]);
    }

    pub fn not_raised(&mut self, config: &Config, from: usize, to: usize, stamp: Stamp, refusal: Refusal) {
        self.reply(config, from, to, Reply::NotRaised { stamp, refusal }, [0; BLOCKS]);
    }

    /// Every other node that is up renews the read lease.
    pub fn renew_at_once(&mut self, config: &Config, at: usize) {
        let before = self.messages.clone();
        self.owner(config, at, owner::Input::Renew, [0; BLOCKS]);
        let asked: Vec<Arc<Message>> = self.messages.difference(&before).cloned().collect();
        for message in asked {
            let Message::Request { to, request, .. } = &*message else {
                continue;
            };
            self.messages.remove(&message);
            let answer = match self.nodes[*to].member.admits(request) {
                Ok(()) => Answer::Granted { sent: self.now(at) },
                Err(refusal) => Answer::Refused(refusal),
            };
            self.answer(config, *to, at, request.id, request.stamp, answer, [0; BLOCKS]);
        }
    }
}
