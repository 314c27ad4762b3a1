//! `hearth log verify`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use hearth_protocol::Seq;
use hearth_protocol::chain::{Witness, from_hex};
use hearth_protocol::rpc::{Failure, FailureKind};
use hearth_scheduler::log::Head;
use hearth_scheduler::verify::{Verified, Verifier, verify_log};
use hearth_tui::fmt;
use scheduler_core::replay::Difference;

use super::Context;
use crate::Outcome;
use crate::cli::From;
use crate::history::{History, log_failure};

pub async fn run(context: &Context, witnesses: &[PathBuf], from: &From) -> Outcome {
    let witnesses = witnesses.iter().map(|path| read(path)).collect::<Outcome<Vec<_>>>()?;
    let history = History::open(&context.global, from).await?;
    let verified = match &history {
        History::Folder(log) => verify_log(log.as_ref(), &witnesses).map_err(|e| log_failure(&e))?,
        History::Stream(_) => {
            let last = history.check_whole().await?;
            let mut verifier = Verifier::new(&witnesses, None);
            history
                .walk(Seq(1), last, |logged| {
                    if verifier.push_message(logged.seq, &logged.message) {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
                    }
                })
                .await?;
            verifier.finish()
        }
    };
    context.out.one(&verified, || text(&verified));
    if verified.verified {
        Ok(())
    } else {
        Err(Failure::new(
            FailureKind::Failed,
            "the log does not verify",
            "what is wrong is above; compare with another scheduler's folder: hearth log verify --log-dir DIR",
        ))
    }
}

fn read(path: &Path) -> Outcome<Head> {
    let usage = |why: String| {
        Failure::new(
            FailureKind::Usage,
            format!("{} is no witness: {why}", path.display()),
            "name a node's file log-witness.json, or write {\"seq\": N, \"chain\": \"HEX\"}",
        )
    };
    let text = std::fs::read_to_string(path).map_err(|error| usage(error.to_string()))?;
    let witness: Witness = serde_json::from_str(&text).map_err(|error| usage(error.to_string()))?;
    Ok(Head {
        seq: witness.seq,
        chain: from_hex(&witness.chain).ok_or_else(|| usage("its chain value is not 64 hexadecimal digits".into()))?,
    })
}

fn text(v: &Verified) -> String {
    let r = &v.replay;
    let mut out = format!(
        "events       {}, contiguous from #1, {} void, {} repeats, {} foreign\n\
         chain        {}, {} witnesses agree\n\
         decisions    {} follow from {} ticks, {} withheld, {} digests agree, {} not compared\n",
        fmt::count(v.events),
        r.void,
        r.repeats,
        r.foreign,
        v.chain,
        v.witnesses_same,
        fmt::count(r.commands_same),
        fmt::count(r.ticks),
        r.commands_withheld,
        r.digests_same,
        r.digests_unchecked,
    );
    if let Some(left) = &v.not_derivable {
        let since = left.times.0.map_or("the beginning".into(), fmt::time);
        let until = left.times.1.map_or("the end".into(), fmt::time);
        out += &format!(
            "thinned      {} heat events, from #{} to #{} ({since} to {until}): {} commands and {} digests there are \
             verified by hash, not derivable again\n",
            fmt::count(left.heat),
            left.positions.0,
            left.positions.1,
            fmt::count(left.commands),
            fmt::count(left.digests)
        );
    }
    let accounts = v.audit.as_deref().unwrap_or("its accounts agree with a recount");
    out += &format!("state        {accounts}\n");
    for finding in &v.findings {
        out += &format!("WRONG        #{}: {}\n", finding.seq, finding.what);
    }
    for difference in &r.differences {
        out += &format!("DIFFERENCE   {}\n", told(difference));
    }
    let hidden = r.differences_total - r.differences.len() as u64 + v.findings_total - v.findings.len() as u64;
    if hidden > 0 {
        out += &format!("             and {hidden} more\n");
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
