//! The faults of nodes, networks, disks and the control plane that an image has to outlive, each with what is to be seen.
//!
//! `HEARTH_FAULT_SECONDS` says how long the control plane stays away.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use xtask::cluster::Cluster;
use xtask::wait;

use crate::netns::{Network, Place};
use crate::trial::{self, Fault, GOES_ON, IMAGE, PAST_THE_LEASE, Trial, WITHIN, begin, met};

/// How long the control plane is away where nothing else is said.
const AWAY_S: u64 = 12;
/// A link that a replica's writes fill: a tenth of a Gbit/s line, and lossy.
const LINK_KBIT_PER_S: u32 = 20_000;
const LOST_PERCENT: u32 = 2;

fn member_is_killed(trial: &mut Trial) -> Result<()> {
    let member = trial.member()?;
    trial.cluster.node(member).kill()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.is_member(member, false)?;
    trial.cluster.crash_and_restart_node(member)
}

fn member_is_paused(trial: &mut Trial) -> Result<()> {
    let member = trial.member()?;
    trial.signal(member, libc::SIGSTOP)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    std::thread::sleep(PAST_THE_LEASE);
    trial.is_member(member, false)?;
    trial.signal(member, libc::SIGCONT)?;
    trial.clients.go_on(GOES_ON, WITHIN).map(drop)
}

fn parted(trial: &mut Trial, cut: fn(&mut Network, Place, Place) -> Result<()>) -> Result<()> {
    let member = trial.member()?;
    cut(&mut trial.network, Place::Node(trial.owner), Place::Node(member))?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.is_member(member, false)?;
    trial.heal()
}

fn member_is_parted(trial: &mut Trial) -> Result<()> {
    parted(trial, Network::part)
}

fn member_is_not_heard(trial: &mut Trial) -> Result<()> {
    parted(trial, |network, owner, member| network.lose(member, owner))
}

fn owner_is_not_heard(trial: &mut Trial) -> Result<()> {
    parted(trial, |network, owner, member| network.lose(owner, member))
}

/// The link is slow and lossy; whoever is given up for it, guests see no error.
fn link_is_full(trial: &mut Trial) -> Result<()> {
    let member = Place::Node(trial.member()?);
    trial.network.slow(member, LINK_KBIT_PER_S)?;
    trial
        .network
        .lose_some(Place::Node(trial.owner), member, LOST_PERCENT)?;
    trial.clients.go_on(3 * GOES_ON, WITHIN)?;
    trial.heal()
}

/// nats-server and the scheduler are dead, and images go on; only when a member fails too, its image waits for the log.
fn control_is_away(trial: &mut Trial) -> Result<()> {
    let away = Duration::from_secs(trial::setting("HEARTH_FAULT_SECONDS", AWAY_S)?);
    let member = trial.member()?;
    trial.cluster.nats().daemon().kill()?;
    trial.cluster.scheduler()?.kill()?;
    let began = std::time::Instant::now();
    while began.elapsed() < away {
        trial.clients.go_on(GOES_ON, WITHIN)?;
    }
    trial.signal(member, libc::SIGSTOP)?;
    std::thread::sleep(PAST_THE_LEASE);
    trial.clients.stand_still(Duration::from_secs(1))?;
    trial.cluster.nats().crash_and_restart()?;
    trial.cluster.crash_and_restart_scheduler()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.signal(member, libc::SIGCONT)
}

fn nodes_are_cut_off_from_control(trial: &mut Trial) -> Result<()> {
    for node in 0..3 {
        trial.network.part(Place::Node(node), Place::Control)?;
    }
    let began = std::time::Instant::now();
    while began.elapsed() < PAST_THE_LEASE {
        trial.clients.go_on(GOES_ON, WITHIN)?;
    }
    trial.heal()
}

/// Whoever still asks the old owner gets nothing from it that is older than what the new one has acknowledged.
fn serves_nothing(trial: &Trial, old: usize) -> Result<()> {
    ensure!(
        trial.show(old)?["attached"].is_null(),
        "the old owner serves the image still: {}",
        trial.show(old)?
    );
    Ok(())
}

fn owner_is_paused(trial: &mut Trial) -> Result<()> {
    let (old, new) = (trial.owner, trial.member()?);
    let visitors = trial.visitors(old)?;
    trial.signal(old, libc::SIGSTOP)?;
    std::thread::sleep(PAST_THE_LEASE);
    trial.take_over(new)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    // What they ask now waits in the sockets of the old owner, which then goes on as if no time had passed.
    let visits = begin(visitors);
    trial.signal(old, libc::SIGCONT)?;
    let met = met(visits)?;
    ensure!(met.writes == 0, "the old owner acknowledged writes: {met:?}");
    trial.clients.go_on(GOES_ON, WITHIN)?;
    serves_nothing(trial, old)
}

fn owner_is_killed(trial: &mut Trial) -> Result<()> {
    let (old, new) = (trial.owner, trial.member()?);
    trial.cluster.node(old).kill()?;
    trial.take_over(new)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.crash_and_restart_node(old)?;
    trial.cluster.wait_ready()?;
    serves_nothing(trial, old)
}

/// An owner that hears nobody acknowledges nothing and answers no read, and goes on when it hears them again.
fn owner_is_cut_off(trial: &mut Trial) -> Result<()> {
    let visitors = trial.visitors(trial.owner)?;
    trial.cut_off(trial.owner)?;
    std::thread::sleep(PAST_THE_LEASE);
    let visits = begin(visitors);
    trial.clients.stand_still(Duration::from_secs(2))?;
    let met = met(visits)?;
    ensure!(
        (met.reads, met.writes) == (0, 0),
        "it answered without a lease: {met:?}"
    );
    // Nobody can ask it, so its journal says why.
    let owner = trial.owner;
    let journal = std::fs::read_to_string(trial.cluster.node(owner).log())?;
    let mut lines = journal.lines();
    ensure!(
        lines.any(|line| line.contains(IMAGE) && line.contains("reads and writes wait: these members do not answer")),
        "it does not say why it answers nobody:\n{}",
        trial.cluster.node(owner).log_tail()
    );
    trial.heal()?;
    trial.clients.go_on(GOES_ON, WITHIN).map(drop)
}

/// As before, and another node takes the image over meanwhile.
fn cut_off_owner_is_replaced(trial: &mut Trial) -> Result<()> {
    let (old, new) = (trial.owner, trial.member()?);
    let visitors = trial.visitors(old)?;
    trial.cut_off(old)?;
    std::thread::sleep(PAST_THE_LEASE);
    trial.take_over(new)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    let visits = begin(visitors);
    let met_then = met(visits)?;
    ensure!(
        (met_then.reads, met_then.writes) == (0, 0),
        "the old owner answered: {met_then:?}"
    );
    trial.heal()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.wait_ready()?;
    serves_nothing(trial, old)
}

/// What happens to a member, its links and the control plane; the owner and its clients feel nothing but a pause.
pub const MEMBER: &[Fault] = &[
    ("a member is killed", member_is_killed),
    ("a member is paused past its lease", member_is_paused),
    ("a member and the owner are parted", member_is_parted),
    ("a member is not heard", member_is_not_heard),
    ("the owner is not heard", owner_is_not_heard),
    ("a member's link is full and lossy", link_is_full),
    (
        "all nodes are cut off from the control plane",
        nodes_are_cut_off_from_control,
    ),
    ("nats-server and the scheduler are dead", control_is_away),
];

/// What happens to the owner.
pub const OWNER: &[Fault] = &[
    ("the owner is killed", owner_is_killed),
    ("the owner is paused past its lease and goes on", owner_is_paused),
    ("the owner is cut off", owner_is_cut_off),
    ("the owner is cut off and replaced", cut_off_owner_is_replaced),
];

/// What happens to the disk of a member and of the owner's copy. They need disks of their own.
pub const ROOM: &[Fault] = &[
    ("a member's disk is full", member_is_full),
    ("the disk of the owner's copy is full", owners_copy_is_full),
];

/// What is left on a disk that is filled.
pub const LEFT_BYTES: u64 = 1 << 20;

/// Waits until `hearth health` says that a node's store is full.
///
/// # Errors
/// It does not.
pub fn is_said_to_be_full(trial: &Trial, node: usize) -> Result<()> {
    let name = Cluster::node_id(node);
    wait::until(&format!("{name}'s store to be called full"), WITHIN, || {
        let health = trial.cluster.hearth().command(&["health", "--detail"]).output()?;
        let text = String::from_utf8_lossy(&health.stdout).into_owned();
        let mut lines = text.lines().filter(|line| line.contains("STORE_FULL"));
        let said = lines.any(|line| line.contains(IMAGE) && line.contains(&name));
        said.then_some(Some(()))
            .with_context(|| format!("health says:\n{text}"))
    })
}

fn leaves_and_comes_back(trial: &mut Trial, node: usize) -> Result<()> {
    trial.disks[node].fill(LEFT_BYTES)?;
    trial.is_member(node, false)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    is_said_to_be_full(trial, node)?;
    ensure!(
        trial.clients.seen().refused.is_empty(),
        "the other copy has room, and errors were answered"
    );
    trial.disks[node].make_room()
}

fn member_is_full(trial: &mut Trial) -> Result<()> {
    let member = trial.member()?;
    leaves_and_comes_back(trial, member)
}

fn owners_copy_is_full(trial: &mut Trial) -> Result<()> {
    let owner = trial.owner;
    leaves_and_comes_back(trial, owner)
}
