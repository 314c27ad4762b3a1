//! `hearth-bench moves`: what a guest feels of a copy to a joining node, and how fast such a copy can be, beside `nbdcopy`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec, Hearth, Programs};

use crate::replicas::{Server, random_file};
use crate::report::{self, Spread, Table};

const IMAGE: &str = "bench/disk";
/// Size of the disk, all of it data.
const DISK_BYTES: u64 = 256 << 20;
/// RAM tier of each node.
const RAM_BYTES: u64 = 64 << 20;
/// In which a server must answer.
const UP_WITHIN: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds; each measures everything once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds for which the guest's latency is measured, with a copy and without
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Requests per second of the guest
    #[arg(long, default_value_t = 1_000)]
    rate: u64,
    /// Folder on the disk to measure [default: the folder for temporary files]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// File to write the tables to, besides standard output
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What a guest felt.
#[derive(Debug, Clone, Copy)]
struct Felt {
    read_p99_us: f64,
    write_p99_us: f64,
}

/// Everything that is measured.
struct Bench<'a> {
    hearth: &'a Hearth,
    socket: PathBuf,
    /// The node that a copy goes to.
    to: String,
    options: &'a Options,
}

impl Bench<'_> {
    fn uri(&self) -> String {
        format!("nbd+unix:///{IMAGE}?socket={}", self.socket.display())
    }

    /// A guest with so many requests per second, 7 of 10 reads, at random places.
    fn guest(&self) -> Result<Felt> {
        let mut command = Command::new("fio");
        command.args([
            "--name=guest",
            "--rw=randrw",
            "--rwmixread=70",
            "--bs=4k",
            "--iodepth=4",
        ]);
        command.args(["--ioengine=nbd", "--time_based", "--thread", "--output-format=json"]);
        command.args(["--rate_process=poisson", "--percentile_list=99"]);
        command
            .arg(format!("--uri={}", self.uri()))
            .arg(format!(
                "--rate_iops={},{}",
                self.options.rate * 7 / 10,
                self.options.rate * 3 / 10
            ))
            .arg(format!("--size={DISK_BYTES}"))
            .arg(format!("--runtime={}", self.options.seconds));
        let output = command.output().context("starting fio")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "fio: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let from = text.find('{').context("fio printed no JSON")?;
        let told: Value = serde_json::from_str(&text[from..]).context("fio printed no JSON")?;
        let p99 = |direction: &str| {
            let p99 = &told["jobs"][0][direction]["clat_ns"]["percentile"]["99.000000"];
            p99.as_f64().map(|ns| ns / 1e3).context("fio tells no 99th percentile")
        };
        Ok(Felt {
            read_p99_us: p99("read")?,
            write_p99_us: p99("write")?,
        })
    }

    fn add(&self, pace: &str) -> Result<Duration> {
        let began = Instant::now();
        self.hearth
            .text(&["location", "add", IMAGE, &self.to, "--pace", pace])?;
        Ok(began.elapsed())
    }

    fn remove(&self) -> Result<()> {
        self.hearth.text(&["location", "remove", IMAGE, &self.to]).map(drop)
    }

    /// The same while copies go to another node all the time; and how many bytes per second they carried.
    fn guest_beside_copies(&self, pace: &str) -> Result<(Felt, f64)> {
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let copies = scope.spawn(|| -> Result<(u64, Duration)> {
                let (mut bytes, mut took) = (0, Duration::ZERO);
                while !ended.load(Ordering::SeqCst) {
                    took += self.add(pace)?;
                    bytes += DISK_BYTES;
                    self.remove()?;
                }
                Ok((bytes, took))
            });
            let felt = self.guest();
            ended.store(true, Ordering::SeqCst);
            let Ok(copied) = copies.join() else {
                bail!("the thread that copies panicked");
            };
            let (bytes, took) = copied?;
            Ok((felt?, bytes as f64 / took.as_secs_f64()))
        })
    }
}

/// Seconds that `nbdcopy` takes from the image's export to a file behind `qemu-nbd`, flushed.
fn nbdcopy(from: &str, to: &Path) -> Result<Duration> {
    let to = format!("nbd+unix:///?socket={}", to.display());
    let began = Instant::now();
    let output = Command::new("nbdcopy").args(["--flush", from, &to]).output();
    let output = output.context("starting nbdcopy")?;
    ensure!(
        output.status.success(),
        "nbdcopy: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(began.elapsed())
}

/// Measures everything and prints the tables.
///
/// # Errors
/// A program that is not there, or what one said.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let dir = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let bytes = dir.path().join("bytes.raw");
    random_file(&bytes, DISK_BYTES)?;
    let cluster = Cluster::start(
        Programs::for_tests()?,
        &ClusterSpec {
            nodes: 3,
            ram_bytes: RAM_BYTES,
            heat: "export",
            under: Some(dir.path().to_owned()),
            ..ClusterSpec::default()
        },
    )?;
    let (hearth, size) = (cluster.hearth(), DISK_BYTES.to_string());
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", "node-1"])?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
    let members = hearth.json(&["location", "list", IMAGE])?[0]["members"].to_string();
    let to = ["node-2", "node-3"].into_iter().find(|node| !members.contains(node));
    let bench = Bench {
        hearth,
        socket: cluster.socket(0),
        to: to.context("the image is everywhere")?.to_owned(),
        options,
    };
    let fill = Command::new("nbdcopy").arg(&bytes).arg(bench.uri()).output();
    let fill = fill.context("starting nbdcopy")?;
    ensure!(
        fill.status.success(),
        "nbdcopy: {}",
        String::from_utf8_lossy(&fill.stderr)
    );
    let (file, socket) = (dir.path().join("peer.raw"), dir.path().join("peer.sock"));
    std::fs::copy(&bytes, &file)?;
    let _peer = Server::start(
        Command::new("qemu-nbd")
            .args(["--cache=writeback", "-f", "raw", "-t", "-e", "8", "-k"])
            .args([&socket, &file]),
    )?;
    while !socket.exists() {
        ensure!(started.elapsed() < UP_WITHIN * 10, "qemu-nbd does not start");
        std::thread::sleep(Duration::from_millis(50));
    }

    let (mut full, mut peer) = (Vec::new(), Vec::new());
    let (mut reads, mut writes) = (
        [Vec::new(), Vec::new(), Vec::new()],
        [Vec::new(), Vec::new(), Vec::new()],
    );
    let (mut gentle_rates, mut full_rates) = (Vec::new(), Vec::new());
    bench.guest()?; // the first one finds a cold cache
    for round in 0..options.rounds.max(1) {
        eprintln!("round {}", round + 1);
        full.push(bench.add("full")?.as_secs_f64());
        bench.remove()?;
        peer.push(nbdcopy(&bench.uri(), &socket)?.as_secs_f64());
        let still = bench.guest()?;
        let (gentle, gentle_rate) = bench.guest_beside_copies("gentle")?;
        let (fast, full_rate) = bench.guest_beside_copies("full")?;
        for (at, felt) in [still, gentle, fast].into_iter().enumerate() {
            reads[at].push(felt.read_p99_us);
            writes[at].push(felt.write_p99_us);
        }
        gentle_rates.push(gentle_rate / f64::from(1 << 20));
        full_rates.push(full_rate / f64::from(1 << 20));
    }

    let ratio = |ours: &[f64], theirs: &[f64]| Spread::new(ours.iter().zip(theirs).map(|(a, b)| a / b).collect());
    let mut speed = Table::new(
        "A copy of the whole disk",
        &["copy", "seconds", "speed against nbdcopy"],
    );
    let against = ratio(&peer, &full);
    speed.row(&[
        "hearth location add --pace full".into(),
        Spread::new(full).to_string(),
        format!("{against} ×{}", against.at_least(0.9)),
    ]);
    speed.row(&[
        "nbdcopy --flush from the image's export to qemu-nbd --cache=writeback".into(),
        Spread::new(peer).to_string(),
        String::new(),
    ]);
    let mut table = Table::new(
        "What a guest feels",
        &[
            "beside it",
            "MiB/s copied",
            "reads p99, µs",
            "against still",
            "writes p99, µs",
            "against still",
        ],
    );
    let names = ["nothing", "copies, --pace gentle", "copies, --pace full"];
    let rates = [None, Some(gentle_rates), Some(full_rates)];
    for (at, (name, rate)) in names.into_iter().zip(rates).enumerate() {
        let against = |of: &[Vec<f64>; 3]| {
            let spread = ratio(&of[at], &of[0]);
            match at {
                0 => String::new(),
                1 => format!("{spread} ×{}", spread.at_most(1.2)),
                _ => format!("{spread} ×"),
            }
        };
        table.row(&[
            name.to_owned(),
            rate.map_or_else(String::new, |rate| Spread::new(rate).to_string()),
            Spread::new(reads[at].clone()).to_string(),
            against(&reads),
            Spread::new(writes[at].clone()).to_string(),
            against(&writes),
        ]);
    }
    let command = format!(
        "hearth-bench moves --rounds {} --seconds {} --rate {}",
        options.rounds, options.seconds, options.rate
    );
    let head = report::circumstances(&command, started.elapsed());
    let text = format!(
        "# Copies to a joining node\n\n{head}\nAn image of {} MiB with two replicas, all of it random bytes; a third node is \
         added and removed. The guest is fio with {} requests of 4 KiB per second, 7 of 10 reads, at random places. All nodes \
         and the guest share this machine's processors and its disk. Least / median / most over the rounds.\n{}{}",
        DISK_BYTES >> 20,
        options.rate,
        speed.finish(),
        table.finish()
    );
    report::publish(&text, options.out.as_deref())
}
