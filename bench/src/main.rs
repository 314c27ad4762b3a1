//! Benchmarks against named peers: Hearth and the peer in turn, in one run, with the spread.

mod load;
mod memory_server;
mod policy;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use load::Figures;

/// Size of the disks, bytes: larger than any cache of a processor.
const DISK_BYTES: u64 = 256 << 20;
/// How long a server may take to open its socket.
const START_WITHIN: Duration = Duration::from_secs(10);

/// Benchmarks Hearth against named peers.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// 4 KiB random reads of RAM over an NBD unix socket, against `nbdkit memory`
    Nbd {
        /// Pairs of runs per depth
        #[arg(long, default_value_t = 5)]
        pairs: usize,
        /// Seconds per run
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
    },
    /// Hit ratios of the RAM tier over recorded block traces, beside other policies
    Policy(policy::Options),
    /// The server that `nbd` measures
    #[command(hide = true)]
    ServeMemory {
        /// Its unix socket
        socket: PathBuf,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().what {
        What::Nbd { pairs, seconds } => nbd(pairs.max(1), Duration::from_secs_f64(seconds)),
        What::Policy(options) => policy::run(&options),
        What::ServeMemory { socket } => memory_server::run(&socket, DISK_BYTES),
    }
}

/// A server that ends with this.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(mut command: Command, socket: PathBuf) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let mut server = Self { child, socket };
        let started = Instant::now();
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{:?} ended at once: {status}", command.get_program());
            }
            anyhow::ensure!(
                started.elapsed() < START_WITHIN,
                "{:?} opened no socket",
                command.get_program()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn measure(&self, depth: usize, length: Duration) -> Result<Figures> {
        let socket = self.socket.to_str().context("a plain path")?;
        load::run(socket, "", depth, length, self.child.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Minimum, median and maximum.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}

fn row(name: &str, unit: &str, values: Vec<f64>) {
    let (min, median, max) = spread(values);
    println!("| {name} | {min:.2} | {median:.2} | {max:.2} | {unit} |");
}

fn nbd(pairs: usize, length: Duration) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let hearth = {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve-memory").arg(at("hearth"));
        Server::start(command, at("hearth"))?
    };
    let nbdkit = {
        let mut command = Command::new("nbdkit");
        command
            .args(["--foreground", "--unix"])
            .arg(at("nbdkit"))
            .args(["memory", &DISK_BYTES.to_string()]);
        Server::start(command, at("nbdkit")).context("the peer is nbdkit: apt-get install nbdkit")?
    };
    fill(&at("nbdkit"))?;
    println!(
        "4 KiB random reads of RAM, NBD over a unix socket, one connection, {pairs} pairs of {} s",
        length.as_secs_f64()
    );
    for depth in [1, 32] {
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..pairs {
            ours.push(hearth.measure(depth, length)?);
            theirs.push(nbdkit.measure(depth, length)?);
        }
        println!("\n| depth {depth} | min | median | max | |\n|---|---|---|---|---|");
        for (name, figures) in [("hearth", &ours), ("nbdkit memory", &theirs)] {
            row(name, "IOPS", figures.iter().map(|f| f.ops_per_s).collect());
            row(name, "p50 µs", figures.iter().map(|f| f.p50_us).collect());
            row(name, "p99 µs", figures.iter().map(|f| f.p99_us).collect());
            row(
                name,
                "server CPU µs per read",
                figures.iter().map(|f| f.server_cpu_us).collect(),
            );
        }
        let pair = |of: fn(&Figures) -> f64| ours.iter().zip(&theirs).map(|(a, b)| of(a) / of(b)).collect();
        row("hearth / nbdkit", "× IOPS, pair by pair", pair(|f| f.ops_per_s));
        row(
            "hearth / nbdkit",
            "× server CPU, pair by pair",
            pair(|f| f.server_cpu_us),
        );
    }
    Ok(())
}

/// Writes the peer's whole disk: it answers what was never written without memory.
fn fill(socket: &Path) -> Result<()> {
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let status = Command::new("qemu-io")
        .args(["-f", "raw", "-c", &format!("write -P 7 0 {DISK_BYTES}"), &uri])
        .stdout(Stdio::null())
        .status()
        .context("filling the peer's disk with qemu-io: apt-get install qemu-utils")?;
    anyhow::ensure!(status.success(), "qemu-io could not fill the peer's disk");
    Ok(())
}
