//! Events of the log for people and programs, and which of them are asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::Duration;

use hearth_protocol::chain::hex;
use hearth_protocol::event::CopiesChecked;
use hearth_protocol::{Envelope, Event, ImageId, ImageName, LayerId, Publisher, Seq};
use hearth_tui::tables::LogLine;
use hearth_tui::{fmt, narrate};
use serde_json::{Value, json};

use crate::Outcome;
use crate::cli::Only;
use crate::cluster::{bus_failure, no_image};
use crate::history::{History, Logged, logged};

/// Subjects of all images' own histories.
const IMAGES: &str = "hearth.log.image.>";
const BATCH: usize = 1_024;
const WAIT: Duration = Duration::from_secs(1);

/// Names of images, and whose layers are whose. Read from the log, so that it works without a scheduler.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    names: BTreeMap<ImageId, ImageName>,
    layers: BTreeMap<LayerId, BTreeSet<ImageId>>,
}

impl Catalog {
    /// Reads it from a log, up to its end now.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn read(history: &History) -> Outcome<Self> {
        let mut catalog = Self::default();
        match history {
            History::Stream(cluster) => {
                let last = cluster.bus.last(IMAGES).await.map_err(|e| bus_failure(&e))?;
                let Some(last) = last.map(|l| l.seq) else {
                    return Ok(catalog);
                };
                let mut reader = cluster.bus.log_reader(Seq(1), vec![IMAGES.into()]);
                let mut at = Seq(0);
                while at < last {
                    let batch = reader.fetch(BATCH, WAIT).await.map_err(|e| bus_failure(&e))?;
                    if batch.is_empty() {
                        break;
                    }
                    for fetched in batch {
                        at = fetched.seq;
                        catalog.learn(&logged(&fetched)?);
                    }
                }
            }
            History::Folder(_) => {
                let (first, last) = history.bounds().await?;
                history
                    .walk(first, last, |logged| {
                        catalog.learn(&logged);
                        ControlFlow::Continue(())
                    })
                    .await?;
            }
        }
        Ok(catalog)
    }

    /// Takes what an event says of images.
    pub fn learn(&mut self, logged: &Logged) {
        let Ok(event) = logged.message.event() else { return };
        match event {
            Event::ImageCreated(created) => {
                for layer in created.layers {
                    self.layers.entry(layer).or_default().insert(created.image);
                }
                self.names.insert(created.image, created.name);
            }
            Event::SnapshotTaken { image, top, .. } | Event::ImageResized { image, top, .. } => {
                self.layers.entry(top).or_default().insert(image);
            }
            _ => {}
        }
    }

    /// An image's name.
    pub fn name(&self, id: ImageId) -> Option<ImageName> {
        self.names.get(&id).cloned()
    }

    /// The newest image of a name.
    fn id(&self, name: &ImageName) -> Option<ImageId> {
        self.names.iter().find(|(_, n)| *n == name).map(|(id, _)| *id)
    }

    /// The names of the images that stand on a layer.
    fn on(&self, layer: LayerId) -> Vec<ImageName> {
        let ids = self.layers.get(&layer).into_iter().flatten();
        ids.filter_map(|id| self.names.get(id).cloned()).collect()
    }
}

/// Which events are asked for.
pub struct Filter<'a> {
    only: &'a Only,
    image: Option<ImageId>,
}

impl<'a> Filter<'a> {
    /// Looks the image's name up.
    ///
    /// # Errors
    /// Exit code 3 if the log has no such image.
    pub fn new(only: &'a Only, catalog: &Catalog) -> Outcome<Self> {
        let image = match &only.image {
            None => None,
            Some(name) => Some(catalog.id(name).ok_or_else(|| no_image(name))?),
        };
        Ok(Self { only, image })
    }

    /// Whether anything is left out.
    pub fn is_all(&self) -> bool {
        self.only.kind.is_empty() && self.image.is_none() && self.only.node.is_none()
    }

    /// Whether this one is asked for. What cannot be decoded is shown only without a filter.
    pub fn wants(&self, logged: &Logged, catalog: &Catalog) -> bool {
        if self.is_all() {
            return true;
        }
        let (Ok(envelope), Ok(event)) = (logged.message.envelope(), logged.message.event()) else {
            return false;
        };
        let kind = self.only.kind.is_empty() || self.only.kind.iter().any(|k| k == event.kind());
        let node = self.only.node.as_ref().is_none_or(|node| {
            envelope.publisher == Publisher::Node(node.clone())
                || match &event {
                    Event::CommandGiven(command) => &command.node == node,
                    Event::HeatFolded(heat) => &heat.node == node,
                    Event::NodeDrainSet { node: of, .. } | Event::FaultDomainSet { node: of, .. } => of == node,
                    _ => false,
                }
        });
        let image = self.image.is_none_or(|image| about(&event, image, catalog));
        kind && node && image
    }
}

fn about(event: &Event, image: ImageId, catalog: &Catalog) -> bool {
    let stands_on = |layer: &LayerId| catalog.layers.get(layer).is_some_and(|l| l.contains(&image));
    match event {
        Event::ImageCreated(e) => e.image == image,
        Event::ImageAttached(e) => e.image == image,
        Event::ImageDetached { image: i, .. }
        | Event::SnapshotTaken { image: i, .. }
        | Event::SnapshotDeleted { image: i, .. }
        | Event::ImageResized { image: i, .. }
        | Event::LocationsChanged { image: i, .. }
        | Event::ReplicasSet { image: i, .. }
        | Event::CopiesChecked(CopiesChecked { image: i, .. })
        | Event::ImageExported { image: i, .. }
        | Event::ImageDeleted { image: i } => *i == image,
        Event::LayerSealed { layer, .. } | Event::LayerDropped { layer, .. } => stands_on(layer),
        Event::CommandGiven(command) => stands_on(&command.order.layer()),
        Event::HeatFolded(heat) => heat.images.iter().any(|i| i.image == image),
        _ => false,
    }
}

/// An event as one line.
pub fn line(logged: &Logged, catalog: &Catalog) -> LogLine {
    match decoded(logged) {
        Err(why) => LogLine {
            seq: logged.seq,
            time: Default::default(),
            kind: "foreign".into(),
            by: "?".into(),
            text: why.clone(),
            void: None,
            details: vec![why],
        },
        Ok((envelope, event)) => {
            let mut text = match &event {
                Event::CommandGiven(c) => narrate::command(c, &catalog.on(c.order.layer())),
                other => narrate::event(other, &|id| catalog.name(id)),
            };
            if !envelope.reason.is_empty() {
                text += &format!(" \u{2013} {}", envelope.reason);
            }
            let mut details = vec![text.clone(), String::new()];
            details.extend(text_of(logged).lines().map(str::to_owned));
            LogLine {
                seq: logged.seq,
                time: envelope.time,
                kind: event.kind().into(),
                by: envelope.publisher.to_string(),
                text,
                void: None,
                details,
            }
        }
    }
}

fn decoded(logged: &Logged) -> Result<(Envelope, Event), String> {
    let envelope = logged.message.envelope().map_err(|e| e.to_string())?;
    if logged.thinned {
        return Err("heat older than its scheduler keeps: only its hash is left".into());
    }
    let event = logged.message.event().map_err(|e| e.to_string())?;
    Ok((envelope, event))
}

/// An event as a document: heat unpacked, digests in hexadecimal.
pub fn document(logged: &Logged) -> Value {
    let mut value = match decoded(logged) {
        Err(why) => json!({ "seq": logged.seq, "foreign": why }),
        Ok((envelope, event)) => json!({
            "seq": logged.seq,
            "time": fmt::time(envelope.time),
            "kind": event.kind(),
            "publisher": envelope.publisher.to_string(),
            "subject": envelope.subject,
            "incarnation": envelope.incarnation,
            "publisher_seq": envelope.publisher_seq,
            "reason": envelope.reason,
            "event": body(&event),
        }),
    };
    if value["reason"] == ""
        && let Value::Object(map) = &mut value
    {
        map.remove("reason");
    }
    if let (Some(chain), Value::Object(map)) = (&logged.chain, &mut value) {
        map.insert("chain".into(), hex(chain).into());
    }
    value
}

/// An event's own fields, without the name of its kind around them.
fn body(event: &Event) -> Value {
    let mut value = serde_json::to_value(event).unwrap_or_default();
    if let Value::Object(map) = &mut value
        && map.len() == 1
        && let Some((_, inner)) = std::mem::take(map).into_iter().next()
    {
        value = inner;
    }
    match event {
        Event::HeatFolded(heat) => {
            for (i, image) in heat.images.iter().enumerate() {
                for (l, layer) in image.layers.iter().enumerate() {
                    let blocks = match layer.blocks.unpack() {
                        Ok(blocks) => serde_json::to_value(blocks).unwrap_or_default(),
                        Err(error) => error.to_string().into(),
                    };
                    value["images"][i]["layers"][l]["blocks"] = blocks;
                }
            }
        }
        Event::DigestRecorded {
            state,
            decisions,
            chain,
            ..
        } => {
            value["state"] = hex(state).into();
            value["decisions"] = hex(decisions).into();
            if let Some(chain) = chain {
                value["chain"] = hex(chain).into();
            }
        }
        _ => {}
    }
    value
}

/// An event's document for people: JSON, but short lists of numbers stay on one line.
pub fn text_of(logged: &Logged) -> String {
    let mut out = String::new();
    let mut document = document(logged);
    // What an event is comes before what it says.
    for name in [
        "seq",
        "time",
        "kind",
        "publisher",
        "subject",
        "incarnation",
        "publisher_seq",
        "reason",
        "chain",
        "foreign",
    ] {
        if let Some(value) = document.as_object_mut().and_then(|map| map.remove(name)) {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            out += &format!("{:<14} {text}\n", name.replace('_', " "));
        }
    }
    if let Some(event) = document.get("event") {
        out.push('\n');
        write(event, 0, &mut out);
    }
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                match inner {
                    Value::Object(m) if m.is_empty() => {}
                    Value::Array(a) if a.iter().any(Value::is_object) => {
                        for (i, item) in a.iter().enumerate() {
                            if item
                                .as_object()
                                .is_some_and(|m| m.values().all(|v| !v.is_object() && !v.is_array()))
                            {
                                *out += &format!("{pad}{name} {i}: {item}\n");
                            } else {
                                *out += &format!("{pad}{name} {i}:\n");
                                write(item, depth + 1, out);
                            }
                        }
                    }
                    Value::Object(_) => {
                        *out += &format!("{pad}{name}:\n");
                        write(inner, depth + 1, out);
                    }
                    Value::String(text) => *out += &format!("{pad}{name}: {text}\n"),
                    other => *out += &format!("{pad}{name}: {other}\n"),
                }
            }
        }
        Value::String(text) => *out += &format!("{pad}{text}\n"),
        other => *out += &format!("{pad}{other}\n"),
    }
}
