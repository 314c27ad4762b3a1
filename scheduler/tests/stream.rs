//! The stream at its worst, on the real server: full, repeated beyond the window in which the server knows repeats,
//! out of order, and read by a scheduler that stood still.

mod common;

use std::process::Command;

use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context};
use common::{Process, Scene, TalkingNode};
use hearth_bus::testing::{NatsServer, eventually};
use hearth_bus::{Bus, Fetched, PublishError};
use hearth_protocol::{Event, NodeId, Seq, subject};
use hearth_scheduler::log::{EventLog, RocksLog};
use hearth_scheduler::replica::Replica;
use hearth_scheduler::verify::verify_log;
use scheduler_core::State;

async fn raw(server: &NatsServer) -> Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

async fn set(raw: &Context, change: impl FnOnce(&mut Config)) {
    let mut stream = raw.get_stream(subject::LOG_STREAM).await.unwrap();
    let mut config = stream.info().await.unwrap().config.clone();
    change(&mut config);
    raw.update_stream(config).await.unwrap();
}

fn sound(log: &RocksLog) -> Replica {
    let verified = verify_log(log, &[]).unwrap();
    assert!(verified.verified, "{verified:#?}");
    let replica = Replica::replay("auditor".parse().unwrap(), log).unwrap();
    assert_eq!(replica.diverged(), None);
    replica
}

async fn all(bus: &Bus) -> Vec<Fetched> {
    let last = bus.bounds().await.unwrap().last;
    let mut reader = bus.log_reader(Seq(1), Vec::new());
    let mut messages = Vec::new();
    while messages.last().is_none_or(|m: &Fetched| m.seq < last) {
        messages.extend(reader.fetch(500, common::SOON).await.unwrap());
    }
    messages
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_refuses_changes_with_words_and_goes_on_when_there_is_room() {
    let Scene {
        dir: _dir,
        server,
        mut s1,
        bus,
        mut watch,
    } = Scene::start().await;
    watch.ticks(1).await;
    let raw = raw(&server).await;
    set(&raw, |config| config.max_bytes = 1).await;
    eventually("the scheduler to say why it does not tick", || async {
        s1.said().contains("maximum bytes exceeded").then_some(())
    })
    .await;
    let full_at = bus.bounds().await.unwrap().last;
    // Whoever changes something hears it at once, and it is not in the log.
    let node = TalkingNode::new(&bus, "n1", 1);
    let own: NodeId = "n1".parse().unwrap();
    let publisher = hearth_bus::LogPublisher::new(
        bus.clone(),
        hearth_protocol::Publisher::Node(own.clone()),
        hearth_bus::new_incarnation(),
    );
    match publisher
        .publish(subject::node(&own), &Event::NodeLeft { node: own.clone() })
        .await
    {
        Err(PublishError::Refused { description, .. }) => {
            assert!(description.contains("maximum bytes"), "{description}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bus.bounds().await.unwrap().last, full_at);
    set(&raw, |config| config.max_bytes = -1).await;
    let talking = tokio::spawn(node.talk());
    watch
        .until("a command", |_, event| matches!(event, Event::CommandGiven(_)))
        .await;
    talking.abort();
    assert_eq!(s1.stop(), Some(0));
    let log = RocksLog::open(&s1.log_dir()).unwrap();
    let replica = sound(&log);
    // The refused number was used by the next event: no repeat, no gap.
    assert_eq!(replica.state().totals().repeats, 0);
}

/// What a message that comes again, late and in another order does: nothing.
#[tokio::test(flavor = "multi_thread")]
async fn messages_repeated_beyond_the_window_and_out_of_order_change_nothing() {
    let Scene {
        dir: _dir,
        server,
        mut s1,
        bus,
        mut watch,
    } = Scene::start().await;
    let talking = tokio::spawn(TalkingNode::new(&bus, "n1", 1).talk());
    watch
        .until("a result", |_, event| matches!(event, Event::CommandFinished { .. }))
        .await;
    let raw = raw(&server).await;
    set(&raw, |config| {
        config.duplicate_window = std::time::Duration::from_millis(100)
    })
    .await;
    let first: Vec<Fetched> = all(&bus).await;
    let again = |message: &Fetched| {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", message.message_id.clone().unwrap().as_str());
        raw.publish_with_headers(message.subject.clone(), headers, message.frame.clone())
    };
    // Until the server has forgotten them; newest first, so that every order is wrong.
    let mut repeated = 0;
    for message in first.iter().rev() {
        eventually("the server to take a message again", || async {
            let answer = again(message).await.unwrap().await.unwrap();
            (!answer.duplicate).then_some(())
        })
        .await;
        repeated += 1;
    }
    // Everybody goes on, and says so behind the repeats.
    let last = bus.bounds().await.unwrap().last;
    watch
        .until(
            "a digest behind the repeats",
            |_, event| matches!(event, Event::DigestRecorded { at, .. } if *at > last),
        )
        .await;
    talking.abort();
    assert_eq!(s1.stop(), Some(0));
    let log = RocksLog::open(&s1.log_dir()).unwrap();
    let replica = sound(&log);
    let totals = replica.state().totals();
    assert!(totals.repeats >= repeated, "{} of {repeated} counted", totals.repeats);

    // The state is that of a log without them.
    let (mut state, mut seen) = (State::default(), std::collections::BTreeSet::new());
    log.scan(Seq(1), &mut |record| {
        let (envelope, event) = record.event().unwrap();
        if seen.insert((envelope.incarnation, envelope.publisher_seq)) {
            state.apply(record.seq, &envelope, &event);
        }
        true
    })
    .unwrap();
    let with = scheduler_core::view(replica.state());
    let mut without = scheduler_core::view(&state);
    assert_eq!(state.decisions_digest(), replica.state().decisions_digest());
    assert_eq!(
        (without.totals.blocks_promoted, without.totals.void),
        (totals.blocks_promoted, totals.void)
    );
    // Counters of messages differ, and so must the digest, which covers them.
    without.totals = with.totals;
    without.digest = with.digest.clone();
    assert_eq!(with, without);
}

fn signal(process: &Process, signal: &str) {
    let pid = process.pid().unwrap().to_string();
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
}

/// A scheduler that stands still reads nothing, misses its ticks, loses its term, and catches up by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_that_stood_still_loses_its_term_and_catches_up() {
    let Scene {
        dir,
        server,
        mut s1,
        bus,
        mut watch,
    } = Scene::start().await;
    let mut s2 = Process::start(&server, "s2", &dir.path().join("s2"));
    let talking = tokio::spawn(TalkingNode::new(&bus, "n1", 1).talk());
    watch.ticks(2).await;
    signal(&s1, "-STOP");
    watch
        .until("a term of s2", |envelope, event| {
            envelope.publisher.token() == "scheduler-s2" && matches!(event, Event::TermStarted { .. })
        })
        .await;
    // A thousand messages that a reader who stands still does not take.
    let own: NodeId = "n2".parse().unwrap();
    let publisher = hearth_bus::LogPublisher::new(
        bus.clone(),
        hearth_protocol::Publisher::Node(own.clone()),
        hearth_bus::new_incarnation(),
    );
    for _ in 0..1_000 {
        publisher
            .publish(subject::node(&own), &Event::NodeLeft { node: own.clone() })
            .await
            .unwrap();
    }
    let behind = watch.ticks(1).await;
    signal(&s1, "-CONT");
    eventually("s1 to step down", || async {
        s1.said().contains("leads no more").then_some(())
    })
    .await;
    watch.ticks(1).await;
    talking.abort();
    eventually("s1 to catch up", || async {
        let reader = RocksLog::open_reader(&s1.log_dir()).ok()?;
        (reader.head().seq > behind).then_some(())
    })
    .await;
    assert_eq!((s1.stop(), s2.stop()), (Some(0), Some(0)));
    let (one, two) = (
        RocksLog::open(&s1.log_dir()).unwrap(),
        RocksLog::open(&s2.log_dir()).unwrap(),
    );
    sound(&one);
    sound(&two);
    let common = one.head().seq.min(two.head().seq);
    assert_eq!(one.get(common).unwrap(), two.get(common).unwrap());
}
