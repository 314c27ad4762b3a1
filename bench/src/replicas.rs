//! `hearth-bench replicas`: an image with two replicas on real node daemons, beside the same bytes as a file on another node:
//! over NFS, and over QEMU's NBD server. Every one is driven by the same client, `qemu-img bench`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::cluster::{Cluster, ClusterSpec, Programs};

use crate::report::{self, Spread, Table};

/// Size of the disk.
const DISK_BYTES: u64 = 256 << 20;
/// RAM tier of each node: the NFS server's page cache holds the whole file, too.
const RAM_BYTES: u64 = 384 << 20;
/// Requests under way at a time.
const DEPTH: &str = "16";
/// Between two "random" requests: 4 KiB times an odd number near the golden section of the disk, so that each block comes
/// once before any comes again, and none after its neighbour.
const STRIDE: u64 = 4_096 * 40_503;
/// In which a server must answer.
const UP_WITHIN: Duration = Duration::from_secs(20);

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Rounds; each runs Hearth and every peer once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Requests per run
    #[arg(long, default_value_t = 4_000)]
    count: u64,
    /// Folder on the disk to measure [default: the folder for temporary files]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// File to write the tables to, besides standard output
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One kind of requests: heading, and the words that make it.
const WORKLOADS: [(&str, bool, &[&str]); 5] = [
    ("4 KiB random reads", true, &[]),
    ("4 KiB sequential reads", false, &[]),
    ("4 KiB random writes", true, &["-w"]),
    ("4 KiB sequential writes", false, &["-w"]),
    (
        "4 KiB random writes, a flush after every 32",
        true,
        &["-w", "--flush-interval=32"],
    ),
];

/// A process that is ended when this goes.
pub struct Server(Child);

impl Server {
    /// Starts it, silently.
    ///
    /// # Errors
    /// It is not there.
    pub fn start(command: &mut Command) -> Result<Self> {
        let shown = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().with_context(|| format!("starting {shown}"))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Who is measured, and how QEMU reaches it.
struct Target {
    name: &'static str,
    uri: String,
    /// The network namespace to reach it from.
    inside: Option<String>,
}

impl Target {
    fn qemu_img(&self, words: &[&str]) -> Command {
        let mut command = match &self.inside {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name, "qemu-img"]);
                command
            }
            None => Command::new("qemu-img"),
        };
        command.args(words);
        command
    }

    fn said(&self, words: &[&str]) -> Result<String> {
        let output = self.qemu_img(words).output().context("starting qemu-img")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{}: qemu-img {}: {}",
            self.name,
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(said)
    }

    /// Waits until it can be opened.
    fn up(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.said(&["info", "-f", "raw", &self.uri]) {
                Ok(_) => return Ok(()),
                Err(error) if began.elapsed() > UP_WITHIN => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn fill(&self, from: &Path) -> Result<()> {
        let from = from.to_str().context("a path that is not UTF-8")?;
        self.said(&["convert", "-n", "-f", "raw", "-O", "raw", from, &self.uri])?;
        self.warm()
    }

    /// Reads all of it once, so that every server has it in its memory.
    fn warm(&self) -> Result<()> {
        let step = (64u64 << 10).to_string();
        let count = (DISK_BYTES / (64 << 10)).to_string();
        let words = [
            "bench", "-f", "raw", "-t", "none", "-d", DEPTH, "-s", &step, "-c", &count, &self.uri,
        ];
        self.said(&words).map(drop)
    }

    /// Operations per second.
    fn measure(&self, random: bool, more: &[&str], count: u64) -> Result<f64> {
        let (counted, stride) = (count.to_string(), if random { STRIDE } else { 4_096 }.to_string());
        let mut words = vec!["bench", "-f", "raw", "-t", "none", "-d", DEPTH, "-s", "4096"];
        words.extend(["-S", &stride, "-c", &counted]);
        words.extend(more);
        words.push(&self.uri);
        let said = self.said(&words)?;
        let seconds = said
            .lines()
            .find_map(|line| line.strip_prefix("Run completed in ")?.strip_suffix(" seconds."));
        let seconds: f64 = seconds
            .with_context(|| format!("qemu-img bench said: {said}"))?
            .parse()?;
        Ok(count as f64 / seconds)
    }
}

/// An NFS server in a network namespace of its own, where its ports disturb nobody.
struct Nfs {
    name: String,
    target: Target,
    _servers: Vec<Server>,
}

impl Nfs {
    fn start(dir: &Path, file: &Path) -> Result<Self> {
        let name = format!("hearth-bench-{}", std::process::id());
        let config = dir.join("ganesha.conf");
        let folder = dir.display();
        std::fs::write(
            &config,
            format!(
                "NFS_CORE_PARAM {{ Protocols = 3; mount_path_pseudo = false; }}\nEXPORT {{ Export_Id = 1; Path = {folder}; \
                 Pseudo = /bench; Access_Type = RW; Squash = No_root_squash; SecType = sys; Protocols = 3; \
                 Transports = TCP; FSAL {{ Name = VFS; }} }}\n"
            ),
        )?;
        ip(&["netns", "add", &name])?;
        let mut nfs = Self {
            target: Target {
                name: "a file over NFS (nfs-ganesha, QEMU's NFS client)",
                uri: format!("nfs://127.0.0.1{}", file.display()),
                inside: Some(name.clone()),
            },
            _servers: Vec::new(),
            name,
        };
        ip(&["-n", &nfs.name, "link", "set", "lo", "up"])?;
        let inside = |program: &str| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &nfs.name, program]);
            command
        };
        let mut servers = vec![Server::start(inside("rpcbind").args(["-f", "-w"]))?];
        std::thread::sleep(Duration::from_millis(500));
        let mut ganesha = inside("ganesha.nfsd");
        ganesha.arg("-F").arg("-f").arg(&config);
        ganesha
            .arg("-L")
            .arg(dir.join("ganesha.log"))
            .arg("-p")
            .arg(dir.join("ganesha.pid"));
        servers.push(Server::start(&mut ganesha)?);
        nfs._servers = servers;
        nfs.target.up()?;
        Ok(nfs)
    }
}

impl Drop for Nfs {
    fn drop(&mut self) {
        self._servers.clear();
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(words).output().context("starting ip")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// A file of bytes that do not compress and are no zeros.
///
/// # Errors
/// The file system's.
pub fn random_file(path: &Path, bytes: u64) -> Result<()> {
    let mut from = std::fs::File::open("/dev/urandom")?;
    let mut to = std::fs::File::create(path).with_context(|| format!("writing {}", path.display()))?;
    let copied = std::io::copy(&mut std::io::Read::take(&mut from, bytes), &mut to)?;
    ensure!(copied == bytes, "only {copied} bytes fit into {}", path.display());
    Ok(to.sync_all()?)
}

/// Measures everything and prints the tables.
///
/// # Errors
/// A server that cannot be had, or what one said.
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
            nodes: 2,
            ram_bytes: RAM_BYTES,
            front_percent: 94,
            heat: "export",
            under: Some(dir.path().to_owned()),
            ..ClusterSpec::default()
        },
    )?;
    let (image, size) = ("bench/disk", DISK_BYTES.to_string());
    let hearth = cluster.hearth();
    hearth.text(&["image", "create", image, &size, "--replicas", "2", "--node", "node-1"])?;
    hearth.text(&["image", "attach", image, "--node", "node-1"])?;
    let ours = Target {
        name: "Hearth, two replicas",
        uri: format!("nbd+unix:///{image}?socket={}", cluster.socket(0).display()),
        inside: None,
    };

    let file = |name: &str| dir.path().join(name);
    std::fs::copy(&bytes, file("nbd.raw"))?;
    // Over a unix socket: with TCP, QEMU's client and server wait for each other's delayed acknowledgements (40 ms).
    let _qemu_nbd = Server::start(
        Command::new("qemu-nbd")
            .args(["--cache=writeback", "-f", "raw", "-t", "-e", "8", "-k"])
            .arg(file("nbd.sock"))
            .arg(file("nbd.raw")),
    )?;
    let nbd = Target {
        name: "a file over NBD (qemu-nbd --cache=writeback)",
        uri: format!("nbd+unix:///?socket={}", file("nbd.sock").display()),
        inside: None,
    };
    std::fs::copy(&bytes, file("nfs.raw"))?;
    let nfs = Nfs::start(dir.path(), &file("nfs.raw"));

    let mut targets = vec![&ours, &nbd];
    let mut text = String::new();
    match &nfs {
        Ok(nfs) => targets.push(&nfs.target),
        Err(error) => text += &format!("\nNFS is not measured here: {error:#}.\n"),
    }
    for target in &targets {
        target.up()?;
        target.fill(&bytes)?;
    }
    for (heading, random, more) in WORKLOADS {
        eprintln!("{heading}");
        text += &compare(heading, &targets, random, more, options)?;
    }
    let members = hearth.json(&["location", "list", image])?;
    if members[0]["members"].as_array().map(Vec::len) != Some(2) {
        bail!("the image lost a replica while it was measured: {members}");
    }
    let command = format!(
        "hearth-bench replicas --rounds {} --count {}",
        options.rounds, options.count
    );
    let head = report::circumstances(&command, started.elapsed());
    let text = format!(
        "# An image with two replicas\n\n{head}\n`qemu-img bench -t none -d {DEPTH}`, {} MiB, all of it in the memory of every \
         server: Hearth's RAM tier, the others' page cache. The other node is this machine: NFS over TCP on loopback, the rest over unix sockets. Hearth has written two copies when it \
         answers; the others one, into their page cache. Least / median / most over the rounds.\n{text}",
        DISK_BYTES >> 20
    );
    report::publish(&text, options.out.as_deref())
}

/// Hearth is the first of `targets`, the rest are peers.
fn compare(heading: &str, targets: &[&Target], random: bool, more: &[&str], options: &Options) -> Result<String> {
    let mut rates = vec![Vec::new(); targets.len()];
    for _ in 0..options.rounds.max(1) {
        for (target, rates) in targets.iter().zip(&mut rates) {
            rates.push(target.measure(random, more, options.count)?);
        }
    }
    let mut table = Table::new(heading, &["disk", "operations/s", "Hearth against it"]);
    for (target, peer) in targets.iter().zip(&rates) {
        let ratios = rates[0].iter().zip(peer).map(|(ours, theirs)| ours / theirs).collect();
        let against = match target.name == targets[0].name {
            true => String::new(),
            false => {
                let ratio = Spread::new(ratios);
                format!("{ratio} ×{}", ratio.at_least(1.0))
            }
        };
        table.row(&[target.name.to_owned(), Spread::new(peer.clone()).to_string(), against]);
    }
    Ok(table.finish())
}
