//! One image with replicas on three nodes in a network of namespaces, under clients that know every byte, to which faults
//! are done one after the other.
//!
//! `HEARTH_FAULT_ROUNDS` does a test's faults more often than once; between two, all copies come back in sync.

use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

use crate::clients::{Clients, Visit, Visitor};
use crate::netns::{Network, Place};
use crate::store_disk::StoreDisk;

/// Time for whatever has to happen.
pub const WITHIN: Duration = Duration::from_secs(60);
/// Longer than a read lease and the wait of a new owner (3.75 s, `hearth_replication::time`).
pub const PAST_THE_LEASE: Duration = Duration::from_millis(4_500);
/// The image.
pub const IMAGE: &str = "appl/vm-1";
/// Acknowledged writes that show that the image goes on.
pub const GOES_ON: u64 = 100;

const NODES: usize = 3;
/// How long visitors visit a node that is to serve nothing.
const VISIT: Duration = Duration::from_secs(3);

/// What is to be tried.
#[derive(Debug, Clone, Copy)]
pub struct TrialSpec {
    /// Copies of the image, the first of them on its first owner.
    pub replicas: usize,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Size of each store's own disk, if it has one.
    pub disk_bytes: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct Trial {
    /// The image's clients.
    pub clients: Clients,
    /// The processes.
    pub cluster: Cluster,
    /// The stores' disks, if they have their own.
    pub disks: Vec<StoreDisk>,
    /// The namespaces; they go after the processes.
    pub network: Network,
    /// The node that the image is attached on.
    pub owner: usize,
    replicas: usize,
    /// How often each fault was done.
    pub done: BTreeMap<String, u64>,
}

/// A fault: its name, and what is done and seen.
pub type Fault = (&'static str, fn(&mut Trial) -> Result<()>);

impl Trial {
    /// Starts everything, with the image attached on the first node; or says why that cannot be done here.
    ///
    /// # Errors
    /// A part does not come up.
    pub fn start(spec: TrialSpec) -> Result<Option<Self>> {
        let Some(network) = crate::or_skip(Network::make(NODES)) else {
            return Ok(None);
        };
        let cluster = crate::cluster(&ClusterSpec {
            nodes: NODES,
            heat: "export",
            control: network.control(),
            node_hosts: network.nodes(),
            ..ClusterSpec::default()
        })?;
        let Some(mut cluster) = cluster else { return Ok(None) };
        let mut disks = Vec::new();
        if let Some(bytes) = spec.disk_bytes {
            for index in 0..NODES {
                cluster.node(index).stop()?;
                let file = cluster.dir().join(format!("disk-{index}"));
                let made = StoreDisk::make(file, bytes, cluster.store_dir(index));
                let Some(disk) = crate::or_skip(made) else {
                    return Ok(None);
                };
                disks.push(disk);
            }
            for index in 0..NODES {
                cluster.crash_and_restart_node(index)?;
            }
            cluster.wait_ready()?;
        }
        let (size, count) = (spec.image_bytes.to_string(), spec.replicas.to_string());
        let create = [
            "image",
            "create",
            IMAGE,
            &size,
            "--replicas",
            &count,
            "--node",
            "node-1",
        ];
        // Nodes that have just joined may not be placed on yet.
        wait::until("the image to be created", WITHIN, || {
            Ok(cluster.hearth().text(&create).ok())
        })?;
        cluster.hearth().text(&["image", "attach", IMAGE, "--node", "node-1"])?;
        let clients = Clients::start(&cluster.socket(0), IMAGE, spec.image_bytes);
        clients.go_on(GOES_ON, WITHIN)?;
        Ok(Some(Self {
            clients,
            cluster,
            disks,
            network,
            owner: 0,
            replicas: spec.replicas,
            done: BTreeMap::new(),
        }))
    }

    /// Does every fault; after each one all recovers, and every byte is read.
    ///
    /// # Errors
    /// Which fault was not outlived, and how.
    pub fn suffer(&mut self, faults: &[Fault]) -> Result<()> {
        for round in 1..=setting("HEARTH_FAULT_ROUNDS", 1)? {
            self.suffer_round(faults, round)?;
        }
        Ok(())
    }

    /// Does every fault once.
    ///
    /// # Errors
    /// Which fault was not outlived, and how.
    pub fn suffer_round(&mut self, faults: &[Fault], round: u64) -> Result<()> {
        for (name, fault) in faults {
            let (began, before) = (Instant::now(), self.clients.seen());
            let done = fault(self).and_then(|()| self.recover());
            done.with_context(|| format!("{name}, round {round}"))?;
            *self.done.entry((*name).to_owned()).or_default() += 1;
            let seen = self.clients.seen();
            eprintln!(
                "{name}: {:.1} s, {} writes, {} reads, {} writes unanswered, errors so far {:?}",
                began.elapsed().as_secs_f64(),
                seen.writes - before.writes,
                seen.reads - before.reads,
                seen.unknown - before.unknown,
                seen.refused,
            );
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<()> {
        self.network.heal()?;
        self.cluster.wait_ready()?;
        self.in_sync(self.replicas)?;
        self.clients.go_on(GOES_ON, WITHIN)?;
        self.clients.verify(WITHIN)
    }

    /// Ends the clients, and compares the log's two readers.
    ///
    /// # Errors
    /// A read was wrong, or the two differ.
    pub fn end(self) -> Result<()> {
        let seen = self.clients.stop()?;
        eprintln!("in all: {seen:?}");
        crate::digests_agree(&self.cluster)
    }

    /// The nodes but one.
    pub fn others(node: usize) -> impl Iterator<Item = usize> {
        (0..NODES).filter(move |other| *other != node)
    }

    /// A node that holds a copy in sync and is not the owner.
    ///
    /// # Errors
    /// There is none, or nobody says.
    pub fn member(&self) -> Result<usize> {
        let members = self.members()?;
        let mut others = Self::others(self.owner);
        let found = others.find(|index| members.contains(&Cluster::node_id(*index)));
        found.context("no other member")
    }

    /// The nodes that are in sync, as the owner says.
    fn members(&self) -> Result<Vec<String>> {
        self.members_of(IMAGE)
    }

    /// The nodes that hold an image that is attached on the same node, in sync.
    ///
    /// # Errors
    /// Nobody says.
    pub fn members_of(&self, image: &str) -> Result<Vec<String>> {
        let owner = Cluster::node_id(self.owner);
        let list = ["location", "list", image, "--node", &owner];
        let runs = self.cluster.hearth().json(&list)?;
        let members = runs[0]["members"].as_array().context("no members")?;
        Ok(members.iter().filter_map(|m| Some(m.as_str()?.to_owned())).collect())
    }

    /// Waits until a node is in the set or out of it.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn is_member(&self, node: usize, is: bool) -> Result<()> {
        let name = Cluster::node_id(node);
        let what = format!("{name} to be {} the set", if is { "in" } else { "out of" });
        wait::until(&what, WITHIN, || {
            Ok((self.members()?.contains(&name) == is).then_some(()))
        })
    }

    /// Has so many nodes hold the image in sync, unless the repair policy comes before.
    ///
    /// # Errors
    /// They do not come to that.
    pub fn in_sync(&self, count: usize) -> Result<()> {
        self.in_sync_of(IMAGE, count)
    }

    /// The same for another image that is attached on the same node.
    ///
    /// # Errors
    /// They do not come to that.
    pub fn in_sync_of(&self, image: &str, count: usize) -> Result<()> {
        wait::until(&format!("{count} copies of {image} in sync"), WITHIN, || {
            let members = self.members_of(image)?;
            if members.len() >= count {
                return Ok(Some(()));
            }
            let out = (0..NODES).map(Cluster::node_id).find(|node| !members.contains(node));
            let node = out.context("all nodes are members")?;
            // Refused while another change is under way.
            match self
                .cluster
                .hearth()
                .text(&["location", "add", image, &node, "--pace", "full"])
            {
                Ok(_) => Ok(None),
                Err(error) => Err(error),
            }
        })
    }

    /// Has another node take the image over, and the clients go there.
    ///
    /// # Errors
    /// It does not.
    pub fn take_over(&mut self, node: usize) -> Result<()> {
        let name = Cluster::node_id(node);
        let words = ["image", "attach", IMAGE, "--node", &name, "--takeover"];
        self.cluster.hearth().text(&words)?;
        self.owner = node;
        self.clients.go_to(&self.cluster.socket(node));
        Ok(())
    }

    /// Sends a node daemon a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&mut self, node: usize, signal: libc::c_int) -> Result<()> {
        self.cluster.node(node).signal(signal)
    }

    /// What a node says of the image.
    ///
    /// # Errors
    /// It does not say.
    pub fn show(&self, node: usize) -> Result<Value> {
        let name = Cluster::node_id(node);
        self.cluster.hearth().json(&["image", "show", IMAGE, "--node", &name])
    }

    /// Cuts a node off from everybody else.
    ///
    /// # Errors
    /// nftables refuses.
    pub fn cut_off(&mut self, node: usize) -> Result<()> {
        self.network.part(Place::Node(node), Place::Control)?;
        for other in Self::others(node) {
            self.network.part(Place::Node(node), Place::Node(other))?;
        }
        Ok(())
    }

    /// Clients that will stay with a node whatever happens.
    ///
    /// # Errors
    /// The image is not served there.
    pub fn visitors(&self, node: usize) -> Result<Vec<Visitor>> {
        let socket = self.cluster.socket(node);
        (0..3).map(|_| self.clients.visitor(&socket)).collect()
    }

    /// Undoes cuts; fails if they cut nothing.
    ///
    /// # Errors
    /// No packet was dropped.
    pub fn heal(&mut self) -> Result<()> {
        let dropped = self.network.heal()?;
        ensure!(dropped > 0, "nothing was sent that could be lost");
        Ok(())
    }
}

/// Lets visitors visit at once.
pub fn begin(visitors: Vec<Visitor>) -> Vec<JoinHandle<Visit>> {
    visitors.into_iter().map(|visitor| visitor.visit(VISIT)).collect()
}

/// What they met in all.
///
/// # Errors
/// One panicked.
pub fn met(visits: Vec<JoinHandle<Visit>>) -> Result<Visit> {
    let mut all = Visit::default();
    for visit in visits {
        let Ok(visit) = visit.join() else {
            bail!("a visitor panicked")
        };
        all.reads += visit.reads;
        all.writes += visit.writes;
        all.refused += visit.refused;
    }
    Ok(all)
}

/// A number from the environment.
///
/// # Errors
/// It is none.
pub fn setting(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .with_context(|| format!("{name} is {text:?}, not a number")),
        Err(_) => Ok(otherwise),
    }
}
