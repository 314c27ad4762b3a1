//! `hearth job`.

use std::time::Duration;

use hearth_protocol::NodeId;
use hearth_protocol::rpc::{Failure, FailureKind, JobInfo, NodeReply, NodeRequest};
use hearth_tui::table::{Cell, Column, Row, RowId, Table};
use hearth_tui::{fmt, narrate};
use serde::Serialize;
use tokio::task::JoinSet;

use super::ask::Ask;
use super::{Context, plan, watch};
use crate::Outcome;
use crate::cli::{Change, Job};
use crate::cluster::{Cluster, unexpected};
use crate::output;

/// Time between two looks at a job.
const LOOK: Duration = Duration::from_millis(200);

pub async fn run(context: &Context, verb: Job) -> Outcome {
    let cluster = context.cluster().await?;
    let (job, wait, on) = match verb {
        Job::Show { job, follow, on } => (job, follow, on),
        Job::List { node, all, watch } => {
            return watch::run(context, watch, async || {
                list(context, &cluster, node.as_ref(), all).await
            })
            .await;
        }
        Job::Pause { job, on, change } => return pause(context, &cluster, job, true, on.node, change).await,
        Job::Resume { job, on, change } => return pause(context, &cluster, job, false, on.node, change).await,
        Job::Cancel { job, on, change } => return cancel(context, &cluster, job, on.node, change).await,
    };
    let node = node_of(&cluster, job, on.node).await?;
    let info = look(&cluster, &node, job).await?;
    if wait {
        return follow(context, &cluster, &node, info).await;
    }
    context.out.one(&info, || text(&info, &node));
    match info.ended {
        Some(ended) => ended,
        None => Err(running(&info, &node)),
    }
}

/// A job and the node that it runs on.
#[derive(Debug, Clone, Serialize)]
struct OnNode {
    node: NodeId,
    #[serde(flatten)]
    job: JobInfo,
    state: &'static str,
}

const fn state(info: &JobInfo) -> &'static str {
    match &info.ended {
        None if info.paused => "paused",
        None => "running",
        Some(Ok(())) => "done",
        Some(Err(_)) => "failed",
    }
}

/// The jobs of one node or of all that are present. One that does not answer is said, and keeps nobody from the others.
async fn jobs(cluster: &Cluster, node: Option<&NodeId>) -> Outcome<Vec<OnNode>> {
    let nodes = match node {
        Some(node) => vec![node.clone()],
        None => {
            let view = cluster.view().await?;
            view.nodes.into_iter().filter(|n| n.present).map(|n| n.id).collect()
        }
    };
    let mut asked = JoinSet::new();
    for node in nodes {
        let cluster = cluster.clone();
        asked.spawn(async move {
            let reply = cluster.node(&node, &NodeRequest::JobList).await;
            (node, reply)
        });
    }
    let mut all = Vec::new();
    while let Some(Ok((of, reply))) = asked.join_next().await {
        match reply {
            Ok(NodeReply::Jobs { jobs }) => all.extend(jobs.into_iter().map(|job| OnNode {
                node: of.clone(),
                state: state(&job),
                job,
            })),
            Ok(other) => return Err(unexpected(&format!("node {of}"), &other)),
            Err(failure) if node.is_some() => return Err(failure),
            Err(failure) => output::note(&failure.message),
        }
    }
    all.sort_by_key(|at| {
        (
            std::cmp::Reverse(at.job.began),
            at.node.clone(),
            std::cmp::Reverse(at.job.id),
        )
    });
    Ok(all)
}

/// The node of a job: the one named, or the only one that has a job of this number.
async fn node_of(cluster: &Cluster, job: u64, named: Option<NodeId>) -> Outcome<NodeId> {
    if let Some(node) = named {
        return Ok(node);
    }
    let all = jobs(cluster, None).await?;
    let of_number: Vec<_> = all.iter().filter(|at| at.job.id == job).collect();
    let going: Vec<_> = of_number.iter().copied().filter(|at| at.job.ended.is_none()).collect();
    match (of_number.as_slice(), going.as_slice()) {
        ([one], _) | (_, [one]) => Ok(one.node.clone()),
        ([], _) => Err(Failure::new(
            FailureKind::NotFound,
            format!("no node that is present has a job {job}"),
            "hearth job list --all shows those that are known",
        )),
        (several, _) => {
            let nodes: Vec<_> = several.iter().map(|at| at.node.as_str()).collect();
            Err(Failure::new(
                FailureKind::Usage,
                format!("{} nodes have a job {job}", nodes.len()),
                format!("name one with --node: {}", nodes.join(", ")),
            ))
        }
    }
}

async fn list(context: &Context, cluster: &Cluster, node: Option<&NodeId>, all: bool) -> Outcome {
    let mut jobs = jobs(cluster, node).await?;
    jobs.retain(|at| all || at.job.ended.is_none());
    context.out.many(&jobs, || table(&jobs));
    if jobs.is_empty() && !all && !context.out.is_json() {
        output::note("no job runs; with --all those that have ended");
    }
    Ok(())
}

fn table(jobs: &[OnNode]) -> Table {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    let row = |at: &OnNode| {
        let (job, age) = (&at.job, now_ms.saturating_sub(at.job.began.0) / 1_000);
        let percent = (job.done.0 as f64 * 100.0 / job.total.0.max(1) as f64) as u64;
        Row {
            id: RowId::None,
            cells: vec![
                Cell::number(job.id, job.id.to_string()),
                Cell::text(at.node.as_str()),
                Cell::text(job.kind.as_str()),
                Cell::text(job.image.as_str()),
                Cell::text(at.state),
                Cell::number(percent, format!("{percent} %")),
                Cell::number(job.done.0, fmt::bytes(job.done)),
                Cell::number(job.total.0, fmt::bytes(job.total)),
                Cell::number(age, humantime::format_duration(Duration::from_secs(age)).to_string()),
                Cell::text(job.what.clone()),
            ],
        }
    };
    Table {
        columns: vec![
            Column::number("JOB"),
            Column::text("NODE"),
            Column::text("KIND"),
            Column::text("IMAGE"),
            Column::text("STATE"),
            Column::number("DONE"),
            Column::number("BYTES").wide(),
            Column::number("OF").wide(),
            Column::number("AGE"),
            Column::text("WHAT").wide(),
        ],
        rows: jobs.iter().map(row).collect(),
    }
}

/// Has a job stand still, or go on.
async fn pause(
    context: &Context,
    cluster: &Cluster,
    job: u64,
    paused: bool,
    node: Option<NodeId>,
    change: Change,
) -> Outcome {
    let node = node_of(cluster, job, node).await?;
    let verb = if paused { "pause" } else { "resume" };
    let ask = Ask {
        what: format!("{verb} job {job} on {node}"),
        request: NodeRequest::JobPause { job, paused },
        node: node.clone(),
    };
    if change.dry_run {
        plan::nodes(context, &[ask], &change.reason);
        return Ok(());
    }
    match cluster.change(&node, &ask.asked(&change.reason)).await? {
        NodeReply::Job(info) => {
            context.out.one(&info, || text(&info, &node));
            Ok(())
        }
        other => Err(unexpected(&format!("node {node}"), &other)),
    }
}

/// Stops a job, and waits until it has cleaned up.
async fn cancel(context: &Context, cluster: &Cluster, job: u64, node: Option<NodeId>, change: Change) -> Outcome {
    let node = node_of(cluster, job, node).await?;
    let ask = Ask {
        what: format!("cancel job {job} on {node}"),
        request: NodeRequest::JobCancel { job },
        node: node.clone(),
    };
    if change.dry_run {
        plan::nodes(context, &[ask], &change.reason);
        return Ok(());
    }
    let mut info = match cluster.change(&node, &ask.asked(&change.reason)).await? {
        NodeReply::Job(info) => info,
        other => return Err(unexpected(&format!("node {node}"), &other)),
    };
    while info.ended.is_none() {
        tokio::time::sleep(LOOK).await;
        info = look(cluster, &node, job).await?;
    }
    context.out.one(&info, || text(&info, &node));
    match info.ended {
        // It was done before it could be stopped.
        Some(Ok(())) => Err(Failure::new(
            FailureKind::Conflict,
            format!("job {job} was done already"),
            "",
        )),
        _ => Ok(()),
    }
}

/// Asks a node for a long operation, or prints the plan, and follows it to its end unless it is to be left alone.
///
/// # Errors
/// The job's failure; exit code 7 when it was left running.
pub async fn start(context: &Context, cluster: &Cluster, change: Change, ask: Ask, detach: bool) -> Outcome {
    if change.dry_run {
        plan::nodes(context, &[ask], &change.reason);
        return Ok(());
    }
    let node = &ask.node;
    match cluster.change(node, &ask.asked(&change.reason)).await? {
        NodeReply::Job(started) if detach => {
            output::note(&format!("it goes on: {}", resume(started.id, node)));
            context
                .out
                .one(&started, || format!("job {} on {node}: {}\n", started.id, started.what));
            Ok(())
        }
        NodeReply::Job(started) => follow(context, cluster, node, started).await,
        other => Err(unexpected(&format!("node {node}"), &other)),
    }
}

/// A job as its node knows it.
///
/// # Errors
/// Exit code 3 if the node does not know it.
pub async fn look(cluster: &Cluster, node: &NodeId, job: u64) -> Outcome<JobInfo> {
    match cluster.node(node, &NodeRequest::JobShow { job }).await? {
        NodeReply::Job(info) => Ok(info),
        other => Err(unexpected(&format!("node {node}"), &other)),
    }
}

/// The command that goes on with a job.
pub fn resume(job: u64, node: &NodeId) -> String {
    format!("hearth job show {job} --node {node} --follow")
}

fn running(info: &JobInfo, node: &NodeId) -> Failure {
    Failure::new(
        FailureKind::Running,
        format!("job {} on {node} is still running: {}", info.id, info.what),
        resume(info.id, node),
    )
}

/// Waits for the end of a job and shows how far it is. Ctrl-C leaves it running.
///
/// # Errors
/// The job's failure; exit code 7 when it was left running.
pub async fn follow(context: &Context, cluster: &Cluster, node: &NodeId, mut info: JobInfo) -> Outcome {
    let bar = context.out.bar();
    bar.set_message(info.what.clone());
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    while info.ended.is_none() {
        bar.set_length(info.total.0);
        bar.set_position(info.done.0);
        tokio::select! {
            _ = &mut interrupted => {
                bar.abandon();
                output::note(&format!(
                    "detached, the job goes on; stop it with: hearth job cancel {} --node {node}",
                    info.id
                ));
                return Err(running(&info, node));
            }
            () = tokio::time::sleep(LOOK) => {}
        }
        info = look(cluster, node, info.id).await?;
    }
    bar.finish_and_clear();
    context.out.one(&info, || text(&info, node));
    info.ended.unwrap_or(Ok(()))
}

fn text(info: &JobInfo, node: &NodeId) -> String {
    let state = match &info.ended {
        None if info.paused => format!("paused: hearth job resume {} --node {node}", info.id),
        None => "running".into(),
        Some(Ok(())) => "done".into(),
        Some(Err(failure)) => format!("failed: {}", failure.message),
    };
    let found = info.found.as_ref().map_or_else(String::new, |checked| {
        narrate::copies(info.image.as_str(), checked) + "\n"
    });
    format!(
        "job {} on {node}: {}\n{state}, {} of {}\n{found}",
        info.id,
        info.what,
        fmt::bytes(info.done),
        fmt::bytes(info.total)
    )
}
