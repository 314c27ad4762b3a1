//! Hostile and mistaken input to the `hearth` command, the daemons' configurations and directories, and every NATS
//! subject: a clear error that says what to do, the documented exit code, and nothing damaged.
//!
//! Adding a case is adding a row. What every row is held to besides its own words: the error is short, has no control
//! characters, and all images are as before.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hearth_tests::digests_agree;
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec, Programs};
use xtask::{process, wait};

const WITHIN: Duration = Duration::from_secs(60);
/// Longest error text, whatever the input.
const ERROR_BYTES_MAX: usize = 1_600;
const PATTERN: &str = "0x5a";

/// Exit codes (docs/OPERATING.md).
mod code {
    pub const FAILED: i32 = 1;
    pub const USAGE: i32 = 2;
    pub const NOT_FOUND: i32 = 3;
    pub const REFUSED: i32 = 5;
    pub const CONFLICT: i32 = 6;
    pub const CANNOT_CONNECT: i32 = 20;
}

/// One row: what is typed, the exit code, and words that the error must have.
struct Case {
    words: Vec<String>,
    code: i32,
    says: &'static [&'static str],
}

fn case(line: &str, code: i32, says: &'static [&'static str]) -> Case {
    let words = line.split(' ').map(ToOwned::to_owned).collect();
    Case { words, code, says }
}

/// As [`case`], with `{}` standing for any text.
fn with(line: &str, text: &str, code: i32, says: &'static [&'static str]) -> Case {
    let words = line.split(' ').map(|word| word.replace("{}", text)).collect();
    Case { words, code, says }
}

fn start(nodes: usize) -> Result<Option<Cluster>> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(None);
    }
    hearth_tests::cluster(&ClusterSpec {
        nodes,
        heat: "export",
        ..ClusterSpec::default()
    })
}

/// Runs one QEMU block command on an attached image of the first node.
fn qemu(cluster: &Cluster, image: &str, command: &str) -> Result<String> {
    let socket = cluster.socket(0);
    let uri = format!("nbd+unix:///{image}?socket={}", socket.display());
    process::output(Command::new("qemu-io").args(["-f", "raw", "-c", command, &uri]))
}

/// Makes `a/base` with a pattern, its snapshot `v1`, the clone `a/clone` of it, and attaches `a/base`.
fn make_images(cluster: &Cluster) -> Result<()> {
    let hearth = cluster.hearth();
    hearth.text(&["image", "create", "a/base", "8MiB", "--node", "node-1"])?;
    hearth.text(&["image", "attach", "a/base"])?;
    qemu(cluster, "a/base", &format!("write -P {PATTERN} 0 2M"))?;
    hearth.text(&["image", "snapshot", "a/base@v1"])?;
    hearth.text(&["image", "clone", "a/base@v1", "a/clone"])?;
    Ok(())
}

/// What must not change: every image of every node, with everything that its node says of it but its latencies.
fn images(cluster: &Cluster) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for index in 0..cluster.node_count() {
        let list = cluster
            .hearth()
            .json(&["image", "list", "--node", &Cluster::node_id(index)])?;
        for mut image in list.as_array().context("no list")?.clone() {
            if let Some(attached) = image["attached"].as_object_mut() {
                attached.remove("read_latency");
            }
            all.push(image);
        }
    }
    Ok(all)
}

/// Holds an ended command to its row.
fn check_error(name: &str, output: &Output, code: i32, says: &[&str]) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(code),
        "{name}: {} instead of exit code {code}:\n{text}",
        output.status
    );
    for word in says {
        ensure!(text.contains(word), "{name}: the error does not say {word:?}:\n{text}");
    }
    ensure!(!text.trim().is_empty(), "{name}: no error text");
    ensure!(
        text.len() <= ERROR_BYTES_MAX,
        "{name}: an error of {} bytes",
        text.len()
    );
    let odd: BTreeSet<char> = text.chars().filter(|c| c.is_control() && *c != '\n').collect();
    ensure!(odd.is_empty(), "{name}: control characters {odd:?} in the error");
    ensure!(!text.contains("panicked"), "{name}: {text}");
    Ok(())
}

/// A file under the cluster's folder, for imports.
fn file(cluster: &Cluster, name: &str, bytes: &[u8]) -> Result<String> {
    let path = cluster.dir().join(name);
    fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path.to_str().context("a path that is not UTF-8")?.to_owned())
}

fn commands(cluster: &Cluster) -> Result<Vec<Case>> {
    use code::{CANNOT_CONNECT, CONFLICT, FAILED, NOT_FOUND, REFUSED, USAGE};
    const NAME: &[&str] = &["project/name"];
    const SIZE: &[&str] = &["multiple of 4KiB"];
    const BLOCK: &[&str] = &["power of two"];
    let long = "x".repeat(5_000);
    let qcow2 = file(cluster, "disk.qcow2", &[b"QFI\xfb", &[0; 1_020][..]].concat())?;
    let truncated = file(cluster, "truncated.raw", &[7; 4_096 + 100])?;
    let empty = file(cluster, "empty.raw", &[])?;
    let dir = cluster.dir().to_str().context("a path that is not UTF-8")?;
    let mut cases = vec![
        case("image create ../etc 4MiB", USAGE, NAME),
        case("image create a/../b 4MiB", USAGE, NAME),
        case("image create a/.. 4MiB", USAGE, NAME),
        case("image create a/b/c 4MiB", USAGE, NAME),
        case("image create /a 4MiB", USAGE, NAME),
        with("image create {} 4MiB", "a/b\u{1b}[31m", USAGE, NAME),
        with("image create {} 4MiB", "a/b\nc", USAGE, NAME),
        with("image create {} 4MiB", &format!("a/{long}"), USAGE, NAME),
        with("image show {}", &long, USAGE, NAME),
        with(
            "image import {} a/new --node node-1",
            &format!("/{long}"),
            USAGE,
            &["4095"],
        ),
        case("image clone a/base@../v1 a/new", USAGE, &["snapshot name"]),
        case("image snapshot a/base", USAGE, &["project/name@snapshot"]),
        case("image create a/new 0", USAGE, SIZE),
        case("image create a/new 4097", USAGE, SIZE),
        case("image create a/new 17TiB", USAGE, SIZE),
        case("image create a/new 4XB", USAGE, &["4XB"]),
        case("image create a/new -5", USAGE, &["-5"]),
        case("image create a/new 4MiB --block-size 0", USAGE, BLOCK),
        case("image create a/new 4MiB --block-size 12KiB", USAGE, BLOCK),
        case("image create a/new 4MiB --block-size 8MiB", USAGE, BLOCK),
        case(
            "image create a/new 4MiB --node node-9",
            CANNOT_CONNECT,
            &["node-9", "hearth node list"],
        ),
        case("image create a/new 4MiB", USAGE, &["--node"]),
        case(
            "image create a/base 4MiB --node node-1",
            CONFLICT,
            &["exists", "another name"],
        ),
        case(
            "image create a/base 4MiB --node node-2",
            CONFLICT,
            &["exists", "another name"],
        ),
        with(
            "image import {} a/new --node node-1",
            &qcow2,
            USAGE,
            &["qcow2", "qemu-img convert"],
        ),
        with("image import {} a/new --node node-1", &truncated, USAGE, &["truncated"]),
        with("image import {} a/new --node node-1", &empty, USAGE, &["empty"]),
        with(
            "image import {} a/new --node node-1",
            dir,
            USAGE,
            &["neither a file nor a block device"],
        ),
        case(
            "image import /dev/zero a/new --node node-1",
            USAGE,
            &["neither a file nor a block device"],
        ),
        case("image import /no/such a/new --node node-1", FAILED, &["/no/such"]),
        case(
            "image import no-such.raw a/new --node node-1",
            NOT_FOUND,
            &["no-such.raw", "absolute path"],
        ),
        with("image import {} ../new --node node-1", &empty, USAGE, NAME),
        case("image attach a/base", CONFLICT, &["attached already", "image show"]),
        case("image attach a/base --node node-2", NOT_FOUND, &["node-1", "--node"]),
        case("image attach a/none", NOT_FOUND, &["a/none", "image list"]),
        case("image detach a/clone", NOT_FOUND, &["not attached"]),
        case("image detach a/none", NOT_FOUND, &["a/none", "image list"]),
        case("image show a/none", NOT_FOUND, &["a/none", "image list"]),
        case("image map a/none", NOT_FOUND, &["a/none", "image list"]),
        case("image delete a/base --yes", REFUSED, &["attached", "detach"]),
        case("image delete a/clone", USAGE, &["--yes"]),
        case("image delete a/none --yes", NOT_FOUND, &["a/none"]),
        case("image snapshot a/base@v1", CONFLICT, &["exists", "another name"]),
        case("image clone a/base@v9 a/new", NOT_FOUND, &["v9"]),
        case("image clone a/base@v1 a/clone", CONFLICT, &["exists", "another name"]),
        case("image attach-info a/clone", REFUSED, &["not attached", "image attach"]),
        case("node show node-9", CANNOT_CONNECT, &["node-9"]),
        case("job show 4711 --node node-1", NOT_FOUND, &["4711"]),
        case("log show 99999999", NOT_FOUND, &["99999999"]),
        case("why a/none:1", NOT_FOUND, &["a/none"]),
        case("why a/base:x", USAGE, &["block number"]),
        case("why a/base:99999999", NOT_FOUND, &["0 to 127"]),
        case("replay --at yesterday", USAGE, &["yesterday"]),
        case("policy set threshold_bursts=many", USAGE, &["whole number"]),
        case("policy set no_such=1", USAGE, &["threshold_bursts"]),
        case("status --timeout soon", USAGE, &["soon"]),
        case("status --nats nats://127.0.0.1:1", CANNOT_CONNECT, &["nats-server"]),
        case("status --nats mailto:x", USAGE, &["nats://"]),
        case("log verify --log-dir /no/such", FAILED, &["/no/such", "--dir"]),
        case("no-such-noun", USAGE, &["no-such-noun"]),
    ];
    cases.push(with("image create {} 4MiB", "", USAGE, NAME));
    Ok(cases)
}

#[test]
fn every_wrong_command_fails_clearly_and_changes_nothing() -> Result<()> {
    let Some(mut cluster) = start(2)? else { return Ok(()) };
    make_images(&cluster)?;
    let before = images(&cluster)?;
    let mut wrong = Vec::new();
    for case in commands(&cluster)? {
        let words: Vec<_> = case.words.iter().map(String::as_str).collect();
        let output = cluster.hearth().command(&words).stdin(Stdio::null()).output()?;
        let name: String = case.words.join(" ").chars().take(90).collect();
        // All rows are looked at, so that one run shows all that is wrong.
        if let Err(error) = check_error(&name, &output, case.code, case.says) {
            wrong.push(format!("{error:#}"));
        }
        if images(&cluster)? != before {
            wrong.push(format!("{name}: the images changed"));
        }
    }
    ensure!(wrong.is_empty(), "{} rows:\n{}", wrong.len(), wrong.join("\n---\n"));

    // The parent of a clone stays although nobody uses it; then both go in the right order.
    let hearth = cluster.hearth();
    hearth.text(&["image", "detach", "a/base"])?;
    let output = hearth.command(&["image", "delete", "a/base", "--yes"]).output()?;
    check_error(
        "delete a parent",
        &output,
        code::REFUSED,
        &["clones", "a/clone", "first"],
    )?;
    hearth.text(&["image", "attach", "a/clone"])?;
    qemu(&cluster, "a/clone", &format!("read -P {PATTERN} 0 2M"))?;
    qemu(&cluster, "a/clone", "read -P 0 2M 6M")?;
    cluster.check_running()?;
    digests_agree(&cluster)
}

/// Starts a daemon that must end by itself, with an error.
fn ends_badly(name: &str, command: &mut Command, code: i32, says: &[&str]) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .env("RUST_BACKTRACE", "0")
        .spawn()
        .with_context(|| name.to_owned())?;
    let start = Instant::now();
    let ended = wait::until(&format!("{name} to end"), WITHIN, || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
    }
    let mut output = child.wait_with_output()?;
    ended.with_context(|| format!("{name} ran on for {:?}", start.elapsed()))?;
    // A daemon's log lines come before its last words.
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let last: Vec<_> = text
        .lines()
        .filter(|l| !l.contains(" INFO ") && !l.contains(" WARN "))
        .collect();
    output.stderr = last.join("\n").into_bytes();
    check_error(name, &output, code, says)
}

fn node_config(cluster: &Cluster, dir: &Path, nats: &str, more: &str) -> Result<std::path::PathBuf> {
    fs::create_dir_all(dir.join("store"))?;
    let text = format!(
        "id = \"node-7\"\nnats = {nats:?}\nstore_dir = {store:?}\nsocket = {socket:?}\ndevice_link_root = {links:?}\n\
         mount_root = {mounts:?}\nheat = \"export\"\n{more}\n",
        store = dir.join("store"),
        socket = dir.join("nbd.sock"),
        links = dir.join("links"),
        mounts = dir.join("mounts"),
    );
    ensure!(dir.starts_with(cluster.dir()), "outside of the cluster's folder");
    let path = dir.join("node.toml");
    fs::write(&path, text)?;
    Ok(path)
}

#[test]
fn daemons_refuse_wrong_configurations_and_strange_directories() -> Result<()> {
    let Some(mut cluster) = start(1)? else { return Ok(()) };
    make_images(&cluster)?;
    let programs = Programs::for_tests()?;
    let nats = cluster.nats().url();
    let node = |config: &Path| {
        let mut command = Command::new(programs.bin_dir.join("hearth-node"));
        command.arg("--config").arg(config);
        command
    };
    let scheduler = |words: &[&str]| {
        let mut command = Command::new(programs.bin_dir.join("hearth-scheduler"));
        command.args(["--nats", &nats, "--id", "sched-7"]).args(words);
        command
    };
    let other = cluster.dir().join("other");
    for (more, says) in [
        ("ram_bytes = \"64MiB\"\nram_byte = 3", &["ram_byte", "node.toml"][..]),
        ("ram_bytes = \"64 megs\"", &["64 megs", "MiB"]),
        ("ram_bytes = \"4KiB\"", &["ram_bytes", "at least 4MiB"]),
        ("ram_bytes = \"64MiB\"\nfront_percent = 300", &["front_percent"]),
        ("ram_bytes = \"64MiB\"\nio_threads = 0", &["io_threads", "1 to 1024"]),
        ("", &["ram_bytes", "node.toml"]),
    ] {
        let config = node_config(&cluster, &other, &nats, more)?;
        ends_badly(&format!("node: {more}"), &mut node(&config), code::USAGE, says)?;
    }
    let config = node_config(&cluster, &other, "mailto:x", "ram_bytes = \"8MiB\"")?;
    ends_badly(
        "node: no NATS address",
        &mut node(&config),
        code::FAILED,
        &["mailto:x", "nats://"],
    )?;
    ends_badly(
        "node: no file",
        &mut node(Path::new("/no/such.toml")),
        code::USAGE,
        &["/no/such.toml"],
    )?;

    let file = cluster.dir().join("scheduler.toml");
    for (text, says) in [
        ("dri = \"/x\"", &["dri", "scheduler.toml"][..]),
        ("replicas = \"three\"", &["replicas"]),
    ] {
        fs::write(&file, text)?;
        let words = ["--config", file.to_str().context("not UTF-8")?];
        ends_badly(&format!("scheduler: {text}"), &mut scheduler(&words), code::USAGE, says)?;
    }
    let fresh = cluster.dir().join("fresh");
    let fresh = fresh.to_str().context("not UTF-8")?;
    ends_badly(
        "scheduler: two copies",
        &mut scheduler(&["--dir", fresh, "--replicas", "2"]),
        code::USAGE,
        &["1, 3 or 5"],
    )?;
    ends_badly("scheduler: no folder", &mut scheduler(&[]), code::USAGE, &["--dir"])?;
    // One server, unsynced as far as can be read, without --dev: the settings that it names lose events.
    ends_badly(
        "scheduler: unsafe NATS",
        &mut scheduler(&["--dir", fresh]),
        code::FAILED,
        &["replicas"],
    )?;
    ends_badly(
        "scheduler: a file for a folder",
        &mut scheduler(&["--dev", "--dir", config.to_str().context("not UTF-8")?]),
        code::FAILED,
        &["node.toml"],
    )?;

    strange_logs(&mut cluster, &scheduler)?;
    strange_stores(&mut cluster, &node)?;
    cluster.wait_ready()?;
    digests_agree(&cluster)
}

/// The bytes of every file in a folder, by name.
fn contents(dir: &Path) -> Result<BTreeMap<OsString, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // RocksDB's own diary and lock are no data.
        let name = entry.file_name();
        if entry.file_type()?.is_file() && !name.to_string_lossy().starts_with("LO") {
            all.insert(name, fs::read(entry.path())?);
        }
    }
    ensure!(!all.is_empty(), "{} is empty", dir.display());
    Ok(all)
}

/// A folder mounted over itself for reading only: what holds for root too. Unmounted when dropped.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    fn mount(dir: &'a Path) -> Result<Self> {
        process::output(Command::new("mount").arg("--bind").arg(dir).arg(dir))?;
        let mounted = Self(dir);
        process::output(Command::new("mount").args(["-o", "remount,ro,bind"]).arg(dir))?;
        Ok(mounted)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        if let Err(error) = process::output(Command::new("umount").arg(self.0)) {
            eprintln!("{} stays mounted: {error:#}", self.0.display());
        }
    }
}

/// A scheduler's folder that is in use, read-only, of a newer version, or damaged.
fn strange_logs(cluster: &mut Cluster, scheduler: &dyn Fn(&[&str]) -> Command) -> Result<()> {
    let dir = cluster.scheduler_dir();
    let text = |dir: &Path| Ok::<_, anyhow::Error>(dir.to_str().context("not UTF-8")?.to_owned());
    ends_badly(
        "scheduler: in use",
        &mut scheduler(&["--dev", "--dir", &text(&dir)?]),
        code::FAILED,
        &["scheduler", "LOCK"],
    )?;
    cluster.stop_scheduler()?;
    let copy = |name: &str, from: &Path| {
        let to = cluster.dir().join(name);
        process::output(Command::new("cp").arg("-a").arg(from).arg(&to))?;
        Ok::<_, anyhow::Error>(to)
    };
    let refused = |name: &str, dir: &Path, says: &[&str]| {
        let before = contents(dir)?;
        let mut command = scheduler(&["--dev", "--dir", &text(dir)?]);
        ends_badly(&format!("scheduler: {name}"), &mut command, code::FAILED, says)?;
        ensure!(contents(dir)? == before, "{name}: its files were changed");
        let verify = ["log", "verify", "--log-dir", &text(dir)?];
        Ok::<_, anyhow::Error>(cluster.hearth().command(&verify).output()?)
    };

    let read_only = copy("read-only-log", &dir)?;
    let mounted = ReadOnly::mount(&read_only)?;
    let output = refused("read-only", &read_only, &["read-only-log", "yours to write"])?;
    ensure!(
        output.status.success(),
        "a log that may only be read does not verify: {output:?}"
    );
    drop(mounted);

    let newer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scheduler/tests/newer-layout");
    let newer = copy("newer-log", &newer)?;
    const NEWER: &[&str] = &["newer-log", "newer Hearth", "start that one"];
    let output = refused("of a newer version", &newer, NEWER)?;
    check_error("verify of a newer log", &output, code::FAILED, NEWER)?;

    // What a torn write leaves is cut and refilled from the stream. Flipped bits are found by who looks, and a folder
    // that is no log any more is refused.
    let damaged = copy("damaged-log", &dir)?;
    for path in contents(&damaged)?.keys().map(|name| damaged.join(name)) {
        if matches!(path.extension().and_then(|e| e.to_str()), Some("log" | "sst")) {
            let mut bytes = fs::read(&path)?;
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 0x40;
                fs::write(&path, bytes)?;
            }
        }
    }
    let verify = ["log", "verify", "--log-dir", &text(&damaged)?];
    let output = cluster.hearth().command(&verify).output()?;
    check_error("verify of a damaged log", &output, code::FAILED, &["damaged-log"])?;
    fs::write(damaged.join("CURRENT"), "none")?;
    refused(
        "damaged",
        &damaged,
        &["damaged-log", "move", "refilled from the stream"],
    )?;
    cluster.start_scheduler()?;
    cluster.wait_ready()
}

/// A node's store of a newer version. (One damaged image of it: `health.rs`.)
fn strange_stores(cluster: &mut Cluster, node: &dyn Fn(&Path) -> Command) -> Result<()> {
    let images = cluster.store_dir(0).join("images");
    let nats = cluster.nats().url();
    let other = cluster.dir().join("strange");
    let config = node_config(cluster, &other, &nats, "ram_bytes = \"8MiB\"")?;
    process::output(Command::new("cp").arg("-a").arg(&images).arg(other.join("store")))?;
    let meta = fs::read_dir(other.join("store/images"))?
        .next()
        .context("no image in the store")??
        .path()
        .join("meta");
    let good = fs::read(&meta)?;
    let newer = String::from_utf8_lossy(&good).replacen("image 1 ", "image 9 ", 1);
    fs::write(&meta, &newer)?;
    ends_badly(
        "node: store newer",
        &mut node(&config),
        code::FAILED,
        &["version 9", "upgrade Hearth"],
    )?;
    ensure!(fs::read(&meta)? == newer.as_bytes(), "the file was changed");
    Ok(())
}
