//! Reads as fio makes and measures them, and writes that it verifies: unbuffered, on a kernel device or over NBD.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::{process, wait};

/// Bytes of one read.
pub const READ_BYTES: u64 = 4096;

/// Time for one measurement, which takes seconds.
const WITHIN: Duration = Duration::from_secs(60);

/// What fio reads from.
#[derive(Debug, Clone)]
pub enum Target {
    /// A kernel block device.
    Device(PathBuf),
    /// An export on a unix socket.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// The export.
        export: String,
    },
}

/// What fio measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Reads done.
    pub reads: u64,
    /// Median of a read, microseconds.
    pub p50_us: f64,
    /// 99th percentile of a read, microseconds.
    pub p99_us: f64,
    /// Seconds from the first to the last.
    pub took_s: f64,
}

/// Whether fio is there and can read from a target of this kind.
pub fn can_read(target: &Target) -> bool {
    let engine = Command::new("fio")
        .arg(format!("--enghelp={}", engine(target)))
        .output();
    engine.is_ok_and(|out| out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("not found"))
}

fn engine(target: &Target) -> &'static str {
    match target {
        Target::Device(_) => "libaio",
        Target::Nbd { .. } => "nbd",
    }
}

/// Reads with these further options; the same options read the same places in the same order.
///
/// # Errors
/// fio is missing, or a read failed.
pub fn read(target: &Target, options: &[String]) -> Result<Measured> {
    let mut command = Command::new("fio");
    command
        .args([
            "--name=read",
            "--rw=randread",
            "--direct=1",
            "--readonly",
            "--norandommap",
        ])
        .args(["--randseed=4711", "--allow_file_create=0", "--output-format=json"])
        .args(["--percentile_list=50:99", "--thread"])
        .arg(format!("--bs={READ_BYTES}"))
        .arg(format!("--ioengine={}", engine(target)));
    aim(&mut command, target);
    command.args(options);
    let output = tempfile::NamedTempFile::new()?;
    command.arg(format!("--output={}", output.path().display()));
    let shown = process::shown(&command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("cannot start fio")?;
    // A read of a kernel device whose daemon died waits for its return, and fio cannot be killed meanwhile: it is
    // left behind and ends when the cluster that is dropped after this error gives the device up.
    let ended = wait::until(&format!("`{shown}`"), WITHIN, || Ok(child.try_wait()?));
    if ended.is_err() {
        let _ = child.kill();
    }
    let status = ended?;
    let text = std::fs::read_to_string(output.path())?;
    ensure!(status.success(), "`{shown}` ended with {status}: {text:.400}");
    // Notes may stand before the document.
    let from = text.find('{').context("fio printed no JSON")?;
    let told: Value =
        serde_json::from_str(&text[from..]).with_context(|| format!("fio printed no JSON: {text:.400}"))?;
    let job = &told["jobs"][0];
    ensure!(job["error"] == 0, "fio saw error {}", job["error"]);
    let read = &job["read"];
    let number = |value: &Value, what: &str| value.as_f64().with_context(|| format!("fio does not tell {what}"));
    let percentile = &read["clat_ns"]["percentile"];
    Ok(Measured {
        reads: read["total_ios"].as_u64().context("fio does not count its reads")?,
        p50_us: number(&percentile["50.000000"], "a median")? / 1e3,
        p99_us: number(&percentile["99.000000"], "a 99th percentile")? / 1e3,
        took_s: number(&read["runtime"], "how long it read")? / 1e3,
    })
}

/// fio writing all of a target in a random order and reading it back with checksums, again and again.
#[derive(Debug)]
pub struct Verifying {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Verifying {
    /// Starts over the first `bytes` of a target.
    pub fn start(target: Target, bytes: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut passes = 0;
            while !seen.load(Ordering::SeqCst) {
                verify(&target, bytes, passes)?;
                passes += 1;
            }
            Ok(passes)
        });
        Self { stop, thread }
    }

    /// Ends it after the pass under way, and says how many there were.
    ///
    /// # Errors
    /// A request failed, or read something else than was written.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread
            .join()
            .unwrap_or_else(|_| bail!("the thread that runs fio panicked"))
    }
}

fn verify(target: &Target, bytes: u64, seed: u64) -> Result<()> {
    let mut command = Command::new("fio");
    command
        .args([
            "--name=verify",
            "--rw=randwrite",
            "--direct=1",
            "--thread",
            "--iodepth=8",
        ])
        .args([
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=64",
        ])
        .arg(format!("--randseed={}", seed + 1))
        .arg(format!("--size={bytes}"))
        .arg(format!("--bs={READ_BYTES}"))
        .arg(format!("--ioengine={}", engine(target)));
    aim(&mut command, target);
    process::output(&mut command).map(drop)
}

fn aim(command: &mut Command, target: &Target) {
    match target {
        Target::Device(device) => command.arg(format!("--filename={}", device.display())),
        Target::Nbd { socket, export } => {
            command.arg(format!("--uri=nbd+unix:///{export}?socket={}", socket.display()))
        }
    };
}
