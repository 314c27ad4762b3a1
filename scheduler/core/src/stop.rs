//! Whether a node may stop: which images would suffer, how, and what to do first.
//!
//! It looks at what the log says now and promises nothing: it is a question, no reservation. An image that would only be
//! read more slowly is no harm.

use std::collections::BTreeMap;

use hearth_protocol::limits::IMAGES_OF_NODE_MAX;
use hearth_protocol::record::Record;
use hearth_protocol::view::{DrainView, Harm, ImageAtRisk, StopView};
use hearth_protocol::{ImageId, NodeId};

use crate::catalog::Image;
use crate::state::{Facts, State};

/// What would happen if a node stopped now; `None` for a node that never joined. A pass over all images.
pub fn ok_to_stop(state: &State, node: &NodeId) -> Option<StopView> {
    let facts = &state.data.facts;
    let known = facts.nodes.get(node)?;
    let images = facts.catalog.images.iter();
    let mut images: Vec<ImageAtRisk> = images
        .filter_map(|(id, image)| {
            let (harm, why, fix) = harm(facts, *id, image, node)?;
            let image = image.name.clone();
            Some(ImageAtRisk { image, harm, why, fix })
        })
        .collect();
    images.sort_by(|a, b| (a.harm, &a.image).cmp(&(b.harm, &b.image)));
    let omitted = images.len().saturating_sub(IMAGES_OF_NODE_MAX) as u64;
    images.truncate(IMAGES_OF_NODE_MAX);
    Some(StopView {
        node: node.clone(),
        present: facts.present(known),
        draining: facts.drains(node),
        images,
        omitted,
    })
}

/// What is left on each draining node. A pass over all images, if any drains.
pub(crate) fn draining(facts: &Facts) -> BTreeMap<&NodeId, DrainView> {
    let mut all: BTreeMap<&NodeId, DrainView> = facts
        .marks
        .draining
        .iter()
        .map(|(node, at)| {
            let view = DrainView {
                since: at.tick,
                replicas: 0,
                owned: 0,
                alone: 0,
            };
            (node, view)
        })
        .collect();
    if all.is_empty() {
        return all;
    }
    for (id, image) in &facts.catalog.images {
        for (node, view) in &mut all {
            let left = match left(facts, *id, image, node) {
                None => continue,
                Some(Left::Alone) => &mut view.alone,
                Some(Left::Owned) => &mut view.owned,
                Some(Left::Replica) => &mut view.replicas,
            };
            *left += 1;
        }
    }
    all
}

/// What a node has of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nobody else holds some of its blocks.
    Alone,
    /// It is the image's owner, or nobody is.
    Owned,
    /// Another node is its owner.
    Replica,
}

/// What a node has of an image, if it has anything.
pub(crate) fn left(facts: &Facts, id: ImageId, image: &Image, node: &NodeId) -> Option<Left> {
    if is_alone(facts, id, image, node) {
        return Some(Left::Alone);
    }
    let replicas = image.replicas.as_ref()?;
    let owns = image.attached && image.node == *node;
    if owns || replicas.members.contains(node) && !image.attached {
        return Some(Left::Owned);
    }
    (replicas.members.contains(node) || replicas.joiners.contains(node)).then_some(Left::Replica)
}

fn record(facts: &Facts, id: ImageId) -> Option<&Record> {
    let known = facts.validity.image(id)?;
    known.locations.as_ref().map(|locations| &*locations.record)
}

/// Whether nobody but the node holds some blocks of an image.
fn is_alone(facts: &Facts, id: ImageId, image: &Image, node: &NodeId) -> bool {
    let top = match record(facts, id) {
        None => image.node == *node,
        Some(record) => record.runs().iter().any(|run| run.members.iter().eq([node])),
    };
    // A clone reads the layers below its own from nodes that hold them.
    let below = image
        .layers
        .iter()
        .skip(1)
        .filter_map(|layer| facts.catalog.layers.get(layer));
    top || below.into_iter().any(|layer| layer.holders.iter().eq([node]))
}

fn harm(facts: &Facts, id: ImageId, image: &Image, node: &NodeId) -> Option<(Harm, String, String)> {
    let name = &image.name;
    let left = left(facts, id, image, node);
    if left == Some(Left::Alone) {
        let (why, fix) = match &image.replicas {
            Some(replicas) if replicas.joiners.is_empty() => (
                format!("only {node} has some of its blocks in sync"),
                format!("hearth location add {name} NODE, and wait until that is in sync"),
            ),
            Some(_) => (
                format!("only {node} has some of its blocks in sync"),
                format!("wait until the sync has ended: hearth location list {name}"),
            ),
            None if image.node == *node => (
                format!("it has no replicas, and lies on {node}"),
                format!("stop its guest and copy it: hearth image export {name} FILE"),
            ),
            None => (
                format!("it is a clone, and only {node} has the snapshot below it"),
                format!("stop its guest, and copy it: hearth image export {name} FILE"),
            ),
        };
        return Some((Harm::NoCopy, why, fix));
    }
    let replicas = image.replicas.as_ref()?;
    if image.attached && image.node == *node {
        let others: Vec<&str> = replicas
            .members
            .iter()
            .filter(|other| *other != node)
            .map(NodeId::as_str)
            .collect();
        let to = others.first().copied().unwrap_or("NODE");
        return Some((
            Harm::Stalled,
            format!("it is attached on {node}; its replicas are on {}", others.join(" and ")),
            format!(
                "migrate its guest (hearth image attach {name} --node {to} --incoming), or hearth image detach {name}"
            ),
        ));
    }
    let runs = record(facts, id)?.runs();
    let after = runs
        .iter()
        .map(|run| run.members.iter().filter(|other| *other != node).count() as u64)
        .min()?;
    let before = replicas.fewest;
    if after >= replicas.wanted || after == before {
        return None;
    }
    let fix = match (facts.drains(node), image.attached) {
        (_, false) => {
            format!("hearth image attach {name} on another node: a replica is made only while the image is served")
        }
        (false, true) => format!("hearth node drain {node}, and wait until it is empty"),
        (true, true) => format!("wait until it has moved; if it does not: hearth health --detail, hearth why {name}:0"),
    };
    Some((
        Harm::Degraded,
        format!("{after} of {} replicas would be left", replicas.wanted),
        fix,
    ))
}
