//! `--dry-run`: exactly what would be asked of whom.

use hearth_protocol::rpc::{Asked, NodeRequest, SchedulerRequest};
use hearth_protocol::subject;
use serde::Serialize;

use super::Context;
use super::ask::Ask;

#[derive(Serialize)]
struct Plan<'a, R> {
    dry_run: bool,
    what: &'a str,
    to: String,
    subject: String,
    request: &'a R,
}

fn text<R: Serialize>(plan: &Plan<'_, R>) -> String {
    let request = serde_json::to_string(plan.request).unwrap_or_default();
    format!(
        "would {}\n  ask      {} on {}\n  request  {request}\n",
        plan.what, plan.to, plan.subject
    )
}

const NOTHING: &str = "nothing was done (--dry-run)\n";

fn of_node<'a>(ask: &'a Ask, asked: &'a Asked<NodeRequest>) -> Plan<'a, Asked<NodeRequest>> {
    Plan {
        dry_run: true,
        what: &ask.what,
        to: format!("node {}", ask.node),
        subject: subject::node_rpc(&ask.node),
        request: asked,
    }
}

/// For nodes.
pub fn nodes(context: &Context, asks: &[Ask], reason: &str) {
    let asked: Vec<_> = asks.iter().map(|ask| ask.asked(reason)).collect();
    let plans: Vec<_> = asks
        .iter()
        .zip(&asked)
        .map(|(ask, asked)| of_node(ask, asked))
        .collect();
    match plans.as_slice() {
        [plan] => context.out.one(plan, || text(plan) + NOTHING),
        plans if context.out.is_json() => context.out.list(plans),
        plans => context
            .out
            .text(&(plans.iter().map(text).collect::<String>() + NOTHING)),
    }
}

/// For the scheduler.
pub fn scheduler(context: &Context, what: &str, request: &SchedulerRequest) {
    let plan = Plan {
        dry_run: true,
        what,
        to: "the leading scheduler".into(),
        subject: subject::SCHEDULER_RPC.into(),
        request,
    };
    context.out.one(&plan, || text(&plan) + NOTHING);
}
