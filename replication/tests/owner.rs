//! The owner: who must have a write before it is acknowledged, and what it says when it does not serve.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::record::{Record, Run};
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use hearth_replication::owner::{Ask, Denial, Input, OpId, Output, Owner};
use hearth_replication::request::{Answer, Bytes, Nodes, Refusal, Reply, Request, RequestId, Stamp, Standing, Work};
use hearth_replication::time::{BootMs, READ_LEASE_MS};

use common::{extent, node, nodes, rules};

/// An owner a with a clock, and who asked whom for what.
struct Bench {
    owner: Owner,
    now: BootMs,
    sent: Vec<(NodeId, Request)>,
}

impl Bench {
    /// Runs as (first block, members); the owner is a, which has every lease.
    fn new(runs: &[(u64, &str)]) -> Self {
        let mut bench = Self::without_leases(runs);
        bench.renew();
        bench
    }

    fn without_leases(runs: &[(u64, &str)]) -> Self {
        let runs = runs.iter().map(|(first, members)| Run {
            first: BlockIndex(*first),
            members: nodes(members),
            joiners: Nodes::new(),
        });
        let stamp = Stamp {
            epoch: Epoch(3),
            lease: LeaseId(33),
            set_version: SetVersion(4),
        };
        let record = Arc::new(Record::new(stamp, runs.collect()).unwrap());
        let stores: BTreeMap<NodeId, Incarnation> = record
            .members()
            .into_iter()
            .map(|node| (node, Incarnation(1)))
            .collect();
        Self {
            owner: Owner::open(node("a"), rules(), record, stores, RequestId(1)),
            now: BootMs(10_000),
            sent: Vec::new(),
        }
    }

    /// Everything but requests, which are remembered.
    fn step(&mut self, input: Input) -> Vec<Output> {
        let mut others = Vec::new();
        for output in self.owner.step(self.now, input) {
            match output {
                Output::Send { to, request, .. } => self.sent.push((to, request)),
                other => others.push(other),
            }
        }
        others
    }

    fn client(&mut self, op: u64, ask: Ask) -> Vec<Output> {
        self.step(Input::Client { op: OpId(op), ask })
    }

    fn write(&mut self, op: u64, first: u64, last: u64) -> Vec<Output> {
        let extent = extent(first, last);
        self.client(op, Ask::Write { extent, fua: false })
    }

    /// Who was sent something since the last call.
    fn asked(&mut self) -> Vec<String> {
        let sent = std::mem::take(&mut self.sent);
        sent.into_iter()
            .map(|(to, request)| format!("{to}{}", request.id.0))
            .collect()
    }

    fn says(&mut self, from: &str, id: u64, answer: Answer) -> Vec<Output> {
        let stamp = self.owner.record().stamp();
        let (from, id) = (node(from), RequestId(id));
        let reply = Reply::Answered { id, stamp, answer };
        self.step(Input::Reply { from, reply })
    }

    fn done(&mut self, from: &str, id: u64) -> Vec<Output> {
        self.says(from, id, Answer::Done)
    }

    fn renew(&mut self) {
        self.step(Input::Renew);
        let asked = std::mem::take(&mut self.sent);
        for (to, request) in asked {
            let Work::Renew { sent } = request.work else {
                panic!("{request:?}")
            };
            self.says(to.as_str(), request.id.0, Answer::Granted { sent });
        }
    }

    fn raised(&mut self, from: &str, record: &Arc<Record>, store: u128) -> Vec<Output> {
        let standing = Standing {
            record: Some(record.clone()),
            before: None,
            store: Incarnation(store),
            doubt: [].into(),
            lost: [].into(),
            sealed: None,
            failed: false,
        };
        let from = node(from);
        let reply = Reply::Raised(standing);
        self.step(Input::Reply { from, reply })
    }
}

fn published(out: &[Output]) -> Arc<Record> {
    let change = out.iter().find_map(|output| match output {
        Output::Publish(change) => Some(change.to.clone()),
        _ => None,
    });
    change.unwrap_or_else(|| panic!("nothing published: {out:?}"))
}

fn acknowledged(out: &[Output]) -> Vec<u64> {
    let acknowledged = out.iter().filter_map(|output| match output {
        Output::Acknowledge { op, .. } => Some(op.0),
        _ => None,
    });
    acknowledged.collect()
}

fn denied(out: &[Output]) -> Vec<Denial> {
    let denied = out.iter().filter_map(|output| match output {
        Output::Deny { denial, .. } | Output::NotChanged { denial, .. } => Some(denial.clone()),
        _ => None,
    });
    denied.collect()
}

#[test]
fn a_write_goes_to_the_members_of_the_runs_it_touches_and_waits_for_all() {
    let mut bench = Bench::new(&[(0, "a b"), (8, "a c")]);
    bench.write(1, 0, 3);
    assert_eq!(bench.asked(), ["a1", "b1"]);
    bench.write(2, 7, 8);
    assert_eq!(bench.asked(), ["a2", "b2", "c2"]);
    assert!(acknowledged(&bench.done("b", 1)).is_empty());
    assert_eq!(acknowledged(&bench.done("a", 1)), [1]);
    bench.done("a", 2);
    bench.done("b", 2);
    assert_eq!(acknowledged(&bench.done("c", 2)), [2]);
    bench.client(3, Ask::Flush);
    assert_eq!(bench.asked(), ["a3", "b3", "c3"]);
}

#[test]
fn what_overlaps_runs_one_after_the_other() {
    let mut bench = Bench::new(&[(0, "a b")]);
    bench.write(1, 0, 3);
    bench.write(2, 3, 4);
    bench.client(3, Ask::Read(extent(4, 4)));
    bench.client(4, Ask::Read(extent(9, 9)));
    assert_eq!(bench.asked(), ["a1", "b1", "a4"]);
    bench.done("a", 1);
    bench.done("b", 1);
    assert_eq!(bench.asked(), ["a2", "b2"]);
    bench.done("a", 2);
    bench.done("b", 2);
    assert_eq!(bench.asked(), ["a3"]);
}

#[test]
fn nothing_is_answered_without_every_lease() {
    let mut bench = Bench::without_leases(&[(0, "a b c")]);
    bench.client(1, Ask::Read(extent(0, 0)));
    bench.write(2, 5, 5);
    assert_eq!(bench.asked(), ["a2", "b2", "c2"]);
    for member in ["a", "b", "c"] {
        assert!(acknowledged(&bench.done(member, 2)).is_empty());
    }
    let granted = Answer::Granted { sent: bench.now };
    assert!(acknowledged(&bench.says("b", 0, granted.clone())).is_empty());
    assert_eq!(acknowledged(&bench.says("c", 0, granted)), [2]);
    assert_eq!(bench.asked(), ["a1"]);
    assert_eq!(bench.owner.answers_until(), Some(bench.now.after(READ_LEASE_MS)));
    // It ran out while the bytes were read: they are read again.
    bench.now = bench.now.after(READ_LEASE_MS);
    assert!(acknowledged(&bench.done("a", 1)).is_empty());
    assert!(bench.asked().is_empty());
    bench.renew();
    assert_eq!(bench.asked(), ["a1"]);
    assert_eq!(acknowledged(&bench.done("a", 1)), [1]);
}

#[test]
fn a_failed_member_is_waited_for_until_the_smaller_set_is_in_force() {
    let mut bench = Bench::new(&[(0, "a b c")]);
    bench.write(1, 0, 0);
    bench.done("a", 1);
    bench.done("b", 1);
    let out = bench.step(Input::MemberFailed(node("c")));
    let smaller = published(&out);
    assert_eq!(smaller.members(), nodes("a b"));
    assert!(acknowledged(&out).is_empty());
    let out = bench.step(Input::Committed(smaller.clone()));
    assert_eq!(out.iter().filter(|out| matches!(out, Output::Raise { .. })).count(), 2);
    assert!(acknowledged(&bench.raised("a", &smaller, 1)).is_empty());
    assert_eq!(acknowledged(&bench.raised("b", &smaller, 1)), [1]);
    assert_eq!(*bench.owner.record(), smaller);
}

#[test]
fn the_last_copy_never_leaves() {
    let mut bench = Bench::new(&[(0, "a b"), (8, "b")]);
    bench.write(1, 0, 0);
    let out = bench.says("b", 1, Answer::Failed);
    assert_eq!(denied(&out), [Denial::NoMember]);
    assert_eq!(denied(&bench.client(2, Ask::Flush)), [Denial::NoMember]);
    let mut bench = Bench::new(&[(0, "a")]);
    let out = bench.step(Input::Leave(node("a")));
    assert!(
        matches!(&denied(&out)[..], [Denial::Map(text)] if text.contains("no copy left")),
        "{out:?}"
    );
}

#[test]
fn refusals_end_the_epoch_take_the_member_out_or_wait() {
    #[derive(Debug, PartialEq)]
    enum Then {
        Ends,
        Leaves,
        Waits,
    }
    let check = |refusal: Refusal, then: Then| {
        let mut bench = Bench::new(&[(0, "a b")]);
        bench.write(1, 0, 0);
        let out = bench.says("b", 1, Answer::Refused(refusal.clone()));
        let leaves = out.iter().any(|out| matches!(out, Output::Publish(_)));
        let got = match bench.owner.ended() {
            Some(Denial::Deposed) => Then::Ends,
            None if leaves => Then::Leaves,
            None if out.is_empty() => Then::Waits,
            _ => panic!("{refusal:?}: {out:?}"),
        };
        assert_eq!(got, then, "{refusal:?}");
    };
    let (epoch, set_version) = (Epoch(4), SetVersion(5));
    let ended = Refusal::EpochEnded {
        asked: Epoch(3),
        recorded: epoch,
    };
    check(ended, Then::Ends);
    check(Refusal::OtherLease { epoch }, Then::Ends);
    check(Refusal::Sealed { epoch }, Then::Ends);
    check(Refusal::Fenced { epoch, set_version }, Then::Waits);
    let changed = Refusal::SetChanged {
        asked: SetVersion(4),
        recorded: set_version,
    };
    check(changed, Then::Waits);
    check(Refusal::NotInstalled { epoch, set_version }, Then::Leaves);
    check(Refusal::NoRecord, Then::Leaves);
    check(Refusal::NotInSet, Then::Leaves);
    check(Refusal::StoreChanged, Then::Leaves);
    check(Refusal::DiskFailed, Then::Leaves);
}

#[test]
fn no_more_is_copied_than_allowed_and_writes_go_to_the_joining_node_meanwhile() {
    let mut bench = Bench::new(&[(0, "a")]);
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(8),
        blocks: 2,
        allowed: Some(0),
    };
    let allow = |node: &str, blocks| Input::Allow {
        node: node.parse().unwrap(),
        blocks,
    };
    let joiner = published(&bench.step(join));
    bench.step(Input::Committed(joiner.clone()));
    bench.raised("a", &joiner, 1);
    bench.raised("b", &joiner, 5);
    assert_eq!(bench.asked(), [""; 0]);
    bench.write(1, 1, 1);
    assert_eq!(bench.asked(), ["a1", "b1"]);
    bench.done("a", 1);
    assert_eq!(acknowledged(&bench.done("b", 1)), [1]);
    bench.step(allow("c", None));
    assert_eq!(bench.asked(), [""; 0], "another node's join");
    // A copy that began is finished: three blocks are two copies of two.
    bench.step(allow("b", Some(3)));
    assert_eq!(bench.asked(), ["a2", "a3"]);
    bench.step(allow("b", Some(1)));
    assert_eq!(bench.asked(), ["a4"]);
    for copy in [2, 3, 4] {
        bench.done("a", copy);
        assert_eq!(bench.asked(), [format!("b{copy}")]);
        bench.done("b", copy);
    }
    assert_eq!(bench.asked(), [""; 0]);
    bench.step(allow("b", None));
    let left: Vec<_> = bench.sent.iter().map(|(_, request)| request.work.clone()).collect();
    assert_eq!(left, [Work::Read(extent(6, 7)), Work::Read(extent(8, 8))]);
}

#[test]
fn a_joining_node_gets_writes_then_copies_then_a_flush_and_then_counts() {
    let mut bench = Bench::new(&[(0, "a")]);
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(8),
        blocks: 2,
        allowed: None,
    };
    let joiner = published(&bench.step(join));
    assert_eq!(joiner.members(), nodes("a"));
    bench.step(Input::Committed(joiner.clone()));
    bench.raised("a", &joiner, 1);
    bench.raised("b", &joiner, 5);
    // Four copies of two blocks are being read; a write to one of these waits, one to another block goes to both.
    assert_eq!(bench.asked(), ["a1", "a2", "a3", "a4"]);
    bench.write(1, 1, 1);
    bench.write(2, 8, 8);
    assert_eq!(bench.asked(), ["a6", "b6"]);
    bench.done("a", 1);
    assert_eq!(bench.sent[0].1.store, Incarnation(5));
    assert_eq!(bench.asked(), ["b1"]);
    bench.done("b", 1);
    assert_eq!(bench.asked(), ["a5", "b5"]);
    bench.done("a", 6);
    assert!(acknowledged(&bench.done("b", 5)).is_empty());
    assert_eq!(acknowledged(&bench.done("a", 5)), [1]);
    // The last block's copy waits for its write.
    assert_eq!(bench.asked(), [""; 0]);
    assert_eq!(acknowledged(&bench.done("b", 6)), [2]);
    let work = bench.sent[0].1.work.clone();
    assert_eq!((work, bench.asked()), (Work::Read(extent(8, 8)), vec!["a7".to_owned()]));
    for copy in [2, 3, 4, 7] {
        bench.done("a", copy);
        assert_eq!(bench.asked(), [format!("b{copy}")]);
    }
    for copy in [2, 3, 4] {
        bench.done("b", copy);
        assert_eq!(bench.asked(), [""; 0], "nothing is flushed while a copy is under way");
    }
    bench.done("b", 7);
    let (flush, asked) = (bench.sent[0].1.work.clone(), bench.asked());
    assert_eq!(
        (flush, asked),
        (Work::Flush { keep: [].into() }, vec!["a8".to_owned(), "b8".to_owned()])
    );
    bench.done("b", 8);
    let member = published(&bench.done("a", 8));
    assert_eq!(member.members(), nodes("a b"));
    // The change may have been committed: from now on nothing is answered without the new member's lease.
    bench.client(6, Ask::Flush);
    bench.done("a", 9);
    assert!(acknowledged(&bench.done("b", 9)).is_empty());
    bench.sent.clear();
    bench.step(Input::Renew);
    let [(to, request)] = &bench.sent[..] else {
        panic!("{:?}", bench.sent)
    };
    assert_eq!((to, &request.work), (&node("b"), &Work::Renew { sent: bench.now }));
    let granted = Answer::Granted { sent: bench.now };
    assert_eq!(acknowledged(&bench.says("b", 0, granted)), [6]);
    bench.step(Input::Committed(member.clone()));
    bench.raised("a", &member, 1);
    assert_eq!(bench.raised("b", &member, 5), [Output::Joined(node("b"))]);
}

#[test]
fn a_lost_end_of_the_log_freezes_sets_and_serves_on() {
    let mut bench = Bench::new(&[(0, "a b")]);
    bench.step(Input::RolledBack);
    bench.write(1, 0, 0);
    bench.done("a", 1);
    assert_eq!(acknowledged(&bench.done("b", 1)), [1]);
    assert_eq!(denied(&bench.step(Input::Leave(node("b")))), [Denial::RolledBack]);
    assert!(bench.step(Input::MemberFailed(node("b"))).is_empty());
}

#[test]
fn a_seal_waits_for_what_is_under_way_and_ends_the_epoch() {
    let mut bench = Bench::new(&[(0, "a b")]);
    bench.write(1, 0, 0);
    assert!(bench.step(Input::Seal).is_empty());
    let sealed = Denial::Sealed { epoch: Epoch(3) };
    assert_eq!(denied(&bench.write(2, 4, 4)).first(), Some(&sealed));
    bench.done("a", 1);
    let out = bench.done("b", 1);
    assert_eq!(
        out,
        [
            Output::Acknowledge {
                op: OpId(1),
                bytes: Bytes::None
            },
            Output::SealHere((Epoch(3), LeaseId(33)))
        ]
    );
    let out = bench.step(Input::SealedHere(true));
    assert!(matches!(&out[..], [Output::Sealed { stores, .. }] if stores.len() == 2));
    assert_eq!(bench.owner.ended(), Some(&sealed));
}

#[test]
fn a_read_that_no_member_holds_is_refused_and_nobody_is_blamed() {
    let mut bench = Bench::new(&[(0, "a"), (8, "b")]);
    assert_eq!(denied(&bench.client(1, Ask::Read(extent(7, 8)))), [Denial::Split]);
    bench.client(2, Ask::Read(extent(8, 9)));
    assert_eq!(bench.asked(), ["b2"]);
}

#[test]
fn a_member_that_joins_further_blocks_keeps_the_life_its_session_began_with() {
    let check = |runs: &[(u64, &str)], leaves: bool| {
        let mut bench = Bench::new(runs);
        let join = Input::Join {
            node: node("b"),
            extent: extent(0, 3),
            end: BlockIndex(9),
            blocks: 1,
            allowed: None,
        };
        let joiner = published(&bench.step(join));
        bench.step(Input::Committed(joiner.clone()));
        bench.raised("a", &joiner, 1);
        // b lost power since: what it held of block 4 and on may be missing.
        let out = bench.raised("b", &joiner, 2);
        let left = out.iter().any(|out| matches!(out, Output::Publish(_)));
        assert_eq!(left, leaves, "{out:?}");
    };
    check(&[(0, "a"), (4, "a b")], true);
    check(&[(0, "a"), (4, "a c")], false);
}

#[test]
fn what_overlaps_a_copy_waits_for_it_also_while_sealing() {
    let mut bench = Bench::new(&[(0, "a")]);
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(0),
        blocks: 1,
        allowed: None,
    };
    let joiner = published(&bench.step(join));
    bench.step(Input::Committed(joiner.clone()));
    bench.raised("a", &joiner, 1);
    bench.raised("b", &joiner, 5);
    bench.done("a", 1);
    bench.write(7, 0, 0);
    assert_eq!(bench.asked(), ["a1", "b1"]);
    bench.step(Input::Seal);
    assert_eq!(bench.asked(), [""; 0], "the copy is still being written");
    bench.done("b", 1);
    assert_eq!(bench.asked(), ["a2", "b2"]);
    bench.done("a", 2);
    let out = bench.done("b", 2);
    assert!(out.iter().any(|out| matches!(out, Output::SealHere(_))), "{out:?}");
}

#[test]
fn a_join_up_to_the_last_block_leaves_no_run_behind_it() {
    let mut bench = Bench::new(&[(0, "a"), (4, "c")]);
    let join = Input::Join {
        node: node("b"),
        extent: extent(2, 9),
        end: BlockIndex(9),
        blocks: 4,
        allowed: None,
    };
    let joiner = published(&bench.step(join));
    let firsts: Vec<u64> = joiner.runs().iter().map(|run| run.first.0).collect();
    assert_eq!(firsts, [0, 2, 4]);
    bench.step(Input::Committed(joiner.clone()));
    bench.raised("a", &joiner, 1);
    bench.raised("c", &joiner, 1);
    bench.raised("b", &joiner, 5);
    // No copy is over a border of runs, because no member holds both sides.
    let copies: Vec<_> = bench
        .sent
        .iter()
        .map(|(to, request)| (to.clone(), request.work.clone()))
        .collect();
    let reads = [("a", 2, 3), ("c", 4, 7), ("c", 8, 9)];
    assert_eq!(
        copies,
        reads.map(|(from, first, last)| (node(from), Work::Read(extent(first, last))))
    );
}

#[test]
fn a_full_disk_beside_another_copy_leaves_the_set() {
    let mut bench = Bench::new(&[(0, "a b")]);
    bench.write(1, 0, 0);
    bench.done("a", 1);
    let smaller = published(&bench.says("b", 1, Answer::NoRoom));
    assert_eq!(smaller.members(), nodes("a"));
    bench.step(Input::Committed(smaller.clone()));
    assert_eq!(acknowledged(&bench.raised("a", &smaller, 1)), [1]);
    // It may come back: its disk is sound.
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, 9),
        end: BlockIndex(9),
        blocks: 1,
        allowed: None,
    };
    let out = bench.step(join);
    assert!(published(&out).everyone().contains(&node("b")), "{out:?}");
}

#[test]
fn the_last_copy_refuses_what_it_has_no_room_for_and_goes_on() {
    let mut bench = Bench::new(&[(0, "a")]);
    bench.write(1, 0, 0);
    bench.write(2, 0, 0);
    bench.asked();
    assert_eq!(denied(&bench.says("a", 1, Answer::NoRoom)), [Denial::NoRoom]);
    // What waited behind it goes on, and is done when there is room.
    assert_eq!(acknowledged(&bench.done("a", 2)), [2]);
    assert!(bench.owner.is_open());
}

#[test]
fn the_last_of_several_full_copies_refuses_once_it_is_alone_in_force() {
    let mut bench = Bench::new(&[(0, "a b")]);
    bench.write(1, 0, 0);
    let smaller = published(&bench.says("b", 1, Answer::NoRoom));
    assert!(
        denied(&bench.says("a", 1, Answer::NoRoom)).is_empty(),
        "b is in the set still"
    );
    bench.step(Input::Committed(smaller.clone()));
    bench.asked();
    assert!(
        denied(&bench.raised("a", &smaller, 1)).is_empty(),
        "it is asked again under the new set"
    );
    assert_eq!(bench.asked(), ["a1"]);
    assert_eq!(denied(&bench.says("a", 1, Answer::NoRoom)), [Denial::NoRoom]);
    assert!(bench.owner.is_open());
}

#[test]
fn a_refused_write_leaves_no_joining_node_with_what_the_set_has_not() {
    let mut bench = Bench::new(&[(0, "a")]);
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, 9),
        end: BlockIndex(9),
        blocks: 1,
        allowed: None,
    };
    let adding = published(&bench.step(join));
    bench.step(Input::Committed(adding.clone()));
    bench.raised("a", &adding, 1);
    bench.raised("b", &adding, 1);
    let sent = bench.now;
    bench.says("b", 0, Answer::Granted { sent });
    bench.asked();
    bench.write(1, 5, 5);
    let id = bench
        .asked()
        .iter()
        .find_map(|to| to.strip_prefix('a')?.parse().ok())
        .unwrap();
    let out = bench.says("a", id, Answer::NoRoom);
    assert!(!out.iter().any(|out| matches!(out, Output::Deny { .. })), "b has it");
    assert!(
        out.iter().any(|out| matches!(
            out,
            Output::NotChanged {
                denial: Denial::JoinerFailed,
                ..
            }
        )),
        "{out:?}"
    );
    let without = published(&out);
    assert!(!without.everyone().contains(&node("b")));
    bench.step(Input::Committed(without.clone()));
    bench.raised("a", &without, 1);
    assert_eq!(denied(&bench.says("a", id, Answer::NoRoom)), [Denial::NoRoom]);
}
