//! `hearth log`.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Duration;

use hearth_bus::BusError;
use hearth_protocol::Seq;
use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_tui::{fmt, tables};

use super::Context;
use super::events::{self, Catalog, Filter};
use crate::Outcome;
use crate::cli::{From, Log, Only};
use crate::cluster::bus_failure;
use crate::history::{History, Logged, logged};
use crate::moment::Moment;
use crate::output::{self, Format};

/// Events listed when no range is given.
const NEWEST: usize = 50;
/// How far back the newest events of a filter are looked for.
const LOOK_BACK: u64 = 20_000;
const BATCH: usize = 256;
const WAIT: Duration = Duration::from_secs(5);

pub async fn run(context: &Context, verb: Log) -> Outcome {
    match verb {
        Log::Tail { lines, no_follow, only } => tail(context, lines, no_follow, &only).await,
        Log::List {
            since,
            until,
            limit,
            only,
            from,
        } => list(context, since, until, limit, &only, &from).await,
        Log::Show { seq, from } => show(context, Seq(seq), &from).await,
        Log::Verify { witness, from } => super::verify::run(context, &witness, &from).await,
        Log::Recover {
            log_dir,
            accept_loss,
            replicas,
            change,
        } => {
            let how = super::recover::How { accept_loss, replicas };
            super::recover::run(context, &log_dir, how, change).await
        }
    }
}

/// One event as one line, cut to the terminal.
fn print(context: &Context, logged: &Logged, catalog: &Catalog) {
    if context.out.is_json() {
        context.out.json(&events::document(logged));
        return;
    }
    let line = events::line(logged, catalog);
    let time = if context.out.format == Format::Wide {
        fmt::time(line.time)
    } else {
        fmt::clock(line.time)
    };
    let mut text = format!("#{:<7} {time}  {:<16}  {}", line.seq, line.kind, line.text);
    if context.out.format == Format::Wide {
        text += &format!("  [{}]", line.by);
    }
    let width = output::width();
    if width > 0 {
        text = fmt::cut(&text, width);
    }
    context.out.text(&(text + "\n"));
}

async fn tail(context: &Context, lines: u64, no_follow: bool, only: &Only) -> Outcome {
    let cluster = context.cluster().await?;
    let history = History::Stream(cluster.clone());
    let mut catalog = Catalog::read(&history).await?;
    let filter = Filter::new(only, &catalog)?;
    let (first, last) = history.bounds().await?;
    let back = if filter.is_all() { lines } else { LOOK_BACK };
    let from = Seq(last.0.saturating_sub(back) + 1).max(first);
    let mut newest = VecDeque::new();
    history
        .walk(from, last, |logged| {
            if filter.wants(&logged, &catalog) {
                newest.push_back(logged);
                if newest.len() as u64 > lines {
                    newest.pop_front();
                }
            }
            ControlFlow::Continue(())
        })
        .await?;
    for logged in &newest {
        print(context, logged, &catalog);
    }
    if no_follow {
        return Ok(());
    }
    let mut reader = cluster.bus.log_reader(last.next().max(first), Vec::new());
    loop {
        match reader.fetch(BATCH, WAIT).await {
            Ok(batch) => {
                for fetched in batch {
                    let logged = logged(&fetched)?;
                    catalog.learn(&logged);
                    if filter.wants(&logged, &catalog) {
                        print(context, &logged, &catalog);
                    }
                }
            }
            Err(error @ BusError::RolledBack { .. }) => return Err(bus_failure(&error)),
            // The reader repairs itself and goes on where it was.
            Err(error) => output::note(&format!("waiting: {error}")),
        }
    }
}

async fn list(
    context: &Context,
    since: Option<Moment>,
    until: Option<Moment>,
    limit: Option<usize>,
    only: &Only,
    from: &From,
) -> Outcome {
    let history = History::open(&context.global, from).await?;
    let catalog = Catalog::read(&history).await?;
    let filter = Filter::new(only, &catalog)?;
    let (first, mut last) = history.bounds().await?;
    let mut start = first;
    match since {
        Some(Moment::Seq(seq)) => start = seq.max(first),
        None if filter.is_all() && until.is_none() => {
            start = Seq(last.0.saturating_sub(limit.unwrap_or(NEWEST) as u64) + 1).max(first);
        }
        _ => {}
    }
    if let Some(Moment::Seq(seq)) = until {
        last = last.min(seq);
    }
    let time = |logged: &Logged| logged.message.envelope().map(|e| e.time).ok();
    let mut found = VecDeque::new();
    // With a beginning the first ones count, without one the newest.
    let oldest_first = since.is_some();
    let most = limit.unwrap_or(if oldest_first { usize::MAX } else { NEWEST });
    history
        .walk(start, last, |logged| {
            if let (Some(Moment::Time(from)), Some(at)) = (since, time(&logged))
                && at < from
            {
                return ControlFlow::Continue(());
            }
            if let (Some(Moment::Time(to)), Some(at)) = (until, time(&logged))
                && at > to
            {
                return ControlFlow::Continue(());
            }
            if !filter.wants(&logged, &catalog) {
                return ControlFlow::Continue(());
            }
            if found.len() == most {
                if oldest_first || most == 0 {
                    return ControlFlow::Break(());
                }
                found.pop_front();
            }
            found.push_back(logged);
            ControlFlow::Continue(())
        })
        .await?;
    match context.out.format {
        Format::Table | Format::Wide => {
            let lines: Vec<_> = found.iter().map(|l| events::line(l, &catalog)).collect();
            context.out.table(&tables::log(&lines));
        }
        _ => {
            let documents: Vec<_> = found.iter().map(events::document).collect();
            context.out.many(&documents, Default::default);
        }
    }
    Ok(())
}

async fn show(context: &Context, seq: Seq, from: &From) -> Outcome {
    let history = History::open(&context.global, from).await?;
    let Some(logged) = history.get(seq).await? else {
        let (first, last) = history.bounds().await?;
        return Err(Failure::new(
            FailureKind::NotFound,
            format!("there is no event #{seq}"),
            format!("the log has #{first} to #{last}"),
        ));
    };
    context.out.one(&events::document(&logged), || events::text_of(&logged));
    Ok(())
}
