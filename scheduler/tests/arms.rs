//! Election, takeover, decisions and refill: the same bodies on a real nats-server with RocksDB, and in memory.

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{SOON, TalkingNode, Watch, connect};
use hearth_bus::settings::Wanted;
use hearth_bus::testing::NatsServer;
use hearth_bus::{Bus, LogPublisher, MemoryCluster, new_incarnation, rpc};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::rpc::{Answer, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_protocol::view::ClusterView;
use hearth_protocol::{Event, Order, Publisher, SchedulerId, Term, TickNo, WallMs, subject};
use hearth_scheduler::log::{EventLog, MemoryLog, RocksLog};
use hearth_scheduler::replica::{Replica, SNAPSHOT_EVERY_TICKS};
use hearth_scheduler::run::{Parts, Retention, RunError, Timing, run_with};
use hearth_scheduler::verify::verify_log;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// One of the arms.
enum Arena {
    Real {
        server: NatsServer,
        dir: tempfile::TempDir,
    },
    Memory {
        cluster: MemoryCluster,
        logs: std::cell::RefCell<std::collections::BTreeMap<String, MemoryLog>>,
    },
}

impl Arena {
    fn real() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::Real {
            server: NatsServer::start(&dir.path().join("nats")),
            dir,
        }
    }

    fn memory() -> Self {
        Self::Memory {
            cluster: MemoryCluster::default(),
            logs: Default::default(),
        }
    }

    async fn bus(&self) -> Bus {
        let bus = match self {
            Arena::Real { server, .. } => connect(server).await,
            Arena::Memory { cluster, .. } => Bus::memory(cluster),
        };
        let wanted = Wanted {
            replicas: 1,
            dev: true,
            monitors: Vec::new(),
        };
        bus.ensure_streams(&wanted).await.unwrap();
        bus
    }

    /// The log kept under a name.
    fn log(&self, name: &str) -> Box<dyn EventLog> {
        match self {
            Arena::Real { dir, .. } => {
                let path: PathBuf = dir.path().join("logs").join(name);
                Box::new(RocksLog::open(&path).unwrap())
            }
            Arena::Memory { logs, .. } => Box::new(logs.borrow_mut().entry(name.into()).or_default().clone()),
        }
    }

    async fn start(&self, id: &str, log: &str) -> Running {
        self.start_keeping(id, log, Retention::default()).await
    }

    async fn start_keeping(&self, id: &str, log: &str, retention: Retention) -> Running {
        let parts = Parts {
            bus: self.bus().await,
            log: self.log(log),
            id: id.parse().unwrap(),
            timing: Timing {
                tick: Duration::from_millis(50),
                takeover: Duration::from_millis(400),
            },
            retention,
            snapshot_every_ticks: SNAPSHOT_EVERY_TICKS,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run_with(parts, async move {
            let _ = stopped.await;
        }));
        Running { stop, task }
    }
}

struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
}

impl Running {
    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap().unwrap();
    }
}

macro_rules! on_both_arms {
    ($($body:ident),* $(,)?) => {
        mod real {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $body() {
                super::$body(&super::Arena::real()).await;
            })*
        }
        mod in_memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $body() {
                super::$body(&super::Arena::memory()).await;
            })*
        }
    };
}

on_both_arms!(
    a_standby_takes_over_and_the_old_leader_follows,
    hot_blocks_are_promoted_and_every_replay_gives_the_same_digest,
    what_a_deposed_leader_publishes_is_void,
    the_leader_answers_requests,
    foreign_messages_stay_in_the_log_and_count_for_nothing,
    old_heat_is_thinned_and_a_start_goes_on_from_a_snapshot,
);

async fn view(bus: &Bus) -> Answer<ClusterView> {
    match rpc::request(bus, subject::SCHEDULER_RPC, &SchedulerRequest::View, SOON).await? {
        SchedulerReply::View(view) => Ok(*view),
        other => panic!("{other:?}"),
    }
}

fn digest_of(log: &dyn EventLog) -> (u64, [u8; 32], [u8; 32]) {
    let replica = Replica::replay("auditor".parse().unwrap(), log).unwrap();
    assert_eq!(replica.diverged(), None);
    assert_eq!(log.verify().unwrap().bad, None);
    let state = replica.state();
    (replica.position().0, state.digest(), state.decisions_digest())
}

async fn term_of(watch: &mut Watch, id: &str) -> Term {
    let who = Publisher::Scheduler(id.parse().unwrap());
    let (_, event) = watch
        .until(&format!("a term of {id}"), |envelope, event| {
            envelope.publisher == who && matches!(event, Event::TermStarted { .. })
        })
        .await;
    event.term().unwrap()
}

async fn a_standby_takes_over_and_the_old_leader_follows(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let s1 = arena.start("s1", "s1").await;
    assert_eq!(term_of(&mut watch, "s1").await, Term(1));
    let s2 = arena.start("s2", "s2").await;
    watch.ticks(5).await;
    s1.stop().await;
    assert_eq!(term_of(&mut watch, "s2").await, Term(2));
    let s1 = arena.start("s1", "s1").await;
    // A returned leader follows: while the other ticks, it starts no term.
    let mut ticks = 0;
    watch
        .until("many ticks of s2", |_, event| {
            assert!(!matches!(event, Event::TermStarted { .. }), "{event:?}");
            ticks += usize::from(matches!(event, Event::Ticked { .. }));
            ticks == 30
        })
        .await;
    s1.stop().await;
    s2.stop().await;
    let (one, two) = (arena.log("s1"), arena.log("s2"));
    let common = one.head().seq.min(two.head().seq);
    assert_eq!(one.get(common).unwrap(), two.get(common).unwrap());
    assert!(one.get(common).unwrap().is_some());
}

async fn hot_blocks_are_promoted_and_every_replay_gives_the_same_digest(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let s1 = arena.start("s1", "s1").await;
    let node = tokio::spawn(TalkingNode::new(&bus, "n1", 7).talk());
    watch
        .until(
            "a promotion",
            |_, event| matches!(event, Event::CommandGiven(c) if matches!(c.order, Order::Promote { .. })),
        )
        .await;
    watch
        .until("its end", |_, event| matches!(event, Event::CommandFinished { .. }))
        .await;
    let mut digests = 0;
    watch
        .until("two digests", |_, event| {
            digests += usize::from(matches!(event, Event::DigestRecorded { .. }));
            digests == 2
        })
        .await;
    let seen = view(&bus).await.unwrap();
    assert!(seen.totals.blocks_promoted > 0, "{:?}", seen.totals);
    assert_eq!(seen.totals.void, 0);
    s1.stop().await;

    // Restarted from its log, beside one that starts from nothing; the stream moves on meanwhile.
    let s1 = arena.start("s1", "s1").await;
    let fresh = arena.start("s2", "empty").await;
    assert_eq!(term_of(&mut watch, "s1").await, Term(2));
    watch.ticks(25).await;
    node.abort();
    let _ = node.await;
    s1.stop().await;
    fresh.stop().await;
    // Both filled up to the end of what is there now.
    let end = bus.bounds().await.unwrap().last;
    let mut digests = Vec::new();
    for (name, id) in [("s1", "s3"), ("empty", "s4")] {
        let filler = arena.start(id, name).await;
        // It campaigns once it has folded everything up to here.
        term_of(&mut watch, id).await;
        filler.stop().await;
        let log = arena.log(name);
        assert!(log.head().seq >= end);
        digests.push(prefix_digest(log.as_ref(), end));
    }
    assert_eq!(digests[0], digests[1]);
}

/// The digest of a log's beginning, folded record by record.
fn prefix_digest(log: &dyn EventLog, end: hearth_protocol::Seq) -> ([u8; 32], [u8; 32]) {
    digest_of(log);
    let mut state = scheduler_core::State::default();
    log.scan(hearth_protocol::Seq(1), &mut |record| {
        if let Some((envelope, event)) = record.event() {
            state.apply(record.seq, &envelope, &event);
        }
        record.seq < end
    })
    .unwrap();
    (state.digest(), state.decisions_digest())
}

async fn old_heat_is_thinned_and_a_start_goes_on_from_a_snapshot(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let retention = Retention {
        heat: Some(Duration::from_secs(2)),
    };
    let s1 = arena.start_keeping("s1", "s1", retention).await;
    let node = tokio::spawn(TalkingNode::new(&bus, "n1", 7).talk());
    watch.ticks(200).await;
    s1.stop().await;
    node.abort();
    let log = arena.log("s1");
    let thinned = log.thinned().unwrap();
    assert!(thinned > hearth_protocol::Seq(0) && thinned < log.head().seq);
    let verified = verify_log(log.as_ref(), &[log.head()]).unwrap();
    assert!(verified.verified, "{verified:#?}");
    assert!(verified.not_derivable.unwrap().heat > 0 && verified.replay.digests_same > 0);
    let replica = Replica::open("s1".parse().unwrap(), log.as_ref()).unwrap();
    // The stream still holds it all: what it gives from nothing is what the snapshot led to.
    let mut state = scheduler_core::State::default();
    let mut reader = bus.log_reader(hearth_protocol::Seq(1), Vec::new());
    while state.seq() < replica.position() {
        for fetched in reader.fetch(500, SOON).await.unwrap() {
            if fetched.seq <= replica.position() {
                let decoded = fetched.decode().unwrap();
                state.apply(fetched.seq, &decoded.envelope, &decoded.event);
            }
        }
    }
    assert_eq!(replica.state().digest(), state.digest());
    drop(log);
    let s1 = arena.start("s1", "s1").await;
    assert_eq!(term_of(&mut watch, "s1").await, Term(2));
    watch.ticks(1).await;
    s1.stop().await;
}

async fn what_a_deposed_leader_publishes_is_void(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let s1 = arena.start("s1", "s1").await;
    assert_eq!(term_of(&mut watch, "s1").await, Term(1));
    watch.ticks(2).await;
    // Another wins the next term behind the running leader's back, as if that one had been paused.
    let rival: SchedulerId = "rival".parse().unwrap();
    let publisher = LogPublisher::new(bus.clone(), Publisher::Scheduler(rival.clone()), new_incarnation());
    let start = Event::TermStarted {
        term: Term(2),
        previous: None,
    };
    loop {
        let last = bus.last(subject::LEAD_ALL).await.unwrap().unwrap().seq;
        if publisher
            .publish_expecting(subject::lead(&rival), &start, subject::LEAD_ALL, last)
            .await
            .is_ok()
        {
            break;
        }
    }
    // The old term is over: its leader steps down and, with the rival silent, wins a later one.
    assert_eq!(term_of(&mut watch, "rival").await, Term(2));
    let stale = LogPublisher::new(
        bus.clone(),
        Publisher::Scheduler("s1".parse().unwrap()),
        new_incarnation(),
    );
    let late = Event::Ticked {
        term: Term(1),
        tick: TickNo(1_000_000),
        time: WallMs(0),
    };
    stale
        .publish(subject::lead(&"s1".parse().unwrap()), &late)
        .await
        .unwrap();
    assert_eq!(term_of(&mut watch, "s1").await, Term(3));
    watch.ticks(3).await;
    let seen = view(&bus).await.unwrap();
    assert_eq!(seen.term, Term(3));
    assert!(
        seen.tick < TickNo(1_000_000) && seen.totals.void >= 1,
        "{:?}",
        seen.totals
    );
    s1.stop().await;
}

async fn the_leader_answers_requests(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let s1 = arena.start("s1", "s1").await;
    let s2 = arena.start("s2", "s2").await;
    watch.ticks(2).await;
    let seen = view(&bus).await.unwrap();
    assert_eq!(seen.policy, (0, TierPolicy::default()));
    let set = |margin_percent| {
        let policy = TierPolicy {
            margin_percent,
            ..TierPolicy::default()
        };
        let bus = bus.clone();
        async move {
            let request = SchedulerRequest::PolicySet {
                policy,
                reason: "test".into(),
            };
            rpc::request::<_, SchedulerReply>(&bus, subject::SCHEDULER_RPC, &request, SOON).await
        }
    };
    assert_eq!(set(3).await.unwrap_err().kind, FailureKind::Usage);
    let SchedulerReply::Done { seq } = set(200).await.unwrap() else {
        panic!("not done")
    };
    let seen = view(&bus).await.unwrap();
    assert_eq!((seen.policy.0, seen.policy.1.margin_percent), (1, 200));
    assert!(seen.seq >= seq);
    let missing = SchedulerRequest::ImageHeat {
        image: hearth_protocol::ImageId(4),
    };
    let answer: Answer<SchedulerReply> = rpc::request(&bus, subject::SCHEDULER_RPC, &missing, SOON).await;
    assert_eq!(answer.unwrap_err().kind, FailureKind::NotFound);
    s1.stop().await;
    s2.stop().await;
}

async fn foreign_messages_stay_in_the_log_and_count_for_nothing(arena: &Arena) {
    let bus = arena.bus().await;
    let mut watch = Watch::new(&bus);
    let s1 = arena.start("s1", "s1").await;
    watch.ticks(1).await;
    // A node that says it is another: its envelope does not fit the subject it may publish on.
    let liar = LogPublisher::new(bus.clone(), Publisher::Node("n1".parse().unwrap()), new_incarnation());
    let n2 = "n2".parse().unwrap();
    let lie = liar
        .publish(subject::node(&n2), &Event::NodeLeft { node: n2.clone() })
        .await
        .unwrap();
    watch.ticks(3).await;
    s1.stop().await;
    let log = arena.log("s1");
    let record = log.get(lie).unwrap().unwrap();
    assert_eq!(record.event(), None);
    assert_eq!(record.subject(), subject::node(&n2));
    digest_of(log.as_ref());
}
