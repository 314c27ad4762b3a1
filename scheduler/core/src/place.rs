//! Where the replicas of a new image go.
//!
//! The node that asked comes first. Each further one is, of the nodes that are present, do not drain and are not chosen, the one whose fault
//! domain has the fewest chosen ones; of these the one on which the fewest bytes of images lie; of these the lowest id.

use std::collections::BTreeMap;

use hearth_protocol::NodeId;

use crate::state::{Facts, State};

/// Why an image cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The node that asked is not there.
    #[error("node {0} is not present")]
    Absent(NodeId),
    /// The node that asked drains.
    #[error("node {0} drains, so it gets no new images")]
    Draining(NodeId),
    /// There are not enough nodes.
    #[error("{replicas} replicas need as many nodes, and {present} are present and do not drain")]
    TooFew {
        /// How many are wanted.
        replicas: u64,
        /// How many nodes there are.
        present: u64,
    },
}

/// The nodes for an image's replicas, `near` first.
///
/// # Errors
/// [`Misfit`].
pub fn place(state: &State, near: &NodeId, replicas: u64) -> Result<Vec<NodeId>, Misfit> {
    let facts = &state.data.facts;
    let present: BTreeMap<&NodeId, &str> = facts.takers().collect();
    if !present.contains_key(near) {
        return Err(match facts.drains(near) {
            true => Misfit::Draining(near.clone()),
            false => Misfit::Absent(near.clone()),
        });
    }
    if (present.len() as u64) < replicas {
        return Err(Misfit::TooFew {
            replicas,
            present: present.len() as u64,
        });
    }
    let held = held(facts);
    let mut chosen = vec![near];
    while (chosen.len() as u64) < replicas {
        let shares = |domain: &str| shares(domain, chosen.iter().map(|node| present[*node]));
        let next = present
            .iter()
            .filter(|(id, _)| !chosen.contains(id))
            .min_by_key(|(id, domain)| (shares(domain), held.get(*id).copied().unwrap_or(0), **id));
        match next {
            Some((id, _)) => chosen.push(id),
            None => break,
        }
    }
    Ok(chosen.into_iter().cloned().collect())
}

/// How many chosen nodes are in a fault domain.
pub(crate) fn shares<'a>(domain: &str, chosen: impl Iterator<Item = &'a str>) -> u64 {
    chosen.filter(|other| *other == domain).count() as u64
}

/// Bytes of the images that lie on each node. A pass over all images.
pub(crate) fn held(facts: &Facts) -> BTreeMap<&NodeId, u64> {
    let mut held: BTreeMap<&NodeId, u64> = BTreeMap::new();
    for image in facts.catalog.images.values() {
        let top = image.layers.first().and_then(|layer| facts.catalog.layers.get(layer));
        for node in top.into_iter().flat_map(|layer| &layer.holders) {
            let bytes = held.entry(node).or_default();
            *bytes = bytes.saturating_add(image.size.0);
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::laws::sim::{Sim, node_id};

    #[test]
    fn replicas_go_to_other_fault_domains_and_then_to_the_emptiest_nodes() {
        let mut sim = Sim::default();
        for (node, rack) in [("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r2"), ("e", "r3")] {
            sim.join_in(rack, node, 100);
        }
        sim.image("c", 1, 30);
        sim.second();
        let placed = |near: &str, replicas| {
            let nodes = place(&sim.state, &node_id(near), replicas);
            nodes.map(|nodes| nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(placed("a", 1).unwrap(), "a");
        assert_eq!(placed("a", 3).unwrap(), "a d e");
        assert_eq!(placed("a", 4).unwrap(), "a d e b");
        assert_eq!(placed("e", 5).unwrap(), "e a d b c");
        let too_few = Misfit::TooFew {
            replicas: 6,
            present: 5,
        };
        assert_eq!(placed("a", 6), Err(too_few));
        assert_eq!(placed("z", 2), Err(Misfit::Absent(node_id("z"))));
    }
}
