//! `hearth log verify` and `hearth log recover`, the command itself: exit codes and words.

#[path = "../../scheduler/tests/session/mod.rs"]
mod session;

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use hearth_bus::testing::{NatsServer, copy_dir, eventually};
use hearth_bus::{Bus, LogPublisher, NatsOptions, new_incarnation};
use hearth_protocol::chain::{self, Witness};
use hearth_protocol::{Event, NodeId, Publisher, Seq, subject};
use hearth_scheduler::log::{Entry, EventLog, RocksLog};
use hearth_scheduler::replica::SNAPSHOT_EVERY_TICKS;
use hearth_scheduler::run::{Parts, Retention, RunError, Timing, run_with};
use session::{altered, session};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

fn hearth(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hearth")).args(words).output().unwrap()
}

/// Both outputs and the exit code.
fn said(words: &[&str]) -> (i32, String) {
    let output = hearth(words);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

fn verify(dir: &Path, witness: Option<&Path>) -> (i32, String) {
    let mut words = vec!["log", "verify", "--log-dir", dir.to_str().unwrap()];
    words.extend(
        witness
            .into_iter()
            .flat_map(|file| ["--witness", file.to_str().unwrap()]),
    );
    said(&words)
}

fn written(entries: &[Entry]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    RocksLog::open(dir.path()).unwrap().append(entries).unwrap();
    dir
}

#[test]
fn verify_names_what_is_wrong_and_exits_with_1() {
    let entries = session(12);
    let whole = written(&entries);
    let head = RocksLog::open(whole.path()).unwrap().head();
    let witness = whole.path().join("witness.json");
    let seen = Witness {
        seq: head.seq,
        chain: chain::hex(&head.chain),
        message: None,
        accepted: Vec::new(),
    };
    std::fs::write(&witness, serde_json::to_vec(&seen).unwrap()).unwrap();
    let (code, text) = verify(whole.path(), Some(&witness));
    assert!(
        code == 0 && text.contains("1 witnesses agree") && text.contains("\nverified"),
        "{text}"
    );

    let check = |entries: &[Entry], witness: Option<&Path>, words: &str| {
        let (code, text) = verify(written(entries).path(), witness);
        assert!(
            code == 1 && text.contains(words) && text.contains("NOT VERIFIED"),
            "{words}: {code} {text}"
        );
    };
    check(
        &entries[..entries.len() - 3],
        Some(&witness),
        &format!("#{}: the log ends at", head.seq.0 - 2),
    );
    let is_command = |e: &Entry| matches!(&e.event, Some((_, Event::CommandGiven(_))));
    let at = entries.iter().position(is_command).unwrap();
    let mut forged = entries.clone();
    forged[at] = altered(&entries[at], |_, event| {
        let Event::CommandGiven(command) = event else {
            unreachable!()
        };
        command.reason.rule = "because I say so".into();
    });
    check(&forged, None, &format!("command #{}", at + 1));
    let (code, text) = verify(whole.path(), Some(Path::new("/dev/null")));
    assert!(code == 2 && text.contains("log-witness.json"), "{code} {text}");
    // A flipped byte in the file itself: words, no panic.
    let wal = std::fs::read_dir(whole.path()).unwrap().map(|f| f.unwrap().path());
    let wal = wal.filter(|p| p.extension().is_some_and(|e| e == "log" || e == "sst"));
    for path in wal {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        if let Some(byte) = bytes.get_mut(middle) {
            *byte ^= 1;
        }
        std::fs::write(&path, bytes).unwrap();
    }
    let (code, text) = verify(whole.path(), Some(&witness));
    assert!(code == 1 && !text.contains("panicked"), "{code} {text}");
}

struct Scheduler {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
}

impl Scheduler {
    async fn start(server: &NatsServer, dir: &Path) -> Self {
        let bus = connect(server).await;
        let wanted = hearth_bus::settings::Wanted {
            replicas: 1,
            dev: true,
            monitors: Vec::new(),
        };
        bus.ensure_streams(&wanted).await.unwrap();
        let parts = Parts {
            bus,
            log: Box::new(RocksLog::open(dir).unwrap()),
            id: "s1".parse().unwrap(),
            timing: Timing {
                tick: Duration::from_millis(50),
                takeover: Duration::from_millis(400),
            },
            retention: Retention::default(),
            snapshot_every_ticks: SNAPSHOT_EVERY_TICKS,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(run_with(parts, async move {
            let _ = stopped.await;
        }));
        Self { stop, task }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap().unwrap();
    }
}

async fn connect(server: &NatsServer) -> Bus {
    Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap()
}

async fn grown(bus: &Bus, beyond: u64) {
    eventually("the log to grow", || async {
        bus.bounds()
            .await
            .is_ok_and(|bounds| bounds.last.0 > beyond)
            .then_some(())
    })
    .await;
}

/// A stream restored from an older copy freezes the cluster; the operator puts the lost end back from a scheduler's log,
/// and that is an event. A stream that went on is refused.
#[tokio::test(flavor = "multi_thread")]
async fn recover_puts_back_what_the_stream_lost_and_writes_it_down() {
    let dir = tempfile::tempdir().unwrap();
    let (logs, store, early) = (
        dir.path().join("s1"),
        dir.path().join("nats/js"),
        dir.path().join("early"),
    );
    let mut server = NatsServer::start(&dir.path().join("nats"));
    let scheduler = Scheduler::start(&server, &logs).await;
    grown(&connect(&server).await, 10).await;
    scheduler.stop().await;
    server.kill();
    copy_dir(&store, &early);
    server.restart();
    let scheduler = Scheduler::start(&server, &logs).await;
    grown(&connect(&server).await, 40).await;
    scheduler.stop().await;
    let lost = RocksLog::open(&logs).unwrap().head().seq;
    server.kill();
    std::fs::remove_dir_all(&store).unwrap();
    copy_dir(&early, &store);
    server.restart();

    let scheduler = Scheduler::start(&server, &logs).await;
    let bus = connect(&server).await;
    let short = bus.bounds().await.unwrap().last;
    assert!(short < lost);
    let (url, log_dir) = (server.url(), logs.to_str().unwrap().to_owned());
    let recover = |more: &[&str]| {
        let words = [
            "--nats",
            &url,
            "log",
            "recover",
            "--log-dir",
            &log_dir,
            "--reason",
            "an old disk came back",
        ];
        said(&[&words, more].concat())
    };
    let (code, text) = recover(&["--dry-run"]);
    assert!(
        code == 0 && text.contains(&format!("put #{} to #{lost}", short.next())),
        "{code} {text}"
    );
    assert_eq!(bus.bounds().await.unwrap().last, short, "frozen, and nothing was done");
    let (code, text) = tokio::task::block_in_place(|| recover(&[]));
    assert!(
        code == 0 && text.contains(&format!("#{} to #{lost}; written down at #", short.next())),
        "{code} {text}"
    );
    let (code, text) = tokio::task::block_in_place(|| recover(&[]));
    assert!(code == 0 && text.contains("nothing to put back"), "{code} {text}");
    scheduler.stop().await;
    let mut log = RocksLog::open(&logs).unwrap();
    let recovered = log
        .find(&hearth_scheduler::log::Index::Kind("log_recovered".into()), Seq(1), 9)
        .unwrap();
    let (_, event) = log.get(recovered[0]).unwrap().unwrap().event().unwrap();
    assert!(
        matches!(&event, Event::LogRecovered { positions, reason, .. }
            if *positions == (short.next(), lost) && reason == "an old disk came back"),
        "{event:?}"
    );
    let end = log.head().seq;
    drop(log);
    let (code, text) = verify(&logs, None);
    assert_eq!(code, 0, "{text}");

    // Rolled back once more, and this time somebody published before the operator came.
    server.kill();
    std::fs::remove_dir_all(&store).unwrap();
    copy_dir(&early, &store);
    server.restart();
    let bus = connect(&server).await;
    let own: NodeId = "n1".parse().unwrap();
    let publisher = LogPublisher::new(bus.clone(), Publisher::Node(own.clone()), new_incarnation());
    publisher
        .publish(subject::node(&own), &Event::NodeLeft { node: own.clone() })
        .await
        .unwrap();
    let (code, text) = recover(&[]);
    assert!(
        code == 5 && text.contains(&format!("from #{} on", short.next())),
        "{code} {text}"
    );
    assert_eq!(bus.bounds().await.unwrap().last, short.next(), "nothing was put back");
    log = RocksLog::open(&logs).unwrap();
    assert_eq!(log.head().seq, end);
}
