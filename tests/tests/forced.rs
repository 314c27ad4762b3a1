//! A takeover that an operator forces, on real nodes: nothing starts from an older copy by accident; where it is forced, the
//! log says so, and the newer copy, when it comes back, serves nothing and is synced anew.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_tests::load::{self, Load};
use xtask::cluster::ClusterSpec;
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 8 << 20;

/// Exit codes: a confirmation that nobody can give, and what a safety rule refuses.
const USAGE: i32 = 2;
const REFUSED: i32 = 5;

#[test]
fn an_older_copy_is_taken_by_force_alone_and_the_newer_one_is_synced_from_it() -> Result<()> {
    if !hearth_tests::have(&["qemu-io"]) {
        return Ok(());
    }
    let spec = ClusterSpec {
        nodes: 2,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let hearth = cluster.hearth().clone();
    let attach = |node: &str, words: &[&str]| -> Result<(i32, String)> {
        let all = [&["image", "attach", IMAGE, "--node", node], words].concat();
        let output = hearth.command(&all).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code().context("ended by a signal")?, text))
    };
    let force = ["--takeover", "--accept-data-loss", "--yes"];
    let size = IMAGE_BYTES.to_string();
    hearth.text(&["image", "create", IMAGE, &size, "--replicas", "2", "--node", "node-1"])?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    load.wait_for(100, WITHIN)?;
    let old = load.stop()?;

    // The second node goes on alone and writes; then it dies, and the first one comes back.
    cluster.node(0).kill()?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-2", "--takeover"])?;
    load::write(&cluster.socket(1), IMAGE, 3, 99)?;
    cluster.node(1).kill()?;
    cluster.crash_and_restart_node(0)?;
    let refused = wait::until("the first node to refuse", WITHIN, || {
        let (code, text) = attach("node-1", &["--takeover"])?;
        Ok((code == REFUSED).then_some(text))
    })?;
    for words in ["node-2", "--takeover --accept-data-loss"] {
        ensure!(refused.contains(words), "{words:?} is not in: {refused}");
    }
    let (code, text) = attach("node-1", &["--takeover", "--accept-data-loss"])?;
    ensure!(code == USAGE && text.contains("confirmation"), "{code}: {text}");
    let (code, _) = attach("node-1", &["--accept-data-loss", "--yes"])?;
    ensure!(code == USAGE, "taken by force without --takeover");

    // By force: what the older copy holds, and the log says what was given up.
    let (code, text) = attach("node-1", &[&force[..], &["--reason", "node-2 burnt"]].concat())?;
    ensure!(code == 0, "{code}: {text}");
    load::verify(&cluster.socket(0), IMAGE, &old)?;
    let told = hearth.text(&["log", "list", "--since", "1", "--kind", "locations_changed"])?;
    ensure!(told.contains("BY FORCE") && told.contains("node-2 burnt"), "{told}");

    // The newer copy comes back: it serves nothing, cannot be forced while this one answers, and is synced anew.
    cluster.crash_and_restart_node(1)?;
    cluster.wait_ready()?;
    let info = hearth.json(&["image", "show", IMAGE, "--node", "node-2"])?;
    ensure!(info["attached"].is_null(), "the newer copy is served: {info}");
    let (code, text) = attach("node-2", &force)?;
    ensure!(code == REFUSED, "{code}: {text}");
    let mut after = old;
    load::write(&cluster.socket(0), IMAGE, 5, 77)?;
    after[5] = 77;
    wait::until("both nodes to be in sync", WITHIN, || {
        let map = hearth.json(&["image", "map", IMAGE, "--node", "node-1", "--blocks", "0-0"])?;
        let located = map["blocks"][0]["locations"].as_array().context("no locations")?;
        if located.iter().filter(|at| at["synced"] == true).count() == 2 {
            return Ok(Some(()));
        }
        let added = hearth.text(&["location", "add", IMAGE, "node-2"]);
        Ok(added.is_ok().then_some(()))
    })?;
    let compared = hearth.json(&["image", "scrub", IMAGE, "--check", "--node", "node-1"])?;
    ensure!(compared["found"]["differing"] == 0, "{compared}");
    hearth.text(&["image", "detach", IMAGE, "--node", "node-1"])?;
    hearth.text(&["image", "attach", IMAGE, "--node", "node-2"])?;
    load::verify(&cluster.socket(1), IMAGE, &after)?;
    hearth_tests::digests_agree(&cluster)
}
