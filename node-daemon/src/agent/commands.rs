//! Carries out the scheduler's orders, one after the other, each once, and tells how they ended.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_protocol::command::Outcome;
use hearth_protocol::{ByteLen, Command, CommandId, Event, Order, Seq};
use tokio::sync::Notify;

use super::link::Link;
use super::node::Node;
use super::requests::Requests;

/// Pause before an outcome that could not be published is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Executes open commands for ever. `wake` says that the log told something new.
pub async fn run(requests: Requests, wake: Arc<Notify>) {
    let (node, link) = (&requests.node, &requests.link);
    // Executed by this process and answered, though the answer may not have been read back yet; and where it stands.
    let mut answered: BTreeMap<CommandId, (Seq, Outcome)> = BTreeMap::new();
    loop {
        if link.ready().is_ok() {
            // Before the facts, which may know more.
            let applied = link.progress().borrow().applied;
            let (next, open) = {
                let facts = link.facts();
                let open = facts.open_commands();
                let next = open.iter().find(|c| !answered.contains_key(&c.id)).cloned();
                (
                    next.map(|c| (c, facts.tick())),
                    open.iter().map(|c| c.id).collect::<BTreeSet<_>>(),
                )
            };
            answered.retain(|id, _| open.contains(id));
            if let Some((command, tick)) = next {
                let id = command.id;
                let outcome = execute(&requests, command, tick).await;
                let at = publish(node, link, id, outcome.clone()).await;
                answered.insert(id, (at, outcome));
                continue;
            }
            // Read as far as where the answer stood, and still open: the log lost it before anybody read it.
            if let Some((id, (at, outcome))) = answered.iter_mut().find(|(_, (at, _))| *at <= applied) {
                tracing::warn!(command = %id, "the log lost how this command ended; told again");
                *at = publish(node, link, *id, outcome.clone()).await;
                continue;
            }
        }
        wake.notified().await;
    }
}

async fn execute(requests: &Requests, command: Command, tick: hearth_protocol::TickNo) -> Outcome {
    if tick > command.expires {
        return Outcome::Refused {
            why: format!("it expired at tick {}, now is tick {tick}", command.expires),
        };
    }
    tracing::debug!(command = %command.id, verb = command.order.verb(), blocks = command.order.block_count(), "executing");
    let started = Instant::now();
    let of_replicas = match &command.order {
        Order::Replicate {
            image,
            epoch,
            to,
            blocks,
            ..
        } => Some(requests.replicate(*image, *epoch, to.clone(), *blocks).await),
        Order::Drop {
            image,
            epoch,
            from,
            keep,
            ..
        } => Some(requests.drop_replica(*image, *epoch, from.clone(), *keep).await),
        Order::Promote { .. } | Order::Demote { .. } => None,
    };
    if let Some(result) = of_replicas {
        return match result {
            Ok(()) => Outcome::Done {
                done: Vec::new(),
                skipped: Vec::new(),
                bytes: ByteLen(0),
                took_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
            },
            Err(failure) => Outcome::Refused { why: failure.message },
        };
    }
    let node = Arc::clone(&requests.node);
    tokio::task::spawn_blocking(move || node.execute(&command.order))
        .await
        .unwrap_or_else(|error| Outcome::Refused {
            why: format!("the node failed at it: {error}"),
        })
}

async fn publish(node: &Node, link: &Link, command: CommandId, outcome: Outcome) -> Seq {
    let event = Event::CommandFinished {
        command,
        node: node.config.id.clone(),
        outcome,
    };
    loop {
        match link.publish_node(&event).await {
            Ok(at) => return at,
            Err(error) => tracing::warn!(%command, %error, "cannot tell how a command ended; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
