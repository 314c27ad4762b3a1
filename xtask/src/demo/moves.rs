//! The demo's second half: guests that migrate while they write, a replica that follows, and a node that dies.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::figures::Reads;
use crate::cluster::Cluster;
use crate::guest::{Accel, Guest, Phase, PhaseResult};
use crate::moving::MovingDisk;
use crate::step::{note, step};
use crate::wait;

/// How long a guest works before it moves, so that what is hot is in RAM where it is.
const WARM_SECONDS: f64 = 10.0;

/// How long a guest writes while it moves.
const MOVE_SECONDS: f64 = 4.0;

/// What is measured after a move.
const FIRST_SECONDS: f64 = 10.0;

/// Between two accesses of a guest's first seconds: one that computes, too, is not at work on its disk all the time, and
/// feels for longer that nothing is in RAM.
const FIRST_PAUSE_US: u64 = 10_000;

/// How long a guest works while its replica follows: it has to have been there for ten seconds.
const FOLLOW_SECONDS: f64 = 30.0;

/// Time in which a replica must have followed.
const FOLLOWS_WITHIN: Duration = Duration::from_secs(120);

/// How long a guest works while a node dies.
const DEATH_SECONDS: f64 = 15.0;

/// Part of the guest's data that it works on; less than the RAM tier of a node, so that a warm start can be told from a
/// cold one.
const SPAN_MIB: u64 = 12;

/// Time that a phase may take beyond its length.
const GRACE: Duration = Duration::from_secs(120);

/// Time in which an image whose last other copy died must have two again: the grace time is 30 s.
const WHOLE_WITHIN: Duration = Duration::from_secs(240);

/// What one move cost.
struct Move {
    hand_over_ms: f64,
    downtime_ms: u64,
    longest_write_ms: u64,
    /// Reads that brought what was last written.
    reads: u64,
    first: PhaseResult,
    /// Of the block reads of the first phase, as the log has them, those answered from RAM.
    first_hit_ratio: f64,
    prewarmed_bytes: u64,
}

/// Nodes of the cluster by what they do here.
struct Roles {
    destination: usize,
    /// Holds the other replica from the beginning.
    other: usize,
}

/// Runs it; the figures are for the last line.
///
/// # Errors
/// A step failed, or a guest saw an error or a wrong byte.
pub fn run(cluster: &mut Cluster, golden: &Path, accel: Accel) -> Result<Value> {
    let cold = step("migrate a guest to a node with cold RAM, while it writes", || {
        let (_, guest, moved) = migrated(cluster, "appl/moves-cold", golden, accel, false)?;
        guest.stop(GRACE)?;
        Ok(moved)
    })?;
    say(&cold);
    let warm = step("migrate a guest to a node with prewarmed RAM, while it writes", || {
        let (_, guest, moved) = migrated(cluster, "appl/moves-warm", golden, accel, true)?;
        guest.stop(GRACE)?;
        Ok(moved)
    })?;
    say(&warm);
    let (disk, mut guest, roles, followed) = step(
        "migrate a guest to a node without a copy of its disk; a replica follows while it writes",
        || followed(cluster, "appl/moves-follow", golden, accel),
    )?;
    note(format!(
        "a copy was in sync where the guest is {:.1} s after it came, and the one on the node that it left is dropped; its \
         longest access took {} ms",
        followed.after.as_secs_f64(),
        followed.work.longest_ms
    ));
    let other = Cluster::node_id(roles.other);
    let what = format!("kill -9 {other}, which holds the other replica, while the guest works");
    let (died, died_result) = step(&what, || {
        guest.start_phase(&phase("death", DEATH_SECONDS, 500))?;
        cluster.node(roles.other).kill()?;
        let died = Instant::now();
        Ok((died, finish(&mut guest, DEATH_SECONDS)?))
    })?;
    note(format!(
        "{} reads and {} writes, no error; the longest took {} ms",
        died_result.reads, died_result.writes, died_result.longest_ms
    ));
    let whole = step("wait until the image is whole again elsewhere", || {
        wait::until("two replicas in sync", WHOLE_WITHIN, || {
            Ok((disk.members()?.len() == 2).then_some(()))
        })?;
        Ok(died.elapsed())
    })?;
    let members = disk.members()?;
    note(format!(
        "whole on {} after {:.1} s",
        members.join(" and "),
        whole.as_secs_f64()
    ));
    step("start the dead node again, and shut the guest down", || {
        cluster.crash_and_restart_node(roles.other)?;
        cluster.wait_ready()?;
        guest.stop(GRACE)
    })?;
    Ok(json!({
        "hand_over_ms": [cold.hand_over_ms, warm.hand_over_ms],
        "guest_downtime_ms": [cold.downtime_ms, warm.downtime_ms],
        "longest_write_ms_while_moving": [cold.longest_write_ms, warm.longest_write_ms],
        "first_10s_read_p99_us_cold": cold.first.read_p99_us,
        "first_10s_read_p99_us_prewarmed": warm.first.read_p99_us,
        "first_10s_read_p50_us_cold": cold.first.read_p50_us,
        "first_10s_read_p50_us_prewarmed": warm.first.read_p50_us,
        "first_10s_hit_ratio_cold": (cold.first_hit_ratio * 1e3).round() / 1e3,
        "first_10s_hit_ratio_prewarmed": (warm.first_hit_ratio * 1e3).round() / 1e3,
        "prewarmed_bytes": warm.prewarmed_bytes,
        "replica_followed_s": (followed.after.as_secs_f64() * 1e3).round() / 1e3,
        "longest_access_ms_while_a_replica_followed": followed.work.longest_ms,
        "reads_verified": cold.reads + warm.reads + followed.work.reads + died_result.reads,
        "killed": other,
        "longest_access_ms_while_a_replica_died": died_result.longest_ms,
        "whole_again_s": (whole.as_secs_f64() * 1e3).round() / 1e3,
        "whole_again_on": members,
    }))
}

fn say(moved: &Move) {
    note(format!(
        "disk handed over in {:.0} ms, guest stood still {} ms, first {FIRST_SECONDS} s of reads: p50 {} us, p99 {} us, {:.1} \
         % from RAM",
        moved.hand_over_ms,
        moved.downtime_ms,
        moved.first.read_p50_us,
        moved.first.read_p99_us,
        moved.first_hit_ratio * 100.0
    ));
}

/// A replica that followed its guest.
struct Followed {
    /// From the guest's start on its new node until the set was the new one.
    after: Duration,
    /// Of the guest meanwhile.
    work: PhaseResult,
}

/// A guest that booted on the first node and migrated to the one that has no copy, and works there until one has followed.
fn followed(
    cluster: &Cluster,
    image: &str,
    golden: &Path,
    accel: Accel,
) -> Result<(MovingDisk, Guest, Roles, Followed)> {
    let disk = MovingDisk::create(cluster, image, golden, accel)?;
    let roles = roles(&disk, cluster.node_count())?;
    let (from, to) = (Cluster::node_id(0), Cluster::node_id(roles.destination));
    // Where the guest goes is in the rack that it comes from: so it is the copy there that it does not need any more.
    for (node, rack) in [
        (&from, "rack-1"),
        (&to, "rack-1"),
        (&Cluster::node_id(roles.other), "rack-2"),
    ] {
        cluster.hearth().text(&["node", "set", node, "--fault-domain", rack])?;
    }
    let source = disk.boot()?;
    let mut guest = disk.await_at(roles.destination)?;
    disk.migrate(0, roles.destination, &disk.channel(), false)?;
    drop(source);
    let came = Instant::now();
    guest.start_phase(&phase("follow", FOLLOW_SECONDS, 500))?;
    let expected = BTreeSet::from([to, Cluster::node_id(roles.other)]);
    wait::until("a replica to follow its guest", FOLLOWS_WITHIN, || {
        let members: BTreeSet<String> = disk.members()?.into_iter().collect();
        Ok((members == expected).then_some(()))
    })?;
    let after = came.elapsed();
    let work = finish(&mut guest, FOLLOW_SECONDS)?;
    Ok((disk, guest, roles, Followed { after, work }))
}

/// A guest that booted on the first node and migrated to one that has a replica since just before.
fn migrated(
    cluster: &Cluster,
    image: &str,
    golden: &Path,
    accel: Accel,
    prewarm: bool,
) -> Result<(MovingDisk, Guest, Move)> {
    let disk = MovingDisk::create(cluster, image, golden, accel)?;
    let to = roles(&disk, cluster.node_count())?.destination;
    let mut source = disk.boot()?;
    // The replica goes first, the guest follows: with three nodes the destination is the one that has none.
    let node = Cluster::node_id(to);
    cluster.hearth().text(&["location", "add", image, &node])?;
    source.start_phase(&phase("warm", WARM_SECONDS, 100))?;
    let warm = finish(&mut source, WARM_SECONDS)?;
    let mut destination = disk.await_at(to)?;
    // Writes only: they bring nothing into RAM.
    source.start_phase(&phase("moving", MOVE_SECONDS, 1000))?;
    let said = disk.migrate(0, to, &disk.channel(), prewarm)?;
    let moving = finish(&mut destination, MOVE_SECONDS)?;
    drop(source);
    let from = super::position(cluster.hearth())?;
    destination.start_phase(&Phase {
        pause_us: FIRST_PAUSE_US,
        ..phase("first", FIRST_SECONDS, 100)
    })?;
    let first = finish(&mut destination, FIRST_SECONDS)?;
    let to = super::position(cluster.hearth())?;
    let heat = super::heat(cluster.hearth(), from, to)?;
    let first_hit_ratio = Reads::of(&heat, &BTreeSet::from([disk.id.clone()])).hit_ratio()?;
    let number = |key: &str| said[key].as_f64().with_context(|| format!("{said} lacks {key}"));
    let moved = Move {
        hand_over_ms: number("hand_over_ms")?,
        downtime_ms: number("downtime_ms")? as u64,
        longest_write_ms: moving.longest_ms,
        prewarmed_bytes: number("prewarmed_bytes")? as u64,
        reads: warm.reads + first.reads,
        first,
        first_hit_ratio,
    };
    Ok((disk, destination, moved))
}

/// Which node beside the first has a replica that it does not serve, and which other there is.
fn roles(disk: &MovingDisk, nodes: usize) -> Result<Roles> {
    let members = disk.members()?;
    let holds = |index: usize| members.contains(&Cluster::node_id(index));
    let serves = |index: usize| disk.is_attached(index).unwrap_or(false);
    let other = (1..nodes).find(|index| holds(*index) && !serves(*index));
    let other = other.with_context(|| format!("only {members:?} hold {}", disk.image))?;
    let destination = (1..nodes).find(|index| *index != other);
    Ok(Roles {
        destination: destination.context("a demo of moves needs three nodes")?,
        other,
    })
}

fn phase(name: &str, seconds: f64, write_permille: u64) -> Phase {
    Phase {
        name: name.into(),
        seconds,
        write_permille,
        span_mib: SPAN_MIB,
        ..Phase::default()
    }
}

/// The end of a phase, without an error or a wrong byte.
fn finish(guest: &mut Guest, seconds: f64) -> Result<PhaseResult> {
    let result = guest.finish_phase(Duration::from_secs_f64(seconds) + GRACE)?;
    ensure!(
        (result.errors, result.corrupt) == (0, 0),
        "in phase {} the guest saw {}",
        result.name,
        result.first_failure
    );
    Ok(result)
}
