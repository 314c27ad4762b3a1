//! Disks that are full: a full copy beside another one leaves the set and comes back when there is room; the last copy
//! refuses writes as a full disk does, serves reads, stays attached, and goes on when there is room.

use anyhow::{Result, ensure};
use hearth_tests::faults::{LEFT_BYTES, ROOM, is_said_to_be_full};
use hearth_tests::nbd::ENOSPC;
use hearth_tests::trial::{Fault, GOES_ON, Trial, TrialSpec, WITHIN};
use xtask::wait;

/// Larger than what the clients write before a disk is full.
const SPEC: TrialSpec = TrialSpec {
    replicas: 2,
    image_bytes: 128 << 20,
    disk_bytes: Some(256 << 20),
};
/// Waits until writes are refused, and sees that reads are answered.
fn refuses_writes(trial: &Trial) -> Result<()> {
    let refused = || trial.clients.seen().refused;
    wait::until("writes to be refused", WITHIN, || {
        Ok(refused().contains_key(&ENOSPC).then_some(()))
    })?;
    let before = trial.clients.seen();
    wait::until("reads to go on", WITHIN, || {
        Ok((trial.clients.seen().reads > before.reads + GOES_ON).then_some(()))
    })?;
    trial.clients.check()?;
    ensure!(
        refused().keys().all(|error| *error == ENOSPC),
        "other errors: {:?}",
        refused()
    );
    let shown = trial.show(trial.owner)?;
    ensure!(!shown["attached"].is_null(), "it is not attached any more: {shown}");
    Ok(())
}

fn last_copy_is_full(trial: &mut Trial) -> Result<()> {
    let member = trial.member()?;
    trial.cluster.node(member).kill()?;
    trial.is_member(member, false)?;
    trial.disks[trial.owner].fill(LEFT_BYTES)?;
    refuses_writes(trial)?;
    is_said_to_be_full(trial, trial.owner)?;
    trial.disks[trial.owner].make_room()?;
    trial.clients.go_on(GOES_ON, WITHIN)?;
    trial.cluster.crash_and_restart_node(member)
}

/// Nothing is asked of the image but that it goes on when there is room, without other errors than that.
fn all_copies_are_full(trial: &mut Trial) -> Result<()> {
    let both = [trial.owner, trial.member()?];
    for node in both {
        trial.disks[node].fill(LEFT_BYTES)?;
    }
    refuses_writes(trial)?;
    for node in both {
        trial.disks[node].make_room()?;
    }
    trial.clients.go_on(GOES_ON, WITHIN).map(drop)
}

fn try_one(fault: Fault) -> Result<()> {
    let Some(mut trial) = Trial::start(SPEC)? else {
        return Ok(());
    };
    trial.suffer(&[fault])?;
    trial.end()
}

#[test]
fn a_full_member_leaves_the_set_and_comes_back() -> Result<()> {
    try_one(ROOM[0])
}

#[test]
fn an_owner_whose_disk_is_full_serves_the_image_from_the_others() -> Result<()> {
    try_one(ROOM[1])
}

#[test]
fn the_last_copy_refuses_writes_while_its_disk_is_full() -> Result<()> {
    try_one(("the disk of the last copy is full", last_copy_is_full))
}

#[test]
fn all_copies_may_be_full_at_once() -> Result<()> {
    try_one(("all disks are full", all_copies_are_full))
}
