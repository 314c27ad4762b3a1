//! Everything that an image has to outlive, on one cluster, for `HEARTH_TRIAL_MINUTES` minutes; the short forms are
//! `image_faults.rs`, `image_room.rs` and `image_power.rs`. Half of the time nats-server and both schedulers are dead.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hearth_tests::faults::{MEMBER, OWNER, ROOM};
use hearth_tests::fio::{Target, Verifying};
use hearth_tests::trial::{self, Fault, GOES_ON, PAST_THE_LEASE, Trial, TrialSpec, WITHIN};
use xtask::cluster::Cluster;

/// A disk that is full takes what is written a second time: the image is larger than what clients have written by then.
const SPEC: TrialSpec = TrialSpec {
    replicas: 2,
    image_bytes: 256 << 20,
    disk_bytes: Some(512 << 20),
};
/// What fio writes and verifies, on the same nodes.
const FIO_IMAGE: &str = "appl/vm-2";
const FIO_BYTES: u64 = 4 << 20;

/// The variable that asks for this test.
const MINUTES: &str = "HEARTH_TRIAL_MINUTES";

/// A pause that a member is not given up for.
const SHORT_PAUSE: Duration = Duration::from_millis(500);
/// Between two of them.
const BETWEEN: Duration = Duration::from_secs(10);

fn minutes() -> Result<u64> {
    trial::setting(MINUTES, 0)
}

/// For the first half healthy images go on, whatever becomes of a node that holds none of them; then a member fails, and
/// its images answer nothing until the log takes the smaller set.
fn control_is_dead(trial: &mut Trial) -> Result<()> {
    let half = Duration::from_secs(minutes()? * 60) / 4;
    let member = trial.member()?;
    let outsider = Trial::others(member).find(|node| *node != trial.owner);
    let outsider = outsider.context("three nodes, two of them members")?;
    trial.cluster.nats().daemon().kill()?;
    trial.cluster.scheduler()?.kill()?;
    trial.cluster.crash_standby()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.node(outsider).kill()?;
    let (began, mut pauses) = (Instant::now(), 0);
    while began.elapsed() < half {
        let next = Instant::now() + BETWEEN;
        trial.signal(member, libc::SIGSTOP)?;
        std::thread::sleep(SHORT_PAUSE);
        trial.signal(member, libc::SIGCONT)?;
        pauses += 1;
        while Instant::now() < next {
            trial.clients.go_on(GOES_ON, WITHIN)?;
        }
    }
    let seen = trial.clients.seen();
    eprintln!("without NATS and schedulers for {half:?}, {pauses} short pauses of a member, a node dead: {seen:?}");
    trial.signal(member, libc::SIGSTOP)?;
    std::thread::sleep(PAST_THE_LEASE);
    trial.clients.stand_still(half / 2)?;
    trial.signal(member, libc::SIGCONT)?;
    // It carries out what it was sent before, which may be answered then. Nothing new is sent to it: it was given up, which
    // only the log can say.
    std::thread::sleep(PAST_THE_LEASE);
    trial.clients.stand_still(half / 2)?;
    trial.cluster.nats().crash_and_restart()?;
    trial.cluster.crash_and_restart_scheduler()?;
    trial.cluster.start_standby()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.crash_and_restart_node(outsider)?;
    let pause = "a member is paused for a moment without NATS and schedulers";
    *trial.done.entry(pause.to_owned()).or_default() += pauses;
    Ok(())
}

const CONTROL: &[Fault] = &[("nats-server and both schedulers are dead", control_is_dead)];

/// fio's image, on the nodes that hold the other one.
fn start_fio(trial: &Trial) -> Result<Verifying> {
    let hearth = trial.cluster.hearth();
    let (size, owner) = (FIO_BYTES.to_string(), Cluster::node_id(trial.owner));
    let create = ["image", "create", FIO_IMAGE, &size, "--replicas", "2", "--node", &owner];
    hearth.text(&create)?;
    hearth.text(&["image", "attach", FIO_IMAGE, "--node", &owner])?;
    let target = Target::Nbd {
        socket: trial.cluster.socket(trial.owner),
        export: FIO_IMAGE.to_owned(),
    };
    Ok(Verifying::start(target, FIO_BYTES))
}

/// A round of faults; then fio's image too is in sync, on the nodes of the other one.
fn round(trial: &mut Trial, faults: &[Fault], round: u64) -> Result<()> {
    for fault in faults {
        trial.suffer_round(&[*fault], round)?;
        let member = Cluster::node_id(trial.member()?);
        trial.in_sync_of(FIO_IMAGE, 2)?;
        let hearth = trial.cluster.hearth();
        let holders = trial.members_of(FIO_IMAGE)?;
        if !holders.contains(&member) {
            hearth.text(&["location", "add", FIO_IMAGE, &member])?;
            trial.in_sync_of(FIO_IMAGE, 3)?;
        }
        let owner = Cluster::node_id(trial.owner);
        for surplus in trial.members_of(FIO_IMAGE)? {
            if surplus != member && surplus != owner {
                hearth.text(&["location", "remove", FIO_IMAGE, &surplus])?;
            }
        }
    }
    Ok(())
}

#[test]
fn an_image_outlives_what_goes_wrong_for_many_minutes() -> Result<()> {
    let minutes = minutes()?;
    if minutes == 0 {
        eprintln!("runs where {MINUTES} says for how long");
        return Ok(());
    }
    if !hearth_tests::have(&["fio"]) {
        return Ok(());
    }
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    trial.cluster.start_standby()?;
    let began = Instant::now();
    let past = |share: u64| began.elapsed() > Duration::from_secs(minutes * 60 * share / 4);
    let fio = start_fio(&trial)?;
    // Members first: the image is healthy all the time, so there is no error to be seen.
    round(&mut trial, ROOM, 1)?;
    round(&mut trial, CONTROL, 1)?;
    let mut rounds = 0;
    while rounds == 0 || !past(3) {
        rounds += 1;
        round(&mut trial, MEMBER, rounds)?;
    }
    let seen = trial.clients.seen();
    ensure!(seen.refused.is_empty(), "a healthy image answered errors: {seen:?}");
    eprintln!("fio verified {} passes over {FIO_IMAGE}", fio.stop()?);
    let mut rounds = 0;
    while rounds == 0 || !past(4) {
        rounds += 1;
        trial.suffer_round(OWNER, rounds)?;
    }
    for (name, times) in &trial.done {
        eprintln!("{times:>5} times: {name}");
    }
    eprintln!("in {:.0} s", began.elapsed().as_secs_f64());
    trial.end()
}
