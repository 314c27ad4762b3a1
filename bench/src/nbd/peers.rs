//! Hearth's servers and the peers', started and ended.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::load::{self, Figures, Job};
use super::{DISK_BYTES, MEMORY_BYTES};

/// How long a server may take to open its socket or device: Hearth's fill their memory first.
const START_WITHIN: Duration = Duration::from_secs(20);

/// The core of the servers of disks in memory; the client has core 0. Whether two processes share a core decides most of
/// the time of a request that waits for nothing else, and would otherwise be the scheduler's whim, run by run.
pub const SERVER_CORE: usize = 1;

/// Runs the calling thread, and what it starts, on one core only.
///
/// # Errors
/// The kernel's, such as that there is no such core.
fn run_on(core: usize) -> std::io::Result<()> {
    // SAFETY: a set of processors is plain numbers, all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is ours, and the call reads that many bytes of it.
    let done = unsafe {
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Starts a process and waits until `ready`.
///
/// # Errors
/// It cannot be started, ends at once, or is not ready in time.
pub fn start(mut command: Command, stdin: Stdio, mut ready: impl FnMut() -> bool) -> Result<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.stdin(stdin).stdout(Stdio::null()).spawn().with_context(|| {
        format!("starting {program}; the peers are in the packages nbdkit, qemu-utils and qemu-system-common")
    })?;
    let started = Instant::now();
    while !ready() {
        if let Some(status) = child.try_wait()? {
            bail!("{program} ended at once: {status}");
        }
        if started.elapsed() > START_WITHIN {
            let _ = child.kill();
            bail!("{program} was not ready within {} s", START_WITHIN.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}

/// This program, as one of the servers of [`super::serve`].
///
/// # Errors
/// The program's own path is not known.
pub fn hearth(size_bytes: u64, words: &[&Path]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("serve").arg(size_bytes.to_string()).args(words);
    Ok(command)
}

/// An NBD server that ends with this.
pub struct Server {
    /// For the table.
    pub name: &'static str,
    child: Child,
    socket: PathBuf,
    pinned: bool,
}

impl Server {
    /// With `core`, all of its threads run on that core only.
    fn new(name: &'static str, command: Command, core: Option<usize>, socket: PathBuf) -> Result<Self> {
        let command = match core {
            Some(core) => {
                let mut pinned = Command::new("taskset");
                pinned.args(["--cpu-list", &core.to_string()]);
                pinned.arg(command.get_program()).args(command.get_args());
                pinned
            }
            None => command,
        };
        let child = start(command, Stdio::null(), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        })?;
        Ok(Self {
            name,
            child,
            socket,
            pinned: core.is_some(),
        })
    }

    /// Hearth with every block in RAM.
    pub fn hearth_memory(dir: &Path) -> Result<Self> {
        let socket = dir.join("memory");
        Self::new(
            "hearth",
            hearth(MEMORY_BYTES, &[Path::new("memory"), &socket, &dir.join("store")])?,
            Some(SERVER_CORE),
            socket,
        )
    }

    /// Hearth's store and volume, with a RAM tier that holds next to nothing.
    pub fn hearth_volume(dir: &Path) -> Result<Self> {
        let socket = dir.join("volume");
        let command = hearth(DISK_BYTES, &[Path::new("volume"), &socket, &dir.join("store")])?;
        Self::new("hearth", command, None, socket)
    }

    /// Answers without looking.
    pub fn null(dir: &Path) -> Result<Self> {
        let socket = dir.join("null");
        Self::new(
            "null",
            hearth(MEMORY_BYTES, &[Path::new("null"), &socket])?,
            Some(SERVER_CORE),
            socket,
        )
    }

    /// `nbdkit memory`.
    pub fn nbdkit_memory(dir: &Path) -> Result<Self> {
        let socket = dir.join("nbdkit");
        let mut command = Command::new("nbdkit");
        command.args(["--foreground", "--unix"]).arg(&socket);
        command.args(["memory", &MEMORY_BYTES.to_string()]);
        Self::new("nbdkit memory", command, Some(SERVER_CORE), socket)
    }

    /// `qemu-nbd` on a new file in `dir`.
    pub fn qemu_nbd(
        name: &'static str,
        dir: &Path,
        size_bytes: u64,
        words: &[&str],
        core: Option<usize>,
    ) -> Result<Self> {
        let file = tempfile::Builder::new().prefix("peer-").tempfile_in(dir)?;
        file.as_file().set_len(size_bytes)?;
        // It goes with the folder.
        let (_, file) = file.keep()?;
        let socket = file.with_extension("socket");
        let mut command = Command::new("qemu-nbd");
        command
            .args(["--persistent", "--format=raw", "--discard=unmap", "--shared=8"])
            .args(words)
            .arg("--socket")
            .arg(&socket)
            .arg(&file);
        Self::new(name, command, core, socket)
    }

    fn socket(&self) -> Result<&str> {
        self.socket.to_str().context("a plain path")
    }

    /// Writes its whole disk.
    pub fn fill(&self) -> Result<()> {
        load::fill(self.socket()?).with_context(|| format!("filling {}", self.name))
    }

    /// Runs a job; against a server that has a core to itself, from another core.
    pub fn measure(&self, job: Job, length: Duration) -> Result<Figures> {
        let socket = self.socket()?;
        let client = || {
            if self.pinned {
                run_on(0).context("moving the client to core 0")?;
            }
            load::run(socket, job, length, self.child.id())
        };
        let figures = std::thread::scope(|scope| scope.spawn(client).join().expect("the client does not panic"));
        let figures = figures.with_context(|| format!("measuring {}", self.name))?;
        ensure!(figures.ops_per_s > 0.0, "{} answered nothing", self.name);
        Ok(figures)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
