//! What repair remembers: which images have too few replicas and since when, what is on its way, and what was tried.
//!
//! Kept beside the images, so that deciding looks at the degraded ones alone. Invariant ([`crate::State::audit`]): an
//! image is in `short` exactly while its record has a run with fewer members than wanted, and in `joining` exactly while
//! its record has a joiner.

use std::collections::BTreeMap;

use hearth_protocol::command::{Command, Outcome};
use hearth_protocol::record::Nodes;
use hearth_protocol::{CommandId, ImageId, NodeId, Seq, TickNo, WallMs};
use serde::{Deserialize, Serialize};

use crate::catalog::Replicas;
use crate::policy::repair::{JOIN_TICKS, OWNER_TICKS, REST_TICKS, REST_TICKS_MAX, TRIED_KEPT_TICKS};

/// When something came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct At {
    pub seq: Seq,
    /// The last tick before it, and that tick's time.
    pub tick: TickNo,
    pub time: WallMs,
}

/// An image with fewer members than wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Short {
    /// Members of the runs that have the fewest.
    pub fewest: u64,
    /// When it last had as many as wanted.
    pub since: At,
    /// When it last lost one of the fewest.
    pub fell: At,
    /// Nodes that were members and are none any more.
    pub lost: Nodes,
    /// The tick from which on its owner is told to begin.
    #[serde(default)]
    pub owner_ready: TickNo,
    /// An operator asked for more since it last had as many as wanted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub asked: bool,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// An order to replicate that has not shown in the record yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ordered {
    pub command: CommandId,
    pub to: NodeId,
    /// The last tick for which it counts as on its way.
    pub until: TickNo,
}

/// Orders to put a replica of one image on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tried {
    /// The last one, or its refusal.
    pub at: TickNo,
    /// How many followed each other within [`TRIED_KEPT_TICKS`].
    pub times: u32,
}

impl Tried {
    fn is_old(&self, tick: TickNo) -> bool {
        tick.0.saturating_sub(self.at.0) > TRIED_KEPT_TICKS
    }

    /// Whether the node still rests from it: each further order doubles the rest.
    pub(crate) fn rests(&self, tick: TickNo) -> bool {
        let doubled = REST_TICKS.saturating_mul(1u64.checked_shl(self.times.saturating_sub(1)).unwrap_or(u64::MAX));
        tick.0.saturating_sub(self.at.0) < doubled.min(REST_TICKS_MAX)
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Repairs {
    pub short: BTreeMap<ImageId, Short>,
    /// Who is being synced.
    pub joining: BTreeMap<ImageId, Nodes>,
    pub ordered: BTreeMap<ImageId, Ordered>,
    pub tried: BTreeMap<ImageId, BTreeMap<NodeId, Tried>>,
    /// The tick after which the leader of now took over: who is present shows only some ticks later.
    pub led_since: TickNo,
}

fn owner_ready(began: TickNo) -> TickNo {
    TickNo(began.0.saturating_add(OWNER_TICKS))
}

impl Repairs {
    /// Whether there is nothing to remember: so it is in every log without replicas.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// An image's record changed, under a new epoch if its owner is new.
    pub(crate) fn located(&mut self, id: ImageId, before: &Replicas, after: &Replicas, new_owner: bool, at: At) {
        if new_owner {
            // What the one before was told counts no more.
            self.ordered.remove(&id);
        }
        if after.joiners.is_empty() {
            self.joining.remove(&id);
        } else {
            self.joining.insert(id, after.joiners.clone());
        }
        // The order shows in the record: from here on the joiner stands for it.
        if self.ordered.get(&id).is_some_and(|o| after.joiners.contains(&o.to)) {
            self.ordered.remove(&id);
        }
        if after.fewest >= after.wanted {
            self.short.remove(&id);
            return;
        }
        let short = self.short.entry(id).or_insert_with(|| Short {
            fewest: after.fewest,
            since: at,
            fell: at,
            lost: Nodes::new(),
            owner_ready: TickNo(0),
            asked: false,
        });
        short.owner_ready = if new_owner { owner_ready(at.tick) } else { TickNo(0) };
        if after.fewest < short.fewest {
            short.fell = at;
        }
        short.fewest = after.fewest;
        short.lost.extend(before.members.difference(&after.members).cloned());
        short.lost.retain(|node| !after.members.contains(node));
    }

    /// The daemon of an image's owner started anew.
    pub(crate) fn owner_restarted(&mut self, id: ImageId, tick: TickNo) {
        if let Some(short) = self.short.get_mut(&id) {
            short.owner_ready = owner_ready(tick);
        }
    }

    /// An operator wants another number of replicas. More are made at once: nobody is expected back.
    pub(crate) fn wanted(&mut self, id: ImageId, replicas: &Replicas, at: At) {
        if replicas.fewest >= replicas.wanted {
            self.short.remove(&id);
            return;
        }
        let short = self.short.entry(id).or_insert_with(|| Short {
            fewest: replicas.fewest,
            since: at,
            fell: at,
            lost: Nodes::new(),
            owner_ready: TickNo(0),
            asked: true,
        });
        short.asked = true;
    }

    pub(crate) fn deleted(&mut self, id: ImageId) {
        self.short.remove(&id);
        self.joining.remove(&id);
        self.ordered.remove(&id);
        self.tried.remove(&id);
    }

    /// An image's owner was told to put a replica on a node.
    pub(crate) fn given(&mut self, id: ImageId, command: &Command, to: &NodeId, tick: TickNo) {
        self.ordered.insert(
            id,
            Ordered {
                command: command.id,
                to: to.clone(),
                until: command.expires,
            },
        );
        let tried = self.tried.entry(id).or_default();
        tried.retain(|_, tried| !tried.is_old(tick));
        let tried = tried.entry(to.clone()).or_insert(Tried { at: tick, times: 0 });
        tried.at = tick;
        tried.times = tried.times.saturating_add(1);
    }

    /// The owner answered.
    pub(crate) fn finished(&mut self, id: ImageId, command: CommandId, outcome: &Outcome, tick: TickNo) {
        let Some(ordered) = self.ordered.get_mut(&id).filter(|o| o.command == command) else {
            return;
        };
        match outcome {
            Outcome::Done { .. } => ordered.until = TickNo(tick.0.saturating_add(JOIN_TICKS)),
            Outcome::Refused { .. } => {
                if let Some(tried) = self.tried.get_mut(&id).and_then(|tried| tried.get_mut(&ordered.to)) {
                    tried.at = tick;
                }
                self.ordered.remove(&id);
            }
        }
    }

    /// The order of an image that is on its way now.
    pub(crate) fn on_its_way(&self, id: ImageId, tick: TickNo) -> Option<&Ordered> {
        self.ordered.get(&id).filter(|ordered| ordered.until >= tick)
    }

    /// Whether a node rests as a place for an image's replica.
    pub(crate) fn rests(&self, id: ImageId, node: &NodeId, tick: TickNo) -> bool {
        let tried = self.tried.get(&id).and_then(|tried| tried.get(node));
        tried.is_some_and(|tried| tried.rests(tick))
    }
}
