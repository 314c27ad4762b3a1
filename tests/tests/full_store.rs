//! A store on a full tmpfs: what is refused is refused as "no space", what was acknowledged stays readable, the image
//! says what is wrong, and everything goes on when there is room, without a restart of anything. A daemon that starts
//! while the store is full serves the image as soon as it can; clients that reconnect wait until then.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::{process, wait};

const IMAGE: &str = "tests/full";
const IMAGE_BYTES: u64 = 64 << 20;
const STORE_BYTES: u64 = 24 << 20;
const CHUNK: u64 = 1 << 20;

/// Another tenant's file, whose removal makes room.
const OTHER_BYTES: usize = 8 << 20;

const WITHIN: Duration = Duration::from_secs(60);

struct Bench {
    cluster: Cluster,
    export: String,
    /// What each chunk holds.
    acknowledged: Vec<u8>,
}

impl Bench {
    fn qemu_io(&self, commands: &[String]) -> Command {
        let image = serde_json::json!({
            "driver": "raw",
            "file": {
                "driver": "nbd",
                "server": { "type": "unix", "path": self.cluster.socket(0) },
                "export": self.export,
                "open-timeout": 60,
            },
        });
        let mut command = Command::new("qemu-io");
        for one in commands {
            command.args(["-c", one]);
        }
        command.arg(format!("json:{image}"));
        command
    }

    fn io(&self, commands: &[String]) -> Result<(bool, String)> {
        let out = self.qemu_io(commands).output().context("cannot start qemu-io")?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        let failed = text.contains("failed") || text.contains("rror") || !out.status.success();
        Ok((!failed, text))
    }

    fn write_command(&self) -> (u8, [String; 2]) {
        let chunk = self.acknowledged.len() as u64;
        let pattern = (chunk % 250 + 1) as u8;
        let write = format!("write -P {pattern} {} {CHUNK}", chunk * CHUNK);
        (pattern, [write, "flush".to_owned()])
    }

    /// Writes chunks, each flushed, until one is refused.
    fn fill(&mut self) -> Result<()> {
        loop {
            ensure!(
                (self.acknowledged.len() as u64) * CHUNK < IMAGE_BYTES,
                "the store never became full"
            );
            let (pattern, commands) = self.write_command();
            let (done, text) = self.io(&commands)?;
            if !done {
                ensure!(text.contains("No space left on device"), "refused, but with: {text}");
                return Ok(());
            }
            self.acknowledged.push(pattern);
        }
    }

    fn check_acknowledged(&self) -> Result<()> {
        let chunks = self.acknowledged.iter().enumerate();
        let reads: Vec<_> = chunks
            .map(|(i, pattern)| format!("read -P {pattern} {} {CHUNK}", i as u64 * CHUNK))
            .collect();
        let (done, text) = self.io(&reads)?;
        ensure!(done, "{text}");
        Ok(())
    }

    fn trouble(&self) -> Result<Value> {
        Ok(self.cluster.hearth().json(&["image", "show", IMAGE])?["trouble"].clone())
    }

    fn store(&self) -> PathBuf {
        self.cluster.store_dir(0)
    }
}

/// Takes all the room that is left.
fn take_the_rest(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    while file.write_all(&[1; 4096]).is_ok() {}
    Ok(())
}

fn start() -> Result<Option<Bench>> {
    let spec = ClusterSpec {
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(None);
    };
    cluster.node(0).stop()?;
    // Dropping the cluster takes it away again.
    let mounted = process::output(
        Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={STORE_BYTES}"), "hearth-full"])
            .arg(cluster.store_dir(0)),
    );
    if hearth_tests::or_skip(mounted).is_none() {
        return Ok(None);
    }
    cluster.crash_and_restart_node(0)?;
    cluster.wait_ready()?;
    fs::write(cluster.store_dir(0).join("other"), vec![1; OTHER_BYTES])?;
    let export = wait::until("the node to take requests again", WITHIN, || {
        Ok(hearth_tests::attached(&cluster, IMAGE, IMAGE_BYTES).ok())
    })?;
    Ok(Some(Bench {
        cluster,
        export,
        acknowledged: Vec::new(),
    }))
}

#[test]
fn a_full_store_refuses_clearly_and_goes_on_when_there_is_room() -> Result<()> {
    let Some(mut bench) = start()? else { return Ok(()) };
    ensure!(bench.trouble()?.is_null(), "in trouble from the start");

    bench.fill()?;
    let trouble = bench.trouble()?;
    let words = trouble.as_str().context("the image says nothing")?;
    ensure!(
        words.contains("the store is full") && words.contains("add disk space"),
        "it says {words:?}"
    );
    ensure!(
        bench
            .cluster
            .hearth()
            .text(&["image", "show", IMAGE])?
            .contains("trouble        the store is full")
    );
    bench.check_acknowledged().context("while the store is full")?;

    let full_at = bench.acknowledged.len();
    fs::remove_file(bench.store().join("other"))?;
    bench.fill().context("after room was made")?;
    ensure!(
        bench.acknowledged.len() > full_at + 4,
        "room was made, and hardly any was found"
    );
    bench.check_acknowledged()?;

    // The daemon dies, and starts again without room for a single page.
    take_the_rest(&bench.store().join("rest"))?;
    bench.cluster.crash_and_restart_node(0)?;
    bench.cluster.wait_ready()?;
    let words = wait::until("the image to say that it cannot be served", WITHIN, || {
        Ok(bench
            .trouble()?
            .as_str()
            .filter(|w| w.contains("cannot be"))
            .map(str::to_owned))
    })?;
    ensure!(words.contains("no space left"), "it says {words:?}");
    let mut waiting = bench
        .qemu_io(&[format!("read -P {} 0 {CHUNK}", bench.acknowledged[0])])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu-io")?;
    ensure!(waiting.try_wait()?.is_none(), "the client did not wait");
    fs::remove_file(bench.store().join("rest"))?;
    let told = waiting.wait_with_output()?;
    let text = String::from_utf8_lossy(&told.stdout);
    ensure!(
        told.status.success() && text.contains("read 1048576/1048576") && !text.contains("failed"),
        "{text}"
    );
    bench.check_acknowledged().context("after the restart")?;
    println!(
        "{} chunks acknowledged, {full_at} before room was made",
        bench.acknowledged.len()
    );
    Ok(())
}
