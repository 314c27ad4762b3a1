//! `hearth log recover`: an operator puts back what the stream lost at its end, from a scheduler's event log.
//!
//! Only what the stream still holds may stand before what is put back: the two are compared. A stream that went on with
//! other messages is refused, because nobody but an operator can say which history counts; `--accept-loss` says it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use hearth_bus::{Bus, BusError};
use hearth_protocol::rpc::{Failure, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_protocol::{Event, ImageId, Seq, subject};
use hearth_scheduler::log::{EventLog, RocksLog};
use hearth_tui::fmt;
use serde::Serialize;

use super::{Context, plan};
use crate::Outcome;
use crate::cli::Change;
use crate::cluster::{Cluster, bus_failure, unexpected};
use crate::history::log_failure;
use crate::output;

/// Pause before the schedulers are asked again.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Messages between two lines of progress.
const PROGRESS_EVERY: u64 = 10_000;

/// Images named in what is lost.
const IMAGES_SHOWN: usize = 50;

/// How to recover.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// The stream counts as it is where it went on with other messages.
    pub accept_loss: bool,
    /// Copies of a stream that is made anew.
    pub replicas: u8,
}

pub async fn run(context: &Context, dir: &Path, how: How, change: Change) -> Outcome {
    let log = RocksLog::open_reader(dir).map_err(|e| log_failure(&e))?;
    let cluster = context.cluster().await?;
    let identity = log.identity().map_err(|e| log_failure(&e))?.unwrap_or_default();
    let head = log.head();
    let there = match cluster.bus.bounds().await {
        Err(BusError::NoStream(_)) => None,
        Ok(bounds) if bounds.identity != identity && bounds.last == Seq(0) => None,
        bounds => Some(bounds.map_err(|e| bus_failure(&e))?),
    };
    let Some(bounds) = there else {
        if !change.dry_run {
            make_anew(&cluster.bus, &identity, how.replicas).await?;
        }
        return put_all_back(context, &cluster, &log, Seq(0), change).await;
    };
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
    let common = head.seq.min(bounds.last);
    if !same(&log, &cluster.bus, common).await? {
        let first = first_difference(&log, &cluster.bus, common).await?;
        if how.accept_loss {
            return accept_loss(context, &cluster, &log, first, change).await;
        }
        return Err(Failure::new(
            FailureKind::Refused,
            format!("the stream went on: from #{first} on it holds other messages than this log"),
            "restore the stream from a backup that ends before that position, then recover again; or accept what the \
             stream holds: see what would be lost with --accept-loss --dry-run",
        ));
    }
    if bounds.last >= head.seq {
        let text = format!(
            "nothing to put back: the stream holds all of this log, up to #{}\n",
            head.seq
        );
        context
            .out
            .one(&serde_json::json!({ "put_back": 0, "last": head.seq }), || text);
        return Ok(());
    }
    put_all_back(context, &cluster, &log, bounds.last, change).await
}

async fn make_anew(bus: &Bus, identity: &str, replicas: u8) -> Outcome {
    bus.make_log_anew(identity, replicas.into()).await.map_err(|error| {
        let failure = bus_failure(&error);
        let hint = format!(
            "{}; {replicas} copies were asked for, a lone server keeps one: --replicas 1",
            failure.hint
        );
        Failure::new(failure.kind, failure.message, hint)
    })?;
    output::note("the stream was gone: it is made anew");
    Ok(())
}

/// Puts back everything behind the stream's last message, and has that written down.
async fn put_all_back(context: &Context, cluster: &Cluster, log: &RocksLog, last: Seq, change: Change) -> Outcome {
    let positions = (last.next(), log.head().seq);
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
    put_back(log, &cluster.bus, positions).await?;
    let (reply, seq) = written_down(context, cluster, &request).await.map_err(|mut failure| {
        failure.message = format!(
            "#{} to #{} are back in the stream, but no scheduler wrote that down: {}",
            positions.0, positions.1, failure.message
        );
        failure
    })?;
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

/// Has the leader write something down. Schedulers are frozen until they see that the stream is whole again, and then
/// have to elect one: so it is asked again for a while.
async fn written_down(
    context: &Context,
    cluster: &Cluster,
    request: &SchedulerRequest,
) -> Outcome<(SchedulerReply, Seq)> {
    let deadline = Instant::now() + context.global.timeout;
    let reply = loop {
        match cluster.scheduler(request).await {
            Err(_) if Instant::now() < deadline => tokio::time::sleep(ASK_AGAIN).await,
            asked => break asked?,
        }
    };
    match reply {
        SchedulerReply::Done { seq } => Ok((reply, seq)),
        other => Err(unexpected("the scheduler", &other)),
    }
}

/// What a log holds that the stream never will.
#[derive(Debug, Serialize)]
struct Loss {
    first: Seq,
    last: Seq,
    events: BTreeMap<&'static str, u64>,
    images: BTreeSet<String>,
}

impl Loss {
    fn of(log: &RocksLog, first: Seq) -> Outcome<Self> {
        let mut loss = Self {
            first,
            last: log.head().seq,
            events: BTreeMap::new(),
            images: BTreeSet::new(),
        };
        let mut names: BTreeMap<ImageId, String> = BTreeMap::new();
        let scanned = log.scan(Seq(1), &mut |record| {
            let Some((_, event)) = record.event() else { return true };
            if let Event::ImageCreated(created) = &event {
                names.insert(created.image, created.name.to_string());
            }
            if record.seq >= first {
                *loss.events.entry(event.kind()).or_default() += 1;
                if let Some(image) = subject::image_of(&record.subject()).filter(|_| loss.images.len() < IMAGES_SHOWN) {
                    let name = names.get(&image).cloned();
                    loss.images.insert(name.unwrap_or_else(|| image.to_string()));
                }
            }
            true
        });
        scanned.map_err(|e| log_failure(&e))?;
        Ok(loss)
    }

    fn text(&self) -> String {
        let mut out = format!("lost: #{} to #{}\n", self.first, self.last);
        for (kind, count) in &self.events {
            out += &format!("  {count:>8} {kind}\n");
        }
        if !self.images.is_empty() {
            let names: Vec<_> = self.images.iter().map(String::as_str).collect();
            out += &format!("changes of these images: {}\n", names.join(", "));
        }
        out
    }
}

/// Shows what is lost, and has it written down that it counts no more: nodes that read it read the stream anew then.
async fn accept_loss(context: &Context, cluster: &Cluster, log: &RocksLog, first: Seq, change: Change) -> Outcome {
    let loss = Loss::of(log, first)?;
    if !context.out.is_json() {
        context.out.text(&loss.text());
    }
    let request = SchedulerRequest::LossAccepted {
        positions: (loss.first, loss.last),
        chain: log.head().chain,
        reason: change.reason,
    };
    if change.dry_run {
        if context.out.is_json() {
            context.out.json(&loss);
            return Ok(());
        }
        let what = format!(
            "write down that #{} to #{} of this log count no more",
            loss.first, loss.last
        );
        plan::scheduler(context, &what, &request);
        return Ok(());
    }
    let (_, seq) = written_down(context, cluster, &request).await.map_err(|failure| {
        Failure::new(
            failure.kind,
            format!("nobody follows the stream as it is: {}", failure.message),
            "stop a scheduler, move its folder away, start it again and wait until it leads; then repeat this with the \
             folder that was moved away",
        )
    })?;
    context.out.one(&serde_json::json!({ "accepted": loss, "seq": seq }), || {
        format!(
            "written down at #{seq}: nodes that read this log read the stream from its beginning now. Move the folders of \
             schedulers that are frozen away and start them again\n"
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
