//! Putting a scheduler together and taking it apart.

use std::time::Duration;

use hearth_bus::{Bus, BusError, Fetched, LogPublisher, NatsOptions};
use hearth_protocol::{Publisher, SchedulerId, Seq};
use tokio::sync::mpsc;

use crate::config::Config;
use crate::ingest::{Ingest, IngestError};
use crate::keeper::Keeper;
use crate::leader::Leader;
use crate::log::{EventLog, LogError, RocksLog};
use crate::replica::Replica;

pub use crate::leader::Timing;
pub use crate::snapshot::Retention;

/// Batches between the tasks: enough to overlap writing and folding, few enough to bound memory.
const BATCHES_MAX: usize = 4;

/// Heat messages per batch.
const HEAT_BATCH_MAX: usize = 64;

/// Pause before another attempt to reach NATS at the start.
const CONNECT_AGAIN: Duration = Duration::from_secs(1);

/// Why a scheduler ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// NATS, its settings or its streams.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The log cannot be opened or replayed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The log cannot be filled.
    #[error(transparent)]
    Ingest(#[from] IngestError),
}

/// What a scheduler runs on.
pub struct Parts {
    /// The cluster; its streams exist.
    pub bus: Bus,
    /// The log, open for writing.
    pub log: Box<dyn EventLog>,
    /// Who this is.
    pub id: SchedulerId,
    /// The clock of leadership.
    pub timing: Timing,
    /// How long heat is kept.
    pub retention: Retention,
    /// Ticks between two snapshots at least.
    pub snapshot_every_ticks: u64,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Parts({})", self.id)
    }
}

/// Runs the scheduler of a configuration until `shutdown` resolves.
///
/// # Errors
/// [`RunError`]: unsafe settings, a damaged log, a log of another stream. Loss of NATS is none.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let bus = tokio::select! {
        bus = connect(&config) => bus?,
        () = &mut shutdown => return Ok(()),
    };
    let log = tokio::task::block_in_place(|| RocksLog::open(&config.dir))?;
    let parts = Parts {
        bus,
        log: Box::new(log),
        snapshot_every_ticks: config.snapshot_every_ticks(),
        id: config.id,
        timing: Timing::default(),
        retention: Retention {
            heat: config.heat_retention,
        },
    };
    run_with(parts, shutdown).await
}

/// Connects, waiting for a server that is not there yet, and makes sure of its settings.
async fn connect(config: &Config) -> Result<Bus, BusError> {
    let options = NatsOptions {
        url: config.nats.clone(),
        name: format!("hearth-scheduler {}", config.id),
        credentials: config.nats_credentials.clone(),
    };
    loop {
        let bus = match Bus::connect(&options).await {
            Ok(bus) => bus,
            Err(error) if error.is_transient() => {
                tracing::warn!("{error}; trying again");
                tokio::time::sleep(CONNECT_AGAIN).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        match bus.ensure_streams(&config.wanted()).await {
            Ok(passed) => {
                for warning in passed {
                    tracing::warn!("--dev lets pass what can LOSE EVENTS: {warning}");
                }
                return Ok(bus);
            }
            Err(error) if error.is_transient() => {
                tracing::warn!("{error}; trying again");
                bus.close().await;
                tokio::time::sleep(CONNECT_AGAIN).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Runs a scheduler on given parts until `shutdown` resolves. The log is closed when it returns.
///
/// # Errors
/// As [`run`].
pub async fn run_with(parts: Parts, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let Parts {
        bus,
        log,
        id,
        timing,
        retention,
        snapshot_every_ticks,
    } = parts;
    let replica = tokio::task::block_in_place(|| Replica::open(id.clone(), log.as_ref()))?
        .with_snapshots_every(snapshot_every_ticks);
    tracing::info!(
        scheduler = %id,
        incarnation = %replica.incarnation(),
        snapshot = %replica.started_at().unwrap_or(Seq(0)),
        events = %replica.position(),
        state = hearth_protocol::chain::hex(&replica.state().digest()),
        "replayed the log"
    );
    let publisher = LogPublisher::new(bus.clone(), Publisher::Scheduler(id.clone()), replica.incarnation());
    let (to_leader, ingested) = mpsc::channel(BATCHES_MAX);
    let (snapshots_to, snapshots) = mpsc::channel(1);
    let (heat_to, heat) = mpsc::channel(BATCHES_MAX);
    let mut tasks = tokio::task::JoinSet::new();
    let ingest = Ingest::new(
        bus.clone(),
        log,
        id.clone(),
        to_leader,
        Keeper::new(snapshots, retention),
    );
    tasks.spawn(async move { ingest.run().await.map_err(RunError::from) });
    let heat_bus = bus.clone();
    tasks.spawn(async move {
        read_heat(heat_bus, heat_to).await;
        Ok(())
    });
    let leader = Leader::new(bus.clone(), id, replica, publisher, timing, snapshots_to);
    tasks.spawn(async move {
        leader.run(ingested, heat).await;
        Ok(())
    });
    let mut shutdown = std::pin::pin!(shutdown);
    let result = loop {
        // The first failure ends all; a panic in a task is passed on.
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break Ok(()),
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => break Err(error),
                Some(Err(join)) if join.is_panic() => std::panic::resume_unwind(join.into_panic()),
                Some(Err(_)) => {}
            },
            () = &mut shutdown => {
                tracing::info!("stopping");
                break Ok(());
            }
        }
    };
    tasks.shutdown().await;
    bus.close().await;
    result
}

async fn read_heat(bus: Bus, to: mpsc::Sender<Vec<Fetched>>) {
    let mut reader = bus.heat_reader();
    while !to.is_closed() {
        match reader.fetch(HEAT_BATCH_MAX, Duration::from_secs(1)).await {
            Ok(reports) if reports.is_empty() => {}
            Ok(reports) => {
                if to.send(reports).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::debug!(%error, "heat cannot be read now"),
        }
    }
}
