//! Looking after copies: what is asked of whom while they are compared and written anew, and what waits meanwhile; and a join
//! that is paused.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::record::{Record, Run};
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use hearth_replication::mutants::Rules;
use hearth_replication::owner::{Ask, Check, Denial, Input, OpId, Output, Owner};
use hearth_replication::request::{Answer, BlockHash, Nodes, Reply, Request, RequestId, Stamp, Standing, Work};
use hearth_replication::time::BootMs;

use common::{extent, node, nodes};

/// An owner a, which has every lease.
struct Bench {
    owner: Owner,
    sent: Vec<(NodeId, Request)>,
}

impl Bench {
    fn new(members: &str) -> Self {
        let stamp = Stamp {
            epoch: Epoch(3),
            lease: LeaseId(33),
            set_version: SetVersion(4),
        };
        let run = Run {
            first: BlockIndex(0),
            members: nodes(members),
            joiners: Nodes::new(),
        };
        let record = Arc::new(Record::new(stamp, vec![run]).unwrap());
        let stores: BTreeMap<_, _> = record
            .members()
            .into_iter()
            .map(|node| (node, Incarnation(1)))
            .collect();
        let mut bench = Self {
            owner: Owner::open(node("a"), Rules::default(), record, stores, RequestId(1)),
            sent: Vec::new(),
        };
        bench.step(Input::Renew);
        for (to, request) in std::mem::take(&mut bench.sent) {
            let Work::Renew { sent } = request.work else {
                panic!("{request:?}")
            };
            bench.says(to.as_str(), request.id.0, Answer::Granted { sent });
        }
        bench
    }

    fn step(&mut self, input: Input) -> Vec<Output> {
        let mut others = Vec::new();
        for output in self.owner.step(BootMs(10_000), input) {
            match output {
                Output::Send { to, request, .. } => self.sent.push((to, request)),
                other => others.push(other),
            }
        }
        others
    }

    fn check(&mut self, op: u64, check: Check) -> Vec<Output> {
        self.step(Input::Check { op: OpId(op), check })
    }

    fn client(&mut self, op: u64, ask: Ask) -> Vec<Output> {
        self.step(Input::Client { op: OpId(op), ask })
    }

    fn says(&mut self, from: &str, id: u64, answer: Answer) -> Vec<Output> {
        let stamp = self.owner.record().stamp();
        let reply = Reply::Answered {
            id: RequestId(id),
            stamp,
            answer,
        };
        let from = node(from);
        self.step(Input::Reply { from, reply })
    }

    /// What was asked since the last call, as a letter for the work behind the node.
    fn asked(&mut self) -> Vec<String> {
        let word = |(to, request): (NodeId, Request)| {
            let what = match request.work {
                Work::Hash(_) => "hash",
                Work::Read(_) => "read",
                Work::Write { .. } => "write",
                Work::Flush { .. } => "flush",
                Work::Renew { .. } => "renew",
            };
            format!("{to} {what} {}", request.id.0)
        };
        std::mem::take(&mut self.sent).into_iter().map(word).collect()
    }

    /// The log has a record, and every node of it does.
    fn in_force(&mut self, out: &[Output]) {
        let change = out.iter().find_map(|output| match output {
            Output::Publish(change) => Some(change.to.clone()),
            _ => None,
        });
        let record = change.unwrap_or_else(|| panic!("nothing published: {out:?}"));
        self.step(Input::Committed(record.clone()));
        for from in record.everyone() {
            let standing = Standing {
                record: Some(record.clone()),
                before: None,
                store: Incarnation(1),
                doubt: [].into(),
                lost: [].into(),
                sealed: None,
                failed: false,
            };
            let reply = Reply::Raised(standing);
            self.step(Input::Reply { from, reply });
        }
        assert_eq!(self.owner.record().stamp(), record.stamp());
    }
}

fn hashed(values: &[u128]) -> Answer {
    Answer::Hashed(values.iter().map(|value| Some(BlockHash(*value))).collect())
}

#[test]
fn copies_are_compared_behind_writes_under_way_and_before_later_ones() {
    let mut bench = Bench::new("a b");
    let write = |first, last| Ask::Write {
        extent: extent(first, last),
        fua: false,
    };
    bench.client(1, write(3, 3));
    assert_eq!(bench.asked(), ["a write 1", "b write 1"]);
    bench.check(2, Check::Compare(extent(0, 3)));
    bench.client(3, write(2, 2));
    bench.client(4, Ask::Read(extent(2, 2)));
    assert!(bench.asked().is_empty(), "a write under way would be a difference");
    bench.says("a", 1, Answer::Done);
    bench.says("b", 1, Answer::Done);
    assert_eq!(bench.asked(), ["a hash 2", "b hash 2"]);
    bench.says("b", 2, hashed(&[1, 2, 3, 4]));
    let out = bench.says("a", 2, hashed(&[1, 2, 9, 4]));
    let [Output::Compared { op: OpId(2), hashes }] = &out[..] else {
        panic!("{out:?}")
    };
    let third: Vec<_> = hashes.values().map(|hashes| hashes[2]).collect();
    assert_eq!(third, [Some(BlockHash(9)), Some(BlockHash(3))]);
    assert_eq!(bench.asked(), ["a write 3", "b write 3"]);
}

#[test]
fn what_is_written_anew_was_read_under_the_same_lock() {
    let mut bench = Bench::new("a b c");
    let (from, to) = (node("a"), nodes("a c"));
    let blocks = extent(4, 5);
    bench.check(
        1,
        Check::Rewrite {
            extent: blocks,
            from,
            to,
        },
    );
    bench.client(2, Ask::Read(extent(5, 5)));
    let late = Ask::Write {
        extent: extent(5, 5),
        fua: false,
    };
    bench.client(3, late);
    assert_eq!(bench.asked(), ["a read 1"]);
    bench.says("a", 1, Answer::Done);
    assert_eq!(bench.asked(), ["a write 1", "c write 1"]);
    // A flush meanwhile leaves marks of these blocks.
    bench.client(4, Ask::Flush);
    let (_, flush) = bench.sent[0].clone();
    assert_eq!(
        flush.work,
        Work::Flush {
            keep: blocks.blocks().collect()
        }
    );
    bench.asked();
    assert!(bench.says("a", 1, Answer::Done).is_empty());
    let out = bench.says("c", 1, Answer::Done);
    assert!(matches!(out[..], [Output::Acknowledge { op: OpId(1), .. }]), "{out:?}");
    assert_eq!(bench.asked(), ["a read 2"], "the write waits for the read before it");
}

#[test]
fn both_begin_anew_without_a_member_that_failed_and_end_with_the_copy_that_counts() {
    let mut bench = Bench::new("a b c");
    bench.check(1, Check::Compare(extent(0, 0)));
    let to = nodes("a c");
    let from = node("b");
    bench.check(
        2,
        Check::Rewrite {
            extent: extent(9, 9),
            from,
            to,
        },
    );
    assert_eq!(bench.asked(), ["a hash 1", "b hash 1", "c hash 1", "b read 2"]);
    bench.says("a", 1, hashed(&[1]));
    assert!(bench.says("c", 1, hashed(&[1])).is_empty());
    let out = bench.step(Input::MemberFailed(node("b")));
    let change = out.clone();
    bench.in_force(&change);
    assert_eq!(bench.asked(), ["a hash 1", "c hash 1"]);
    bench.says("a", 1, hashed(&[1]));
    let out = bench.says("c", 1, hashed(&[1]));
    assert!(
        matches!(&out[..], [Output::Compared { hashes, .. }] if hashes.len() == 2),
        "{out:?}"
    );
    let gone = bench.check(
        3,
        Check::Rewrite {
            extent: extent(9, 9),
            from: node("b"),
            to: nodes("a"),
        },
    );
    let denial = Denial::CopyGone;
    assert_eq!(gone, [Output::Deny { op: OpId(3), denial }]);
}

#[test]
fn a_join_that_is_paused_copies_nothing_and_gets_every_write() {
    let mut bench = Bench::new("a");
    let join = Input::Join {
        node: node("b"),
        extent: extent(0, 63),
        end: BlockIndex(63),
        blocks: 1,
        allowed: None,
    };
    let out = bench.step(join);
    bench.in_force(&out);
    let copies = bench.asked();
    assert_eq!(copies, ["a read 1", "a read 2", "a read 3", "a read 4"]);
    bench.step(Input::Pause(true));
    // What is under way ends, and nothing follows.
    for id in 1..=4 {
        bench.says("a", id, Answer::Done);
        assert_eq!(bench.asked(), [format!("b write {id}")]);
        bench.says("b", id, Answer::Done);
    }
    assert!(bench.asked().is_empty());
    let write = Ask::Write {
        extent: extent(50, 50),
        fua: false,
    };
    bench.client(1, write);
    assert_eq!(bench.asked(), ["a write 5", "b write 5"]);
    bench.says("a", 5, Answer::Done);
    bench.says("b", 5, Answer::Done);
    assert_eq!(bench.owner.copied_up_to(), Some(BlockIndex(4)));
    bench.step(Input::Pause(false));
    assert_eq!(bench.asked().len(), 4);
}
