//! `hearth migrate`: a running guest goes from one QEMU to another, and its disks with it.
//!
//! QEMU copies the guest's memory, stops the guest and waits in `pre-switchover`; there the disks are handed over, which is
//! all that Hearth adds to the stall; then QEMU goes on. Invariant: the source guest runs again only after each of its disks
//! is the source node's again.

use std::time::{Duration, Instant};

use hearth_protocol::rpc::{AttachHow, ExportKind, Failure, FailureKind, NodeReply, NodeRequest};
use hearth_protocol::{ImageName, NodeId};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::{Value, json};

use super::ask::Ask;
use super::{Context, job, plan};
use crate::Outcome;
use crate::cli::Migrate;
use crate::cluster::{Cluster, unexpected};
use crate::output;
use crate::qmp::Qmp;

/// Time between two looks at what moves.
const LOOK: Duration = Duration::from_millis(200);
/// How long the destination's guest may take to run after QEMU said that the migration is complete.
const RUNS_WITHIN: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Debug, Default, Serialize)]
struct Migrated {
    images: Vec<ImageName>,
    from: Vec<NodeId>,
    to: Option<NodeId>,
    /// Brought into the destination's RAM before.
    prewarmed_bytes: u64,
    /// From the source's stop in `pre-switchover` until it was told to go on: the stall that Hearth adds.
    hand_over_ms: f64,
    /// The whole stall, as QEMU counts it; none with `--listen`.
    downtime_ms: Option<u64>,
    /// Of the guest's memory, sent by QEMU.
    memory_bytes: Option<u64>,
    /// From the first command to the end.
    total_ms: f64,
}

/// A guest's disks, the nodes they are on, and where they go.
struct Disks<'a> {
    cluster: &'a Cluster,
    reason: &'a str,
    images: Vec<(ImageName, NodeId)>,
    to: NodeId,
}

pub async fn run(context: &Context, options: Migrate) -> Outcome {
    let cluster = context.cluster().await?;
    let nodes = cluster.nodes_of(&options.images, None).await?;
    let disks = Disks {
        cluster: &cluster,
        reason: &options.change.reason,
        images: options.images.iter().cloned().zip(nodes).collect(),
        to: options.to.clone(),
    };
    if options.change.dry_run {
        let mut asks = Vec::new();
        if !options.no_prewarm {
            asks.extend(disks.images.iter().map(|(image, _)| disks.prewarm_ask(image)));
        }
        asks.extend(
            disks
                .images
                .iter()
                .map(|(image, from)| disks.hand_over_ask(image, from)),
        );
        plan::nodes(context, &asks, &options.change.reason);
        return Ok(());
    }
    let began = Instant::now();
    disks.check().await?;
    let source = Qmp::connect(&options.source_qmp).await?;
    let bar = context.out.bar();
    let mut done = Migrated {
        images: options.images.clone(),
        from: disks.images.iter().map(|(_, node)| node.clone()).collect(),
        to: Some(options.to.clone()),
        ..Migrated::default()
    };
    let mut migration = Migration {
        disks,
        source,
        bar,
        moved: false,
    };
    if !options.no_prewarm {
        done.prewarmed_bytes = migration.prewarm().await?;
    }
    let destination = match (&options.destination_qmp, &options.channel) {
        (Some(socket), Some(channel)) if !options.listen => {
            let mut destination = Qmp::connect(socket).await?;
            migration.begin(&mut destination, channel).await?;
            Some(destination)
        }
        _ => {
            output::note("waiting for somebody to migrate the guest; Ctrl-C ends the wait");
            None
        }
    };
    let ended = migration.drive(destination.is_some(), &mut done).await;
    if destination.is_some() {
        // Whoever migrates this guest next would else wait in a state it does not know.
        let _ = migration.pause_before_switchover(false).await;
    }
    migration.bar.finish_and_clear();
    if let Err(failure) = ended {
        return Err(migration.take_back(failure).await);
    }
    if let Some(mut destination) = destination {
        runs(&mut destination).await?;
    }
    done.total_ms = millis(began.elapsed());
    context.out.one(&done, || text(&done));
    Ok(())
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn text(done: &Migrated) -> String {
    let names: Vec<_> = done.images.iter().map(ImageName::as_str).collect();
    let to = done.to.as_ref().map_or("?", |to| to.as_str());
    let mut text = format!("migrated to {to}: {}\n", names.join(" "));
    text += &format!(
        "disks handed over in {:.0} ms, {} in RAM there before\n",
        done.hand_over_ms,
        hearth_tui::fmt::bytes(hearth_protocol::ByteLen(done.prewarmed_bytes))
    );
    if let Some(downtime) = done.downtime_ms {
        text += &format!("the guest stood still for {downtime} ms, as QEMU counts\n");
    }
    text
}

/// Waits until the guest runs at its destination.
async fn runs(destination: &mut Qmp) -> Outcome {
    let deadline = Instant::now() + RUNS_WITHIN;
    loop {
        let status = destination.execute("query-status", json!({})).await?;
        match status["status"].as_str() {
            Some("running" | "paused") => return Ok(()),
            _ if Instant::now() < deadline => tokio::time::sleep(LOOK / 10).await,
            other => {
                return Err(Failure::new(
                    FailureKind::Failed,
                    format!("the guest was migrated and its disks are there, but its QEMU is in state {other:?}"),
                    "look at the destination's QEMU; `cont` in its monitor starts the guest",
                ));
            }
        }
    }
}

impl Disks<'_> {
    fn ask(&self, what: String, node: &NodeId, request: NodeRequest) -> Ask {
        Ask {
            what,
            node: node.clone(),
            request,
        }
    }

    fn prewarm_ask(&self, image: &ImageName) -> Ask {
        let request = NodeRequest::ImagePrewarm { image: image.clone() };
        self.ask(format!("prewarm {image} on {}", self.to), &self.to, request)
    }

    fn hand_over_ask(&self, image: &ImageName, from: &NodeId) -> Ask {
        let request = NodeRequest::ImageHandOver {
            image: image.clone(),
            to: self.to.clone(),
        };
        self.ask(format!("hand {image} over from {from} to {}", self.to), from, request)
    }

    async fn change(&self, ask: &Ask) -> Outcome<NodeReply> {
        self.cluster.change(&ask.node, &ask.asked(self.reason)).await
    }

    /// Every disk waits at the destination.
    async fn check(&self) -> Outcome {
        let there = self.cluster.images_of(&self.to).await?;
        for (image, from) in &self.images {
            let waits = there.iter().find(|info| &info.name == image);
            let waits = waits.and_then(|info| info.attached.as_ref());
            if *from == self.to || !waits.is_some_and(|attached| attached.incoming) {
                return Err(Failure::new(
                    FailureKind::Refused,
                    format!("{image} does not wait for a hand-over on {}", self.to),
                    format!(
                        "hearth image attach {image} --node {} --incoming, then start QEMU there with -incoming defer",
                        self.to
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Hands all over at the same time; says which could not be.
    async fn hand_over(&self) -> Outcome {
        let mut tasks = tokio::task::JoinSet::new();
        let there = self.cluster.images_of(&self.to).await?;
        for (image, from) in &self.images {
            let info = there.iter().find(|info| &info.name == image);
            let attached = info.and_then(|info| info.attached.as_ref());
            if attached.is_some_and(|attached| !attached.incoming) {
                continue; // an attempt before this one did it
            }
            let ask = self.hand_over_ask(image, from);
            let (cluster, asked) = (self.cluster.clone(), ask.asked(self.reason));
            tasks.spawn(async move { cluster.change(&ask.node, &asked).await });
        }
        let mut failure = None;
        while let Some(ended) = tasks.join_next().await {
            let ended = ended.map_err(|error| {
                Failure::new(
                    FailureKind::Failed,
                    format!("a request was given up: {error}"),
                    "this is a bug of Hearth",
                )
            });
            if let Err(error) = ended.and_then(|ended| ended) {
                failure = Some(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Gives the source its disks again where the destination has them. Those that cannot be had are named.
    async fn take_back(&self) -> Vec<String> {
        let mut lost = Vec::new();
        for (image, from) in &self.images {
            let here = self.cluster.images_of(from).await.ok();
            let info = here.iter().flatten().find(|info| &info.name == image);
            let attached = info.and_then(|info| info.attached.as_ref());
            if attached.is_some_and(|attached| !attached.incoming) {
                continue;
            }
            let export = attached.map_or(ExportKind::Socket, |attached| match attached.device {
                Some(_) => ExportKind::Device,
                None => ExportKind::Socket,
            });
            let request = NodeRequest::ImageAttach {
                image: image.clone(),
                export,
                how: AttachHow::Takeover,
            };
            let ask = self.ask(format!("take {image} back to {from}"), from, request);
            if let Err(failure) = self.change(&ask).await {
                output::note(&format!("cannot {}: {}", ask.what, failure.message));
                lost.push(format!("hearth image attach {image} --node {from} --takeover"));
            }
        }
        lost
    }
}

/// One migration.
struct Migration<'a> {
    disks: Disks<'a>,
    source: Qmp,
    bar: ProgressBar,
    /// The hand-over was asked for.
    moved: bool,
}

impl Migration<'_> {
    /// Has the destination read into RAM what the source has there. It only makes the start faster, so what cannot be
    /// prewarmed is said and left.
    async fn prewarm(&self) -> Outcome<u64> {
        let mut bytes = 0;
        for (image, _) in &self.disks.images {
            let ask = self.disks.prewarm_ask(image);
            let mut info = match self.disks.change(&ask).await {
                Ok(NodeReply::Job(info)) => info,
                Ok(other) => return Err(unexpected(&format!("node {}", self.disks.to), &other)),
                Err(failure) => {
                    output::note(&format!("{image} starts cold: {}", failure.message));
                    continue;
                }
            };
            self.bar.set_message(format!("prewarming {image}"));
            while info.ended.is_none() {
                self.bar.set_length(info.total.0);
                self.bar.set_position(info.done.0);
                tokio::time::sleep(LOOK / 4).await;
                info = job::look(self.disks.cluster, &self.disks.to, info.id).await?;
            }
            if let Some(Err(failure)) = &info.ended {
                output::note(&format!("{image} starts colder than it could: {}", failure.message));
            }
            bytes += info.done.0;
        }
        Ok(bytes)
    }

    async fn pause_before_switchover(&mut self, on: bool) -> Outcome {
        let state = |name: &str, on: bool| json!({"capability": name, "state": on});
        let set = json!({"capabilities": [state("pause-before-switchover", on), state("events", true)]});
        self.source.execute("migrate-set-capabilities", set).await.map(drop)
    }

    /// Has both QEMUs begin.
    async fn begin(&mut self, destination: &mut Qmp, channel: &str) -> Outcome {
        let status = destination.execute("query-status", json!({})).await?;
        if status["status"] != "inmigrate" {
            return Err(Failure::new(
                FailureKind::Refused,
                format!(
                    "the destination's QEMU is in state {}, not waiting for a guest",
                    status["status"]
                ),
                "start it with the source's machine and disks, and -incoming defer",
            ));
        }
        self.pause_before_switchover(true).await?;
        destination.execute("migrate-incoming", json!({"uri": channel})).await?;
        self.source.execute("migrate", json!({"uri": channel})).await?;
        Ok(())
    }

    /// Follows the migration to its end, and hands the disks over when the source's guest stands still.
    async fn drive(&mut self, is_ours: bool, done: &mut Migrated) -> Outcome {
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        let mut is_cancelled = false;
        self.bar.set_message("copying the guest's memory");
        let mut is_refused = false;
        loop {
            let info = match self.source.execute("query-migrate", json!({})).await {
                // Whoever migrated the guest may end its QEMU here as soon as it runs there.
                Err(_) if is_refused => json!({"status": "completed"}),
                info => info?,
            };
            self.show(&info, done);
            match info["status"].as_str().unwrap_or("none") {
                "pre-switchover" | "device" | "completed" if !self.moved => {
                    let stopped = Instant::now();
                    self.moved = true;
                    match self.disks.hand_over().await {
                        // The guest is at its destination, or about to be, whatever becomes of its disks: they have to
                        // follow.
                        Err(failure) if !is_ours => {
                            output::note(&format!("not handed over yet: {}", failure.message));
                            self.moved = false;
                            is_refused = true;
                            tokio::time::sleep(LOOK).await;
                            continue;
                        }
                        other => other?,
                    }
                    if is_ours {
                        let state = json!({"state": "pre-switchover"});
                        self.source.execute("migrate-continue", state).await?;
                    }
                    done.hand_over_ms = millis(stopped.elapsed());
                    continue;
                }
                "completed" => {
                    if is_ours {
                        done.downtime_ms = info["downtime"].as_u64();
                    }
                    return Ok(());
                }
                // Before it begins, where somebody else begins it, the last one's end may still be there.
                "failed" | "cancelled" if is_ours || self.moved => {
                    let why = info["error-desc"].as_str().unwrap_or("it was cancelled");
                    return Err(Failure::new(
                        FailureKind::Failed,
                        format!("QEMU did not migrate the guest: {why}"),
                        "the guest runs at its source; look at both QEMUs, and start the destination's again",
                    ));
                }
                _ => {}
            }
            tokio::select! {
                event = self.source.event() => { event?; }
                () = tokio::time::sleep(LOOK) => {}
                _ = &mut interrupted, if !is_cancelled => {
                    if self.moved {
                        output::note("the disks are at the destination: it goes on to its end");
                    } else if is_ours {
                        self.source.execute("migrate_cancel", json!({})).await?;
                    } else {
                        return Err(Failure::new(FailureKind::Failed, "nobody migrated the guest", ""));
                    }
                    is_cancelled = true;
                }
            }
        }
    }

    fn show(&self, info: &Value, done: &mut Migrated) {
        let ram = |key: &str| info["ram"][key].as_u64();
        if let (Some(total), Some(remaining)) = (ram("total"), ram("remaining")) {
            self.bar.set_length(total);
            self.bar.set_position(total.saturating_sub(remaining));
        }
        if let Some(sent) = ram("transferred") {
            done.memory_bytes = Some(sent);
        }
    }

    /// After a failure: the disks come back to the source before its guest may run, and the migration is over.
    async fn take_back(&mut self, failure: Failure) -> Failure {
        let lost = match self.moved {
            true => self.disks.take_back().await,
            false => Vec::new(),
        };
        // It may be over by itself; then QEMU says nothing against it.
        let cancelled = self.source.execute("migrate_cancel", json!({})).await;
        match lost.first() {
            Some(command) => Failure::new(
                failure.kind,
                format!("{}; and the source is without its disk", failure.message),
                command.clone(),
            ),
            None if cancelled.is_err() => Failure::new(
                failure.kind,
                failure.message,
                "its disks are at the source; the source's QEMU does not answer",
            ),
            None => failure,
        }
    }
}
