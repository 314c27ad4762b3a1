//! The cluster as people see it: derived from the scheduler's state by a pure function, so that live, paused and
//! replayed screens are the same.

use serde::{Deserialize, Serialize};

use crate::command::{Command, Order, Outcome};
use crate::heat::{HeatOrigin, LatencySummary, TierUse};
use crate::ids::{ImageId, ImageName, NodeId, SchedulerId, SnapshotName};
use crate::limits::{BLOCKS_IN_VIEW_MAX, HEAT_CELLS_IN_VIEW_MAX, REASONS_IN_VIEW_MAX};
use crate::policy::TierPolicy;
use crate::record::Nodes;
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
    /// What moves of replicas won and cost, by rule; rules that moved nothing are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub moves: Vec<MoveAccount>,
}

/// The pay-back ledger of one rule that moves replicas. Gains are in the rule's unit: replicas for `drain`, replicas
/// that share a fault domain no more for `spread`, bytes nearer to balance for `rebalance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveAccount {
    /// The rule, such as `spread/replicate`.
    pub rule: String,
    /// Moves done.
    pub done: u64,
    /// Moves that came to nothing.
    pub failed: u64,
    /// Bytes copied by those done, at most.
    pub bytes: ByteLen,
    /// What the moves promised whose time to prove it is over.
    pub predicted: u64,
    /// What of it lasted.
    pub realised: u64,
    /// The last tick in which the rule is off, because its moves did not last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub off_until: Option<TickNo>,
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
    /// Bytes of the images that lie there.
    #[serde(default)]
    pub held: ByteLen,
    /// What is left there, while it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainView>,
}

/// What is left on a node that drains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainView {
    /// The last tick before it began.
    pub since: TickNo,
    /// Images of whose replicas one is there, and which are served elsewhere: these are moved.
    pub replicas: u64,
    /// Images with a copy elsewhere that are served there or by nobody: their guests migrate first, or they are attached
    /// elsewhere.
    pub owned: u64,
    /// Images that need this node, because nobody else holds some blocks of them: nothing moves these.
    pub alone: u64,
}

impl DrainView {
    /// Whether the node holds nothing any more.
    pub fn is_done(&self) -> bool {
        (self.replicas, self.owned, self.alone) == (0, 0, 0)
    }
}

/// What would happen if a node stopped now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopView {
    /// The node.
    pub node: NodeId,
    /// Whether it is there at all.
    pub present: bool,
    /// Whether it drains.
    pub draining: bool,
    /// The images that would suffer, the most serious harm first, then by name; at most
    /// [`crate::limits::IMAGES_OF_NODE_MAX`].
    pub images: Vec<ImageAtRisk>,
    /// How many more there are.
    pub omitted: u64,
}

impl StopView {
    /// Whether no image would suffer.
    pub fn is_ok(&self) -> bool {
        self.images.is_empty()
    }
}

/// What the stop of a node does to an image, the most serious first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Harm {
    /// Blocks of it would have no copy in sync until the node is back.
    NoCopy,
    /// Its guest runs there and would stall.
    Stalled,
    /// It would have fewer replicas than wanted.
    Degraded,
}

impl Harm {
    /// The words users see.
    pub const fn as_str(self) -> &'static str {
        match self {
            Harm::NoCopy => "no copy left",
            Harm::Stalled => "guest stalls",
            Harm::Degraded => "degraded",
        }
    }
}

/// One image that would suffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAtRisk {
    /// The image.
    pub image: ImageName,
    /// How badly.
    pub harm: Harm,
    /// Why, in words.
    pub why: String,
    /// What to do first.
    pub fix: String,
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
    /// Where its replicas are.
    #[serde(default, skip_serializing_if = "ReplicasView::is_none")]
    pub replicas: ReplicasView,
}

/// The replicas of one image; the default for an image that one node holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ReplicasView {
    /// How many there should be; 0 for an image without replicas.
    pub wanted: u64,
    /// How many the blocks with the fewest have.
    pub in_sync: u64,
    /// Nodes that hold some blocks at least.
    pub members: Nodes,
    /// Nodes that are being synced.
    pub joiners: Nodes,
}

impl ReplicasView {
    /// Whether the image has no replicas.
    pub fn is_none(&self) -> bool {
        self.wanted == 0
    }

    /// Whether some blocks have fewer than there should be.
    pub fn is_degraded(&self) -> bool {
        self.in_sync < self.wanted
    }
}

/// One command and what became of it. Its lists are cut ([`DecisionView::new`]); `hearth why` and the log have them whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionView {
    /// Log position of the command.
    pub seq: Seq,
    /// Time of the tick that decided it.
    pub time: WallMs,
    /// The command, with its reason.
    pub command: Command,
    /// Blocks that the command names in all.
    pub blocks: u64,
    /// Blocks that the node did and skipped in all, once it answered.
    pub done_skipped: (u64, u64),
    /// Images that stand on its layer, ascending.
    pub images: Vec<ImageName>,
    /// How it ended, and the log position that says so; `None` while it runs.
    pub ended: Option<(Seq, Outcome)>,
    /// Whether it expired without an answer.
    pub expired: bool,
}

impl DecisionView {
    /// A decision as it is shown: of its blocks the hottest (or first) few and the last one, so that the range of their
    /// scores stays true, of its reason's lists the newest and best few.
    pub fn new(
        seq: Seq,
        time: WallMs,
        mut command: Command,
        images: Vec<ImageName>,
        mut ended: Option<(Seq, Outcome)>,
        expired: bool,
    ) -> Self {
        fn cut<T>(list: &mut Vec<T>) {
            if list.len() > BLOCKS_IN_VIEW_MAX {
                let last = list.pop();
                list.truncate(BLOCKS_IN_VIEW_MAX - 1);
                list.extend(last);
            }
        }
        let blocks = command.order.block_count() as u64;
        match &mut command.order {
            Order::Promote { blocks, .. } => cut(blocks),
            Order::Demote { blocks, .. } => cut(blocks),
            Order::Replicate { .. } | Order::Drop { .. } => {}
        }
        command.reason.lost.truncate(REASONS_IN_VIEW_MAX);
        command.reason.lost_nodes.truncate(REASONS_IN_VIEW_MAX);
        let older = command.reason.rests_on.len().saturating_sub(REASONS_IN_VIEW_MAX);
        command.reason.rests_on.drain(..older);
        let mut done_skipped = (0, 0);
        if let Some((_, Outcome::Done { done, skipped, .. })) = &mut ended {
            done_skipped = (done.len() as u64, skipped.len() as u64);
            cut(done);
            cut(skipped);
        }
        Self {
            seq,
            time,
            command,
            blocks,
            done_skipped,
            images,
            ended,
            expired,
        }
    }
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

impl HealthItem {
    /// An error or else a warning.
    pub fn new(code: &str, error: bool, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            severity: if error { "error" } else { "warning" }.into(),
            message: message.into(),
            fix: fix.into(),
        }
    }

    /// Whether it is an error.
    pub fn is_error(&self) -> bool {
        self.severity == "error"
    }

    /// Errors before warnings, then by code and text.
    pub fn sort(items: &mut [Self]) {
        items.sort_by(|a, b| (&a.severity, &a.code, &a.message).cmp(&(&b.severity, &b.code, &b.message)));
    }
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
    #[serde(with = "packed_cells")]
    pub cells: Vec<HeatCell>,
    /// Cells left out, the coldest of those not in RAM first ([`ImageHeatView::cut`]).
    #[serde(default)]
    pub omitted: u64,
}

impl ImageHeatView {
    /// Leaves out the coldest cells over [`HEAT_CELLS_IN_VIEW_MAX`], and counts them.
    pub fn cut(mut self) -> Self {
        let over = self.cells.len().saturating_sub(HEAT_CELLS_IN_VIEW_MAX);
        if over > 0 {
            self.omitted += over as u64;
            self.cells.sort_by_key(|c| std::cmp::Reverse((c.ram, c.score, c.block)));
            self.cells.truncate(HEAT_CELLS_IN_VIEW_MAX);
            self.cells.sort_by_key(|c| c.block);
        }
        self
    }
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

/// Cells as one flat list of numbers, two per cell: distance from the block before, and score * 2 + (1 if in RAM).
/// As maps with field names an image's heat would not fit a message.
mod packed_cells {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    use super::{BlockIndex, HeatCell, HeatScore};

    pub fn serialize<S: Serializer>(cells: &[HeatCell], serializer: S) -> Result<S::Ok, S::Error> {
        let mut flat = Vec::with_capacity(cells.len() * 2);
        let mut next = 0;
        for cell in cells {
            flat.push(cell.block.0.wrapping_sub(next));
            flat.push(cell.score.0.min(u64::MAX >> 1) << 1 | u64::from(cell.ram));
            next = cell.block.0.wrapping_add(1);
        }
        flat.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<HeatCell>, D::Error> {
        let flat = Vec::<u64>::deserialize(deserializer)?;
        if !flat.len().is_multiple_of(2) {
            return Err(de::Error::custom("heat cells come in pairs of numbers"));
        }
        let mut next = 0u64;
        Ok(flat
            .chunks_exact(2)
            .map(|pair| {
                let block = next.wrapping_add(pair[0]);
                next = block.wrapping_add(1);
                HeatCell {
                    block: BlockIndex(block),
                    score: HeatScore(pair[1] >> 1),
                    ram: pair[1] & 1 == 1,
                }
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Demotion, Reason};
    use crate::ids::{CommandId, LayerId};
    use crate::limits::{BLOCKS_PER_COMMAND_MAX, DECISIONS_IN_VIEW_MAX, MESSAGE_BYTES_MAX};

    #[test]
    fn a_heat_view_reads_back_and_the_largest_fits_a_message() {
        let view = ImageHeatView {
            image: ImageId(7),
            blocks: 1 << 28,
            block_size: ByteLen(65_536),
            cells: (0..200_000)
                .map(|n| HeatCell {
                    block: BlockIndex(n * 3 + n % 2),
                    score: HeatScore::whole(n % 1_000),
                    ram: n % 5 == 0,
                })
                .collect(),
            omitted: 0,
        }
        .cut();
        assert_eq!(view.cells.len() as u64 + view.omitted, 200_000);
        assert!(view.cells.windows(2).all(|w| w[0].block < w[1].block));
        assert_eq!(
            view.cells.iter().filter(|c| c.ram).count(),
            40_000,
            "what is in RAM stays"
        );
        let json = serde_json::to_vec(&view).unwrap();
        assert!(json.len() < MESSAGE_BYTES_MAX, "{}", json.len());
        assert_eq!(serde_json::from_slice::<ImageHeatView>(&json).unwrap(), view);
        assert!(
            serde_json::from_str::<ImageHeatView>(&String::from_utf8(json).unwrap().replacen('[', "[1,", 1)).is_err()
        );
    }

    #[test]
    fn as_many_decisions_as_a_view_carries_fit_a_message() {
        let seqs: Vec<Seq> = (0..100).map(|n| Seq(1_000_000 + n)).collect();
        let command = Command {
            id: CommandId(u128::MAX),
            node: "a-node-with-a-name".parse().unwrap(),
            term: Term(1),
            tick: TickNo(1),
            expires: TickNo(9),
            order: Order::Demote {
                layer: LayerId(u128::MAX),
                blocks: (0..BLOCKS_PER_COMMAND_MAX as u64)
                    .map(|n| Demotion {
                        block: BlockIndex(1_000_000 + n),
                        score: HeatScore::whole(BLOCKS_PER_COMMAND_MAX as u64 - n),
                    })
                    .collect(),
                bytes: ByteLen(1 << 26),
            },
            reason: Reason {
                rule: "tier/demote".into(),
                policy_version: 1,
                numbers: vec![("threshold_score".into(), 1 << 20); 10],
                rests_on: seqs,
                lost: Vec::new(),
                lost_nodes: Vec::new(),
            },
        };
        let outcome = Outcome::Done {
            done: (0..1_000).map(BlockIndex).collect(),
            skipped: (0..24).map(|n| (BlockIndex(n), "written_during_fill".into())).collect(),
            bytes: ByteLen(1 << 26),
            took_us: 1,
        };
        let shown = DecisionView::new(Seq(1), WallMs(1), command, vec![], Some((Seq(2), outcome)), false);
        assert_eq!((shown.blocks, shown.done_skipped), (1_024, (1_000, 24)));
        let Order::Demote { blocks, .. } = &shown.command.order else {
            unreachable!()
        };
        assert_eq!(
            blocks.last().unwrap().score,
            HeatScore::whole(1),
            "the range of scores stays true"
        );
        let json = serde_json::to_vec(&vec![shown; DECISIONS_IN_VIEW_MAX]).unwrap();
        assert!(json.len() < MESSAGE_BYTES_MAX / 2, "{}", json.len());
    }
}
