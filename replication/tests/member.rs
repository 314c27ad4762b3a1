//! One member: what it admits, and its fence.
#![allow(missing_docs, reason = "a test program")]

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::record::{Record, Run};
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use hearth_replication::member::{Durable, Input, Marks, Member, Output};
use hearth_replication::mutants::Rules;
use hearth_replication::request::{Answer, Extent, Nodes, Refusal, Request, RequestId, Stamp, Work};
use hearth_replication::time::BootMs;

const STORE: Incarnation = Incarnation(7);

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn stamp(epoch: u64, lease: u128, set_version: u64) -> Stamp {
    Stamp {
        epoch: Epoch(epoch),
        lease: LeaseId(lease),
        set_version: SetVersion(set_version),
    }
}

/// b is a member of blocks 0 to 7, a joiner of the rest.
fn record(at: Stamp) -> Arc<Record> {
    let run = |first, members: &[&str], joiners: &[&str]| Run {
        first: BlockIndex(first),
        members: members.iter().copied().map(node).collect::<Nodes>(),
        joiners: joiners.iter().copied().map(node).collect(),
    };
    let runs = vec![run(0, &["a", "b"], &[]), run(8, &["a"], &["b"]), run(16, &["a"], &[])];
    Arc::new(Record::new(at, runs).unwrap())
}

fn member() -> Member {
    let durable = Durable {
        record: Some(record(stamp(2, 20, 5))),
        sealed: None,
    };
    Member::new(node("b"), Rules::default(), STORE, durable, Marks::new(), false)
}

fn write(block: u64) -> Work {
    Work::Write {
        extent: Extent::block(BlockIndex(block)),
        fua: false,
    }
}

fn read(block: u64) -> Work {
    Work::Read(Extent::block(BlockIndex(block)))
}

fn request(id: u64, stamp: Stamp, work: Work) -> Input {
    Input::Request {
        from: node("a"),
        request: Request {
            id: RequestId(id),
            stamp,
            store: STORE,
            work,
        },
    }
}

fn finished(id: u64, ok: bool) -> Input {
    let from = node("a");
    let id = RequestId(id);
    Input::Finished { from, id, ok }
}

fn raise(to: Stamp, over: Stamp) -> Input {
    Input::Raise {
        from: node("c"),
        record: record(to),
        over,
    }
}

/// The answer in a list of outputs.
fn answer(out: &[Output]) -> Option<&Answer> {
    out.iter().find_map(|output| match output {
        Output::Answer { answer, .. } => Some(answer),
        _ => None,
    })
}

fn performs(out: &[Output]) -> bool {
    out.iter().any(|output| matches!(output, Output::Perform { .. }))
}

const NOW: (u64, u128, u64) = (2, 20, 5);

fn now() -> Stamp {
    stamp(NOW.0, NOW.1, NOW.2)
}

#[test]
fn each_request_is_admitted_under_the_record_or_refused_with_a_reason() {
    let check = |at: Stamp, work: Work, expect: Option<Refusal>| {
        let out = member().step(request(1, at, work));
        match expect {
            None => assert!(performs(&out), "{out:?}"),
            Some(refusal) => {
                let text = refusal.to_string();
                assert!(text.contains(':'), "{text:?} does not say what to do");
                assert_eq!(answer(&out), Some(&Answer::Refused(refusal)));
                assert!(!performs(&out));
            }
        }
    };
    check(now(), write(0), None);
    check(now(), write(9), None);
    check(now(), read(7), None);
    check(now(), Work::Flush { keep: BTreeSet::new() }, None);
    check(now(), read(8), Some(Refusal::NotInSet));
    check(now(), write(16), Some(Refusal::NotInSet));
    let ended = Refusal::EpochEnded {
        asked: Epoch(1),
        recorded: Epoch(2),
    };
    check(stamp(1, 20, 9), write(0), Some(ended));
    check(stamp(2, 21, 5), write(0), Some(Refusal::OtherLease { epoch: Epoch(2) }));
    let changed = Refusal::SetChanged {
        asked: SetVersion(4),
        recorded: SetVersion(5),
    };
    check(stamp(2, 20, 4), read(0), Some(changed));
    for (epoch, lease, set_version) in [(2, 20, 6), (3, 30, 6)] {
        let behind = Refusal::NotInstalled {
            epoch: Epoch(epoch),
            set_version: SetVersion(set_version),
        };
        check(stamp(epoch, lease, set_version), write(0), Some(behind));
    }
}

#[test]
fn a_store_of_another_life_a_failed_disk_and_a_missing_record_refuse() {
    let durable = Durable {
        record: Some(record(now())),
        sealed: None,
    };
    let check = |mut member: Member, expect: Refusal| {
        let out = member.step(request(1, now(), write(0)));
        assert_eq!(answer(&out), Some(&Answer::Refused(expect)));
    };
    let me = || node("b");
    let with = |store, durable, failed| Member::new(me(), Rules::default(), store, durable, Marks::new(), failed);
    check(with(Incarnation(8), durable.clone(), false), Refusal::StoreChanged);
    check(with(STORE, durable.clone(), true), Refusal::DiskFailed);
    check(with(STORE, Durable::default(), false), Refusal::NoRecord);
    let sealed = Durable {
        sealed: Some((Epoch(2), LeaseId(20))),
        ..durable
    };
    check(with(STORE, sealed, false), Refusal::Sealed { epoch: Epoch(2) });
}

#[test]
fn the_fence_waits_for_what_was_admitted_and_answers_when_durable() {
    let mut member = member();
    member.step(request(1, now(), write(0)));
    member.step(request(2, now(), write(1)));
    let out = member.step(raise(stamp(3, 30, 6), now()));
    assert_eq!(out, [Output::Fenced(Epoch(3))]);
    let fenced = Refusal::Fenced {
        epoch: Epoch(3),
        set_version: SetVersion(6),
    };
    let out = member.step(request(3, now(), write(2)));
    assert_eq!(answer(&out), Some(&Answer::Refused(fenced)));
    assert!(
        !member
            .step(finished(1, true))
            .iter()
            .any(|out| matches!(out, Output::Persist(_)))
    );
    let out = member.step(finished(2, true));
    assert!(out.iter().any(|out| matches!(out, Output::Persist(_))));
    assert_eq!(
        member.record().unwrap().stamp(),
        now(),
        "it counts before it is durable"
    );
    let out = member.step(Input::Persisted { ok: true });
    let [Output::Raised { to, standing }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*to, node("c"));
    assert_eq!(standing.doubt, BTreeSet::from([BlockIndex(0), BlockIndex(1)]));
    assert_eq!(member.record().unwrap().stamp(), stamp(3, 30, 6));
    // Asked again, it answers again.
    assert!(matches!(
        member.step(raise(stamp(3, 30, 6), now()))[..],
        [Output::Raised { .. }]
    ));
}

#[test]
fn records_that_are_not_newer_or_not_of_this_log_are_not_recorded() {
    let check = |to: Stamp, over: Stamp, expect: Refusal| {
        let out = member().step(raise(to, over));
        let [Output::NotRaised { refusal, .. }] = &out[..] else {
            panic!("{out:?}")
        };
        assert_eq!(*refusal, expect);
    };
    let ended = Refusal::EpochEnded {
        asked: Epoch(1),
        recorded: Epoch(2),
    };
    check(stamp(1, 10, 9), stamp(0, 1, 8), ended);
    check(stamp(2, 21, 6), stamp(1, 1, 5), Refusal::OtherLease { epoch: Epoch(2) });
    let older = Refusal::GrantedOverOlder { epoch: Epoch(3) };
    check(stamp(3, 30, 5), stamp(2, 20, 4), older.clone());
    check(stamp(3, 30, 6), stamp(2, 21, 5), older);
    let changed = Refusal::SetChanged {
        asked: SetVersion(4),
        recorded: SetVersion(5),
    };
    check(stamp(2, 20, 4), stamp(2, 20, 3), changed);
}

#[test]
fn a_read_lease_is_not_renewed_once_a_newer_epoch_is_being_recorded() {
    let renew = || request(0, now(), Work::Renew { sent: BootMs(4) });
    let mut member = member();
    let granted = Answer::Granted { sent: BootMs(4) };
    assert_eq!(answer(&member.step(renew())), Some(&granted));
    // A change of the set does not end it.
    member.step(raise(stamp(2, 20, 6), now()));
    assert_eq!(answer(&member.step(renew())), Some(&granted));
    member.step(Input::Persisted { ok: true });
    assert_eq!(answer(&member.step(renew())), Some(&granted));
    member.step(raise(stamp(3, 30, 7), stamp(2, 20, 6)));
    assert!(matches!(
        answer(&member.step(renew())),
        Some(Answer::Refused(Refusal::Fenced { .. }))
    ));
}

#[test]
fn a_flush_unmarks_what_is_everywhere() {
    let unmarked = |out: Vec<Output>| -> Vec<u64> {
        let blocks = out.into_iter().find_map(|output| match output {
            Output::Unmark(blocks) => Some(blocks.into_iter().map(|block| block.0).collect()),
            _ => None,
        });
        blocks.unwrap_or_default()
    };
    let mut member = member();
    for (id, block) in [(1, 0), (2, 1), (5, 2)] {
        let out = member.step(request(id, now(), write(block)));
        assert!(matches!(&out[..], [Output::Perform { mark: true, .. }]), "{out:?}");
        member.step(finished(id, true));
    }
    let out = member.step(request(6, now(), write(2)));
    assert!(matches!(&out[..], [Output::Perform { mark: false, .. }]), "{out:?}");
    // Block 1 is not everywhere, as the owner says; block 2 was written by a request behind the flush.
    let keep = BTreeSet::from([BlockIndex(1)]);
    member.step(request(3, now(), Work::Flush { keep }));
    assert_eq!(unmarked(member.step(finished(3, true))), [0]);
    // A write that is under way may miss the flush.
    member.step(request(7, now(), Work::Flush { keep: BTreeSet::new() }));
    member.step(finished(6, true));
    assert_eq!(unmarked(member.step(finished(7, true))), [1]);
    member.step(request(8, now(), Work::Flush { keep: BTreeSet::new() }));
    assert_eq!(unmarked(member.step(finished(8, true))), [2]);
    assert!(member.standing().doubt.is_empty());
}

#[test]
fn a_failed_request_ends_the_member() {
    let mut member = member();
    member.step(request(1, now(), write(0)));
    member.step(request(2, now(), write(1)));
    member.step(raise(stamp(3, 30, 6), now()));
    let out = member.step(finished(1, false));
    assert!(out.contains(&Output::NotRaised {
        to: node("c"),
        stamp: stamp(3, 30, 6),
        refusal: Refusal::DiskFailed
    }));
    assert_eq!(answer(&out), Some(&Answer::Failed));
    assert!(member.standing().failed);
    let out = member.step(request(3, now(), write(0)));
    assert_eq!(answer(&out), Some(&Answer::Refused(Refusal::DiskFailed)));
}

#[test]
fn a_write_without_room_stays_marked_and_ends_nothing() {
    let mut member = member();
    member.step(request(1, now(), write(0)));
    let out = member.step(Input::NoRoom {
        from: node("a"),
        id: RequestId(1),
    });
    assert_eq!(answer(&out), Some(&Answer::NoRoom));
    let standing = member.standing();
    assert!(
        !standing.failed && standing.doubt.contains(&BlockIndex(0)),
        "{standing:?}"
    );
    // A fence does not wait for it any more.
    let out = member.step(raise(stamp(3, 30, 6), now()));
    assert!(out.iter().any(|out| matches!(out, Output::Persist(_))), "{out:?}");
}

#[test]
fn marks_of_an_earlier_life_say_that_writes_may_be_missing() {
    let durable = Durable {
        record: Some(record(now())),
        sealed: None,
    };
    let check = |store, lost| {
        let marks = Marks::from([(BlockIndex(3), store)]);
        let member = Member::new(node("b"), Rules::default(), STORE, durable.clone(), marks, false);
        assert_eq!(!member.standing().lost.is_empty(), lost);
    };
    check(STORE, false);
    check(Incarnation(6), true);
}

#[test]
fn a_copy_goes_only_by_a_record_newer_than_its_own() {
    let check = |at: Stamp, goes: bool| {
        let mut member = member();
        assert_eq!(
            member.step(Input::Drop { stamp: at }),
            if goes { vec![Output::Forget] } else { vec![] }
        );
        assert_eq!(member.record().is_none(), goes);
    };
    check(stamp(2, 20, 6), true);
    check(stamp(2, 20, 5), false);
    check(stamp(2, 20, 4), false);
}

#[test]
fn a_seal_is_durable_before_it_counts() {
    let mut member = member();
    assert_eq!(
        member.step(Input::Seal {
            grant: (Epoch(2), LeaseId(9))
        }),
        [Output::Sealed(false)]
    );
    let grant = (Epoch(2), LeaseId(20));
    assert!(
        matches!(&member.step(Input::Seal { grant })[..], [Output::Persist(durable)] if durable.sealed == Some(grant))
    );
    assert_eq!(member.standing().sealed, None);
    assert_eq!(member.step(Input::Persisted { ok: true }), [Output::Sealed(true)]);
    assert_eq!(member.standing().sealed, Some(grant));
    let out = member.step(request(1, now(), write(0)));
    let sealed = Refusal::Sealed { epoch: Epoch(2) };
    assert_eq!(answer(&out), Some(&Answer::Refused(sealed)));
}

#[test]
fn a_flush_ends_what_marks_of_an_earlier_life_stand_for() {
    let earlier = Incarnation(6);
    let marks: Marks = [0, 1, 2].map(|block| (BlockIndex(block), earlier)).into();
    let durable = Durable {
        record: Some(record(stamp(2, 20, 4))),
        sealed: None,
    };
    let mut member = Member::new(node("b"), Rules::default(), STORE, durable, marks, false);
    member.step(raise(now(), stamp(2, 20, 4)));
    member.step(Input::Persisted { ok: true });
    assert!(!member.standing().lost.is_empty());
    // Block 1 is not everywhere; block 2 is written meanwhile, which is marked in this life.
    let keep = BTreeSet::from([BlockIndex(1)]);
    let out = member.step(request(1, now(), Work::Flush { keep }));
    let [Output::Perform { anew, .. }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*anew, BTreeSet::from([BlockIndex(0), BlockIndex(2)]));
    member.step(request(2, now(), write(2)));
    member.step(finished(1, true));
    assert_eq!(member.standing().doubt, BTreeSet::from([BlockIndex(1), BlockIndex(2)]));
    assert!(!member.standing().lost.is_empty());
    member.step(finished(2, true));
    let out = member.step(request(3, now(), Work::Flush { keep: BTreeSet::new() }));
    let [Output::Perform { anew, .. }] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*anew, BTreeSet::from([BlockIndex(1)]));
    member.step(finished(3, true));
    assert_eq!(member.standing().lost, BTreeSet::new());
}
