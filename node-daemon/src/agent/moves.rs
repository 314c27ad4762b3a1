//! Carries out what the scheduler orders about replicas, and has it know how many are wanted.
//!
//! The owner looks again at what an order rests on: an order that was overtaken changes nothing.

use std::sync::Arc;

use hearth_protocol::limits::REPLICAS_MAX;
use hearth_protocol::record::{Extent, Record, Run};
use hearth_protocol::rpc::{Answer, Failure, FailureKind, NodeReply, Pace};
use hearth_protocol::{Epoch, Event, ImageId, ImageName, NodeId};
use hearth_replication::session::Session;

use super::node::failed;
use super::requests::Requests;
use crate::replica::Replica;

impl Requests {
    /// Begins to have one more node hold an image, as the scheduler ordered.
    ///
    /// # Errors
    /// This node does not own the image at that epoch, or the other node cannot.
    pub(super) async fn replicate(
        &self,
        image: ImageId,
        epoch: Epoch,
        to: NodeId,
        blocks: Option<Extent>,
    ) -> Result<(), Failure> {
        let replica = self.owned_at(image, epoch)?;
        let name = replica.shape().name.clone();
        let end = replica.shape().end();
        let blocks = blocks.map(|extent| (extent.first, extent.last.min(end)));
        self.clone()
            .add_location(name, to, blocks, Pace::Gentle)
            .await
            .map(drop)
    }

    /// The image's replicas, if this node owns it at that epoch.
    fn owned_at(&self, image: ImageId, epoch: Epoch) -> Result<Arc<Replica>, Failure> {
        let at = |session: &Session| session.owner().is_some_and(|owner| owner.record().epoch() == epoch);
        let replica = self.replica(image).filter(|replica| replica.look(at));
        replica.ok_or_else(|| failed(format!("this node does not own image {image} at epoch {epoch}")))
    }

    /// Takes a node's copy of an image away, as the scheduler ordered; a copy that is gone already is no failure.
    ///
    /// # Errors
    /// This node does not own the image at that epoch, is that node itself, or some block would have fewer members than
    /// `keep`, or than the log says are wanted by now.
    pub(super) async fn drop_replica(
        &self,
        image: ImageId,
        epoch: Epoch,
        from: NodeId,
        keep: u64,
    ) -> Result<(), Failure> {
        let replica = self.owned_at(image, epoch)?;
        if from == self.node.config.id {
            return Err(failed(format!("image {image} is served here, so its copy here stays")));
        }
        let wanted = self.link.facts().wanted(image).unwrap_or(keep);
        let may_go = replica.look(|session| match session.record() {
            Some(record) if record.everyone().contains(&from) => Ok(leaves(record, &from, keep.max(wanted).max(1))),
            Some(_) => Err(()),
            None => Ok(false),
        });
        match may_go {
            Err(()) => Ok(()),
            Ok(false) => Err(failed(format!(
                "without {from}, some block of image {image} has fewer members in sync than wanted"
            ))),
            Ok(true) => {
                let name = replica.shape().name.clone();
                self.clone().remove_location(name, from).await.map(drop)
            }
        }
    }

    /// Sets how many replicas an image is to have; the scheduler sees to it.
    pub(super) async fn set_replicas(self, image: ImageName, replicas: u64) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        if self.replica(meta.id).is_none() {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!("{image} has no replicas: this node alone holds it"),
                "images get replicas when they are created: hearth image create --replicas 2",
            ));
        }
        if !(1..=REPLICAS_MAX).contains(&replicas) {
            return Err(Failure::new(
                FailureKind::Usage,
                format!("an image has 1 to {REPLICAS_MAX} replicas, not {replicas}"),
                "",
            ));
        }
        let event = Event::ReplicasSet {
            image: meta.id,
            wanted: replicas,
        };
        let seq = self.link.publish_image(meta.id, &event).await?;
        Ok(NodeReply::Done { seq: Some(seq) })
    }
}

/// Whether every run of a record has so many members without a node.
fn leaves(record: &Record, without: &NodeId, members: u64) -> bool {
    let left = |run: &Run| run.members.iter().filter(|member| *member != without).count() as u64;
    record.runs().iter().all(|run| left(run) >= members)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use hearth_protocol::record::Stamp;
    use hearth_protocol::{BlockIndex, LeaseId, SetVersion};

    use super::*;

    #[test]
    fn every_run_has_to_keep_enough_members() {
        let nodes = |names: &str| -> BTreeSet<NodeId> { names.split(' ').map(|name| name.parse().unwrap()).collect() };
        let run = |first, members: &str| Run {
            first: BlockIndex(first),
            members: nodes(members),
            joiners: BTreeSet::new(),
        };
        let stamp = Stamp {
            epoch: Epoch(1),
            lease: LeaseId(1),
            set_version: SetVersion(1),
        };
        let record = Record::new(stamp, vec![run(0, "a b c"), run(8, "a c")]).unwrap();
        let check = |without: &str, members, expect| {
            assert_eq!(
                leaves(&record, &without.parse().unwrap(), members),
                expect,
                "{without}, {members}"
            );
        };
        check("b", 2, true);
        check("c", 2, false);
        check("c", 1, true);
        check("d", 2, true);
        check("d", 3, false);
    }
}
