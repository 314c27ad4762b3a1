//! Records: runs, order, and which changes of them count.
#![allow(missing_docs, reason = "a test program")]

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change, Void};
use hearth_protocol::record::{Age, RUNS_MAX, Record, RecordError, Run};
use hearth_protocol::record::{Extent, Nodes, Stamp};
use hearth_protocol::{BlockIndex, Epoch, LeaseId, NodeId, SetVersion};
use proptest::prelude::*;

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

fn nodes(names: &str) -> Nodes {
    names.split_whitespace().map(node).collect()
}

fn run(first: u64, members: &str, joiners: &str) -> Run {
    Run {
        first: BlockIndex(first),
        members: nodes(members),
        joiners: nodes(joiners),
    }
}

fn stamp(epoch: u64, lease: u128, set_version: u64) -> Stamp {
    Stamp {
        epoch: Epoch(epoch),
        lease: LeaseId(lease),
        set_version: SetVersion(set_version),
    }
}

fn record(epoch: u64, lease: u128, set_version: u64, runs: Vec<Run>) -> Record {
    Record::new(stamp(epoch, lease, set_version), runs).unwrap()
}

fn extent(first: u64, last: u64) -> Extent {
    Extent {
        first: BlockIndex(first),
        last: BlockIndex(last),
    }
}

#[test]
fn a_location_map_is_checked() {
    let check = |runs: Vec<Run>, expect: Result<usize, RecordError>| {
        let got = Record::new(stamp(1, 1, 1), runs).map(|record| record.runs().len());
        assert_eq!(got, expect);
    };
    check(vec![run(0, "a", "")], Ok(1));
    check(vec![run(0, "a", ""), run(4, "b", "")], Ok(2));
    check(vec![run(0, "a", "b"), run(4, "a", "b"), run(5, "a", "")], Ok(2));
    check(vec![], Err(RecordError::Order));
    check(vec![run(1, "a", "")], Err(RecordError::Order));
    check(
        vec![run(0, "a", ""), run(4, "b", ""), run(4, "c", "")],
        Err(RecordError::Order),
    );
    check(
        vec![run(0, "", "b")],
        Err(RecordError::LastCopy { first: BlockIndex(0) }),
    );
    let both = RecordError::Both {
        first: BlockIndex(3),
        node: node("b"),
    };
    check(vec![run(0, "a", ""), run(3, "a b", "b")], Err(both));
    let many = |count: usize| {
        (0..count)
            .map(|at| run(at as u64, if at % 2 == 0 { "a" } else { "b" }, ""))
            .collect()
    };
    check(many(RUNS_MAX), Ok(RUNS_MAX));
    check(many(RUNS_MAX + 1), Err(RecordError::Runs { runs: RUNS_MAX + 1 }));
}

#[test]
fn the_newer_of_two_records_is_told_or_neither() {
    let one = |epoch, lease, set_version| record(epoch, lease, set_version, vec![run(0, "a", "")]);
    let check = |left: &Record, right: &Record, expect| assert_eq!(left.age(right), expect, "{left:?} {right:?}");
    check(&one(2, 1, 5), &one(2, 1, 5), Age::Same);
    check(&one(2, 1, 5), &one(2, 1, 4), Age::Newer);
    check(&one(2, 1, 5), &one(1, 9, 7), Age::Newer);
    check(&one(2, 1, 5), &one(2, 1, 6), Age::Older);
    check(&one(2, 1, 5), &one(3, 1, 1), Age::Older);
    check(&one(2, 1, 5), &one(2, 2, 4), Age::Conflict);
    let other = record(2, 1, 5, vec![run(0, "b", "")]);
    check(&one(2, 1, 5), &other, Age::Conflict);
}

#[test]
fn nodes_join_become_members_and_leave_by_extent() {
    let start = record(1, 1, 1, vec![run(0, "a b", "")]);
    let joined = start.with_joiner(&node("c"), extent(4, 7)).unwrap();
    let runs = [run(0, "a b", ""), run(4, "a b", "c"), run(8, "a b", "")];
    assert_eq!(joined.runs(), runs);
    assert_eq!(joined.stamp(), stamp(1, 1, 2));
    assert_eq!(joined.members_of(extent(0, 9)), nodes("a b"));
    assert_eq!(joined.targets_of(extent(0, 4)), nodes("a b c"));
    assert_eq!(joined.targets_of(extent(8, 9)), nodes("a b"));
    let member = joined.with_member(&node("c"), extent(0, u64::MAX)).unwrap();
    assert!(member.holds(&node("c"), extent(4, 7)) && !member.holds(&node("c"), extent(4, 8)));
    assert!(member.concerns(&node("c"), extent(0, 4)) && !member.concerns(&node("c"), extent(0, 3)));
    let left = member.without(&nodes("a b"));
    assert_eq!(left, Err(RecordError::LastCopy { first: BlockIndex(0) }));
    let alone = member.without(&nodes("b c")).unwrap();
    assert_eq!(alone.runs(), [run(0, "a", "")]);
    // A member does not become a joiner of what it holds.
    assert_eq!(
        start.with_joiner(&node("b"), extent(0, 9)).unwrap().runs(),
        start.runs()
    );
}

#[test]
fn an_epoch_is_granted_to_members_only() {
    let start = record(1, 1, 4, vec![run(0, "a b", "c"), run(9, "b", "")]);
    let granted = start.granted(LeaseId(2), &nodes("b c d")).unwrap();
    assert_eq!(granted.stamp(), stamp(2, 2, 5));
    assert_eq!(granted.runs(), [run(0, "b", "")]);
    let none = start.granted(LeaseId(2), &nodes("a c d"));
    assert_eq!(none, Err(RecordError::LastCopy { first: BlockIndex(9) }));
}

fn aggregate() -> Aggregate {
    Aggregate {
        record: Arc::new(record(1, 1, 1, vec![run(0, "a b", "c")])),
        owner: Some(node("a")),
        ended: BTreeMap::new(),
    }
}

#[test]
fn a_change_counts_or_is_void() {
    let check = |by: &str, from: Stamp, to: Record, expect: Result<(), Void>| {
        let mut log = aggregate();
        let to = Arc::new(to);
        let change = Change {
            by: node(by),
            from,
            to: to.clone(),
            stale: None,
        };
        assert_eq!(log.judge(&change), expect, "{to:?}");
        assert_eq!(log.record == to, expect.is_ok());
    };
    let at = stamp(1, 1, 1);
    let set = |epoch, lease, version, members, joiners| record(epoch, lease, version, vec![run(0, members, joiners)]);
    check("a", at, set(1, 1, 2, "a", ""), Ok(()));
    check("a", at, set(1, 1, 2, "a b c", ""), Ok(()));
    check("b", at, set(2, 2, 2, "b", ""), Ok(()));
    check("a", stamp(1, 1, 0), set(1, 1, 2, "a", ""), Err(Void::NotLast));
    check("a", stamp(1, 2, 1), set(1, 1, 2, "a", ""), Err(Void::NotLast));
    check("a", at, set(1, 1, 3, "a", ""), Err(Void::NotNext));
    check("a", at, set(1, 2, 2, "a", ""), Err(Void::NotNext));
    check("b", at, set(2, 1, 2, "b", ""), Err(Void::NotNext));
    check("b", at, set(3, 2, 2, "b", ""), Err(Void::NotNext));
    check("b", at, set(1, 1, 2, "b", ""), Err(Void::NotOwner));
    check("a", at, set(1, 1, 2, "a d", ""), Err(Void::NotSynced));
    check("b", at, set(2, 2, 2, "b c", ""), Err(Void::NotSynced));
    check("a", at, set(1, 1, 2, "c", ""), Err(Void::LastCopy));
    // A member that is new in a part of a run only.
    let part = record(1, 1, 2, vec![run(0, "a", ""), run(5, "a d", "")]);
    check("a", at, part, Err(Void::NotSynced));
}

#[test]
fn a_forced_takeover_takes_its_own_copy_alone_of_a_record_that_was() {
    // a owned epoch 1, gave b up and went on alone; b, whose record is the one before, is forced.
    let mut log = aggregate();
    let alone = Change {
        by: node("a"),
        from: log.record.stamp(),
        to: Arc::new(record(1, 1, 2, vec![run(0, "a", "")])),
        stale: None,
    };
    let before = log.record.stamp();
    log.judge(&alone).unwrap();
    let check = |by: &str, to: Record, stale: Option<Stamp>, expect: Result<(), Void>| {
        let mut log = log.clone();
        let change = Change {
            by: node(by),
            from: stamp(1, 1, 2),
            to: Arc::new(to),
            stale,
        };
        assert_eq!(log.judge(&change), expect, "{change:?}");
        if expect.is_ok() {
            assert_eq!((log.owner, log.ended.len()), (Some(node(by)), 1));
        }
    };
    let next = |epoch, lease, members, joiners| record(epoch, lease, 3, vec![run(0, members, joiners)]);
    check("b", next(2, 2, "b", ""), Some(before), Ok(()));
    // A copy of the newest record that is in doubt.
    check("a", next(2, 2, "a", ""), Some(stamp(1, 1, 2)), Ok(()));
    check("b", next(2, 2, "b", ""), None, Err(Void::NotSynced));
    check("b", next(2, 2, "a b", ""), Some(before), Err(Void::NotForced));
    check("b", next(2, 2, "b", "a"), Some(before), Err(Void::NotForced));
    check("b", next(2, 2, "c", ""), Some(before), Err(Void::NotForced));
    check("b", next(2, 2, "b", ""), Some(stamp(1, 1, 3)), Err(Void::NotForced));
    check("b", next(2, 2, "b", ""), Some(stamp(1, 7, 1)), Err(Void::NotForced));
    check("b", next(2, 1, "b", ""), Some(before), Err(Void::NotNext));
    // Under the same epoch it is no takeover.
    check("a", next(1, 1, "a", ""), Some(before), Err(Void::NotForced));
}

#[test]
fn a_log_knows_its_records_and_no_others() {
    let mut log = aggregate();
    let first = log.record.clone();
    let grant = Change {
        by: node("b"),
        from: first.stamp(),
        to: Arc::new(first.granted(LeaseId(2), &nodes("b")).unwrap()),
        stale: None,
    };
    log.judge(&grant).unwrap();
    assert!(log.knows(&first) && log.knows(&grant.to));
    let check = |epoch, lease, version| assert!(!log.knows(&record(epoch, lease, version, vec![run(0, "b", "")])));
    check(1, 1, 2);
    check(1, 7, 1);
    check(2, 3, 2);
    check(2, 2, 3);
    check(3, 3, 3);
}

proptest! {
    /// Whatever joins, becomes a member or leaves where: the map stays one, says what was asked, and others keep their part.
    #[test]
    fn maps_stay_maps(steps in prop::collection::vec((0..3_u8, 0..4_usize, 0..24_u64, 0..24_u64), 1..24)) {
        let names = ["a", "b", "c", "d"].map(node);
        let mut now = record(1, 1, 1, vec![run(0, "a", "")]);
        // What each block should have: per node 0 nothing, 1 joiner, 2 member.
        let mut model = [[2_u8, 0, 0, 0]; 25];
        for (what, who, x, y) in steps {
            let (from, to) = (x.min(y), x.max(y));
            let within = extent(from, to);
            let next = match what {
                0 => now.with_joiner(&names[who], within).unwrap(),
                1 => now.with_member(&names[who], within).unwrap(),
                _ => {
                    let left = now.without(&Nodes::from([names[who].clone()]));
                    let last = model.iter().any(|block| (0..4).all(|n| n == who || block[n] != 2));
                    prop_assert_eq!(left.is_err(), last);
                    let Ok(left) = left else { continue };
                    left
                }
            };
            for (at, block) in model.iter_mut().enumerate() {
                let inside = (from..=to).contains(&(at as u64));
                match what {
                    0 if inside => block[who] = block[who].max(1),
                    1 if inside && block[who] == 1 => block[who] = 2,
                    2 => block[who] = 0,
                    _ => {}
                }
            }
            prop_assert_eq!(next.age(&now), Age::Newer);
            for (at, block) in model.iter().enumerate() {
                let here = Extent::block(BlockIndex(at as u64));
                for (who, name) in names.iter().enumerate() {
                    prop_assert_eq!(next.holds(name, here), block[who] == 2);
                    prop_assert_eq!(next.concerns(name, here), block[who] > 0);
                }
            }
            prop_assert_eq!(&Record::new(next.stamp(), next.runs().to_vec()).unwrap(), &next);
            now = next;
        }
    }
}
