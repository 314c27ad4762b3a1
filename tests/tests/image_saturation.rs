//! A copy fills a node's whole wire, and what keeps the cluster together gets through all the same: read leases, reports to
//! the scheduler, answers to clients.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hearth_tests::netns::Place;
use hearth_tests::trial::{GOES_ON, IMAGE, Trial, TrialSpec, WITHIN};
use xtask::cluster::Cluster;

const SPEC: TrialSpec = TrialSpec {
    replicas: 2,
    image_bytes: 24 << 20,
    disk_bytes: None,
};
/// The wire's bound; the image takes more than ten seconds over it.
const WIRE_KBIT: u32 = 16_000;
const COPIED_WITHIN: Duration = Duration::from_secs(120);

/// How often the set changed so far.
fn set_changes(trial: &Trial) -> Result<usize> {
    let list = ["log", "list", "--kind", "locations_changed", "--limit", "1000"];
    let events = trial.cluster.hearth().json(&list)?;
    Ok(events.as_array().context("no list of events")?.len())
}

#[test]
fn a_copy_that_fills_the_wire_keeps_no_lease_and_no_report_from_getting_through() -> Result<()> {
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    // The whole image is data.
    trial.clients.go_on(4 * SPEC.image_bytes / 4096, WITHIN)?;
    let member = trial.member()?;
    let third = Trial::others(trial.owner).find(|node| *node != member);
    let third = Cluster::node_id(third.context("no third node")?);
    let changes = set_changes(&trial)?;
    trial.network.slow(Place::Node(trial.owner), WIRE_KBIT)?;
    let copied = AtomicBool::new(false);
    let (took, longest) = std::thread::scope(|scope| {
        let copy = scope.spawn(|| {
            let began = Instant::now();
            let add = ["location", "add", IMAGE, &third, "--pace", "full"];
            let done = trial.cluster.hearth().text(&add);
            copied.store(true, Ordering::SeqCst);
            done.map(|_| began.elapsed())
        });
        let (began, mut longest) = (Instant::now(), Duration::ZERO);
        while !copied.load(Ordering::SeqCst) {
            ensure!(began.elapsed() < COPIED_WITHIN, "the copy does not end");
            longest = longest.max(trial.clients.go_on(5, WITHIN)?);
            let view = trial.cluster.view()?;
            let nodes = view["nodes"].as_array().context("no nodes")?;
            let away: Vec<_> = nodes.iter().filter(|node| node["present"] != true).collect();
            ensure!(away.is_empty(), "away while a wire is full: {away:?}");
        }
        match copy.join() {
            Ok(took) => Ok((took?, longest)),
            Err(_) => bail!("the thread that copies panicked"),
        }
    })?;
    eprintln!("copied in {took:?}; the clients' longest wait for five writes was {longest:?}");
    ensure!(took > Duration::from_secs(5), "the wire was not full: {took:?}");
    // The joiner, then the member: nobody was taken for dead meanwhile.
    let more = set_changes(&trial)? - changes;
    ensure!(more == 2, "{more} changes of the set instead of two");
    ensure!(trial.clients.seen().refused.is_empty(), "{:?}", trial.clients.seen());
    trial.network.heal()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.clients.verify(WITHIN)?;
    trial.end()
}
