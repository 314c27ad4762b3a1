//! What a session waits for, since when, and when it asks again.

use std::collections::BTreeMap;

use hearth_protocol::aggregate::Change;
use hearth_protocol::record::{Nodes, Stamp};
use hearth_protocol::{LeaseId, NodeId, SetVersion};

use super::words::Message;
use crate::request::RequestId;
use crate::time::{ANSWER_MS, ASK_MS, BootMs, RENEW_AGAIN_MS, RENEW_MS, SILENT_MS};

/// A record that a member was asked to record.
#[derive(Debug, Clone)]
pub(super) struct Raising {
    pub(super) stamp: Stamp,
    pub(super) message: Message,
    pub(super) since: BootMs,
    pub(super) again: BootMs,
}

/// A takeover's question.
#[derive(Debug, Clone)]
pub(super) struct Asking {
    pub(super) lease: LeaseId,
    pub(super) since: BootMs,
    pub(super) again: BootMs,
    /// Who has not told.
    pub(super) left: Nodes,
    /// Whether somebody told of a record that the log, as read here, does not have yet.
    pub(super) ahead: bool,
}

/// A hand-over that the destination may not have heard of.
#[derive(Debug, Clone)]
pub(super) struct Handing {
    pub(super) to: NodeId,
    pub(super) stamp: Stamp,
    pub(super) message: Message,
    pub(super) again: BootMs,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub(super) struct Waits {
    sent: BTreeMap<(NodeId, RequestId), (SetVersion, BootMs)>,
    /// When the oldest of `sent` may be due; at most once per [`ANSWER_MS`] too early.
    check: Option<BootMs>,
    pub(super) raises: BTreeMap<NodeId, Raising>,
    pub(super) publish: Option<(Change, BootMs)>,
    /// The last renewal of read leases, while this node is the owner.
    pub(super) renewed: Option<BootMs>,
    /// Since when renewals to a member are unanswered.
    pub(super) silent: BTreeMap<NodeId, BootMs>,
    pub(super) asking: Option<Asking>,
    pub(super) handing: Option<Handing>,
    /// When a destination that the log has decided for takes over again.
    pub(super) take_again: Option<BootMs>,
}

impl Waits {
    /// Forgets all but a hand-over.
    pub(super) fn clear(&mut self) {
        let handing = self.handing.take();
        *self = Self {
            handing,
            ..Self::default()
        };
    }

    /// Forgets what is unanswered at a node.
    pub(super) fn forget(&mut self, node: &NodeId) {
        self.sent.retain(|(to, _), _| to != node);
        self.raises.remove(node);
        self.silent.remove(node);
    }

    /// A request goes out.
    pub(super) fn sent(&mut self, now: BootMs, to: NodeId, id: RequestId, stamp: Stamp) {
        self.sent.insert((to, id), (stamp.set_version, now));
        self.check.get_or_insert(now.after(ANSWER_MS));
    }

    /// A request is answered. A late answer to an earlier sending does not answer the later one.
    pub(super) fn answered(&mut self, from: &NodeId, id: RequestId, stamp: Stamp) {
        let key = (from.clone(), id);
        if self
            .sent
            .get(&key)
            .is_some_and(|(version, _)| *version == stamp.set_version)
        {
            self.sent.remove(&key);
        }
    }

    /// Whether a request is unanswered at a node.
    pub(super) fn waits_for(&self, node: &NodeId) -> bool {
        let first = (node.clone(), RequestId(0));
        self.sent.range(first..).next().is_some_and(|((to, _), _)| to == node)
    }

    /// The nodes whose answers are due, each to be waited for anew unless it is given up.
    pub(super) fn unanswered(&mut self, now: BootMs) -> Nodes {
        let mut due = Nodes::new();
        if self.check.is_some_and(|check| check <= now) {
            for ((to, _), (_, since)) in &mut self.sent {
                if since.after(ANSWER_MS) <= now {
                    due.insert(to.clone());
                    *since = now;
                }
            }
            self.check = self.sent.values().map(|(_, since)| since.after(ANSWER_MS)).min();
        }
        for (to, raising) in &mut self.raises {
            if raising.since.after(ANSWER_MS) <= now {
                due.insert(to.clone());
                raising.since = now;
            }
        }
        due
    }

    /// When read leases are to be renewed, `missing` one or not.
    pub(super) fn renews_at(&self, missing: bool) -> Option<BootMs> {
        let ms = if missing { RENEW_AGAIN_MS } else { RENEW_MS };
        self.renewed.map(|renewed| renewed.after(ms))
    }

    /// A renewal may have been lost. A connection that breaks again and again is not asked in a loop.
    pub(super) fn renew_soon(&mut self, now: BootMs) {
        let then = BootMs(now.after(RENEW_AGAIN_MS).0.saturating_sub(RENEW_MS));
        self.renewed = self.renewed.map(|renewed| renewed.min(then));
    }

    /// Everything that is unanswered counts as asked now.
    pub(super) fn anew(&mut self, now: BootMs) {
        for (_, since) in self.sent.values_mut() {
            *since = now;
        }
        self.check = self.check.map(|_| now.after(ANSWER_MS));
        for raising in self.raises.values_mut() {
            raising.since = now;
        }
        for since in self.silent.values_mut() {
            *since = now;
        }
        if let Some(asking) = &mut self.asking {
            asking.since = now;
        }
    }

    /// When the first of all this is due; renewals and silent members only count as asked for.
    pub(super) fn due(&self, renews: Option<BootMs>, silent: bool, frozen: bool) -> Option<BootMs> {
        let publish = self.publish.as_ref().filter(|_| !frozen).map(|(_, again)| *again);
        let take_again = self.take_again.filter(|_| !frozen);
        let handing = self.handing.as_ref().map(|handing| handing.again);
        let asking = self.asking.as_ref().map(|asking| {
            let end = asking.since.after(ASK_MS);
            if asking.left.is_empty() {
                end
            } else {
                end.min(asking.again)
            }
        });
        let raises = self
            .raises
            .values()
            .map(|raising| raising.again.min(raising.since.after(ANSWER_MS)));
        let silent = self
            .silent
            .values()
            .filter(|_| silent)
            .map(|since| since.after(SILENT_MS));
        [self.check, publish, take_again, handing, asking, renews]
            .into_iter()
            .flatten()
            .chain(raises)
            .chain(silent)
            .min()
    }
}
