//! `hearth policy`.

use hearth_protocol::ByteLen;
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::rpc::{Failure, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_protocol::view::MoveAccount;
use hearth_tui::{fmt, narrate};
use serde::Serialize;

use super::{Context, plan};
use crate::Outcome;
use crate::cli::Policy;
use crate::cluster::unexpected;

#[derive(Serialize)]
struct Shown<'a> {
    version: u64,
    #[serde(flatten)]
    tier: &'a TierPolicy,
    moves: &'a [MoveAccount],
}

pub async fn run(context: &Context, verb: Policy) -> Outcome {
    let cluster = context.cluster().await?;
    let view = cluster.view().await?;
    let (version, old) = view.policy;
    match verb {
        Policy::Show => {
            let shown = Shown {
                version,
                tier: &old,
                moves: &view.moves,
            };
            context.out.one(&shown, || text(version, &old) + &ledger(&view.moves));
            Ok(())
        }
        Policy::Set { settings, change } => {
            let mut policy = old.clone();
            for setting in &settings {
                setting
                    .apply(&mut policy)
                    .map_err(|e| Failure::new(FailureKind::Usage, e, "hearth policy show"))?;
            }
            if policy == old {
                return Err(Failure::new(
                    FailureKind::Usage,
                    format!("policy version {version} has these values already"),
                    "hearth policy show",
                ));
            }
            let request = SchedulerRequest::PolicySet {
                policy,
                reason: change.reason,
            };
            if change.dry_run {
                plan::scheduler(context, &format!("replace policy version {version}"), &request);
                return Ok(());
            }
            let reply = cluster.scheduler(&request).await?;
            let SchedulerReply::Done { seq } = &reply else {
                return Err(unexpected("the scheduler", &reply));
            };
            context.out.one(&reply, || format!("policy set at #{seq}\n"));
            Ok(())
        }
    }
}

fn text(version: u64, p: &TierPolicy) -> String {
    let centi = |c: u64| format!("{}.{:02} bursts", c / 100, c % 100);
    format!(
        "policy version            {version}\n\
         enabled                   {}\n\
         half_life_s               {} ({})\n\
         margin_percent            {}\n\
         threshold_bursts          {}\n\
         demote_below_centibursts  {} ({})\n\
         promote_bytes_per_s_max   {} ({}/s)\n\
         in_flight_bytes_max       {} ({})\n",
        p.enabled,
        p.half_life_s,
        fmt::seconds(p.half_life_s),
        p.margin_percent,
        p.threshold_bursts,
        p.demote_below_centibursts,
        centi(p.demote_below_centibursts),
        p.promote_bytes_per_s_max,
        fmt::bytes(ByteLen(p.promote_bytes_per_s_max)),
        p.in_flight_bytes_max,
        fmt::bytes(ByteLen(p.in_flight_bytes_max)),
    )
}

/// What moves of replicas won and cost, a line for each rule.
fn ledger(accounts: &[MoveAccount]) -> String {
    let mut text = String::new();
    for account in accounts {
        text += &format!(
            "{:<25} {}, {} failed, {} copied; of {} promised {} lasted",
            account.rule,
            narrate::plural(account.done, "move"),
            account.failed,
            fmt::bytes(account.bytes),
            account.predicted,
            account.realised
        );
        if let Some(until) = account.off_until {
            text += &format!("; off until tick {until}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use hearth_protocol::TickNo;

    use super::*;

    #[test]
    fn the_ledger_says_what_lasted_and_what_is_off() {
        let account = MoveAccount {
            rule: "spread/replicate".into(),
            done: 3,
            failed: 1,
            bytes: ByteLen(3 << 30),
            predicted: 2,
            realised: 1,
            off_until: Some(TickNo(99)),
        };
        let text = ledger(&[account]);
        let expect =
            "spread/replicate          3 moves, 1 failed, 3 GiB copied; of 2 promised 1 lasted; off until tick 99\n";
        assert_eq!(text, expect);
        assert_eq!(ledger(&[]), "");
    }
}
