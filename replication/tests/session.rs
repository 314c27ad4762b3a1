//! One session per node, connected by hand: what it asks again and when, what it gives up, and where messages and bytes go.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::record::{Record, Run};
use hearth_protocol::{BlockIndex, Epoch, Incarnation, LeaseId, NodeId, SetVersion};
use hearth_replication::handover::HELD_WRITES_MAX;
use hearth_replication::member::{Durable, Marks};
use hearth_replication::owner::{Ask, Denial, OpId};
use hearth_replication::request::{Answer, Bytes, Nodes, Refusal, RequestId, Stamp, Work};
use hearth_replication::session::{Input, Message, Output, Replica, Session};
use hearth_replication::takeover::Setback;
use hearth_replication::time::{
    ANSWER_MS, ASK_AGAIN_MS, ASK_MS, BootMs, PUBLISH_AGAIN_MS, RAISE_AGAIN_MS, READ_LEASE_MS, RENEW_AGAIN_MS, RENEW_MS,
    SEALED_AGAIN_MS, SILENT_MS, TAKE_AGAIN_MS, TAKEOVER_WAIT_MS,
};

use common::{extent, node, nodes, rules};

fn first(members: &str) -> Aggregate {
    let stamp = Stamp {
        epoch: Epoch(1),
        lease: LeaseId(1),
        set_version: SetVersion(1),
    };
    let run = Run {
        first: BlockIndex(0),
        members: nodes(members),
        joiners: Nodes::new(),
    };
    Aggregate {
        record: Arc::new(Record::new(stamp, vec![run]).unwrap()),
        owner: None,
        ended: BTreeMap::new(),
    }
}

fn replica(record: Option<Arc<Record>>) -> Replica {
    Replica {
        store: Incarnation(5),
        durable: Durable { record, sealed: None },
        marks: Marks::new(),
        failed: false,
    }
}

fn write(block: u64) -> Ask {
    let extent = extent(block, block);
    Ask::Write { extent, fua: false }
}

/// Three nodes whose disks take no time, and whose messages arrive at once unless a node is `cut` off.
struct Bench {
    now: u64,
    sessions: BTreeMap<NodeId, Session>,
    cut: Nodes,
    /// Takes what is published, or not.
    log: bool,
    /// What each node wanted, messages to other nodes and the disk's work included.
    wanted: Vec<(NodeId, Output)>,
}

impl Bench {
    fn new(members: &str) -> Self {
        let log = first(members);
        let made = |name: &str| {
            let holds = log.record.members().contains(&node(name));
            let replica = holds.then(|| replica(Some(log.record.clone())));
            let session = Session::new(node(name), rules(), replica, log.clone());
            (node(name), session)
        };
        Self {
            now: 10_000,
            sessions: ["a", "b", "c"].map(made).into(),
            cut: Nodes::new(),
            log: true,
            wanted: Vec::new(),
        }
    }

    fn at(&self, name: &str) -> &Session {
        &self.sessions[&node(name)]
    }

    fn wanted(&mut self) -> Vec<(NodeId, Output)> {
        std::mem::take(&mut self.wanted)
    }

    fn step(&mut self, name: &str, input: Input) {
        let mut todo = vec![(node(name), input)];
        while !todo.is_empty() {
            let (at, input) = todo.remove(0);
            let session = self.sessions.get_mut(&at).unwrap();
            for output in session.step(BootMs(self.now), input) {
                self.wanted.push((at.clone(), output.clone()));
                match output {
                    Output::Perform { from, id, .. } => todo.push((at.clone(), Input::Finished { from, id, ok: true })),
                    Output::Persist(_) => todo.push((at.clone(), Input::Persisted { ok: true })),
                    Output::Send { to, message, .. } if !self.cut.contains(&to) && !self.cut.contains(&at) => {
                        let from = at.clone();
                        todo.push((to, Input::Peer { from, message }));
                    }
                    Output::Publish(change) if self.log => {
                        todo.extend(
                            self.sessions
                                .keys()
                                .map(|at| (at.clone(), Input::Logged(change.clone()))),
                        );
                    }
                    _ => {}
                }
            }
        }
    }

    /// Lets time pass on one node, each wake-up at its time.
    fn pass(&mut self, name: &str, ms: u64) {
        let end = self.now + ms;
        while let Some(at) = self.at(name).wake_at().filter(|at| at.0 <= end) {
            assert!(at.0 >= self.now, "asked to be woken {} ms ago", self.now - at.0);
            self.now = at.0;
            self.step(name, Input::Tick);
            assert!(self.at(name).wake_at() != Some(at), "woken for nothing at {at:?}");
        }
        self.now = end;
    }

    fn open(members: &str) -> Self {
        let mut bench = Self::new(members);
        bench.step("a", Input::Take { lease: LeaseId(2) });
        bench.pass("a", TAKEOVER_WAIT_MS);
        assert!(bench.at("a").is_open());
        bench.wanted();
        bench
    }

    fn ask(&mut self, name: &str, op: u64, ask: Ask) {
        self.step(name, Input::Client { op: OpId(op), ask });
    }

    /// How often each time something was wanted, in milliseconds from now, while time passes on node a.
    fn times(&mut self, ms: u64, what: impl Fn(&Output) -> bool) -> Vec<u64> {
        let began = self.now;
        let mut times = Vec::new();
        for at in 0..=ms {
            self.now = began + at;
            self.step("a", Input::Tick);
            let wanted = self.wanted();
            times.extend(wanted.iter().filter(|(_, output)| what(output)).map(|_| at));
        }
        times
    }
}

fn message(output: &Output) -> Option<(&NodeId, &Message)> {
    match output {
        Output::Send { to, message, .. } => Some((to, message)),
        _ => None,
    }
}

fn renews(output: &Output) -> bool {
    matches!(message(output), Some((_, Message::Request(request))) if matches!(request.work, Work::Renew { .. }))
}

fn answers(wanted: &[(NodeId, Output)]) -> Vec<String> {
    let text = |output: &Output| match output {
        Output::Acknowledge { op, .. } => Some(format!("{}", op.0)),
        Output::Deny { op, denial } => Some(format!("{} {denial:?}", op.0)),
        _ => None,
    };
    wanted.iter().filter_map(|(_, output)| text(output)).collect()
}

fn smaller_set(wanted: &[(NodeId, Output)]) -> Option<Nodes> {
    wanted.iter().rev().find_map(|(_, output)| match output {
        Output::Publish(Change { to, .. }) => Some(to.members()),
        _ => None,
    })
}

#[test]
fn an_attach_asks_publishes_raises_waits_and_opens() {
    let mut bench = Bench::new("a b c");
    bench.step("a", Input::Take { lease: LeaseId(2) });
    let wanted = bench.wanted();
    let told = wanted
        .iter()
        .filter(|(_, output)| matches!(message(output), Some((_, Message::Told { .. }))));
    assert_eq!(told.count(), 2, "what a says to itself does not leave it");
    assert_eq!(smaller_set(&wanted), Some(nodes("a b c")));
    assert_eq!(bench.at("a").wake_at(), Some(BootMs(bench.now + TAKEOVER_WAIT_MS)));
    bench.pass("a", TAKEOVER_WAIT_MS - 1);
    assert!(!bench.at("a").is_open());
    bench.ask("a", 1, write(3));
    assert_eq!(answers(&bench.wanted()), [""; 0], "held until it opens");
    bench.pass("a", 1);
    assert!(bench.at("a").is_open());
    assert_eq!(answers(&bench.wanted()), ["1"]);
    assert_eq!(bench.at("a").answers_until(), Some(BootMs(bench.now + 3_000)));
    assert_eq!(bench.at("b").aggregate().owner, Some(node("a")));
    assert_eq!(bench.at("b").record(), bench.at("a").record());
}

#[test]
fn who_does_not_tell_is_asked_again_and_at_last_left_out() {
    let mut bench = Bench::new("a b c");
    bench.cut = nodes("c");
    bench.step("a", Input::Take { lease: LeaseId(2) });
    assert!(smaller_set(&bench.wanted()).is_none());
    let asks = bench.times(ASK_MS - 1, |output| {
        matches!(message(output), Some((_, Message::Ask(_))))
    });
    assert_eq!(asks, [ASK_AGAIN_MS, 2 * ASK_AGAIN_MS, 3 * ASK_AGAIN_MS]);
    bench.now += 1;
    bench.step("a", Input::Tick);
    assert_eq!(smaller_set(&bench.wanted()), Some(nodes("a b")));
}

#[test]
fn an_answer_to_another_takeovers_question_does_not_count() {
    let mut bench = Bench::new("a b");
    bench.cut = nodes("b");
    bench.step("a", Input::Take { lease: LeaseId(2) });
    let standing = bench.at("b").standing().unwrap();
    for (lease, goes_on) in [(9, false), (2, true)] {
        let message = Message::Told {
            lease: LeaseId(lease),
            standing: standing.clone(),
        };
        let from = node("b");
        bench.step("a", Input::Peer { from, message });
        assert_eq!(smaller_set(&bench.wanted()).is_some(), goes_on, "{lease}");
    }
}

#[test]
fn a_log_that_is_read_behind_what_members_recorded_is_waited_for() {
    let mut bench = Bench::open("a b c");
    bench.step("a", Input::Seal { to: None });
    // c has not read any of this, but every member recorded it.
    let late = Session::new(node("c"), rules(), Some(replica(None)), first("a b c"));
    bench.sessions.insert(node("c"), late);
    let change = |bench: &Bench| Change {
        by: node("a"),
        from: first("a b c").record.stamp(),
        to: bench.at("a").aggregate().record.clone(),
        stale: None,
    };
    bench.wanted();
    bench.step("c", Input::Take { lease: LeaseId(3) });
    let wanted = bench.wanted();
    assert!(smaller_set(&wanted).is_none() && !wanted.iter().any(|(_, out)| matches!(out, Output::GivenUp(_))));
    let change = change(&bench);
    bench.step("c", Input::Logged(change));
    let wanted = bench.wanted();
    let rival = Output::GivenUp(Setback::Overtaken);
    assert!(wanted.iter().any(|(_, out)| *out == rival), "{wanted:?}");
}

#[test]
fn a_change_is_published_again_until_the_log_shows_it() {
    let mut bench = Bench::new("a");
    bench.log = false;
    bench.step("a", Input::Take { lease: LeaseId(2) });
    let Some((_, Output::Publish(change))) = bench.wanted().pop() else {
        panic!("nothing published");
    };
    let publishes = |output: &Output| matches!(output, Output::Publish(_));
    let again = bench.times(2 * PUBLISH_AGAIN_MS, publishes);
    assert_eq!(again, [PUBLISH_AGAIN_MS, 2 * PUBLISH_AGAIN_MS]);
    bench.step("a", Input::Logged(change));
    assert_eq!(bench.times(2 * PUBLISH_AGAIN_MS, publishes), [0; 0]);
}

#[test]
fn a_record_is_asked_for_again_and_at_last_given_up() {
    let mut bench = Bench::new("a b");
    bench.log = false;
    bench.step("a", Input::Take { lease: LeaseId(2) });
    let Some((_, Output::Publish(change))) = bench.wanted().pop() else {
        panic!("nothing published");
    };
    bench.cut = nodes("b");
    bench.step("a", Input::Logged(change));
    bench.wanted();
    let raises = bench.times(ANSWER_MS - 1, |output| {
        matches!(message(output), Some((_, Message::Raise { .. })))
    });
    assert_eq!(raises, [1, 2, 3, 4, 5].map(|times| times * RAISE_AGAIN_MS));
    bench.now += 1;
    bench.step("a", Input::Tick);
    let gone = Output::GivenUp(Setback::MemberLost { node: node("b") });
    assert!(bench.wanted().contains(&(node("a"), gone)));
}

#[test]
fn leases_are_renewed_and_missing_ones_sooner() {
    let mut bench = Bench::open("a b");
    let answered = bench.times(3 * RENEW_MS, renews);
    assert_eq!(answered, [1, 2, 3].map(|times| times * RENEW_MS));
    bench.cut = nodes("b");
    let missing = bench.times(3 * RENEW_MS, renews);
    assert_eq!(missing, [1, 2, 3].map(|times| times * RENEW_MS), "it holds for T");
    let missing = bench.times(RENEW_MS, renews);
    assert_eq!(missing, [1, 2, 3, 4].map(|times| times * RENEW_AGAIN_MS));
    bench.cut.clear();
    bench.pass("a", RENEW_AGAIN_MS);
    assert!(bench.at("a").answers_until() > Some(BootMs(bench.now)));
}

#[test]
fn a_lost_connection_costs_the_member_only_with_something_under_way() {
    let mut bench = Bench::open("a b c");
    bench.step("a", Input::Lost(node("b")));
    let wanted = bench.wanted();
    assert!(smaller_set(&wanted).is_none() && wanted.is_empty());
    bench.pass("a", RENEW_AGAIN_MS);
    assert!(bench.wanted().iter().any(|(_, output)| renews(output)));
    bench.cut = nodes("b");
    bench.ask("a", 1, write(0));
    assert_eq!(answers(&bench.wanted()), [""; 0]);
    bench.step("a", Input::Lost(node("b")));
    let wanted = bench.wanted();
    assert_eq!(smaller_set(&wanted), Some(nodes("a c")));
    assert_eq!(answers(&wanted), ["1"]);
}

#[test]
fn a_silent_member_is_given_up_and_the_last_one_is_not() {
    let mut bench = Bench::open("a b");
    bench.cut = nodes("b");
    bench.ask("a", 1, write(0));
    bench.pass("a", ANSWER_MS - 1);
    assert_eq!(answers(&bench.wanted()), [""; 0]);
    bench.pass("a", 1);
    assert_eq!(answers(&bench.wanted()), ["1"]);

    let mut bench = Bench::open("b");
    bench.cut = nodes("b");
    bench.ask("a", 1, write(0));
    bench.pass("a", 3 * SILENT_MS);
    assert!(bench.at("a").is_open());
    assert_eq!(answers(&bench.wanted()), [""; 0]);
}

#[test]
fn a_lease_that_stays_away_while_clients_wait_costs_the_member() {
    let mut bench = Bench::open("a b");
    bench.cut = nodes("b");
    bench.pass("a", 3 * SILENT_MS);
    assert!(smaller_set(&bench.wanted()).is_none(), "nobody waits");
    // A read needs no answer of b, only its lease.
    bench.ask("a", 1, Ask::Read(extent(0, 0)));
    bench.pass("a", SILENT_MS);
    let wanted = bench.wanted();
    assert_eq!(smaller_set(&wanted), Some(nodes("a")));
    assert_eq!(answers(&wanted), ["1"]);
}

#[test]
fn a_node_that_stood_still_gives_nobody_up_for_it() {
    let mut bench = Bench::open("a b");
    bench.cut = nodes("b");
    bench.ask("a", 1, write(0));
    bench.now += 10 * ANSWER_MS;
    bench.step("a", Input::Tick);
    bench.pass("a", ANSWER_MS - 1);
    assert!(smaller_set(&bench.wanted()).is_none());
    bench.pass("a", 1);
    assert_eq!(smaller_set(&bench.wanted()), Some(nodes("a")));
}

#[test]
fn a_hand_over_holds_writes_and_is_said_until_the_log_shows_it() {
    let mut bench = Bench::open("a b");
    bench.step("b", Input::Incoming { lease: LeaseId(3) });
    bench.ask("b", 1, Ask::Read(extent(0, 0)));
    let through = Output::ReadThrough {
        op: OpId(1),
        owner: node("a"),
    };
    assert_eq!(bench.wanted(), [(node("b"), through)]);
    bench.ask("b", 4, Ask::Flush);
    assert_eq!(answers(&bench.wanted()), ["4"], "nothing was written here");
    bench.ask("b", 2, write(0));
    bench.cut = nodes("b");
    bench.step("a", Input::Seal { to: Some(node("b")) });
    let epoch = Epoch(2);
    let ended = Output::Ended(Denial::Sealed { epoch });
    assert!(bench.wanted().contains(&(node("a"), ended)));
    let says = |output: &Output| matches!(message(output), Some((_, Message::Sealed { .. })));
    let again = bench.times(2 * SEALED_AGAIN_MS, says);
    assert_eq!(again, [SEALED_AGAIN_MS, 2 * SEALED_AGAIN_MS]);
    bench.cut.clear();
    bench.pass("a", SEALED_AGAIN_MS);
    assert!(bench.at("b").is_open(), "a seal spares the wait");
    assert_eq!(answers(&bench.wanted()), ["2"]);
    assert_eq!(bench.at("a").wake_at(), None, "nothing is said any more");
    bench.ask("a", 3, write(0));
    assert_eq!(answers(&bench.wanted()), ["3 Sealed { epoch: Epoch(2) }"]);
}

#[test]
fn a_destination_that_was_overtaken_hears_the_next_seal() {
    let mut bench = Bench::open("a b");
    bench.step("b", Input::Incoming { lease: LeaseId(30) });
    bench.ask("b", 1, write(0));
    bench.log = false;
    bench.step("a", Input::Seal { to: Some(node("b")) });
    assert_eq!(
        smaller_set(&bench.wanted()),
        Some(nodes("a b")),
        "b asks for the next epoch"
    );
    // It took too long: the source has the image back.
    bench.log = true;
    bench.step("a", Input::Take { lease: LeaseId(3) });
    bench.pass("a", ASK_MS);
    assert!(bench.at("a").is_open());
    let overtaken = Output::GivenUp(Setback::Overtaken);
    assert!(bench.wanted().contains(&(node("b"), overtaken)));
    bench.ask("b", 2, Ask::Read(extent(4, 4)));
    let through = bench.wanted();
    assert!(matches!(through[..], [(_, Output::ReadThrough { .. })]), "{through:?}");
    // The hand-over is tried again.
    bench.step("a", Input::Seal { to: Some(node("b")) });
    assert!(bench.at("b").is_open());
    assert_eq!(answers(&bench.wanted()), ["1"]);
}

/// A hand-over of a to b whose epoch is in the log, and that b gave up because a did not answer.
fn decided_and_given_up(members: &str) -> Bench {
    let mut bench = Bench::open(members);
    bench.step("b", Input::Incoming { lease: LeaseId(30) });
    bench.ask("b", 1, write(0));
    bench.log = false;
    bench.step("a", Input::Seal { to: Some(node("b")) });
    let Some((_, Output::Publish(change))) = bench.wanted().pop() else {
        panic!("nothing published");
    };
    bench.cut = nodes("a");
    bench.log = true;
    for name in ["a", "b", "c"] {
        bench.step(name, Input::Logged(change.clone()));
    }
    bench.pass("b", ANSWER_MS);
    let lost = Output::GivenUp(Setback::MemberLost { node: node("a") });
    assert!(bench.wanted().contains(&(node("b"), lost)));
    bench
}

#[test]
fn a_hand_over_that_the_log_has_decided_is_carried_out_by_the_destination_alone() {
    let mut bench = decided_and_given_up("a b");
    assert_eq!(bench.at("b").aggregate().owner, Some(node("b")));
    assert_eq!(bench.at("a").wake_at(), None, "the source has done its part");
    bench.pass("b", TAKE_AGAIN_MS + ASK_MS);
    assert_eq!(
        smaller_set(&bench.wanted()),
        Some(nodes("b")),
        "without the member that does not answer"
    );
    // Its epoch before did not open, so it is no seal.
    bench.pass("b", TAKEOVER_WAIT_MS - 1);
    assert!(!bench.at("b").is_open());
    bench.pass("b", 1);
    assert!(bench.at("b").is_open());
    assert_eq!(answers(&bench.wanted()), ["1"]);
}

#[test]
fn an_epoch_that_arrives_in_the_log_after_its_takeover_gave_up_is_followed_by_another() {
    let mut bench = Bench::open("a b");
    bench.step("b", Input::Incoming { lease: LeaseId(30) });
    bench.log = false;
    bench.step("a", Input::Seal { to: Some(node("b")) });
    let Some((_, Output::Publish(change))) = bench.wanted().pop() else {
        panic!("nothing published");
    };
    let log = bench.at("b").aggregate().clone();
    bench.step("b", Input::RolledBack);
    bench.step("b", Input::Rebased(log));
    bench.log = true;
    for name in ["a", "b"] {
        bench.step(name, Input::Logged(change.clone()));
    }
    bench.pass("b", ASK_MS + TAKEOVER_WAIT_MS);
    assert!(bench.at("b").is_open());
}

#[test]
fn a_destination_waits_while_the_log_is_rolled_back_and_ends_if_its_guest_would_lose_writes() {
    let mut bench = decided_and_given_up("a b");
    let log = bench.at("b").aggregate().clone();
    bench.step("b", Input::RolledBack);
    bench.pass("b", 10 * TAKE_AGAIN_MS);
    assert!(bench.wanted().is_empty());
    bench.step("b", Input::Rebased(log.clone()));
    bench.pass("b", ASK_MS);
    assert_eq!(smaller_set(&bench.wanted()), Some(nodes("b")));

    // The only copy that answers was in another life of its store when the guest wrote.
    let mut bench = decided_and_given_up("a c");
    let mut lost = replica(Some(bench.at("c").standing().unwrap().record.unwrap()));
    lost.store = Incarnation(6);
    lost.marks.insert(BlockIndex(0), Incarnation(5));
    bench
        .sessions
        .insert(node("c"), Session::new(node("c"), rules(), Some(lost), log_of(&bench)));
    bench.pass("b", TAKE_AGAIN_MS + ASK_MS);
    let wanted = bench.wanted();
    assert!(
        wanted.contains(&(node("b"), Output::Ended(Denial::NoMember))),
        "{wanted:?}"
    );
    assert_eq!(answers(&wanted), ["1 NoMember"]);
}

fn log_of(bench: &Bench) -> Aggregate {
    bench.at("b").aggregate().clone()
}

#[test]
fn who_attaches_the_image_at_a_destination_that_takes_over_again_is_heard() {
    let mut bench = decided_and_given_up("a b");
    bench.log = false;
    bench.pass("b", TAKE_AGAIN_MS + ASK_MS);
    bench.log = true;
    bench.wanted();
    bench.step("b", Input::Take { lease: LeaseId(4) });
    bench.pass("b", ASK_MS + TAKEOVER_WAIT_MS);
    assert!(bench.at("b").is_open());
    assert_eq!(bench.at("b").record().unwrap().grant().1, LeaseId(4));
}

#[test]
fn a_flush_at_a_destination_waits_for_what_was_written_there_before() {
    let mut bench = Bench::open("a b");
    bench.cut = nodes("b");
    bench.step("b", Input::Take { lease: LeaseId(3) });
    bench.ask("b", 1, write(0));
    bench.step("b", Input::RolledBack);
    let log = bench.at("b").aggregate().clone();
    bench.step("b", Input::Rebased(log));
    bench.step("b", Input::Incoming { lease: LeaseId(4) });
    bench.wanted();
    bench.ask("b", 2, Ask::Flush);
    assert_eq!(answers(&bench.wanted()), [""; 0], "the write is still held");
}

#[test]
fn what_waits_for_an_image_is_bounded_and_ends_with_it() {
    let mut bench = Bench::new("a b");
    bench.ask("a", 0, write(0));
    assert_eq!(answers(&bench.wanted()), ["0 Detached"]);
    bench.cut = nodes("b");
    bench.step("a", Input::Take { lease: LeaseId(2) });
    for op in 1..=u64::from(HELD_WRITES_MAX) + 1 {
        bench.ask("a", op, write(0));
    }
    assert_eq!(answers(&bench.wanted()), [format!("{} Full", HELD_WRITES_MAX + 1)]);
    bench.step("a", Input::Seal { to: None });
    let wanted = bench.wanted();
    assert_eq!(answers(&wanted).len(), HELD_WRITES_MAX as usize);
    assert!(wanted.contains(&(node("a"), Output::Ended(Denial::Detached))));
}

#[test]
fn a_rolled_back_log_stops_changes_until_it_is_recovered() {
    let mut bench = Bench::open("a b");
    let good = bench.at("a").aggregate().clone();
    bench.step("a", Input::RolledBack);
    bench.cut = nodes("b");
    bench.ask("a", 1, write(0));
    bench.pass("a", 2 * ANSWER_MS);
    assert!(smaller_set(&bench.wanted()).is_none());
    bench.step("a", Input::Rebased(good));
    let wanted = bench.wanted();
    assert_eq!(smaller_set(&wanted), Some(nodes("a")));
    assert_eq!(answers(&wanted), ["1"]);

    let mut bench = Bench::new("a b");
    bench.step("a", Input::RolledBack);
    bench.step("a", Input::Take { lease: LeaseId(2) });
    let back = Output::GivenUp(Setback::RolledBack { node: node("a") });
    assert_eq!(bench.wanted(), [(node("a"), back)]);
}

#[test]
fn without_the_log_a_healthy_image_goes_on_and_an_unsafe_one_waits() {
    let mut bench = Bench::open("a b");
    bench.log = false;
    // A change that nobody decides any more holds nothing up.
    bench.step("c", Input::Prepare(replica(None)));
    let join = Input::Join {
        node: node("c"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(9),
        blocks: 2,
        allowed: None,
    };
    bench.step("a", join);
    bench.wanted();
    for op in 0..10 {
        bench.ask("a", 3 * op, write(op));
        bench.ask("a", 3 * op + 1, Ask::Read(extent(op, op)));
        bench.ask("a", 3 * op + 2, Ask::Flush);
        let answered = [0, 1, 2].map(|part| (3 * op + part).to_string());
        assert_eq!(answers(&bench.wanted()), answered);
        bench.pass("a", SILENT_MS);
        bench.wanted();
    }
    bench.cut = nodes("b");
    bench.pass("a", READ_LEASE_MS);
    bench.ask("a", 100, write(0));
    bench.ask("a", 101, Ask::Read(extent(4, 4)));
    bench.ask("a", 102, Ask::Flush);
    bench.pass("a", 600_000);
    assert_eq!(answers(&bench.wanted()), [""; 0], "b may be taken over without this");
    bench.log = true;
    bench.pass("a", ANSWER_MS + PUBLISH_AGAIN_MS);
    let mut answered = answers(&bench.wanted());
    answered.sort();
    assert_eq!(answered, ["100", "101", "102"]);
    assert_eq!(bench.at("a").record().unwrap().members(), nodes("a c"));
}

#[test]
fn bytes_come_from_where_they_are_said_to_come_from() {
    let mut bench = Bench::open("a b");
    bench.ask("a", 1, write(4));
    let wanted = bench.wanted();
    let bytes = |at: &str| {
        wanted.iter().find_map(|(of, output)| match output {
            Output::Perform { bytes, .. } if *of == node(at) => Some(bytes.clone()),
            _ => None,
        })
    };
    assert_eq!(bytes("a"), Some(Bytes::OfClient(OpId(1))));
    assert_eq!(bytes("b"), Some(Bytes::OfRequest));
    let sent = wanted.iter().find_map(|(_, output)| match output {
        Output::Send {
            message: Message::Request(_),
            bytes,
            ..
        } => Some(bytes.clone()),
        _ => None,
    });
    assert_eq!(sent, Some(Bytes::OfClient(OpId(1))));
    bench.ask("a", 2, Ask::Read(extent(4, 4)));
    let acknowledged = |wanted: &[(NodeId, Output)]| {
        wanted.iter().find_map(|(_, output)| match output {
            Output::Acknowledge { bytes, .. } => Some(bytes.clone()),
            _ => None,
        })
    };
    let Some(Bytes::OfAnswer { from, .. }) = acknowledged(&bench.wanted()) else {
        panic!("a read without bytes");
    };
    assert_eq!(from, node("a"));

    let mut bench = Bench::open("b");
    bench.ask("a", 1, Ask::Read(extent(4, 4)));
    let wanted = bench.wanted();
    let (from, id) = (node("b"), RequestId(2));
    assert_eq!(acknowledged(&wanted), Some(Bytes::OfAnswer { from, id }));
    let work = Bytes::OfWork { from: node("a"), id };
    let answer = wanted.iter().any(
        |(_, output)| matches!(output, Output::Send { message: Message::Answer { .. }, bytes, .. } if *bytes == work),
    );
    assert!(answer, "{wanted:?}");
}

#[test]
fn a_join_is_cancelled_until_the_node_counts_and_can_begin_again() {
    let mut bench = Bench::open("a");
    bench.step("b", Input::Prepare(replica(None)));
    let join = || Input::Join {
        node: node("b"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(2),
        blocks: 2,
        allowed: None,
    };
    // It does not answer, so it is no member soon.
    bench.cut = nodes("b");
    bench.step("a", join());
    assert!(bench.at("a").owner().unwrap().join().is_some());
    // Another node's name cancels nothing.
    bench.step("a", Input::Cancel(node("c")));
    assert!(bench.at("a").owner().unwrap().join().is_some());
    bench.wanted();
    bench.step("a", Input::Cancel(node("b")));
    let failed = Output::NotChanged {
        node: node("b"),
        denial: Denial::JoinerFailed,
    };
    assert!(bench.wanted().contains(&(node("a"), failed)));
    assert!(bench.at("a").owner().unwrap().join().is_none());
    assert_eq!(bench.at("a").record().unwrap().everyone(), nodes("a"));
    bench.cut.clear();
    bench.ask("a", 1, write(0));
    assert_eq!(answers(&bench.wanted()), ["1"]);
    // Anew, and to its end; then there is nothing to cancel.
    bench.step("a", join());
    bench.pass("a", RENEW_AGAIN_MS);
    assert!(bench.wanted().contains(&(node("a"), Output::Joined(node("b")))));
    bench.step("a", Input::Cancel(node("b")));
    assert_eq!(bench.at("a").record().unwrap().members(), nodes("a b"));
}

#[test]
fn a_node_is_prepared_joins_and_leaves() {
    let mut bench = Bench::open("a");
    let join = |end| Input::Join {
        node: node("b"),
        extent: extent(0, u64::MAX),
        end: BlockIndex(end),
        blocks: 2,
        allowed: None,
    };
    bench.step("a", join(2));
    let wanted = bench.wanted();
    let failed = Output::NotChanged {
        node: node("b"),
        denial: Denial::JoinerFailed,
    };
    assert!(wanted.contains(&(node("a"), failed)), "it holds no copy");
    let refused = wanted.iter().any(|(_, output)| {
        matches!(
            message(output),
            Some((
                _,
                Message::NotRaised {
                    refusal: Refusal::NoRecord,
                    ..
                }
            ))
        )
    });
    assert!(refused);
    bench.step("b", Input::Prepare(replica(None)));
    bench.step("a", join(2));
    bench.pass("a", RENEW_AGAIN_MS);
    let wanted = bench.wanted();
    assert!(wanted.contains(&(node("a"), Output::Joined(node("b")))), "{wanted:?}");
    let copies = wanted.iter().filter(
        |(_, output)| matches!(output, Output::Send { bytes: Bytes::OfAnswer { from, .. }, .. } if *from == node("a")),
    );
    assert_eq!(copies.count(), 2, "three blocks, two at a time");
    bench.ask("a", 1, write(0));
    assert_eq!(answers(&bench.wanted()), ["1"]);
    bench.step("a", Input::Leave(node("b")));
    let wanted = bench.wanted();
    assert!(wanted.contains(&(node("a"), Output::Left(node("b")))));
    assert!(wanted.contains(&(node("b"), Output::Forget)));
    assert_eq!(bench.at("b").standing(), None);
    let work = Work::Read(extent(0, 0));
    let from = node("a");
    let request = hearth_replication::request::Request {
        id: RequestId(99),
        stamp: bench.at("a").record().unwrap().stamp(),
        store: Incarnation(5),
        work,
    };
    let message = Message::Request(request);
    bench.step("b", Input::Peer { from, message });
    let refused = bench.wanted().iter().any(|(_, output)| {
        let refusal = Answer::Refused(Refusal::NoRecord);
        matches!(output, Output::Send { message: Message::Answer { answer, .. }, .. } if *answer == refusal)
    });
    assert!(refused);
}

#[test]
fn an_owner_without_a_copy_hands_over() {
    let mut bench = Bench::open("b c");
    bench.step("b", Input::Incoming { lease: LeaseId(3) });
    bench.step("a", Input::Seal { to: Some(node("b")) });
    assert!(bench.at("b").is_open());
}
