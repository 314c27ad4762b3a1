//! The hook does what libvirt's operations need: a guest's image is attached where it is to start, waits where it is to
//! arrive, is refused where it runs elsewhere, and is given up where the guest has left.

use std::io::Write as _;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};

const IMAGE: &str = "appl/vm-1";

/// Runs the hook on a node as libvirt does; its exit code, and what it printed for libvirt.
fn hook(cluster: &Cluster, index: usize, words: [&str; 2]) -> Result<(bool, String)> {
    let xml = format!(
        "<domain><devices><disk type='network'><source protocol='nbd' name='{IMAGE}'><host transport='unix' \
         socket='{}'/></source></disk></devices></domain>",
        cluster.socket(index).display()
    );
    let node = Cluster::node_id(index);
    let mut command =
        cluster
            .hearth()
            .command(&["libvirt-hook", "--node", &node, "--", "web", words[0], words[1], "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().context("a pipe")?.write_all(xml.as_bytes())?;
    let output = child.wait_with_output()?;
    Ok((output.status.success(), String::from_utf8(output.stdout)?))
}

/// How the image is attached on a node: `None` if it is not.
fn incoming(cluster: &Cluster, index: usize) -> Result<Option<bool>> {
    let images = cluster
        .hearth()
        .json(&["image", "list", "--node", &Cluster::node_id(index)])?;
    let images = images.as_array().context("no images")?;
    let image = images.iter().find(|image| image["name"] == IMAGE);
    let attached = image.map_or(Value::Null, |image| image["attached"].clone());
    Ok(attached["incoming"].as_bool())
}

#[test]
fn disks_are_where_libvirt_starts_a_guest() -> Result<()> {
    let spec = ClusterSpec {
        nodes: 2,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let hearth = cluster.hearth();
    hearth.text(&["image", "create", IMAGE, "8MiB", "--replicas", "2", "--node", "node-1"])?;
    let fine = (true, String::new());
    let said = |index, words| hook(&cluster, index, words);

    // A guest starts and stops on a node; twice is once.
    for words in [
        ["prepare", "begin"],
        ["prepare", "begin"],
        ["start", "begin"],
        ["started", "begin"],
    ] {
        ensure!(said(0, words)? == fine, "{words:?}");
        ensure!(incoming(&cluster, 0)? == Some(false), "{words:?}");
    }
    // It cannot start elsewhere meanwhile.
    let (started, printed) = said(1, ["prepare", "begin"])?;
    ensure!(!started && printed.is_empty(), "a second guest may start: {printed}");
    ensure!(said(0, ["release", "end"])? == fine);
    ensure!(incoming(&cluster, 0)?.is_none());

    // It goes from one to the other.
    ensure!(said(0, ["prepare", "begin"])? == fine);
    for words in [["migrate", "begin"], ["prepare", "begin"], ["start", "begin"]] {
        ensure!(said(1, words)? == fine, "{words:?}");
        ensure!(incoming(&cluster, 1)? == Some(true), "{words:?}");
    }
    hearth.text(&["image", "hand-over", IMAGE, "--node", "node-1", "--to", "node-2"])?;
    ensure!(
        said(0, ["release", "end"])? == fine,
        "the source is released after the hand-over"
    );
    ensure!((incoming(&cluster, 0)?, incoming(&cluster, 1)?) == (None, Some(false)));

    // One that is cancelled leaves the disk where it was.
    ensure!(said(0, ["migrate", "begin"])? == fine);
    ensure!(said(0, ["release", "end"])? == fine);
    ensure!((incoming(&cluster, 0)?, incoming(&cluster, 1)?) == (None, Some(false)));
    Ok(())
}
