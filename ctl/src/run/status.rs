//! `hearth status` and `hearth health`.

use std::io::{self, IsTerminal};

use hearth_tui::{headless, tables};

use super::Context;
use crate::Outcome;
use crate::cli::{Health, Status};
use crate::cluster::Cluster;
use crate::output;

pub async fn status(context: &Context, options: &Status) -> Outcome {
    let cluster = context.cluster().await?;
    let Some(every) = options.watch else {
        return once(context, &cluster).await;
    };
    loop {
        let clear = io::stdout().is_terminal() && !context.out.is_json();
        if clear {
            // Home, then clear to the end: less flicker than clearing first.
            context.out.text("\x1b[H\x1b[J");
        }
        match once(context, &cluster).await {
            Ok(()) => {}
            // A watcher outlives a restart of what it watches.
            Err(failure) => output::report(&failure),
        }
        if !clear && !context.out.is_json() {
            context.out.text("\n");
        }
        tokio::time::sleep(every).await;
    }
}

async fn once(context: &Context, cluster: &Cluster) -> Outcome {
    let view = cluster.view().await?;
    context.out.one(&view, || headless::overview(&view, output::width()));
    Ok(())
}

pub async fn health(context: &Context, options: &Health) -> Outcome {
    let view = context.cluster().await?.view().await?;
    if context.out.is_json() {
        context.out.many(&view.health, || tables::health(&view.health));
    } else {
        context.out.text(&headless::health(&view, options.detail));
    }
    Ok(())
}
