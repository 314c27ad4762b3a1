//! `hearth top`: the dashboard, or its tables as text.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::sync::mpsc;
use std::time::Duration;

use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_protocol::{ImageId, Seq};
use hearth_tui::headless;
use hearth_tui::model::{Can, Model};
use hearth_tui::terminal::{self, Wish};
use hearth_tui::theme::Theme;
use hearth_tui::update::Feed;
use tokio::sync::watch;

use super::events::{self, Catalog};
use super::step::{Stepped, Steps};
use super::{Context, why};
use crate::Outcome;
use crate::cli::Top;
use crate::cluster::Cluster;
use crate::history::{History, logged};
use crate::moment::Moment;
use crate::output;

/// Events of the past that the log view starts with.
const LOG_START: u64 = 500;
const LOG_BATCH: usize = 256;
/// Longest wait between two looks at the wishes of the dashboard.
const WISHES: Duration = Duration::from_millis(50);
const LOG_WAIT: Duration = Duration::from_secs(2);

/// An event to tell of, and the image whose heat is looked at.
type EventWanted = (Seq, Option<ImageId>);

pub async fn run(context: &Context, options: &Top) -> Outcome {
    if options.batch || context.out.is_json() {
        return batch(context, options).await;
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::new(
            FailureKind::Usage,
            "the dashboard needs a terminal",
            "hearth top -b -n1 prints it as text",
        ));
    }
    let cluster = context.cluster().await?;
    let theme = Theme::from_env(|name| std::env::var(name).ok(), context.global.ascii);
    let model = Model::new(theme, cluster.url.clone(), Can { why: true, step: true });
    let (feed, news) = mpsc::channel();
    let (wishes, wanted) = mpsc::channel();
    let (event, event_wanted) = watch::channel(None);
    let views = tokio::spawn(views(cluster.clone(), feed.clone(), wanted, event, options.delay));
    let steps = tokio::spawn(steps(cluster.clone(), feed.clone(), event_wanted));
    let log = tokio::spawn(follow(cluster, feed));
    let screen = tokio::task::spawn_blocking(move || terminal::run(model, &news, &wishes));
    let result = screen.await;
    views.abort();
    steps.abort();
    log.abort();
    match result {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::new(
            FailureKind::Failed,
            error.to_string(),
            "hearth top -b -n1",
        )),
        Err(error) => Err(Failure::new(
            FailureKind::Failed,
            format!("the dashboard stopped: {error}"),
            "this is a bug of Hearth",
        )),
    }
}

async fn batch(context: &Context, options: &Top) -> Outcome {
    let cluster = context.cluster().await?;
    // One document for a program that asked for JSON without a count; for ever otherwise.
    let count = match options.iterations {
        Some(count) => count,
        None if context.out.is_json() && !options.batch => 1,
        None => u64::MAX,
    };
    for n in 0..count {
        if n > 0 {
            tokio::time::sleep(options.delay).await;
            if !context.out.is_json() {
                context.out.text("\n");
            }
        }
        let view = cluster.view_with_health().await?;
        context.out.one(&view, || headless::overview(&view, output::width()));
    }
    Ok(())
}

/// Brings views, heat and explanations until the dashboard is gone.
async fn views(
    cluster: Cluster,
    feed: mpsc::Sender<Feed>,
    wishes: mpsc::Receiver<Wish>,
    event: watch::Sender<Option<EventWanted>>,
    every: Duration,
) {
    let every = every.max(Duration::from_millis(100));
    let mut watched: Option<ImageId> = None;
    let mut due = tokio::time::Instant::now();
    loop {
        loop {
            match wishes.try_recv() {
                Ok(Wish::Watch(image)) => {
                    watched = image;
                    due = tokio::time::Instant::now();
                }
                Ok(Wish::Event(wanted)) => drop(event.send_replace(wanted)),
                Ok(Wish::Why { image, block, at }) => {
                    let (cluster, feed) = (cluster.clone(), feed.clone());
                    // The log is long: the screen goes on meanwhile.
                    tokio::spawn(async move {
                        let title = format!("Why {image}:{block}");
                        let history = History::Stream(cluster);
                        let answer = why::ask(&history, image, block, at.map(Moment::Seq)).await;
                        let text = match answer {
                            Ok(report) => report.to_string(),
                            Err(failure) => format!("{}\n{}", failure.message, failure.hint),
                        };
                        let lines = text.lines().map(str::to_owned).collect();
                        let _ = feed.send(Feed::Text { title, lines });
                    });
                }
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
        if tokio::time::Instant::now() < due {
            tokio::time::sleep(WISHES.min(every)).await;
            continue;
        }
        due = tokio::time::Instant::now() + every;
        let news = match cluster.view_with_health().await {
            Ok(view) => Feed::View(Box::new(view)),
            Err(failure) => Feed::Lost(failure.message),
        };
        let lost = matches!(news, Feed::Lost(_));
        if feed.send(news).is_err() {
            return;
        }
        if let (Some(image), false) = (watched, lost) {
            // An image that is gone has no heat; the screen says so by itself.
            if let Ok(heat) = cluster.heat(image).await
                && feed.send(Feed::Heat(heat)).is_err()
            {
                return;
            }
        }
    }
}

/// Tells of the events that are stepped through, the one wanted last first: who holds a key down waits for one answer.
async fn steps(cluster: Cluster, feed: mpsc::Sender<Feed>, mut wanted: watch::Receiver<Option<EventWanted>>) {
    let mut steps: Option<Steps> = None;
    while wanted.changed().await.is_ok() {
        let Some((seq, image)) = *wanted.borrow_and_update() else {
            continue;
        };
        let answer = match &mut steps {
            Some(steps) => step(steps, seq, image, &feed, &wanted).await,
            none => match Steps::new(History::Stream(cluster.clone())).await {
                Ok(new) => step(none.insert(new), seq, image, &feed, &wanted).await,
                Err(failure) => Err(failure),
            },
        };
        let news = match answer {
            Ok(Some(stepped)) => Feed::Event {
                event: Box::new(stepped.event),
                view: Box::new(stepped.view),
                heat: stepped.heat,
            },
            // Another one is wanted by now.
            Ok(None) => continue,
            Err(failure) if failure.hint.is_empty() => Feed::NoEvent(failure.message),
            Err(failure) => Feed::NoEvent(format!("{}: {}", failure.message, failure.hint)),
        };
        if feed.send(news).is_err() {
            return;
        }
    }
}

async fn step(
    steps: &mut Steps,
    seq: Seq,
    image: Option<ImageId>,
    feed: &mpsc::Sender<Feed>,
    wanted: &watch::Receiver<Option<EventWanted>>,
) -> Outcome<Option<Stepped>> {
    let go_on = |read| {
        let other = wanted.has_changed().unwrap_or(true);
        if other || feed.send(Feed::Reading(read)).is_err() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    steps.at(seq, image, go_on).await
}

/// Brings the newest events, and those to come. Without a stream the log view stays empty, and the header says that
/// nothing answers.
async fn follow(cluster: Cluster, feed: mpsc::Sender<Feed>) {
    let history = History::Stream(cluster.clone());
    let (catalog, bounds) = loop {
        if let (Ok(catalog), Ok(bounds)) = (Catalog::read(&history).await, history.bounds().await) {
            break (catalog, bounds);
        }
        tokio::time::sleep(LOG_WAIT).await;
    };
    let mut catalog = catalog;
    let (first, last) = bounds;
    let from = Seq(last.0.saturating_sub(LOG_START) + 1).max(first);
    let mut lines = Vec::new();
    let walked = history
        .walk(from, last, |logged| {
            lines.push(events::line(&logged, &catalog));
            ControlFlow::Continue(())
        })
        .await;
    if walked.is_ok() && feed.send(Feed::Log(lines)).is_err() {
        return;
    }
    let mut reader = cluster.bus.log_reader(last.next().max(first), Vec::new());
    loop {
        let Ok(batch) = reader.fetch(LOG_BATCH, LOG_WAIT).await else {
            continue;
        };
        let mut lines = Vec::new();
        for fetched in &batch {
            if let Ok(logged) = logged(fetched) {
                catalog.learn(&logged);
                lines.push(events::line(&logged, &catalog));
            }
        }
        if !lines.is_empty() && feed.send(Feed::Log(lines)).is_err() {
            return;
        }
    }
}
