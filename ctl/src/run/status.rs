//! `hearth status` and `hearth health`.

use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_tui::headless;

use super::{Context, watch};
use crate::Outcome;
use crate::cli::{Health, Status};
use crate::output;

pub async fn status(context: &Context, options: &Status) -> Outcome {
    let cluster = context.cluster().await?;
    let print = async || {
        let view = cluster.view_with_health().await?;
        context.out.one(&view, || headless::overview(&view, output::width()));
        Ok(())
    };
    watch::run(context, options.watch, print).await
}

pub async fn health(context: &Context, options: &Health) -> Outcome {
    let cluster = context.cluster().await?;
    let watching = options.watch.watch.is_some();
    let print = async || {
        let items = cluster.health().await?;
        if context.out.is_json() {
            context.out.list(&items);
        } else {
            context.out.text(&headless::health(&items, options.detail));
        }
        let errors = items.iter().filter(|item| item.is_error()).count();
        if errors == 0 || watching {
            return Ok(());
        }
        Err(Failure::new(
            FailureKind::Failed,
            format!("the cluster is not well: {errors} errors"),
            if options.detail {
                ""
            } else {
                "hearth health --detail says what to do"
            },
        ))
    };
    watch::run(context, options.watch, print).await
}
