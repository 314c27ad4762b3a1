//! A stream that loses what nodes and schedulers have read: changes freeze and say so, guests' I/O goes on, and an
//! operator either puts the end back, rebuilds the whole, or accepts the loss; nobody removes files by hand.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::digests_agree;
use hearth_tests::load::Load;
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::{process, wait};

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE_BYTES: u64 = 8 << 20;

struct Scene {
    cluster: Cluster,
    load: Load,
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    process::output(Command::new("cp").arg("-a").arg(from).arg(to)).map(drop)
}

impl Scene {
    /// A cluster with load on an image.
    fn start() -> Result<Option<Self>> {
        let spec = ClusterSpec {
            heat: "export",
            ..ClusterSpec::default()
        };
        let Some(cluster) = hearth_tests::cluster(&spec)? else {
            return Ok(None);
        };
        let export = hearth_tests::attached(&cluster, "a/early", IMAGE_BYTES)?;
        let load = Load::start(&cluster.socket(0), &export, IMAGE_BYTES)?;
        Ok(Some(Self { cluster, load }))
    }

    fn witnessed(&self) -> Option<u64> {
        let file = self.cluster.store_dir(0).join("log-witness.json");
        let witness: Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        witness["message"][0].as_u64()
    }

    /// Waits until the node has written down that it has read beyond what the stream holds now.
    fn wait_witnessed(&self) -> Result<()> {
        let now = self.cluster.view()?["seq"].as_u64().context("no position")?;
        wait::until("the node to witness the log", WITHIN, || {
            Ok(self.witnessed().is_some_and(|seq| seq > now).then_some(()))
        })
    }

    /// A copy of the streams as they are now.
    fn keep_streams(&mut self, name: &str) -> Result<PathBuf> {
        let kept = self.cluster.dir().join(name);
        self.cluster
            .nats()
            .crash_and_restart_after(|streams| copy(streams, &kept))?;
        self.cluster.wait_ready()?;
        Ok(kept)
    }

    /// An old disk comes back.
    fn roll_back_to(&mut self, kept: &Path) -> Result<()> {
        self.cluster.nats().crash_and_restart_after(|streams| {
            fs::remove_dir_all(streams)?;
            copy(kept, streams)
        })
    }

    /// The scheduler begins anew on the stream as it is; returns the folder with the log it had.
    fn scheduler_anew(&mut self, name: &str) -> Result<String> {
        self.cluster.stop_scheduler()?;
        let moved = self.cluster.dir().join(name);
        fs::rename(self.cluster.scheduler_dir(), &moved)?;
        self.cluster.start_scheduler()?;
        wait::until("the scheduler to lead", WITHIN, || Ok(self.cluster.view().ok()))?;
        Ok(moved.to_str().context("not UTF-8")?.to_owned())
    }

    /// The codes of what is wrong, and the exit code of `hearth health`.
    fn health(&self) -> Result<(Vec<String>, Option<i32>)> {
        let output = self.cluster.hearth().command(&["health", "-o", "json"]).output()?;
        let items: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let codes = items.iter().filter_map(|item| item["code"].as_str()).map(str::to_owned);
        Ok((codes.collect(), output.status.code()))
    }

    /// Waits until the node says that it is frozen; its guest goes on.
    fn wait_frozen(&mut self) -> Result<()> {
        wait::until("the node to say that it is frozen", WITHIN, || {
            let (codes, exit) = self.health()?;
            Ok((codes.iter().any(|code| code == "NODE_FROZEN") && exit == Some(1)).then_some(()))
        })?;
        let (code, text) = self.said(&["image", "create", "a/no", "4MiB", "--node", "node-1"])?;
        ensure!(
            code == Some(5) && text.contains("frozen") && text.contains("hearth log recover"),
            "{code:?}: {text}"
        );
        self.guest_goes_on()
    }

    fn wait_thawed(&mut self) -> Result<()> {
        wait::until("changes to be possible again", WITHIN, || {
            let (codes, exit) = self.health()?;
            Ok((!codes.iter().any(|code| code == "NODE_FROZEN") && exit == Some(0)).then_some(()))
        })?;
        self.guest_goes_on()
    }

    fn guest_goes_on(&mut self) -> Result<()> {
        let before = self.load.done();
        wait::until("requests to go on", WITHIN, || {
            self.load.check()?;
            Ok((self.load.done() >= before + 20).then_some(()))
        })
    }

    fn said(&self, words: &[&str]) -> Result<(Option<i32>, String)> {
        let output = self.cluster.hearth().command(words).output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    }

    /// Accepts that the stream lost what the scheduler's former log has; what the command said.
    fn accept_loss(&self, former: &str, reason: &str) -> Result<String> {
        let words = [
            "log",
            "recover",
            "--log-dir",
            former,
            "--accept-loss",
            "--reason",
            reason,
        ];
        let (code, text) = self.said(&words)?;
        ensure!(code == Some(0), "{code:?}: {text}");
        Ok(text)
    }

    /// Id, size and snapshots of every image by name, as the node has them.
    fn images(&self) -> Result<BTreeMap<String, Value>> {
        let listed = self.cluster.hearth().json(&["image", "list", "--node", "node-1"])?;
        by_name(listed.as_array().context("no images")?)
    }

    /// The same as the scheduler folds them from the log.
    fn viewed(&self) -> Result<BTreeMap<String, Value>> {
        let view = self.cluster.view()?;
        by_name(view["images"].as_array().context("no images")?)
    }

    fn knows(&self, image: &str) -> Result<bool> {
        let view = self.cluster.view()?;
        let images = view["images"].as_array().context("no images")?;
        Ok(images.iter().any(|i| i["name"] == image))
    }
}

fn by_name(images: &[Value]) -> Result<BTreeMap<String, Value>> {
    let one = |image: &Value| {
        let name = image["name"].as_str().context("no name")?;
        let what = serde_json::json!([image["id"], image["size"], image["snapshots"]]);
        Ok((name.to_owned(), what))
    };
    images.iter().map(one).collect()
}

fn create(cluster: &Cluster, image: &str) -> Result<()> {
    let size = IMAGE_BYTES.to_string();
    wait::until("the node to take a change", WITHIN, || {
        Ok(cluster
            .hearth()
            .text(&["image", "create", image, &size, "--node", "node-1"])
            .ok())
    })
    .map(drop)
}

#[test]
fn a_loss_is_accepted_by_word_and_each_word_covers_one_loss() -> Result<()> {
    let Some(mut scene) = Scene::start()? else {
        return Ok(());
    };
    for image in ["a/moved", "a/gone", "a/anew"] {
        create(&scene.cluster, image)?;
    }
    scene.cluster.hearth().text(&["image", "attach", "a/gone"])?;
    let early = scene.keep_streams("early")?;
    create(&scene.cluster, "a/late")?;
    for words in [["attach", "a/late"], ["attach", "a/moved"], ["detach", "a/moved"]] {
        scene.cluster.hearth().text(&[&["image"], &words[..]].concat())?;
    }
    // What is told again must include snapshots, ends of service, deletions, and names that went to another image.
    let lost: [&[&str]; 6] = [
        &["snapshot", "a/moved@lost"],
        &["snapshot", "a/late@lost"],
        &["resize", "a/moved", "12MiB"],
        &["detach", "a/gone"],
        &["delete", "a/gone", "--yes"],
        &["delete", "a/anew", "--yes"],
    ];
    for words in lost {
        scene.cluster.hearth().text(&[&["image"], words].concat())?;
    }
    create(&scene.cluster, "a/anew")?;
    let anew = scene.images()?;
    scene.wait_witnessed()?;
    scene.roll_back_to(&early)?;
    scene.wait_frozen()?;
    let (codes, _) = scene.health()?;
    ensure!(
        codes.iter().any(|code| code == "NO_LEADER"),
        "the scheduler has read more too: {codes:?}"
    );

    // A scheduler that begins anew leads on the stream as it is; the node knows better and stays frozen, also if it
    // starts anew itself.
    let former = scene.scheduler_anew("former")?;
    scene.cluster.crash_and_restart_node(0)?;
    scene.wait_frozen()?;
    let (code, text) = scene.said(&["log", "recover", "--log-dir", &former])?;
    ensure!(code == Some(5) && text.contains("--accept-loss"), "{code:?}: {text}");
    let (code, text) = scene.said(&["log", "recover", "--log-dir", &former, "--accept-loss", "--dry-run"])?;
    ensure!(
        code == Some(0)
            && text.contains("2 image_created")
            && text.contains("a/late")
            && text.contains("nothing was done"),
        "{code:?}: {text}"
    );
    scene.wait_frozen()?;
    let text = scene.accept_loss(&former, "no newer backup")?;
    ensure!(text.contains("written down at #"), "{text}");
    scene.wait_thawed()?;
    wait::until("the node to tell of the image that the stream lost", WITHIN, || {
        Ok(scene.knows("a/late")?.then_some(()))
    })?;
    // The scheduler's view says again what the node says, and what it said before the loss.
    wait::until("store and log to agree", WITHIN, || {
        Ok((scene.images()? == anew && scene.viewed()? == anew).then_some(()))
    })?;
    create(&scene.cluster, "a/after")?;
    // Their attaches were lost too: the log knows their epochs again.
    for words in [["detach", "a/late"], ["attach", "a/moved"], ["detach", "a/moved"]] {
        scene.cluster.hearth().text(&[&["image"], &words[..]].concat())?;
    }
    let (_, tail) = scene.said(&["log", "list", "--kind", "loss_accepted"])?;
    ensure!(tail.contains("no newer backup"), "{tail}");
    scene.cluster.restart_node(0)?;
    scene.wait_thawed()?;

    // Rolled back once more, behind that word: it does not cover what is lost now.
    scene.wait_witnessed()?;
    let accepted = scene.keep_streams("accepted")?;
    create(&scene.cluster, "a/lost-again")?;
    scene.wait_witnessed()?;
    scene.roll_back_to(&accepted)?;
    let former = scene.scheduler_anew("former-again")?;
    scene.wait_frozen()?;
    scene.accept_loss(&former, "again")?;
    scene.wait_thawed()?;
    digests_agree(&scene.cluster)?;
    scene.load.stop()?;
    Ok(())
}

#[test]
fn a_stream_that_is_gone_is_rebuilt_from_a_schedulers_log() -> Result<()> {
    let Some(mut scene) = Scene::start()? else {
        return Ok(());
    };
    scene.wait_witnessed()?;
    scene
        .cluster
        .nats()
        .crash_and_restart_after(|streams| Ok(fs::remove_dir_all(streams)?))?;
    let dir = scene.cluster.scheduler_dir();
    let dir = dir.to_str().context("not UTF-8")?;
    scene.guest_goes_on()?;
    let (code, text) = scene.said(&["log", "recover", "--log-dir", dir, "--reason", "the disk died"])?;
    ensure!(
        code == Some(2) || text.contains("--replicas 1"),
        "a lone server cannot keep three copies: {code:?}: {text}"
    );
    let rebuild = [
        "log",
        "recover",
        "--log-dir",
        dir,
        "--replicas",
        "1",
        "--reason",
        "the disk died",
        "--timeout",
        "30s",
    ];
    let (code, text) = scene.said(&rebuild)?;
    ensure!(code == Some(0) && text.contains("#1 to #"), "{code:?}: {text}");
    scene.cluster.wait_ready()?;
    scene.wait_thawed()?;
    create(&scene.cluster, "a/after")?;
    let (code, text) = scene.said(&["log", "verify"])?;
    ensure!(code == Some(0), "{text}");
    digests_agree(&scene.cluster)?;
    scene.load.stop()?;
    Ok(())
}
