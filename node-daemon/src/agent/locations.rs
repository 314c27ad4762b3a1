//! Answers requests about images with replicas: creating them, owning them, adding and removing nodes.
//!
//! What has to be agreed between nodes is agreed by `hearth-replication` over the log; here it is asked for and waited for.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use hearth_bus::rpc;
use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::event::ImageCreated;
use hearth_protocol::record::{Extent, Nodes};
use hearth_protocol::rpc::{
    Answer, Asked, AttachHow, ExportKind, Failure, FailureKind, JobKind, NodeReply, NodeRequest, Pace, ReplicaSpec,
    SchedulerReply, SchedulerRequest,
};
use hearth_protocol::{
    BlockIndex, ByteLen, Epoch, Event, ImageId, ImageName, LayerId, LeaseId, NodeId, SetVersion, subject,
};
use hearth_replication::member::Durable;
use hearth_replication::owner::Denial;
use hearth_replication::session::{Input, Session};
use hearth_replication::takeover::Setback;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::jobs::Wish;
use super::node::{failed, store_failure};
use super::pace::Pacer;
use super::requests::Requests;
use crate::config::SLOWEST_MOVE;
use crate::replica::{Notice, Replica};
use crate::store::incarnation::random_id;
use crate::store::{ImageMeta, NewReplica, StoreError};

/// How long another node or the scheduler may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long an ownership is tried for: a node that dies meanwhile is noticed in three seconds, leases end in four.
const TAKE_WITHIN: Duration = Duration::from_secs(30);
/// Pause before an ownership is tried for again.
const TAKE_AGAIN: Duration = Duration::from_millis(300);
/// How often a job looks how far a node is.
const LOOK: Duration = Duration::from_millis(100);

fn of_spec(spec: &ReplicaSpec) -> NewReplica {
    NewReplica {
        image: spec.image,
        name: spec.name.clone(),
        size: spec.size.0,
        block_size: spec.block_size.0,
        layer: spec.layer,
        durable: spec.record.as_ref().map(|record| Durable {
            record: Some(Arc::new(record.clone())),
            sealed: None,
        }),
    }
}

/// What an image with replicas cannot do.
pub(super) fn not_with_replicas(image: &ImageName, what: &str) -> Failure {
    Failure::new(
        FailureKind::NotSupported,
        format!("{image} has replicas, and an image with replicas cannot be {what}"),
        format!("copy it into an image without: attach it, then nbdcopy its export; see hearth image show {image}"),
    )
}

impl Requests {
    /// The image's replicas, if it has any.
    pub(super) fn replica(&self, image: ImageId) -> Option<Arc<Replica>> {
        self.node.replicas.get(image)
    }

    /// Refuses what an image with replicas cannot do.
    pub(super) fn only_alone(&self, meta: &ImageMeta, what: &str) -> Result<(), Failure> {
        match self.replica(meta.id) {
            Some(_) => Err(not_with_replicas(&meta.name, what)),
            None => Ok(()),
        }
    }

    /// Creates an empty image that several nodes hold.
    pub(super) async fn create_replicas(
        self,
        name: ImageName,
        size: ByteLen,
        block_size: ByteLen,
        replicas: u64,
    ) -> Answer<NodeReply> {
        self.name_is_free(&name)?;
        let members = self.place(replicas).await?;
        let fresh = || random_id().map_err(|error| failed(format!("drawing an id: {error}")));
        let (image, layer) = (ImageId(fresh()?), LayerId(fresh()?));
        let set_version = SetVersion(1);
        let first = Aggregate::new(set_version, members.clone()).map_err(|error| failed(error.to_string()))?;
        let spec = ReplicaSpec {
            image,
            name: name.clone(),
            size,
            block_size,
            layer,
            record: Some((*first.record).clone()),
        };
        let created = Event::ImageCreated(ImageCreated {
            image,
            name,
            size,
            block_size,
            layers: vec![layer],
            parent: None,
            node: self.node.config.id.clone(),
            set_version,
            members: members.clone(),
        });
        let made = match self.prepare_all(&members, &spec).await {
            Ok(()) => self.link.publish_image(image, &created).await,
            Err(failure) => Err(failure),
        };
        match made {
            Ok(_) => {}
            // It may be in the log: then it is an image.
            Err(failure) if failure.kind == FailureKind::Timeout => return Err(failure),
            Err(failure) => {
                self.forget_all(&members, image).await;
                return Err(failure);
            }
        }
        let meta = self.node.store.image(image).map_err(|e| store_failure(&e))?;
        Ok(NodeReply::Image(self.info(&meta)))
    }

    /// Asks the scheduler which nodes are to hold a new image.
    async fn place(&self, replicas: u64) -> Result<Nodes, Failure> {
        let near = self.node.config.id.clone();
        let asked = SchedulerRequest::Place { near, replicas };
        match rpc::request(self.link.bus(), subject::SCHEDULER_RPC, &asked, ANSWER).await {
            Ok(SchedulerReply::Placed { nodes }) => Ok(nodes.into_iter().collect()),
            Ok(_) => Err(failed("the scheduler answered something else than was asked".into())),
            Err(mut failure) if failure.kind == FailureKind::CannotConnect => {
                failure.message = "no leading scheduler answers, and it chooses the nodes of a new image".into();
                failure.hint = "start one (hearth-scheduler), or create the image with one replica".into();
                Err(failure)
            }
            Err(failure) => Err(failure),
        }
    }

    async fn prepare_all(&self, members: &Nodes, spec: &ReplicaSpec) -> Result<(), Failure> {
        for node in members {
            self.ask_node(node, NodeRequest::ReplicaPrepare(spec.clone())).await?;
        }
        Ok(())
    }

    async fn forget_all(&self, members: &Nodes, image: ImageId) {
        for node in members {
            if let Err(failure) = self.ask_node(node, NodeRequest::ReplicaForget { image }).await {
                tracing::warn!(%node, %image, %failure, "an empty copy stays behind until that node starts again");
            }
        }
    }

    /// Asks a node, this one included.
    pub(super) async fn ask_node(&self, node: &NodeId, request: NodeRequest) -> Result<NodeReply, Failure> {
        if *node == self.node.config.id {
            return match request {
                NodeRequest::ReplicaPrepare(spec) => self.prepare_replica(spec).await,
                NodeRequest::ReplicaForget { image } => self.forget_replica(image).await,
                other => Err(failed(format!("a node does not ask itself for {other:?}"))),
            };
        }
        let asked = Asked {
            request,
            reason: String::new(),
        };
        rpc::request(self.link.bus(), subject::node_rpc(node), &asked, ANSWER)
            .await
            .map_err(|mut failure: Failure| {
                failure.message = format!("node {node}: {}", failure.message);
                failure
            })
    }

    /// Makes an empty copy here.
    pub(super) async fn prepare_replica(&self, spec: ReplicaSpec) -> Answer<NodeReply> {
        self.blocking(move |node| {
            node.replicas
                .prepare(&of_spec(&spec))
                .map_err(|error| store_failure(&error))
        })
        .await?;
        Ok(NodeReply::Done { seq: None })
    }

    /// Gives up a copy of an image that did not come to be: nobody ever owned it.
    pub(super) async fn forget_replica(&self, image: ImageId) -> Answer<NodeReply> {
        if self.link.facts().image(image).is_some() {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("the log knows image {image}"),
                "delete it: hearth image delete",
            ));
        }
        self.blocking(move |node| match node.replicas.get(image) {
            Some(replica) if replica.look(never_owned) => {
                node.replicas.remove(image);
                replica.forget().map_err(|error| store_failure(&error))
            }
            Some(_) => Err(failed(format!("image {image} was owned, so its copy stays"))),
            None => Ok(()),
        })
        .await?;
        Ok(NodeReply::Done { seq: None })
    }

    /// The image, to be served here. Of one with replicas on other nodes, an empty store is made: reads go to those nodes,
    /// writes to all of them, and once this node is to hold a copy too, it is filled.
    pub(super) async fn find_to_serve(&self, name: &ImageName) -> Result<ImageMeta, Failure> {
        let missing = match self.find(name) {
            Ok(meta) => return Ok(meta),
            Err(failure) => failure,
        };
        let me = &self.node.config.id;
        let spec = {
            let facts = self.link.facts();
            let known = facts
                .image_named(name)
                .filter(|(_, image)| !image.created.members.is_empty());
            let Some((image, known)) = known.filter(|_| missing.kind == FailureKind::NotFound) else {
                return Err(missing);
            };
            let created = &known.created;
            let layer = *created.layers.first().ok_or(missing)?;
            ReplicaSpec {
                image,
                name: name.clone(),
                size: created.size,
                block_size: created.block_size,
                layer,
                record: None,
            }
        };
        if self.link.facts().drains(me) {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("node {me} drains, and it holds no copy of {name}"),
                format!("choose another one with --node, or hearth node undrain {me}"),
            ));
        }
        let image = spec.image;
        self.prepare_replica(spec).await?;
        self.node.store.image(image).map_err(|error| store_failure(&error))
    }

    /// Owns an image with replicas and serves it here.
    pub(super) async fn attach_replicas(
        self,
        replica: Arc<Replica>,
        export: ExportKind,
        how: AttachHow,
    ) -> Answer<NodeReply> {
        let (image, name) = (replica.image(), replica.shape().name.clone());
        let me = &self.node.config.id;
        let owner = self.owner_of(image);
        if let Some(owner) = owner.filter(|owner| owner != me)
            && how == AttachHow::Plain
        {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("image {name} is attached on {owner}"),
                format!("detach it there, or if {owner} is gone: hearth image attach {name} --node {me} --takeover"),
            ));
        }
        self.say_why(image, Some(self.link.reason().to_owned()));
        let owned = match how {
            AttachHow::AcceptDataLoss => self.own_by_force(&replica).await,
            _ => self.own(&replica).await,
        };
        self.say_why(image, None);
        let (epoch, lease) = owned?;
        let attached = self
            .blocking(move |node| node.attach(image, epoch, lease, export))
            .await;
        if let Err(failure) = attached {
            self.disown(&replica, epoch).await?;
            return Err(failure);
        }
        let meta = self.node.store.image(image).map_err(|e| store_failure(&e))?;
        Ok(NodeReply::Image(self.info(&meta)))
    }

    /// What an operator said of the ownership being taken, for the event that begins it; `None` when it is decided.
    fn say_why(&self, image: ImageId, reason: Option<String>) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) => words.insert(image, reason),
            None => words.remove(&image),
        };
    }

    /// Who owns an image, as the log says.
    pub(super) fn owner_of(&self, image: ImageId) -> Option<NodeId> {
        let facts = self.link.facts();
        let known = facts.validity().image(image)?;
        known.owner.as_ref().map(|(node, _)| node.clone())
    }

    /// Becomes the owner; tries again while members come and go and the owner of before does. Of two others that begin at
    /// the same time the first one in the log goes on and the other one gives up: were both to try again, each would end
    /// what the other began, for ever.
    pub(super) async fn own(&self, replica: &Arc<Replica>) -> Result<(Epoch, LeaseId), Failure> {
        self.own_as(replica, |lease| Input::Take { lease }).await
    }

    /// Becomes the owner from this node's copy alone, as an operator accepted.
    async fn own_by_force(&self, replica: &Arc<Replica>) -> Result<(Epoch, LeaseId), Failure> {
        let owned = self.own_as(replica, |lease| Input::Force { lease }).await?;
        tracing::error!(
            image = %replica.shape().name, epoch = %owned.0,
            "taken over by force: writes that this node's copy does not have are given up"
        );
        Ok(owned)
    }

    async fn own_as(&self, replica: &Arc<Replica>, input: fn(LeaseId) -> Input) -> Result<(Epoch, LeaseId), Failure> {
        let name = &replica.shape().name;
        let deadline = Instant::now() + TAKE_WITHIN;
        let expected = [self.owner_of(replica.image()), Some(self.node.config.id.clone()), None];
        loop {
            let lease = LeaseId(hearth_bus::new_incarnation().0);
            let setback = match self.take(replica, lease, input(lease), deadline).await? {
                Ok(epoch) => return Ok((epoch, lease)),
                Err(setback) => setback,
            };
            let kind = match setback {
                Setback::Overtaken => FailureKind::Conflict,
                _ => FailureKind::Refused,
            };
            let again = match setback {
                Setback::MemberLost { .. } => true,
                Setback::Overtaken => expected.contains(&self.owner_of(replica.image())),
                _ => false,
            };
            if !again || Instant::now() > deadline {
                let me = &self.node.config.id;
                let hint = match setback {
                    Setback::NoMember { .. } | Setback::InDoubt { .. } => format!(
                        "start those nodes; only if they are gone for good, give up what this node's copy does not have: \
                         hearth image attach {name} --node {me} --takeover --accept-data-loss"
                    ),
                    _ => format!("see who holds it: hearth image map {name}"),
                };
                let message = format!("{name} cannot be attached here: {setback}");
                return Err(Failure::new(kind, message, hint));
            }
            tracing::info!(image = %name, %setback, "not the owner yet; trying again");
            tokio::time::sleep(TAKE_AGAIN).await;
        }
    }

    async fn take(
        &self,
        replica: &Arc<Replica>,
        lease: LeaseId,
        input: Input,
        deadline: Instant,
    ) -> Result<Result<Epoch, Setback>, Failure> {
        let mut notices = self.node.replicas.notices();
        let image = replica.image();
        let taking = Arc::clone(replica);
        self.blocking(move |_| {
            taking.step(input);
            Ok(())
        })
        .await?;
        loop {
            let noticed = tokio::time::timeout_at(deadline.into(), notices.recv()).await;
            let grant = replica.look(|session| session.owner().map(|owner| owner.record().grant()));
            match (grant, noticed) {
                (Some((epoch, of)), _) if of == lease => return Ok(Ok(epoch)),
                (_, Ok(Ok((of, Notice::GivenUp(setback))))) if of == image => return Ok(Err(setback)),
                (_, Ok(Ok(_) | Err(RecvError::Lagged(_)))) => {}
                (_, Err(_) | Ok(Err(RecvError::Closed))) => {
                    replica.step(Input::Seal { to: None });
                    return Err(Failure::new(
                        FailureKind::Timeout,
                        format!("{} could not be owned within {TAKE_WITHIN:?}", replica.shape().name),
                        "are NATS and the image's other nodes there? hearth node list",
                    ));
                }
            }
        }
    }

    /// Ends an ownership whose image could not be served.
    pub(super) async fn disown(&self, replica: &Arc<Replica>, epoch: Epoch) -> Result<(), Failure> {
        let image = replica.image();
        let ending = Arc::clone(replica);
        self.blocking(move |_| super::node::seal(&ending)).await?;
        self.link
            .publish_image(image, &Event::ImageDetached { image, epoch })
            .await?;
        Ok(())
    }

    /// The image's replicas, if this node owns it.
    pub(super) fn owned(&self, image: &ImageName) -> Result<Arc<Replica>, Failure> {
        let meta = self.find(image)?;
        let Some(replica) = self.replica(meta.id) else {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!("{image} has no replicas: this node alone holds it"),
                "images get replicas when they are created: hearth image create --replicas 2",
            ));
        };
        if replica.look(|session| session.is_open()) {
            return Ok(replica);
        }
        Err(Failure::new(
            FailureKind::Refused,
            format!("{image} is not attached here, and its owner is who changes its locations"),
            format!("attach it first: hearth image attach {image}"),
        ))
    }

    /// Has one more node hold an image, as a job.
    pub(super) async fn add_location(
        self,
        image: ImageName,
        node: NodeId,
        blocks: Option<(BlockIndex, BlockIndex)>,
        pace: Pace,
    ) -> Answer<NodeReply> {
        let replica = self.owned(&image)?;
        if matches!(pace, Pace::AtMost(rate) if rate < SLOWEST_MOVE) {
            return Err(Failure::new(
                FailureKind::Usage,
                format!("a copy of less than {} per second would never end", SLOWEST_MOVE.iec()),
                "",
            ));
        }
        let end = replica.shape().end();
        let (first, last) = blocks.unwrap_or((BlockIndex(0), end));
        if first > last || last > end {
            return Err(Failure::new(
                FailureKind::Usage,
                format!("{image} has blocks 0 to {end}, not {first} to {last}"),
                "",
            ));
        }
        if self.link.facts().drains(&node) {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("node {node} drains, so it gets no replicas"),
                format!("choose another one, or hearth node undrain {node}"),
            ));
        }
        let extent = Extent { first, last };
        let record = replica.look(|session| session.record().cloned());
        if record.is_some_and(|record| record.holds(&node, extent)) {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("{node} holds these blocks of {image} already"),
                format!("hearth location list {image}"),
            ));
        }
        let shape = replica.shape();
        let spec = ReplicaSpec {
            image: replica.image(),
            name: shape.name.clone(),
            size: ByteLen(shape.size),
            block_size: ByteLen(shape.block_size),
            layer: shape.layer,
            record: None,
        };
        self.ask_node(&node, NodeRequest::ReplicaPrepare(spec)).await?;
        let mut notices = self.node.replicas.notices();
        let total = (last.0 - first.0 + 1).saturating_mul(shape.block_size);
        let joining = node.clone();
        let id = replica.image();
        let (links, most) = (Arc::clone(&self.node.links), self.node.config.move_bytes_per_second.0);
        let (name, what) = (image.clone(), format!("have {node} hold {image}"));
        let job = self.jobs.start_working(JobKind::Join, name, what, move |working| {
            let mut pacer = Pacer::new(Arc::clone(&replica), joining.clone(), pace, links, most);
            replica.step(Input::Join {
                node: joining.clone(),
                extent,
                end,
                blocks: pacer.blocks(),
                allowed: pacer.first(),
            });
            let mut cancelled = false;
            let mut paused = false;
            let deny = |denial: Denial| {
                Err(Failure::new(
                    FailureKind::Refused,
                    format!("{joining} does not hold {image}: {denial}"),
                    format!("hearth location list {image}"),
                ))
            };
            loop {
                match notices.try_recv() {
                    Ok((of, Notice::Joined(node))) if of == id && node == joining => {
                        working.report(total, total);
                        return Ok(());
                    }
                    Ok((of, Notice::NotChanged(node, denial))) if of == id && node == joining => {
                        if cancelled {
                            forget_joiner(&replica, &joining);
                        }
                        return deny(denial);
                    }
                    Ok((of, Notice::Ended(denial))) if of == id => return deny(denial),
                    Ok(_) | Err(TryRecvError::Lagged(_)) => continue,
                    Err(TryRecvError::Empty | TryRecvError::Closed) => {}
                }
                let copied = replica.look(|session| session.owner().and_then(|owner| owner.copied_up_to()));
                let done = copied.map_or(0, |block| block.0.saturating_sub(first.0));
                let done = done.saturating_mul(replica.shape().block_size).min(total);
                let wish = working.report(done, total);
                if !paused {
                    pacer.step(done, LOOK);
                }
                if wish == Wish::Cancel && !cancelled {
                    cancelled = true;
                    replica.step(Input::Cancel(joining.clone()));
                }
                if (wish == Wish::Pause) != paused && !cancelled {
                    paused = !paused;
                    replica.step(Input::Pause(paused));
                }
                let held = replica.look(|session| session.record().is_some_and(|r| r.holds(&joining, extent)));
                if held {
                    return Ok(());
                }
            }
        });
        Ok(NodeReply::Job(job))
    }

    /// Takes a node's copy of an image away.
    pub(super) async fn remove_location(self, image: ImageName, node: NodeId) -> Answer<NodeReply> {
        let replica = self.owned(&image)?;
        let id = replica.image();
        let holds = |replica: &Replica| {
            replica.look(|session| session.record().is_some_and(|record| record.everyone().contains(&node)))
        };
        if !holds(&replica) {
            return Err(Failure::new(
                FailureKind::NotFound,
                format!("{node} holds nothing of {image}"),
                format!("hearth location list {image}"),
            ));
        }
        let mut notices = self.node.replicas.notices();
        let (leaving, stepped) = (node.clone(), Arc::clone(&replica));
        self.blocking(move |_| {
            stepped.step(Input::Leave(leaving));
            Ok(())
        })
        .await?;
        let deadline = tokio::time::Instant::now() + ANSWER;
        loop {
            match tokio::time::timeout_at(deadline, notices.recv()).await {
                Ok(Ok((of, Notice::NotChanged(other, denial)))) if of == id && other == node => {
                    return Err(Failure::new(
                        FailureKind::Refused,
                        format!("{node} keeps its copy of {image}: {denial}"),
                        format!("hearth location list {image}"),
                    ));
                }
                Ok(Ok(_) | Err(RecvError::Lagged(_))) if holds(&replica) => {}
                Ok(_) => return Ok(NodeReply::Done { seq: None }),
                Err(_) => {
                    return Err(Failure::new(
                        FailureKind::Timeout,
                        format!("{node} did not leave the set of {image} in time"),
                        "look before you repeat it: hearth location list",
                    ));
                }
            }
        }
    }

    /// Deletes an image with replicas: once the log says so, every node removes its copy.
    pub(super) async fn delete_replicas(&self, replica: &Replica) -> Answer<NodeReply> {
        let image = replica.image();
        if let Some(owner) = self.owner_of(image) {
            let name = &replica.shape().name;
            let mut failure = store_failure(&StoreError::Attached(name.to_string()));
            failure.hint = format!("hearth image detach {name} --node {owner}");
            return Err(failure);
        }
        let seq = self.link.publish_image(image, &Event::ImageDeleted { image }).await?;
        Ok(NodeReply::Done { seq: Some(seq) })
    }
}

/// Has a node whose join was cancelled delete what it got, once the smaller set is in force. Where that takes too long, the
/// half copy stays behind: it counts for nothing, and the node's next join begins with it.
fn forget_joiner(replica: &Replica, joiner: &NodeId) {
    let deadline = Instant::now() + ANSWER;
    let is_out = |session: &Session| {
        let owner = session.owner();
        owner.is_none_or(|owner| !owner.is_changing() && !owner.record().everyone().contains(joiner))
    };
    while !replica.look(is_out) {
        if Instant::now() > deadline {
            return tracing::warn!(image = %replica.shape().name, node = %joiner, "a half copy stays behind");
        }
        std::thread::sleep(LOOK);
    }
    replica.step(Input::Leave(joiner.clone()));
}

/// Whether an image was never owned, as its record here says: then nothing was ever written to it.
pub(super) fn never_owned(session: &Session) -> bool {
    session.record().is_none_or(|record| record.epoch() == Epoch(0))
}
