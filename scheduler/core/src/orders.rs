//! Commands that were given: those in flight, and the recent ones for people.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::command::{Command, Order, Outcome};
use hearth_protocol::limits::DECISIONS_IN_VIEW_MAX;
use hearth_protocol::{BlockIndex, ByteLen, CommandId, ImageId, LayerId, NodeId, Seq, Term, TickNo, WallMs};
use serde::{Deserialize, Serialize};

/// Ticks that a command has to be answered in: several times what a full in-flight budget takes on a slow disk.
pub const COMMAND_TICKS: u64 = 20;

/// Ticks for which an expired command is remembered, so that a late answer still tells where its blocks are.
const EXPIRED_KEPT_TICKS: u64 = 60;

/// Blocks, log positions and alternatives kept of each command in the list for people; the log has them all.
const SHOWN_MAX: usize = 4;

/// What must be remembered of a command to fold its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Given {
    pub node: NodeId,
    pub promote: bool,
    pub layer: LayerId,
    pub block_bytes: u64,
    /// In the order of the command.
    pub blocks: Vec<BlockIndex>,
    pub expires: TickNo,
    /// It expired, or its node started anew, before an answer came.
    pub expired: bool,
    /// The image of whose replicas it adds or drops one; it moves no blocks of the main region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicates: Option<ImageId>,
}

/// The id of a command: a hash of what makes it different from every other one.
pub(crate) fn command_id(label: &str, term: Term, tick: TickNo, parts: &[&[u8]]) -> CommandId {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(label.as_bytes())
        .update(&term.0.to_be_bytes())
        .update(&tick.0.to_be_bytes());
    for part in parts {
        hasher.update(part);
    }
    let hash = hasher.finalize();
    let (id, _) = hash.as_bytes().split_first_chunk::<16>().expect("a hash has 32 bytes");
    CommandId(u128::from_be_bytes(*id))
}

/// A command as people see it, cut to [`SHOWN_MAX`] blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub seq: Seq,
    pub time: WallMs,
    pub command: Command,
    /// Blocks that it names in all.
    #[serde(default)]
    pub blocks: u64,
    /// Blocks that the node did and skipped in all.
    #[serde(default)]
    pub done_skipped: (u64, u64),
    pub ended: Option<(Seq, Outcome)>,
    pub expired: bool,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub given: BTreeMap<CommandId, Given>,
    /// When commands expire or are forgotten, by tick.
    due: BTreeMap<TickNo, Vec<CommandId>>,
    /// Oldest first, at most [`DECISIONS_IN_VIEW_MAX`].
    pub shown: VecDeque<Shown>,
    pub expired_total: u64,
    pub refused_total: u64,
}

impl Orders {
    /// Takes note of a command; says whether its id is new.
    pub(crate) fn give(&mut self, seq: Seq, time: WallMs, command: &Command, block_bytes: u64) -> bool {
        if self.given.contains_key(&command.id) {
            return false;
        }
        let (promote, blocks, replicates) = match &command.order {
            Order::Promote { blocks, .. } => (true, blocks.iter().map(|p| p.block).collect(), None),
            Order::Demote { blocks, .. } => (false, blocks.iter().map(|d| d.block).collect(), None),
            Order::Replicate { image, .. } | Order::Drop { image, .. } => (false, Vec::new(), Some(*image)),
        };
        self.given.insert(
            command.id,
            Given {
                node: command.node.clone(),
                promote,
                layer: command.order.layer(),
                block_bytes,
                blocks,
                expires: command.expires,
                expired: false,
                replicates,
            },
        );
        self.due
            .entry(TickNo(command.expires.0.saturating_add(1)))
            .or_default()
            .push(command.id);
        if self.shown.len() == DECISIONS_IN_VIEW_MAX {
            self.shown.pop_front();
        }
        self.shown.push_back(Shown {
            seq,
            time,
            blocks: command.order.block_count() as u64,
            done_skipped: (0, 0),
            command: cut(command),
            ended: None,
            expired: false,
        });
        true
    }

    /// Closes a command and returns what is known of it.
    pub(crate) fn finish(&mut self, seq: Seq, id: CommandId, node: &NodeId, outcome: &Outcome) -> Option<Given> {
        if self.given.get(&id)?.node != *node {
            return None;
        }
        let given = self.given.remove(&id)?;
        if matches!(outcome, Outcome::Refused { .. }) {
            self.refused_total += 1;
        }
        if let Some(shown) = self.shown.iter_mut().rev().find(|s| s.command.id == id) {
            if let Outcome::Done { done, skipped, .. } = outcome {
                shown.done_skipped = (done.len() as u64, skipped.len() as u64);
            }
            shown.ended = Some((seq, cut_outcome(outcome)));
            shown.expired = false;
        }
        Some(given)
    }

    /// Expires and forgets what is due; returns the newly expired.
    pub(crate) fn expire(&mut self, tick: TickNo) -> Vec<Given> {
        let mut expired = Vec::new();
        while let Some(entry) = self.due.first_entry() {
            if *entry.key() > tick {
                break;
            }
            for id in entry.remove() {
                let Some(given) = self.given.get_mut(&id) else {
                    continue;
                };
                if given.expired {
                    self.given.remove(&id);
                    continue;
                }
                expired.push(given.clone());
                self.mark_expired(id);
                self.due
                    .entry(TickNo(tick.0.saturating_add(EXPIRED_KEPT_TICKS)))
                    .or_default()
                    .push(id);
            }
        }
        expired
    }

    /// A node's process started anew: what was in flight there counts as expired.
    pub(crate) fn node_restarted(&mut self, node: &NodeId) {
        let ids: Vec<_> = self
            .given
            .iter()
            .filter(|(_, g)| &g.node == node && !g.expired)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.mark_expired(id);
        }
    }

    fn mark_expired(&mut self, id: CommandId) {
        if let Some(given) = self.given.get_mut(&id) {
            given.expired = true;
            self.expired_total += 1;
        }
        if let Some(shown) = self.shown.iter_mut().rev().find(|s| s.command.id == id) {
            shown.expired = true;
        }
    }
}

fn cut(command: &Command) -> Command {
    // The last one stays, so that the range of scores stays true.
    fn ends<T>(blocks: &mut Vec<T>) {
        if blocks.len() > SHOWN_MAX {
            let last = blocks.pop();
            blocks.truncate(SHOWN_MAX - 1);
            blocks.extend(last);
        }
    }
    let mut command = command.clone();
    match &mut command.order {
        Order::Promote { blocks, .. } => ends(blocks),
        Order::Demote { blocks, .. } => ends(blocks),
        Order::Replicate { .. } | Order::Drop { .. } => {}
    }
    let rests_on = &mut command.reason.rests_on;
    rests_on.drain(..rests_on.len().saturating_sub(SHOWN_MAX));
    command.reason.lost.truncate(SHOWN_MAX);
    command.reason.lost_nodes.truncate(SHOWN_MAX);
    command.reason.rule = command.reason.rule.chars().take(64).collect();
    let blocks = command.reason.lost.iter_mut().map(|lost| &mut lost.why);
    let nodes = command.reason.lost_nodes.iter_mut().map(|lost| &mut lost.why);
    for why in blocks.chain(nodes) {
        *why = why.chars().take(64).collect();
    }
    command
}

fn cut_outcome(outcome: &Outcome) -> Outcome {
    match outcome {
        Outcome::Done {
            done,
            skipped,
            bytes,
            took_us,
        } => Outcome::Done {
            done: done.iter().take(SHOWN_MAX).copied().collect(),
            skipped: skipped.iter().take(SHOWN_MAX).cloned().collect(),
            bytes: ByteLen(bytes.0),
            took_us: *took_us,
        },
        Outcome::Refused { why } => Outcome::Refused {
            why: why.chars().take(200).collect(),
        },
    }
}
