//! A running guest moves from one QEMU to another and its disk from one node to another, with `hearth migrate`; and where
//! that fails, the guest goes on where it was.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::guest::{self, Guest, GuestDisk, GuestOptions, Phase};
use xtask::wait;
use xtask::workspace::Workspace;

const IMAGE: &str = "appl/vm-1";
const BOOT_WITHIN: Duration = Duration::from_secs(240);
const PHASE_WITHIN: Duration = Duration::from_secs(180);

/// A cluster of two nodes, and a guest's disk on both, attached on the first.
struct Scene {
    cluster: Cluster,
    accel: guest::Accel,
}

impl Scene {
    fn start() -> Result<Option<Self>> {
        if !hearth_tests::have(&["qemu-system-x86_64", "qemu-img"]) {
            return Ok(None);
        }
        let golden = guest::build_golden(&Workspace::find()?.cache)?;
        let (accel, why) = guest::choose()?;
        eprintln!("guests run on {}: {why}", accel.name());
        let spec = ClusterSpec {
            nodes: 2,
            heat: "export",
            ..ClusterSpec::default()
        };
        let Some(cluster) = hearth_tests::cluster(&spec)? else {
            return Ok(None);
        };
        let hearth = cluster.hearth();
        let size = std::fs::metadata(&golden)?.len().to_string();
        hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", "node-1"])?;
        hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
        let uri = format!("nbd+unix:///{IMAGE}?socket={}", cluster.socket(0).display());
        let copied = Command::new("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(&golden)
            .arg(&uri)
            .status()?;
        ensure!(copied.success(), "qemu-img cannot fill the image: {copied}");
        Ok(Some(Self { cluster, accel }))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.dir().join(name)
    }

    /// A QEMU with the disk as one node serves it.
    fn guest(&self, index: usize, incoming: bool) -> Result<Guest> {
        let name = format!("on-{}", Cluster::node_id(index));
        Guest::boot(&GuestOptions {
            disk: GuestDisk::Nbd {
                socket: self.cluster.socket(index),
                export: IMAGE.into(),
            },
            accel: self.accel,
            memory_mib: 160,
            console_log: self.path(&format!("{name}.log")),
            qmp_socket: Some(self.path(&format!("{name}.qmp"))),
            name,
            incoming,
        })
    }

    fn migrate(&self, from: usize, to: usize, channel: &Path) -> Result<Value> {
        let monitor = |index| self.path(&format!("on-{}.qmp", Cluster::node_id(index)));
        let text = |path: &Path| path.to_str().map(str::to_owned).context("a path that is no text");
        self.cluster.hearth().json(&[
            "migrate",
            IMAGE,
            "--to",
            &Cluster::node_id(to),
            "--source-qmp",
            &text(&monitor(from))?,
            "--destination-qmp",
            &text(&monitor(to))?,
            "--channel",
            &format!("unix:{}", text(channel)?),
        ])
    }

    fn is_attached(&self, index: usize) -> Result<bool> {
        let node = Cluster::node_id(index);
        let info = self.cluster.hearth().json(&["image", "show", IMAGE, "--node", &node])?;
        Ok(!info["attached"].is_null())
    }
}

fn phase(name: &str, seconds: f64) -> Phase {
    Phase {
        name: name.into(),
        seconds,
        write_permille: 500,
        depth: 4,
        ..Phase::default()
    }
}

/// Every page that the guest reads is checked by it against what it last wrote there.
fn finish(guest: &mut Guest) -> Result<()> {
    let result = guest.finish_phase(PHASE_WITHIN)?;
    eprintln!("{result:?}");
    ensure!(
        (result.errors, result.corrupt) == (0, 0),
        "the guest saw {}",
        result.first_failure
    );
    ensure!(result.reads > 0 && result.writes > 0, "the guest did nothing");
    Ok(())
}

#[test]
fn a_guest_migrates_while_it_writes_and_goes_on_where_it_was_if_that_fails() -> Result<()> {
    let Some(scene) = Scene::start()? else { return Ok(()) };
    let hearth = scene.cluster.hearth();
    let mut source = scene.guest(0, false)?;
    source.wait_ready(BOOT_WITHIN)?;

    // Without a destination that waits nothing is touched.
    let refused = hearth.text(&[
        "migrate",
        IMAGE,
        "--to",
        "node-2",
        "--source-qmp",
        "/nowhere",
        "--destination-qmp",
        "/nowhere",
        "--channel",
        "unix:/nowhere",
    ]);
    let refused = format!(
        "{:#}",
        refused.err().context("a destination that does not wait was taken")?
    );
    ensure!(refused.contains("--incoming"), "{refused}");

    // The destination's QEMU dies while memory is copied: the guest goes on at the source.
    hearth.text(&["image", "attach", IMAGE, "--node", "node-2", "--incoming"])?;
    let unready = scene.guest(1, true)?;
    source.start_phase(&phase("cancelled", 6.0))?;
    wait::until("the destination's monitor", PHASE_WITHIN, || {
        Ok(scene.path("on-node-2.qmp").exists().then_some(()))
    })?;
    let failed = scene.migrate(0, 1, Path::new("/nowhere/channel"));
    ensure!(failed.is_err(), "a channel that cannot be made was used");
    drop(unready);
    finish(&mut source)?;
    ensure!(scene.is_attached(0)?, "the source lost its disk");

    // And now it moves, while it writes.
    let mut destination = scene.guest(1, true)?;
    wait::until("the destination's monitor", PHASE_WITHIN, || {
        Ok(scene.path("on-node-2.qmp").exists().then_some(()))
    })?;
    source.start_phase(&phase("moving", 12.0))?;
    let migrated = scene.migrate(0, 1, &scene.path("channel"))?;
    eprintln!("{migrated}");
    finish(&mut destination)?;
    ensure!(!scene.is_attached(0)?, "the source still serves the disk");
    ensure!(
        migrated["hand_over_ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{migrated} says nothing of the hand-over"
    );
    // The source's QEMU still has its connection, and may do with it what it likes.
    drop(source);
    destination.start_phase(&phase("after", 3.0))?;
    finish(&mut destination)?;
    destination.stop(PHASE_WITHIN)?;
    hearth_tests::digests_agree(&scene.cluster)?;
    Ok(())
}
