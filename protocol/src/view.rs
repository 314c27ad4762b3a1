//! The cluster as people see it: derived from the scheduler's state by a pure function, so that live, paused and
//! replayed screens are the same.

use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome};
use crate::heat::{HeatOrigin, LatencySummary, TierUse};
use crate::ids::{ImageId, ImageName, NodeId, SchedulerId, SnapshotName};
use crate::policy::TierPolicy;
use crate::units::{BlockIndex, ByteLen, Epoch, HeatScore, Seq, Term, TickNo, WallMs};

/// The whole cluster at one log position.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterView {
    /// The log position.
    pub seq: Seq,
    /// Time of the last tick.
    pub time: WallMs,
    /// The highest term.
    pub term: Term,
    /// Its winner.
    pub leader: Option<SchedulerId>,
    /// The last tick.
    pub tick: TickNo,
    /// blake3 of the canonical state, hexadecimal.
    pub digest: String,
    /// Nodes, ascending by id.
    pub nodes: Vec<NodeView>,
    /// Images, ascending by name.
    pub images: Vec<ImageView>,
    /// The last decisions, oldest first.
    pub decisions: Vec<DecisionView>,
    /// What is wrong, worst first.
    pub health: Vec<HealthItem>,
    /// The tier policy in force and its version.
    pub policy: (u64, TierPolicy),
    /// Counters since the log began.
    pub totals: Totals,
}

/// Counters since the log began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Events, void ones included.
    pub events: u64,
    /// Events that did not count.
    pub void: u64,
    /// Blocks that nodes said they promoted.
    pub blocks_promoted: u64,
    /// Blocks that nodes said they demoted.
    pub blocks_demoted: u64,
    /// Blocks skipped by nodes (written during the fill, already there).
    pub blocks_skipped: u64,
    /// Heat reports that never arrived.
    pub report_gaps: u64,
    /// Repeats that were ignored.
    pub repeats: u64,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its id.
    pub id: NodeId,
    /// Whether it reported within the last [`crate::limits::ABSENT_AFTER_TICKS`] ticks.
    pub present: bool,
    /// The tick of its last report.
    pub last_report: TickNo,
    /// Fault domain.
    pub fault_domain: String,
    /// RAM tier.
    pub tier: TierUse,
    /// `ebpf` or `export`.
    pub heat_source: String,
    /// Records its probes saw.
    pub probe_events_total: u64,
    /// Records its probes lost.
    pub probe_lost_total: u64,
    /// Bytes ordered and unfinished.
    pub in_flight: ByteLen,
    /// Images attached there.
    pub images: u64,
    /// Disk read latency of the last window, worst disk.
    pub disk_read: LatencySummary,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// Its id.
    pub id: ImageId,
    /// Its name.
    pub name: ImageName,
    /// Its size.
    pub size: ByteLen,
    /// Its block size.
    pub block_size: ByteLen,
    /// The node that holds its top layer.
    pub node: NodeId,
    /// Attached there.
    pub attached: bool,
    /// The highest epoch granted.
    pub epoch: Epoch,
    /// Parent of a clone.
    pub parent: Option<(ImageName, SnapshotName)>,
    /// Snapshots, oldest first.
    pub snapshots: Vec<SnapshotName>,
    /// Where its heat was counted last.
    pub origin: Option<HeatOrigin>,
    /// Reads per second, last window.
    pub reads_per_s: u64,
    /// Writes per second, last window.
    pub writes_per_s: u64,
    /// Block reads answered from RAM, parts per thousand of the last window; `None` without reads.
    pub hit_permille: Option<u64>,
    /// Read latency of the last window.
    pub read_latency: LatencySummary,
    /// Write latency of the last window.
    pub write_latency: LatencySummary,
    /// Blocks with any heat.
    pub tracked_blocks: u64,
    /// Its blocks in the main region of its node.
    pub resident_blocks: u64,
}

/// One command and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionView {
    /// Log position of the command.
    pub seq: Seq,
    /// Time of the tick that decided it.
    pub time: WallMs,
    /// The command, with its reason.
    pub command: Command,
    /// Images that stand on its layer, ascending.
    pub images: Vec<ImageName>,
    /// How it ended, and the log position that says so; `None` while it runs.
    pub ended: Option<(Seq, Outcome)>,
    /// Whether it expired without an answer.
    pub expired: bool,
}

/// Something that is wrong, with the command that helps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthItem {
    /// A stable code such as `NODE_ABSENT`.
    pub code: String,
    /// `error` or `warning`.
    pub severity: String,
    /// What is wrong, on what.
    pub message: String,
    /// What to do.
    pub fix: String,
}

/// Heat and tiers of one image's blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHeatView {
    /// Which image.
    pub image: ImageId,
    /// Blocks in all.
    pub blocks: u64,
    /// Block size in bytes.
    pub block_size: ByteLen,
    /// Blocks with any heat or in the main region, ascending.
    pub cells: Vec<HeatCell>,
}

/// One block of an [`ImageHeatView`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatCell {
    /// The block.
    pub block: BlockIndex,
    /// Its decayed score.
    pub score: HeatScore,
    /// In the main region of the image's node.
    pub ram: bool,
}
