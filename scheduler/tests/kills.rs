//! Schedulers and nats-server killed again and again under load, at moments that a seed chooses, with a snapshot at
//! every recorded digest, so that most starts go on from one.
//!
//! A handful of kills each by default. The long form: `HEARTH_KILLS=100 cargo test -p hearth-scheduler --test kills`
//! (about fifteen minutes); `HEARTH_SEED=N` repeats a run's choices.

mod common;

use std::collections::BTreeSet;
use std::time::Instant;

use common::{Process, TalkingNode, Watch, connect};
use hearth_bus::Bus;
use hearth_bus::testing::NatsServer;
use hearth_protocol::chain;
use hearth_protocol::{Event, Seq};
use hearth_scheduler::log::{Entry, EventLog, Head, RocksLog};
use hearth_scheduler::replica::Replica;
use scheduler_core::State;

/// Kills of each, when `HEARTH_KILLS` says nothing.
const KILLS: u64 = 3;

/// Messages that pass between two kills, at most: from the middle of a start to some seconds of work.
const MESSAGES_MAX: u64 = 10;

/// A snapshot with every recorded digest, so that most starts go on from one.
const ARGUMENTS: [&str; 3] = ["--dev", "--snapshot-every", "1s"];

/// The choices of a run: xorshift64.
struct Choices(u64);

impl Choices {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

/// Waits until some more messages passed.
async fn messages(watch: &mut Watch, count: u64) {
    for _ in 0..count {
        watch.until("a message", |_, _| true).await;
    }
}

/// From which snapshot each start of a scheduler went on, by what it said; 0 for none.
fn starts(said: &str) -> Vec<Seq> {
    let lines = said.lines().filter(|line| line.contains("replayed the log"));
    lines
        .map(|line| {
            let (_, rest) = line.split_once("snapshot=").expect("a start says its snapshot");
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            Seq(digits.parse().expect("a position"))
        })
        .collect()
}

/// What the stream itself gives: the chain over its bytes and the state folded from nothing, at `end`.
async fn from_the_stream(bus: &Bus, end: Seq) -> (Head, State, Vec<Entry>) {
    let mut reader = bus.log_reader(Seq(1), Vec::new());
    let (mut head, mut state, mut entries) = (Head::default(), State::default(), Vec::new());
    let deadline = tokio::time::Instant::now() + common::SOON;
    while head.seq < end {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the stream gave only {}",
            head.seq
        );
        for fetched in reader.fetch(500, common::SOON).await.unwrap_or_default() {
            if fetched.seq > end {
                break;
            }
            let entry = Entry::from_fetched(fetched).unwrap();
            let (envelope, payload) = (&entry.message.envelope, &entry.message.payload);
            head = Head {
                chain: chain::link(&head.chain, entry.seq, &chain::part(envelope), &chain::part(payload)),
                seq: entry.seq,
            };
            if let Some((envelope, event)) = &entry.event {
                state.apply(entry.seq, envelope, event);
            }
            entries.push(entry);
        }
    }
    (head, state, entries)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_kill_makes_the_log_lie() {
    let kills = number("HEARTH_KILLS").unwrap_or(KILLS);
    let seed = number("HEARTH_SEED").unwrap_or_else(|| u64::from(std::process::id()) * 0x9E37_79B9 + 1);
    println!("HEARTH_SEED={seed} HEARTH_KILLS={kills}");
    let started = Instant::now();
    let mut choices = Choices(seed.max(1));
    let dir = tempfile::tempdir().unwrap();
    let mut server = NatsServer::start(&dir.path().join("nats"));
    let start = |server: &NatsServer, id: &str| Process::start_with(server, id, &dir.path().join(id), &ARGUMENTS);
    let mut schedulers = [start(&server, "s1"), start(&server, "s2")];
    let bus = connect(&server).await;
    let mut watch = Watch::new(&bus);
    watch.ticks(1).await;
    let nodes = [
        tokio::spawn(TalkingNode::new(&bus, "n1", 1).talk()),
        tokio::spawn(TalkingNode::new(&bus, "n2", 2).talk()),
    ];
    for kill in 0..kills {
        messages(&mut watch, choices.below(MESSAGES_MAX)).await;
        let victim = choices.below(2) as usize;
        schedulers[victim].kill();
        // One time in four the server dies with it; else somewhat later.
        if choices.below(4) > 0 {
            schedulers[victim] = start(&server, &schedulers[victim].id.clone());
            messages(&mut watch, choices.below(MESSAGES_MAX)).await;
        }
        server.restart();
        if schedulers[victim].is_dead() {
            schedulers[victim] = start(&server, &schedulers[victim].id.clone());
        }
        if kill % 10 == 9 {
            println!(
                "{} kills of each in {:?}, at {}",
                kill + 1,
                started.elapsed(),
                watch.last
            );
        }
    }
    for (what, kind) in [
        ("a command", "command_given"),
        ("a digest", "digest_recorded"),
        ("a tick", "ticked"),
    ] {
        watch.until(what, |_, event| event.kind() == kind).await;
    }
    // Both have kept a snapshot of that digest by the second tick after it, and go on from it.
    watch.ticks(3).await;
    for scheduler in &mut schedulers {
        scheduler.kill();
        *scheduler = start(&server, &scheduler.id.clone());
    }
    watch.ticks(2).await;
    for node in nodes {
        assert!(!node.is_finished(), "a node gave up: {:?}", node.await);
        node.abort();
    }
    for scheduler in &mut schedulers {
        assert_eq!(scheduler.stop(), Some(0), "{}", scheduler.said());
    }

    for scheduler in &schedulers {
        let starts = starts(&scheduler.said());
        let kept = scheduler.said().matches("kept a snapshot").count();
        assert!(kept > 0, "{} kept no snapshot: {}", scheduler.id, scheduler.said());
        assert!(
            starts.last().is_some_and(|snapshot| *snapshot > Seq(0)),
            "the last start of {} folded from nothing: {starts:?}",
            scheduler.id
        );
        println!(
            "{}: {kept} snapshots kept, {} of {} starts went on from one",
            scheduler.id,
            starts.iter().filter(|snapshot| **snapshot > Seq(0)).count(),
            starts.len()
        );
        let log = RocksLog::open(&scheduler.log_dir()).unwrap();
        let verified = log.verify().unwrap();
        assert_eq!(
            (verified.bad, verified.count),
            (None, log.head().seq.0),
            "contiguous, chained"
        );
        let (head, state, entries) = from_the_stream(&bus, log.head().seq).await;
        assert_eq!(log.head(), head, "{} holds what the stream holds", scheduler.id);
        let replica = Replica::replay("auditor".parse().unwrap(), &log).unwrap();
        assert_eq!(replica.diverged(), None, "every recorded digest follows");
        assert_eq!(
            replica.state().digest(),
            state.digest(),
            "{} at {}",
            scheduler.id,
            head.seq
        );
        assert_eq!(replica.state().decisions_digest(), state.decisions_digest());
        let opened = Replica::open("auditor".parse().unwrap(), &log).unwrap();
        assert!(opened.started_at().is_some_and(|at| at > Seq(0)));
        assert_eq!(opened.state().digest(), state.digest(), "from a snapshot");
        assert_eq!(opened.state().decisions_digest(), state.decisions_digest());
        let mut seen = BTreeSet::new();
        let mut counts = std::collections::BTreeMap::<&str, u64>::new();
        for entry in &entries {
            let (envelope, event) = entry.event.as_ref().expect("every message is one of ours");
            let twice = !seen.insert((envelope.incarnation, envelope.publisher_seq));
            assert!(
                !twice,
                "{} stands in the log twice, again at {}",
                envelope.message_id(),
                entry.seq
            );
            *counts.entry(event.kind()).or_default() += 1;
        }
        let terms = entries
            .iter()
            .filter(|e| matches!(&e.event, Some((_, Event::TermStarted { .. }))))
            .count();
        println!(
            "{}: {} records, {terms} terms, {counts:?}, {} void, in {:?}",
            scheduler.id,
            head.seq,
            state.totals().void,
            started.elapsed()
        );
    }
}
