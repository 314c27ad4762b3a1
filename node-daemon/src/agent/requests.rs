//! Answers the `hearth` command: every change is first possible in the store, then a fact in the log, then done.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use hearth_protocol::event::{ImageAttached, ImageCreated};
use hearth_protocol::limits::REASON_BYTES_MAX;
use hearth_protocol::rpc::{
    Answer, Asked, AttachHow, AttachInfo, ExportKind, Failure, FailureKind, ImageInfo, JobKind, NodeInfo, NodeReply,
    NodeRequest,
};
use hearth_protocol::{ByteLen, Epoch, Event, ImageId, ImageName, LayerId, LeaseId, SnapshotName};
use hearth_replication::session::Input;

use super::jobs::Jobs;
use super::link::Link;
use super::node::{Node, SET_VERSION, failed, store_failure};
use super::served::Served;
use crate::export::nbd::NbdHandle;
use crate::store::{ImageMeta, StoreError};
use crate::volume::{in_words, map_of};

/// Runs of a map in one answer, so that it fits a message.
const MAP_RUNS_MAX: usize = 4_096;

/// Longest path, in bytes (`PATH_MAX` without its final zero).
const PATH_BYTES_MAX: usize = 4_095;

/// What a request can reach. Cheap to clone.
#[derive(Clone)]
pub struct Requests {
    /// The data plane.
    pub node: Arc<Node>,
    /// The log.
    pub link: Link,
    /// The NBD server's connections.
    pub connections: NbdHandle,
    /// Long operations.
    pub jobs: Arc<Jobs>,
    /// Images that are being handed over by this node.
    pub handing_over: Arc<Mutex<BTreeSet<ImageId>>>,
    /// Operators' words for the ownerships that are being taken, for the events by which they are.
    pub words: Arc<Mutex<BTreeMap<ImageId, String>>>,
}

impl Requests {
    /// Answers one request.
    ///
    /// # Errors
    /// A [`Failure`] for the user.
    pub async fn answer(mut self, asked: Asked<NodeRequest>) -> Answer<NodeReply> {
        if asked.reason.len() > REASON_BYTES_MAX {
            return Err(Failure::new(
                FailureKind::Usage,
                format!(
                    "the reason has {} bytes, at most {REASON_BYTES_MAX} go into the log",
                    asked.reason.len()
                ),
                "say it shorter",
            ));
        }
        self.link = self.link.because(&asked.reason);
        if changes_images(&asked.request) {
            self.link.takes_changes()?;
        }
        if makes_images(&asked.request) {
            self.takes_images()?;
        }
        match asked.request {
            NodeRequest::ImageCreate {
                name,
                size,
                block_size,
                replicas: 0 | 1,
            } => self.create(name, size, block_size).await,
            NodeRequest::ImageCreate {
                name,
                size,
                block_size,
                replicas,
            } => self.create_replicas(name, size, block_size, replicas).await,
            NodeRequest::ImageImport { name, path, block_size } => self.import(name, path, block_size),
            NodeRequest::ImageClone { source, snapshot, name } => self.clone_image(source, snapshot, name).await,
            NodeRequest::ImageSnapshot { image, name } => self.snapshot(image, name).await,
            NodeRequest::ImageDelete { image } => self.delete(image).await,
            NodeRequest::ImageAttach { image, export, how } => self.attach(image, export, how).await,
            NodeRequest::ImageHandOver { image, to } => self.hand_over(image, to).await,
            NodeRequest::ImagePrewarm { image } => self.prewarm(image).await,
            NodeRequest::LocationAdd {
                image,
                node,
                blocks,
                pace,
            } => self.add_location(image, node, blocks, pace).await,
            NodeRequest::LocationRemove { image, node } => self.remove_location(image, node).await,
            NodeRequest::ImageScrub {
                image,
                blocks,
                repair,
                rate,
            } => self.scrub(image, blocks, repair, rate).await,
            NodeRequest::ImageSync {
                image,
                blocks,
                node,
                rate,
            } => self.sync(image, blocks, node, rate).await,
            NodeRequest::ImageSet { image, replicas } => self.set_replicas(image, replicas).await,
            NodeRequest::ReplicaPrepare(spec) => self.prepare_replica(spec).await,
            NodeRequest::ReplicaForget { image } => self.forget_replica(image).await,
            NodeRequest::ImageDetach { image } => self.detach(image).await,
            NodeRequest::ImageResize { image, size } => self.resize(image, size).await,
            NodeRequest::ImageExport {
                image,
                snapshot,
                path,
                format,
                replace,
            } => self.export(image, snapshot, path.into(), format, replace),
            NodeRequest::ImageMap { image } => self.map(&image),
            NodeRequest::ImageList => {
                let mut images: Vec<_> = self.node.store.images().iter().map(|meta| self.info(meta)).collect();
                images.extend(self.damaged_infos());
                images.sort_by(|a, b| a.name.cmp(&b.name));
                Ok(NodeReply::Images { images })
            }
            NodeRequest::JobShow { job } => Ok(NodeReply::Job(self.jobs.show(job)?)),
            NodeRequest::JobList => Ok(NodeReply::Jobs { jobs: self.jobs.list() }),
            NodeRequest::JobPause { job, paused } => Ok(NodeReply::Job(self.jobs.pause(job, paused)?)),
            NodeRequest::JobCancel { job } => Ok(NodeReply::Job(self.jobs.cancel(job)?)),
            NodeRequest::NodeShow => Ok(NodeReply::Node(self.node_info())),
            NodeRequest::Health => self.blocking_health().await,
        }
    }

    /// Answers what is asked of all nodes at once: nothing but questions about their health.
    ///
    /// # Errors
    /// `Usage` for anything else.
    pub async fn answer_to_all(self, request: NodeRequest) -> Answer<NodeReply> {
        match request {
            NodeRequest::Health => self.blocking_health().await,
            _ => Err(Failure::new(
                FailureKind::Usage,
                "all nodes together are only asked how they are",
                "ask one node",
            )),
        }
    }

    async fn blocking_health(self) -> Answer<NodeReply> {
        tokio::task::spawn_blocking(move || NodeReply::Health(self.health()))
            .await
            .map_err(|error| failed(format!("the request failed inside the daemon: {error}")))
    }

    pub(super) fn find(&self, name: &ImageName) -> Result<ImageMeta, Failure> {
        self.node.store.find(name).map_err(|_| {
            let id = &self.node.config.id;
            let facts = self.link.facts();
            let known = facts.image_named(name);
            if let Some((image, _)) = known
                && let Err(damaged @ StoreError::Damaged { .. }) = self.node.store.image(image)
            {
                return store_failure(&damaged);
            }
            match known {
                Some((_, there)) => Failure::new(
                    FailureKind::NotFound,
                    format!("image {name} is on {}, not on {id}", there.created.node),
                    format!("repeat it with --node {}", there.created.node),
                ),
                None => Failure::new(
                    FailureKind::NotFound,
                    format!("there is no image {name}"),
                    "see hearth image list",
                ),
            }
        })
    }

    /// Refuses a name that the cluster knows already, before any work is done for it.
    pub(super) fn name_is_free(&self, name: &ImageName) -> Result<(), Failure> {
        self.link.ready()?;
        match self.link.facts().image_named(name) {
            None => Ok(()),
            Some((_, taken)) => Err(Failure::new(
                FailureKind::Conflict,
                format!("image {name} exists already, on {}", taken.created.node),
                "choose another name",
            )),
        }
    }

    /// Refuses new images while this node drains.
    fn takes_images(&self) -> Result<(), Failure> {
        let id = &self.node.config.id;
        match self.link.facts().drains(id) {
            false => Ok(()),
            true => Err(Failure::new(
                FailureKind::Refused,
                format!("node {id} drains, so it gets no new images"),
                format!("choose another one with --node, or hearth node undrain {id}"),
            )),
        }
    }

    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Node) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let node = Arc::clone(&self.node);
        tokio::task::spawn_blocking(move || work(&node))
            .await
            .map_err(|error| failed(format!("the request failed inside the daemon: {error}")))?
    }

    async fn create(self, name: ImageName, size: ByteLen, block_size: ByteLen) -> Answer<NodeReply> {
        self.name_is_free(&name)?;
        let meta = self
            .blocking(move |node| {
                node.store
                    .create(&name, size.0, block_size.0)
                    .map_err(|e| store_failure(&e))
            })
            .await?;
        self.announce(meta).await
    }

    /// Publishes a new image; removes it again if its creation does not count.
    async fn announce(&self, meta: ImageMeta) -> Answer<NodeReply> {
        match self.link.publish_image(meta.id, &created(&self.node, &meta)).await {
            Ok(_) => Ok(NodeReply::Image(self.info(&meta))),
            Err(failure) if failure.kind == FailureKind::Timeout => Err(failure),
            Err(failure) => {
                self.blocking(move |node| node.store.delete(meta.id).map_err(|e| store_failure(&e)))
                    .await?;
                Err(failure)
            }
        }
    }

    fn import(self, name: ImageName, path: String, block_size: ByteLen) -> Answer<NodeReply> {
        self.name_is_free(&name)?;
        if path.len() > PATH_BYTES_MAX {
            return Err(Failure::new(
                FailureKind::Usage,
                format!(
                    "a path of {} bytes is no path: the system takes {PATH_BYTES_MAX}",
                    path.len()
                ),
                "",
            ));
        }
        if !Path::new(&path).is_absolute() {
            return Err(Failure::new(
                FailureKind::Usage,
                format!("{path:?} is not an absolute path on the node"),
                "",
            ));
        }
        let runtime = tokio::runtime::Handle::current();
        let jobs = Arc::clone(&self.jobs);
        let what = format!("import {path} as {name}");
        let job = jobs.start(JobKind::Import, name.clone(), what, move |progress| {
            let meta = self
                .node
                .store
                .import(&name, Path::new(&path), block_size.0, progress)
                .map_err(|error| store_failure(&error))?;
            runtime.block_on(self.announce(meta)).map(drop)
        });
        Ok(NodeReply::Job(job))
    }

    async fn clone_image(self, source: ImageName, snapshot: SnapshotName, name: ImageName) -> Answer<NodeReply> {
        self.name_is_free(&name)?;
        let local = self.node.store.find(&source).ok().map(|meta| meta.id);
        let meta = match local {
            Some(id) => {
                self.blocking(move |node| {
                    node.store
                        .clone_image(id, &snapshot, &name)
                        .map_err(|e| store_failure(&e))
                })
                .await?
            }
            None => self.clone_remote(source, snapshot, name).await?,
        };
        self.announce(meta).await
    }

    /// A clone whose parent is on another node: its sealed layers are read from there.
    async fn clone_remote(
        &self,
        source: ImageName,
        snapshot: SnapshotName,
        name: ImageName,
    ) -> Result<ImageMeta, Failure> {
        let remote = {
            let facts = self.link.facts();
            let Some((id, image)) = facts.image_named(&source) else {
                return Err(Failure::new(
                    FailureKind::NotFound,
                    format!("there is no image {source}"),
                    "see hearth image list",
                ));
            };
            let Some((_, sealed)) = image.snapshots.iter().find(|(n, _)| *n == snapshot) else {
                return Err(Failure::new(
                    FailureKind::NotFound,
                    format!("image {source} has no snapshot {snapshot}"),
                    format!("take one: hearth image snapshot {source}@{snapshot}"),
                ));
            };
            let at = image.created.layers.iter().position(|layer| layer == sealed);
            let below = image.created.layers[at.unwrap_or(0)..].to_vec();
            let parent = crate::store::Parent {
                image: id,
                name: source.clone(),
                snapshot: snapshot.clone(),
            };
            (image.created.size, image.created.block_size, below, parent)
        };
        self.blocking(move |node| {
            let (size, block_size, below, parent) = remote;
            node.store
                .clone_remote(&name, size.0, block_size.0, below, parent)
                .map_err(|e| store_failure(&e))
        })
        .await
    }

    async fn snapshot(self, image: ImageName, name: SnapshotName) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        self.only_alone(&meta, "snapshotted")?;
        self.link.ready()?;
        let (id, taken) = (meta.id, name.clone());
        let meta = self
            .blocking(move |node| match node.served.get(id) {
                Some(served) => served.volume.snapshot(&taken).map_err(|e| store_failure(&e)),
                None => node.store.snapshot(id, &taken).map_err(|e| store_failure(&e)),
            })
            .await?;
        let sealed = meta.snapshot(&name).map_err(|e| store_failure(&e))?.layer;
        let event = Event::SnapshotTaken {
            image: meta.id,
            name,
            sealed,
            top: meta.top(),
        };
        self.link.publish_image(meta.id, &event).await?;
        self.sealed(sealed).await?;
        Ok(NodeReply::Image(self.info(&meta)))
    }

    /// Tells that a layer takes no more writes.
    pub(super) async fn sealed(&self, layer: LayerId) -> Result<(), Failure> {
        let allocated = self.node.store.layer_allocated(layer).map_err(|e| store_failure(&e))?;
        let event = Event::LayerSealed {
            layer,
            node: self.node.config.id.clone(),
            allocated: ByteLen(allocated),
        };
        self.link.publish_layer(layer, &event).await?;
        Ok(())
    }

    async fn delete(self, image: ImageName) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        self.link.ready()?;
        if let Some(replica) = self.replica(meta.id) {
            return self.delete_replicas(&replica).await;
        }
        if self.node.served.get(meta.id).is_some() || self.node.waiting_why(meta.id).is_some() {
            let mut failure = store_failure(&StoreError::Attached(image.to_string()));
            failure.hint = format!("hearth image detach {image}");
            return Err(failure);
        }
        let clones: Vec<String> = self
            .link
            .facts()
            .clones_of(meta.id)
            .take(8)
            .map(ToString::to_string)
            .collect();
        if !clones.is_empty() {
            return Err(Failure::new(
                FailureKind::Refused,
                format!(
                    "image {image} has clones ({}): their blocks are in its layers",
                    clones.join(", ")
                ),
                "delete the clones first",
            ));
        }
        let seq = self
            .link
            .publish_image(meta.id, &Event::ImageDeleted { image: meta.id })
            .await?;
        for layer in self.remove(meta.id).await? {
            let event = Event::LayerDropped {
                layer,
                node: self.node.config.id.clone(),
            };
            self.link.publish_layer(layer, &event).await?;
        }
        Ok(NodeReply::Done { seq: Some(seq) })
    }

    async fn attach(self, image: ImageName, export: ExportKind, how: AttachHow) -> Answer<NodeReply> {
        self.link.ready()?;
        let meta = self.find_to_serve(&image).await?;
        if self.node.served.get(meta.id).is_some() {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("image {image} is attached already"),
                format!("see hearth image show {image}"),
            ));
        }
        if let (ExportKind::Device, Err(why)) = (export, &self.node.devices) {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!("no kernel devices on this node: {why}"),
                "attach with --export socket",
            ));
        }
        if let Some(replica) = self.replica(meta.id) {
            let (requests, serving) = (self.clone(), Arc::clone(&replica));
            let attached = match how {
                AttachHow::Incoming => requests.attach_incoming(serving, export).await,
                AttachHow::Plain | AttachHow::Takeover | AttachHow::AcceptDataLoss => {
                    requests.attach_replicas(serving, export, how).await
                }
            };
            if attached.is_err() {
                replica.step(Input::Unprepare);
            }
            return attached;
        }
        if how != AttachHow::Plain {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!("{image} has no replicas: no other node holds what it could hand over"),
                "images get replicas when they are created: hearth image create --replicas 2",
            ));
        }
        let last = self
            .link
            .facts()
            .validity()
            .image(meta.id)
            .map_or(Epoch(0), |known| known.epoch);
        let (epoch, lease) = (last.next(), LeaseId(hearth_bus::new_incarnation().0));
        let event = Event::ImageAttached(ImageAttached {
            image: meta.id,
            node: self.node.config.id.clone(),
            epoch,
            lease,
            set_version: SET_VERSION,
            device: export == ExportKind::Device,
        });
        self.link.publish_image(meta.id, &event).await?;
        let id = meta.id;
        let attached = self.blocking(move |node| node.attach(id, epoch, lease, export)).await;
        if let Err(failure) = attached {
            self.link
                .publish_image(id, &Event::ImageDetached { image: id, epoch })
                .await?;
            return Err(failure);
        }
        Ok(NodeReply::Image(self.info(&meta)))
    }

    async fn detach(self, image: ImageName) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        self.link.ready()?;
        let (epoch, result) = match self.node.give_up(meta.id)? {
            Some(epoch) => (epoch, Ok(())),
            None => {
                let served = self.node.served.get(meta.id);
                let result = self.node.detach(meta.id, &self.connections).await;
                match (served, self.node.served.get(meta.id)) {
                    // What went wrong came after the end of its service, so the log must know of the end.
                    (Some(served), None) => (served.epoch, result.map(drop)),
                    _ => {
                        return Err(result
                            .err()
                            .unwrap_or_else(|| failed(format!("{image} is still served"))));
                    }
                }
            }
        };
        let owner = self.owner_of(meta.id);
        if let Some(replica) = self.replica(meta.id) {
            replica.step(Input::Unprepare);
        }
        if self.replica(meta.id).is_some() && owner.as_ref() != Some(&self.node.config.id) {
            // It was handed over or taken over, or never handed over to this node: the log need not be told.
            result?;
            return Ok(NodeReply::Done { seq: None });
        }
        let event = Event::ImageDetached { image: meta.id, epoch };
        let seq = self.link.publish_image(meta.id, &event).await?;
        result?;
        Ok(NodeReply::Done { seq: Some(seq) })
    }

    fn map(&self, image: &ImageName) -> Answer<NodeReply> {
        let meta = self.find(image)?;
        let runs = match self.node.served.get(meta.id) {
            Some(served) => served.volume.map(),
            None => {
                let (meta, layers) = self.node.store.look_at(meta.id).map_err(|e| store_failure(&e))?;
                map_of(layers, meta.size, meta.block_size, &self.node.tier)
            }
        };
        if runs.len() > MAP_RUNS_MAX {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!(
                    "the map of {image} has {} runs, an answer holds {MAP_RUNS_MAX}",
                    runs.len()
                ),
                format!(
                    "attach it and use: nbdinfo --map=hearth:tier 'nbd+unix:///{image}?socket={}'",
                    self.node.config.socket.display()
                ),
            ));
        }
        Ok(NodeReply::Map { runs })
    }

    pub(super) fn info(&self, meta: &ImageMeta) -> ImageInfo {
        let meta = self.node.store.image(meta.id).unwrap_or_else(|_| meta.clone());
        let allocated = self.node.store.allocated(meta.id).unwrap_or_else(|error| {
            tracing::warn!(image = %meta.name, %error, "cannot tell how much an image has allocated");
            0
        });
        let replica = self.replica(meta.id);
        let record = replica.and_then(|replica| replica.look(|session| session.record().cloned()));
        ImageInfo {
            id: meta.id,
            name: meta.name.clone(),
            size: ByteLen(meta.size),
            block_size: ByteLen(meta.block_size),
            allocated: ByteLen(allocated),
            layers: meta.stack.clone(),
            snapshots: meta.snapshots.iter().map(|s| s.name.clone()).collect(),
            parent: meta.parent.as_ref().map(|p| format!("{}@{}", p.name, p.snapshot)),
            node: self.node.config.id.clone(),
            locations: record.as_ref().map_or_else(Vec::new, |record| record.runs().to_vec()),
            record: record.map(|record| record.stamp()),
            attached: self.node.served.get(meta.id).map(|served| self.attach_info(&served)),
            trouble: in_words(&self.ailments(&meta)),
        }
    }

    fn attach_info(&self, served: &Served) -> AttachInfo {
        AttachInfo {
            epoch: served.epoch,
            socket: self.node.config.socket.display().to_string(),
            export: served.name.to_string(),
            device: served.device.as_ref().map(|d| d.path.display().to_string()),
            incoming: served.incoming,
            device_survives_restart: served.device.as_ref().is_some_and(|d| d.survives_restart),
            read_latency: served.volume.read_latency(),
        }
    }

    fn node_info(&self) -> NodeInfo {
        let (config, usage) = (&self.node.config, self.node.tier.usage());
        NodeInfo {
            id: config.id.clone(),
            socket: config.socket.display().to_string(),
            peer_address: peer_address(&self.node),
            store: config.store_dir.display().to_string(),
            ram: usage.capacity,
            ram_used: ByteLen(usage.front.0 + usage.main.0),
            heat_source: self.node.heat_source().into(),
            heat_source_why: self.node.probes.as_ref().err().cloned().unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// Whether a request is to change images, in store and log.
fn changes_images(request: &NodeRequest) -> bool {
    match request {
        NodeRequest::ImageCreate { .. }
        | NodeRequest::ImageImport { .. }
        | NodeRequest::ImageClone { .. }
        | NodeRequest::ImageSnapshot { .. }
        | NodeRequest::ImageDelete { .. }
        | NodeRequest::ImageAttach { .. }
        | NodeRequest::ImageDetach { .. }
        | NodeRequest::ImageHandOver { .. }
        | NodeRequest::LocationAdd { .. }
        | NodeRequest::LocationRemove { .. }
        | NodeRequest::ImageScrub { .. }
        | NodeRequest::ImageSync { .. }
        | NodeRequest::ImageSet { .. }
        | NodeRequest::ReplicaPrepare(_)
        | NodeRequest::ReplicaForget { .. }
        | NodeRequest::ImageResize { .. } => true,
        NodeRequest::ImageExport { .. }
        | NodeRequest::ImageMap { .. }
        | NodeRequest::ImagePrewarm { .. }
        | NodeRequest::ImageList
        | NodeRequest::JobShow { .. }
        | NodeRequest::JobList
        | NodeRequest::JobPause { .. }
        | NodeRequest::JobCancel { .. }
        | NodeRequest::NodeShow
        | NodeRequest::Health => false,
    }
}

/// Whether a request is to put a new image on this node.
fn makes_images(request: &NodeRequest) -> bool {
    matches!(
        request,
        NodeRequest::ImageCreate { .. } | NodeRequest::ImageImport { .. } | NodeRequest::ImageClone { .. }
    )
}

/// Where peers reach this node's NBD server.
pub fn peer_address(node: &Node) -> String {
    match &node.config.peer_listen {
        Some(address) => address.clone(),
        None => format!("unix:{}", node.config.socket.display()),
    }
}

/// The event that says an image of this store exists.
pub fn created(node: &Node, meta: &ImageMeta) -> Event {
    Event::ImageCreated(ImageCreated {
        image: meta.id,
        name: meta.name.clone(),
        size: ByteLen(meta.size),
        block_size: ByteLen(meta.block_size),
        layers: meta.stack.clone(),
        parent: meta.parent.as_ref().map(|p| (p.image, p.snapshot.clone())),
        node: node.config.id.clone(),
        set_version: SET_VERSION,
        members: Default::default(),
    })
}
