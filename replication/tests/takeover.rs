//! Takeovers and hand-overs: from whom they start, what they wait for, and why they give up.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::{Record, Run};
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use hearth_replication::handover::{Denial, HELD_WRITES_MAX, Held, Incoming};
use hearth_replication::mutants::Rules;
use hearth_replication::request::{Answer, Nodes, Refusal, Reply, Request, Stamp, Standing, Work};
use hearth_replication::takeover::{Input, Mode, Output, Setback, Takeover};
use hearth_replication::time::{BootMs, TAKEOVER_WAIT_MS};

use common::{node, nodes};

fn record(epoch: u64, lease: u128, set_version: u64, runs: &[(u64, &str)]) -> Arc<Record> {
    let stamp = Stamp {
        epoch: Epoch(epoch),
        lease: LeaseId(lease),
        set_version: SetVersion(set_version),
    };
    let runs = runs.iter().map(|(first, members)| Run {
        first: BlockIndex(*first),
        members: nodes(members),
        joiners: Nodes::new(),
    });
    Arc::new(Record::new(stamp, runs.collect()).unwrap())
}

fn log(record: Arc<Record>) -> Aggregate {
    Aggregate {
        record,
        owner: Some(node("a")),
        ended: BTreeMap::from([(Epoch(1), (LeaseId(10), SetVersion(3)))]),
    }
}

fn standing(record: &Arc<Record>) -> Standing {
    Standing {
        record: Some(record.clone()),
        before: None,
        store: Incarnation(1),
        doubt: BTreeSet::new(),
        lost: BTreeSet::new(),
        sealed: None,
        failed: false,
    }
}

fn lost(record: &Arc<Record>) -> Standing {
    Standing {
        doubt: BTreeSet::from([BlockIndex(0)]),
        lost: BTreeSet::from([BlockIndex(0)]),
        ..standing(record)
    }
}

/// b takes over from a log of three members, with these answers.
fn told(mode: Mode, log: Aggregate, answers: &[(&str, Standing)]) -> (Takeover, Vec<Output>) {
    let mut takeover = Takeover::new(node("b"), Rules::default(), LeaseId(99), mode, log);
    for (from, standing) in answers {
        let told = Input::Told {
            from: node(from),
            standing: standing.clone(),
        };
        takeover.step(BootMs(0), told);
    }
    let out = takeover.step(BootMs(0), Input::Reached);
    (takeover, out)
}

fn published(out: &[Output]) -> Arc<Record> {
    let [Output::Publish(change)] = out else {
        panic!("{out:?}")
    };
    change.to.clone()
}

#[test]
fn it_starts_from_members_of_the_newest_record_or_says_why_not() {
    let now = record(2, 20, 5, &[(0, "a b c")]);
    let check = |answers: &[(&str, Standing)], expect: Result<&str, Setback>| {
        let (_, out) = told(Mode::Fault, log(now.clone()), answers);
        match expect {
            Ok(members) => {
                let to = published(&out);
                assert_eq!((to.members(), to.epoch()), (nodes(members), Epoch(3)));
            }
            Err(setback) => {
                let text = setback.to_string();
                assert!(text.contains(": "), "{text:?} does not say what to do");
                assert_eq!(out, [Output::GivenUp(setback)]);
            }
        }
    };
    let good = standing(&now);
    check(&[("b", good.clone())], Ok("b"));
    check(&[("a", good.clone()), ("c", good.clone())], Ok("a c"));
    // Behind by a set version, but in the newest set: it has every acknowledged write.
    let behind = standing(&record(1, 10, 3, &[(0, "a b c")]));
    check(&[("b", behind)], Ok("b"));
    let failed = Standing {
        failed: true,
        ..good.clone()
    };
    check(&[("a", good.clone()), ("b", failed.clone())], Ok("a"));
    let members: Vec<NodeId> = nodes("a b c").into_iter().collect();
    let first = BlockIndex(0);
    let no_member = Setback::NoMember { first, members };
    check(&[], Err(no_member.clone()));
    check(&[("b", failed), ("d", good.clone())], Err(no_member));
    let rolled = |node: &str, record: Arc<Record>| {
        let told = [("b", good.clone()), (node, standing(&record))];
        let setback = Setback::RolledBack { node: self::node(node) };
        check(&told, Err(setback));
    };
    rolled("c", record(2, 20, 6, &[(0, "a c")]));
    rolled("c", record(2, 21, 5, &[(0, "c")]));
    rolled("c", record(1, 10, 4, &[(0, "c")]));
    rolled("c", record(2, 20, 5, &[(0, "c")]));
    rolled("d", record(7, 70, 9, &[(0, "d")]));
    check(&[("a", lost(&now)), ("b", good)], Ok("a b"));
    let missing = vec![node("c")];
    check(
        &[("a", lost(&now)), ("b", lost(&now))],
        Err(Setback::InDoubt { first, missing }),
    );
    check(&[("a", lost(&now)), ("b", lost(&now)), ("c", lost(&now))], Ok("a b c"));
}

#[test]
fn a_forced_takeover_takes_this_copy_alone_and_only_where_nothing_newer_answers() {
    // a owned epoch 2 with b, and went on alone.
    let before = record(2, 20, 4, &[(0, "a b")]);
    let now = record(2, 20, 5, &[(0, "a")]);
    let check = |now: &Arc<Record>, answers: &[(&str, Standing)], expect: Result<Stamp, Setback>| {
        let (_, out) = told(Mode::Forced, log(now.clone()), answers);
        match expect {
            Ok(stale) => {
                let [Output::Publish(change)] = &out[..] else {
                    panic!("{out:?}")
                };
                assert_eq!((change.stale, change.to.everyone()), (Some(stale), nodes("b")));
                assert_eq!((change.to.epoch(), change.from), (Epoch(3), now.stamp()));
                assert_eq!(log(now.clone()).judge(change), Ok(()));
            }
            Err(setback) => {
                let text = setback.to_string();
                assert!(text.contains(": "), "{text:?} does not say what to do");
                assert_eq!(out, [Output::GivenUp(setback)]);
            }
        }
    };
    let old = standing(&before);
    let failed = |standing: &Standing| Standing {
        failed: true,
        ..standing.clone()
    };
    let newer = |name: &str| Err(Setback::NewerThere { node: node(name) });
    check(&now, &[("b", old.clone())], Ok(before.stamp()));
    check(
        &now,
        &[("a", failed(&standing(&now))), ("b", old.clone())],
        Ok(before.stamp()),
    );
    check(
        &now,
        &[("a", standing(&now)), ("b", old.clone())],
        Err(Setback::NotNeeded),
    );
    check(&before, &[("b", old.clone())], Err(Setback::NotNeeded));
    // Both lost power, but a has what b has not.
    let gone = record(2, 20, 5, &[(0, "a c")]);
    check(&gone, &[("a", lost(&gone)), ("b", old.clone())], newer("a"));
    // b is a member that may have lost writes, and the other one is away.
    let both = record(2, 20, 5, &[(0, "b c")]);
    check(&both, &[("b", lost(&both))], Ok(both.stamp()));
    let older = record(1, 10, 3, &[(0, "b d")]);
    check(&now, &[("d", old.clone()), ("b", standing(&older))], Ok(older.stamp()));
    check(
        &now,
        &[("d", standing(&record(2, 20, 4, &[(0, "d")]))), ("b", standing(&older))],
        newer("d"),
    );
    // Nothing whole to take.
    check(&now, &[("c", old.clone())], Err(Setback::NothingToTake));
    check(&now, &[("b", failed(&old))], Err(Setback::NothingToTake));
    let part = record(2, 20, 4, &[(0, "a"), (8, "b")]);
    check(&now, &[("b", standing(&part))], Err(Setback::NothingToTake));
    let unknown = record(2, 20, 6, &[(0, "b")]);
    check(
        &now,
        &[("b", standing(&unknown))],
        Err(Setback::RolledBack { node: node("b") }),
    );
}

#[test]
fn a_forced_takeover_raises_the_fence_and_waits_as_any_other() {
    let before = record(2, 20, 4, &[(0, "a b")]);
    let now = record(2, 20, 5, &[(0, "a")]);
    let marked = lost(&before);
    let (mut takeover, out) = told(Mode::Forced, log(now.clone()), &[("b", marked.clone())]);
    let to = published(&out);
    let out = takeover.step(BootMs(0), Input::Committed(to.clone()));
    let over = now.stamp();
    let record = to.clone();
    assert_eq!(
        out,
        [Output::Raise {
            to: node("b"),
            record,
            over
        }]
    );
    let at = BootMs(1_000);
    assert!(
        run(&mut takeover, &to, &[("b", marked)], at).is_empty(),
        "it has nobody to be made equal to"
    );
    let opens = at.after(TAKEOVER_WAIT_MS);
    assert_eq!(takeover.opens_at(), Some(opens));
    assert!(takeover.step(BootMs(opens.0 - 1), Input::Tick).is_empty());
    let out = takeover.step(opens, Input::Tick);
    assert!(
        matches!(&out[..], [Output::Opened(owner)] if owner.record() == &to),
        "{out:?}"
    );
}

#[test]
fn a_running_guest_loses_nothing_silently() {
    let now = record(2, 20, 5, &[(0, "a b")]);
    let stores = BTreeMap::from([(node("a"), Incarnation(1)), (node("b"), Incarnation(1))]);
    let check = |answers: &[(&str, Standing)], goes: bool| {
        let sealed = now.grant();
        let mode = Mode::Handover {
            sealed,
            stores: stores.clone(),
        };
        let (_, out) = told(mode, log(now.clone()), answers);
        let gap = Setback::Gap { first: BlockIndex(0) };
        assert_eq!(out == [Output::GivenUp(gap)], !goes, "{out:?}");
    };
    let good = standing(&now);
    check(&[("a", good.clone()), ("b", good.clone())], true);
    check(&[("a", lost(&now)), ("b", good.clone())], true);
    check(&[("a", lost(&now)), ("b", lost(&now))], false);
    // Marked in this life of the store, which is not the life that the source wrote to.
    let renewed = Standing {
        store: Incarnation(2),
        doubt: BTreeSet::from([BlockIndex(4)]),
        ..good
    };
    check(&[("a", renewed.clone()), ("b", renewed)], false);
}

#[test]
fn what_a_member_may_have_lost_elsewhere_says_nothing_of_a_run() {
    let now = record(2, 20, 5, &[(0, "a"), (12, "a b")]);
    let marked = |block| Standing {
        doubt: BTreeSet::from([BlockIndex(block)]),
        lost: BTreeSet::from([BlockIndex(block)]),
        ..standing(&now)
    };
    let check = |a, b, goes: bool| {
        let sealed = now.grant();
        let stores = BTreeMap::from([(node("a"), Incarnation(1)), (node("b"), Incarnation(1))]);
        let mode = Mode::Handover { sealed, stores };
        let (_, out) = told(mode, log(now.clone()), &[("a", marked(a)), ("b", marked(b))]);
        let gap = Setback::Gap { first: BlockIndex(12) };
        assert_eq!(out == [Output::GivenUp(gap)], !goes, "{out:?}");
    };
    // b held the first blocks once, and lost power then.
    check(12, 3, true);
    check(12, 20, false);
}

/// Carries out everything until it only waits; returns what was asked of whom.
fn run(takeover: &mut Takeover, to: &Arc<Record>, standings: &[(&str, Standing)], now: BootMs) -> Vec<String> {
    let mut asked = Vec::new();
    let mut queue: Vec<(NodeId, Request)> = Vec::new();
    let mut take = |out: Vec<Output>, queue: &mut Vec<(NodeId, Request)>| {
        for output in out {
            match output {
                Output::Send { to, request, .. } => {
                    let what = match &request.work {
                        Work::Read(extent) => format!("{to} reads {}", extent.first),
                        Work::Write { extent, .. } => format!("{to} writes {}", extent.first),
                        Work::Flush { .. } => format!("{to} flushes"),
                        Work::Hash(_) | Work::Renew { .. } => panic!("{request:?}"),
                    };
                    asked.push(what);
                    queue.push((to, request));
                }
                Output::Opened(_) => asked.push("opens".to_owned()),
                other => asked.push(format!("{other:?}")),
            }
        }
    };
    for (from, standing) in standings {
        let standing = Standing {
            record: Some(to.clone()),
            ..standing.clone()
        };
        let from = node(from);
        let reply = Reply::Raised(standing);
        take(takeover.step(now, Input::Reply { from, reply }), &mut queue);
    }
    while !queue.is_empty() {
        let (from, request) = queue.remove(0);
        let reply = Reply::Answered {
            id: request.id,
            stamp: request.stamp,
            answer: Answer::Done,
        };
        take(takeover.step(now, Input::Reply { from, reply }), &mut queue);
    }
    asked
}

#[test]
fn what_is_in_doubt_behind_the_fence_is_made_equal_from_a_sound_member() {
    let now = record(2, 20, 5, &[(0, "a b c"), (8, "b c")]);
    let (a, b, c) = (lost(&now), standing(&now), standing(&now));
    let answers = [("a", a.clone()), ("b", b.clone()), ("c", c.clone())];
    let (mut takeover, out) = told(Mode::Fault, log(now), &answers);
    let to = published(&out);
    let out = takeover.step(BootMs(0), Input::Committed(to.clone()));
    assert_eq!(out.iter().filter(|out| matches!(out, Output::Raise { .. })).count(), 3);
    // b and c marked more since they were asked.
    let doubt = |blocks: &[u64]| blocks.iter().copied().map(BlockIndex).collect();
    let b = Standing {
        doubt: doubt(&[9]),
        ..b
    };
    let c = Standing {
        doubt: doubt(&[1]),
        ..c
    };
    let at = BootMs(1_000);
    let asked = run(&mut takeover, &to, &[("a", a), ("b", b), ("c", c)], at);
    let expect = [
        "b reads 1",
        "a writes 1",
        "c writes 1",
        "b reads 0",
        "a writes 0",
        "c writes 0",
        "b reads 9",
        "c writes 9",
        "a flushes",
        "b flushes",
        "c flushes",
    ];
    assert_eq!(asked, expect);
    assert!(takeover.is_waiting());
    let early = BootMs(at.0 + TAKEOVER_WAIT_MS - 1);
    assert!(takeover.step(early, Input::Tick).is_empty());
    let out = takeover.step(at.after(TAKEOVER_WAIT_MS), Input::Tick);
    let [Output::Opened(owner)] = &out[..] else {
        panic!("{out:?}")
    };
    assert_eq!(*owner.record(), to);
}

#[test]
fn if_all_lost_power_the_newest_record_is_copied_from() {
    let now = record(2, 20, 5, &[(0, "a b")]);
    let older = record(1, 10, 3, &[(0, "a b")]);
    let answers = [("a", lost(&older)), ("b", lost(&now))];
    let (mut takeover, out) = told(Mode::Fault, log(now.clone()), &answers);
    let to = published(&out);
    takeover.step(BootMs(0), Input::Committed(to.clone()));
    let asked = run(&mut takeover, &to, &[("a", lost(&now)), ("b", lost(&now))], BootMs(0));
    assert_eq!(asked, ["b reads 0", "a writes 0", "a flushes", "b flushes"]);
}

#[test]
fn the_old_owners_seal_spares_the_wait_and_another_seal_does_not() {
    let now = record(2, 20, 5, &[(0, "a b")]);
    let check = |sealed: (u64, u128), expect: &[&str]| {
        let a = Standing {
            sealed: Some((Epoch(sealed.0), LeaseId(sealed.1))),
            ..standing(&now)
        };
        let answers = [("a", a), ("b", standing(&now))];
        let (mut takeover, out) = told(Mode::Fault, log(now.clone()), &answers);
        let to = published(&out);
        takeover.step(BootMs(0), Input::Committed(to.clone()));
        assert_eq!(run(&mut takeover, &to, &answers, BootMs(0)), expect);
    };
    check((2, 20), &["opens"]);
    check((2, 21), &[]);
    check((1, 10), &[]);
}

#[test]
fn nobody_is_waited_for_where_nobody_ever_owned_the_image() {
    let check = |epoch: u64, expect: &[&str]| {
        let now = record(epoch, 0, 1, &[(0, "a b")]);
        let answers = [("a", standing(&now)), ("b", standing(&now))];
        let nobody = Aggregate {
            owner: None,
            ..log(now)
        };
        let (mut takeover, out) = told(Mode::Fault, nobody, &answers);
        let to = published(&out);
        takeover.step(BootMs(0), Input::Committed(to.clone()));
        assert_eq!(run(&mut takeover, &to, &answers, BootMs(0)), expect);
    };
    check(0, &["opens"]);
    check(1, &[]);
}

#[test]
fn it_gives_up_when_overtaken_or_when_a_member_is_lost() {
    let now = record(2, 20, 5, &[(0, "a b")]);
    let check = |input: Input, expect: Setback| {
        let answers = [("a", standing(&now)), ("b", standing(&now))];
        let (mut takeover, out) = told(Mode::Fault, log(now.clone()), &answers);
        takeover.step(BootMs(0), Input::Committed(published(&out)));
        assert_eq!(takeover.step(BootMs(0), input), [Output::GivenUp(expect)]);
        assert!(takeover.step(BootMs(u64::MAX), Input::Tick).is_empty());
    };
    check(Input::Committed(record(3, 31, 6, &[(0, "a")])), Setback::Overtaken);
    check(Input::Committed(record(4, 40, 7, &[(0, "a")])), Setback::Overtaken);
    let member = node("a");
    let gone = Setback::MemberLost { node: member.clone() };
    check(Input::MemberFailed(member.clone()), gone.clone());
    let not_raised = |refusal| Input::Reply {
        from: member.clone(),
        reply: Reply::NotRaised {
            stamp: now.granted(LeaseId(99), &nodes("a b")).unwrap().stamp(),
            refusal,
        },
    };
    check(not_raised(Refusal::DiskFailed), gone);
    let (asked, recorded) = (Epoch(3), Epoch(4));
    check(not_raised(Refusal::EpochEnded { asked, recorded }), Setback::Overtaken);
    let rolled_back = Setback::RolledBack { node: member.clone() };
    check(not_raised(Refusal::GrantedOverOlder { epoch: Epoch(3) }), rolled_back);
}

#[test]
fn a_destination_holds_writes_until_the_seal_of_the_logs_epoch() {
    let now = record(2, 20, 5, &[(0, "a b")]);
    let log = log(now.clone());
    let mut incoming = Incoming::new(node("b"), Rules::default(), LeaseId(99));
    for _ in 0..HELD_WRITES_MAX {
        assert_eq!(incoming.write(&log), Ok(Held::Waits));
    }
    assert_eq!(incoming.write(&log), Err(Denial::Full));
    assert_eq!(incoming.held(), HELD_WRITES_MAX);
    let other = incoming.sealed((Epoch(1), LeaseId(10)), BTreeMap::new(), &log);
    let expect = Denial::OtherEpoch {
        sealed: Epoch(1),
        current: Epoch(2),
    };
    assert_eq!(other.err(), Some(expect));
    assert!(
        incoming
            .sealed(now.grant(), BTreeMap::new(), &log)
            .is_ok_and(|takeover| takeover.is_asking())
    );
}
