//! `hearth image`.

use std::io::{self, IsTerminal, Write};

use hearth_protocol::rpc::{
    AttachHow, ExportKind, Failure, FailureKind, ImageFormat, ImageInfo, MapRun, NodeReply, NodeRequest,
};
use hearth_protocol::view::ImageView;
use hearth_protocol::{ImageName, NodeId};
use hearth_tui::table::{Cell, Column, Row, RowId, Table};
use hearth_tui::{fmt, narrate, tables};
use serde::Serialize;

use super::ask::{Ask, act_each, asks};
use super::{Context, import, job, map, scrub, watch};
use crate::Outcome;
use crate::cli::{Change, Export, FileFormat, Image};
use crate::cluster::{Cluster, unexpected};
use crate::{output, snippets};

pub async fn run(context: &Context, verb: Image) -> Outcome {
    let cluster = context.cluster().await?;
    match verb {
        Image::Create {
            image,
            size_at,
            size,
            block_size,
            replicas,
            on,
            change,
        } => {
            // clap requires one of the two.
            let size = size_at.or(size).unwrap_or_default();
            let node = cluster.some_node(on.node).await?;
            let what = format!(
                "create {image} on {node}: {} in blocks of {}{}",
                fmt::bytes(size),
                fmt::bytes(block_size),
                match replicas {
                    1 => String::new(),
                    n => format!(", {n} replicas"),
                }
            );
            let request = NodeRequest::ImageCreate {
                name: image,
                size,
                block_size,
                replicas,
            };
            act(context, &cluster, change, &what, "created", &node, request).await
        }
        Image::Import {
            file,
            image,
            block_size,
            detach,
            on,
            change,
        } => {
            let (path, name) = import::what(&file, &image)?;
            let node = cluster.some_node(on.node).await?;
            let ask = Ask {
                what: format!("import {path} as {name} on {node}"),
                request: NodeRequest::ImageImport { name, path, block_size },
                node,
            };
            job::start(context, &cluster, change, ask, detach).await
        }
        Image::Clone {
            source,
            images,
            on,
            change,
        } => {
            let node = cluster.node_of(&source.image, on.node).await?;
            let asks = images.into_iter().map(|image| Ask {
                what: format!("clone {}@{} as {image} on {node}", source.image, source.snapshot),
                node: node.clone(),
                request: NodeRequest::ImageClone {
                    source: source.image.clone(),
                    snapshot: source.snapshot.clone(),
                    name: image,
                },
            });
            act_each(context, &cluster, change, "cloned", asks.collect()).await
        }
        Image::Snapshot { snapshot, on, change } => {
            let node = cluster.node_of(&snapshot.image, on.node).await?;
            let what = format!("take the snapshot {}@{} on {node}", snapshot.image, snapshot.snapshot);
            let request = NodeRequest::ImageSnapshot {
                image: snapshot.image,
                name: snapshot.snapshot,
            };
            act(context, &cluster, change, &what, "snapshot taken", &node, request).await
        }
        Image::Resize {
            image,
            size,
            on,
            change,
        } => {
            let node = cluster.node_of(&image, on.node).await?;
            let what = format!("resize {image} on {node} to {}", fmt::bytes(size));
            let request = NodeRequest::ImageResize { image, size };
            act(context, &cluster, change.clone(), &what, "resized", &node, request).await?;
            if !change.dry_run {
                output::note("guests see the new size when they connect anew; then grow what is in the disk");
            }
            Ok(())
        }
        Image::Set {
            image,
            replicas,
            on,
            change,
        } => {
            let node = cluster.node_of(&image, on.node).await?;
            let what = format!("have {} of {image}", narrate::plural(replicas, "replica"));
            let request = NodeRequest::ImageSet { image, replicas };
            act(context, &cluster, change, &what, "set", &node, request).await
        }
        Image::Export {
            source,
            file,
            format,
            force,
            detach,
            on,
            change,
        } => {
            let node = cluster.node_of(&source.image, on.node).await?;
            let at = source
                .snapshot
                .as_ref()
                .map_or_else(String::new, |name| format!("@{name}"));
            let path = import::absolute(&file)?;
            let format = match format {
                FileFormat::Raw => ImageFormat::Raw,
                FileFormat::Qcow2 => ImageFormat::Qcow2,
            };
            let ask = Ask {
                what: format!("export {}{at} on {node} to {path} as {}", source.image, format.as_str()),
                request: NodeRequest::ImageExport {
                    image: source.image,
                    snapshot: source.snapshot,
                    path,
                    format,
                    replace: force,
                },
                node,
            };
            job::start(context, &cluster, change, ask, detach).await
        }
        Image::Delete {
            images,
            yes,
            on,
            change,
        } => {
            let asks = asks(&cluster, images, on.node, |image, node| {
                (
                    format!("delete {image} on {node}, for ever"),
                    NodeRequest::ImageDelete { image: image.clone() },
                )
            })
            .await?;
            if !yes && !change.dry_run {
                confirm(&asks, "deleting", "all blocks in it will be gone for ever", "delete")?;
            }
            act_each(context, &cluster, change, "deleted", asks).await
        }
        Image::List { node, watch } => {
            watch::run(context, watch, async || list(context, &cluster, node.as_ref()).await).await
        }
        Image::Show { image, on } => show(context, &cluster, &image, on.node).await,
        Image::Attach {
            images,
            export,
            device,
            takeover,
            accept_data_loss,
            yes,
            incoming,
            on,
            change,
        } => {
            let (export, how) = if device || export == Export::Device {
                (ExportKind::Device, "NBD and a kernel block device")
            } else {
                (ExportKind::Socket, "NBD")
            };
            let role = match (takeover, incoming) {
                (true, _) if accept_data_loss => AttachHow::AcceptDataLoss,
                (true, _) => AttachHow::Takeover,
                (_, true) => AttachHow::Incoming,
                _ => AttachHow::Plain,
            };
            let asks = asks(&cluster, images, on.node, |image, node| {
                let image = image.clone();
                let loss = match accept_data_loss {
                    true => ", giving up every write that the copy there does not have",
                    false => "",
                };
                (
                    format!("attach {image} on {node} over {how}{loss}"),
                    NodeRequest::ImageAttach {
                        image,
                        export,
                        how: role,
                    },
                )
            });
            let asks = asks.await?;
            if accept_data_loss && !yes && !change.dry_run {
                confirm(
                    &asks,
                    "accepting the loss of writes to",
                    "the last writes to it may be gone for ever",
                    "accept that",
                )?;
            }
            act_each(context, &cluster, change, "attached", asks).await
        }
        Image::Detach { images, on, change } => {
            let asks = asks(&cluster, images, on.node, |image, node| {
                let image = image.clone();
                (format!("detach {image} on {node}"), NodeRequest::ImageDetach { image })
            });
            act_each(context, &cluster, change, "detached", asks.await?).await
        }
        Image::HandOver { image, to, on, change } => {
            let node = cluster.node_of(&image, on.node).await?;
            let what = format!("hand {image} over from {node} to {to}");
            let request = NodeRequest::ImageHandOver { image, to };
            act(context, &cluster, change, &what, "handed over", &node, request).await
        }
        Image::Prewarm {
            image,
            node,
            detach,
            change,
        } => {
            let ask = Ask {
                what: format!("prewarm {image} on {node}"),
                request: NodeRequest::ImagePrewarm { image },
                node,
            };
            job::start(context, &cluster, change, ask, detach).await
        }
        Image::Map {
            image,
            blocks,
            tiers,
            on,
        } => {
            let node = cluster.node_of(&image, on.node).await?;
            if !tiers && map::show(context, &cluster, &image, &node, blocks).await? {
                return Ok(());
            }
            match cluster.node(&node, &NodeRequest::ImageMap { image }).await? {
                NodeReply::Map { runs } => {
                    context.out.many(&runs, || map_table(&runs));
                    Ok(())
                }
                other => Err(unexpected(&format!("node {node}"), &other)),
            }
        }
        Image::Scrub {
            image,
            check,
            throttle,
            on,
            change,
        } => scrub::scrub(context, &cluster, image, check, throttle, on.node, change).await,
        Image::Sync {
            image,
            node,
            throttle,
            change,
        } => scrub::sync(context, &cluster, image, node, throttle, change).await,
        Image::AttachInfo { image, format, on } => {
            let info = cluster.image_info(&image, on.node).await?;
            let Some(attached) = &info.attached else {
                return Err(Failure::new(
                    FailureKind::Refused,
                    format!("{image} is not attached, so there is nothing a guest could use"),
                    format!("hearth image attach {image}"),
                ));
            };
            context
                .out
                .one(attached, || snippets::snippet(format, &image, attached));
            Ok(())
        }
    }
}

/// Asks a node for a change, or prints the plan, and says what came of it.
async fn act(
    context: &Context,
    cluster: &Cluster,
    change: Change,
    what: &str,
    done: &str,
    node: &NodeId,
    request: NodeRequest,
) -> Outcome {
    let ask = Ask {
        what: what.to_owned(),
        node: node.clone(),
        request,
    };
    act_each(context, cluster, change, done, vec![ask]).await
}

/// Asks on the terminal for the image's name, or for the number of images.
fn confirm(asks: &[Ask], doing: &str, harm: &str, verb: &str) -> Outcome {
    let (subject, word) = match asks {
        [
            Ask {
                request: NodeRequest::ImageDelete { image } | NodeRequest::ImageAttach { image, .. },
                ..
            },
        ] => (image.to_string(), "its name"),
        several => (format!("{} images", several.len()), "their number"),
    };
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(Failure::new(
            FailureKind::Usage,
            format!("{doing} {subject} needs a confirmation, and there is no terminal to ask on"),
            "add --yes if it is meant",
        ));
    }
    let mut stderr = io::stderr();
    // A terminal that cannot be written shows no question, and then nothing is confirmed below.
    let _ = write!(stderr, "{subject}: {harm}. Type {word} to {verb}: ");
    let _ = stderr.flush();
    let mut line = String::new();
    let read = io::stdin().read_line(&mut line);
    if read.is_ok() && subject.split(' ').next() == Some(line.trim()) {
        Ok(())
    } else {
        Err(Failure::new(
            FailureKind::Usage,
            format!("nothing was done: {:?} is not {word}", line.trim()),
            "",
        ))
    }
}

async fn list(context: &Context, cluster: &Cluster, node: Option<&NodeId>) -> Outcome {
    match node {
        None => {
            let view = cluster.view().await?;
            context.out.many(&view.images, || tables::images(&view.images));
        }
        Some(node) => {
            let images = cluster.images_of(node).await?;
            context.out.many(&images, || infos(&images));
        }
    }
    Ok(())
}

/// What the node and the scheduler know of an image.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    info: ImageInfo,
    /// Heat, rates and latencies; none when the scheduler does not answer.
    activity: Option<ImageView>,
}

async fn show(context: &Context, cluster: &Cluster, image: &ImageName, node: Option<NodeId>) -> Outcome {
    let info = cluster.image_info(image, node).await?;
    // The node alone can show an image; without a scheduler its activity is missing.
    let activity = match cluster.view().await {
        Ok(view) => view.images.into_iter().find(|i| i.id == info.id),
        Err(_) => None,
    };
    let shown = Shown { info, activity };
    context.out.one(&shown, || {
        let mut text = info_text(&shown.info);
        if let Some(activity) = &shown.activity {
            for line in narrate::image(activity).into_iter().skip_while(|l| !l.is_empty()) {
                text += &line;
                text.push('\n');
            }
        }
        text
    });
    Ok(())
}

pub(super) fn info_text(info: &ImageInfo) -> String {
    let mut lines = vec![
        format!("image          {}", info.name),
        format!("id             {}", info.id),
        format!("node           {}", info.node),
        format!(
            "size           {} in blocks of {}, {} allocated in the top layer",
            fmt::bytes(info.size),
            fmt::bytes(info.block_size),
            fmt::bytes(info.allocated)
        ),
        format!("layers         {}", info.layers.len()),
    ];
    if let Some(parent) = &info.parent {
        lines.push(format!("parent         {parent}"));
    }
    if !info.snapshots.is_empty() {
        let names: Vec<_> = info.snapshots.iter().map(|s| s.as_str()).collect();
        lines.push(format!("snapshots      {}", names.join(" ")));
    }
    for (at, run) in info.locations.iter().enumerate() {
        let label = if at == 0 { "replicas" } else { "" };
        lines.push(format!("{label:<14} {}", super::location::run_text(info, at, run)));
    }
    match &info.attached {
        None => lines.push("attached       no".into()),
        Some(a) => {
            lines.push(match a.incoming {
                true => "attached       as incoming: another node is to hand it over".into(),
                false => format!("attached       epoch {}", a.epoch),
            });
            lines.push(format!("NBD            socket {}, export {}", a.socket, a.export));
            lines.push(format!("NBD URI        {}", uri(&a.socket, &a.export)));
            if let Some(device) = &a.device {
                let survives = if a.device_survives_restart {
                    "survives restarts of the daemon"
                } else {
                    "does not survive restarts of the daemon on this kernel"
                };
                lines.push(format!("device         {device} ({survives})"));
            }
        }
    }
    if let Some(trouble) = &info.trouble {
        lines.push(format!("trouble        {trouble}"));
    }
    lines.join("\n") + "\n"
}

/// `nbd+unix:///export?socket=path`, as the standard tools take it.
fn uri(socket: &str, export: &str) -> String {
    let quote = |text: &str| -> String {
        text.bytes()
            .map(|b| match b {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => char::from(b).to_string(),
                other => format!("%{other:02X}"),
            })
            .collect()
    };
    format!("nbd+unix:///{}?socket={}", quote(export), quote(socket))
}

fn infos(images: &[ImageInfo]) -> Table {
    Table {
        columns: vec![
            Column::text("IMAGE"),
            Column::text("STATE"),
            Column::number("SIZE"),
            Column::number("ALLOCATED"),
            Column::number("LAYERS"),
            Column::text("SNAPSHOTS"),
            Column::text("PARENT"),
            Column::text("DEVICE").wide(),
            Column::text("ID").wide(),
        ],
        rows: images
            .iter()
            .map(|i| {
                let snapshots: Vec<_> = i.snapshots.iter().map(|s| s.as_str()).collect();
                let device = i.attached.as_ref().and_then(|a| a.device.clone());
                Row {
                    id: RowId::Image(i.id),
                    cells: vec![
                        Cell::text(i.name.as_str()),
                        Cell::text(match (&i.attached, &i.trouble) {
                            (Some(_), None) => "attached",
                            (Some(_), Some(_)) => "attached, in trouble",
                            (None, None) => "detached",
                            (None, Some(_)) => "detached, in trouble",
                        }),
                        Cell::number(i.size.0, fmt::bytes(i.size)),
                        Cell::number(i.allocated.0, fmt::bytes(i.allocated)),
                        Cell::number(i.layers.len() as u64, i.layers.len().to_string()),
                        Cell::text(if snapshots.is_empty() {
                            "-".into()
                        } else {
                            snapshots.join(",")
                        }),
                        Cell::text(i.parent.clone().unwrap_or_else(|| "-".into())),
                        Cell::text(device.unwrap_or_else(|| "-".into())),
                        Cell::text(i.id.to_string()),
                    ],
                }
            })
            .collect(),
    }
}

fn map_table(runs: &[MapRun]) -> Table {
    Table {
        columns: vec![
            Column::number("FIRST"),
            Column::number("BLOCKS"),
            Column::text("TIER"),
            Column::text("LAYER"),
        ],
        rows: runs
            .iter()
            .map(|r| Row {
                id: RowId::None,
                cells: vec![
                    Cell::number(r.first.0, r.first.to_string()),
                    Cell::number(r.count, r.count.to_string()),
                    Cell::text(r.tier.clone()),
                    Cell::text(r.layer.map_or_else(|| "-".into(), |l| l.to_string())),
                ],
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::ByteLen;

    use super::*;

    #[test]
    fn uris_are_quoted() {
        assert_eq!(
            uri("/run/hearth node/nbd.sock", "appl/vm-1"),
            "nbd+unix:///appl/vm-1?socket=/run/hearth%20node/nbd.sock"
        );
    }

    #[test]
    fn an_image_that_is_not_attached_says_so() {
        let info = ImageInfo {
            id: hearth_protocol::ImageId(1),
            name: "a/b".parse().unwrap(),
            size: ByteLen(1 << 30),
            block_size: ByteLen(65536),
            allocated: ByteLen(0),
            layers: vec![],
            snapshots: vec![],
            parent: None,
            node: "n1".parse().unwrap(),
            locations: vec![],
            record: None,
            attached: None,
            trouble: None,
        };
        assert!(info_text(&info).contains("attached       no\n"));
    }
}
