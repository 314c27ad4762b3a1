//! Snapshots and thinned heat: a start from a snapshot is the start from nothing, only sooner; a snapshot that the log
//! does not vouch for is none; a thinned log still verifies, and says what can no longer be derived.

mod session;

use hearth_bus::testing::copy_dir;
use hearth_protocol::chain::{self, Hash};
use hearth_protocol::{Event, Seq};
use hearth_scheduler::log::{Entry, EventLog, LogError, MemoryLog, RocksLog};
use hearth_scheduler::replica::Replica;
use hearth_scheduler::verify::verify_log;
use session::session;

/// Two snapshots are due in it, and some seconds follow the second.
const SECONDS: u64 = 130;

/// Appends and folds a session and keeps the snapshots that were due.
fn keep(mut log: Box<dyn EventLog>) -> (Box<dyn EventLog>, Vec<Entry>, Vec<Seq>) {
    let entries = session(SECONDS);
    let mut replica = Replica::new("s1".parse().unwrap());
    log.append(&entries).unwrap();
    for entry in &entries {
        if let Some((at, bytes)) = replica.take(entry).snapshot {
            log.put_snapshot(at, &bytes).unwrap();
        }
    }
    let snapshots = log.snapshots().unwrap();
    assert_eq!(snapshots.len(), 2);
    (log, entries, snapshots)
}

fn on_both(body: fn(Box<dyn EventLog>)) {
    let dir = tempfile::tempdir().unwrap();
    body(Box::new(RocksLog::open(dir.path()).unwrap()));
    body(Box::<MemoryLog>::default());
}

fn summary(replica: &Replica) -> (Seq, Hash, Seq, Hash, Hash, Option<(hearth_protocol::Incarnation, Seq)>) {
    assert_eq!(replica.diverged(), None);
    let state = replica.state();
    (
        replica.position(),
        replica.chain(),
        replica.last_lead(),
        state.digest(),
        state.decisions_digest(),
        replica.previous(),
    )
}

fn opened(log: &dyn EventLog) -> Replica {
    Replica::open("s1".parse().unwrap(), log).unwrap()
}

fn starts_from_the_newest_sound_snapshot(log: Box<dyn EventLog>) {
    let (mut log, _, snapshots) = keep(log);
    let from_nothing = summary(&Replica::replay("s1".parse().unwrap(), log.as_ref()).unwrap());
    let check = |log: &dyn EventLog, what: &str| assert_eq!(summary(&opened(log)), from_nothing, "{what}");
    check(log.as_ref(), "from the newest snapshot");
    // A flipped bit anywhere, a cut, and what is no snapshot at all: an older one, then nothing.
    let good = log.snapshot(snapshots[1]).unwrap().unwrap();
    let usable = |log: &dyn EventLog| hearth_scheduler::snapshot::open(log, snapshots[1]).unwrap();
    assert!(usable(log.as_ref()).is_ok());
    for byte in (0..good.len()).step_by(good.len() / 40) {
        let mut bad = good.clone();
        bad[byte] ^= 4;
        log.put_snapshot(snapshots[1], &bad).unwrap();
        assert!(usable(log.as_ref()).is_err(), "byte {byte}");
    }
    check(log.as_ref(), "from the older snapshot");
    log.put_snapshot(snapshots[1], &good[..good.len() / 2]).unwrap();
    assert!(usable(log.as_ref()).is_err());
    // Bytes that are sound in themselves, of another place.
    let other = log.snapshot(snapshots[0]).unwrap().unwrap();
    log.put_snapshot(snapshots[1], &other).unwrap();
    assert!(usable(log.as_ref()).is_err());
    log.put_snapshot(snapshots[0], b"nothing").unwrap();
    check(log.as_ref(), "from nothing");
    log.drop_snapshot(snapshots[0]).unwrap();
    log.drop_snapshot(snapshots[1]).unwrap();
    check(log.as_ref(), "without any");
}

#[test]
fn a_start_from_a_snapshot_is_the_start_from_nothing() {
    on_both(starts_from_the_newest_sound_snapshot);
}

/// A state that is not the log's, sealed with a right hash: only the recorded digest can tell.
#[test]
fn a_forged_snapshot_is_not_used() {
    let (mut log, entries, snapshots) = keep(Box::<MemoryLog>::default());
    let at = snapshots[1];
    let mut state = scheduler_core::State::default();
    let mut head = hearth_scheduler::log::Head::default();
    for entry in &entries[..at.0 as usize] {
        let (envelope, event) = entry.event.as_ref().unwrap();
        // One heat event is left out of the state.
        if entry.seq.0 != 20 || !matches!(event, Event::HeatFolded(_)) {
            state.apply(entry.seq, envelope, event);
        }
        head = entry.after(&head);
    }
    assert!(
        matches!(&entries[19].event, Some((_, Event::HeatFolded(_)))),
        "{:?}",
        entries[19].event
    );
    let is_record = |e: &&Entry| matches!(&e.event, Some((_, Event::DigestRecorded { at: of, .. })) if *of == at);
    let recorded = entries.iter().find(is_record).unwrap().seq;
    let forged = hearth_scheduler::snapshot::Taken::of(&state, &head, "s1".parse().unwrap(), None).seal(recorded);
    log.put_snapshot(at, &forged).unwrap();
    let why = hearth_scheduler::snapshot::open(log.as_ref(), at).unwrap().unwrap_err();
    assert!(why.contains("another digest"), "{why}");
}

fn thins(log: Box<dyn EventLog>) {
    let (mut log, entries, snapshots) = keep(log);
    let (before, digest) = (log.head(), summary(&opened(log.as_ref())));
    // A piece at a time; what is no heat stays as it is.
    let base = snapshots[0];
    let is_heat = |entry: &&Entry| matches!(&entry.event, Some((_, Event::HeatFolded(_))));
    let heat = entries.iter().filter(|e| e.seq <= base).filter(is_heat).count();
    let mut gone = 0;
    loop {
        let thinned = log.thin(base, 50).unwrap();
        gone += thinned;
        if thinned < 50 {
            break;
        }
    }
    assert_eq!((gone, log.thinned().unwrap()), (heat, base));
    assert_eq!(log.thin(base, 50).unwrap(), 0);
    for (entry, record) in entries.iter().zip(log.range(Seq(1), entries.len()).unwrap()) {
        let thinned = entry.seq <= base && is_heat(&entry);
        assert_eq!(record.thinned.is_some(), thinned, "{}", entry.seq);
        assert_eq!(record.event().is_none(), thinned);
        assert_eq!(record.subject(), entry.subject);
    }
    // The chain is the same; what rests on the gap is counted, what stands behind it is derived.
    assert_eq!(log.head(), before);
    assert_eq!(log.verify().unwrap().bad, None);
    let verified = verify_log(log.as_ref(), std::slice::from_ref(&before)).unwrap();
    assert!(verified.verified, "{verified:#?}");
    let left = verified.not_derivable.unwrap();
    let first = entries.iter().find(is_heat).unwrap().seq;
    let in_gap = |e: &&Entry| e.seq >= first && e.seq <= base;
    let count = |kind: &str| {
        let of_kind = |e: &&Entry| e.event.as_ref().is_some_and(|(_, event)| event.kind() == kind);
        let inside = entries.iter().filter(in_gap).filter(of_kind).count() as u64;
        (inside, entries.iter().filter(of_kind).count() as u64 - inside)
    };
    assert_eq!(left.positions, (first, base));
    assert!(left.times.1.is_some());
    assert_eq!(
        (left.heat, left.commands, left.digests),
        (heat as u64, count("command_given").0, count("digest_recorded").0)
    );
    assert_eq!(verified.replay.commands_same, count("command_given").1);
    assert_eq!(verified.replay.digests_same, count("digest_recorded").1);
    assert!(left.commands > 10 && verified.replay.commands_same > 10);
    // It starts from the snapshot behind the gap; from nothing it cannot.
    assert_eq!(summary(&opened(log.as_ref())), digest);
    match Replica::replay("s1".parse().unwrap(), log.as_ref()) {
        Err(LogError::Damaged { seq, why, .. }) => assert!(seq == first && why.contains("was thinned"), "{why}"),
        other => panic!("{other:?}"),
    }
    // Without a sound snapshot nothing behind the gap can be derived, and that is a finding.
    for at in snapshots {
        log.put_snapshot(at, b"damaged").unwrap();
    }
    let verified = verify_log(log.as_ref(), &[]).unwrap();
    assert!(!verified.verified);
    assert!(
        verified.findings[0].what.contains("no sound snapshot"),
        "{:?}",
        verified.findings
    );
}

#[test]
fn a_thinned_log_verifies_and_says_what_cannot_be_derived() {
    on_both(thins);
}

#[test]
fn only_heat_may_be_thinned_and_only_before_a_snapshot() {
    let (_, entries, snapshots) = keep(Box::<MemoryLog>::default());
    let thin_behind_the_logs_back = |of: &dyn Fn(&Entry) -> bool| {
        let mut log = MemoryLog::default();
        drop(keep(Box::new(log.clone())));
        let entry = entries.iter().find(|e| of(e)).unwrap();
        log.damage(entry.seq, |value| {
            let envelope = &value[..5 + entry.message.envelope.len()];
            let (payload, kept) = value[envelope.len()..].split_at(value.len() - envelope.len() - 32);
            Some([&[2], &envelope[1..], &chain::part(payload), kept].concat())
        });
        assert_eq!(log.verify().unwrap().bad, None, "its chain is intact");
        log.bind("x").unwrap();
        let verified = verify_log(&log, &[]).unwrap();
        assert!(!verified.verified);
        assert_eq!(verified.findings[0].seq, entry.seq);
        verified.findings[0].what.clone()
    };
    let command = thin_behind_the_logs_back(&|e| matches!(&e.event, Some((_, Event::CommandGiven(_)))));
    assert!(command.contains("is no heat"), "{command}");
    let late =
        thin_behind_the_logs_back(&|e| e.seq > snapshots[1] && matches!(&e.event, Some((_, Event::HeatFolded(_)))));
    assert!(late.contains("no sound snapshot"), "{late}");
}

#[test]
fn a_thinned_log_reopens_from_a_copy_of_its_files() {
    let (dir, copied) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mut log, _, snapshots) = keep(Box::new(RocksLog::open(dir.path()).unwrap()));
    log.thin(snapshots[0], usize::MAX).unwrap();
    copy_dir(dir.path(), copied.path());
    let again = RocksLog::open(copied.path()).unwrap();
    assert_eq!(again.thinned().unwrap(), snapshots[0]);
    assert!(verify_log(&again, &[]).unwrap().verified);
    let reader = RocksLog::open_reader(dir.path()).unwrap();
    assert!(verify_log(&reader, &[log.head()]).unwrap().verified);
}
