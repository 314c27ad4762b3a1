//! `hearth status` and `hearth health`.

use hearth_tui::headless;

use super::{Context, watch};
use crate::Outcome;
use crate::cli::{Health, Status};
use crate::output;

pub async fn status(context: &Context, options: &Status) -> Outcome {
    let cluster = context.cluster().await?;
    let print = async || {
        let view = cluster.view().await?;
        context.out.one(&view, || headless::overview(&view, output::width()));
        Ok(())
    };
    watch::run(context, options.watch, print).await
}

pub async fn health(context: &Context, options: &Health) -> Outcome {
    let cluster = context.cluster().await?;
    let print = async || {
        let view = cluster.view().await?;
        if context.out.is_json() {
            context.out.list(&view.health);
        } else {
            context.out.text(&headless::health(&view, options.detail));
        }
        Ok(())
    };
    watch::run(context, options.watch, print).await
}
