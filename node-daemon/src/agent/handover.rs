//! Live migration of an image with replicas: the destination attaches it `--incoming`, and the source hands it over while
//! its guest stands still (QEMU's `pre-switchover`). The decision is the next epoch in the log; until it is there, the
//! source can have the image back under a later one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hearth_protocol::rpc::{Answer, ExportKind, Failure, FailureKind, JobKind, MapRun, NodeReply, NodeRequest};
use hearth_protocol::{ImageId, ImageName, LeaseId, NodeId};
use hearth_replication::session::{Input, Session};

use super::node::{failed, store_failure};
use super::requests::Requests;
use crate::disk::Disk;
use crate::replica::Replica;

/// How long a destination may take to own what was sealed for it, before the source takes it back. A guest stands still
/// meanwhile.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(5);

/// How much longer a source may drain: a member that does not answer is given up after three seconds, and the log and the
/// other members have to take that.
const DRAINED_WITHIN: Duration = Duration::from_secs(10);
/// Pause between two looks at that.
const LOOK: Duration = Duration::from_millis(20);

/// Bytes that are warmed between two looks at whether the job goes on.
const WARM_BYTES: u64 = 1 << 20;

/// What of a map is in RAM, as byte ranges (offset, length) of at most [`WARM_BYTES`], no more than `room` in all.
fn warmed(runs: &[MapRun], block_size: u64, size: u64, room: u64) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut left = room;
    for run in runs.iter().filter(|run| run.tier == "ram") {
        let mut at = run.first.0 * block_size;
        let end = ((run.first.0 + run.count) * block_size).min(size);
        while at < end && left > 0 {
            let length = WARM_BYTES.min(end - at).min(left);
            ranges.push((at, length));
            at += length;
            left -= length;
        }
    }
    ranges
}

impl Requests {
    /// Serves an image that another node owns, as the destination of a migration: reads go through to the owner, writes
    /// are held until it has handed over.
    pub(super) async fn attach_incoming(self, replica: Arc<Replica>, export: ExportKind) -> Answer<NodeReply> {
        let (image, name) = (replica.image(), replica.shape().name.clone());
        let me = self.node.config.id.clone();
        match self.owner_of(image) {
            Some(owner) if owner != me => {}
            _ => {
                return Err(Failure::new(
                    FailureKind::Refused,
                    format!("no other node owns {name}, so nobody will hand it over"),
                    format!("hearth image attach {name} --node {me}"),
                ));
            }
        }
        let lease = LeaseId(hearth_bus::new_incarnation().0);
        let incoming = Arc::clone(&replica);
        self.blocking(move |node| {
            incoming.step(Input::Incoming { lease });
            node.attach_incoming(&incoming, lease, export)
        })
        .await?;
        let meta = self.node.store.image(image).map_err(|e| store_failure(&e))?;
        Ok(NodeReply::Image(self.info(&meta)))
    }

    /// Brings into this node's RAM what the owner has in RAM, as a job. It is read from this node's own copy, and every
    /// later write of the owner passes by here: so it is still true when the image is handed over.
    pub(super) async fn prewarm(self, image: ImageName) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        let me = self.node.config.id.clone();
        let owner = self.owner_of(meta.id).filter(|owner| *owner != me);
        let holds = |replica: &Arc<Replica>| {
            let me = &self.node.config.id;
            let of = |session: &Session| {
                session
                    .aggregate()
                    .record
                    .runs()
                    .iter()
                    .all(|run| run.members.contains(me))
            };
            replica.look(of)
        };
        let copy = self.replica(meta.id).filter(holds).and_then(|replica| replica.copy());
        let (Some(owner), Some(copy)) = (owner, copy) else {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("{me} is no node that holds {image} while another serves it, so there is nothing to prewarm"),
                format!("hearth image show {image}"),
            ));
        };
        let asked = NodeRequest::ImageMap { image: image.clone() };
        let NodeReply::Map { runs } = self.ask_node(&owner, asked).await? else {
            return Err(failed(format!("{owner} answered something else than a map of {image}")));
        };
        let warm = warmed(&runs, meta.block_size, meta.size, copy.volume.warmable_bytes());
        let total: u64 = warm.iter().map(|(_, length)| length).sum();
        let job = self.jobs.start(
            JobKind::Prewarm,
            image.clone(),
            format!("prewarm {image} with what {owner} has in RAM"),
            move |progress| {
                let mut done = 0;
                for (offset, length) in warm {
                    if !progress(done, total) {
                        return Err(failed("it was stopped".into()));
                    }
                    let cached = copy.volume.cache(offset, length);
                    cached.map_err(|error| failed(format!("{image} cannot be read here: {error}")))?;
                    done += length;
                }
                progress(done, total);
                Ok(())
            },
        );
        Ok(NodeReply::Job(job))
    }

    /// Hands an image over to the node that attached it `--incoming`. If that does not become the owner, this node owns it
    /// again. What an earlier one left undone is done by the next: so whoever repeats it comes to an end.
    pub(super) async fn hand_over(self, image: ImageName, to: NodeId) -> Answer<NodeReply> {
        let id = self.find(&image)?.id;
        let Some(_alone) = Alone::begin(&self.handing_over, id) else {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("a hand-over of {image} is under way"),
                format!("wait for its end: hearth image show {image}"),
            ));
        };
        let replica = self.owned_or_left(&image).await?;
        if to == self.node.config.id {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("{to} is no other node"),
                format!("hearth location list {image}"),
            ));
        }
        let (sealing, destination) = (Arc::clone(&replica), to.clone());
        self.blocking(move |_| {
            sealing.step(Input::Seal { to: Some(destination) });
            Ok(())
        })
        .await?;
        if self.is_owned_by(id, &to, HAND_OVER_WITHIN).await || self.is_drained_to(&replica, &to).await? {
            self.node.detach(id, &self.connections).await?;
            return Ok(NodeReply::Done { seq: None });
        }
        // The next epoch is this node's, unless the destination's is in the log by then.
        let why = format!("{to} did not take {image} within {HAND_OVER_WITHIN:?}");
        match self.own_again(&replica).await {
            Ok(()) => Err(Failure::new(
                FailureKind::Timeout,
                format!("{why}; this node serves it as before"),
                format!("is it attached there? hearth image attach {image} --node {to} --incoming"),
            )),
            Err(_) if self.owner_of(id).as_ref() == Some(&to) => {
                self.node.detach(id, &self.connections).await?;
                Ok(NodeReply::Done { seq: None })
            }
            Err(failure) => Err(Failure::new(
                failure.kind,
                format!("{why}, and this node cannot own it again: {failure}"),
                format!("hand it over again, or hearth image attach {image} --node NODE --takeover"),
            )),
        }
    }

    /// The image's replicas, if this node owns it; also where an earlier hand-over ended with the image at nobody's.
    async fn owned_or_left(&self, image: &ImageName) -> Result<Arc<Replica>, Failure> {
        let failure = match self.owned(image) {
            Ok(replica) => return Ok(replica),
            Err(failure) => failure,
        };
        let id = self.find(image)?.id;
        let is_served = self.node.served.get(id).is_some_and(|served| !served.incoming);
        let is_left = is_served && self.owner_of(id).as_ref() == Some(&self.node.config.id);
        let Some(replica) = self.replica(id).filter(|_| is_left) else {
            return Err(failure);
        };
        // One that drains still is told to whom it goes.
        if replica.look(|session| session.owner().is_none()) {
            self.own_again(&replica).await?;
        }
        Ok(replica)
    }

    /// Owns what is served here and was sealed.
    async fn own_again(&self, replica: &Arc<Replica>) -> Result<(), Failure> {
        let (epoch, lease) = self.own(replica).await?;
        let image = replica.image();
        self.blocking(move |node| node.opened(image, epoch, lease)).await
    }

    /// Where a member that does not answer holds up the seal: waits until it has left the set, and then for the destination.
    async fn is_drained_to(&self, replica: &Arc<Replica>, to: &NodeId) -> Result<bool, Failure> {
        let began = Instant::now();
        let drains = || replica.look(|session| session.owner().is_some());
        if !drains() {
            return Ok(false);
        }
        while drains() {
            if began.elapsed() > DRAINED_WITHIN {
                let name = &replica.shape().name;
                return Err(Failure::new(
                    FailureKind::Timeout,
                    format!("{name} is handed over to {to} as soon as its members answer or have left its set"),
                    format!("are NATS and its nodes there? hearth node list; then hand it over again: {name}"),
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(self.is_owned_by(replica.image(), to, HAND_OVER_WITHIN).await)
    }

    async fn is_owned_by(&self, image: ImageId, node: &NodeId, within: Duration) -> bool {
        let mut progress = self.link.progress();
        let read = progress.wait_for(|_| self.owner_of(image).as_ref() == Some(node));
        tokio::time::timeout(within, read).await.is_ok()
    }
}

/// The only hand-over of an image under way.
struct Alone {
    all: Arc<Mutex<BTreeSet<ImageId>>>,
    image: ImageId,
}

impl Alone {
    fn begin(all: &Arc<Mutex<BTreeSet<ImageId>>>, image: ImageId) -> Option<Self> {
        let is_first = all.lock().unwrap_or_else(PoisonError::into_inner).insert(image);
        let all = Arc::clone(all);
        is_first.then_some(Self { all, image })
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.image);
    }
}

#[cfg(test)]
mod tests {
    use hearth_protocol::BlockIndex;

    use super::*;

    #[test]
    fn what_is_in_ram_is_warmed_up_to_the_room() {
        let run = |first, count, tier: &str| MapRun {
            first: BlockIndex(first),
            count,
            layer: None,
            tier: tier.into(),
        };
        let runs = [
            run(0, 2, "disk"),
            run(2, 17, "ram"),
            run(19, 1, "hole"),
            run(20, 1, "ram"),
        ];
        let (block, size) = (1 << 16, 20 * (1 << 16) + 4096);
        let all = warmed(&runs, block, size, u64::MAX);
        assert_eq!(
            all,
            [(2 * block, WARM_BYTES), (18 * block, block), (20 * block, 4096)],
            "the last block is only as long as the image"
        );
        let some = warmed(&runs, block, size, WARM_BYTES + 8192);
        assert_eq!(some, [(2 * block, WARM_BYTES), (18 * block, 8192)]);
        assert_eq!(warmed(&runs, block, size, 0), []);
    }
}
