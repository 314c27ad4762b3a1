//! All images with replicas on this node: what other nodes say is given to the image that it is about, and each image is
//! told when its time has come.
//!
//! Invariant: an image that this node knows has one [`Replica`] here, whether this node holds a copy or not, so that every
//! question of another node is answered.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::thread;
use std::time::Duration;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::{ImageId, NodeId, SetVersion};
use hearth_replication::session::Input;

use super::Noticed;
use super::image::{Around, Copy, Replica, Said, boot_now};
use super::piece::from_frame;
use super::shape::Shape;
use crate::peer::{Frame, Links, Receive};
use crate::store::{ImageMeta, NewReplica, StoreError};
use crate::tier::RamTier;
use crate::volume::{BlockSource, Volume};

/// How late an image may learn that its time has come. Leases and answers are counted in seconds.
const CLOCK: Duration = Duration::from_millis(20);

/// What a copy is opened with.
#[derive(Clone)]
pub struct Opening {
    /// The RAM tier.
    pub tier: Arc<RamTier>,
    /// Sealed layers that this node does not hold.
    pub remote: Arc<dyn BlockSource>,
}

/// See the module.
pub struct Replicas {
    around: Around,
    opening: Opening,
    images: RwLock<BTreeMap<ImageId, Arc<Replica>>>,
    this: Weak<Replicas>,
}

impl Replicas {
    /// The images that this node's store has replicas of. Copies that cannot be opened are said, and left alone.
    ///
    /// # Errors
    /// The operating system's, for want of a thread.
    pub fn open(around: Around, opening: Opening) -> std::io::Result<Arc<Self>> {
        let replicas = Arc::new_cyclic(|this: &Weak<Self>| Self {
            around,
            opening,
            images: RwLock::default(),
            this: this.clone(),
        });
        for meta in replicas.around.store.images() {
            if replicas.around.store.replica(meta.id).is_none() {
                continue;
            }
            if let Err(error) = replicas.found(&meta) {
                tracing::error!(image = %meta.name, %error, "this node's copy of an image cannot be opened");
            }
        }
        let receive: Weak<Self> = replicas.this.clone();
        replicas.around.links.deliver_to(receive);
        let clock = replicas.this.clone();
        thread::Builder::new().name("replica-clock".into()).spawn(move || {
            while let Some(replicas) = clock.upgrade() {
                replicas.tick();
                drop(replicas);
                thread::sleep(CLOCK);
            }
        })?;
        Ok(replicas)
    }

    /// The other nodes.
    pub fn links(&self) -> &Arc<Links> {
        &self.around.links
    }

    /// What happens to the images from now on.
    pub fn notices(&self) -> tokio::sync::broadcast::Receiver<Noticed> {
        self.around.notices.subscribe()
    }

    /// An image with replicas.
    pub fn get(&self, image: ImageId) -> Option<Arc<Replica>> {
        self.images
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&image)
            .cloned()
    }

    /// All of them, ascending by id.
    pub fn all(&self) -> Vec<Arc<Replica>> {
        let images = self.images.read().unwrap_or_else(PoisonError::into_inner);
        images.values().cloned().collect()
    }

    fn insert(&self, replica: Arc<Replica>) -> Arc<Replica> {
        let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(images.entry(replica.image()).or_insert(replica))
    }

    /// Takes an image out that is deleted.
    pub fn remove(&self, image: ImageId) -> Option<Arc<Replica>> {
        self.images
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&image)
    }

    /// Ends everything in order at the end of the daemon: what this node owns is sealed, so that its next attach need not
    /// wait, and its copies are closed. Guests that reconnect find their images owned again.
    pub fn close(&self) {
        for replica in self.all() {
            if replica.look(|session| session.is_open())
                && let Err(why) = replica.seal()
            {
                tracing::warn!(image = %replica.shape().name, why, "is not sealed: its next attach waits for leases to end");
            }
            if let Err(error) = replica.close() {
                tracing::error!(image = %replica.shape().name, %error, "the last flush failed");
            }
        }
    }

    fn open_copy(&self, image: ImageId) -> Result<(Copy, hearth_replication::session::Replica), StoreError> {
        let Opening { tier, remote } = self.opening.clone();
        let store = Arc::clone(&self.around.store);
        let member = Volume::attach_member(store, tier, image, remote)?;
        let kept = hearth_replication::session::Replica {
            store: self.around.store.incarnation(),
            durable: member.durable,
            marks: member.marks.found(),
            failed: member.failed,
        };
        let copy = Copy {
            volume: member.volume,
            marks: member.marks,
        };
        Ok((copy, kept))
    }

    fn found(&self, meta: &ImageMeta) -> Result<Arc<Replica>, StoreError> {
        let (copy, kept) = self.open_copy(meta.id)?;
        let shape = Shape {
            name: meta.name.clone(),
            size: meta.size,
            block_size: meta.block_size,
            layer: meta.top(),
        };
        // Until the log is read, what is durable here is all that is known of it.
        let record = kept.durable.record.clone();
        let log = match record {
            Some(record) => Aggregate {
                record,
                owner: None,
                ended: BTreeMap::new(),
            },
            None => alone(&self.around.me),
        };
        let around = self.around.clone();
        Ok(self.insert(Replica::new(meta.id, shape, around, Some((copy, kept)), log)))
    }

    /// An image that the log knows; this node may hold a copy of it or none.
    pub fn know(&self, image: ImageId, shape: Shape, log: Aggregate) -> Arc<Replica> {
        match self.get(image) {
            Some(replica) => replica,
            None => self.insert(Replica::new(image, shape, self.around.clone(), None, log)),
        }
    }

    /// Makes an empty copy of an image here, for a new image or for a node that is to join.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn prepare(&self, new: &NewReplica) -> Result<Arc<Replica>, StoreError> {
        let meta = self.around.store.create_replica(new)?;
        match self.get(new.image) {
            Some(replica) if replica.copy().is_some() => Ok(replica),
            Some(replica) => {
                let (copy, kept) = self.open_copy(new.image)?;
                replica.prepare(copy, kept);
                Ok(replica)
            }
            None => self.found(&meta),
        }
    }

    /// A change of an image's record in the log, in the log's order.
    pub fn logged(&self, image: ImageId, change: Change) {
        if let Some(replica) = self.get(image) {
            replica.step(Input::Logged(change));
        }
    }

    fn tick(&self) {
        let now = boot_now();
        for replica in self.all() {
            if replica.wake_at().is_some_and(|at| at <= now) {
                replica.step(Input::Tick);
                replica.tell_waiting();
            }
        }
    }
}

/// What is known of an image of which nothing is: it replaces nothing, and nothing replaces it.
fn alone(me: &NodeId) -> Aggregate {
    Aggregate::new(SetVersion(0), [me.clone()].into()).expect("a set of one node")
}

impl Receive for Replicas {
    fn received(&self, from: &NodeId, frames: Vec<Frame>) {
        let mut said: Option<(Arc<Replica>, Vec<Said>)> = None;
        for frame in frames {
            let (image, message, piece) = match from_frame(frame) {
                Ok(parts) => parts,
                Err(error) => {
                    tracing::warn!(%from, %error, "a frame is ignored");
                    continue;
                }
            };
            if let Some((replica, messages)) = &mut said
                && replica.image() == image
            {
                messages.push((message, piece));
                continue;
            }
            if let Some((replica, messages)) = said.take() {
                replica.received(from, messages);
            }
            match self.get(image) {
                Some(replica) => said = Some((replica, vec![(message, piece)])),
                // The log, or a preparation, is about to tell of it; who asked asks again.
                None => tracing::debug!(%image, %from, "a node asks about an image that is not known here"),
            }
        }
        if let Some((replica, messages)) = said {
            replica.received(from, messages);
        }
    }

    fn lost(&self, peer: &NodeId) {
        for replica in self.all() {
            replica.step(Input::Lost(peer.clone()));
        }
    }
}
