//! The `hearth` command as an operator and a script use it, on a real cluster: resize and export from end to end,
//! plans that change nothing, reasons that reach the log, and the formats of the commands that read.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec, Hearth, Host, Programs};
use xtask::process;

const MIB: u64 = 1 << 20;
const IMAGE: &str = "appl/db";

fn start() -> Result<Option<Cluster>> {
    if !hearth_tests::have(&["nbdinfo", "nbdcopy", "qemu-img"]) {
        return Ok(None);
    }
    hearth_tests::cluster(&ClusterSpec {
        heat: "export",
        ..ClusterSpec::default()
    })
}

/// Runs the command, which must fail with this exit code; returns what it said.
fn refused(hearth: &Hearth, code: i32, words: &[&str]) -> Result<String> {
    let out = hearth.command(words).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(
        out.status.code() == Some(code),
        "`hearth {}` ended with {}, not {code}: {said}",
        words.join(" "),
        out.status
    );
    ensure!(said.starts_with("error: "), "no error was said: {said:?}");
    Ok(said)
}

/// A raw file of `size` bytes with data in its first, third and last 100 KiB.
fn write_raw(path: &Path, size: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path)?;
    file.set_len(size)?;
    let data: Vec<u8> = (0..100 << 10).map(|i: u32| (i % 251 + 1) as u8).collect();
    for at in [0, 3 * MIB, size - data.len() as u64] {
        file.write_all_at(&data, at)?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path is not UTF-8")
}

fn size_on(socket: &Path, export: &str) -> Result<u64> {
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    Ok(process::output(Command::new("nbdinfo").args(["--size", &uri]))?.parse()?)
}

fn events(hearth: &Hearth, kind: &str) -> Result<Vec<Value>> {
    hearth.json_lines(&["log", "list", "--since", "1", "--kind", kind])
}

#[test]
fn images_grow_and_are_exported() -> Result<()> {
    let Some(cluster) = start()? else { return Ok(()) };
    let (hearth, dir) = (cluster.hearth(), cluster.dir());
    let raw = dir.join("disk.raw");
    write_raw(&raw, 8 * MIB + 4096)?;
    hearth.text(&["image", "import", text(&raw)?, IMAGE, "--reason", "from the old host"])?;

    // A plan is no change.
    let plan = hearth.json(&[
        "image",
        "resize",
        IMAGE,
        "16MiB",
        "--dry-run",
        "--reason",
        "just looking",
    ])?;
    ensure!(
        plan["dry_run"] == true && plan["request"]["op"] == "image_resize",
        "{plan}"
    );
    ensure!(plan["request"]["reason"] == "just looking", "{plan}");
    ensure!(events(hearth, "image_resized")?.is_empty(), "a plan resized the image");

    exports(&cluster, &raw)?;
    resizes(&cluster)?;

    // Everything has its operator's words.
    let said = |kind: &str| -> Result<Vec<String>> {
        let events = events(hearth, kind)?;
        Ok(events
            .iter()
            .map(|e| e["reason"].as_str().unwrap_or("").to_owned())
            .collect())
    };
    ensure!(said("image_created")? == ["from the old host"]);
    ensure!(said("image_resized")? == ["the database grows", ""]);
    ensure!(
        said("image_exported")?
            .first()
            .is_some_and(|why| why == "for the auditors")
    );
    let long = "x".repeat(2_000);
    refused(hearth, 2, &["image", "detach", IMAGE, "--reason", &long])?;
    Ok(())
}

fn exports(cluster: &Cluster, raw: &Path) -> Result<()> {
    let (hearth, dir) = (cluster.hearth(), cluster.dir());
    let (plain, qcow2) = (dir.join("out.raw"), dir.join("out.qcow2"));
    hearth.text(&["image", "export", IMAGE, text(&plain)?, "--reason", "for the auditors"])?;
    ensure!(
        fs::read(&plain)? == fs::read(raw)?,
        "the export has other bytes than were imported"
    );
    let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&plain)?) * 512;
    ensure!(allocated < MIB, "the export is not sparse: {allocated} bytes");

    // A file that is there stays, unless it is to be replaced.
    let said = refused(hearth, 6, &["image", "export", IMAGE, text(&plain)?])?;
    ensure!(said.contains("--force"), "{said}");
    hearth.text(&["image", "export", IMAGE, text(&plain)?, "--force"])?;
    refused(hearth, 2, &["image", "export", IMAGE, "/no/such/folder/disk.raw"])?;
    refused(
        hearth,
        3,
        &["image", "export", &format!("{IMAGE}@never"), text(&qcow2)?],
    )?;

    // An image in use is exported as of a snapshot.
    hearth.text(&["image", "attach", IMAGE])?;
    let said = refused(hearth, 5, &["image", "export", IMAGE, text(&qcow2)?])?;
    ensure!(said.contains("hearth image snapshot"), "{said}");
    hearth.text(&["image", "snapshot", &format!("{IMAGE}@v1")])?;
    let uri = format!("nbd+unix:///{IMAGE}?socket={}", cluster.socket(0).display());
    let zeros = dir.join("zeros");
    fs::write(&zeros, vec![0; usize::try_from(8 * MIB + 4096)?])?;
    process::output(Command::new("nbdcopy").arg(&zeros).arg(&uri))?;
    hearth.text(&[
        "image",
        "export",
        &format!("{IMAGE}@v1"),
        text(&qcow2)?,
        "--format",
        "qcow2",
    ])?;
    process::output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&qcow2))?;
    process::output(
        Command::new("qemu-img")
            .args(["compare", "-f", "qcow2", "-F", "raw"])
            .args([&qcow2, &plain]),
    )?;
    let left: Vec<_> = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.contains("partial"))
        .collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// The image is attached, and all zeros by now.
fn resizes(cluster: &Cluster) -> Result<()> {
    let (hearth, socket) = (cluster.hearth(), cluster.socket(0));
    let said = refused(hearth, 5, &["image", "resize", IMAGE, "4MiB"])?;
    ensure!(said.contains("cannot shrink"), "{said}");

    // While a client is connected: it keeps its size, whoever comes later has the new one.
    let uri = format!("nbd+unix:///{IMAGE}?socket={}", socket.display());
    let mut early = Command::new("qemu-io")
        .args(["-f", "raw", &uri])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu-io")?;
    let mut asks = early.stdin.take().context("qemu-io's input was not piped")?;
    writeln!(asks, "write -P 7 8M 4096")?;
    asks.flush()?;
    let mut answers = std::io::BufReader::new(early.stdout.take().context("qemu-io's output was not piped")?);
    let mut first = String::new();
    std::io::BufRead::read_line(&mut answers, &mut first)?;
    hearth.text(&["image", "resize", IMAGE, "16MiB", "--reason", "the database grows"])?;
    writeln!(asks, "read -P 7 8M 4096\nwrite -P 8 0 64k\nquit")?;
    drop(asks);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut answers, &mut rest)?;
    ensure!(early.wait()?.success(), "{first}{rest}");
    let all = format!("{first}{rest}");
    ensure!(!all.contains("failed") && !all.contains("rror"), "{all}");
    ensure!(size_on(&socket, IMAGE)? == 16 * MIB);
    let qemu_io = |ask: &str| process::output(Command::new("qemu-io").args(["-f", "raw", "-c", ask, &uri]));
    for ask in [
        "read -P 8 0 64k",
        "read -P 7 8M 4096",
        "read -P 0 9M 7M",
        "write -P 9 12M 64k",
    ] {
        let said = qemu_io(ask)?;
        ensure!(!said.contains("failed"), "`{ask}`: {said}");
    }

    hearth.text(&["image", "detach", IMAGE])?;
    hearth.text(&["image", "resize", IMAGE, "32MiB"])?;
    hearth.text(&["image", "attach", IMAGE])?;
    ensure!(size_on(&socket, IMAGE)? == 32 * MIB);
    for ask in ["read -P 9 12M 64k", "read -P 0 16M 16M"] {
        let said = qemu_io(ask)?;
        ensure!(!said.contains("failed"), "`{ask}`: {said}");
    }
    // The scheduler folds it too.
    let seen = xtask::wait::until(
        "the scheduler to see the size",
        std::time::Duration::from_secs(30),
        || {
            let view = hearth.json(&["image", "list"])?;
            let size = view[0]["size"].as_u64();
            Ok((size == Some(32 * MIB)).then_some(view))
        },
    )?;
    ensure!(seen[0]["name"] == IMAGE, "{seen}");
    Ok(())
}

#[test]
fn what_reads_has_every_format() -> Result<()> {
    let Some(cluster) = start()? else { return Ok(()) };
    let hearth = cluster.hearth();
    let names = ["appl/vm-1", "appl/vm-2"];
    for name in names {
        hearth.text(&["image", "create", name, "64MiB"])?;
    }
    hearth.text(&["image", "attach", "appl/vm-1", "appl/vm-2"])?;
    for words in [
        &["image", "list", "--node", "node-1"][..],
        &["image", "show", "appl/vm-1"],
        &["image", "map", "appl/vm-1"],
        &["image", "attach-info", "appl/vm-1"],
        &["node", "list"],
        &["node", "show"],
        &["status"],
        &["health"],
        &["policy", "show"],
        &["log", "list", "--limit", "5"],
        &["log", "tail", "--no-follow", "-n", "3"],
        &["log", "show", "1"],
        &["log", "verify"],
        &["replay"],
        &["top", "-b", "-n1"],
    ] {
        let with = |format: &str| {
            let mut all = words.to_vec();
            all.extend(["-o", format]);
            hearth.text(&all).with_context(|| format!("-o {format}"))
        };
        let (table, wide) = (with("table")?, with("wide")?);
        ensure!(
            !table.is_empty() || words[0] == "health",
            "`{}` prints nothing",
            words.join(" ")
        );
        ensure!(
            wide.lines().next().map_or(0, str::len) >= table.lines().next().map_or(0, str::len),
            "{words:?}: wide is narrower than the table"
        );
        // What follows the log prints a document per event.
        for document in serde_json::Deserializer::from_str(&with("json")?).into_iter::<Value>() {
            document.with_context(|| format!("{words:?} -o json"))?;
        }
        for line in with("jsonl")?.lines() {
            let _: Value = serde_json::from_str(line).with_context(|| format!("{words:?} -o jsonl"))?;
        }
        let ascii = {
            let mut all = words.to_vec();
            all.push("--ascii");
            hearth.text(&all)?
        };
        ensure!(ascii.is_ascii(), "{words:?} --ascii prints other characters");
    }
    for guest in ["qemu", "libvirt", "pve"] {
        let snippet = hearth.text(&["image", "attach-info", "appl/vm-1", "--format", guest])?;
        ensure!(snippet.contains("appl/vm-1"), "{guest}: {snippet}");
    }

    // Two changes at once, of which one cannot be.
    let said = refused(hearth, 3, &["image", "detach", "appl/vm-1", "appl/none"])?;
    ensure!(said.contains("appl/none"), "{said}");
    let plans = hearth.json(&["image", "delete", "appl/vm-1", "appl/vm-2", "--dry-run"])?;
    ensure!(plans.as_array().map(Vec::len) == Some(2), "{plans}");
    refused(hearth, 2, &["image", "delete", "appl/vm-1", "appl/vm-2"])?;
    refused(hearth, 5, &["image", "delete", "--yes", "appl/vm-1"])?;
    hearth.text(&["image", "detach", "appl/vm-1", "appl/vm-2"])?;
    hearth.text(&["image", "delete", "--yes", "appl/vm-1", "appl/vm-2"])?;
    let left = hearth.json(&["image", "list", "--node", "node-1"])?;
    ensure!(left.as_array().is_some_and(Vec::is_empty), "{left}");
    Ok(())
}

#[test]
fn manual_pages_and_completions_know_every_command() -> Result<()> {
    let Ok(programs) = Programs::for_tests() else {
        hearth_tests::skip("the programs are not built");
        return Ok(());
    };
    let hearth = Hearth::new(
        &programs.bin_dir.join("hearth"),
        "nats://127.0.0.1:1".into(),
        Host::default(),
    );
    let dir = tempfile::tempdir()?;
    hearth.text(&["man", "--dir", text(dir.path())?])?;
    for page in [
        "hearth",
        "hearth-image-resize",
        "hearth-image-export",
        "hearth-job-cancel",
        "hearth-top",
    ] {
        let page = fs::read_to_string(dir.path().join(format!("{page}.1")))?;
        ensure!(page.contains(".SH DESCRIPTION"), "{page:.200}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = hearth.text(&["completions", shell])?;
        for word in ["resize", "export", "attach-info", "cancel"] {
            ensure!(script.contains(word), "the completions for {shell} lack {word}");
        }
    }
    Ok(())
}
