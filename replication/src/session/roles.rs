//! The owner and the takeover of this node: what they are told, and what they want.

use std::sync::Arc;

use hearth_protocol::aggregate::Change;
use hearth_protocol::record::{Record, Stamp};
use hearth_protocol::{LeaseId, NodeId};

use super::waits::{Handing, Raising};
use super::{Inner, Message, Output, Role, Session, Step};
use crate::member;
use crate::owner::{self, Output as OwnerWants};
use crate::request::{Answer, Bytes, Refusal, Reply, Request, Standing, Work};
use crate::takeover::{self, Output as TakeoverWants};
use crate::time::{BootMs, PUBLISH_AGAIN_MS, RAISE_AGAIN_MS, SEALED_AGAIN_MS};

impl Session {
    pub(super) fn reply(&mut self, from: NodeId, reply: Reply, step: &mut Step) {
        match &reply {
            Reply::Answered { id, stamp, answer } => {
                self.waits.answered(&from, *id, *stamp);
                if matches!(answer, Answer::Granted { .. }) {
                    self.waits.silent.remove(&from);
                }
            }
            Reply::Raised(standing) => {
                let stamp = standing.record.as_ref().map(|record| record.stamp());
                self.waits
                    .raises
                    .retain(|to, raising| *to != from || Some(raising.stamp) != stamp);
            }
            // What is being recorded there makes way: it is asked again.
            Reply::NotRaised {
                refusal: Refusal::Fenced { .. } | Refusal::SetChanged { .. },
                ..
            } => {}
            Reply::NotRaised { stamp, .. } => {
                self.waits
                    .raises
                    .retain(|to, raising| *to != from || raising.stamp != *stamp);
            }
        }
        match &self.role {
            Role::Owning(_) => self.own(owner::Input::Reply { from, reply }, step),
            Role::Taking(..) => self.take_over(takeover::Input::Reply { from, reply }, step),
            _ => {}
        }
    }

    pub(super) fn told(&mut self, from: NodeId, lease: LeaseId, standing: Standing, step: &mut Step) {
        let Some(asking) = &mut self.waits.asking else { return };
        if asking.lease != lease || !asking.left.remove(&from) {
            return;
        }
        asking.ahead |= standing.record.as_ref().is_some_and(|record| !self.log.knows(record));
        let reached = asking.left.is_empty() && !asking.ahead;
        self.take_over(takeover::Input::Told { from, standing }, step);
        if reached {
            self.reached(step);
        }
    }

    /// Nobody else is waited for.
    pub(super) fn reached(&mut self, step: &mut Step) {
        self.waits.asking = None;
        self.take_over(takeover::Input::Reached, step);
    }

    pub(super) fn own(&mut self, input: owner::Input, step: &mut Step) {
        let Role::Owning(owner) = &mut self.role else { return };
        let outputs = owner.step(step.now, input);
        let ended = owner.ended().cloned();
        for output in outputs {
            match output {
                OwnerWants::Send { to, request, bytes } => self.send(to, request, bytes, step),
                OwnerWants::Publish(change) => self.publish(change, step),
                OwnerWants::Raise { to, record, over } => self.raise(to, record, over, step),
                OwnerWants::Acknowledge { op, bytes } => step.out.push(Output::Acknowledge { op, bytes }),
                OwnerWants::Compared { op, hashes } => step.out.push(Output::Compared { op, hashes }),
                OwnerWants::Deny { op, denial } => step.out.push(Output::Deny { op, denial }),
                OwnerWants::Joined(node) => step.out.push(Output::Joined(node)),
                OwnerWants::NotChanged { node, denial } => step.out.push(Output::NotChanged { node, denial }),
                OwnerWants::DropCopy { node, stamp } => {
                    if node == self.me {
                        let inner = Inner::Member(member::Input::Drop { stamp }, Bytes::None);
                        step.todo.push_back(inner);
                    } else {
                        step.says(node.clone(), Message::Drop { stamp });
                    }
                    step.out.push(Output::Left(node));
                }
                OwnerWants::SealHere(grant) => self.seal_here(grant, step),
                OwnerWants::Sealed { stamp, stores } => {
                    if let Some(to) = self.destination.take() {
                        let message = Message::Sealed { stamp, stores };
                        step.says(to.clone(), message.clone());
                        self.waits.handing = Some(Handing {
                            to,
                            stamp,
                            message,
                            again: step.now.after(SEALED_AGAIN_MS),
                        });
                    }
                }
            }
        }
        if let Some(denial) = ended {
            self.ended(denial, step);
        }
    }

    /// An owner without a copy has nothing to seal: it answers nobody any more, and that is what the destination is told.
    fn seal_here(&mut self, grant: (hearth_protocol::Epoch, LeaseId), step: &mut Step) {
        let holds = self
            .owner()
            .is_some_and(|owner| owner.record().everyone().contains(&self.me));
        step.todo.push_back(if holds {
            Inner::Member(member::Input::Seal { grant }, Bytes::None)
        } else {
            Inner::Owner(owner::Input::SealedHere(true))
        });
    }

    pub(super) fn take_over(&mut self, input: takeover::Input, step: &mut Step) {
        let Role::Taking(takeover, _) = &mut self.role else {
            return;
        };
        for output in takeover.step(step.now, input) {
            match output {
                TakeoverWants::Publish(change) => self.publish(change, step),
                TakeoverWants::Raise { to, record, over } => self.raise(to, record, over, step),
                TakeoverWants::Send { to, request, bytes } => self.send(to, request, bytes, step),
                TakeoverWants::Opened(owner) => {
                    self.role = Role::Owning(owner);
                    self.waits.clear();
                    self.waits.renewed = Some(BootMs(0));
                    step.out.push(Output::Opened);
                    for (op, ask) in std::mem::take(&mut self.held) {
                        let client = owner::Input::Client { op, ask };
                        step.todo.push_back(Inner::Owner(client));
                    }
                }
                TakeoverWants::GivenUp(setback) => self.gave_up(setback, step),
            }
        }
    }

    fn publish(&mut self, change: Change, step: &mut Step) {
        self.waits.publish = Some((change.clone(), step.now.after(PUBLISH_AGAIN_MS)));
        step.out.push(Output::Publish(change));
    }

    fn send(&mut self, to: NodeId, request: Request, bytes: Bytes, step: &mut Step) {
        if matches!(request.work, Work::Renew { .. }) {
            self.waits.silent.entry(to.clone()).or_insert(step.now);
        } else {
            self.waits.sent(step.now, to.clone(), request.id, request.stamp);
        }
        if to == self.me {
            let inner = member::Input::Request { from: to, request };
            step.todo.push_back(Inner::Member(inner, bytes));
        } else {
            let message = Message::Request(request);
            step.out.push(Output::Send { to, message, bytes });
        }
    }

    fn raise(&mut self, to: NodeId, record: Arc<Record>, over: Stamp, step: &mut Step) {
        let stamp = record.stamp();
        // A node that is in no newer record is not asked any more.
        self.waits.raises.retain(|_, raising| raising.stamp == stamp);
        let raising = Raising {
            stamp,
            message: Message::Raise { record, over },
            since: step.now,
            again: step.now.after(RAISE_AGAIN_MS),
        };
        self.post(to.clone(), raising.message.clone(), step);
        self.waits.raises.insert(to, raising);
    }

    pub(super) fn post(&mut self, to: NodeId, message: Message, step: &mut Step) {
        if to == self.me {
            self.peer(to, message, step);
        } else {
            step.says(to, message);
        }
    }
}
