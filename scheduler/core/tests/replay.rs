//! Replays of a recorded session: same decisions, same digests, and explanations from the log alone.

mod sim;

use hearth_protocol::{BlockIndex, Event, ImageId, ImageName, Message, Seq, WallMs};
use scheduler_core::replay::{Difference, Replayer, Step, Until};
use scheduler_core::why::{Why, WhyError, WhyImage, WhyReport};
use scheduler_core::{DigestBook, State};
use sim::{Sim, reads};

/// Two minutes of a node whose hot set moves, with a digest recorded whenever one is due.
fn session() -> Sim {
    let mut sim = Sim::default();
    sim.join("n1", 8);
    sim.image("n1", 1, 1_000);
    sim.image("n1", 2, 1_000);
    sim.policy(|p| p.half_life_s = 20);
    let mut book = DigestBook::default();
    for second in 0..120 {
        let first = second / 10 * 5;
        let records: Vec<_> = (first..first + 6).map(|b| reads(b, 3 + (b % 4) as u32)).collect();
        sim.heat("n1", 1, 1, &records);
        sim.heat("n1", 2, 2, &records[..3]);
        sim.second();
        if sim.tick.0.is_multiple_of(scheduler_core::DIGEST_EVERY_TICKS) {
            // The digest covers the tick; what followed it has been folded meanwhile.
            let at = sim
                .log
                .iter()
                .rev()
                .find_map(|(seq, m)| matches!(m.event(), Ok(Event::Ticked { .. })).then_some(*seq));
            let at = at.unwrap();
            let mut replayer = Replayer::new(Until::Seq(at));
            sim.log.iter().for_each(|(seq, m)| drop(replayer.step(*seq, m)));
            let (state, decisions) = book.note(replayer.state());
            sim.lead(Event::DigestRecorded {
                term: sim.term,
                at,
                state,
                decisions,
                chain: None,
            });
        }
    }
    sim
}

fn replay(log: &[(Seq, Message)], until: Until) -> (State, scheduler_core::replay::ReplayReport) {
    let mut replayer = Replayer::new(until);
    for (seq, message) in log {
        if replayer.step(*seq, message) == Step::Stopped {
            break;
        }
    }
    replayer.finish()
}

#[test]
fn a_log_follows_from_itself() {
    let sim = session();
    let (state, report) = replay(&sim.log, Until::End);
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.digests_same, 12);
    assert_eq!(report.commands_withheld, 0);
    assert!(report.commands_same > 20, "{report:?}");
    assert_eq!(state.digest(), sim.state.digest());
    assert_eq!(state.decisions_digest(), sim.state.decisions_digest());
    assert_eq!(state, sim.state);
}

#[test]
fn a_changed_command_is_found() {
    let mut sim = session();
    let at = sim
        .log
        .iter()
        .position(|(_, m)| matches!(m.event(), Ok(Event::CommandGiven(_))))
        .unwrap();
    let (seq, message) = &mut sim.log[at];
    let envelope = message.envelope().unwrap();
    let Ok(Event::CommandGiven(mut command)) = message.event() else {
        unreachable!()
    };
    command.reason.policy_version += 1;
    *message = Message::encode(&envelope, &Event::CommandGiven(command));
    let seq = *seq;
    let (_, report) = replay(&sim.log, Until::End);
    assert!(!report.is_sound());
    assert!(matches!(&report.differences[0], Difference::Command { seq: s, derived: Some(_), .. } if *s == seq));
    assert!(
        report
            .differences
            .iter()
            .any(|d| matches!(d, Difference::State { .. } | Difference::Decisions { .. }))
    );
}

#[test]
fn commands_that_were_never_given_are_withheld_not_different() {
    let mut sim = Sim::default();
    sim.join("n1", 8);
    sim.image("n1", 1, 1_000);
    sim.heat("n1", 1, 1, &[reads(1, 5)]);
    sim.tick_only(1_000);
    sim.second();
    let (_, report) = replay(&sim.log, Until::End);
    assert!(report.is_sound());
    assert_eq!((report.commands_withheld, report.commands_same), (1, 1));
}

#[test]
fn a_replay_stops_at_a_position_or_a_time() {
    let sim = session();
    let (state, _) = replay(&sim.log, Until::Seq(Seq(57)));
    assert_eq!(state.seq(), Seq(57));
    let (state, _) = replay(&sim.log, Until::Time(WallMs(1_000_000 + 30_500)));
    assert_eq!(state.tick().0, 30);
    let (at_30, _) = replay(&sim.log, Until::Time(WallMs(1_000_000 + 30_000)));
    assert_eq!(at_30.digest(), state.digest());
}

#[test]
fn a_snapshot_goes_on_like_the_state_it_was_taken_of() {
    let sim = session();
    let recorded = |(_, message): &(Seq, Message)| match message.event() {
        Ok(Event::DigestRecorded { at, .. }) => Some(at),
        _ => None,
    };
    let at = sim.log.iter().filter_map(recorded).nth(4).unwrap();
    let (half, first) = replay(&sim.log, Until::Seq(at));
    let read = State::decode(&half.encode()).unwrap();
    assert_eq!(read, half);
    let mut replayer = Replayer::from_snapshot(read, Until::End);
    for (seq, message) in sim.log.iter().filter(|(seq, _)| *seq > at) {
        replayer.step(*seq, message);
    }
    let (state, second) = replayer.finish();
    assert_eq!(state.digest(), sim.state.digest());
    // What follows from the snapshot's own tick is expected behind it, and nothing else is.
    assert!(second.is_sound(), "{second:#?}");
    let (_, whole) = replay(&sim.log, Until::End);
    assert_eq!(second.commands_withheld, 0);
    assert_eq!(first.commands_same + second.commands_same, whole.commands_same);
    assert_eq!(first.digests_same + second.digests_same, whole.digests_same);
}

#[test]
fn foreign_messages_are_skipped() {
    let mut sim = session();
    let junk = Message {
        envelope: vec![1, 2, 3],
        payload: Vec::new(),
    };
    let last = sim.log.last().unwrap().0;
    sim.log.push((last.next(), junk));
    let (state, report) = replay(&sim.log, Until::End);
    assert_eq!((report.foreign, state.digest()), (1, sim.state.digest()));
}

fn why(log: &[(Seq, Message)], image: WhyImage, block: u64) -> Result<WhyReport, WhyError> {
    let mut replayer = Replayer::new(Until::End);
    let mut why = Why::new(image, BlockIndex(block));
    for (seq, message) in log {
        if let Step::Folded { event, applied, .. } = replayer.step(*seq, message) {
            why.observe(*seq, &event, applied, replayer.state());
        }
    }
    why.answer(replayer.state())
}

fn named(name: &str) -> WhyImage {
    WhyImage::Name(name.parse::<ImageName>().unwrap())
}

#[test]
fn why_tells_the_chain_from_heat_to_result() {
    let sim = session();
    let report = why(&sim.log, named("appl/vm-1"), 7).unwrap();
    assert_eq!(report, why(&sim.log, WhyImage::Id(ImageId(1)), 7).unwrap());
    let promoted = report.decisions.iter().find(|d| d.verb == "promote").unwrap();
    let result = promoted.result.as_ref().unwrap();
    assert!(report.heat.iter().any(|h| Some(h.seq) == promoted.heat_seq));
    assert!(promoted.heat_seq.unwrap() < promoted.seq && promoted.seq < result.seq);
    assert_eq!(result.how, "done");
    let demoted = report.decisions.iter().find(|d| d.verb == "demote").unwrap();
    assert!(demoted.seq > result.seq);
    let text = report.to_string();
    for word in [
        "heat ",
        "rule ",
        "threshold_score 1.93",
        "command ",
        "result ",
        "rests on seq",
    ] {
        assert!(text.contains(word), "{word:?} in\n{text}");
    }
    let layers: Vec<_> = report.layer_names.values().collect();
    assert_eq!(layers, ["top of appl/vm-1", "top of appl/vm-2"]);
    assert_eq!(report.image_names[&ImageId(1)], "appl/vm-1");
    assert!(text.contains(" of layer top of appl/vm-"), "{text}");
    // As JSON and back.
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<WhyReport>(&json).unwrap(), report);
}

#[test]
fn why_says_what_is_missing() {
    let sim = session();
    assert!(matches!(
        why(&sim.log, named("appl/none"), 7),
        Err(WhyError::NoImage(_))
    ));
    let error = why(&sim.log, named("appl/vm-1"), 1_000).unwrap_err();
    assert_eq!(
        error.to_string(),
        "image appl/vm-1 has blocks 0 to 999, there is no block 1000"
    );
    let untouched = why(&sim.log, named("appl/vm-1"), 999).unwrap();
    assert_eq!(untouched.verdict, "on disk: no heat event ever counted a read of it");
}

/// A tick of a scheduler that did not win the term: void, and nothing but counters knows of it.
#[test]
fn a_void_event_changes_nothing_but_counters() {
    let mut sim = session();
    let before = sim.state.clone();
    let rival = hearth_protocol::Publisher::Scheduler("rival".parse().unwrap());
    let tick = Event::Ticked {
        term: sim.term,
        tick: hearth_protocol::TickNo(sim.tick.0 + 1_000),
        time: WallMs(sim.time.0 + 1_000_000),
    };
    let applied = sim.publish(rival, hearth_protocol::Incarnation(9), &tick);
    assert!(matches!(applied.judged, scheduler_core::Judged::Void(_)), "{applied:?}");
    assert_eq!((sim.state.tick(), sim.state.time()), (before.tick(), before.time()));
    assert_eq!(sim.state.totals().void, before.totals().void + 1);
    assert_eq!(sim.state.decide(), before.decide());
}
