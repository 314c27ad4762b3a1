//! `--dry-run`: exactly what would be asked of whom.

use hearth_protocol::rpc::{NodeRequest, SchedulerRequest};
use hearth_protocol::{NodeId, subject};
use serde::Serialize;

use super::Context;

#[derive(Serialize)]
struct Plan<'a, R> {
    dry_run: bool,
    what: &'a str,
    to: String,
    subject: String,
    request: &'a R,
}

fn print<R: Serialize>(context: &Context, plan: &Plan<'_, R>) {
    context.out.one(plan, || {
        let request = serde_json::to_string(plan.request).unwrap_or_default();
        format!(
            "would {}\n  ask      {} on {}\n  request  {request}\nnothing was done (--dry-run)\n",
            plan.what, plan.to, plan.subject
        )
    });
}

/// For a node.
pub fn node(context: &Context, what: &str, node: &NodeId, request: &NodeRequest) {
    print(
        context,
        &Plan {
            dry_run: true,
            what,
            to: format!("node {node}"),
            subject: subject::node_rpc(node),
            request,
        },
    );
}

/// For the scheduler.
pub fn scheduler(context: &Context, what: &str, request: &SchedulerRequest) {
    print(
        context,
        &Plan {
            dry_run: true,
            what,
            to: "the leading scheduler".into(),
            subject: subject::SCHEDULER_RPC.into(),
            request,
        },
    );
}
