//! `hearth log`.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::time::Duration;

use hearth_bus::BusError;
use hearth_protocol::Seq;
use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_tui::{fmt, tables};
use scheduler_core::replay::{Difference, ReplayReport, Replayer, Until};
use serde::Serialize;

use super::Context;
use super::events::{self, Catalog, Filter};
use crate::Outcome;
use crate::cli::{From, Log, Only};
use crate::cluster::bus_failure;
use crate::history::{Chain, History, Logged, logged};
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
        Log::Verify { from } => verify(context, &from).await,
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

/// What `verify` found.
#[derive(Debug, Serialize)]
struct Verified {
    /// Everything is as it must be.
    verified: bool,
    /// Messages read; contiguous from 1.
    events: u64,
    /// Chain value after the last one, computed.
    chain: String,
    /// First position whose kept chain value is another one; only a scheduler's folder keeps them.
    chain_broken_at: Option<Seq>,
    /// What disagrees within the state that the log gives.
    audit: Option<String>,
    /// Decisions and digests, derived again.
    replay: ReplayReport,
}

async fn verify(context: &Context, from: &From) -> Outcome {
    let history = History::open(&context.global, from).await?;
    let last = history.check_whole().await?;
    let mut chain = Chain::new();
    let mut replayer = Replayer::new(Until::End);
    let mut events = 0;
    history
        .walk(Seq(1), last, |logged| {
            chain.push(&logged);
            replayer.step(logged.seq, &logged.message);
            events += 1;
            ControlFlow::Continue(())
        })
        .await?;
    let (state, replay) = replayer.finish();
    let audit = state.audit().err();
    let verified = Verified {
        verified: replay.is_sound() && chain.broken.is_none() && audit.is_none() && events == last.0,
        events,
        chain: chain.hex(),
        chain_broken_at: chain.broken,
        audit,
        replay,
    };
    context.out.one(&verified, || text(&verified));
    if verified.verified {
        Ok(())
    } else {
        Err(Failure::new(
            FailureKind::Failed,
            "the log does not verify",
            "the differences are above; compare with another scheduler's folder: hearth log verify --log-dir DIR",
        ))
    }
}

fn text(v: &Verified) -> String {
    let r = &v.replay;
    let mut out = format!(
        "events       {}, contiguous from #1, {} void, {} repeats, {} foreign\n\
         chain        {}{}\n\
         decisions    {} follow from {} ticks, {} withheld, {} digests agree, {} not compared\n\
         state        {}\n",
        fmt::count(v.events),
        r.void,
        r.repeats,
        r.foreign,
        v.chain,
        match v.chain_broken_at {
            Some(seq) => format!(", BROKEN at #{seq}"),
            None => String::new(),
        },
        fmt::count(r.commands_same),
        fmt::count(r.ticks),
        r.commands_withheld,
        r.digests_same,
        r.digests_unchecked,
        v.audit.as_deref().unwrap_or("its accounts agree with a recount")
    );
    for difference in &r.differences {
        out += &format!("DIFFERENCE   {}\n", told(difference));
    }
    let hidden = r.differences_total - r.differences.len() as u64;
    if hidden > 0 {
        out += &format!("DIFFERENCE   and {hidden} more\n");
    }
    out += if v.verified { "verified\n" } else { "NOT VERIFIED\n" };
    out
}

fn told(difference: &Difference) -> String {
    match difference {
        Difference::Command {
            seq,
            tick_seq,
            derived,
            logged,
        } => format!(
            "command #{seq} ({}) does not follow from its tick{}: {}",
            hearth_tui::narrate::command(logged, &[]),
            tick_seq.map_or(String::new(), |s| format!(" #{s}")),
            match derived {
                Some(derived) => format!("that gives {}", hearth_tui::narrate::command(derived, &[])),
                None => "that gives nothing more".into(),
            }
        ),
        Difference::State {
            seq,
            at,
            derived,
            logged,
        } => format!("digest #{seq} of the state at #{at} is {logged}, the log gives {derived}"),
        Difference::Decisions {
            seq,
            at,
            derived,
            logged,
        } => format!("digest #{seq} of the decisions at #{at} is {logged}, the log gives {derived}"),
    }
}
