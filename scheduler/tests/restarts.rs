//! Processes that are killed: schedulers and nats-server in any order under load, rollbacks, lost tails.

mod common;

use std::path::Path;

use common::{Process, Scene, TalkingNode, Watch, connect};
use hearth_bus::settings::Wanted;
use hearth_bus::testing::{NatsServer, ServerSetup, copy_dir, eventually};
use hearth_bus::{LogPublisher, new_incarnation};
use hearth_protocol::{Event, Publisher, Seq, subject};
use hearth_scheduler::log::{EventLog, RocksLog};
use hearth_scheduler::replica::Replica;

/// Replays a log from nothing; contiguous, chained, and of one mind with every recorded digest.
fn replay(dir: &Path) -> (RocksLog, Replica) {
    let log = RocksLog::open(dir).unwrap();
    let verified = log.verify().unwrap();
    assert_eq!(verified.bad, None);
    assert_eq!(verified.count, log.head().seq.0);
    let replica = Replica::replay("auditor".parse().unwrap(), &log).unwrap();
    assert_eq!(replica.diverged(), None);
    (log, replica)
}

/// The state's digest at a position of a log.
fn digest_at(log: &RocksLog, end: Seq) -> ([u8; 32], [u8; 32]) {
    let mut state = scheduler_core::State::default();
    log.scan(Seq(1), &mut |record| {
        if let Some((envelope, event)) = record.event() {
            state.apply(record.seq, &envelope, &event);
        }
        record.seq < end
    })
    .unwrap();
    (state.digest(), state.decisions_digest())
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_killed_in_turn_under_load_and_all_logs_agree() {
    let Scene {
        dir,
        mut server,
        mut s1,
        bus,
        mut watch,
    } = Scene::start().await;
    let at = |name: &str| dir.path().join(name);
    let mut s2 = Process::start(&server, "s2", &at("s2"));
    let nodes = [
        tokio::spawn(TalkingNode::new(&bus, "n1", 1).talk()),
        tokio::spawn(TalkingNode::new(&bus, "n2", 2).talk()),
    ];
    watch
        .until("a command", |_, event| matches!(event, Event::CommandGiven(_)))
        .await;
    // The leader, the server, both schedulers, server and leader at once.
    s1.kill();
    watch.ticks(2).await;
    s1 = Process::start(&server, "s1", &at("s1"));
    server.restart();
    watch.ticks(2).await;
    s1.kill();
    s2.kill();
    s1 = Process::start(&server, "s1", &at("s1"));
    s2 = Process::start(&server, "s2", &at("s2"));
    watch.ticks(2).await;
    server.kill();
    s2.kill();
    s1.kill();
    s2 = Process::start(&server, "s2", &at("s2"));
    server.restart();
    s1 = Process::start(&server, "s1", &at("s1"));
    watch
        .until("a command after all of it", |_, event| {
            matches!(event, Event::CommandGiven(_))
        })
        .await;
    watch
        .until("a recorded digest", |_, event| {
            matches!(event, Event::DigestRecorded { .. })
        })
        .await;
    watch.ticks(1).await;
    for node in nodes {
        node.abort();
    }
    assert_eq!(s1.stop(), Some(0), "{}", s1.said());
    assert_eq!(s2.stop(), Some(0), "{}", s2.said());

    // A third one starts from an empty directory and refills from the stream.
    let end = bus.bounds().await.unwrap().last;
    let mut s3 = Process::start(&server, "s3", &at("s3"));
    let mut refilled = Watch::new(&bus);
    let s3_leads = |envelope: &hearth_protocol::Envelope, event: &Event| {
        envelope.publisher.token() == "scheduler-s3" && matches!(event, Event::Ticked { .. })
    };
    refilled.until("s3 to lead", s3_leads).await;
    assert_eq!(s3.stop(), Some(0), "{}", s3.said());

    let (log3, _) = replay(&s3.log_dir());
    assert!(log3.head().seq >= end);
    for process in [&s1, &s2] {
        let (log, replica) = replay(&process.log_dir());
        let end = log.head().seq;
        assert_eq!(log3.get(end).unwrap(), log.get(end).unwrap(), "one chain");
        let replayed = (replica.state().digest(), replica.state().decisions_digest());
        assert_eq!(replayed, digest_at(&log3, end), "{} at {end}", process.id);
        assert!(replica.state().totals().blocks_promoted > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_stream_freezes_the_scheduler_until_it_is_restored() {
    let Scene {
        dir,
        mut server,
        mut s1,
        bus: _bus,
        mut watch,
    } = Scene::start().await;
    let store = dir.path().join("nats/js");
    let (early, whole) = (dir.path().join("early"), dir.path().join("whole"));
    watch.ticks(1).await;
    server.kill();
    copy_dir(&store, &early);
    server.restart();
    watch.ticks(3).await;
    s1.kill();
    server.kill();
    copy_dir(&store, &whole);
    std::fs::remove_dir_all(&store).unwrap();
    copy_dir(&early, &store);
    server.restart();

    // Rolled back: it says so and adds nothing.
    let bus = connect(&server).await;
    let before = bus.bounds().await.unwrap().last;
    s1 = Process::start(&server, "s1", &dir.path().join("s1"));
    said(&s1, "it was rolled back").await;
    assert_eq!(bus.bounds().await.unwrap().last, before);

    // Rolled back and gone on: the length alone does not show it.
    s1.kill();
    let other = LogPublisher::new(bus.clone(), Publisher::Node("n1".parse().unwrap()), new_incarnation());
    let node = "n1".parse().unwrap();
    for _ in 0..30 {
        other
            .publish(subject::node(&node), &Event::NodeLeft { node: node.clone() })
            .await
            .unwrap();
    }
    let before = bus.bounds().await.unwrap().last;
    s1 = Process::start(&server, "s1", &dir.path().join("s1"));
    said(&s1, "holds another message").await;
    assert_eq!(bus.bounds().await.unwrap().last, before);

    // Restored: it goes on by itself.
    server.kill();
    std::fs::remove_dir_all(&store).unwrap();
    copy_dir(&whole, &store);
    server.restart();
    let mut watch = Watch::new(&connect(&server).await);
    watch
        .until("a new term", |_, event| event.term().is_some_and(|term| term.0 == 2))
        .await;
    watch.ticks(1).await;
    assert_eq!(s1.stop(), Some(0));
    replay(&s1.log_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_its_tail_is_refilled_from_the_stream() {
    let Scene {
        dir,
        server,
        mut s1,
        bus: _bus,
        mut watch,
    } = Scene::start().await;
    let seen = watch.ticks(4).await;
    s1.kill();
    // What a disk that lies about syncing loses: the end of the write-ahead log.
    let wal = std::fs::read_dir(s1.log_dir())
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "log"))
        .max()
        .unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&wal).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - len / 3).unwrap();
    {
        let (log, _) = replay(&s1.log_dir());
        assert!(log.head().seq < seen);
    }
    s1 = Process::start(&server, "s1", &dir.path().join("s1"));
    watch
        .until("the next term", |_, event| event.term().is_some_and(|term| term.0 == 2))
        .await;
    watch.ticks(1).await;
    assert_eq!(s1.stop(), Some(0));
    assert!(s1.said().contains("refilled from the stream"), "{}", s1.said());
    replay(&s1.log_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unsafe_or_damaged_is_refused_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let unsynced = ServerSetup {
        sync_always: false,
        ..ServerSetup::default()
    };
    let server = NatsServer::start_with(&dir.path().join("nats"), unsynced);
    let mut strict = Process::start_with(&server, "s1", &dir.path().join("strict"), &["--replicas", "1"]);
    assert_eq!(strict.exit(), Some(1));
    let text = strict.said();
    assert!(
        text.contains("sync_interval is not always") && text.contains("num_replicas"),
        "{text}"
    );

    let mut s1 = Process::start(&server, "s1", &dir.path().join("s1"));
    let bus = connect(&server).await;
    Watch::new(&bus).ticks(2).await;
    assert_eq!(s1.stop(), Some(0));
    assert!(s1.said().contains("--dev lets pass"), "{}", s1.said());
    {
        let options = rocksdb::Options::default();
        let families = rocksdb::DB::list_cf(&options, s1.log_dir()).unwrap();
        let db = rocksdb::DB::open_cf(&options, s1.log_dir(), families).unwrap();
        let mut value = db.get(2u64.to_be_bytes()).unwrap().unwrap();
        value[9] ^= 1;
        db.put(2u64.to_be_bytes(), value).unwrap();
    }
    let mut damaged = Process::start(&server, "s1", &dir.path().join("s1"));
    assert_eq!(damaged.exit(), Some(1));
    let text = damaged.said();
    assert!(
        text.contains("damaged at 2") && text.contains("refilled from the stream"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_another_cluster_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = NatsServer::start(&dir.path().join("one"));
    let mut s1 = Process::start(&one, "s1", &dir.path().join("s1"));
    let bus = connect(&one).await;
    Watch::new(&bus).ticks(1).await;
    assert_eq!(s1.stop(), Some(0));
    let two = NatsServer::start(&dir.path().join("two"));
    let other = connect(&two).await;
    let wanted = Wanted {
        replicas: 1,
        dev: true,
        monitors: Vec::new(),
    };
    other.ensure_streams(&wanted).await.unwrap();
    let mut lost = Process::start(&two, "s1", &dir.path().join("s1"));
    assert_eq!(lost.exit(), Some(1));
    assert!(lost.said().contains("is this the right NATS?"), "{}", lost.said());
}

/// Waits until a process says something.
async fn said(process: &Process, words: &str) {
    eventually(&format!("the words {words:?}"), || async {
        process.said().contains(words).then_some(())
    })
    .await;
}
