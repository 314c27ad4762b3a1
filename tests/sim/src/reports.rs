//! Heat reports on their way into the log: each scheduler keeps those that arrived and are not folded yet, in the simulated
//! form of the scheduler's own buffer. What they say of blocks is left out: here they say that a node lives.

use std::collections::{BTreeMap, VecDeque};

use hearth_protocol::event::HeatFolded;
use hearth_protocol::heat::TierUse;
use hearth_protocol::{Incarnation, NodeId, Term, WallMs};
use scheduler_core::State;

/// Reports kept per node, and of one that the log does not know.
const KEPT_MAX: usize = 60;
const KEPT_UNKNOWN_MAX: usize = 4;

/// Reports of one node folded at one tick.
const FOLDED_PER_TICK_MAX: usize = 4;

/// A report: its node, that one's process start, its number.
pub type Report = (NodeId, Incarnation, u64);

/// See the module.
#[derive(Debug, Default)]
pub struct Reports {
    nodes: BTreeMap<NodeId, Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    reports: VecDeque<(Incarnation, u64)>,
    /// Published for folding by this leader.
    published: Option<(Incarnation, u64)>,
}

impl Reports {
    /// One arrived.
    pub fn push(&mut self, (node, incarnation, number): Report, state: &State) {
        let kept = match state.folded_reports(&node) {
            Some(_) => KEPT_MAX,
            None => KEPT_UNKNOWN_MAX,
        };
        let waiting = self.nodes.entry(node).or_default();
        while waiting.reports.len() >= kept {
            waiting.reports.pop_front();
        }
        waiting.reports.push_back((incarnation, number));
    }

    /// A leader folded some.
    pub fn folded(&mut self, heat: &HeatFolded) {
        if let Some(waiting) = self.nodes.get_mut(&heat.node) {
            let left = |report: &(Incarnation, u64)| report.0 != heat.incarnation || report.1 > heat.reports.1;
            waiting.reports.retain(left);
        }
    }

    /// A new term: what was published and never came back is folded again.
    pub fn restart(&mut self) {
        for waiting in self.nodes.values_mut() {
            waiting.published = None;
        }
    }

    /// The next ones as events of a term.
    pub fn fold(&mut self, state: &State, term: Term) -> Vec<HeatFolded> {
        let mut events = Vec::new();
        for (node, waiting) in &mut self.nodes {
            let Some((incarnation, in_log)) = state.folded_reports(node) else {
                continue;
            };
            let mut last = match waiting.published {
                Some((published, number)) if published == incarnation => number.max(in_log),
                _ => in_log,
            };
            let begins = last;
            let fresh = waiting.reports.iter().filter(|report| report.0 == incarnation);
            for (_, number) in fresh.filter(|report| report.1 > begins).take(FOLDED_PER_TICK_MAX) {
                events.push(HeatFolded {
                    term,
                    node: node.clone(),
                    incarnation,
                    reports: (*number, *number),
                    gap: number.saturating_sub(last + 1),
                    time: WallMs(0),
                    images: Vec::new(),
                    tier: TierUse::default(),
                    disks: Vec::new(),
                    probe_events_total: 0,
                    probe_lost_total: 0,
                    dropped: Vec::new(),
                });
                last = last.max(*number);
            }
            waiting.published = Some((incarnation, last));
            waiting
                .reports
                .retain(|report| report.0 != incarnation || report.1 > last);
        }
        events
    }
}
