//! What the scheduler's tests share: a watcher of the stream, a node that only talks, and schedulers as processes.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hearth_bus::testing::NatsServer;
use hearth_bus::{Bus, LogPublisher, NatsOptions, Reader, new_incarnation, wall_now};
use hearth_protocol::command::Outcome;
use hearth_protocol::event::{ImageAttached, ImageCreated, NodeJoined};
use hearth_protocol::heat::{BlockHeat, HeatOrigin, HeatReport, ImageHeat, LatencySummary, LayerHeat, Omitted, pack};
use hearth_protocol::{
    BlockIndex, ByteLen, Envelope, Epoch, Event, ImageId, Incarnation, LayerId, LeaseId, NodeId, Order, Publisher, Seq,
    SetVersion, subject,
};
use tokio::time::Instant;

pub use hearth_bus::testing::SOON;

/// Everything that is published, from the beginning.
pub struct Watch {
    reader: Reader,
    waiting: std::collections::VecDeque<(Seq, Envelope, Event)>,
    pub last: Seq,
}

impl Watch {
    pub fn new(bus: &Bus) -> Self {
        Self {
            reader: bus.log_reader(Seq(1), Vec::new()),
            waiting: Default::default(),
            last: Seq(0),
        }
    }

    /// The next event of the stream that fits.
    pub async fn until(&mut self, what: &str, mut fits: impl FnMut(&Envelope, &Event) -> bool) -> (Seq, Event) {
        let deadline = Instant::now() + SOON;
        loop {
            while let Some((seq, envelope, event)) = self.waiting.pop_front() {
                self.last = seq;
                if fits(&envelope, &event) {
                    return (seq, event);
                }
            }
            assert!(Instant::now() < deadline, "waited for {what}, read up to {}", self.last);
            // Failures are servers that are away: the deadline judges.
            for fetched in self.reader.fetch(100, Duration::from_secs(1)).await.unwrap_or_default() {
                if let Ok(decoded) = fetched.decode() {
                    self.waiting.push_back((fetched.seq, decoded.envelope, decoded.event));
                }
            }
        }
    }

    pub async fn ticks(&mut self, count: usize) -> Seq {
        let mut last = Seq(0);
        for _ in 0..count {
            last = self
                .until("a tick", |_, event| matches!(event, Event::Ticked { .. }))
                .await
                .0;
        }
        last
    }
}

/// A node that joins, has one attached image, reports heat and answers commands; without any disk or guest.
pub struct TalkingNode {
    pub id: NodeId,
    pub incarnation: Incarnation,
    pub image: ImageId,
    pub layer: LayerId,
    bus: Bus,
    publisher: LogPublisher,
    reports: u64,
}

impl TalkingNode {
    pub fn new(bus: &Bus, id: &str, number: u128) -> Self {
        let id: NodeId = id.parse().unwrap();
        let incarnation = new_incarnation();
        Self {
            publisher: LogPublisher::new(bus.clone(), Publisher::Node(id.clone()), incarnation),
            bus: bus.clone(),
            id,
            incarnation,
            image: ImageId(number),
            layer: LayerId(number + 1000),
            reports: 0,
        }
    }

    /// Publishes, patiently.
    pub async fn publish(&self, subject: String, event: Event) {
        // Unknown is settled by the next publish; everything else is a mistake of the test.
        match self.publisher.publish(subject, &event).await {
            Ok(_) | Err(hearth_bus::PublishError::Unknown { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    pub async fn join(&self) {
        let own = Publisher::Node(self.id.clone());
        self.publish(
            subject::node(&self.id),
            Event::NodeJoined(NodeJoined {
                node: self.id.clone(),
                incarnation: self.incarnation,
                storage_incarnation: Incarnation(1),
                previous: None,
                ram: ByteLen(16 << 20),
                main: ByteLen(8 << 20),
                fault_domain: "here".into(),
                peer_address: "unix:/nowhere".into(),
                layers: Vec::new(),
                heat_source: "export".into(),
            }),
        )
        .await;
        self.publish(
            subject::image(self.image, &own),
            Event::ImageCreated(ImageCreated {
                image: self.image,
                name: format!("test/{}", self.id).parse().unwrap(),
                size: ByteLen(64 << 20),
                block_size: ByteLen(64 << 10),
                layers: vec![self.layer],
                parent: None,
                node: self.id.clone(),
                set_version: SetVersion(1),
                members: Default::default(),
            }),
        )
        .await;
        self.publish(
            subject::image(self.image, &own),
            Event::ImageAttached(ImageAttached {
                image: self.image,
                node: self.id.clone(),
                epoch: Epoch(1),
                lease: LeaseId(9),
                set_version: SetVersion(1),
                device: false,
            }),
        )
        .await;
    }

    /// The next report, with a few hot blocks that move on slowly.
    pub fn report(&mut self) -> HeatReport {
        self.reports += 1;
        let first = self.reports / 20 * 8 % 900;
        let blocks: Vec<_> = (first..first + 16)
            .map(|block| BlockHeat {
                block: BlockIndex(block),
                reads: 5,
                writes: 0,
                bursts: 5,
                bytes: 5 << 12,
            })
            .collect();
        HeatReport {
            time: wall_now(),
            images: vec![ImageHeat {
                image: self.image,
                origin: HeatOrigin::Export,
                layers: vec![LayerHeat {
                    layer: self.layer,
                    blocks: pack(&blocks),
                }],
                omitted: Omitted::default(),
                read_latency: LatencySummary::default(),
                write_latency: LatencySummary::default(),
                ram_hits: 0,
                ram_misses: 80,
            }],
            ..HeatReport::idle(self.id.clone(), self.incarnation, self.reports)
        }
    }

    /// Joins, then reports after every tick and answers commands, until dropped.
    pub async fn talk(mut self) {
        self.join().await;
        let filters = vec![subject::LEAD_ALL.into(), subject::command(&self.id)];
        let mut reader = self.bus.log_reader(Seq(1), filters);
        loop {
            for fetched in reader.fetch(100, Duration::from_secs(1)).await.unwrap_or_default() {
                match fetched.decode().unwrap().event {
                    Event::Ticked { .. } => {
                        let report = self.report();
                        // Lost without a server: a gap that the leader counts.
                        let _ = self.bus.publish_heat(&report).await;
                    }
                    Event::CommandGiven(command) => {
                        let done = match &command.order {
                            Order::Promote { blocks, .. } => blocks.iter().map(|b| b.block).collect(),
                            Order::Demote { blocks, .. } => blocks.iter().map(|b| b.block).collect(),
                            Order::Replicate { .. } | Order::Drop { .. } => Vec::new(),
                        };
                        let event = Event::CommandFinished {
                            command: command.id,
                            node: self.id.clone(),
                            outcome: Outcome::Done {
                                done,
                                skipped: Vec::new(),
                                bytes: ByteLen(1),
                                took_us: 1,
                            },
                        };
                        self.publish(subject::node(&self.id), event).await;
                    }
                    _ => {}
                }
            }
        }
    }
}

/// A scheduler as a process of its own; killed when dropped.
pub struct Process {
    pub id: String,
    pub dir: PathBuf,
    child: Option<Child>,
}

impl Process {
    /// Starts the scheduler with its log and its stderr (`stderr.log`) under `dir`.
    pub fn start(server: &NatsServer, id: &str, dir: &Path) -> Self {
        Self::start_with(server, id, dir, &["--dev"])
    }

    pub fn start_with(server: &NatsServer, id: &str, dir: &Path, more: &[&str]) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let stderr = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("stderr.log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_hearth-scheduler"))
            .args(["--nats", &server.url(), "--id", id])
            .args(["--nats-monitor", &server.monitor_url()])
            .arg("--dir")
            .arg(dir.join("log"))
            .args(more)
            .env("RUST_LOG", "info,hearth_scheduler::keeper=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self {
            id: id.into(),
            dir: dir.into(),
            child: Some(child),
        }
    }

    pub fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.join("stderr.log")).unwrap()
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Whether this handle has ended it.
    pub fn is_dead(&self) -> bool {
        self.child.is_none()
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM, and its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let child = self.child.as_ref()?;
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        self.exit()
    }

    /// Waits for its end and returns its exit code.
    pub fn exit(&mut self) -> Option<i32> {
        self.child.take()?.wait().unwrap().code()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- stderr of {}:\n{}", self.id, self.said());
        }
    }
}

/// A server and a scheduler that leads on it, seen from its first tick on. What stops last stands first.
pub struct Scene {
    pub dir: tempfile::TempDir,
    pub server: NatsServer,
    pub s1: Process,
    pub bus: Bus,
    pub watch: Watch,
}

impl Scene {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = NatsServer::start(&dir.path().join("nats"));
        let s1 = Process::start(&server, "s1", &dir.path().join("s1"));
        let bus = connect(&server).await;
        let mut watch = Watch::new(&bus);
        watch.ticks(1).await;
        Self {
            dir,
            server,
            s1,
            bus,
            watch,
        }
    }
}

pub async fn connect(server: &NatsServer) -> Bus {
    Bus::connect(&NatsOptions::new(server.url(), "test")).await.unwrap()
}
