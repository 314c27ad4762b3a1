//! A whole cluster of real processes on this machine: nats-server, schedulers, node daemons. The demo and the
//! end-to-end tests stand on it.
//!
//! Everything lives under one temporary folder and on unix sockets and free loopback ports, so clusters do not
//! disturb each other. Dropping the cluster ends its processes, nodes first, then undoes mounts and loop devices that
//! a killed daemon left behind under that folder.

mod daemon;
mod hearth;
mod host;
mod leftovers;
mod nats;

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

pub use daemon::Daemon;
pub use hearth::Hearth;
pub use host::Host;
pub use nats::Nats;

use crate::wait;

/// Time in which all parts of a fresh cluster must have found each other.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Where a node with a host of its own listens for its peers.
const PEER_PORT: u16 = 10_809;

/// Enters the control groups named before `--` and runs what follows.
const ENTER_GROUPS: &str =
    r#"while [ "$1" != -- ]; do echo 0 > "$1/cgroup.procs" || exit 1; shift; done; shift; exec "$@""#;

/// The programs that a cluster is made of.
#[derive(Debug, Clone)]
pub struct Programs {
    /// Folder with `hearth`, `hearth-scheduler`, `hearth-node` and `hearth-fd-holder`.
    pub bin_dir: PathBuf,
    /// The nats-server.
    pub nats_server: PathBuf,
}

impl Programs {
    /// Those that a test runs with: `HEARTH_BIN_DIR`, else the build folder the test itself lies in.
    ///
    /// # Errors
    /// A program is missing; the text says how to get it.
    pub fn for_tests() -> Result<Self> {
        let bin_dir = match env::var_os("HEARTH_BIN_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => {
                let exe = env::current_exe().context("cannot tell where this test lies")?;
                let deps = exe.parent().context("this test lies nowhere")?;
                deps.parent().unwrap_or(deps).to_owned()
            }
        };
        let workspace = crate::workspace::Workspace::find()?;
        let nats_server = crate::setup::nats_server(&workspace)?;
        Self { bin_dir, nats_server }.checked()
    }

    /// Fails unless Hearth's programs are there.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub fn checked(self) -> Result<Self> {
        for name in ["hearth", "hearth-scheduler", "hearth-node", "hearth-fd-holder"] {
            let path = self.bin_dir.join(name);
            ensure!(
                path.is_file(),
                "{} is not there; run `cargo build --workspace --bins` first, or set HEARTH_BIN_DIR",
                path.display()
            );
        }
        Ok(self)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

/// What a cluster is to be like.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// How many nodes: `node-1`, `node-2` …
    pub nodes: usize,
    /// RAM tier of each node, bytes.
    pub ram_bytes: u64,
    /// Share of it that the node fills by itself, per cent.
    pub front_percent: u64,
    /// `auto`, `ebpf` or `export`.
    pub heat: &'static str,
    /// Folder to put everything under; the system's temporary folder without.
    pub under: Option<PathBuf>,
    /// Folders of control groups that the nodes start in, so that the groups' accounts hold them whole.
    pub node_groups: Vec<PathBuf>,
    /// Where nats-server, the scheduler and the `hearth` command run.
    pub control: Host,
    /// Where the nodes run, which then speak to each other over TCP; those without a place run here, on unix sockets.
    pub node_hosts: Vec<Host>,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            nodes: 1,
            ram_bytes: 32 << 20,
            // More room for promoted blocks than a node gives them by default: demo and tests are there to show them.
            front_percent: 25,
            heat: "auto",
            under: None,
            node_groups: Vec::new(),
            control: Host::default(),
            node_hosts: Vec::new(),
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    // Fields are dropped in this order: nodes before what they talk to, leftovers when no process is left.
    nodes: Vec<Daemon>,
    fd_holders: Vec<Daemon>,
    scheduler: Option<Daemon>,
    standby: Option<Daemon>,
    nats: Nats,
    _leftovers: leftovers::Leftovers,
    dir: TempDir,
    programs: Programs,
    node_groups: Vec<PathBuf>,
    control: Host,
    node_hosts: Vec<Host>,
    hearth: Hearth,
}

impl Cluster {
    /// Starts all parts and waits until a leader ticks and every node reported.
    ///
    /// # Errors
    /// A part does not come up; its log is in the text.
    pub fn start(programs: Programs, spec: &ClusterSpec) -> Result<Self> {
        let under = spec.under.clone().unwrap_or_else(env::temp_dir);
        let dir = tempfile::Builder::new()
            .prefix("hearth-")
            .tempdir_in(&under)
            .with_context(|| format!("cannot make a folder under {}", under.display()))?;
        let nats = Nats::start(&programs.nats_server, &dir.path().join("nats"), &spec.control)?;
        let hearth = Hearth::new(&programs.path("hearth"), nats.url(), spec.control.clone());
        let mut cluster = Self {
            nodes: Vec::new(),
            fd_holders: Vec::new(),
            scheduler: None,
            standby: None,
            nats,
            _leftovers: leftovers::Leftovers::under(dir.path()),
            dir,
            programs,
            node_groups: spec.node_groups.clone(),
            control: spec.control.clone(),
            node_hosts: spec.node_hosts.clone(),
            hearth,
        };
        cluster.start_scheduler()?;
        for index in 0..spec.nodes {
            let config = cluster.write_node_config(index, spec)?;
            let holder = cluster.start_fd_holder(index)?;
            cluster.fd_holders.push(holder);
            let daemon = cluster.launch_node(index, &config)?;
            cluster.nodes.push(daemon);
        }
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// The folder that everything lies under.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The `hearth` command for this cluster.
    pub fn hearth(&self) -> &Hearth {
        &self.hearth
    }

    /// The nats-server.
    pub fn nats(&mut self) -> &mut Nats {
        &mut self.nats
    }

    /// How many nodes.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// A node's id, `node-1` for index 0.
    pub fn node_id(index: usize) -> String {
        format!("node-{}", index + 1)
    }

    /// A node's process.
    pub fn node(&mut self, index: usize) -> &mut Daemon {
        &mut self.nodes[index]
    }

    /// A node's folder of stored layers.
    pub fn store_dir(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("store")
    }

    /// A node's NBD unix socket.
    pub fn socket(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("nbd.sock")
    }

    /// The scheduler's folder, with its event log.
    pub fn scheduler_dir(&self) -> PathBuf {
        self.dir.path().join("scheduler")
    }

    /// The scheduler's process.
    ///
    /// # Errors
    /// It is stopped.
    pub fn scheduler(&mut self) -> Result<&mut Daemon> {
        self.scheduler.as_mut().context("the scheduler is stopped")
    }

    /// Stops the scheduler in order.
    ///
    /// # Errors
    /// It does not end in order.
    pub fn stop_scheduler(&mut self) -> Result<()> {
        self.scheduler.take().map_or(Ok(()), |mut daemon| daemon.stop())
    }

    /// Starts the scheduler on the log it left, or on none.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_scheduler(&mut self) -> Result<()> {
        self.scheduler = Some(self.launch_scheduler("sched-1", &self.scheduler_dir(), "scheduler.log")?);
        Ok(())
    }

    /// Starts a second scheduler beside the first, on the log it left, or on none.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_standby(&mut self) -> Result<()> {
        let dir = self.dir.path().join("scheduler-2");
        self.standby = Some(self.launch_scheduler("sched-2", &dir, "scheduler-2.log")?);
        Ok(())
    }

    /// Kills the second scheduler, as a crash would.
    ///
    /// # Errors
    /// It cannot be killed.
    pub fn crash_standby(&mut self) -> Result<()> {
        self.standby.take().map_or(Ok(()), |mut daemon| daemon.kill())
    }

    fn launch_scheduler(&self, id: &str, dir: &Path, log: &str) -> Result<Daemon> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let mut command = self.control.command(&self.programs.path("hearth-scheduler"));
        command
            .args(["--nats", &self.nats.url(), "--nats-monitor", &self.nats.monitor_url()])
            // One server keeps one copy; everything else is as in production.
            .args(["--id", id, "--dev", "--dir"])
            .arg(dir);
        Daemon::start("hearth-scheduler", &mut command, &self.dir.path().join(log))
    }

    /// Kills the scheduler, as a crash would, and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub fn crash_and_restart_scheduler(&mut self) -> Result<()> {
        self.scheduler()?.kill()?;
        self.start_scheduler()
    }

    /// Kills a node daemon, as a crash would, and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub fn crash_and_restart_node(&mut self, index: usize) -> Result<()> {
        self.nodes[index].kill()?;
        self.nodes[index] = self.launch_node(index, &self.node_dir(index).join("node.toml"))?;
        Ok(())
    }

    /// Stops a node daemon in order and starts it again.
    ///
    /// # Errors
    /// It does not end in order, or does not start.
    pub fn restart_node(&mut self, index: usize) -> Result<()> {
        self.nodes[index].stop()?;
        self.nodes[index] = self.launch_node(index, &self.node_dir(index).join("node.toml"))?;
        Ok(())
    }

    /// Fails if any process has ended by itself.
    ///
    /// # Errors
    /// Names the process, with the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        self.nats.daemon().check_running()?;
        let schedulers = self.scheduler.iter_mut().chain(&mut self.standby);
        for daemon in schedulers.chain(&mut self.fd_holders) {
            daemon.check_running()?;
        }
        self.nodes.iter_mut().try_for_each(Daemon::check_running)
    }

    /// The cluster as the leading scheduler sees it.
    ///
    /// # Errors
    /// No scheduler leads, or NATS is away.
    pub fn view(&self) -> Result<Value> {
        self.hearth.json(&["status"])
    }

    /// Waits until a leader ticks and every node is present.
    ///
    /// # Errors
    /// A process ended, or the deadline came.
    pub fn wait_ready(&mut self) -> Result<()> {
        let all_running = wait::until("a leader and all nodes", READY_WITHIN, || {
            if let Err(ended) = self.check_running() {
                // Waiting longer brings nothing back.
                return Ok(Some(Err(ended)));
            }
            let view = self.view()?;
            let present = view["nodes"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|node| node["present"] == true)
                .count();
            Ok((!view["leader"].is_null() && present == self.nodes.len()).then_some(Ok(())))
        });
        all_running?
    }

    /// Keeps a node's kernel devices and listening socket open while its daemon restarts.
    fn start_fd_holder(&self, index: usize) -> Result<Daemon> {
        let (socket, log) = (self.fd_socket(index), self.node_dir(index).join("fd-holder.log"));
        let mut command = Command::new(self.programs.path("hearth-fd-holder"));
        command.arg("--socket").arg(&socket);
        let holder = Daemon::start("hearth-fd-holder", &mut command, &log)?;
        wait::until("the descriptor holder to listen", READY_WITHIN, || {
            Ok(socket.exists().then_some(()))
        })?;
        Ok(holder)
    }

    fn fd_socket(&self, index: usize) -> PathBuf {
        self.node_dir(index).join("fds.sock")
    }

    fn node_dir(&self, index: usize) -> PathBuf {
        self.dir.path().join(Self::node_id(index))
    }

    fn write_node_config(&self, index: usize, spec: &ClusterSpec) -> Result<PathBuf> {
        let dir = self.node_dir(index);
        for part in ["store", "links", "mounts"] {
            let part = dir.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        let id = Self::node_id(index);
        let mut text = format!(
            "id = {id:?}\nnats = {nats:?}\nstore_dir = {store:?}\nram_bytes = {ram}\nfront_percent = {front}\n\
             socket = {socket:?}\nfd_holder = {fds:?}\ndevice_link_root = {links:?}\n\
             mount_root = {mounts:?}\nheat = {heat:?}\nfault_domain = \"rack-{rack}\"\n",
            nats = self.nats.url(),
            store = dir.join("store"),
            ram = spec.ram_bytes,
            front = spec.front_percent,
            socket = dir.join("nbd.sock"),
            fds = self.fd_socket(index),
            links = dir.join("links"),
            mounts = dir.join("mounts"),
            heat = spec.heat,
            rack = index + 1,
        );
        if let Some(host) = self.node_hosts.get(index) {
            let _ = writeln!(text, "peer_listen = \"tcp:{}:{PEER_PORT}\"", host.address());
        }
        let path = dir.join("node.toml");
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn launch_node(&self, index: usize, config: &Path) -> Result<Daemon> {
        let program = self.programs.path("hearth-node");
        let host = self.node_hosts.get(index).cloned().unwrap_or_default();
        let mut command = if self.node_groups.is_empty() {
            host.command(&program)
        } else {
            // The shell moves itself into the groups and becomes the daemon: the same process.
            let mut shell = host.command(Path::new("sh"));
            shell.args(["-c", ENTER_GROUPS, "sh"]).args(&self.node_groups);
            shell.arg("--").arg(program);
            shell
        };
        command.arg("--config").arg(config);
        Daemon::start(
            format!("hearth-node {}", Self::node_id(index)),
            &mut command,
            &self.node_dir(index).join("node.log"),
        )
    }
}
