//! Images with replicas between the log and their sessions: what the log says goes to each session in the log's order, and
//! what sessions want published is published.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use hearth_protocol::aggregate::Change;
use hearth_protocol::{Event, ImageId};
use hearth_replication::owner::Denial;
use hearth_replication::session::Input;
use tokio::sync::broadcast::error::RecvError;

use super::link::Link;
use super::node::Node;
use super::requests::Requests;
use crate::replica::shape::Shape;
use crate::replica::{Notice, Replica};

/// Feeds sessions from the log.
pub struct Feed {
    link: Link,
    node: Arc<Node>,
    /// The images whose sessions know the log up to its last batch.
    based: Mutex<BTreeSet<ImageId>>,
}

impl Feed {
    /// A feed that has told nothing yet.
    pub fn new(link: Link, node: Arc<Node>) -> Self {
        Self {
            link,
            node,
            based: Mutex::default(),
        }
    }

    /// A batch of the log was read, with these changes of records in it, valid or not. Called in the log's order.
    pub fn read(&self, changes: Vec<(ImageId, Change)>) {
        if !self.link.progress().borrow().caught_up() {
            return;
        }
        let mut based = self.based.lock().unwrap_or_else(PoisonError::into_inner);
        for (image, change) in changes {
            if based.contains(&image) {
                self.node.replicas.logged(image, change);
            }
        }
        let known: Vec<_> = {
            let facts = self.link.facts();
            let of = |(image, known): (ImageId, &hearth_protocol::validity::Ownership)| {
                let locations = known.locations.clone()?;
                let created = &facts.image(image)?.created;
                let shape = Shape {
                    name: created.name.clone(),
                    size: created.size.0,
                    block_size: created.block_size.0,
                    layer: *created.layers.first()?,
                };
                Some((image, shape, locations))
            };
            let fresh = facts.validity().images().filter(|(image, _)| !based.contains(image));
            fresh.filter_map(of).collect()
        };
        for (image, shape, locations) in known {
            let replica = self.node.replicas.know(image, shape, locations.clone());
            replica.step(Input::Rebased(locations));
            based.insert(image);
        }
        let gone: Vec<ImageId> = {
            let facts = self.link.facts();
            based
                .iter()
                .copied()
                .filter(|image| facts.image(*image).is_none())
                .collect()
        };
        for image in gone {
            based.remove(&image);
            self.deleted(image);
        }
    }

    /// The log says that an image is deleted: what this node holds of it goes too.
    fn deleted(&self, image: ImageId) {
        let Some(replica) = self.node.replicas.remove(image) else {
            return;
        };
        if replica.copy().is_none() {
            return;
        }
        let name = replica.shape().name.clone();
        tokio::task::spawn_blocking(move || match replica.forget() {
            Ok(()) => tracing::info!(%name, "removed this node's copy of an image that was deleted"),
            Err(error) => tracing::error!(%name, %error, "a copy of a deleted image stays behind"),
        });
    }

    /// What was read before counts no more, or the log ends before it.
    pub fn rolled_back(&self) {
        self.based.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for replica in self.node.replicas.all() {
            replica.step(Input::RolledBack);
        }
    }
}

/// Publishes what sessions want published, and ends the service of images that this node owns no more; for ever.
pub async fn attend(requests: &Requests) {
    let mut notices = requests.node.replicas.notices();
    let publishing = Arc::new(Mutex::new(BTreeSet::new()));
    loop {
        match notices.recv().await {
            Ok((image, Notice::Publish(change))) => publish(requests, &publishing, image, change),
            Ok((image, Notice::Ended(denial))) => ended(requests, image, &denial),
            Ok((image, Notice::Opened)) => opened(requests, image).await,
            Ok((image, notice)) => tell(requests, image, &notice),
            // What is to be published comes again.
            Err(RecvError::Lagged(missed)) => tracing::warn!(missed, "notices of replicas were missed"),
            Err(RecvError::Closed) => return std::future::pending().await,
        }
    }
}

/// Says in the journal what became of an image's set.
fn tell(requests: &Requests, image: ImageId, notice: &Notice) {
    let name = requests
        .replica(image)
        .map_or_else(|| image.to_string(), |replica| replica.shape().name.to_string());
    match notice {
        Notice::Joined(node) => tracing::info!(image = name, %node, "a node holds an image now, in sync"),
        Notice::NotChanged(node, denial) => tracing::warn!(image = name, %node, %denial, "the set stays as it is"),
        Notice::Left(node) => tracing::info!(image = name, %node, "a node's copy is given up"),
        Notice::Forgotten => tracing::info!(image = name, "deleted this node's copy, others hold all of it"),
        Notice::GivenUp(setback) => tracing::info!(image = name, %setback, "not the owner"),
        Notice::Publish(_) | Notice::Opened | Notice::Ended(_) => {}
    }
}

/// One at a time for each image; the session asks again until the log answers.
fn publish(requests: &Requests, publishing: &Arc<Mutex<BTreeSet<ImageId>>>, image: ImageId, change: Change) {
    let is_free = publishing.lock().unwrap_or_else(PoisonError::into_inner).insert(image);
    if !is_free {
        return;
    }
    let words = requests.words.lock().unwrap_or_else(PoisonError::into_inner);
    let reason = words.get(&image).cloned().unwrap_or_default();
    drop(words);
    let (link, publishing) = (requests.link.because(&reason), Arc::clone(publishing));
    tokio::spawn(async move {
        if let Err(failure) = link
            .publish_image(image, &Event::LocationsChanged { image, change })
            .await
        {
            tracing::warn!(%image, %failure, "a change of an image's locations is not in the log");
        }
        publishing.lock().unwrap_or_else(PoisonError::into_inner).remove(&image);
    });
}

/// What was handed over to this node is served here from now on, also after a restart.
async fn opened(requests: &Requests, image: ImageId) {
    let is_incoming = requests.node.served.get(image).is_some_and(|served| served.incoming);
    let Some(replica) = requests.replica(image).filter(|_| is_incoming) else {
        return;
    };
    let Some((epoch, lease)) = replica.look(|session| session.owner().map(|owner| owner.record().grant())) else {
        return;
    };
    match requests.blocking(move |node| node.opened(image, epoch, lease)).await {
        Ok(()) => tracing::info!(image = %replica.shape().name, %epoch, "was handed over to this node"),
        Err(failure) => tracing::error!(image = %replica.shape().name, %failure, "is not served after a restart"),
    }
}

/// Another node may own the image by now, or no copy is left that can be trusted: its exports here end, so that a guest
/// learns of it.
fn ended(requests: &Requests, image: ImageId, denial: &Denial) {
    let Some(served) = requests.node.served.get(image) else {
        return;
    };
    if matches!(denial, Denial::Sealed { .. } | Denial::Detached) {
        return;
    }
    tracing::error!(image = %served.name, %denial, "this node serves an image no more");
    let requests = requests.clone();
    tokio::spawn(async move {
        if let Err(failure) = requests.node.detach(image, &requests.connections).await {
            tracing::error!(%image, %failure, "an export of an image that this node does not own stays behind");
        }
    });
}

/// Whether the log says that an image that is to be served again is this node's. If not, it is forgotten that it is to be.
/// The lease may be one that this node was granted when it last tried to serve the image again.
fn is_still_owner(requests: &Requests, replica: &Replica) -> bool {
    let (image, name) = (replica.image(), &replica.shape().name);
    let owner = requests.owner_of(image);
    if owner.as_ref() == Some(&requests.node.config.id) {
        return true;
    }
    tracing::warn!(image = %name, ?owner, "is not served again here: it was detached or taken over meanwhile");
    if let Err(failure) = requests.node.give_up(image) {
        tracing::error!(image = %name, %failure, "cannot forget that an image was served");
    }
    false
}

/// Owns and serves again what the last process did, if nobody else took it over meanwhile.
pub async fn resume(requests: &Requests) {
    for kept in requests.node.waiting() {
        let Some(replica) = requests.replica(kept.image) else {
            continue;
        };
        let name = replica.shape().name.clone();
        if !is_still_owner(requests, &replica) {
            continue;
        }
        let requests = requests.clone();
        tokio::spawn(async move {
            loop {
                let failure = match requests.own(&replica).await {
                    Ok((epoch, lease)) => {
                        let serve = requests
                            .blocking(move |node| node.attach(kept.image, epoch, lease, kept.export))
                            .await;
                        match serve {
                            Ok(_) => return tracing::info!(image = %name, %epoch, "serving again"),
                            Err(failure) => failure,
                        }
                    }
                    Err(failure) => failure,
                };
                tracing::error!(image = %name, %failure, "cannot serve an image again; trying on");
                if requests.node.waiting_why(kept.image).is_none() || !is_still_owner(&requests, &replica) {
                    return;
                }
                tokio::time::sleep(super::run::RECONNECT).await;
            }
        });
    }
}
