//! Servers that die, lie or are set up unsafely.

use std::time::Duration;

use hearth_bus::settings::Wanted;
use hearth_bus::testing::{NatsServer, SOON, ServerSetup, copy_dir, eventually};
use hearth_bus::{Bus, BusError, LogPublisher, MemoryCluster, NatsOptions, PublishError, new_incarnation};
use hearth_protocol::heat::HeatReport;
use hearth_protocol::{Event, Publisher, Seq, Term, TickNo, WallMs, subject};

fn wanted(dev: bool, monitors: Vec<String>) -> Wanted {
    Wanted {
        replicas: 1,
        dev,
        monitors,
    }
}

fn publisher(bus: &Bus) -> LogPublisher {
    LogPublisher::new(
        bus.clone(),
        Publisher::Scheduler("s1".parse().unwrap()),
        new_incarnation(),
    )
}

fn lead() -> String {
    subject::lead(&"s1".parse().unwrap())
}

fn tick(n: u64) -> Event {
    Event::Ticked {
        term: Term(1),
        tick: TickNo(n),
        time: WallMs(n),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_acknowledgement_neither_repeats_nor_skips() {
    let cluster = MemoryCluster::default();
    let bus = Bus::memory(&cluster);
    bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    let one = publisher(&bus);
    one.publish(lead(), &tick(1)).await.unwrap();
    cluster.lose_acknowledgements(2);
    assert_eq!(one.publish(lead(), &tick(2)).await.unwrap(), Seq(2));
    cluster.lose_acknowledgements(1);
    let third = one.publish_expecting(lead(), &tick(3), subject::LEAD_ALL, Seq(2)).await;
    assert_eq!(third.unwrap(), Seq(3));
    assert_eq!(bus.bounds().await.unwrap().last, Seq(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_in_doubt_is_settled_by_the_next_one() {
    let cluster = MemoryCluster::default();
    let bus = Bus::memory(&cluster);
    bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    let one = publisher(&bus);
    one.publish(lead(), &tick(1)).await.unwrap();
    cluster.lose_acknowledgements(u32::MAX);
    // The caller gives up at some point; what it gave up on is stored once all the same.
    assert!(
        tokio::time::timeout(Duration::from_millis(50), one.publish(lead(), &tick(2)))
            .await
            .is_err()
    );
    cluster.lose_acknowledgements(0);
    assert_eq!(one.publish(lead(), &tick(3)).await.unwrap(), Seq(3));
    let numbers: Vec<_> = bus
        .log_reader(Seq(1), Vec::new())
        .fetch(10, SOON)
        .await
        .unwrap()
        .iter()
        .map(|f| f.decode().unwrap().envelope.publisher_seq)
        .collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn publishers_and_readers_survive_kills_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = NatsServer::start(dir.path());
    let bus = Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap();
    bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    let one = publisher(&bus);
    let mut whole = bus.log_reader(Seq(1), Vec::new());
    let mut filtered = bus.log_reader(Seq(1), vec![subject::LEAD_ALL.into()]);
    let mut durable = bus.durable_log_reader(Seq(1), "d".into());
    let publishing = tokio::spawn(async move {
        for n in 1..=300 {
            match one.publish(lead(), &tick(n)).await {
                // Unknown: the next publish settles it first.
                Ok(_) | Err(PublishError::Unknown { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
        one
    });
    for at in [50, 120, 200] {
        while bus.bounds().await.map(|b| b.last.0).unwrap_or(0) < at {
            tokio::task::yield_now().await;
        }
        server.restart();
    }
    let one = publishing.await.unwrap();
    one.publish(lead(), &tick(301)).await.unwrap();
    let last = bus.bounds().await.unwrap().last;
    for reader in [&mut whole, &mut filtered, &mut durable] {
        let mut next = 1;
        let deadline = tokio::time::Instant::now() + SOON;
        while next <= last.0 {
            assert!(tokio::time::Instant::now() < deadline, "stuck at {next} of {last}");
            for fetched in reader.fetch(100, Duration::from_secs(1)).await.unwrap_or_default() {
                let envelope = fetched.decode().unwrap().envelope;
                assert_eq!((fetched.seq.0, envelope.publisher_seq), (next, next));
                next += 1;
            }
        }
    }
}

/// A lone server keeps nothing of a stream in memory: the reader makes it anew, and reports arrive again.
#[tokio::test(flavor = "multi_thread")]
async fn heat_flows_again_after_a_kill_of_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = NatsServer::start(dir.path());
    let bus = Bus::connect(&NatsOptions::new(server.url(), "heat")).await.unwrap();
    bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    let mut reader = bus.heat_reader();
    let mut report = HeatReport::idle("n1".parse().unwrap(), new_incarnation(), 0);
    for _ in 0..2 {
        let first_seq = report.report_seq + 1;
        // Sent at most once: those before the stream is there again are lost, as gaps say.
        let arrived = tokio::time::timeout(SOON, async {
            loop {
                report.report_seq += 1;
                let _ = bus.publish_heat(&report).await;
                let Ok(got) = reader.fetch(10, Duration::from_millis(100)).await else {
                    continue;
                };
                if let Some(last) = got.last() {
                    return HeatReport::decode(&last.frame).unwrap().report_seq;
                }
            }
        });
        assert!(arrived.await.expect("heat arrives") >= first_seq);
        server.kill();
        server.restart();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_earlier_is_a_rollback() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = NatsServer::start(dir.path());
    let bus = Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap();
    bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    let one = publisher(&bus);
    one.publish(lead(), &tick(1)).await.unwrap();
    let js = dir.path().join("js");
    let kept = dir.path().join("kept");
    server.kill();
    copy_dir(&js, &kept);
    server.restart();
    one.publish(lead(), &tick(2)).await.unwrap();
    let mut whole = bus.log_reader(Seq(1), Vec::new());
    let mut got = 0;
    while got < 2 {
        got += whole.fetch(10, SOON).await.unwrap_or_default().len();
    }
    server.kill();
    std::fs::remove_dir_all(&js).unwrap();
    copy_dir(&kept, &js);
    server.restart();
    let whole = tokio::sync::Mutex::new(whole);
    let rolled_back = eventually("the rollback to be seen", || async {
        match whole.lock().await.fetch(10, Duration::from_secs(1)).await {
            Err(BusError::RolledBack { seen, last }) => return Some((seen, last)),
            Ok(batch) => assert!(batch.is_empty()),
            Err(error) => assert!(error.is_transient(), "{error}"),
        }
        None
    });
    assert_eq!(rolled_back.await, (Seq(2), Seq(1)));
}

async fn refused(server: &NatsServer, wanted: &Wanted, name: &str) {
    let bus = Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap();
    match bus.ensure_streams(wanted).await {
        Err(BusError::Unsafe(found)) => {
            assert!(found.iter().any(|f| f.contains(name)), "{name} is not in {found:?}");
        }
        other => panic!("{name} was not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unsafe_servers_are_refused_by_the_settings_name() {
    let dir = tempfile::tempdir().unwrap();
    let unsynced = NatsServer::start_with(
        dir.path(),
        ServerSetup {
            sync_always: false,
            ..ServerSetup::default()
        },
    );
    refused(
        &unsynced,
        &wanted(false, vec![unsynced.monitor_url()]),
        "sync_interval is not always",
    )
    .await;
    refused(&unsynced, &wanted(false, Vec::new()), "sync_interval cannot be read").await;
    refused(&unsynced, &wanted(false, vec![unsynced.monitor_url()]), "num_replicas").await;
    let bus = Bus::connect(&NatsOptions::new(unsynced.url(), "test")).await.unwrap();
    let passed = bus
        .ensure_streams(&wanted(true, vec![unsynced.monitor_url()]))
        .await
        .unwrap();
    assert!(passed.iter().any(|p| p.contains("sync_interval")), "{passed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_stream_of_the_same_name_is_refused_also_with_dev() {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start(dir.path());
    let client = async_nats::connect(server.url()).await.unwrap();
    let js = async_nats::jetstream::new(client);
    js.create_stream(async_nats::jetstream::stream::Config {
        name: subject::LOG_STREAM.into(),
        subjects: vec![subject::LOG_ALL.into()],
        storage: async_nats::jetstream::stream::StorageType::Memory,
        ..Default::default()
    })
    .await
    .unwrap();
    for name in ["storage", "discard", "deny_delete", "deny_purge", "metadata"] {
        refused(&server, &wanted(true, vec![server.monitor_url()]), name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_read_over_the_connection_where_the_account_may_ask() {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start_with(
        dir.path(),
        ServerSetup {
            monitor: false,
            extra: r#"
accounts {
  SYS { exports: [ { service: "$SYS.REQ.SERVER.PING.VARZ", accounts: [HEARTH], response: stream } ] }
  HEARTH {
    jetstream: enabled
    users: [ { user: hearth, password: hearth } ]
    imports: [ { service: { account: SYS, subject: "$SYS.REQ.SERVER.PING.VARZ" } } ]
  }
}
system_account: SYS
no_auth_user: hearth
"#
            .into(),
            ..ServerSetup::default()
        },
    );
    let bus = Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap();
    let passed = bus.ensure_streams(&wanted(true, Vec::new())).await.unwrap();
    assert!(passed.len() == 1 && passed[0].contains("num_replicas"), "{passed:?}");
}
