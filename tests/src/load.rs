//! Load as a guest makes it: QEMU's own block layer (`qemu-io`) over NBD with `reconnect-delay`, writing patterns and
//! reading them back. It stalls while the server is away, as a guest would, and any error counts.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use xtask::wait;

/// Seconds for which QEMU holds requests back while the server is away.
const RECONNECT_DELAY_S: u32 = 120;

/// Bytes of one request.
const REQUEST_BYTES: u64 = 64 << 10;

/// What a load wrote last to each 64 KiB, byte for byte.
pub type Pattern = Vec<u8>;

/// A running load; ends when stopped or dropped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Pattern>>>,
    failed: Option<String>,
}

impl Load {
    /// Starts writing and reading back over the first `size_bytes` of an export, each tenth write with FUA.
    ///
    /// # Errors
    /// `qemu-io` cannot start.
    pub fn start(socket: &Path, export: &str, size_bytes: u64) -> Result<Self> {
        let slots = size_bytes / REQUEST_BYTES;
        Self::over(socket, export, vec![0u8; usize::try_from(slots)?])
    }

    /// Goes on over what an earlier load left behind.
    ///
    /// # Errors
    /// `qemu-io` cannot start.
    pub fn over(socket: &Path, export: &str, mut pattern: Pattern) -> Result<Self> {
        let mut client = QemuIo::open(socket, export)?;
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (stop_seen, done_by) = (Arc::clone(&stop), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            let slots = pattern.len() as u64;
            let mut step = 0u64;
            while !stop_seen.load(Ordering::SeqCst) {
                step += 1;
                // Squares scatter over the slots and come back to the low ones: a skew without randomness.
                let slot = (step * step) % slots;
                let known = &mut pattern[usize::try_from(slot)?];
                let at = slot * REQUEST_BYTES;
                if step.is_multiple_of(3) {
                    let next = u8::try_from(step % 251 + 1)?;
                    let fua = if step.is_multiple_of(30) { "-f " } else { "" };
                    client.run(&format!("write {fua}-P {next} {at} {REQUEST_BYTES}"))?;
                    *known = next;
                } else {
                    client.run(&format!("read -P {known} {at} {REQUEST_BYTES}"))?;
                }
                done_by.fetch_add(1, Ordering::SeqCst);
            }
            client.quit()?;
            Ok(pattern)
        });
        Ok(Self {
            stop,
            done,
            thread: Some(thread),
            failed: None,
        })
    }

    /// Requests answered so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits until so many more requests are answered.
    ///
    /// # Errors
    /// A request failed, or they are not answered within that time.
    pub fn wait_for(&mut self, more: u64, within: Duration) -> Result<()> {
        let before = self.done();
        wait::until("requests to go on", within, || {
            self.check()?;
            Ok((self.done() >= before + more).then_some(()))
        })
    }

    /// Fails as soon as a request has failed.
    ///
    /// # Errors
    /// That of the request.
    pub fn check(&mut self) -> Result<()> {
        if let Some(thread) = self.thread.take_if(|thread| thread.is_finished()) {
            self.failed = ended(thread).err().map(|error| format!("{error:#}"));
        }
        self.failed.clone().map_or(Ok(()), |why| Err(anyhow!(why)))
    }

    /// Ends it.
    ///
    /// # Errors
    /// Any request failed, or read other bytes than were written last.
    pub fn stop(mut self) -> Result<Pattern> {
        self.stop.store(true, Ordering::SeqCst);
        self.check()?;
        self.thread.take().map_or_else(|| bail!("the load has ended"), ended)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // The thread ends after its request; its qemu-io ends with it.
    }
}

/// Reads everything that a load wrote, from whichever export has it now.
///
/// # Errors
/// A read failed, or found other bytes.
pub fn verify(socket: &Path, export: &str, pattern: &Pattern) -> Result<()> {
    let mut client = QemuIo::open(socket, export)?;
    for (slot, known) in pattern.iter().enumerate() {
        let at = slot as u64 * REQUEST_BYTES;
        client.run(&format!("read -P {known} {at} {REQUEST_BYTES}"))?;
    }
    client.quit()
}

/// Writes one byte all over one 64 KiB of an export, durably.
///
/// # Errors
/// `qemu-io`'s.
pub fn write(socket: &Path, export: &str, slot: usize, byte: u8) -> Result<()> {
    let mut client = QemuIo::open(socket, export)?;
    let at = slot as u64 * REQUEST_BYTES;
    client.run(&format!("write -f -P {byte} {at} {REQUEST_BYTES}"))?;
    client.quit()
}

fn ended(thread: JoinHandle<Result<Pattern>>) -> Result<Pattern> {
    thread.join().unwrap_or_else(|_| bail!("the load's thread panicked"))
}

/// One `qemu-io` that takes commands one by one.
#[derive(Debug)]
struct QemuIo {
    child: Child,
    stdin: ChildStdin,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl QemuIo {
    fn open(socket: &Path, export: &str) -> Result<Self> {
        let image = serde_json::json!({
            "driver": "raw",
            "file": {
                "driver": "nbd",
                "server": { "type": "unix", "path": socket },
                "export": export,
                "reconnect-delay": RECONNECT_DELAY_S,
            },
        });
        // Both outputs into one pipe, so that errors stand where they belong.
        let mut child = Command::new("sh")
            .args(["-c", "exec qemu-io -t none \"$1\" 2>&1", "sh", &format!("json:{image}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start qemu-io")?;
        let stdin = child.stdin.take().context("qemu-io's input was not piped")?;
        let stdout = child.stdout.take().context("qemu-io's output was not piped")?;
        Ok(Self {
            child,
            stdin,
            lines: BufReader::new(stdout).lines(),
        })
    }

    /// Runs one command and waits for its answer; the line before the timing line says what was done.
    fn run(&mut self, command: &str) -> Result<()> {
        writeln!(self.stdin, "{command}").with_context(|| format!("qemu-io takes no more input: {command}"))?;
        self.stdin.flush()?;
        let mut seen = Vec::new();
        for line in self.lines.by_ref() {
            let line = line?;
            if line.contains("failed") || line.contains("rror") {
                bail!("`{command}`: {line}");
            }
            // The last line of an answer: `64 KiB, 1 ops; 00.00 sec (...)`.
            if line.contains(" ops; ") {
                return Ok(());
            }
            seen.push(line);
        }
        bail!("qemu-io ended at `{command}`: {}", seen.join("; "))
    }

    fn quit(mut self) -> Result<()> {
        writeln!(self.stdin, "quit")?;
        self.stdin.flush()?;
        let status = self.child.wait()?;
        if !status.success() {
            bail!("qemu-io ended with {status}");
        }
        Ok(())
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
