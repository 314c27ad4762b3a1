//! One node: its power, clock and disks, and its daemon with one session per image.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::command::Outcome;
use hearth_protocol::record::Extent;
use hearth_protocol::{CommandId, Incarnation, NodeId, Seq, SetVersion};
use hearth_replication::owner::{Ask, OpId};
use hearth_replication::request::RequestId;
use hearth_replication::session::Session;
use hearth_replication::time::BootMs;

use crate::disk::Disk;
use crate::event::Event;
use crate::facts::Facts;
use crate::reference::By;

/// Longer than a new owner waits.
const LATELY_US: u64 = 5_000_000;

/// A boot-time clock, a little fast or slow.
#[derive(Debug, Clone)]
pub struct Clock {
    began_us: u64,
    base_ms: u64,
    /// Millionths of a microsecond that a microsecond counts.
    rate: u64,
}

impl Clock {
    /// A clock that starts now.
    pub fn new(now_us: u64) -> Self {
        Self {
            began_us: now_us,
            base_ms: 1_000,
            rate: 1_000_000,
        }
    }

    /// Its reading.
    pub fn reading(&self, now_us: u64) -> BootMs {
        BootMs(self.base_ms + now_us.saturating_sub(self.began_us) * self.rate / 1_000_000_000)
    }

    /// When it will read so much; not before the next microsecond.
    pub fn when(&self, at: BootMs, now_us: u64) -> u64 {
        let us = (at.0.saturating_sub(self.base_ms) * 1_000_000_000).div_ceil(self.rate);
        (self.began_us + us).max(now_us + 1)
    }

    /// It runs at another rate from now on, and has missed some time, unless it did lately: together rates and what is
    /// missed stay below the quarter of T by which a new owner waits longer than a read lease holds.
    pub fn disturb(&mut self, now_us: u64, rate: u64, missed_ms: u64) {
        let reading = self.reading(now_us).0;
        let missed_ms = if now_us > self.began_us + LATELY_US {
            missed_ms
        } else {
            0
        };
        *self = Self {
            // A clock never goes back: what is missed is counted slowly.
            began_us: now_us + missed_ms * 1_000,
            base_ms: reading,
            rate,
        };
    }
}

/// What a session is to its shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not attached.
    Detached,
    /// The destination of a hand-over.
    Incoming,
    /// A takeover is under way.
    Taking,
    /// A takeover gave up.
    Stalled,
    /// Serving.
    Open,
    /// It ended.
    Ended,
}

/// One image's session with what its shell keeps.
#[derive(Debug)]
pub struct Shell {
    /// The production machine.
    pub session: Session,
    /// What it is.
    pub phase: Phase,
    /// Since when.
    pub since_us: u64,
    /// It waits for, or opened by, a hand-over.
    pub guest_goes_on: bool,
    /// A takeover of that hand-over gave up.
    pub gave_up: bool,
    /// Operations of clients that the owner has.
    pub ops: BTreeMap<OpId, Ask>,
    /// Comparisons and rewritings of copies that are under way.
    pub checks: BTreeMap<OpId, Extent>,
    /// Operations that wait for it to open.
    pub held: BTreeMap<OpId, Ask>,
    /// Under what it answers.
    pub by: Option<By>,
    /// When it is woken next.
    pub wake_us: Option<u64>,
    /// What is being joined.
    pub joining: Option<(NodeId, Extent)>,
    /// It is copied only what changed.
    pub copies_changes: bool,
    /// A scheduler ordered it.
    pub ordered: bool,
}

impl Shell {
    /// A shell of a session.
    pub fn new(session: Session, now_us: u64) -> Self {
        Self {
            session,
            phase: Phase::Detached,
            since_us: now_us,
            guest_goes_on: false,
            gave_up: false,
            ops: BTreeMap::new(),
            checks: BTreeMap::new(),
            held: BTreeMap::new(),
            by: None,
            wake_us: None,
            joining: None,
            copies_changes: false,
            ordered: false,
        }
    }

    /// It is something else from now on.
    pub fn enter(&mut self, phase: Phase, now_us: u64) {
        self.phase = phase;
        self.since_us = now_us;
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    /// Counts starts.
    pub life: u64,
    /// One per image.
    pub shells: Vec<Shell>,
    /// What it has read of the log.
    pub facts: Facts,
    /// Numbers what it publishes.
    pub published: u64,
    /// Where the log acknowledged that it joined, until it has read as far.
    pub joined_at: Option<Seq>,
    /// Numbers its reports.
    pub reports: u64,
    /// It executes a command.
    pub executing: bool,
    /// Commands that it has executed and not yet read the end of: how they ended, and where the log acknowledged that.
    pub answered: BTreeMap<CommandId, (Outcome, Option<Seq>)>,
    /// It has noticed that the log lost its end.
    pub frozen: bool,
    /// It dies when so many more outputs are carried out.
    pub dies_in: Option<u64>,
    /// Requests of broken connections: their answers go nowhere.
    pub late: BTreeSet<(usize, NodeId, RequestId, SetVersion)>,
}

/// See the module.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// Whether it has power.
    pub power: bool,
    /// Its daemon, while it runs.
    pub daemon: Option<Daemon>,
    /// Whether the daemon is stopped, and what happened to it meanwhile.
    pub stopped: Option<Vec<Event>>,
    /// Its clock.
    pub clock: Clock,
    /// Counts boots: the life of its store.
    pub boots: u64,
    /// Counts daemon starts.
    pub starts: u64,
    /// One copy per image, if it has one.
    pub disks: Vec<Option<Disk>>,
    /// It does not reach the log.
    pub log_cut: bool,
    /// The most of the log it has ever read, which it remembers.
    pub seen: usize,
    /// Writes fail.
    pub full: bool,
    /// The next write or flush of a disk fails.
    pub failing: bool,
}

impl Node {
    /// The life of its store.
    pub fn store(&self) -> Incarnation {
        Incarnation(u128::from(self.boots))
    }

    /// Its daemon, if it runs and is not stopped.
    pub fn running(&self) -> Option<&Daemon> {
        self.daemon.as_ref().filter(|_| self.stopped.is_none())
    }
}
