//! `hearth-bench nbd`: the data path against named peers, in turn, in one run (DESIGN §11).

mod device;
mod load;
mod peers;
pub mod serve;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::report::{self, Spread, Table};
use load::{Figures, Job};
use peers::Server;

/// Size of the disks in memory, bytes: larger than any cache of a processor.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// Size of the disks on disk.
pub const DISK_BYTES: u64 = 512 << 20;

const KIB: usize = 1 << 10;

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds; each runs Hearth and every peer once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds per run
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Folder on the disk to measure; the peers' files lie there too [default: the folder for temporary files]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Only the tables whose heading contains this
    #[arg(long)]
    only: Option<String>,
    /// File to write the tables to, besides standard output
    #[arg(long)]
    out: Option<PathBuf>,
}

impl Options {
    fn wants(&self, heading: &str) -> bool {
        self.only.as_deref().is_none_or(|part| heading.contains(part))
    }

    /// The command line, for the head of the tables.
    fn command(&self) -> String {
        let mut command = format!("hearth-bench nbd --rounds {} --seconds {}", self.rounds, self.seconds);
        if let Some(part) = &self.only {
            command += &format!(" --only '{part}'");
        }
        command
    }
}

/// What a comparison has to show.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// Operations per second against the best peer, at least.
    ops: Option<f64>,
    /// Processor time per operation against the best peer, at most.
    cpu: Option<f64>,
}

/// Hearth is the first of `servers`, the rest are peers.
fn compare(heading: &str, servers: &[&Server], job: Job, options: &Options, target: Target) -> Result<String> {
    if !options.wants(heading) {
        return Ok(String::new());
    }
    eprintln!("{heading}");
    let length = Duration::from_secs_f64(options.seconds);
    let mut figures = vec![Vec::new(); servers.len()];
    for _ in 0..options.rounds.max(1) {
        for (server, figures) in servers.iter().zip(&mut figures) {
            figures.push(server.measure(job, length)?);
        }
    }
    let columns = [
        "server",
        "operations/s",
        "p50 µs",
        "p99 µs",
        "server CPU µs per operation",
    ];
    let mut table = Table::new(heading, &columns);
    for (server, figures) in servers.iter().zip(&figures) {
        let cell = |of: fn(&Figures) -> f64| Spread::new(figures.iter().map(of).collect()).to_string();
        table.row(&[
            server.name.to_owned(),
            cell(|f| f.ops_per_s),
            cell(|f| f.p50_us),
            cell(|f| f.p99_us),
            cell(|f| f.server_cpu_us),
        ]);
    }
    let (ours, peers) = figures.split_first().expect("Hearth is among the servers");
    let against = |of: fn(&Figures) -> f64, best: fn(f64, f64) -> f64| {
        let ratio = |round: usize| {
            let best = peers.iter().map(|figures| of(&figures[round])).reduce(best);
            of(&ours[round]) / best.expect("there is a peer")
        };
        Spread::new((0..ours.len()).map(ratio).collect())
    };
    let (ops, cpu) = (
        against(|f| f.ops_per_s, f64::max),
        against(|f| f.server_cpu_us, f64::min),
    );
    table.note(&format!(
        "Against the best peer, round by round: {ops} × operations/s{}, {cpu} × server CPU{}.",
        target.ops.map(|least| ops.at_least(least)).unwrap_or_default(),
        target.cpu.map(|most| cpu.at_most(most)).unwrap_or_default()
    ));
    Ok(table.finish())
}

/// Measures everything and prints the tables.
///
/// # Errors
/// A server that cannot be had, or what one said.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let mut text = String::new();
    text += &memory(options)?;
    text += &disk(options)?;
    text += &device::compare(options)?;
    let head = report::circumstances(&options.command(), started.elapsed());
    let text = format!("# Data path\n\n{head}\nLeast / median / most over the rounds.\n{text}");
    report::publish(&text, options.out.as_deref())
}

/// Reads of RAM.
fn memory(options: &Options) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let in_memory = tempfile::tempdir_in("/dev/shm")?;
    let ours = Server::hearth_memory(dir.path())?;
    let nbdkit = Server::nbdkit_memory(dir.path())?;
    let qemu = Server::qemu_nbd(
        "qemu-nbd on tmpfs",
        in_memory.path(),
        MEMORY_BYTES,
        &["--cache=writeback"],
        Some(peers::SERVER_CORE),
    )?;
    let null = Server::null(dir.path())?;
    nbdkit.fill()?;
    qemu.fill()?;
    let mut text = String::new();
    for (depth, ops, cpu) in [(32, 2.0, Some(0.5)), (1, 1.0, None)] {
        let job = Job {
            write: false,
            fua: false,
            sequential: false,
            length: 4 * KIB,
            depth,
        };
        let heading = format!("4 KiB random reads of RAM, depth {depth}, client and server on a core each");
        let target = Target { ops: Some(ops), cpu };
        if !options.wants(&heading) {
            continue;
        }
        text += &compare(&heading, &[&ours, &nbdkit, &qemu], job, options, target)?;
        let alone = (0..options.rounds.max(1))
            .map(|_| null.measure(job, Duration::from_secs_f64(options.seconds)))
            .collect::<Result<Vec<_>>>()?;
        let ops = Spread::new(alone.iter().map(|f| f.ops_per_s).collect());
        let cpu = Spread::new(alone.iter().map(|f| f.server_cpu_us).collect());
        text += &format!(
            "\nThe load generator alone, against a server that does nothing: {ops} operations/s; that server's sockets \
             take {cpu} µs of processor time per operation.\n"
        );
    }
    Ok(text)
}

/// Reads and writes of a local disk.
fn disk(options: &Options) -> Result<String> {
    let dir = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let ours = Server::hearth_volume(dir.path())?;
    let direct = Server::qemu_nbd(
        "qemu-nbd --cache=none --aio=io_uring",
        dir.path(),
        DISK_BYTES,
        &["--cache=none", "--aio=io_uring"],
        None,
    )?;
    let cached = Server::qemu_nbd(
        "qemu-nbd --cache=writeback",
        dir.path(),
        DISK_BYTES,
        &["--cache=writeback"],
        None,
    )?;
    for server in [&ours, &direct, &cached] {
        server.fill()?;
    }
    let job = |write, fua, sequential, length, depth| Job {
        write,
        fua,
        sequential,
        length,
        depth,
    };
    let jobs = [
        (
            "4 KiB random reads of a local disk, depth 32",
            &direct,
            job(false, false, false, 4 * KIB, 32),
        ),
        (
            "4 KiB random reads of a local disk, depth 1",
            &direct,
            job(false, false, false, 4 * KIB, 1),
        ),
        (
            "64 KiB sequential reads of a local disk, depth 8",
            &direct,
            job(false, false, true, 64 * KIB, 8),
        ),
        (
            "4 KiB random plain writes, depth 32",
            &cached,
            job(true, false, false, 4 * KIB, 32),
        ),
        (
            "64 KiB sequential plain writes, depth 8",
            &cached,
            job(true, false, true, 64 * KIB, 8),
        ),
        (
            "4 KiB random FUA writes, depth 1",
            &direct,
            job(true, true, false, 4 * KIB, 1),
        ),
        (
            "4 KiB random FUA writes, depth 8",
            &direct,
            job(true, true, false, 4 * KIB, 8),
        ),
    ];
    let target = Target {
        ops: Some(1.0),
        cpu: None,
    };
    let mut text = String::new();
    for (heading, peer, job) in jobs {
        text += &compare(heading, &[&ours, peer], job, options, target)?;
    }
    Ok(text)
}
