//! Two schedulers, one leader: the standby leads soon after the leader dies or stands still, and one that comes back
//! after it was replaced changes nothing.
//!
//! A few changes of the leader by default. The long form: `HEARTH_LEADER_CHANGES=1000 cargo test -p hearth-scheduler --test
//! leaders` (over an hour, mostly waiting); its last line says how long the standby took.

mod common;

use std::time::{Duration, Instant};

use common::{Process, TalkingNode, Watch, connect};
use hearth_bus::testing::NatsServer;
use hearth_protocol::{Envelope, Event, Term};
use hearth_scheduler::log::{EventLog, RocksLog};
use hearth_scheduler::replica::Replica;
use scheduler_core::{Judged, State};

/// Forced changes, when `HEARTH_LEADER_CHANGES` says nothing.
const CHANGES: u64 = 3;

/// In which a standby must lead.
const TAKEOVER_WITHIN: Duration = Duration::from_secs(5);

fn changes() -> u64 {
    let text = std::env::var("HEARTH_LEADER_CHANGES").ok();
    text.map_or(CHANGES, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("HEARTH_LEADER_CHANGES={text} is no number"))
    })
}

fn signal(process: &Process, name: &str) {
    let pid = process.pid().expect("it runs").to_string();
    let sent = std::process::Command::new("kill").args([name, &pid]).status().unwrap();
    assert!(sent.success());
}

fn publisher(id: &str) -> String {
    format!("scheduler-{id}")
}

/// Waits for a tick under a higher term than `above` and returns its term and who ticked.
async fn next_leader(watch: &mut Watch, above: Term) -> (Term, String) {
    let mut found = None;
    let mut fits = |envelope: &Envelope, event: &Event| match event {
        Event::Ticked { term, .. } if *term > above => {
            found = Some((*term, envelope.publisher.token().to_owned()));
            true
        }
        _ => false,
    };
    watch.until("another leader's tick", &mut fits).await;
    found.expect("a tick was found")
}

/// The leader is killed, or stands still until another leads and then goes on as if nothing had been: in turn.
#[tokio::test(flavor = "multi_thread")]
async fn one_leads_at_a_time_however_often_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let server = NatsServer::start(&dir.path().join("nats"));
    let start = |id: &str| Process::start(&server, id, &dir.path().join(id));
    let mut schedulers = [start("s1"), start("s2")];
    let bus = connect(&server).await;
    let mut watch = Watch::new(&bus);
    let (mut term, mut leader) = next_leader(&mut watch, Term(0)).await;
    let node = tokio::spawn(TalkingNode::new(&bus, "n1", 1).talk());
    let mut took = Vec::new();
    let total = changes();
    for change in 0..total {
        let at = schedulers
            .iter()
            .position(|scheduler| publisher(&scheduler.id) == leader)
            .expect("the leader is one of both");
        let kills = change % 2 == 0;
        if kills {
            schedulers[at].kill();
        } else {
            signal(&schedulers[at], "-STOP");
        }
        let gone = Instant::now();
        let (next, by) = next_leader(&mut watch, term).await;
        let within = gone.elapsed();
        assert_ne!(by, leader, "who was {} leads", if kills { "killed" } else { "stopped" });
        assert!(within <= TAKEOVER_WITHIN, "{by} led only after {within:?}");
        took.push(within);
        (term, leader) = (next, by);
        if kills {
            schedulers[at] = start(&schedulers[at].id.clone());
        } else {
            signal(&schedulers[at], "-CONT");
        }
        // It has the log again before the next one goes.
        watch.ticks(1).await;
        if change % 50 == 49 {
            println!("{} of {total} changes, term {term}", change + 1);
        }
    }
    watch.ticks(2).await;
    assert!(!node.is_finished(), "the node gave up: {:?}", node.await);
    node.abort();
    for scheduler in &mut schedulers {
        assert_eq!(scheduler.stop(), Some(0), "{}", scheduler.said());
    }

    // Judged again from nothing: what counts is of one leader at a time, each in a term of its own.
    let (mut state, mut led, mut void) = (State::default(), None, 0);
    let log = RocksLog::open(&schedulers[0].log_dir()).unwrap();
    log.scan(hearth_protocol::Seq(1), &mut |record| {
        let (envelope, event) = record.event().expect("every message is one of ours");
        let judged = state.apply(record.seq, &envelope, &event).judged;
        let of = match &event {
            Event::TermStarted { term, .. } | Event::Ticked { term, .. } => Some(*term),
            Event::CommandGiven(command) => Some(command.term),
            _ => None,
        };
        match (of, judged) {
            (Some(of), Judged::Valid) => {
                let by = envelope.publisher.token().to_owned();
                let same = led.as_ref().is_some_and(|(term, who)| (*term, who) == (of, &by));
                let starts = matches!(event, Event::TermStarted { .. });
                assert!(
                    same || starts,
                    "{} of term {of} counts at {} in term {led:?}",
                    event.kind(),
                    record.seq
                );
                led = Some((of, by));
            }
            (Some(_), _) => void += 1,
            (None, _) => {}
        }
        true
    })
    .unwrap();
    drop(log);
    assert!(led.is_some_and(|(last, _)| last >= Term(total + 1)));
    for scheduler in &schedulers {
        let log = RocksLog::open(&scheduler.log_dir()).unwrap();
        assert_eq!(log.verify().unwrap().bad, None);
        let replica = Replica::replay("auditor".parse().unwrap(), &log).unwrap();
        assert_eq!(
            replica.diverged(),
            None,
            "{}'s digests do not follow from its log",
            scheduler.id
        );
    }
    took.sort();
    println!(
        "{total} changes: the standby ticked {:?} / {:?} / {:?} (least, median, most) after the leader was gone; {void} \
         events of replaced leaders were void; term {term} at the end",
        took[0],
        took[took.len() / 2],
        took[took.len() - 1]
    );
}
