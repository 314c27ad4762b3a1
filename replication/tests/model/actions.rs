//! One step of a run, and how it reads.

use std::fmt;
use std::sync::Arc;

use super::ghost::BLOCKS;
use super::world::{Job, Message, NAMES};

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Deliver(Arc<Message>),
    Follow(usize),
    CarryOut(usize, Job, bool),
    Persisted(usize),
    Write(usize, [bool; BLOCKS]),
    Read(usize, usize),
    Flush(usize),
    Renew(usize),
    Jump,
    Tick(Option<usize>),
    Kill(usize, bool),
    PowerLoss(usize, bool, usize),
    SiteLoss([usize; 3]),
    TailLoss,
    Fail(usize, usize),
    Takeover(usize, u8),
    Again(usize, u8),
    Hear(usize, u8),
    Seal(usize),
    IncomingWrite(usize),
    Join(usize),
    Leave(usize),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = |bits: &u8| -> String { (0..3).filter(|n| bits & (1 << n) != 0).map(|n| NAMES[n]).collect() };
        match self {
            Action::Deliver(message) => match &**message {
                Message::Request {
                    from,
                    to,
                    request,
                    bytes,
                } => write!(
                    f,
                    "{} gets from {}: {:?} {:?} under {}.{}.{}",
                    NAMES[*to],
                    NAMES[*from],
                    request.work,
                    bytes,
                    request.stamp.epoch,
                    request.stamp.lease.0,
                    request.stamp.set_version
                ),
                Message::Answer {
                    from, to, answer, id, ..
                } => {
                    write!(
                        f,
                        "{} hears from {}: request {} {answer:?}",
                        NAMES[*to], NAMES[*from], id.0
                    )
                }
                Message::Raise { from, to, record, .. } => write!(
                    f,
                    "{} gets from {}: record {}.{}.{} of {:?}",
                    NAMES[*to],
                    NAMES[*from],
                    record.epoch(),
                    record.grant().1.0,
                    record.stamp().set_version,
                    record.members()
                ),
                Message::Raised { from, to, .. } => {
                    write!(f, "{} hears from {}: recorded", NAMES[*to], NAMES[*from])
                }
                Message::NotRaised { from, to, refusal, .. } => {
                    write!(
                        f,
                        "{} hears from {}: not recorded, {refusal:?}",
                        NAMES[*to], NAMES[*from]
                    )
                }
                Message::Publish(change) => write!(
                    f,
                    "the log gets {}'s record {}.{}.{} of {:?}",
                    change.by,
                    change.to.epoch(),
                    change.to.grant().1.0,
                    change.to.stamp().set_version,
                    change.to.members()
                ),
                Message::Sealed { to, .. } => write!(f, "{} hears that the source has sealed", NAMES[*to]),
                Message::Drop { to, .. } => write!(f, "{} is told to delete its copy", NAMES[*to]),
            },
            Action::Follow(n) => write!(f, "{} reads the log", NAMES[*n]),
            Action::CarryOut(n, job, ok) => {
                let how = if *ok { "writes" } else { "fails to write" };
                write!(f, "{}'s disk {how} {:?} of {}", NAMES[*n], job.bytes, job.from)
            }
            Action::Persisted(n) => write!(f, "{}'s record is durable", NAMES[*n]),
            Action::Write(n, blocks) => write!(f, "a client writes at {}, blocks {blocks:?}", NAMES[*n]),
            Action::Read(n, block) => write!(f, "a client reads block {block} at {}", NAMES[*n]),
            Action::Flush(n) => write!(f, "a client flushes at {}", NAMES[*n]),
            Action::Renew(n) => write!(f, "{} asks for its read leases", NAMES[*n]),
            Action::Jump => write!(f, "1.25 T pass"),
            Action::Tick(None) => write!(f, "T/4 passes"),
            Action::Tick(Some(n)) => write!(f, "T/4 passes, but not on {}'s clock", NAMES[*n]),
            Action::Kill(n, _) => write!(f, "{}'s daemon dies and starts again", NAMES[*n]),
            Action::PowerLoss(n, _, choice) => {
                write!(f, "{} loses power and starts again (outcome {choice})", NAMES[*n])
            }
            Action::SiteLoss(choices) => write!(f, "all lose power and start again (outcomes {choices:?})"),
            Action::TailLoss => write!(f, "the log loses its last entry"),
            Action::Fail(n, member) => write!(f, "{} gives {} up", NAMES[*n], NAMES[*member]),
            Action::Takeover(n, reached) => {
                write!(f, "{} begins to take over, having heard {}", NAMES[*n], who(reached))
            }
            Action::Again(n, reached) => {
                write!(f, "{} takes over again, having heard {}", NAMES[*n], who(reached))
            }
            Action::Hear(n, reached) => write!(f, "{} has heard {}", NAMES[*n], who(reached)),
            Action::Seal(n) => write!(f, "{} is told to hand over", NAMES[*n]),
            Action::IncomingWrite(n) => write!(f, "a client writes at the destination {}", NAMES[*n]),
            Action::Join(n) => write!(f, "{} is to join", NAMES[*n]),
            Action::Leave(n) => write!(f, "{} is to leave", NAMES[*n]),
        }
    }
}
