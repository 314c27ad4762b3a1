//! `hearth policy`.

use hearth_protocol::ByteLen;
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::rpc::{Failure, FailureKind, SchedulerReply, SchedulerRequest};
use hearth_tui::fmt;
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
}

pub async fn run(context: &Context, verb: Policy) -> Outcome {
    let cluster = context.cluster().await?;
    let (version, old) = cluster.view().await?.policy;
    match verb {
        Policy::Show => {
            context.out.one(&Shown { version, tier: &old }, || text(version, &old));
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
