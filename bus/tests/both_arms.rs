//! The same bodies on a real nats-server and in memory.

use std::time::Duration;

use hearth_bus::settings::Wanted;
use hearth_bus::testing::NatsServer;
use hearth_bus::{Bus, Fetched, LogPublisher, MemoryCluster, NatsOptions, PublishError, Reader, new_incarnation, rpc};
use hearth_protocol::heat::HeatReport;
use hearth_protocol::rpc::{Answer, Failure, FailureKind};
use hearth_protocol::{Event, Incarnation, NodeId, Publisher, Seq, Term, TickNo, WallMs, subject};

const SOON: Duration = Duration::from_secs(10);

/// A cluster on one of the arms. The server must outlive the handle.
struct Cluster {
    bus: Bus,
    _server: Option<(NatsServer, tempfile::TempDir)>,
}

async fn real() -> Cluster {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start(dir.path());
    let bus = Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap();
    let wanted = Wanted {
        replicas: 1,
        dev: true,
        monitors: vec![server.monitor_url()],
    };
    let passed = bus.ensure_streams(&wanted).await.unwrap();
    assert!(passed.len() == 1 && passed[0].contains("num_replicas"), "{passed:?}");
    Cluster {
        bus,
        _server: Some((server, dir)),
    }
}

async fn memory() -> Cluster {
    let bus = Bus::memory(&MemoryCluster::default());
    let wanted = Wanted {
        replicas: 1,
        dev: true,
        monitors: Vec::new(),
    };
    bus.ensure_streams(&wanted).await.unwrap();
    Cluster { bus, _server: None }
}

macro_rules! on_both_arms {
    ($($body:ident),* $(,)?) => {
        mod on_nats {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $body() {
                super::$body(super::real().await).await;
            })*
        }
        mod in_memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $body() {
                super::$body(super::memory().await).await;
            })*
        }
    };
}

on_both_arms!(
    events_come_back_in_order_with_their_envelopes,
    one_of_many_racers_wins_each_round,
    filtered_and_durable_readers_read_and_acknowledge,
    heat_arrives_and_too_long_reports_are_refused,
    requests_are_answered_or_fail_by_kind,
);

fn publisher(bus: &Bus, id: &str) -> LogPublisher {
    LogPublisher::new(
        bus.clone(),
        Publisher::Scheduler(id.parse().unwrap()),
        new_incarnation(),
    )
}

fn tick(n: u64) -> Event {
    Event::Ticked {
        term: Term(1),
        tick: TickNo(n),
        time: WallMs(n),
    }
}

fn left(node: &NodeId) -> Event {
    Event::NodeLeft { node: node.clone() }
}

async fn read(reader: &mut Reader, count: usize) -> Vec<Fetched> {
    let mut got = Vec::new();
    while got.len() < count {
        let batch = reader.fetch(count - got.len(), SOON).await.unwrap();
        assert!(!batch.is_empty(), "only {} of {count} came", got.len());
        got.extend(batch);
    }
    got
}

async fn events_come_back_in_order_with_their_envelopes(cluster: Cluster) {
    let bus = &cluster.bus;
    let one = publisher(bus, "s1");
    let lead = subject::lead(&"s1".parse().unwrap());
    let mut reader = bus.log_reader(Seq(1), Vec::new());
    for n in 1..=20 {
        assert_eq!(one.publish(&lead, &tick(n)).await.unwrap(), Seq(n));
    }
    for (i, fetched) in read(&mut reader, 20).await.into_iter().enumerate() {
        let n = i as u64 + 1;
        let decoded = fetched.decode().unwrap();
        assert_eq!((fetched.seq, decoded.envelope.publisher_seq), (Seq(n), n));
        assert_eq!(decoded.event, tick(n));
        assert_eq!(decoded.envelope.incarnation, one.incarnation());
    }
    assert!(reader.fetch(1, Duration::from_millis(50)).await.unwrap().is_empty());
    let bounds = bus.bounds().await.unwrap();
    assert_eq!((bounds.first, bounds.last), (Seq(1), Seq(20)));
    assert!(!bounds.identity.is_empty());
    assert_eq!(bus.get(Seq(7)).await.unwrap().unwrap().decode().unwrap().event, tick(7));
    assert!(bus.get(Seq(21)).await.unwrap().is_none());
    assert_eq!(bus.last(subject::LEAD_ALL).await.unwrap().unwrap().seq, Seq(20));
    assert!(bus.last("hearth.log.command.*").await.unwrap().is_none());
}

async fn one_of_many_racers_wins_each_round(cluster: Cluster) {
    let bus = &cluster.bus;
    let racers: Vec<_> = (0..4).map(|i| (i, publisher(bus, &format!("s{i}")))).collect();
    let mut last = Seq(0);
    for round in 0..50 {
        let tries = racers.iter().map(|(i, racer)| {
            let own = subject::lead(&format!("s{i}").parse().unwrap());
            async move {
                racer
                    .publish_expecting(own, &tick(round), subject::LEAD_ALL, last)
                    .await
            }
        });
        let mut won = Vec::new();
        for result in futures::future::join_all(tries).await {
            match result {
                Ok(seq) => won.push(seq),
                Err(PublishError::Conflict { expected, .. }) => assert_eq!(expected, last),
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!(won.len(), 1, "round {round}: {won:?}");
        last = won[0];
    }
    // Losing uses up no number: each racer's numbers are contiguous.
    let mut reader = bus.log_reader(Seq(1), Vec::new());
    let mut next = std::collections::BTreeMap::<Incarnation, u64>::new();
    for fetched in read(&mut reader, 50).await {
        let envelope = fetched.decode().unwrap().envelope;
        let next = next.entry(envelope.incarnation).or_insert(1);
        assert_eq!(envelope.publisher_seq, *next);
        *next += 1;
    }
}

async fn filtered_and_durable_readers_read_and_acknowledge(cluster: Cluster) {
    let bus = &cluster.bus;
    let (n1, n2): (NodeId, NodeId) = ("n1".parse().unwrap(), "n2".parse().unwrap());
    let one = LogPublisher::new(bus.clone(), Publisher::Node(n1.clone()), new_incarnation());
    let two = LogPublisher::new(bus.clone(), Publisher::Node(n2.clone()), new_incarnation());
    for _ in 0..5 {
        one.publish(subject::node(&n1), &left(&n1)).await.unwrap();
        two.publish(subject::node(&n2), &left(&n2)).await.unwrap();
    }
    let mut filtered = bus.log_reader(Seq(3), vec![subject::LEAD_ALL.into(), subject::node(&n1)]);
    let seqs: Vec<_> = read(&mut filtered, 4).await.iter().map(|f| f.seq.0).collect();
    assert_eq!(seqs, [3, 5, 7, 9]);

    assert_eq!(bus.acked("one").await.unwrap(), None);
    let mut durable = bus.durable_log_reader(Seq(1), "one".into());
    let batch = read(&mut durable, 10).await;
    durable.ack(batch.last().unwrap().seq).await.unwrap();
    let deadline = tokio::time::Instant::now() + SOON;
    while bus.acked("one").await.unwrap() != Some(Seq(10)) {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the acknowledgement did not arrive"
        );
        tokio::task::yield_now().await;
    }
    // A reader that goes on elsewhere is where it says, not where the server remembers.
    let mut again = bus.durable_log_reader(Seq(4), "one".into());
    assert_eq!(read(&mut again, 7).await[0].seq, Seq(4));
}

async fn heat_arrives_and_too_long_reports_are_refused(cluster: Cluster) {
    let bus = &cluster.bus;
    let mut report = HeatReport::idle("n1".parse().unwrap(), new_incarnation(), 1);
    bus.publish_heat(&report).await.unwrap();
    let mut reader = bus.heat_reader();
    let got = read(&mut reader, 1).await;
    assert_eq!(HeatReport::decode(&got[0].frame).unwrap(), report);
    assert_eq!(got[0].subject, subject::heat(&report.node));
    report.dropped = vec![(
        hearth_protocol::LayerId(1),
        vec![hearth_protocol::BlockIndex(u64::MAX); 200_000],
    )];
    assert!(matches!(
        bus.publish_heat(&report).await,
        Err(PublishError::TooLong { .. })
    ));
}

async fn requests_are_answered_or_fail_by_kind(cluster: Cluster) {
    let bus = &cluster.bus;
    let ask = |n: u64| {
        let bus = bus.clone();
        async move { rpc::request::<u64, u64>(&bus, "hearth.rpc.test", &n, SOON).await }
    };
    assert_eq!(ask(1).await.unwrap_err().kind, FailureKind::CannotConnect);
    let serving = bus.clone();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let server = tokio::spawn(async move {
        let served = rpc::serve(&serving, "hearth.rpc.test", |n: u64| async move {
            let answer: Answer<u64> = if n == 13 {
                Err(Failure::new(FailureKind::Refused, "not thirteen", "take another"))
            } else {
                Ok(n * 2)
            };
            answer
        });
        let mut served = std::pin::pin!(served);
        assert!(futures::poll!(served.as_mut()).is_pending());
        let _ = ready.send(());
        served.await
    });
    is_ready.await.unwrap();
    let mut answer = ask(4).await;
    while matches!(&answer, Err(failure) if failure.kind == FailureKind::CannotConnect) {
        answer = ask(4).await;
    }
    assert_eq!(answer.unwrap(), 8);
    assert_eq!(ask(13).await.unwrap_err().kind, FailureKind::Refused);
    let nonsense = rpc::request::<&str, u64>(bus, "hearth.rpc.test", &"four", SOON).await;
    assert_eq!(nonsense.unwrap_err().kind, FailureKind::Usage);
    server.abort();

    // An answer of several messages.
    let serving = bus.clone();
    let server = tokio::spawn(async move {
        rpc::serve(&serving, "hearth.rpc.long", |n: usize| async move {
            let answer: Answer<String> = Ok("ö".repeat(n));
            answer
        })
        .await
    });
    let long = loop {
        match rpc::request::<usize, String>(bus, "hearth.rpc.long", &3_000_000, SOON).await {
            Err(failure) if failure.kind == FailureKind::CannotConnect => {}
            answer => break answer.unwrap(),
        }
    };
    assert!(long == "ö".repeat(3_000_000));
    server.abort();
}
