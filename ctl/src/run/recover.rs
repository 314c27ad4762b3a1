//! `hearth log recover`: an operator puts back what the stream lost at its end, from a scheduler's event log.
//!
//! Only what the stream still holds may stand before what is put back: the two are compared, and a stream that went on
//! with other messages is refused, because nobody but an operator can say which history counts.

use std::path::Path;
use std::time::{Duration, Instant};

use hearth_bus::Bus;
use hearth_protocol::Seq;
use hearth_protocol::rpc::{Failure, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_scheduler::log::{EventLog, RocksLog};
use hearth_tui::fmt;

use super::{Context, plan};
use crate::Outcome;
use crate::cli::Change;
use crate::cluster::{bus_failure, unexpected};
use crate::history::log_failure;
use crate::output;

/// Pause before the schedulers are asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Messages between two lines of progress.
const PROGRESS_EVERY: u64 = 10_000;

pub async fn run(context: &Context, dir: &Path, change: Change) -> Outcome {
    let log = RocksLog::open_reader(dir).map_err(|e| log_failure(&e))?;
    let cluster = context.cluster().await?;
    let bounds = cluster.bus.bounds().await.map_err(|e| bus_failure(&e))?;
    let identity = log.identity().map_err(|e| log_failure(&e))?.unwrap_or_default();
    if identity != bounds.identity {
        return Err(Failure::new(
            FailureKind::Refused,
            format!(
                "this log was filled from the stream {identity}, not from {}",
                bounds.identity
            ),
            "name the folder of a scheduler of this cluster, and its NATS with --nats",
        ));
    }
    let (head, last) = (log.head().seq, bounds.last);
    let common = head.min(last);
    if !same(&log, &cluster.bus, common).await? {
        let first = first_difference(&log, &cluster.bus, common).await?;
        return Err(Failure::new(
            FailureKind::Refused,
            format!("the stream went on: from #{first} on it holds other messages than this log"),
            "restore the stream from a backup that ends before that position, then recover again; or accept what the \
             stream holds: stop the schedulers, move their folders away, and start them and the nodes again",
        ));
    }
    if last >= head {
        let text = format!("nothing to put back: the stream holds all of this log, up to #{head}\n");
        context
            .out
            .one(&serde_json::json!({ "put_back": 0, "last": head }), || text);
        return Ok(());
    }
    let positions = (last.next(), head);
    let request = SchedulerRequest::LogRecovered {
        positions,
        reason: change.reason,
    };
    if change.dry_run {
        let what = format!(
            "put #{} to #{} back into the stream, then write that down",
            positions.0, positions.1
        );
        plan::scheduler(context, &what, &request);
        return Ok(());
    }
    put_back(&log, &cluster.bus, positions).await?;
    // The schedulers are frozen until they see that the stream is whole again, and then have to elect a leader.
    let deadline = Instant::now() + context.global.timeout;
    let asked = loop {
        match cluster.scheduler(&request).await {
            Err(_) if Instant::now() < deadline => tokio::time::sleep(ASK_AGAIN).await,
            asked => break asked,
        }
    };
    let reply = asked.map_err(|mut failure| {
        failure.message = format!(
            "#{} to #{} are back in the stream, but no scheduler wrote that down: {}",
            positions.0, positions.1, failure.message
        );
        failure
    })?;
    let SchedulerReply::Done { seq } = &reply else {
        return Err(unexpected("the scheduler", &reply));
    };
    let count = positions.1.0 - positions.0.0 + 1;
    context.out.one(&reply, || {
        format!(
            "put {} messages back, #{} to #{}; written down at #{seq}\n",
            fmt::count(count),
            positions.0,
            positions.1
        )
    });
    Ok(())
}

/// Whether log and stream hold the same message at a position; nothing is the same as nothing.
async fn same(log: &RocksLog, bus: &Bus, seq: Seq) -> Outcome<bool> {
    if seq == Seq(0) {
        return Ok(true);
    }
    let ours = log.get(seq).map_err(|e| log_failure(&e))?;
    let theirs = bus.get(seq).await.map_err(|e| bus_failure(&e))?;
    Ok(matches!((ours, theirs), (Some(ours), Some(theirs)) if ours.is(&theirs)))
}

/// The first position up to `end` at which they differ, when they differ at `end`.
async fn first_difference(log: &RocksLog, bus: &Bus, end: Seq) -> Outcome<Seq> {
    let (mut alike, mut differ) = (0, end.0);
    while alike + 1 < differ {
        let middle = alike + (differ - alike) / 2;
        if same(log, bus, Seq(middle)).await? {
            alike = middle;
        } else {
            differ = middle;
        }
    }
    Ok(Seq(differ))
}

async fn put_back(log: &RocksLog, bus: &Bus, (first, last): (Seq, Seq)) -> Outcome {
    let mut seq = first;
    while seq <= last {
        let record = log.get(seq).map_err(|e| log_failure(&e))?;
        let message = record.and_then(|record| record.to_fetched()).ok_or_else(|| {
            Failure::new(
                FailureKind::Refused,
                format!("#{seq} was thinned in this log: only its hash is left"),
                "use the folder of a scheduler that keeps heat for longer",
            )
        })?;
        bus.put_back(&message).await.map_err(|error| {
            Failure::new(
                FailureKind::Failed,
                format!("#{seq} was not put back: {error}"),
                "what came before it is; look, then run this again",
            )
        })?;
        if seq.0.is_multiple_of(PROGRESS_EVERY) {
            output::note(&format!("put back up to #{seq} of #{last}"));
        }
        seq = seq.next();
    }
    Ok(())
}
