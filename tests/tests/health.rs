//! What `hearth health` says of images that their node closed or cannot read: in words, as JSON and by its exit code.
//! One image in trouble keeps no other from being served.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);

/// An image's metadata file.
fn meta_of(cluster: &Cluster, image: &str) -> Result<PathBuf> {
    let info = cluster.hearth().json(&["image", "show", image])?;
    let id = info["id"].as_str().context("an image without an id")?;
    Ok(cluster.store_dir(0).join("images").join(id).join("meta"))
}

/// The directory of an image's top layer.
fn top_of(cluster: &Cluster, image: &str) -> Result<PathBuf> {
    let info = cluster.hearth().json(&["image", "show", image])?;
    let top = info["layers"][0].as_str().context("an image without layers")?;
    Ok(cluster.store_dir(0).join("layers").join(top))
}

fn health(cluster: &Cluster, words: &[&str]) -> Result<(Output, String)> {
    let output = cluster.hearth().command(&[&["health"], words].concat()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((output, text))
}

/// Holds `hearth health` to naming an image with a code, what to do about it, and an exit code of 1.
fn says(cluster: &Cluster, code: &str, image: &str, to_do: &str) -> Result<()> {
    let (output, text) = health(cluster, &["--detail"])?;
    ensure!(output.status.code() == Some(1), "{code}: {}, {text}", output.status);
    let line = text.lines().find(|line| line.starts_with(&format!("error {code}:")));
    let line = line.with_context(|| format!("nothing about {code}:\n{text}"))?;
    ensure!(line.contains(image) && line.contains("node-1"), "{line}");
    ensure!(text.contains(to_do), "{code}: it does not say {to_do:?}:\n{text}");
    let (output, text) = health(cluster, &["-o", "json"])?;
    ensure!(output.status.code() == Some(1), "{code}: {} with JSON", output.status);
    let items: Vec<Value> = serde_json::from_str(&text)?;
    let item = items
        .iter()
        .find(|item| item["code"] == code)
        .context("not in the JSON")?;
    ensure!(
        item["severity"] == "error" && item["fix"].as_str().is_some_and(|fix| fix.contains(to_do)),
        "{item}"
    );
    let shown = cluster.hearth().json(&["image", "show", image])?;
    ensure!(shown["trouble"].as_str().is_some_and(|t| t.contains(to_do)), "{shown}");
    Ok(())
}

fn is_well(cluster: &Cluster) -> Result<()> {
    wait::until("all to be well", WITHIN, || {
        let (output, text) = health(cluster, &[])?;
        Ok((output.status.success() && text == "health: ok\n").then_some(()))
    })
}

#[test]
fn images_in_trouble_are_named_with_what_to_do() -> Result<()> {
    let spec = ClusterSpec {
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    for image in ["a/closed", "a/damaged", "a/well"] {
        cluster
            .hearth()
            .text(&["image", "create", image, "4MiB", "--node", "node-1"])?;
        cluster.hearth().text(&["image", "attach", image])?;
    }
    is_well(&cluster)?;
    let (doubt, meta) = (
        top_of(&cluster, "a/closed")?.join("doubt"),
        meta_of(&cluster, "a/damaged")?,
    );

    // What a failed sync leaves, and a file cut in half; then the daemon dies and starts again.
    fs::write(&doubt, "a flush failed: Input/output error")?;
    let good = fs::read(&meta)?;
    fs::write(&meta, &good[..good.len() / 2])?;
    cluster.crash_and_restart_node(0)?;
    cluster.wait_ready()?;
    wait::until("the other image to be served again", WITHIN, || {
        let shown = cluster.hearth().json(&["image", "show", "a/well"])?;
        Ok((!shown["attached"].is_null() && shown["trouble"].is_null()).then_some(()))
    })?;
    says(&cluster, "IMAGE_CLOSED", "a/closed", "hearth image attach")?;
    let (_, text) = health(&cluster, &[])?;
    ensure!(text.contains("a flush failed: Input/output error"), "{text}");
    says(&cluster, "IMAGE_DAMAGED", "a/damaged", "sound copy")?;
    ensure!(
        fs::read(&meta)? == good[..good.len() / 2],
        "the damaged file was changed"
    );
    let output = cluster.hearth().command(&["image", "attach", "a/damaged"]).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && words.contains("is damaged"),
        "{words}"
    );

    // Done what is said, all is well again.
    fs::write(&meta, &good)?;
    wait::until("the restored image to be served", WITHIN, || {
        let shown = cluster.hearth().json(&["image", "show", "a/damaged"])?;
        Ok((!shown["attached"].is_null()).then_some(()))
    })?;
    cluster.hearth().text(&["image", "detach", "a/closed"])?;
    cluster.hearth().text(&["image", "attach", "a/closed"])?;
    ensure!(!doubt.exists(), "the mark stayed");
    is_well(&cluster)?;
    hearth_tests::digests_agree(&cluster)
}
