//! This node's copy: what goes into its gate, and what comes out.

use hearth_protocol::Incarnation;

use super::{Inner, Message, Output, Session, Step};
use crate::member::{Input, Output as Wants};
use crate::owner;
use crate::request::{Answer, Bytes, Refusal, Reply, Standing};

impl Session {
    pub(super) fn copy(&mut self, input: Input, bytes: Bytes, step: &mut Step) {
        let Some(member) = &mut self.member else {
            return self.no_copy(input, step);
        };
        for output in member.step(input) {
            self.copy_wants(output, &bytes, step);
        }
    }

    fn copy_wants(&mut self, output: Wants, bytes: &Bytes, step: &mut Step) {
        match output {
            Wants::Perform {
                from,
                id,
                work,
                mark,
                anew,
            } => step.out.push(Output::Perform {
                from,
                id,
                work,
                mark,
                anew,
                bytes: bytes.clone(),
            }),
            Wants::Persist(durable) => step.out.push(Output::Persist(durable)),
            Wants::Unmark(blocks) => step.out.push(Output::Unmark(blocks)),
            Wants::Answer {
                to,
                id,
                stamp,
                answer,
                bytes,
            } => {
                if to == self.me {
                    let reply = Reply::Answered { id, stamp, answer };
                    step.todo.push_back(Inner::Reply { from: to, reply });
                } else {
                    let message = Message::Answer { id, stamp, answer };
                    step.out.push(Output::Send { to, message, bytes });
                }
            }
            Wants::Raised { to, standing } => {
                if to == self.me {
                    let reply = Reply::Raised(standing);
                    step.todo.push_back(Inner::Reply { from: to, reply });
                } else {
                    step.says(to, Message::Raised(standing));
                }
            }
            Wants::NotRaised { to, stamp, refusal } => {
                if to == self.me {
                    let reply = Reply::NotRaised { stamp, refusal };
                    step.todo.push_back(Inner::Reply { from: to, reply });
                } else {
                    step.says(to, Message::NotRaised { stamp, refusal });
                }
            }
            Wants::Told { to, lease, standing } => {
                if to == self.me {
                    self.told(to, lease, standing, step);
                } else {
                    step.says(to, Message::Told { lease, standing });
                }
            }
            // Before anything else that waits for the owner in this step.
            Wants::Fenced(epoch) => step.todo.push_front(Inner::Owner(owner::Input::Fenced(epoch))),
            Wants::Forget => {
                self.member = None;
                step.out.push(Output::Forget);
            }
            Wants::Sealed(ok) => step.todo.push_back(Inner::Owner(owner::Input::SealedHere(ok))),
        }
    }

    /// What a node without a copy answers.
    fn no_copy(&mut self, input: Input, step: &mut Step) {
        let output = match input {
            Input::Request { from, request } => Wants::Answer {
                to: from,
                id: request.id,
                stamp: request.stamp,
                answer: Answer::Refused(Refusal::NoRecord),
                bytes: Bytes::None,
            },
            Input::Raise { from, record, .. } => Wants::NotRaised {
                to: from,
                stamp: record.stamp(),
                refusal: Refusal::NoRecord,
            },
            Input::Ask { from, lease } => Wants::Told {
                to: from,
                lease,
                standing: Standing {
                    record: None,
                    before: None,
                    store: Incarnation(0),
                    doubt: [].into(),
                    lost: [].into(),
                    sealed: None,
                    failed: false,
                },
            },
            Input::Seal { .. } => Wants::Sealed(false),
            Input::Finished { .. }
            | Input::Hashed { .. }
            | Input::NoRoom { .. }
            | Input::Persisted { .. }
            | Input::Drop { .. } => return,
        };
        self.copy_wants(output, &Bytes::None, step);
    }
}

impl Step {
    /// Sends a message without bytes.
    pub(super) fn says(&mut self, to: hearth_protocol::NodeId, message: Message) {
        let bytes = Bytes::None;
        self.out.push(Output::Send { to, message, bytes });
    }
}
