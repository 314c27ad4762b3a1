//! A short log of a simulated cluster: nodes, images, heat, ticks, decisions and their results, policies, and recorded
//! digests with their chain values.
#![allow(dead_code, reason = "each test file uses its own part")]

#[path = "../../core/tests/sim/mod.rs"]
mod sim;

use hearth_bus::Fetched;
use hearth_protocol::{Envelope, Event, Message, Publisher, Seq, subject};
use hearth_scheduler::log::{Entry, EventLog, Head, MemoryLog};
use scheduler_core::{DIGEST_EVERY_TICKS, DigestBook};
use sim::{Sim, reads};

/// The message under the subject that a real publisher uses.
fn as_published(message: &Message) -> Message {
    let mut envelope = message.envelope().unwrap();
    let event = message.event().unwrap();
    envelope.subject = match (&envelope.publisher, &event) {
        (Publisher::Scheduler(id), Event::TermStarted { .. } | Event::Ticked { .. }) => subject::lead(id),
        (Publisher::Scheduler(id), Event::HeatFolded(_)) => subject::folded_heat(id),
        (Publisher::Scheduler(_), Event::CommandGiven(command)) => subject::command(&command.node),
        (Publisher::Scheduler(id), _) => subject::record(id),
        (Publisher::Node(id), _) => subject::node(id),
    };
    Message::encode(&envelope, &event)
}

pub fn entry(seq: Seq, message: &Message) -> Entry {
    Entry::from_fetched(Fetched {
        seq,
        subject: message.envelope().unwrap().subject,
        message_id: None,
        frame: message.to_frame().into(),
    })
    .unwrap()
}

/// `seconds` of a cluster of two nodes whose hot sets move.
pub fn session(seconds: u64) -> Vec<Entry> {
    let mut sim = Sim::default();
    let (mut entries, mut head) = (Vec::new(), Head::default());
    let mut gather = |sim: &Sim| {
        for (seq, message) in &sim.log[entries.len()..] {
            let entry = entry(*seq, &as_published(message));
            head = entry.after(&head);
            entries.push(entry);
        }
        (entries.clone(), head.clone())
    };
    sim.join("n1", 8);
    sim.join("n2", 8);
    sim.image("n1", 1, 1_000);
    sim.image("n2", 2, 1_000);
    sim.policy(|p| p.half_life_s = 20);
    let mut book = DigestBook::default();
    for second in 0..seconds {
        let first = second / 4 * 3;
        let records: Vec<_> = (first..first + 6).map(|b| reads(b, 3 + (b % 4) as u32)).collect();
        sim.heat("n1", 1, 1, &records);
        sim.heat("n2", 2, 2, &records[..3]);
        let commands = sim.tick_only(1_000);
        if sim.tick.0.is_multiple_of(DIGEST_EVERY_TICKS) {
            let (_, head) = gather(&sim);
            let (state, decisions) = book.note(&sim.state);
            sim.lead(Event::DigestRecorded {
                term: sim.term,
                at: head.seq,
                state,
                decisions,
                chain: Some(head.chain),
            });
        }
        for command in &commands {
            sim.lead(Event::CommandGiven(command.clone()));
        }
        for command in &commands {
            sim.obey(command);
        }
    }
    gather(&sim).0
}

/// A log in memory that holds these entries, with the chain computed anew.
pub fn logged(entries: &[Entry]) -> MemoryLog {
    let mut log = MemoryLog::default();
    log.append(entries).unwrap();
    log
}

/// The entries with new positions from 1 on, as someone would number them who computes a chain anew.
pub fn renumbered(entries: impl IntoIterator<Item = Entry>) -> Vec<Entry> {
    let all = entries.into_iter().zip(1..);
    all.map(|(e, seq)| entry(Seq(seq), &e.message)).collect()
}

/// The entry with its event changed.
pub fn altered(of: &Entry, change: impl FnOnce(&mut Envelope, &mut Event)) -> Entry {
    let (mut envelope, mut event) = of.event.clone().unwrap();
    change(&mut envelope, &mut event);
    entry(of.seq, &Message::encode(&envelope, &event))
}
