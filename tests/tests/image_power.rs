//! All nodes of an image die: one after the other, so that only the last one has what was acknowledged last, or all at
//! once by a power cut, which takes what was not synced along. The image opens again with every byte that it promised, or
//! not at all.

use std::time::Duration;

use anyhow::{Result, ensure};
use hearth_tests::trial::{Fault, GOES_ON, IMAGE, Trial, TrialSpec, WITHIN};
use xtask::cluster::Cluster;
use xtask::wait;

const SPEC: TrialSpec = TrialSpec {
    replicas: 3,
    image_bytes: 64 << 20,
    disk_bytes: Some(192 << 20),
};

/// Time for clients whose server died to take note of it.
const NOTED: Duration = Duration::from_millis(500);

/// Has the image attached somewhere, and the clients go there. A node that serves it again by itself is where it is.
fn attach(trial: &mut Trial, node: usize) -> Result<()> {
    wait::until("the image to be attached", WITHIN, || {
        let shown = trial.show(node)?;
        if !shown["attached"].is_null() {
            return Ok(Some(()));
        }
        trial.take_over(node).map(Some)
    })?;
    trial.owner = node;
    trial.clients.go_to(&trial.cluster.socket(node));
    Ok(())
}

/// The last one alive has writes that no other has; without it the image stays closed.
fn all_but_one_then_that_one(trial: &mut Trial) -> Result<()> {
    let last = trial.owner;
    let others: Vec<_> = Trial::others(last).collect();
    for node in &others {
        trial.cluster.node(*node).kill()?;
    }
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.node(last).kill()?;
    std::thread::sleep(NOTED);
    for node in &others {
        trial.cluster.crash_and_restart_node(*node)?;
    }
    for node in &others {
        let name = Cluster::node_id(*node);
        let words = ["image", "attach", IMAGE, "--node", &name, "--takeover"];
        // Before it is back it does not answer, which says nothing of what it would do.
        let attached = wait::until("a node to say what it is missing", WITHIN, || {
            match trial.cluster.hearth().text(&words) {
                Ok(_) => Ok(Some(true)),
                Err(error) if format!("{error:#}").contains("can be reached: start one of them") => Ok(Some(false)),
                Err(error) => Err(error),
            }
        })?;
        ensure!(!attached, "{name} took the image over without the last writes");
        let socket = trial.cluster.socket(*node);
        ensure!(trial.clients.visitor(&socket).is_err(), "{name} serves what it has");
    }
    trial.cluster.crash_and_restart_node(last)?;
    trial.cluster.wait_ready()?;
    attach(trial, last)?;
    trial.clients.verify(WITHIN)
}

fn power_is_cut(trial: &mut Trial, all: &[usize]) -> Result<()> {
    for node in all {
        trial.cluster.node(*node).signal(libc::SIGSTOP)?;
    }
    for node in all {
        trial.cluster.node(*node).kill()?;
        trial.disks[*node].cut_power()?;
    }
    std::thread::sleep(NOTED);
    Ok(())
}

fn power_is_back(trial: &mut Trial, all: &[usize]) -> Result<()> {
    for node in all {
        trial.disks[*node].power_on()?;
        trial.cluster.crash_and_restart_node(*node)?;
    }
    trial.cluster.wait_ready()
}

/// Every write that a flush covered is there, on whichever node it opens.
fn power_of_all_is_cut(trial: &mut Trial) -> Result<()> {
    trial.clients.be_careless(true);
    trial.clients.go_on(GOES_ON, WITHIN)?;
    power_is_cut(trial, &[0, 1, 2])?;
    trial.clients.power_was_cut();
    trial.clients.be_careless(false);
    power_is_back(trial, &[0, 1, 2])?;
    let next = (trial.owner + 1) % 3;
    attach(trial, next)?;
    trial.clients.verify(WITHIN)?;
    let lost = trial.clients.lost_to_the_cut();
    eprintln!("{lost} slots of 4 KiB show what was flushed, and not what was written behind that");
    Ok(())
}

/// A member that lost its power has missed nothing when it is in sync again: it then is the only one left.
fn power_of_a_member_is_cut(trial: &mut Trial) -> Result<()> {
    let member = trial.member()?;
    power_is_cut(trial, &[member])?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    power_is_back(trial, &[member])?;
    trial.in_sync(3)?;
    for node in Trial::others(member) {
        trial.cluster.node(node).kill()?;
    }
    trial.take_over(member)?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.clients.verify(WITHIN)?;
    for node in Trial::others(member) {
        trial.cluster.crash_and_restart_node(node)?;
    }
    Ok(())
}

const ALL: &[Fault] = &[
    // First, while much of the image was never written: what is written to there is lost most easily.
    ("the power of all nodes is cut", power_of_all_is_cut),
    ("all but one die, then that one", all_but_one_then_that_one),
    ("the power of a member is cut", power_of_a_member_is_cut),
];

#[test]
fn what_was_promised_is_there_or_the_image_stays_closed() -> Result<()> {
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    trial.suffer(ALL)?;
    trial.end()
}
