//! One QEMU machine and the conversation over its serial console.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Accel;
use crate::wait;

/// Lines kept for a waiter; more are in the log file only.
const LINES_MAX: usize = 4_096;
/// Lines that an error shows.
const LINES_SHOWN_MAX: usize = 15;
/// Lines of it that are shown of a crash of its kernel.
const CRASH_LINES_MAX: usize = 80;
/// How Linux begins to tell of a crash that it may not outlive, and how it ends.
const CRASHES: [&str; 3] = ["kernel BUG at", "BUG: ", "Oops: "];
const CRASH_TOLD: &str = "---[ end trace";
/// How often a wait looks for Ctrl-C.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Where a guest's disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestDisk {
    /// A kernel block device, used past the host's page cache.
    Device(PathBuf),
    /// An NBD export on a unix socket. The guest waits while the socket's owner restarts.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
    /// A raw file, used past the host's page cache.
    File(PathBuf),
}

impl GuestDisk {
    fn blockdev(&self) -> serde_json::Value {
        use serde_json::json;
        let base = match self {
            GuestDisk::Device(path) => json!({"driver": "host_device", "filename": path, "aio": "native"}),
            GuestDisk::File(path) => json!({"driver": "file", "filename": path, "aio": "native"}),
            GuestDisk::Nbd { socket, export } => json!({
                "driver": "nbd",
                "server": {"type": "unix", "path": socket},
                "export": export,
                "reconnect-delay": 300,
                "open-timeout": 30,
            }),
        };
        let mut all = base;
        all["node-name"] = "disk0".into();
        all["discard"] = "unmap".into();
        all["cache"] = json!({"direct": true, "no-flush": false});
        all
    }
}

/// How to start a guest.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// QEMU's name for it, and the one in messages.
    pub name: String,
    /// What it boots from.
    pub disk: GuestDisk,
    /// What executes it, see [`super::choose`].
    pub accel: Accel,
    /// Its memory; 160 MiB are enough.
    pub memory_mib: u64,
    /// Everything that it prints goes here.
    pub console_log: PathBuf,
    /// Unix sockets for QEMU's monitors; one talks to one client at a time.
    pub qmp_sockets: Vec<PathBuf>,
    /// Does not boot: it waits for a guest that migrates here.
    pub incoming: bool,
}

/// What a guest says when it has booted.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    /// Milliseconds since its kernel started.
    pub boot_ms: u64,
    /// 4 KiB pages in its data file.
    pub pages: u64,
}

/// What a guest is to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Phase {
    /// Letters, digits and `-`; comes back in the result.
    pub name: String,
    /// Length.
    pub seconds: f64,
    /// Chooses which blocks are hot.
    pub seed: u64,
    /// Exponent of the Zipf law in thousandths; 0 is uniform.
    pub skew_permille: u64,
    /// Size of what is hot together.
    pub block_kib: u64,
    /// First so many MiB of the data that are used; 0 for all.
    pub span_mib: u64,
    /// Writes among 1,000 accesses; the others are reads.
    pub write_permille: u64,
    /// Accesses under way at a time.
    pub depth: u64,
    /// Microseconds between the end of an access and the next one of the same thread: a guest that computes, too.
    pub pause_us: u64,
}

impl Default for Phase {
    fn default() -> Self {
        Self {
            name: "run".into(),
            seconds: 10.0,
            seed: 1,
            skew_permille: 1100,
            block_kib: 64,
            span_mib: 0,
            write_permille: 100,
            depth: 1,
            pause_us: 0,
        }
    }
}

/// What a guest measured in a phase.
#[derive(Debug, Clone, PartialEq)]
pub struct PhaseResult {
    /// The phase's name.
    pub name: String,
    /// 4 KiB reads.
    pub reads: u64,
    /// 4 KiB writes.
    pub writes: u64,
    /// Accesses that failed.
    pub errors: u64,
    /// Reads that returned something else than was last written there.
    pub corrupt: u64,
    /// The first failure or wrong page, in words; empty if there was none.
    pub first_failure: String,
    /// Length.
    pub wall_ms: u64,
    /// Median latency of a read.
    pub read_p50_us: f64,
    /// 99th percentile.
    pub read_p99_us: f64,
    /// Median latency of a write.
    pub write_p50_us: f64,
    /// 99th percentile.
    pub write_p99_us: f64,
    /// The longest access.
    pub longest_ms: u64,
    /// Accesses that took longer than 100 ms, in the order in which they began.
    pub stalls: Vec<Stall>,
}

/// An access that took long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// From the phase's beginning to its own.
    pub at_ms: u64,
    /// How long it took.
    pub took_ms: u64,
}

impl PhaseResult {
    fn parse(text: &str) -> Result<Self> {
        let json: serde_json::Value = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
        let whole = |key: &str| json[key].as_u64().with_context(|| format!("no {key} in {text}"));
        let real = |key: &str| json[key].as_f64().with_context(|| format!("no {key} in {text}"));
        let words = |key: &str| {
            json[key]
                .as_str()
                .map(str::to_owned)
                .with_context(|| format!("no {key} in {text}"))
        };
        Ok(Self {
            name: words("name")?,
            reads: whole("reads")?,
            writes: whole("writes")?,
            errors: whole("errors")?,
            corrupt: whole("corrupt")?,
            first_failure: words("first_failure")?,
            wall_ms: whole("wall_ms")?,
            read_p50_us: real("read_p50_us")?,
            read_p99_us: real("read_p99_us")?,
            write_p50_us: real("write_p50_us")?,
            write_p99_us: real("write_p99_us")?,
            longest_ms: whole("longest_ms")?,
            stalls: json["stalls"]
                .as_array()
                .with_context(|| format!("no stalls in {text}"))?
                .iter()
                .filter_map(|pair| {
                    Some(Stall {
                        at_ms: pair[0].as_u64()?,
                        took_ms: pair[1].as_u64()?,
                    })
                })
                .collect(),
        })
    }
}

#[derive(Default)]
struct Console {
    lines: VecDeque<String>,
    closed: bool,
}

type SharedConsole = Arc<(Mutex<Console>, Condvar)>;

/// A running machine. It is ended when dropped.
pub struct Guest {
    name: String,
    child: Child,
    input: ChildStdin,
    console: SharedConsole,
    began: Instant,
}

impl Guest {
    /// Starts a machine that boots from its disk.
    ///
    /// # Errors
    /// QEMU cannot be started, or the log cannot be written. That the disk does not boot shows in
    /// [`Guest::wait_ready`].
    pub fn boot(options: &GuestOptions) -> Result<Self> {
        let log = File::create(&options.console_log)
            .with_context(|| format!("cannot write {}", options.console_log.display()))?;
        let errors = log.try_clone().context("cannot share the console's log")?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-name", &options.name, "-machine", "pc", "-accel", options.accel.name()])
            .args([
                "-cpu",
                if options.accel == Accel::Kvm { "host" } else { "max" },
                "-smp",
                "1",
            ])
            .args([
                "-m",
                &options.memory_mib.to_string(),
                "-nodefaults",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-serial", "stdio", "-blockdev", &options.disk.blockdev().to_string()])
            // 512-byte sectors, because a BIOS knows no other; the guest's file system uses 4,096 all the same.
            .arg("-device")
            .arg(
                "virtio-blk-pci,drive=disk0,bootindex=1,werror=stop,rerror=stop,\
                 logical_block_size=512,physical_block_size=4096,serial=hearth",
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        for socket in &options.qmp_sockets {
            command
                .arg("-qmp")
                .arg(format!("unix:{},server=on,wait=off", socket.display()));
        }
        if options.incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command
            .spawn()
            .context("cannot start qemu-system-x86_64; install qemu-system-x86")?;
        let input = child.stdin.take().context("QEMU's input was not piped")?;
        let output = child.stdout.take().context("QEMU's output was not piped")?;
        let console = SharedConsole::default();
        let shared = Arc::clone(&console);
        thread::Builder::new()
            .name(format!("console-{}", options.name))
            .spawn(move || follow(output, log, &shared))
            .context("cannot start a thread")?;
        Ok(Self {
            name: options.name.clone(),
            child,
            input,
            console,
            began: Instant::now(),
        })
    }

    /// The process id of its QEMU.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Time since QEMU was started.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    fn console(&self) -> MutexGuard<'_, Console> {
        self.console.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a line with `marker`, drops what came before it, and returns the rest of that line.
    ///
    /// # Errors
    /// It does not come in time, the guest reports a failure, its kernel crashes, or the machine ends. The console's last
    /// lines are in the error.
    pub fn wait_for(&mut self, marker: &str, timeout: Duration) -> Result<String> {
        const FAILED: &str = "HEARTH-GUEST-FAILED";
        let deadline = Instant::now() + timeout;
        let mut recent: VecDeque<String> = VecDeque::new();
        let mut crashed = false;
        let name = self.name.clone();
        let tail = |recent: &VecDeque<String>| recent.iter().map(|l| format!("\n  | {l}")).collect::<String>();
        let mut console = self.console();
        loop {
            while let Some(line) = console.lines.pop_front() {
                if let Some(at) = line.find(marker) {
                    return Ok(line[at + marker.len()..].trim().to_owned());
                }
                if let Some(at) = line.find(FAILED) {
                    bail!("guest {name}: {}", line[at + FAILED.len()..].trim());
                }
                crashed |= CRASHES.iter().any(|how| line.contains(how));
                let is_told = crashed && line.contains(CRASH_TOLD);
                recent.push_back(line);
                if is_told {
                    bail!("the kernel of guest {name} crashed; its console:{}", tail(&recent));
                }
                if recent.len() > if crashed { CRASH_LINES_MAX } else { LINES_SHOWN_MAX } {
                    recent.pop_front();
                }
            }
            if console.closed {
                bail!(
                    "guest {name} ended before it said {marker}; its console:{}",
                    tail(&recent)
                );
            }
            wait::check_interrupted()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "guest {name} did not say {marker} within {} s; its console:{}",
                    timeout.as_secs(),
                    tail(&recent)
                );
            }
            console = self
                .console
                .1
                .wait_timeout(console, left.min(LOOK_EVERY))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until it has booted.
    ///
    /// # Errors
    /// See [`Guest::wait_for`].
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<Ready> {
        let text = self.wait_for("HEARTH-GUEST-READY", timeout)?;
        let json: serde_json::Value = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))?;
        Ok(Ready {
            boot_ms: json["boot_ms"]
                .as_u64()
                .with_context(|| format!("no boot_ms in {text}"))?,
            pages: json["pages"].as_u64().with_context(|| format!("no pages in {text}"))?,
        })
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")
            .and_then(|()| self.input.flush())
            .with_context(|| format!("guest {} does not listen any more", self.name))
    }

    /// Starts a phase; [`Guest::finish_phase`] waits for its end. Several guests can so run at the same time.
    ///
    /// # Errors
    /// The machine has ended.
    pub fn start_phase(&mut self, phase: &Phase) -> Result<()> {
        ensure!(
            !phase.name.is_empty() && phase.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "the phase's name {:?} is not of letters, digits and -",
            phase.name
        );
        let Phase {
            name,
            seconds,
            seed,
            skew_permille,
            block_kib,
            span_mib,
            write_permille,
            depth,
            pause_us,
        } = phase;
        self.tell(&format!(
            "run name={name} seconds={seconds} seed={seed} skew_permille={skew_permille} block_kib={block_kib} \
             span_mib={span_mib} write_permille={write_permille} depth={depth} pause_us={pause_us}"
        ))
    }

    /// Waits for the result of the phase that was started.
    ///
    /// # Errors
    /// See [`Guest::wait_for`].
    pub fn finish_phase(&mut self, timeout: Duration) -> Result<PhaseResult> {
        let text = self.wait_for("HEARTH-GUEST-PHASE", timeout)?;
        PhaseResult::parse(&text).with_context(|| format!("guest {} answered strangely", self.name))
    }

    /// Asks it to write everything out and stop, and waits until QEMU has ended.
    ///
    /// # Errors
    /// It does not stop in time, or its file system was not clean. It is then ended the hard way.
    pub fn stop(mut self, timeout: Duration) -> Result<()> {
        self.tell("stop")?;
        self.wait_for("HEARTH-GUEST-CLEAN", timeout)?;
        let name = self.name.clone();
        let status: ExitStatus = wait::until(&format!("the end of guest {name}"), timeout, || {
            self.child
                .try_wait()
                .with_context(|| format!("cannot wait for guest {name}"))
        })?;
        ensure!(status.success(), "QEMU of guest {name} ended with {status}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Already ended after a good stop; then both do nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies the console into the log and to whoever waits.
fn follow(output: impl std::io::Read, mut log: File, console: &SharedConsole) {
    for line in BufReader::new(output).split(b'\n').map_while(std::io::Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
        // A full disk must not stop the guest.
        let _ = writeln!(log, "{line}");
        let mut shared = console.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared.lines.push_back(line);
        if shared.lines.len() > LINES_MAX {
            shared.lines.pop_front();
        }
        drop(shared);
        console.1.notify_all();
    }
    console.0.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
    console.1.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_whole_or_not_at_all() {
        let text = r#"{"name":"before","reads":10,"writes":1,"errors":0,"corrupt":0,"wall_ms":1000,"read_p50_us":90.5,
            "read_p99_us":800.0,"write_p50_us":1.0,"write_p99_us":2.0,"longest_ms":130,"stalls":[[7,130]],
            "first_failure":""}"#;
        let result = PhaseResult::parse(text).unwrap();
        assert_eq!(
            (result.name.as_str(), result.reads, result.read_p99_us),
            ("before", 10, 800.0)
        );
        assert_eq!(result.stalls, [Stall { at_ms: 7, took_ms: 130 }]);
        let error = PhaseResult::parse(&text.replace("corrupt", "other"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no corrupt in"), "{error}");
    }

    #[test]
    fn disks_bypass_the_hosts_page_cache() {
        let nbd = GuestDisk::Nbd {
            socket: "/run/n.sock".into(),
            export: "a/b".into(),
        };
        for disk in [nbd, GuestDisk::Device("/dev/hearth/a/b".into())] {
            let blockdev = disk.blockdev();
            assert_eq!(blockdev["cache"]["direct"], true);
            assert_eq!(blockdev["node-name"], "disk0");
        }
    }
}
