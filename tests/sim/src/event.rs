//! What happens at a time.

use std::cmp::Ordering;

use hearth_protocol::{Command, Envelope, Event as Fact, Seq, TickNo};

use crate::lead::Failure;
use crate::net::{Key, Letter};
use crate::scheduler::Outgoing;

/// Something that happens at a time.
#[derive(Debug)]
pub enum Event {
    /// A session's wake-up.
    Wake { node: usize, life: u64, image: usize },
    /// A message arrives.
    Arrives(Letter),
    /// A node learns that its connections with another broke; `ends`: it was their client.
    Lost {
        node: usize,
        life: u64,
        image: usize,
        peer: usize,
        ends: bool,
    },
    /// A connection has stood still for too long.
    TimesOut { key: Key, life: u64 },
    /// A disk's work ends.
    Worked {
        node: usize,
        life: u64,
        image: usize,
        job: u64,
    },
    /// A record is durable.
    Persisted { node: usize, life: u64, image: usize },
    /// Marks go.
    Tidy { node: usize, image: usize },
    /// A node reads the log.
    Reads { node: usize, life: u64 },
    /// An event log has all of the log.
    Seen,
    /// A change of an image arrives at the log.
    Posted { envelope: Box<Envelope>, fact: Box<Fact> },
    /// A daemon says something in the log.
    Tells {
        node: usize,
        life: u64,
        envelope: Box<Envelope>,
        fact: Box<Fact>,
    },
    /// A daemon's second is over.
    Reports { node: usize, life: u64 },
    /// A daemon has what it needs for a command.
    Executes {
        node: usize,
        life: u64,
        command: Box<Command>,
        tick: TickNo,
    },
    /// A scheduler starts.
    SchedulerStarts { scheduler: usize },
    /// A stopped scheduler goes on.
    SchedulerContinues { scheduler: usize },
    /// A scheduler reaches the log again.
    SchedulerReaches { scheduler: usize },
    /// A scheduler reads the log.
    Ingests { scheduler: usize, life: u64 },
    /// A campaign or a tick of a scheduler may be due.
    Acts { scheduler: usize, life: u64 },
    /// What a scheduler published arrives at the log; `again`: it may have arrived before.
    PostedBy {
        envelope: Box<Envelope>,
        out: Box<Outgoing>,
        answer: Option<(usize, u64)>,
        again: bool,
    },
    /// A scheduler learns what became of it.
    Acked {
        scheduler: usize,
        life: u64,
        out: Box<Outgoing>,
        result: Result<Seq, Failure>,
    },
    /// The log is put back.
    Recovered,
    /// A client asks something.
    Client { image: usize },
    /// The operator looks at an image.
    Operator { image: usize },
    /// Something goes wrong.
    Fault,
    /// Something goes wrong in the midst of a hand-over.
    Disturbs { source: usize, destination: usize },
    /// The node that comes and goes does.
    Flaps,
    /// A stopped daemon goes on.
    Continues { node: usize },
    /// A node gets power, or a daemon starts.
    Starts { node: usize },
    /// Everything passes between two nodes again.
    Heals { from: usize, to: usize },
    /// A node reaches the log again.
    Reaches { node: usize },
    /// A disk has room again.
    HasRoom { node: usize },
    /// Faults end.
    Heal,
    /// Is everything well?
    Settled,
}

/// An event in the queue.
pub struct Timed {
    /// When.
    pub at_us: u64,
    /// Of two at one time, the one that was put in first happens first.
    pub number: u64,
    /// What.
    pub event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at_us, self.number).cmp(&(other.at_us, other.number))
    }
}
