//! The data plane of one node, put together: store, RAM tier, exports, probes. Works without NATS.

use std::collections::BTreeMap;
use std::os::linux::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use hearth_probes::export::{ExportCounter, ExportSource};
use hearth_probes::source::HeatSource;
use hearth_probes::{EbpfOptions, EbpfSource};
use hearth_protocol::command::Outcome;
use hearth_protocol::rpc::{ExportKind, Failure, FailureKind};
use hearth_protocol::{
    BlockIndex, ByteLen, Epoch, ImageId, ImageName, Incarnation, LayerId, LeaseId, Order, SetVersion,
};
use hearth_replication::session::Session;
use tokio::sync::broadcast;

use super::gone::Gone;
use super::pace;
use super::peers::Peers;
use super::served::{Kept, Served, ServedImages};
use crate::config::{HeatChoice, NodeConfig};
use crate::disk::Disk;
use crate::export::device::{DeviceExports, DeviceOptions};
use crate::export::fdstore::FdStore;
use crate::export::nbd::NbdHandle;
use crate::peer::{Links, PeerLimits, PeerPool};
use crate::replica::image::Around;
use crate::replica::{Opening, Pool, Replica, Replicas, ReplicatedDisk};
use crate::store::fault::Faults;
use crate::store::{Store, StoreError, StoreOptions};
use crate::tier::{RamTier, TierOptions};
use crate::volume::Volume;

/// One node's data plane.
pub struct Node {
    /// Its configuration.
    pub config: NodeConfig,
    /// This process start.
    pub incarnation: Incarnation,
    /// The local replicas.
    pub store: Arc<Store>,
    /// The RAM tier.
    pub tier: Arc<RamTier>,
    /// The images in service.
    pub served: Arc<ServedImages>,
    /// The images that were deleted here.
    pub gone: Gone,
    /// Where other nodes are.
    pub peers: Arc<Peers>,
    /// Kernel devices, or why there are none.
    pub devices: Result<DeviceExports, String>,
    /// The exports' own counters.
    pub counters: ExportSource,
    /// The probes, or why there are none.
    pub probes: Result<EbpfSource, String>,
    /// Reads of layers that this node does not hold.
    pub remote: Arc<PeerPool>,
    /// The images with replicas.
    pub replicas: Arc<Replicas>,
    /// What each link may carry for their copies.
    pub links: Arc<pace::Links>,
    /// Held over every change of what is served: images that are to be served and cannot be, with the reason.
    waiting: Mutex<BTreeMap<ImageId, (Kept, String)>>,
}

/// Notices of images with replicas that wait to be read; who reads too late asks the image itself.
const NOTICES_MAX: usize = 1_024;

/// The location map of an image that this node alone holds never changes.
pub const SET_VERSION: SetVersion = SetVersion(1);

impl Node {
    /// Opens the store and prepares everything; serves nothing yet.
    ///
    /// # Errors
    /// What cannot be had, with what to do.
    pub fn open(config: NodeConfig, fdstore: Option<Arc<FdStore>>, faults: Faults) -> anyhow::Result<Arc<Self>> {
        let options = StoreOptions {
            faults: faults.clone(),
            ..StoreOptions::default()
        };
        let store = Arc::new(Store::open(&config.store_dir, options)?);
        let tier = RamTier::new(TierOptions {
            capacity_bytes: config.ram_bytes.0,
            front_percent: config.front_percent,
            lock: true,
        })?;
        if let Some(why) = tier.lock_refused() {
            tracing::warn!("the RAM tier is not locked into memory: {why}");
        }
        let probes = match config.heat {
            HeatChoice::Export => Err("the configuration says heat = \"export\"".to_owned()),
            HeatChoice::Auto | HeatChoice::Ebpf => {
                EbpfSource::load(EbpfOptions::default()).map_err(|error| error.to_string())
            }
        };
        match (&probes, config.heat) {
            (Err(why), HeatChoice::Ebpf) => anyhow::bail!("the configuration says heat = \"ebpf\": {why}"),
            (Err(why), _) => tracing::warn!("heat is counted by the exports, not by eBPF: {why}"),
            (Ok(probes), _) => match disk_under(&config.store_dir) {
                Some(disk) => {
                    if let Err(error) = probes.watch_disk(&disk) {
                        tracing::warn!(disk, %error, "the latency of the store's disk is not measured");
                    }
                }
                None => tracing::info!(
                    "the store is on no disk of its own (tmpfs or a network), so its latency is not measured"
                ),
            },
        }
        let mut options = DeviceOptions::new(&config.device_link_root, &config.mount_root);
        options.fdstore = fdstore;
        let devices = DeviceExports::new(options).map_err(|error| error.to_string());
        if let Err(why) = &devices {
            tracing::warn!("no kernel devices, images are served over NBD only: {why}");
        }
        let peers = Arc::new(Peers::open(&config.store_dir, &faults)?);
        let gone = Gone::open(config.store_dir.join("deleted-images"), faults.clone())?;
        let remote = {
            let peers = Arc::clone(&peers);
            Arc::new(PeerPool::new(PeerLimits::default(), move |layer| {
                peers.addresses_of(layer)
            }))
        };
        let sealed = {
            let (store, tier, remote) = (Arc::clone(&store), Arc::clone(&tier), Arc::clone(&remote));
            move |layer| {
                let disk = Volume::open_sealed(Arc::clone(&store), Arc::clone(&tier), layer, remote.clone()).ok()?;
                Some(disk as Arc<dyn Disk>)
            }
        };
        let links = {
            let peers = Arc::clone(&peers);
            Links::new(config.id.clone(), move |node| peers.address_of(node))
        };
        let served = Arc::new(ServedImages::new(
            config.store_dir.join("served"),
            Box::new(sealed),
            Arc::clone(&links),
            faults,
        ));
        let (notices, _) = broadcast::channel(NOTICES_MAX);
        let around = Around {
            me: config.id.clone(),
            store: Arc::clone(&store),
            links,
            pool: Arc::new(Pool::start(config.io_threads)?),
            notices,
        };
        let opening = Opening {
            tier: Arc::clone(&tier),
            remote: remote.clone(),
        };
        let replicas = Replicas::open(around, opening)?;
        Ok(Arc::new(Self {
            config,
            incarnation: hearth_bus::new_incarnation(),
            store,
            tier,
            served,
            gone,
            peers,
            devices,
            counters: ExportSource::new(),
            probes,
            remote,
            replicas,
            links: Arc::default(),
            waiting: Mutex::default(),
        }))
    }

    /// Where heat of kernel devices is counted: `ebpf` or `export`.
    pub fn heat_source(&self) -> &'static str {
        if self.probes.is_ok() { "ebpf" } else { "export" }
    }

    fn change(&self) -> std::sync::MutexGuard<'_, BTreeMap<ImageId, (Kept, String)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why an image that is to be served is not, if so.
    pub fn waiting_why(&self, image: ImageId) -> Option<String> {
        self.change().get(&image).map(|(_, why)| why.clone())
    }

    /// What is to be served and is not.
    pub fn waiting(&self) -> Vec<Kept> {
        self.change().values().map(|(kept, _)| kept.clone()).collect()
    }

    /// Serves again what the last process served, under the same epochs and leases: nobody else can hold them, because
    /// this node is the only member. Images that fail are said and tried again by [`Node::resume_waiting`].
    ///
    /// # Errors
    /// When the list of them cannot be read.
    pub fn resume(&self) -> anyhow::Result<()> {
        for kept in self.served.kept()? {
            if self.replicas.get(kept.image).is_some() {
                let why = "its next epoch comes from the log, which is read first";
                self.change().insert(kept.image, (kept, why.into()));
                continue;
            }
            match self.serve(kept.clone(), None) {
                Ok(served) => tracing::info!(image = %served.name, epoch = %kept.epoch, "serving again"),
                Err(error) => {
                    tracing::error!(image = %kept.image, %error, "cannot serve an image again; trying on");
                    self.change().insert(kept.image, (kept, error.message));
                }
            }
        }
        if self.change().is_empty() {
            self.give_up_devices()?;
        }
        Ok(())
    }

    /// Removes the devices of the last process that no image takes over any more.
    fn give_up_devices(&self) -> anyhow::Result<()> {
        if let Ok(devices) = &self.devices {
            for name in devices.give_up_waiting()? {
                tracing::error!(image = %name, "its kernel device is gone: the image is not served any more");
            }
        }
        Ok(())
    }

    /// Tries again what could not be served at the start: a full disk may have room by now. Guests that reconnect wait
    /// meanwhile.
    pub fn resume_waiting(&self) {
        let mut waiting = self.change();
        if waiting.is_empty() {
            return;
        }
        waiting.retain(|image, (kept, why)| {
            // Of an image with replicas it is the agent that tries.
            if self.replicas.get(*image).is_some() {
                return true;
            }
            match self.serve(kept.clone(), None) {
                Ok(served) => {
                    tracing::info!(image = %served.name, epoch = %kept.epoch, "serving again");
                    false
                }
                Err(error) => {
                    if *why != error.message {
                        tracing::error!(%image, %error, "still cannot serve an image again; trying on");
                        *why = error.message;
                    }
                    true
                }
            }
        });
        // Guests on devices wait as well, until it is known that nobody takes theirs over.
        if waiting.is_empty()
            && let Err(error) = self.give_up_devices()
        {
            tracing::error!(%error, "devices of the last process stay behind");
        }
    }

    /// Starts serving an image under a granted lease, and remembers that it is served.
    ///
    /// # Errors
    /// What stood in the way; the image is then not served.
    pub fn attach(&self, image: ImageId, epoch: Epoch, lease: LeaseId, export: ExportKind) -> Result<Served, Failure> {
        let mut waiting = self.change();
        let kept = Kept {
            image,
            epoch,
            lease,
            export,
        };
        let served = self.serve(kept, None)?;
        waiting.remove(&image);
        if let Err(error) = self.keep(&waiting) {
            let _ = self.end(image, &served);
            return Err(failed(format!("remembering that {} is served: {error}", served.name)));
        }
        Ok(served)
    }

    /// Starts serving an image that another node owns and is to hand over. A restart of this daemon ends that.
    ///
    /// # Errors
    /// What stood in the way; the image is then not served.
    pub fn attach_incoming(
        &self,
        replica: &Arc<Replica>,
        lease: LeaseId,
        export: ExportKind,
    ) -> Result<Served, Failure> {
        let _waiting = self.change();
        let epoch = replica.look(|session| session.aggregate().record.epoch());
        let kept = Kept {
            image: replica.image(),
            epoch,
            lease,
            export,
        };
        self.serve(kept, Some(copied(replica)?))
    }

    /// This node owns an image that it serves, under another lease than when its service began.
    ///
    /// # Errors
    /// That cannot be remembered over a restart.
    pub fn opened(&self, image: ImageId, epoch: Epoch, lease: LeaseId) -> Result<(), Failure> {
        let waiting = self.change();
        self.served.set_lease(image, epoch, lease);
        self.keep(&waiting)
            .map_err(|error| failed(format!("remembering that image {image} is served: {error}")))
    }

    /// `incoming` is what is served of an image that another node owns.
    fn serve(&self, kept: Kept, incoming: Option<Parts>) -> Result<Served, Failure> {
        let Kept {
            image,
            epoch,
            lease,
            export,
        } = kept;
        let (volume, disk) = match (self.replicas.get(image), &incoming) {
            (_, Some(parts)) => parts.clone(),
            (Some(replica), None) => owned(&replica, epoch, lease)?,
            (None, None) => {
                let (store, tier) = (Arc::clone(&self.store), Arc::clone(&self.tier));
                let volume = Volume::attach(store, tier, image, epoch, lease, self.remote.clone())
                    .map_err(|error| store_failure(&error))?;
                (volume.clone(), volume as Arc<dyn Disk>)
            }
        };
        let meta = self.store.image(image).map_err(|error| store_failure(&error))?;
        let counter = ExportCounter::new(image, ByteLen(meta.block_size));
        self.counters.register(Arc::clone(&counter));
        let mut served = Served {
            name: meta.name.clone(),
            lease,
            epoch,
            volume,
            disk,
            counter,
            export,
            device: None,
            incoming: incoming.is_some(),
        };
        self.served.insert(image, served.clone());
        if export == ExportKind::Device {
            match self.attach_device(image, meta.block_size, &served) {
                Ok(device) => served.device = Some(device),
                Err(failure) => {
                    let _ = self.end(image, &served);
                    return Err(failure);
                }
            }
            self.served.set_device(image, served.device.clone());
        }
        Ok(served)
    }

    fn attach_device(
        &self,
        image: ImageId,
        block_size: u64,
        served: &Served,
    ) -> Result<crate::export::device::DeviceInfo, Failure> {
        let devices = self.devices.as_ref().map_err(|why| {
            Failure::new(
                FailureKind::NotSupported,
                format!("no kernel devices on this node: {why}"),
                "attach with --export socket",
            )
        })?;
        let device = devices
            .attach(&served.name, served.disk.clone())
            .map_err(|error| failed(format!("making the kernel device of {}: {error}", served.name)))?;
        if let Ok(probes) = &self.probes
            && let Err(error) = probes.attach_device(device.major, device.minor, image, ByteLen(block_size))
        {
            // The guest's disk matters more than its heat.
            tracing::error!(image = %served.name, %error, "the heat of this image's device is not counted");
        }
        Ok(device)
    }

    /// Stops serving an image: its device goes first, then its NBD connections, then its volume is flushed and sealed.
    ///
    /// # Errors
    /// `Refused` while a guest has the device open, and the image is then served as before.
    pub async fn detach(&self, image: ImageId, connections: &NbdHandle) -> Result<Served, Failure> {
        let Some(served) = self.served.get(image) else {
            return Err(Failure::new(
                FailureKind::NotFound,
                "the image is not attached on this node",
                "see hearth image list",
            ));
        };
        let said = tokio::task::block_in_place(|| self.end_device(image, &served))?;
        connections.close_export(image).await;
        tokio::task::block_in_place(|| {
            let waiting = self.change();
            let result = self.end(image, &served);
            self.keep(&waiting)
                .map_err(|error| failed(format!("forgetting that {} was served: {error}", served.name)))?;
            result
        })?;
        said.map_or(Ok(served), Err)
    }

    /// Removes an image's device; what its last flush said, if that went wrong, comes back beside.
    fn end_device(&self, image: ImageId, served: &Served) -> Result<Option<Failure>, Failure> {
        let (Some(device), Ok(devices)) = (&served.device, &self.devices) else {
            return Ok(None);
        };
        let said = match devices.detach(&served.name) {
            Ok(()) => None,
            Err(error) if devices.info(&served.name).is_none() => {
                Some(failed(format!("the device of {} is gone, but: {error}", served.name)))
            }
            Err(error) => {
                return Err(Failure::new(
                    FailureKind::Refused,
                    error.to_string(),
                    "stop the guest that uses the device, then detach again",
                ));
            }
        };
        if let Ok(probes) = &self.probes
            && let Err(error) = probes.detach_device(device.major, device.minor)
        {
            tracing::warn!(image = %served.name, %error, "the probes still know a device that is gone");
        }
        self.served.set_device(image, None);
        Ok(said)
    }

    fn end(&self, image: ImageId, served: &Served) -> Result<(), Failure> {
        self.served.remove(image);
        self.counters.unregister(image);
        match self.replicas.get(image) {
            Some(replica) => seal(&replica),
            None => served
                .volume
                .detach()
                .map_err(|error| failed(format!("closing {}: {error}", served.name))),
        }
    }

    /// Forgets an image that is to be served and is not; says under which epoch it was to be.
    ///
    /// # Errors
    /// The file system's.
    pub fn give_up(&self, image: ImageId) -> Result<Option<Epoch>, Failure> {
        let mut waiting = self.change();
        let Some((kept, _)) = waiting.remove(&image) else {
            return Ok(None);
        };
        self.keep(&waiting)
            .map_err(|error| failed(format!("forgetting that {image} was served: {error}")))?;
        Ok(Some(kept.epoch))
    }

    fn keep(&self, waiting: &BTreeMap<ImageId, (Kept, String)>) -> std::io::Result<()> {
        let owned = |served: &(ImageId, Served)| !served.1.incoming;
        let served = self.served.all().into_iter().filter(owned).map(|(image, s)| Kept {
            image,
            epoch: s.epoch,
            lease: s.lease,
            export: s.export,
        });
        let kept: Vec<Kept> = served.chain(waiting.values().map(|(kept, _)| kept.clone())).collect();
        self.served.keep(&kept)
    }

    /// Carries out an order. It leaves no choice: what cannot be done as ordered is refused or skipped, and said.
    pub fn execute(&self, order: &Order) -> Outcome {
        let started = Instant::now();
        if matches!(order, Order::Promote { .. })
            && let Some(name) = self.served_without_copy(order.layer())
        {
            return Outcome::Refused {
                why: format!("this node serves {name} and holds no copy of it yet"),
            };
        }
        let volume = match self.volume_over(order.layer()) {
            Ok(volume) => volume,
            Err(error) => return Outcome::Refused { why: error.to_string() },
        };
        let (done, skipped, bytes) = match order {
            Order::Promote {
                layer,
                epoch,
                blocks,
                bytes,
                ..
            } => {
                let blocks: Vec<BlockIndex> = blocks.iter().map(|p| p.block).collect();
                match volume.promote(*layer, &blocks, *epoch, bytes.0) {
                    Ok(promoted) => (promoted.done, promoted.skipped, promoted.bytes),
                    Err(why) => return Outcome::Refused { why },
                }
            }
            Order::Demote { layer, blocks, .. } => {
                let blocks: Vec<BlockIndex> = blocks.iter().map(|d| d.block).collect();
                let demoted = volume.demote(*layer, &blocks);
                (demoted.done, demoted.skipped, demoted.bytes)
            }
            // Needs the log: see `super::commands`.
            Order::Replicate { .. } | Order::Drop { .. } => {
                return Outcome::Refused {
                    why: "this order is carried out by the agent".into(),
                };
            }
        };
        let mut done = done;
        done.sort_unstable();
        Outcome::Done {
            done,
            skipped: skipped
                .into_iter()
                .map(|(block, why)| (block, why.to_owned()))
                .collect(),
            bytes: ByteLen(bytes),
            took_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
        }
    }

    /// The image in service of which this node does not hold every block, and whose blocks are in this layer.
    fn served_without_copy(&self, layer: LayerId) -> Option<ImageName> {
        let me = &self.config.id;
        let holds = |session: &Session| {
            let record = session.record();
            record.is_some_and(|record| record.runs().iter().all(|run| run.members.contains(me)))
        };
        let mut replicas = self.replicas.all().into_iter();
        let replica = replicas.find(|replica| replica.shape().layer == layer)?;
        let is_served = self.served.get(replica.image()).is_some();
        (is_served && !replica.look(holds)).then(|| replica.shape().name.clone())
    }

    /// A volume that reads the layer: of an image in service that stands on it, else of the sealed layer alone.
    fn volume_over(&self, layer: LayerId) -> Result<Arc<Volume>, StoreError> {
        let mut served = self.served.all().into_iter().map(|(_, served)| served.volume);
        match served.find(|volume| volume.layers().contains(&layer)) {
            Some(volume) => Ok(volume),
            None => Volume::open_sealed(
                Arc::clone(&self.store),
                Arc::clone(&self.tier),
                layer,
                self.remote.clone(),
            ),
        }
    }

    /// Takes what the probes counted, where there are probes.
    pub fn drain_probes(&self) -> Option<hearth_probes::source::Window> {
        let mut probes = self.probes.as_ref().ok()?.clone();
        probes
            .drain()
            .inspect_err(|error| tracing::warn!(%error, "cannot drain the probes; the counts stay for the next time"))
            .ok()
    }
}

/// An image with replicas that this node owns under this lease.
fn owned(replica: &Arc<Replica>, epoch: Epoch, lease: LeaseId) -> Result<Parts, Failure> {
    let name = &replica.shape().name;
    let grant = replica.look(|session| session.owner().map(|owner| owner.record().grant()));
    if grant != Some((epoch, lease)) {
        return Err(failed(format!(
            "{name} is to be owned again under a new epoch, which needs the log"
        )));
    }
    copied(replica)
}

/// This node's blocks of an image, and what is behind its exports.
type Parts = (Arc<Volume>, Arc<dyn Disk>);

/// Those of an image with replicas of which this node holds a copy.
fn copied(replica: &Arc<Replica>) -> Result<Parts, Failure> {
    match replica.copy() {
        Some(copy) => Ok((copy.volume, Arc::new(ReplicatedDisk::new(Arc::clone(replica))))),
        None => {
            let name = &replica.shape().name;
            Err(Failure::new(
                FailureKind::NotSupported,
                format!("this node holds no copy of {name}"),
                format!("have it hold one first: hearth location add {name} NODE"),
            ))
        }
    }
}

/// Ends this node's ownership of an image with replicas.
pub(super) fn seal(replica: &Replica) -> Result<(), Failure> {
    let name = &replica.shape().name;
    replica
        .seal()
        .map_err(|why| failed(format!("{name} is not served any more, but {why}")))
}

/// A failure without a special exit code.
pub fn failed(message: String) -> Failure {
    Failure::new(FailureKind::Failed, message, "see the node daemon's journal")
}

/// The store's error for the user.
pub fn store_failure(error: &StoreError) -> Failure {
    Failure::new(error.kind(), error.to_string(), "")
}

/// The whole disk under a directory, such as `nvme0n1`; `None` where there is none.
fn disk_under(dir: &Path) -> Option<String> {
    let device = std::fs::metadata(dir).ok()?.st_dev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let sys = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if sys.join("partition").exists() {
        sys.parent()?
    } else {
        &sys
    };
    Some(disk.file_name()?.to_string_lossy().into_owned())
}
