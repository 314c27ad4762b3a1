//! Live migration of an image with replicas: the destination attaches it `--incoming`, and the source hands it over while
//! its guest stands still (QEMU's `pre-switchover`). The decision is the next epoch in the log; until it is there, the
//! source can have the image back under a later one.

use std::sync::Arc;
use std::time::Duration;

use hearth_protocol::rpc::{Answer, ExportKind, Failure, FailureKind, NodeReply};
use hearth_protocol::{ImageId, ImageName, LeaseId, NodeId};
use hearth_replication::session::Input;

use super::node::store_failure;
use super::requests::Requests;
use crate::replica::Replica;

/// How long a destination may take to own what was sealed for it, before the source takes it back. A guest stands still
/// meanwhile.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(5);

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

    /// Hands an image over to the node that attached it `--incoming`. If that does not become the owner, this node owns it
    /// again.
    pub(super) async fn hand_over(self, image: ImageName, to: NodeId) -> Answer<NodeReply> {
        let replica = self.owned(&image)?;
        let id = replica.image();
        let holds = replica.look(|session| {
            let record = session.record();
            record.is_some_and(|record| record.runs().iter().all(|run| run.members.contains(&to)))
        });
        if !holds || to == self.node.config.id {
            return Err(Failure::new(
                FailureKind::Refused,
                format!("{to} is no other node that holds all of {image}"),
                format!("hearth location list {image}"),
            ));
        }
        let (sealing, destination) = (Arc::clone(&replica), to.clone());
        self.blocking(move |_| {
            sealing.step(Input::Seal { to: Some(destination) });
            Ok(())
        })
        .await?;
        if self.is_owned_by(id, &to).await {
            self.node.detach(id, &self.connections).await?;
            return Ok(NodeReply::Done { seq: None });
        }
        // The next epoch is this node's, unless the destination's is in the log by then.
        let why = format!("{to} did not take {image} within {HAND_OVER_WITHIN:?}");
        match self.own(&replica).await {
            Ok((epoch, lease)) => {
                self.blocking(move |node| node.opened(id, epoch, lease)).await?;
                Err(Failure::new(
                    FailureKind::Timeout,
                    format!("{why}; this node serves it as before"),
                    format!("is it attached there? hearth image attach {image} --node {to} --incoming"),
                ))
            }
            Err(_) if self.owner_of(id).as_ref() == Some(&to) => {
                self.node.detach(id, &self.connections).await?;
                Ok(NodeReply::Done { seq: None })
            }
            Err(failure) => Err(Failure::new(
                failure.kind,
                format!("{why}, and this node cannot own it again: {failure}"),
                format!("hearth image attach {image} --node NODE --takeover"),
            )),
        }
    }

    async fn is_owned_by(&self, image: ImageId, node: &NodeId) -> bool {
        let mut progress = self.link.progress();
        let read = progress.wait_for(|_| self.owner_of(image).as_ref() == Some(node));
        tokio::time::timeout(HAND_OVER_WITHIN, read).await.is_ok()
    }
}
