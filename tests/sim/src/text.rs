//! How inputs, outputs and records read in a trace.

use hearth_protocol::NodeId;
use hearth_protocol::record::{Nodes, Record};
use hearth_replication::session::{Input, Message, Output};

/// An input in one line.
pub fn shown(input: &Input) -> String {
    match input {
        Input::Peer { from, message } => format!("{from}: {}", said(message)),
        Input::Logged(change) => format!("Logged {}", text(&change.to)),
        Input::Rebased(log) => format!("Rebased {}", text(&log.record)),
        other => format!("{other:?}"),
    }
}

/// An output in one line.
pub fn wanted(output: &Output) -> String {
    match output {
        Output::Send { to, message, .. } => format!("{to}: {}", said(message)),
        Output::Publish(change) => format!("Publish {}", text(&change.to)),
        Output::Persist(durable) => match &durable.record {
            Some(record) => format!("Persist {} sealed {:?}", text(record), durable.sealed),
            None => "Persist nothing".to_owned(),
        },
        other => format!("{other:?}"),
    }
}

fn said(message: &Message) -> String {
    let stamp =
        |stamp: &hearth_protocol::record::Stamp| format!("{}.{}.{}", stamp.epoch, stamp.lease.0, stamp.set_version);
    match message {
        Message::Request(request) => format!("{:?} {:?} under {}", request.id, request.work, stamp(&request.stamp)),
        Message::Answer {
            id,
            answer,
            stamp: under,
        } => format!("{id:?} {answer:?} under {}", stamp(under)),
        Message::Raise { record, over } => format!("Raise {} over {}", text(record), stamp(over)),
        Message::Raised(standing) | Message::Told { standing, .. } => {
            let record = standing.record.as_ref().map_or_else(String::new, |record| text(record));
            let lost: Vec<u64> = standing.lost.iter().map(|block| block.0).collect();
            let lost = if lost.is_empty() {
                String::new()
            } else {
                format!(", lost {lost:?}")
            };
            let failed = if standing.failed { ", failed" } else { "" };
            let doubt: Vec<u64> = standing.doubt.iter().map(|block| block.0).collect();
            let what = if matches!(message, Message::Raised(_)) {
                "Raised"
            } else {
                "Told"
            };
            format!(
                "{what} {record}{lost}{failed}, doubt {doubt:?}, sealed {:?}, store {}",
                standing.sealed, standing.store.0
            )
        }
        other => format!("{other:?}"),
    }
}

/// A record in a few characters.
pub fn text(record: &Record) -> String {
    let names = |nodes: &Nodes| nodes.iter().map(NodeId::as_str).collect::<Vec<_>>().join(",");
    let runs = record
        .runs()
        .iter()
        .map(|run| format!(" [{}: {}|{}]", run.first, names(&run.members), names(&run.joiners)));
    let stamp = record.stamp();
    let first = format!("{}.{}.{}", stamp.epoch, stamp.lease.0, stamp.set_version);
    runs.fold(first, |all, run| all + &run)
}
