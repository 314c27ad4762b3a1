//! What one seed does: how large the world is, which faults happen, and how often.

use crate::chance::Chance;

/// Everything that goes wrong on purpose. The numbers are the names in reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A daemon is killed; the kernel lives on.
    Kill,
    /// A daemon dies between two things that one step of a session wanted.
    KillWithin,
    /// A node loses power.
    PowerLoss,
    /// All nodes lose power.
    SiteLoss,
    /// A daemon is stopped, often for longer than a read lease, and goes on.
    Stop,
    /// A clock runs wrong, and misses some time.
    Clock,
    /// Nothing passes between two sides.
    Partition,
    /// Nothing passes from one node to another; the other way it does.
    OneWay,
    /// A connection breaks; some of its requests are carried out late.
    Break,
    /// A disk answers a write or a flush with an error.
    DiskError,
    /// A disk is full: every write fails for a while.
    DiskFull,
    /// A block's bits flip; its checksum tells.
    BitFlip,
    /// A node does not reach the log, or a published change arrives late or twice.
    LogCut,
    /// The log loses its end.
    LogLoss,
    /// A scheduler is killed.
    SchedulerKill,
    /// A scheduler is stopped, often for longer than a standby waits, and goes on.
    SchedulerStop,
    /// A scheduler does not reach the log.
    SchedulerCut,
    /// A scheduler's wall clock jumps.
    SchedulerClock,
    /// In the midst of a hand-over its two nodes do not hear each other, or its destination does not reach the log.
    HandOver,
}

impl Fault {
    /// All of them, each with its number's name and what it is.
    pub const ALL: &[(Fault, &str)] = &[
        (Fault::Kill, "f1 daemon killed"),
        (Fault::KillWithin, "f2 daemon killed within a step"),
        (Fault::PowerLoss, "f3 power loss of a node"),
        (Fault::SiteLoss, "f4 power loss of all"),
        (Fault::Stop, "f5 daemon stopped and continued"),
        (Fault::Clock, "f6 clock wrong"),
        (Fault::Partition, "f7 partition"),
        (Fault::OneWay, "f8 one-way partition"),
        (Fault::Break, "f9 connection broken"),
        (Fault::DiskError, "f10 disk error"),
        (Fault::DiskFull, "f11 disk full"),
        (Fault::BitFlip, "f12 bit flip"),
        (Fault::LogCut, "f13 log out of reach"),
        (Fault::LogLoss, "f14 log loses its end"),
        (Fault::SchedulerKill, "f15 scheduler killed"),
        (Fault::SchedulerStop, "f16 scheduler stopped and continued"),
        (Fault::SchedulerCut, "f17 scheduler out of the log's reach"),
        (Fault::SchedulerClock, "f18 scheduler's wall clock jumps"),
        (Fault::HandOver, "f19 hand-over disturbed"),
    ];
}

/// See the module. Times are microseconds of the simulation.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Nodes.
    pub nodes: usize,
    /// Images.
    pub images: usize,
    /// Blocks of each image.
    pub blocks: u64,
    /// Copies that each block is to have.
    pub copies: usize,
    /// When faults and clients stop.
    pub end_us: u64,
    /// Faults that happen, as often as they are listed.
    pub faults: Vec<Fault>,
    /// Between two faults, at most.
    pub fault_us: u64,
    /// Between two operations of an image's clients, at most.
    pub client_us: u64,
    /// Operations of an image under way.
    pub in_flight: usize,
    /// What a message takes, usually.
    pub net_us: u64,
    /// What a disk takes, usually.
    pub disk_us: u64,
    /// Of a thousand works of a disk, how many take seconds.
    pub slow: u64,
    /// Of a thousand looks of the operator, how many move something.
    pub moves: u64,
    /// Schedulers.
    pub schedulers: usize,
    /// Lost copies are replaced by the scheduler's policy, not by the operator.
    pub by_policy: bool,
    /// Fault domains.
    pub racks: usize,
    /// Ticks between two snapshots of a scheduler.
    pub snapshot_ticks: u64,
    /// The last node comes and goes.
    pub flaps: bool,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(chance: &mut Chance) -> Self {
        let nodes = chance.within(3, 5) as usize;
        let mut faults = Vec::new();
        // Each seed has some of the faults, so that no frequent one hides what a rare pair does.
        while faults.is_empty() {
            for (fault, _) in Fault::ALL {
                if chance.happens(400) {
                    faults.extend(std::iter::repeat_n(*fault, chance.within(1, 3) as usize));
                }
            }
        }
        let by_policy = chance.happens(500);
        // With one copy left the policy waits for 30 ticks, else for 600: few runs are that long.
        let three = chance.happens(if by_policy { 60 } else { 500 });
        let end_s = if by_policy {
            chance.within(40, 110)
        } else {
            chance.within(15, 45)
        };
        Self {
            nodes,
            images: chance.within(1, 2) as usize,
            blocks: chance.within(12, 36),
            copies: if three { 3 } else { 2 },
            end_us: end_s * 1_000_000,
            faults,
            fault_us: chance.within(500, 6_000) * 1_000,
            client_us: chance.within(20, 200) * 1_000,
            in_flight: chance.within(2, 8) as usize,
            net_us: chance.within(100, 5_000),
            disk_us: chance.within(100, 10_000),
            slow: 2,
            moves: chance.within(0, 300),
            schedulers: if chance.happens(850) { 2 } else { 1 },
            by_policy,
            racks: chance.within(1, nodes as u64) as usize,
            snapshot_ticks: chance.within(1, 40),
            flaps: false,
        }
    }

    /// The plan in which one node comes and goes.
    pub fn flapping(seconds: u64, nodes: usize) -> Self {
        Self {
            nodes,
            images: 2,
            blocks: 16,
            copies: 2,
            end_us: seconds * 1_000_000,
            faults: Vec::new(),
            fault_us: seconds * 1_000_000,
            client_us: 400_000,
            in_flight: 4,
            net_us: 500,
            disk_us: 1_000,
            slow: 0,
            moves: 0,
            schedulers: 2,
            by_policy: true,
            racks: nodes,
            snapshot_ticks: 40,
            flaps: true,
        }
    }
}
