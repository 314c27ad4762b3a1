//! A guest on an image with replicas, which migrates between a cluster's nodes: in the demo and in the end-to-end tests.
//!
//! Its disk is reached over NBD on every node. It does not know the cluster's processes, so that they can die meanwhile.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, Hearth};
use crate::guest::{Accel, Guest, GuestDisk, GuestOptions};
use crate::{process, wait};

/// Memory of the guest.
const MEMORY_MIB: u64 = 160;

/// Time in which a guest must have booted: software emulation on two busy cores takes minutes.
const BOOT_WITHIN: Duration = Duration::from_secs(420);

/// Time in which QEMU must have made its monitor's socket.
const MONITOR_WITHIN: Duration = Duration::from_secs(30);

/// The disk, and what is needed to boot a guest from it anywhere.
#[derive(Debug, Clone)]
pub struct MovingDisk {
    /// The image.
    pub image: String,
    /// Its id, as the log calls it.
    pub id: String,
    hearth: Hearth,
    sockets: Vec<PathBuf>,
    dir: PathBuf,
    accel: Accel,
}

impl MovingDisk {
    /// Makes the image with two replicas, one of them on the first node, attaches it there and copies `golden` into it.
    ///
    /// # Errors
    /// `hearth` or `qemu-img` fails.
    pub fn create(cluster: &Cluster, image: &str, golden: &Path, accel: Accel) -> Result<Self> {
        let size = std::fs::metadata(golden)
            .context("the golden image is not there")?
            .len();
        let (size, node) = (size.to_string(), Cluster::node_id(0));
        let hearth = cluster.hearth().clone();
        let create = ["image", "create", image, &size, "--replicas", "2", "--node", &node];
        let info = hearth.json(&create)?;
        let id = info["id"].as_str().context("an image without an id was made")?;
        let disk = Self {
            image: image.to_owned(),
            id: id.to_owned(),
            hearth,
            sockets: (0..cluster.node_count()).map(|index| cluster.socket(index)).collect(),
            dir: cluster.dir().to_owned(),
            accel,
        };
        disk.hearth.text(&["image", "attach", image, "--node", &node])?;
        let uri = format!("nbd+unix:///{image}?socket={}", disk.sockets[0].display());
        let mut fill = Command::new("qemu-img");
        fill.args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(golden)
            .arg(uri);
        process::output(&mut fill)?;
        Ok(disk)
    }

    fn path(&self, index: usize, what: &str) -> PathBuf {
        let image = self.image.replace('/', "-");
        self.dir.join(format!("{image}-{}.{what}", Cluster::node_id(index)))
    }

    /// Starts a QEMU on one node's copy, and waits for its monitor.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&self, index: usize, incoming: bool) -> Result<Guest> {
        let qmp = self.path(index, "qmp");
        let guest = Guest::boot(&GuestOptions {
            name: format!("{}-{}", self.image.replace('/', "-"), Cluster::node_id(index)),
            disk: GuestDisk::Nbd {
                socket: self.sockets[index].clone(),
                export: self.image.clone(),
            },
            accel: self.accel,
            memory_mib: MEMORY_MIB,
            console_log: self.path(index, "console"),
            qmp_sockets: vec![qmp.clone(), self.second_monitor(index)],
            incoming,
        })?;
        wait::until("QEMU's monitor", MONITOR_WITHIN, || Ok(qmp.exists().then_some(())))?;
        Ok(guest)
    }

    /// Another monitor of the QEMU on a node, for whoever else wants to talk to it.
    pub fn second_monitor(&self, index: usize) -> PathBuf {
        self.path(index, "qmp2")
    }

    /// `hearth migrate --listen`, ready to run.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn listen(&self, from: usize, to: usize) -> Result<Command> {
        let (qmp, node) = (self.path(from, "qmp"), Cluster::node_id(to));
        let qmp = qmp.to_str().context("a path that is not UTF-8")?;
        let words = [
            "migrate",
            &self.image,
            "--to",
            &node,
            "--source-qmp",
            qmp,
            "--listen",
            "-o",
            "json",
        ];
        Ok(self.hearth.command(&words))
    }

    /// Boots the guest on the first node.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot(&self) -> Result<Guest> {
        let mut guest = self.start(0, false)?;
        guest.wait_ready(BOOT_WITHIN)?;
        Ok(guest)
    }

    /// Attaches the disk at a destination and starts a QEMU there that waits for the guest.
    ///
    /// # Errors
    /// The node refuses, or QEMU does not start.
    pub fn await_at(&self, index: usize) -> Result<Guest> {
        let node = Cluster::node_id(index);
        self.hearth
            .text(&["image", "attach", &self.image, "--node", &node, "--incoming"])?;
        self.start(index, true)
    }

    /// `hearth migrate`, and what it says.
    ///
    /// # Errors
    /// It fails.
    pub fn migrate(&self, from: usize, to: usize, channel: &Path, prewarm: bool) -> Result<Value> {
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is not UTF-8");
        let (source, destination) = (text(&self.path(from, "qmp"))?, text(&self.path(to, "qmp"))?);
        let (node, channel) = (Cluster::node_id(to), format!("unix:{}", text(channel)?));
        let mut words = vec!["migrate", &self.image, "--to", &node];
        words.extend(["--source-qmp", &source, "--destination-qmp", &destination]);
        words.extend(["--channel", &channel]);
        if !prewarm {
            words.push("--no-prewarm");
        }
        self.hearth.json(&words)
    }

    /// Where a guest's memory travels between two QEMUs of this disk.
    pub fn channel(&self) -> PathBuf {
        self.path(0, "channel")
    }

    /// The nodes that hold all of it in sync.
    ///
    /// # Errors
    /// Its node does not answer, or blocks are not all on the same nodes.
    pub fn members(&self) -> Result<Vec<String>> {
        let runs = self.hearth.json(&["location", "list", &self.image])?;
        let runs = runs.as_array().context("no locations")?;
        ensure!(runs.len() == 1, "its blocks are on different nodes: {runs:?}");
        let members = runs[0]["members"].as_array().context("no members")?;
        Ok(members
            .iter()
            .filter_map(|node| Some(node.as_str()?.to_owned()))
            .collect())
    }

    /// Whether a node serves it.
    ///
    /// # Errors
    /// The node does not answer.
    pub fn is_attached(&self, index: usize) -> Result<bool> {
        let node = Cluster::node_id(index);
        let info = self.hearth.json(&["image", "show", &self.image, "--node", &node])?;
        Ok(!info["attached"].is_null())
    }
}
