//! The event log as the command reads it: the stream over NATS, or a scheduler's folder.

use std::ops::ControlFlow;
use std::time::Duration;

use hearth_bus::{BusError, Fetched};
use hearth_protocol::chain::Hash;
use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_protocol::{DecodeError, Message, Seq};
use hearth_scheduler::log::{EventLog, LogError, RocksLog};

use crate::Outcome;
use crate::cli::{From, Global};
use crate::cluster::{Cluster, bus_failure};

/// Messages fetched at once.
const BATCH: usize = 1_024;
/// Fetches without any message after which the stream counts as stuck.
const EMPTY_MAX: u32 = 10;
const FETCH_WAIT: Duration = Duration::from_secs(1);

/// Where the log is read.
pub enum History {
    /// The JetStream stream.
    Stream(Cluster),
    /// A scheduler's own log; boxed, because its store is large.
    Folder(Box<RocksLog>),
}

/// One message of the log.
#[derive(Debug)]
pub struct Logged {
    /// Its place.
    pub seq: Seq,
    /// Its bytes, as the log keeps them.
    pub message: Message,
    /// The chain value the folder keeps for it.
    pub chain: Option<Hash>,
    /// The scheduler dropped what it says: heat older than it keeps.
    pub thinned: bool,
}

/// A failure of a scheduler's log, with what to do.
pub fn log_failure(error: &LogError) -> Failure {
    let hint = match error {
        LogError::Directory { .. } => "name the scheduler's --dir, the folder with the file CURRENT in it",
        LogError::Damaged { .. } => "`hearth log verify` without --log-dir checks the stream",
        _ => "",
    };
    Failure::new(FailureKind::Failed, error.to_string(), hint)
}

/// A message of the stream as the scheduler's log would keep it: a foreign one stays foreign for every fold.
///
/// # Errors
/// It was written by a later Hearth.
fn kept(fetched: &Fetched) -> Result<Message, DecodeError> {
    match fetched.decode() {
        Ok(decoded) => Ok(decoded.message),
        Err(hearth_bus::Foreign::Decode(newer @ DecodeError::Newer { .. })) => Err(newer),
        Err(_) => Ok(Message {
            envelope: fetched.subject.clone().into_bytes(),
            payload: fetched.frame.to_vec(),
        }),
    }
}

/// As [`kept`], for the command's user.
///
/// # Errors
/// See [`kept`].
pub fn logged(fetched: &Fetched) -> Outcome<Logged> {
    let message = kept(fetched).map_err(|error| {
        Failure::new(
            FailureKind::NotSupported,
            format!("event #{}: {error}", fetched.seq),
            "use a newer hearth command",
        )
    })?;
    Ok(Logged {
        seq: fetched.seq,
        message,
        chain: None,
        thinned: false,
    })
}

impl History {
    /// Opens the folder, or connects.
    ///
    /// # Errors
    /// Exit code 1 for a folder that cannot be read, 20 or 21 without NATS.
    pub async fn open(global: &Global, from: &From) -> Outcome<Self> {
        match &from.log_dir {
            None => Ok(Self::Stream(Cluster::connect(global).await?)),
            Some(dir) => {
                let log = RocksLog::open_reader(dir).map_err(|e| log_failure(&e))?;
                Ok(Self::Folder(Box::new(log)))
            }
        }
    }

    /// First and last position; `first` is after `last` for an empty log.
    ///
    /// # Errors
    /// The stream cannot be asked.
    pub async fn bounds(&self) -> Outcome<(Seq, Seq)> {
        match self {
            Self::Stream(cluster) => {
                let bounds = cluster.bus.bounds().await.map_err(|e| bus_failure(&e))?;
                Ok((bounds.first.max(Seq(1)), bounds.last))
            }
            Self::Folder(log) => Ok((Seq(1), log.head().seq)),
        }
    }

    /// The log must begin at its beginning, else nothing can be derived from it.
    ///
    /// # Errors
    /// Exit code 4.
    pub async fn check_whole(&self) -> Outcome<Seq> {
        let (first, last) = self.bounds().await?;
        if let Self::Folder(log) = self {
            let thinned = log.thinned().map_err(|e| log_failure(&e))?;
            if thinned > Seq(0) {
                return Err(Failure::new(
                    FailureKind::NotSupported,
                    format!(
                        "heat up to #{thinned} was thinned in this log, so its state cannot be folded from nothing"
                    ),
                    "read the stream, which holds it all: leave --log-dir out",
                ));
            }
        }
        if first > Seq(1) && last >= first {
            return Err(Failure::new(
                FailureKind::NotSupported,
                format!("the stream begins at #{first}: what came before was trimmed"),
                "read a scheduler's own log with --log-dir DIR",
            ));
        }
        Ok(last)
    }

    /// One message.
    ///
    /// # Errors
    /// The log cannot be read.
    pub async fn get(&self, seq: Seq) -> Outcome<Option<Logged>> {
        match self {
            Self::Stream(cluster) => match cluster.bus.get(seq).await.map_err(|e| bus_failure(&e))? {
                None => Ok(None),
                Some(fetched) => logged(&fetched).map(Some),
            },
            Self::Folder(log) => {
                let record = log.get(seq).map_err(|e| log_failure(&e))?;
                Ok(record.map(|r| Logged {
                    seq: r.seq,
                    message: r.message,
                    chain: Some(r.chain),
                    thinned: r.thinned.is_some(),
                }))
            }
        }
    }

    /// Goes through the log from `from` to `last`, in order, until `each` breaks.
    ///
    /// # Errors
    /// The log cannot be read, or has a gap.
    pub async fn walk(&self, from: Seq, last: Seq, mut each: impl FnMut(Logged) -> ControlFlow<()> + Send) -> Outcome {
        if from > last {
            return Ok(());
        }
        match self {
            Self::Folder(log) => {
                let scanned = log.scan(from, &mut |record| {
                    let seq = record.seq;
                    let next = each(Logged {
                        seq,
                        message: record.message,
                        chain: Some(record.chain),
                        thinned: record.thinned.is_some(),
                    });
                    next.is_continue() && seq < last
                });
                scanned.map_err(|e| log_failure(&e))
            }
            Self::Stream(cluster) => {
                let mut reader = cluster.bus.log_reader(from, Vec::new());
                let mut next = from;
                let mut empty = 0;
                while next <= last {
                    let batch = match reader.fetch(BATCH, FETCH_WAIT).await {
                        Ok(batch) => batch,
                        Err(error) if error.is_transient() && empty < EMPTY_MAX => Vec::new(),
                        Err(BusError::RolledBack { seen, last }) => {
                            return Err(bus_failure(&BusError::RolledBack { seen, last }));
                        }
                        Err(error) => return Err(bus_failure(&error)),
                    };
                    empty = if batch.is_empty() { empty + 1 } else { 0 };
                    if empty > EMPTY_MAX {
                        return Err(Failure::new(
                            FailureKind::Timeout,
                            format!(
                                "the stream gave nothing after #{} though it ends at #{last}",
                                next.0 - 1
                            ),
                            "look at nats-server, then try again",
                        ));
                    }
                    for fetched in &batch {
                        if fetched.seq > last {
                            return Ok(());
                        }
                        if fetched.seq != next {
                            return Err(Failure::new(
                                FailureKind::Failed,
                                format!("the stream has no #{next}, it goes on with #{}", fetched.seq),
                                "read a scheduler's own log with --log-dir DIR",
                            ));
                        }
                        next = next.next();
                        if each(logged(fetched)?).is_break() {
                            return Ok(());
                        }
                    }
                }
                Ok(())
            }
        }
    }
}
