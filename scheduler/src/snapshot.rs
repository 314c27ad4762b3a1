//! Snapshots of the state, so that a start does not fold the log from its beginning, and so that old heat can be
//! thinned.
//!
//! A snapshot is a shortcut and never a witness: it is used only if the log itself, at positions that its chain covers,
//! holds the same chain value where it was taken and a recorded digest that its state has. Anything else about it
//! (damage, another log, another build's state) makes it no snapshot, and the start goes on from an older one or from
//! nothing.
//!
//! File: magic `HRTSNAP1`, blake3 of all that follows, position of the recorded digest as u64 big-endian, then the
//! rest in MessagePack with field names.

use std::collections::BTreeSet;
use std::time::Duration;

use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{Event, Incarnation, SchedulerId, Seq, WallMs};
use scheduler_core::State;
use serde::{Deserialize, Serialize};

use crate::log::{EventLog, Head, LogError};

const MAGIC: &[u8; 8] = b"HRTSNAP1";

/// Snapshots kept however old they are: the newest, and one before it in case that one is damaged.
const NEWEST_KEPT: usize = 2;

/// Snapshots kept over the time for which heat is kept: heat goes in steps of this share of it.
const STEPS: u32 = 4;

/// What is kept beside the state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Taken {
    /// The scheduler that took it.
    pub by: SchedulerId,
    /// Its last own event before it: process start and position.
    pub own_last: Option<(Incarnation, Seq)>,
    /// Where the log was.
    pub at: Seq,
    /// The chain value there.
    #[serde(with = "serde_bytes")]
    pub chain: Hash,
    #[serde(with = "serde_bytes")]
    state: Vec<u8>,
}

/// A snapshot that the log vouches for.
#[derive(Debug)]
pub struct Snapshot {
    /// What is kept beside the state.
    pub taken: Taken,
    /// The state.
    pub state: State,
}

impl Snapshot {
    /// Where it was taken.
    pub fn head(&self) -> Head {
        Head {
            seq: self.taken.at,
            chain: self.taken.chain,
        }
    }
}

impl Taken {
    /// Takes a snapshot of the state after the last message of `head`. Costs a pass over everything, some 60 bytes per
    /// tracked block.
    pub fn of(state: &State, head: &Head, by: SchedulerId, own_last: Option<(Incarnation, Seq)>) -> Self {
        Self {
            by,
            own_last,
            at: head.seq,
            chain: head.chain,
            state: state.encode(),
        }
    }

    /// The bytes to keep, once the digest of this state stands in the log at `recorded`.
    ///
    /// # Panics
    /// Never: it always encodes.
    pub fn seal(&self, recorded: Seq) -> Vec<u8> {
        let mut covered = recorded.0.to_be_bytes().to_vec();
        covered.extend(rmp_serde::to_vec_named(self).expect("a snapshot always encodes"));
        [MAGIC.as_slice(), &chain::part(&covered), &covered].concat()
    }
}

/// Opens a snapshot, if the log vouches for it.
///
/// # Errors
/// A failure of the log; the inner one says why it is not to be used.
pub fn open(log: &dyn EventLog, at: Seq) -> Result<Result<Snapshot, String>, LogError> {
    let Some(bytes) = log.snapshot(at)? else {
        return Ok(Err("it is gone".into()));
    };
    let (recorded, taken) = match read(&bytes) {
        Ok(read) => read,
        Err(why) => return Ok(Err(why)),
    };
    if taken.at != at || recorded <= at {
        return Ok(Err("it was taken elsewhere than its name says".into()));
    }
    match log.get(at)? {
        Some(record) if record.chain == taken.chain => {}
        _ => return Ok(Err("the log's chain has another value where it was taken".into())),
    }
    let event = log.get(recorded)?.and_then(|record| record.event());
    let Some((_, Event::DigestRecorded { at: of, state, .. })) = event else {
        return Ok(Err("the log has no digest of it".into()));
    };
    let decoded = match State::decode(&taken.state) {
        Ok(decoded) => decoded,
        Err(why) => return Ok(Err(format!("its state cannot be read: {why}"))),
    };
    if of != at || decoded.seq() != at || decoded.digest() != state {
        return Ok(Err("its state has another digest than the log recorded".into()));
    }
    Ok(Ok(Snapshot { taken, state: decoded }))
}

fn read(bytes: &[u8]) -> Result<(Seq, Taken), String> {
    let rest = bytes
        .strip_prefix(MAGIC)
        .ok_or("it is no snapshot of a kind that this build knows")?;
    let (hash, covered) = rest.split_first_chunk::<32>().ok_or("it is cut short")?;
    if chain::part(covered) != *hash {
        return Err("its bytes are damaged".into());
    }
    let (recorded, body) = covered.split_first_chunk::<8>().ok_or("it is cut short")?;
    let taken = rmp_serde::from_slice(body).map_err(|error| format!("it cannot be read: {error}"))?;
    Ok((Seq(u64::from_be_bytes(*recorded)), taken))
}

/// The newest snapshot that the log vouches for. Those it does not are named in the scheduler's own log.
///
/// # Errors
/// A failure of the log.
pub fn newest(log: &dyn EventLog) -> Result<Option<Snapshot>, LogError> {
    first_usable(log, log.snapshots()?.into_iter().rev())
}

/// The oldest snapshot at or behind a position that the log vouches for: where re-derivation goes on behind what was
/// thinned.
///
/// # Errors
/// A failure of the log.
pub fn oldest_from(log: &dyn EventLog, from: Seq) -> Result<Option<Snapshot>, LogError> {
    first_usable(log, log.snapshots()?.into_iter().filter(|at| *at >= from))
}

fn first_usable(log: &dyn EventLog, candidates: impl Iterator<Item = Seq>) -> Result<Option<Snapshot>, LogError> {
    for at in candidates {
        match open(log, at)? {
            Ok(snapshot) => return Ok(Some(snapshot)),
            Err(why) => tracing::warn!(%at, "a snapshot is not used: {why}"),
        }
    }
    Ok(None)
}

/// How long heat is kept, and what that means for snapshots.
#[derive(Debug, Clone, Copy, Default)]
pub struct Retention {
    /// For how long; `None` for ever.
    pub heat: Option<Duration>,
}

impl Retention {
    /// Given the snapshots with their times, ascending: through which position heat goes now, and which snapshots may
    /// go. Heat goes only up to a snapshot that stays, as the base of everything derived behind it.
    pub fn plan(&self, snapshots: &[(Seq, WallMs)], thinned: Seq, now: WallMs) -> (Seq, Vec<Seq>) {
        let heat_ms = self
            .heat
            .map(|heat| u64::try_from(heat.as_millis()).unwrap_or(u64::MAX));
        let old = |time: WallMs| heat_ms.is_some_and(|ms| time.0.saturating_add(ms) <= now.0);
        let through = snapshots
            .iter()
            .filter(|(_, time)| old(*time))
            .map(|(at, _)| *at)
            .next_back()
            .unwrap_or(Seq(0))
            .max(thinned);
        let mut keep: BTreeSet<Seq> = snapshots.iter().rev().take(NEWEST_KEPT).map(|(at, _)| *at).collect();
        if through > Seq(0) {
            keep.extend(snapshots.iter().map(|(at, _)| *at).find(|at| *at >= through));
        }
        if let Some(heat_ms) = heat_ms {
            let mut last: Option<WallMs> = None;
            for (at, time) in snapshots.iter().filter(|(at, _)| *at >= through) {
                if last.is_none_or(|last| time.0.saturating_sub(last.0) >= heat_ms / u64::from(STEPS)) {
                    keep.insert(*at);
                    last = Some(*time);
                }
            }
        }
        let gone = snapshots
            .iter()
            .map(|(at, _)| *at)
            .filter(|at| !keep.contains(at))
            .collect();
        (through, gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(heat_s: Option<u64>, snapshots: &[u64], thinned: u64, now: u64) -> (u64, Vec<u64>) {
        let snapshots: Vec<_> = snapshots.iter().map(|s| (Seq(s * 10), WallMs(s * 1000))).collect();
        let retention = Retention {
            heat: heat_s.map(Duration::from_secs),
        };
        let (through, gone) = retention.plan(&snapshots, Seq(thinned), WallMs(now * 1000));
        (through.0, gone.iter().map(|seq| seq.0).collect())
    }

    #[test]
    fn heat_goes_up_to_a_snapshot_that_stays() {
        // Kept for ever: only the newest two snapshots are worth their room.
        assert_eq!(plan(None, &[1, 2, 3, 4], 0, 100), (0, vec![10, 20]));
        // Nothing is old enough; snapshots a fourth of the time apart stay.
        assert_eq!(plan(Some(100), &[10, 20, 30, 40, 50], 0, 60), (0, vec![200, 300]));
        // The newest one that is old enough is the base.
        assert_eq!(plan(Some(100), &[10, 40, 50, 60, 70], 0, 141), (400, vec![100, 500]));
        // Once thinned, the base stays until a later one takes its place.
        assert_eq!(plan(Some(100), &[40, 50, 60, 70], 400, 141), (400, vec![500]));
        assert_eq!(plan(None, &[40, 50, 60, 70], 400, 999), (400, vec![500]));
        assert_eq!(plan(Some(100), &[], 0, 999), (0, vec![]));
    }
}
