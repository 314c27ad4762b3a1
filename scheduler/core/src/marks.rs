//! What operators said of nodes: which drain, and in which fault domain they are.
//!
//! Kept apart from what nodes say of themselves, so that it survives their restarts. It is no state of the nodes: what is
//! left on one that drains is counted from the images when somebody asks ([`crate::stop`]).

use std::collections::BTreeMap;

use hearth_protocol::NodeId;
use serde::{Deserialize, Serialize};

use crate::repairs::At;
use crate::state::Facts;

/// A fault domain that an operator gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Domain {
    pub name: String,
    pub at: At,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Marks {
    /// Since when each draining node drains.
    pub draining: BTreeMap<NodeId, At>,
    pub domains: BTreeMap<NodeId, Domain>,
}

impl Marks {
    /// Whether there is nothing to remember: so it is in every log in which no operator said anything.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// A node drains, or no longer. What it did already changes nothing.
    pub(crate) fn drain(&mut self, node: &NodeId, draining: bool, at: At) {
        if draining {
            self.draining.entry(node.clone()).or_insert(at);
        } else {
            self.draining.remove(node);
        }
    }

    /// A node is in a fault domain; with no name, in the one that it says itself.
    pub(crate) fn place(&mut self, node: &NodeId, name: &str, at: At) {
        if name.is_empty() {
            self.domains.remove(node);
        } else if self.domains.get(node).is_none_or(|domain| domain.name != name) {
            let name = name.to_owned();
            self.domains.insert(node.clone(), Domain { name, at });
        }
    }
}

impl Facts {
    /// Whether a node drains.
    pub(crate) fn drains(&self, node: &NodeId) -> bool {
        self.marks.draining.contains_key(node)
    }

    /// The fault domain of a node; of one that nobody knows, the empty name.
    pub(crate) fn fault_domain(&self, node: &NodeId) -> &str {
        match self.marks.domains.get(node) {
            Some(domain) => &domain.name,
            None => self.nodes.get(node).map_or("", |known| &known.joined.fault_domain),
        }
    }

    /// The nodes that can take something new, with their fault domains: those that are there and do not drain.
    pub(crate) fn takers(&self) -> impl Iterator<Item = (&NodeId, &str)> {
        let there = self.nodes.iter().filter(|(_, node)| self.present(node));
        there
            .map(|(id, _)| id)
            .filter(|id| !self.drains(id))
            .map(|id| (id, self.fault_domain(id)))
    }
}
