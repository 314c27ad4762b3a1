//! What records are found by. Keys end in the position, so that one index entry needs no value.

use hearth_protocol::event::CopiesChecked;
use hearth_protocol::{CommandId, Envelope, Event, ImageId, LayerId, NodeId, Publisher, Seq, WallMs};

/// One thing to find records by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Index {
    /// Events of an image: its history, and heat of it.
    Image(ImageId),
    /// Events about a layer: its history, and orders about it.
    Layer(LayerId),
    /// Events by and about a node.
    Node(NodeId),
    /// A command and its end.
    Command(CommandId),
    /// Events of one kind, as [`Event::kind`] names it.
    Kind(String),
}

/// The kind of the events whose payloads may be thinned.
pub(super) const HEAT: &str = "heat_folded";

/// The groups of keys; each is a column family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Group {
    Image,
    Layer,
    Node,
    Command,
    Kind,
    /// Ticks by their time.
    Time,
}

impl Group {
    pub(super) const ALL: [Group; 6] = [
        Group::Image,
        Group::Layer,
        Group::Node,
        Group::Command,
        Group::Kind,
        Group::Time,
    ];

    /// Name of the column family.
    pub(super) fn name(self) -> &'static str {
        match self {
            Group::Image => "by_image",
            Group::Layer => "by_layer",
            Group::Node => "by_node",
            Group::Command => "by_command",
            Group::Kind => "by_kind",
            Group::Time => "by_time",
        }
    }
}

impl Index {
    pub(super) fn group(&self) -> Group {
        match self {
            Index::Image(_) => Group::Image,
            Index::Layer(_) => Group::Layer,
            Index::Node(_) => Group::Node,
            Index::Command(_) => Group::Command,
            Index::Kind(_) => Group::Kind,
        }
    }

    /// What all its keys start with. Names end in a zero byte, so that none is another's beginning.
    pub(super) fn prefix(&self) -> Vec<u8> {
        let name = |text: &str| [text.as_bytes(), &[0]].concat();
        match self {
            Index::Image(id) => id.0.to_be_bytes().into(),
            Index::Layer(id) => id.0.to_be_bytes().into(),
            Index::Command(id) => id.0.to_be_bytes().into(),
            Index::Node(id) => name(id.as_str()),
            Index::Kind(kind) => name(kind),
        }
    }

    pub(super) fn key(&self, seq: Seq) -> Vec<u8> {
        [self.prefix().as_slice(), &seq.0.to_be_bytes()].concat()
    }
}

/// The key of a tick.
pub(super) fn time_key(time: WallMs, seq: Seq) -> Vec<u8> {
    [time.0.to_be_bytes(), seq.0.to_be_bytes()].concat()
}

/// The position at the end of a key.
pub(super) fn seq_of(key: &[u8]) -> Option<Seq> {
    key.last_chunk::<8>().map(|bytes| Seq(u64::from_be_bytes(*bytes)))
}

/// All keys of an event, without repeats.
pub(super) fn keys(seq: Seq, envelope: &Envelope, event: &Event) -> Vec<(Group, Vec<u8>)> {
    let mut found = vec![Index::Kind(event.kind().into())];
    if let Publisher::Node(node) = &envelope.publisher {
        found.push(Index::Node(node.clone()));
    }
    match event {
        Event::ImageCreated(e) => {
            found.push(Index::Image(e.image));
            found.extend(e.parent.iter().map(|(parent, _)| Index::Image(*parent)));
            found.extend(e.layers.iter().map(|layer| Index::Layer(*layer)));
        }
        Event::ImageAttached(e) => found.push(Index::Image(e.image)),
        Event::ImageDetached { image, .. }
        | Event::SnapshotDeleted { image, .. }
        | Event::LocationsChanged { image, .. }
        | Event::ReplicasSet { image, .. }
        | Event::CopiesChecked(CopiesChecked { image, .. })
        | Event::ImageExported { image, .. }
        | Event::ImageDeleted { image } => {
            found.push(Index::Image(*image));
        }
        Event::SnapshotTaken { image, sealed, top, .. } | Event::ImageResized { image, sealed, top, .. } => {
            found.extend([Index::Image(*image), Index::Layer(*sealed), Index::Layer(*top)]);
        }
        Event::LayerSealed { layer, .. } | Event::LayerDropped { layer, .. } => found.push(Index::Layer(*layer)),
        Event::NodeJoined(_) | Event::NodeLeft { .. } => {}
        Event::CommandFinished { command, .. } => found.push(Index::Command(*command)),
        Event::CommandGiven(command) => found.extend([
            Index::Command(command.id),
            Index::Node(command.node.clone()),
            Index::Layer(command.order.layer()),
        ]),
        Event::HeatFolded(heat) => {
            found.push(Index::Node(heat.node.clone()));
            found.extend(heat.images.iter().map(|image| Index::Image(image.image)));
        }
        Event::NodeDrainSet { node, .. } | Event::FaultDomainSet { node, .. } => found.push(Index::Node(node.clone())),
        Event::TermStarted { .. }
        | Event::Ticked { .. }
        | Event::PolicySet { .. }
        | Event::DigestRecorded { .. }
        | Event::LogRecovered { .. }
        | Event::LossAccepted { .. } => {}
    }
    let mut keys: Vec<_> = found.iter().map(|index| (index.group(), index.key(seq))).collect();
    if let Event::Ticked { time, .. } = event {
        keys.push((Group::Time, time_key(*time, seq)));
    }
    keys.sort();
    keys.dedup();
    keys
}
