//! Garbage on every NATS subject: scheduler and nodes go on, the guest sees nothing, what came is logged, and the
//! state equals a replay.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_protocol::{ImageId, LayerId, Publisher, subject};
use hearth_tests::digests_agree;
use hearth_tests::load::Load;
use serde_json::{Value, json};
use xtask::cluster::ClusterSpec;
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
const IMAGE: &str = "a/disk";
const IMAGE_BYTES: u64 = 8 << 20;

/// Bytes without meaning, the same in every run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

/// Every subject that a scheduler or a node of the cluster reads, those of strangers too.
fn subjects(image: ImageId) -> Result<Vec<String>> {
    let (node, stranger) = ("node-1".parse()?, "node-9".parse()?);
    let (scheduler, rival) = ("sched-1".parse()?, "sched-9".parse()?);
    let publisher = Publisher::Node(node);
    let Publisher::Node(node) = &publisher else {
        unreachable!("made a line above")
    };
    Ok(vec![
        subject::image(image, &publisher),
        subject::image(ImageId(7), &publisher),
        subject::layer(LayerId(7), &publisher),
        subject::node(node),
        subject::node(&stranger),
        subject::lead(&scheduler),
        subject::lead(&rival),
        subject::folded_heat(&scheduler),
        subject::record(&scheduler),
        subject::command(node),
        subject::heat(node),
        subject::heat(&stranger),
        "hearth.log.nobody.knows.this".into(),
    ])
}

/// Messages that mean nothing where they are sent: noise, cut and foreign messages, and the largest there can be.
fn payloads() -> Result<Vec<Vec<u8>>> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/golden/v1");
    let mut all = vec![
        Vec::new(),
        b"HRT1".to_vec(),
        b"HRT1\xff\xff\xff\xff".to_vec(),
        b"{\"op\":\"view\"}".to_vec(),
        noise(1, 100),
        noise(2, 60_000),
        noise(3, (1 << 20) - 4_096),
    ];
    for entry in std::fs::read_dir(&golden).with_context(|| golden.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "hrt" || e == "mp") {
            let frame = std::fs::read(&path)?;
            all.push(frame[..frame.len() / 2].to_vec());
            let mut changed = frame.clone();
            let middle = changed.len() / 2;
            changed[middle] ^= 0xff;
            all.push(changed);
            // Whole and valid, but of other publishers and subjects than these.
            all.push(frame);
        }
    }
    Ok(all)
}

/// Requests that no node or scheduler can carry out, and what the answer's kind must be.
fn requests() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let create = |name: &str, size: u64, block_size: u64| {
        json!({"op": "image_create", "name": name, "size": size, "block_size": block_size})
            .to_string()
            .into_bytes()
    };
    let (node, scheduler) = ("hearth.rpc.node.node-1", subject::SCHEDULER_RPC);
    vec![
        (node, noise(4, 300), "usage"),
        (node, Vec::new(), "usage"),
        (node, noise(5, 500_000), "usage"),
        (node, b"{\"op\":\"no_such\"}".to_vec(), "usage"),
        (node, b"[".repeat(100_000), "usage"),
        (node, create("../etc", 4 << 20, 65_536), "usage"),
        (node, create("a/\u{1b}[31m", 4 << 20, 65_536), "usage"),
        (
            node,
            create(&format!("a/{}", "x".repeat(5_000)), 4 << 20, 65_536),
            "usage",
        ),
        (node, create("a/new", 0, 65_536), "usage"),
        (node, create("a/new", 4_097, 65_536), "usage"),
        (node, create("a/new", u64::MAX, 65_536), "usage"),
        (node, create("a/new", 4 << 20, 0), "usage"),
        (node, create("a/new", 4 << 20, 12_288), "usage"),
        (node, create("a/new", 4 << 20, u64::MAX), "usage"),
        (
            node,
            b"{\"op\":\"image_import\",\"name\":\"a/new\",\"path\":\"etc/passwd\",\"block_size\":65536}".to_vec(),
            "usage",
        ),
        (scheduler, noise(6, 300), "usage"),
        (scheduler, b"{\"op\":\"no_such\"}".to_vec(), "usage"),
        (scheduler, b"{\"op\":\"policy_set\"}".to_vec(), "usage"),
    ]
}

async fn shower(url: &str, image: ImageId) -> Result<usize> {
    let client = async_nats::connect(url).await?;
    let mut sent = 0;
    for subject in subjects(image)? {
        for payload in payloads()? {
            client.publish(subject.clone(), payload.into()).await?;
            sent += 1;
        }
        client.flush().await?;
    }
    for (subject, payload, kind) in requests() {
        let shown = String::from_utf8_lossy(&payload[..payload.len().min(60)]).into_owned();
        let answer = client.request(subject, payload.into()).await?;
        let answer: Value = serde_json::from_slice(&answer.payload)?;
        let message = answer["Err"]["message"].as_str().unwrap_or_default();
        ensure!(
            answer["Err"]["kind"] == kind && !message.is_empty() && message.len() < 1_000,
            "{subject}, {shown}: {answer:.300}"
        );
        sent += 1;
    }
    Ok(sent)
}

#[test]
fn garbage_on_every_subject_changes_nothing() -> Result<()> {
    let spec = ClusterSpec {
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(mut cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let hearth = cluster.hearth().clone();
    hearth.text(&["image", "create", IMAGE, &IMAGE_BYTES.to_string()])?;
    let info = hearth.json(&["image", "attach", IMAGE])?;
    let image: ImageId = info["id"].as_str().context("no id")?.parse()?;
    let mut load = Load::start(&cluster.socket(0), IMAGE, IMAGE_BYTES)?;
    let before = hearth.json(&["image", "list"])?;

    let runtime = tokio::runtime::Runtime::new()?;
    let sent = runtime.block_on(shower(&cluster.nats().url(), image))?;
    let done = load.done();
    wait::until("requests to go on", WITHIN, || {
        load.check()?;
        Ok((load.done() > done + 50).then_some(()))
    })?;
    // A change counts as ever, although garbage stands where the last event of the image should.
    hearth.text(&["image", "snapshot", &format!("{IMAGE}@after")])?;
    cluster.wait_ready()?;
    digests_agree(&cluster)?;
    let after = hearth.json(&["image", "list"])?;
    let names =
        |list: &Value| -> Vec<Value> { list.as_array().into_iter().flatten().map(|i| i["id"].clone()).collect() };
    ensure!(names(&before) == names(&after), "{before} is now {after}");
    let log = std::fs::read_to_string(cluster.scheduler()?.log())?;
    let (foreign, heat) = (
        log.matches("foreign message in the log").count(),
        log.matches("heat report").count(),
    );
    ensure!(
        foreign > 500 && heat > 50,
        "{sent} messages sent, {foreign} and {heat} logged"
    );
    println!("{sent} messages sent; logged: {foreign} in the log's stream, {heat} in the heat stream");
    load.stop()?;
    cluster.check_running()
}
