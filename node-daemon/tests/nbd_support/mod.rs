//! What the NBD tests share: a server of its own for each test, and stock clients.

// Each test file uses its part of this.
#![allow(dead_code)]

pub mod gated;
pub mod raw;

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::thread;

use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::OneExport;
use hearth_node::export::nbd::{ExportTable, NbdHandle, NbdLimits, NbdServer, SOCKET_MODE};
use tokio::sync::oneshot;
use xtask::process::stock;

/// Name of the export in most tests.
pub const EXPORT: &str = "appl/vm-1";

/// A running server in a directory of its own; ends when dropped.
pub struct Served {
    pub directory: tempfile::TempDir,
    pub socket: PathBuf,
    pub handle: NbdHandle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Served {
    /// Serves `disk` as [`EXPORT`] under the usual limits.
    pub fn new(disk: Arc<dyn Disk>) -> Self {
        Self::with(Arc::new(OneExport::shared(EXPORT, disk)), NbdLimits::default())
    }

    /// Serves `table` under `limits`.
    pub fn with(table: Arc<dyn ExportTable>, limits: NbdLimits) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("hearth-nbd-")
            .tempdir()
            .expect("a temporary directory");
        let socket = directory.path().join("nbd.sock");
        let server = NbdServer::bind_unix(&socket, SOCKET_MODE).expect("a free path");
        Self::start(directory, socket, server, table, limits)
    }

    /// Runs `server`.
    pub fn start(
        directory: tempfile::TempDir,
        socket: PathBuf,
        server: NbdServer,
        table: Arc<dyn ExportTable>,
        limits: NbdLimits,
    ) -> Self {
        let handle = server.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let body = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime
                .block_on(server.run(table, limits, async { drop(stopped.await) }))
                .expect("the server runs to its end");
        };
        let thread = Some(thread::spawn(body));
        Self {
            directory,
            socket,
            handle,
            stop: Some(stop),
            thread,
        }
    }

    /// The URI that stock clients take.
    pub fn uri(&self) -> String {
        self.uri_of(EXPORT)
    }

    /// The URI of one export.
    pub fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// A path in the server's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Stops the server as a daemon does, and waits until it is gone.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server ended well");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Whether all of `tools` can be run. If not, says so; where `REQUIRE_E2E=1`, that is a failure.
pub fn have(tools: &[&str]) -> bool {
    let missing: Vec<_> = tools.iter().copied().filter(|tool| !runs(tool)).collect();
    if missing.is_empty() {
        return true;
    }
    skip(&format!(
        "not installed: {} (Debian: libnbd-bin, qemu-utils, fio, python3-libnbd)",
        missing.join(", ")
    ));
    false
}

/// Says that a test could not run.
pub fn skip(reason: &str) {
    println!("SKIP: {reason}");
    assert!(
        std::env::var("REQUIRE_E2E").as_deref() != Ok("1"),
        "REQUIRE_E2E=1 and {reason}"
    );
}

fn runs(tool: &str) -> bool {
    let mut words = tool.split(' ');
    let mut command = stock(words.next().expect("a tool has a name"));
    let arguments: Vec<_> = words.collect();
    if arguments.is_empty() {
        command.arg("--version");
    }
    command
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a command to its end.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    stock(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("run {program}: {error}"))
}

/// Runs a command that must succeed, and returns what it printed.
pub fn ok(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{stdout}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Reproducible bytes without pattern at any block size.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
