//! `hearth job`.

use std::time::Duration;

use hearth_protocol::NodeId;
use hearth_protocol::rpc::{Failure, FailureKind, JobInfo, NodeReply, NodeRequest};
use hearth_tui::fmt;

use super::ask::Ask;
use super::{Context, plan};
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
        Job::Cancel { job, on, change } => return cancel(context, &cluster, job, on.node, change).await,
    };
    let node = cluster.some_node(on.node).await?;
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

/// Stops a job, and waits until it has cleaned up.
async fn cancel(context: &Context, cluster: &Cluster, job: u64, node: Option<NodeId>, change: Change) -> Outcome {
    let node = cluster.some_node(node).await?;
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
        None => "running".into(),
        Some(Ok(())) => "done".into(),
        Some(Err(failure)) => format!("failed: {}", failure.message),
    };
    format!(
        "job {} on {node}: {}\n{state}, {} of {}\n",
        info.id,
        info.what,
        fmt::bytes(info.done),
        fmt::bytes(info.total)
    )
}
