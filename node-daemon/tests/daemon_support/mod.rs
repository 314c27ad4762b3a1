//! A real node daemon in a process of its own, with a descriptor holder, and no NATS: what it serves survives its
//! death.

// Each test file uses its part of this.
#![allow(dead_code)]

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_node::config::NodeConfig;
use hearth_node::store::fault::{Arm, Faults};
use hearth_node::store::{Store, StoreOptions};
use hearth_protocol::ImageId;

/// The image that it serves.
pub const IMAGE: &str = "appl/vm-1";

/// Time for the daemon to serve after its start, on a machine that does other things too.
const UP_WITHIN: Duration = Duration::from_secs(60);

/// Configuration of a daemon that a test binary becomes; set only for children of tests.
const CHILD_CONFIG: &str = "HEARTH_TEST_DAEMON_CONFIG";
/// Its fault, as [`Arm`] reads it.
const CHILD_FAULT: &str = "HEARTH_TEST_DAEMON_FAULT";

/// The body of a test that is none: in a child of [`Daemon::restart_with_fault`] it becomes the real daemon, with a
/// fault in its store.
pub fn become_daemon() {
    let Some(config) = std::env::var_os(CHILD_CONFIG) else {
        return;
    };
    let arm: Arm = std::env::var(CHILD_FAULT).unwrap().parse().unwrap();
    let config = NodeConfig::load(Path::new(&config)).unwrap();
    hearth_node::agent::run(config, Faults::hook(move |call| arm.answer(call))).unwrap();
}

/// A daemon, its store and its holder; ended when dropped.
pub struct Daemon {
    node: Child,
    holder: Child,
    dir: PathBuf,
}

/// One death.
#[derive(Debug, Clone, Copy)]
pub struct Outage {
    /// When it was killed.
    pub began: Instant,
    /// Until a client was greeted again.
    pub took: Duration,
}

/// A program of this crate: from `HEARTH_BIN_DIR`, else as just built.
fn program(name: &str, built: &str) -> PathBuf {
    std::env::var_os("HEARTH_BIN_DIR").map_or_else(|| built.into(), |dir| Path::new(&dir).join(name))
}

fn spawn(program: &Path, arguments: &[&str], log: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(log).unwrap();
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Daemon {
    /// Makes a store in `dir` with [`IMAGE`], which `fill` makes, and serves it.
    pub fn start(dir: &Path, fill: impl FnOnce(&Store) -> ImageId) -> Self {
        let path = dir.join("store");
        let store = Arc::new(Store::open(&path, StoreOptions::default()).unwrap());
        let image = fill(&store);
        drop(store);
        // What the daemon writes down of the images it serves; it serves them again at its start.
        let list = serde_json::json!([{ "image": image, "epoch": 1, "lease": hearth_protocol::LeaseId(1), "export": "socket" }]);
        fs::write(path.join("served"), list.to_string()).unwrap();
        let config = format!(
            "id = \"node-1\"\nnats = \"nats://127.0.0.1:1\"\nstore_dir = {path:?}\nram_bytes = \"16MiB\"\n\
             socket = {socket:?}\nfd_holder = {holder:?}\ndevice_link_root = {links:?}\nmount_root = {mounts:?}\n\
             heat = \"export\"\n",
            socket = dir.join("nbd.sock"),
            holder = dir.join("holder.sock"),
            links = dir.join("links"),
            mounts = dir.join("mounts"),
        );
        fs::write(dir.join("node.toml"), config).unwrap();
        let socket = dir.join("holder.sock");
        let holder = spawn(
            &program("hearth-fd-holder", env!("CARGO_BIN_EXE_hearth-fd-holder")),
            &["--socket", socket.to_str().unwrap()],
            &dir.join("holder.log"),
        );
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < UP_WITHIN, "the descriptor holder does not listen");
            std::thread::yield_now();
        }
        let daemon = Self {
            node: Self::spawn_node(dir),
            holder,
            dir: dir.to_owned(),
        };
        daemon.wait_greeting();
        daemon
    }

    fn spawn_node(dir: &Path) -> Child {
        let config = dir.join("node.toml");
        spawn(
            &program("hearth-node", env!("CARGO_BIN_EXE_hearth-node")),
            &["--config", config.to_str().unwrap()],
            &dir.join("node.log"),
        )
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("nbd.sock")
    }

    /// Waits until a client is greeted. The socket itself takes connections all the time.
    fn wait_greeting(&self) {
        let began = Instant::now();
        loop {
            let greeted = UnixStream::connect(self.socket()).and_then(|mut socket| {
                socket.set_read_timeout(Some(UP_WITHIN))?;
                socket.read_exact(&mut [0; 18])
            });
            match greeted {
                Ok(()) => return,
                Err(error) => {
                    let log = fs::read_to_string(self.dir.join("node.log")).unwrap_or_default();
                    assert!(
                        began.elapsed() < UP_WITHIN,
                        "the daemon does not serve ({error}): {log}"
                    );
                    std::thread::yield_now();
                }
            }
        }
    }

    /// `kill -9`, and a new process with a fault in its store; the test binary has a test `child` that calls
    /// [`become_daemon`].
    pub fn restart_with_fault(&mut self, child: &str, fault: &str) {
        self.node.kill().unwrap();
        self.node.wait().unwrap();
        let log = fs::File::options()
            .append(true)
            .open(self.dir.join("node.log"))
            .unwrap();
        self.node = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", child, "--nocapture"])
            .env(CHILD_CONFIG, self.dir.join("node.toml"))
            .env(CHILD_FAULT, fault)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.wait_greeting();
    }

    /// `kill -9`, and a new process.
    ///
    /// It stays away for `away`: a restart alone is over before anybody feels it.
    pub fn die_and_restart(&mut self, away: Duration) -> Outage {
        let began = Instant::now();
        self.node.kill().unwrap();
        self.node.wait().unwrap();
        // The outage itself, not a wait for anything.
        std::thread::sleep(away);
        self.node = Self::spawn_node(&self.dir);
        self.wait_greeting();
        Outage {
            began,
            took: began.elapsed(),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for child in [&mut self.node, &mut self.holder] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
