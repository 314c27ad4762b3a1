//! What one exploration may do, and how often. Every number is a bound of what was explored.

use hearth_replication::mutants::Rules;

use super::ghost::Reached;

/// How time passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// All clocks jump by 1.25 T at once; read leases are renewed in one step.
    Jumps,
    /// Ticks of T/4, of which one node's clock may miss some. Renewals are messages.
    Ticks,
}

/// How often each thing may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Budget {
    /// Client writes, by node.
    pub writes: [u8; 3],
    /// Client reads, by node.
    pub reads: [u8; 3],
    /// Client flushes, by node.
    pub flushes: [u8; 3],
    /// Deaths of one node's daemon; the kernel lives on.
    pub kills: u8,
    /// Power losses of one node.
    pub power_losses: u8,
    /// Power losses of all nodes at once.
    pub site_losses: u8,
    /// A disk fails.
    pub disk_failures: u8,
    /// The log loses its last entry.
    pub tail_losses: u8,
    /// An owner gives a node up.
    pub failures: u8,
    /// Takeovers, by node.
    pub takeovers: [u8; 3],
    /// A seal for a hand-over.
    pub seals: u8,
    /// A node joins.
    pub joins: u8,
    /// A member leaves.
    pub leaves: u8,
    /// Time: jumps or ticks.
    pub time: u8,
    /// Ticks that a clock misses.
    pub misses: u8,
    /// Read leases are renewed; only counted where renewals are messages.
    pub renewals: u8,
}

/// One exploration.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub name: &'static str,
    pub rules: Rules,
    pub blocks: usize,
    /// Members at first, as bits of a, b, c. The owner is a.
    pub members: u8,
    /// Who joins.
    pub joiner: usize,
    /// Who leaves.
    pub leaver: usize,
    /// The hand-over's destination.
    pub destination: Option<usize>,
    pub time: Time,
    /// Writing to a disk is a step of its own.
    pub async_writes: bool,
    /// Making a record durable is a step of its own.
    pub async_persist: bool,
    /// A member's answer arrives in the step in which it is given. Else it is a message of its own, late or lost.
    pub quick: bool,
    /// The log takes a change, and everybody reads it, in the step in which it is published.
    pub eager: bool,
    /// Writes after the first one touch both blocks.
    pub straddling: bool,
    /// A lost end of the log is noticed only if a takeover hears of a node that has seen it (see the ADR's limits).
    pub unheard_loss: bool,
    pub budget: Budget,
    /// What must happen in some run.
    pub reach: &'static [Reached],
}
