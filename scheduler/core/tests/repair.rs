//! The repair policy over fake nodes that obey.

mod sim;

use std::collections::BTreeMap;

use hearth_protocol::command::{Order, Outcome};
use hearth_protocol::record::Extent;
use hearth_protocol::{BlockIndex, Command, Event, ImageId, Term};
use scheduler_core::policy::repair::{
    GRACE_TICKS, GRACE_TICKS_LAST, IN_FLIGHT_MAX, OWNER_TICKS, REPLICATE, REST_TICKS, REST_TICKS_MAX,
};
use scheduler_core::replay::{Replayer, Until};
use scheduler_core::why::{Why, WhyImage};
use scheduler_core::{State, view};
use sim::{Sim, WHOLE, node_id};

const WEEK_TICKS: u64 = 7 * 86_400;

/// Nodes `a` to `d`, two in each of two racks.
const RACKS: [(&str, &str); 4] = [("a", "r1"), ("b", "r2"), ("c", "r1"), ("d", "r2")];

fn target(command: &Command) -> String {
    match &command.order {
        Order::Replicate { to, .. } => to.to_string(),
        other => panic!("not a replicate: {other:?}"),
    }
}

fn targets(commands: &[Command]) -> Vec<String> {
    commands.iter().map(target).collect()
}

fn number(command: &Command, name: &str) -> u64 {
    let found = command.reason.numbers.iter().find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("no number {name}")).1
}

fn lost(command: &Command) -> Vec<String> {
    let lost = command.reason.lost_nodes.iter();
    lost.map(|lost| format!("{} {}", lost.node, lost.why)).collect()
}

fn fixes(state: &State) -> Vec<(String, String)> {
    let health = view(state).health.into_iter().filter(|item| item.code == "DEGRADED");
    health.map(|item| (item.message, item.fix)).collect()
}

#[test]
fn the_last_member_is_joined_by_another_after_the_short_grace_time() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(10, &["a", "b", "c", "d"]);
    let fell = sim.loses("a", 1, "b");
    assert!(fell.judged == scheduler_core::Judged::Valid);
    let fell_seq = sim.state.seq();
    let here = ["a", "c", "d"];
    assert_eq!(targets(&sim.seconds(GRACE_TICKS_LAST - 1, &here)), [""; 0]);
    let commands = sim.seconds(1, &here);
    // The other rack, though `c` is as empty.
    assert_eq!(targets(&commands), ["d"]);
    let command = &commands[0];
    assert_eq!((command.node.as_str(), command.reason.rule.as_str()), ("a", REPLICATE));
    assert_eq!(command.reason.rests_on, [fell_seq]);
    assert_eq!(lost(command), ["b absent", "c same_fault_domain"]);
    for (name, value) in [
        ("members", 1),
        ("wanted", 2),
        ("degraded_ticks", GRACE_TICKS_LAST),
        ("grace_ticks", GRACE_TICKS_LAST),
        ("members_in_fault_domain", 0),
    ] {
        assert_eq!(number(command, name), value, "{name}");
    }
    // One joiner at a time, however long it takes; then there is nothing left to do.
    assert_eq!(targets(&sim.seconds(2 * GRACE_TICKS, &here)), [""; 0]);
    sim.synced("a", 1, "d");
    assert_eq!(fixes(&sim.state), []);
    assert_eq!(targets(&sim.seconds(2 * GRACE_TICKS, &here)), [""; 0]);
}

#[test]
fn with_two_members_left_the_long_grace_time_runs_and_a_further_loss_shortens_it() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r3"), ("d", "r4")]);
    for image in [1, 2] {
        sim.replicated(&["a", "b", "c"], image, 100);
    }
    sim.seconds(10, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "c");
    sim.loses("a", 2, "c");
    let here = ["a", "b", "d"];
    assert_eq!(targets(&sim.seconds(100, &here)), [""; 0]);
    sim.loses("a", 2, "b");
    let commands = sim.seconds(GRACE_TICKS_LAST, &here);
    let Order::Replicate { image, .. } = commands[0].order else {
        unreachable!()
    };
    assert_eq!((commands.len(), image), (1, ImageId(2)));
    assert_eq!(commands[0].reason.rests_on.len(), 2, "both losses");
    sim.synced("a", 2, &target(&commands[0]));
    let left = GRACE_TICKS - 100 - GRACE_TICKS_LAST;
    let commands = sim.seconds(left, &here);
    let first = commands
        .iter()
        .find(|c| matches!(c.order, Order::Replicate { image, .. } if image == ImageId(1)));
    assert_eq!(first.map(|c| number(c, "degraded_ticks")), Some(GRACE_TICKS));
}

#[test]
fn an_absence_shorter_than_the_grace_time_moves_nothing() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    let mut ordered = Vec::new();
    for _ in 0..50 {
        ordered.extend(sim.seconds(20, &["a", "b", "c", "d"]));
        sim.loses("a", 1, "b");
        ordered.extend(sim.seconds(GRACE_TICKS_LAST - 1, &["a", "c", "d"]));
        sim.change("a", 1, |record| record.with_joiner(&node_id("b"), WHOLE).unwrap());
        sim.synced("a", 1, "b");
    }
    assert_eq!(targets(&ordered), [""; 0]);
}

#[test]
fn who_held_the_replica_and_is_back_is_preferred_within_its_fault_domain_only() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r1"), ("d", "r2")]);
    sim.replicated(&["a", "d"], 1, 100);
    // A large image makes `d` the fuller one.
    sim.image("d", 9, 5_000);
    sim.seconds(1, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "d");
    let commands = sim.seconds(GRACE_TICKS_LAST, &["a", "b", "c", "d"]);
    assert_eq!(targets(&commands), ["d"]);
    assert_eq!(lost(&commands[0]), ["b never_held_it", "c same_fault_domain"]);

    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r1")]);
    sim.replicated(&["a", "c"], 1, 100);
    sim.seconds(1, &["a", "b", "c"]);
    sim.loses("a", 1, "c");
    let commands = sim.seconds(GRACE_TICKS_LAST, &["a", "b", "c"]);
    assert_eq!(targets(&commands), ["b"]);
    assert_eq!(lost(&commands[0]), ["c same_fault_domain"]);
}

#[test]
fn a_node_that_refused_or_did_not_answer_rests_and_others_are_asked() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r3"), ("d", "r4")]);
    sim.replicated(&["a", "b"], 1, 100);
    sim.deaf.insert(node_id("a"));
    sim.seconds(1, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "b");
    let here = ["a", "c", "d"];
    let commands = sim.seconds(GRACE_TICKS_LAST, &here);
    assert_eq!(targets(&commands), ["c"]);
    let refused = Event::CommandFinished {
        command: commands[0].id,
        node: node_id("a"),
        outcome: Outcome::Refused { why: "no room".into() },
    };
    sim.node("a", refused);
    // The next one is never answered: it counts until it expires.
    let mut ordered = Vec::new();
    for second in 1..REST_TICKS {
        let commands = sim.seconds(1, &here);
        ordered.extend(commands.iter().map(|c| (second, target(c), lost(c))));
    }
    let lost: Vec<String> = ["b absent", "c tried_lately"].map(String::from).into();
    assert_eq!(ordered, [(1, "d".to_owned(), lost)]);
    // `c` has rested.
    assert_eq!(targets(&sim.seconds(2, &here)), ["c"]);
}

/// A node that comes and goes costs at most this many orders for one image: seven while the rest doubles from
/// [`REST_TICKS`] to [`REST_TICKS_MAX`], then one in each rest. In a week these are 175.
const ORDERS_A_WEEK_MAX: u64 = 7 + WEEK_TICKS / REST_TICKS_MAX;

/// Images that lie on the node that comes and goes.
const IMAGES: u128 = 3;

/// A week in which `b` is there for 20 seconds and away for so many. `others` are always there. Orders by image.
fn a_week_of_coming_and_going(
    nodes: &[(&str, &str)],
    others: &[&str],
    away: u64,
    rejoins: bool,
) -> BTreeMap<ImageId, u64> {
    let mut sim = Sim::cluster(nodes);
    sim.keeps_log = false;
    for image in 1..=IMAGES {
        sim.replicated(&["a", "b"], image, 100);
    }
    let b = node_id("b");
    let cycle = 20 + away;
    let mut orders = BTreeMap::new();
    for second in 0..WEEK_TICKS {
        others.iter().for_each(|node| sim.alive(node));
        let is_here = second % cycle < 20;
        if is_here {
            sim.alive("b");
        }
        for image in 1..=IMAGES {
            if !is_here && sim.record(image).unwrap().everyone().contains(&b) {
                sim.loses("a", image, "b");
            }
        }
        for command in sim.second() {
            let Order::Replicate { image, .. } = command.order else {
                panic!("not a replicate: {command:?}")
            };
            *orders.entry(image).or_default() += 1;
        }
        // The copy takes some seconds, and `b` is in sync for a while before it goes again.
        for image in 1..=IMAGES {
            for joiner in sim.record(image).unwrap().runs()[0].joiners.clone() {
                if (rejoins || joiner != b) && second % cycle == 19 {
                    sim.synced("a", image, joiner.as_str());
                }
            }
        }
    }
    sim.state.audit().unwrap();
    orders
}

#[test]
fn a_node_that_comes_and_goes_all_week_costs_a_bounded_number_of_orders_for_each_image() {
    for rejoins in [false, true] {
        let alone = a_week_of_coming_and_going(&[("a", "r1"), ("b", "r2")], &["a"], 20, rejoins);
        assert_eq!(alone.len(), IMAGES as usize);
        for orders in alone.values() {
            assert!(
                (50..=ORDERS_A_WEEK_MAX).contains(orders),
                "{alone:?}, rejoins: {rejoins}"
            );
        }
    }
    // With a third node each replica soon stays there.
    let nodes = [("a", "r1"), ("b", "r2"), ("c", "r3")];
    let with_another = a_week_of_coming_and_going(&nodes, &["a", "c"], 20, true);
    assert!(
        with_another.values().all(|orders| (1..=2).contains(orders)),
        "{with_another:?}"
    );
}

#[test]
fn failures_shorter_than_the_grace_time_move_nothing_all_week() {
    let mut sim = Sim::cluster(&RACKS);
    sim.keeps_log = false;
    sim.replicated(&["a", "b"], 1, 100);
    sim.replicated(&["a", "b", "c"], 2, 100);
    let b = node_id("b");
    // The longest that one left, and two left, allow; between them `b` is back for ten seconds.
    let away = |image| if image == 1 { GRACE_TICKS_LAST } else { GRACE_TICKS };
    for second in 0..WEEK_TICKS {
        ["a", "b", "c", "d"].iter().for_each(|node| sim.alive(node));
        for image in [1, 2] {
            match second % (away(image) + 10) {
                0 => {
                    sim.loses("a", image, "b");
                }
                at if at == away(image) - 1 => {
                    sim.change("a", image, |record| record.with_joiner(&b, WHOLE).unwrap());
                    sim.synced("a", image, "b");
                }
                _ => {}
            }
        }
        let commands = sim.second();
        assert_eq!(targets(&commands), [""; 0], "second {second}");
    }
    sim.state.audit().unwrap();
}

#[test]
fn few_replicas_are_made_at_once_and_one_on_a_node() {
    let names: Vec<String> = (0..12).map(|n| format!("n{n:02}")).collect();
    let racks: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    let mut sim = Sim::cluster(&racks);
    let here: Vec<&str> = names.iter().map(String::as_str).filter(|name| *name != "n11").collect();
    for image in 1..=10 {
        let owner = names[image as usize - 1].as_str();
        sim.replicated(&[owner, "n11"], image, 100);
    }
    sim.seconds(1, &here);
    for image in 1..=10 {
        sim.loses(&names[image as usize - 1], image, "n11");
    }
    let mut waiting = sim.seconds(GRACE_TICKS_LAST, &here);
    let mut all = targets(&waiting);
    assert_eq!(waiting.len(), IN_FLIGHT_MAX);
    assert_eq!(
        all.iter().collect::<std::collections::BTreeSet<_>>().len(),
        IN_FLIGHT_MAX
    );
    // While they are being synced nothing else begins; each that is done makes room for one.
    assert_eq!(targets(&sim.seconds(50, &here)), [""; 0]);
    while let Some(command) = waiting.pop() {
        let Order::Replicate { image, .. } = command.order else {
            unreachable!()
        };
        sim.synced(command.node.as_str(), image.0, &target(&command));
        let next = sim.seconds(1, &here);
        assert!(next.len() <= 1);
        all.extend(targets(&next));
        waiting.extend(next);
    }
    assert_eq!(all.len(), 10);
    assert_eq!(fixes(&sim.state), []);
}

#[test]
fn nothing_is_ordered_without_an_owner_or_before_it_is_known_who_is_there() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(1, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "b");
    // The owner is not there: nobody could copy.
    assert_eq!(targets(&sim.seconds(2 * GRACE_TICKS_LAST, &["c", "d"])), [""; 0]);
    assert!(fixes(&sim.state)[0].1.starts_with("start hearth-node on a"));
    // A new leader waits until absence shows.
    sim.term = Term(2);
    sim.lead(Event::TermStarted {
        term: Term(2),
        previous: None,
    });
    assert_eq!(targets(&sim.seconds(5, &["a", "c", "d"])), [""; 0]);
    sim.node(
        "a",
        Event::ImageDetached {
            image: ImageId(1),
            epoch: sim.record(1).unwrap().epoch(),
        },
    );
    assert_eq!(targets(&sim.seconds(5, &["a", "c", "d"])), [""; 0]);
    assert!(fixes(&sim.state)[0].1.starts_with("hearth image attach appl/vm-1:"));
    sim.take("a", &["a"], 1);
    assert_eq!(
        fixes(&sim.state)[0].1,
        "nothing: a begins to serve it, then a replica begins"
    );
    assert_eq!(targets(&sim.seconds(OWNER_TICKS - 1, &["a", "c", "d"])), [""; 0]);
    assert_eq!(targets(&sim.seconds(1, &["a", "c", "d"])), ["d"]);
}

#[test]
fn an_owner_that_started_anew_is_told_nothing_for_a_while() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(1, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "b");
    sim.seconds(GRACE_TICKS_LAST - 1, &["a", "c", "d"]);
    sim.join_in("r1", "a", 8);
    assert_eq!(targets(&sim.seconds(OWNER_TICKS - 1, &["a", "c", "d"])), [""; 0]);
    assert_eq!(targets(&sim.seconds(1, &["a", "c", "d"])), ["d"]);
}

#[test]
fn of_several_runs_the_one_with_the_fewest_members_is_repaired() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r3")]);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(1, &["a", "b", "c"]);
    let part = Extent {
        first: BlockIndex(10),
        last: BlockIndex(19),
    };
    sim.loses("a", 1, "b");
    sim.change("a", 1, |record| record.with_joiner(&node_id("b"), part).unwrap());
    sim.synced("a", 1, "b");
    let replicas = view(&sim.state).images[0].replicas.clone();
    assert_eq!((replicas.wanted, replicas.in_sync, replicas.members.len()), (2, 1, 2));
    let here = ["a", "b", "c"];
    let commands = sim.seconds(GRACE_TICKS_LAST, &here);
    let extents: Vec<_> = commands
        .iter()
        .map(|c| match &c.order {
            Order::Replicate { blocks, bytes, .. } => {
                (blocks.unwrap().first.0, blocks.unwrap().last.0, bytes.0 / sim::BLOCK)
            }
            _ => unreachable!(),
        })
        .collect();
    assert_eq!(extents, [(0, 9, 10)]);
}

#[test]
fn degraded_images_are_told_of_with_what_to_do() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.replicated(&["a", "b", "c"], 2, 100);
    sim.seconds(1, &["a", "b", "c", "d"]);
    assert_eq!(fixes(&sim.state), []);
    sim.loses("a", 1, "b");
    sim.loses("a", 2, "b");
    sim.seconds(10, &["a", "c", "d"]);
    let check = |state: &State, expect: [(&str, &str); 2]| {
        let expect = expect.map(|(message, fix)| (message.to_owned(), fix.to_owned()));
        assert_eq!(fixes(state), expect);
    };
    check(
        &sim.state,
        [
            (
                "image appl/vm-1 has 1 of 2 replicas since tick 1; the next failure can lose it",
                "start hearth-node on b; else a replica on another node begins in 20 ticks",
            ),
            (
                "image appl/vm-2 has 2 of 3 replicas since tick 1",
                "start hearth-node on b; else a replica on another node begins in 590 ticks",
            ),
        ],
    );
    sim.seconds(20, &["a", "c", "d"]);
    assert_eq!(fixes(&sim.state)[0].1, "nothing: d is being synced");
    // Nobody is left to take one.
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2")]);
    sim.replicated(&["a", "b"], 1, 100);
    sim.loses("a", 1, "b");
    assert_eq!(targets(&sim.seconds(100, &["a"])), [""; 0]);
    let fix = "start hearth-node on b, or add a node: none is free to take a replica";
    assert_eq!(fixes(&sim.state)[0].1, fix);
}

#[test]
fn a_replay_derives_the_same_orders_and_why_tells_of_them() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(10, &["a", "b", "c", "d"]);
    sim.loses("a", 1, "b");
    let commands = sim.seconds(2 * GRACE_TICKS_LAST, &["a", "c", "d"]);
    sim.synced("a", 1, "d");
    sim.seconds(5, &["a", "c", "d"]);
    assert_eq!(commands.len(), 1);

    let mut replayer = Replayer::new(Until::End);
    let mut why = Why::new(WhyImage::Name("appl/vm-1".parse().unwrap()), BlockIndex(7));
    let mut half = None;
    for (at, (seq, message)) in sim.log.iter().enumerate() {
        let scheduler_core::replay::Step::Folded { event, applied, .. } = replayer.step(*seq, message) else {
            panic!("every message is an event");
        };
        why.observe(*seq, &event, applied, replayer.state());
        if at == sim.log.len() / 2 {
            half = Some(replayer.state().clone());
        }
    }
    let report = why.answer(replayer.state()).unwrap();
    let (state, replayed) = replayer.finish();
    assert!(replayed.is_sound(), "{replayed:?}");
    assert_eq!((replayed.commands_same, state.digest()), (1, sim.state.digest()));
    // A snapshot in the middle of it reads back, and goes on to the same state.
    let half = half.unwrap();
    let mut read = State::decode(&half.encode()).unwrap();
    assert_eq!(read.digest(), half.digest());
    for (seq, message) in &sim.log {
        read.apply(*seq, &message.envelope().unwrap(), &message.event().unwrap());
    }
    assert_eq!(read.digest(), sim.state.digest());

    let decision = &report.decisions[0];
    assert_eq!(
        (decision.verb.as_str(), decision.result.as_ref().map(|r| r.how.as_str())),
        ("replicate", Some("done"))
    );
    let text = report.to_string();
    assert!(text.contains("a replica for d"), "{text}");
    assert!(
        text.contains("  instead of node b: absent\n  instead of node c: same_fault_domain\n"),
        "{text}"
    );
}

/// The digest is of these bytes: a field that is not in them changes no digest that a leader recorded.
#[test]
fn a_log_without_replicas_keeps_the_digests_it_had() {
    let names = |sim: &Sim, field: &str| {
        let encoded = sim.state.encode();
        encoded.windows(field.len()).any(|part| part == field.as_bytes())
    };
    let new = ["repairs", "replicas", "replicates", "lost_nodes"];
    let mut sim = Sim::cluster(&RACKS);
    sim.image("a", 1, 100);
    sim.heat("a", 1, 1, &[sim::reads(3, 5)]);
    sim.seconds(2, &["a"]);
    sim.term = Term(2);
    sim.lead(Event::TermStarted {
        term: Term(2),
        previous: None,
    });
    sim.seconds(2, &["a"]);
    assert!(new.iter().all(|field| !names(&sim, field)));
    sim.replicated(&["a", "b"], 2, 100);
    sim.loses("a", 2, "b");
    sim.deaf.insert(node_id("a"));
    sim.seconds(GRACE_TICKS_LAST, &["a", "c", "d"]);
    assert!(new.iter().all(|field| names(&sim, field)));
}
