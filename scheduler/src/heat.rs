//! Heat reports on their way into the log: every scheduler keeps those that arrived and are not yet folded, so that
//! whoever leads next goes on where the last leader stopped.

use std::collections::{BTreeMap, VecDeque};

use hearth_bus::Fetched;
use hearth_protocol::event::HeatFolded;
use hearth_protocol::heat::HeatReport;
use hearth_protocol::{Incarnation, NodeId, Term, subject};
use scheduler_core::State;

/// Reports kept per node: a minute without a leader.
const KEPT_PER_NODE_MAX: usize = 60;

/// Reports of one node folded at one tick: a backlog goes into the log over several ticks.
const FOLDED_PER_TICK_MAX: usize = 4;

/// Reports that arrived, by node, oldest first.
#[derive(Debug, Default)]
pub struct HeatBuffer {
    nodes: BTreeMap<NodeId, Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    reports: VecDeque<HeatReport>,
    /// What this leader published for folding, and which may not have come back through the log yet.
    published: Option<(Incarnation, u64)>,
}

impl HeatBuffer {
    /// Takes a message of the heat stream. One that is no report of its subject's node is dropped and logged.
    pub fn push(&mut self, fetched: &Fetched) {
        let report = match HeatReport::decode(&fetched.frame) {
            Ok(report) if subject::heat(&report.node) == fetched.subject => report,
            Ok(report) => {
                tracing::warn!(subject = %fetched.subject, node = %report.node, "heat report under a foreign subject");
                return;
            }
            Err(error) => {
                tracing::warn!(subject = %fetched.subject, %error, "heat report that cannot be read");
                return;
            }
        };
        let waiting = self.nodes.entry(report.node.clone()).or_default();
        if waiting.reports.len() == KEPT_PER_NODE_MAX {
            waiting.reports.pop_front();
        }
        waiting.reports.push_back(report);
    }

    /// Drops what a leader folded, this one or another.
    pub fn folded(&mut self, heat: &HeatFolded) {
        if let Some(waiting) = self.nodes.get_mut(&heat.node) {
            waiting
                .reports
                .retain(|r| r.incarnation != heat.incarnation || r.report_seq > heat.reports.1);
        }
    }

    /// A new term: what an earlier leadership published and never came back is folded again.
    pub fn restart(&mut self) {
        for waiting in self.nodes.values_mut() {
            waiting.published = None;
        }
    }

    /// The next reports as events of `term`, some per node, with gaps counted. Reports of a process start that the
    /// log does not know (yet, or any more) wait until it does or are dropped as the oldest.
    pub fn fold(&mut self, state: &State, term: Term) -> Vec<HeatFolded> {
        let mut events = Vec::new();
        for (node, waiting) in &mut self.nodes {
            let Some((incarnation, in_log)) = state.folded_reports(node) else {
                continue;
            };
            let mut last = match waiting.published {
                Some((published, seq)) if published == incarnation => seq.max(in_log),
                _ => in_log,
            };
            let mut folded = 0;
            for report in &waiting.reports {
                if report.incarnation != incarnation || report.report_seq <= last {
                    continue;
                }
                if folded == FOLDED_PER_TICK_MAX {
                    break;
                }
                events.push(event(report, term, report.report_seq - last - 1));
                last = report.report_seq;
                folded += 1;
            }
            waiting.published = Some((incarnation, last));
            // What stands at or before `last` is on its way into the log.
            waiting
                .reports
                .retain(|r| r.incarnation != incarnation || r.report_seq > last);
        }
        events
    }
}

fn event(report: &HeatReport, term: Term, gap: u64) -> HeatFolded {
    HeatFolded {
        term,
        node: report.node.clone(),
        incarnation: report.incarnation,
        reports: (report.report_seq, report.report_seq),
        gap,
        time: report.time,
        images: report.images.clone(),
        tier: report.tier,
        disks: report.disks.clone(),
        probe_events_total: report.probe_events_total,
        probe_lost_total: report.probe_lost_total,
        dropped: report.dropped.clone(),
    }
}
