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

/// Nodes that the log does not know (yet) whose reports are kept, and reports kept of each: anyone on NATS can invent
/// names, and a node that joins is known within seconds.
const UNKNOWN_NODES_MAX: usize = 16;
const KEPT_PER_UNKNOWN_MAX: usize = 4;

/// Reports of one node folded at one tick: a backlog goes into the log over several ticks.
const FOLDED_PER_TICK_MAX: usize = 4;

/// Reports that arrived, by node, oldest first.
#[derive(Debug, Default)]
pub struct HeatBuffer {
    nodes: BTreeMap<NodeId, Waiting>,
    /// Reports of unknown nodes that were not kept.
    refused: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    reports: VecDeque<HeatReport>,
    /// What this leader published for folding, and which may not have come back through the log yet.
    published: Option<(Incarnation, u64)>,
}

impl HeatBuffer {
    /// Takes a message of the heat stream. One that is no report of its subject's node is dropped and logged; of nodes
    /// that the log does not know, few are kept and the rest is counted.
    pub fn push(&mut self, fetched: &Fetched, state: &State) {
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
        let is_known = |node: &NodeId| state.folded_reports(node).is_some();
        let kept_max = if is_known(&report.node) {
            KEPT_PER_NODE_MAX
        } else {
            let unknown = self.nodes.keys().filter(|node| !is_known(node)).count();
            if unknown >= UNKNOWN_NODES_MAX && !self.nodes.contains_key(&report.node) {
                return self.refuse(&report.node);
            }
            KEPT_PER_UNKNOWN_MAX
        };
        let waiting = self.nodes.entry(report.node.clone()).or_default();
        while waiting.reports.len() >= kept_max {
            waiting.reports.pop_front();
        }
        waiting.reports.push_back(report);
    }

    fn refuse(&mut self, node: &NodeId) {
        self.refused += 1;
        if self.refused.is_power_of_two() {
            tracing::warn!(%node, refused = self.refused, "heat reports of nodes that the log does not know are not kept");
        }
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

#[cfg(test)]
mod tests {
    use hearth_protocol::event::NodeJoined;
    use hearth_protocol::{ByteLen, Envelope, Event, Publisher, Seq, WallMs};

    use super::*;

    fn report(incarnation: u128, report_seq: u64) -> HeatReport {
        HeatReport::idle("n1".parse().unwrap(), Incarnation(incarnation), report_seq)
    }

    fn push(buffer: &mut HeatBuffer, state: &State, report: &HeatReport) {
        let fetched = Fetched {
            seq: Seq(1),
            subject: subject::heat(&report.node),
            message_id: None,
            frame: report.encode().into(),
        };
        buffer.push(&fetched, state);
    }

    fn join(state: &mut State, incarnation: u128) {
        let node: NodeId = "n1".parse().unwrap();
        let envelope = Envelope {
            codec: 1,
            subject: subject::node(&node),
            publisher: Publisher::Node(node.clone()),
            incarnation: Incarnation(incarnation),
            publisher_seq: 1,
            time: WallMs(0),
            reason: String::new(),
        };
        let joined = NodeJoined {
            node,
            incarnation: Incarnation(incarnation),
            storage_incarnation: Incarnation(1),
            previous: None,
            ram: ByteLen(0),
            main: ByteLen(0),
            fault_domain: "here".into(),
            peer_address: "unix:/nowhere".into(),
            layers: Vec::new(),
            heat_source: "export".into(),
        };
        let next = state.seq().next();
        state.apply(next, &envelope, &Event::NodeJoined(joined));
    }

    fn folded(buffer: &mut HeatBuffer, state: &State) -> Vec<(u64, u64)> {
        let events = buffer.fold(state, Term(1));
        events.iter().map(|e| (e.reports.0, e.gap)).collect()
    }

    #[test]
    fn reports_wait_for_their_node_and_gaps_are_counted_once() {
        let (mut buffer, mut state) = (HeatBuffer::default(), State::default());
        push(&mut buffer, &state, &report(7, 2));
        push(&mut buffer, &state, &report(7, 3));
        assert_eq!(folded(&mut buffer, &state), [], "nobody joined");
        join(&mut state, 7);
        push(&mut buffer, &state, &report(7, 6));
        assert_eq!(folded(&mut buffer, &state), [(2, 1), (3, 0), (6, 2)]);
        assert_eq!(folded(&mut buffer, &state), [], "they are on their way");
        push(&mut buffer, &state, &report(7, 6));
        push(&mut buffer, &state, &report(7, 7));
        assert_eq!(folded(&mut buffer, &state), [(7, 0)]);
    }

    #[test]
    fn invented_nodes_are_not_kept_and_push_nobody_out() {
        let (mut buffer, mut state) = (HeatBuffer::default(), State::default());
        join(&mut state, 7);
        push(&mut buffer, &state, &report(7, 1));
        for number in 0..10_000 {
            let invented = HeatReport::idle(format!("x{number}").parse().unwrap(), Incarnation(1), 1);
            push(&mut buffer, &state, &invented);
        }
        for seq in 1..100 {
            let invented = HeatReport::idle("x3".parse().unwrap(), Incarnation(1), seq);
            push(&mut buffer, &state, &invented);
        }
        let kept: usize = buffer.nodes.values().map(|waiting| waiting.reports.len()).sum();
        assert!(kept <= 1 + UNKNOWN_NODES_MAX * KEPT_PER_UNKNOWN_MAX, "{kept} reports");
        assert_eq!(buffer.refused, 10_000 - UNKNOWN_NODES_MAX as u64);
        assert_eq!(folded(&mut buffer, &state), [(1, 0)]);
    }

    #[test]
    fn a_restarted_node_starts_over_and_its_former_life_is_dropped() {
        let (mut buffer, mut state) = (HeatBuffer::default(), State::default());
        join(&mut state, 7);
        push(&mut buffer, &state, &report(7, 1));
        push(&mut buffer, &state, &report(8, 1));
        join(&mut state, 8);
        assert_eq!(folded(&mut buffer, &state), [(1, 0)]);
    }

    #[test]
    fn another_leaders_folding_and_foreign_reports_leave_nothing_behind() {
        let (mut buffer, mut state) = (HeatBuffer::default(), State::default());
        join(&mut state, 7);
        for seq in 1..=9 {
            push(&mut buffer, &state, &report(7, seq));
        }
        buffer.folded(&event(&report(7, 5), Term(1), 0));
        let foreign = Fetched {
            seq: Seq(1),
            subject: "hearth.heat.n2".into(),
            message_id: None,
            frame: report(7, 10).encode().into(),
        };
        buffer.push(&foreign, &state);
        // The log of this state knows nothing of that folding; what is kept is what counts.
        let kept: Vec<_> = folded(&mut buffer, &state).iter().map(|(seq, _)| *seq).collect();
        assert_eq!(kept, [6, 7, 8, 9]);
    }
}
