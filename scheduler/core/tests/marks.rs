//! What operators say of nodes and images: drains, fault domains, the number of replicas, and whether a node may stop.

mod sim;

use hearth_protocol::command::Order;
use hearth_protocol::view::{DrainView, Harm};
use hearth_protocol::{Command, Event, ImageId, LayerId, TickNo};
use scheduler_core::policy::repair::GRACE_TICKS;
use scheduler_core::replay::{Replayer, Until};
use scheduler_core::{Judged, Misfit, State, ok_to_stop, place, view};
use sim::{Sim, node_id};

const RACKS: [(&str, &str); 4] = [("a", "r1"), ("b", "r2"), ("c", "r1"), ("d", "r2")];
const ALL: [&str; 4] = ["a", "b", "c", "d"];

fn placed(sim: &Sim, near: &str, replicas: u64) -> Result<String, Misfit> {
    let nodes = place(&sim.state, &node_id(near), replicas)?;
    Ok(nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
}

fn replicated_to(commands: &[Command]) -> Vec<String> {
    let to = commands.iter().filter_map(|command| match &command.order {
        Order::Replicate { to, .. } => Some(to.to_string()),
        _ => None,
    });
    to.collect()
}

fn drain_of(state: &State, node: &str) -> Option<DrainView> {
    let nodes = view(state).nodes;
    nodes.into_iter().find(|known| known.id == node_id(node)).unwrap().drain
}

#[test]
fn a_drain_is_a_fact_that_repeats_change_nothing_and_restarts_keep() {
    let mut sim = Sim::cluster(&RACKS);
    sim.seconds(3, &ALL);
    assert_eq!(sim.drain("b", true).judged, Judged::Valid);
    sim.seconds(5, &ALL);
    let digest = |sim: &Sim| sim.state.digest();
    let since = drain_of(&sim.state, "b").unwrap().since;
    assert_eq!(since, TickNo(3));
    assert_eq!(sim.drain("b", true).judged, Judged::Valid);
    assert_eq!(drain_of(&sim.state, "b").unwrap().since, since, "since it began");
    // The daemon starts anew, and the drain is still there; also behind a snapshot.
    sim.join_in("r2", "b", 8);
    assert_eq!(drain_of(&sim.state, "b").unwrap().since, since);
    let read = State::decode(&sim.state.encode()).unwrap();
    assert_eq!(
        (read.digest(), drain_of(&read, "b").unwrap().since),
        (digest(&sim), since)
    );
    sim.drain("b", false);
    assert_eq!(drain_of(&sim.state, "b"), None);
}

#[test]
fn marks_on_nodes_that_never_joined_are_void() {
    let mut sim = Sim::cluster(&RACKS);
    let judged = [sim.drain("z", true).judged, sim.domain("z", "r9").judged];
    assert!(
        judged
            .iter()
            .all(|judged| matches!(judged, Judged::Void(why) if why.contains("ever joined")))
    );
    assert!(view(&sim.state).nodes.iter().all(|node| node.drain.is_none()));
    assert_eq!(ok_to_stop(&sim.state, &node_id("z")), None);
}

#[test]
fn a_draining_node_gets_no_new_images_and_no_replicas() {
    let mut sim = Sim::cluster(&RACKS);
    sim.seconds(1, &ALL);
    assert_eq!(placed(&sim, "a", 2).unwrap(), "a b");
    sim.drain("b", true);
    assert_eq!(placed(&sim, "a", 2).unwrap(), "a d");
    assert_eq!(placed(&sim, "b", 2), Err(Misfit::Draining(node_id("b"))));
    let too_few = Misfit::TooFew {
        replicas: 4,
        present: 3,
    };
    assert_eq!(placed(&sim, "a", 4), Err(too_few));
    // A lost replica goes elsewhere, though its place would be `b`.
    sim.replicated(&["a", "d"], 1, 100);
    sim.loses("a", 1, "d");
    let commands = sim.seconds(30, &["a", "b", "c"]);
    assert_eq!(replicated_to(&commands), ["c"]);
    let lost: Vec<_> = commands[0]
        .reason
        .lost_nodes
        .iter()
        .map(|l| format!("{} {}", l.node, l.why))
        .collect();
    assert_eq!(lost, ["d absent", "b draining"]);
    // Where only draining nodes are left, nothing is ordered, and health does not wait for them.
    let mut sim = Sim::cluster(&RACKS);
    sim.drain("c", true);
    sim.drain("d", true);
    sim.replicated(&["a", "b"], 1, 100);
    sim.loses("a", 1, "b");
    assert_eq!(replicated_to(&sim.seconds(100, &["a", "c", "d"])), [""; 0]);
    let health = view(&sim.state).health;
    let degraded = health.iter().find(|item| item.code == "DEGRADED").unwrap();
    assert!(
        degraded.fix.ends_with("none is free to take a replica"),
        "{}",
        degraded.fix
    );
    assert_eq!(health.iter().filter(|item| item.code == "NODE_DRAINING").count(), 2);
}

#[test]
fn the_fault_domain_that_an_operator_gave_counts_also_after_a_restart() {
    let mut sim = Sim::cluster(&RACKS);
    sim.seconds(1, &ALL);
    assert_eq!(placed(&sim, "a", 2).unwrap(), "a b");
    // `b` stands in the rack of `a` by now.
    assert_eq!(sim.domain("b", "r1").judged, Judged::Valid);
    assert_eq!(placed(&sim, "a", 2).unwrap(), "a d");
    sim.join_in("r2", "b", 8);
    assert_eq!(placed(&sim, "a", 2).unwrap(), "a d");
    let domain = |sim: &Sim| view(&sim.state).nodes[1].fault_domain.clone();
    assert_eq!(domain(&sim), "r1");
    sim.domain("b", "");
    assert_eq!(
        (domain(&sim).as_str(), placed(&sim, "a", 2).unwrap().as_str()),
        ("r2", "a b")
    );
    assert!(matches!(sim.domain("b", &"x".repeat(64)).judged, Judged::Void(_)));
}

#[test]
fn a_node_may_stop_when_no_image_suffers_from_it() {
    let mut sim = Sim::cluster(&RACKS);
    sim.image("b", 1, 100);
    sim.replicated(&["b", "a"], 2, 100);
    sim.replicated(&["a", "b"], 3, 100);
    sim.replicated(&["a", "b", "c"], 4, 100);
    sim.wanted("a", 4, 2);
    sim.replicated(&["a", "b"], 5, 100);
    sim.loses("a", 5, "b");
    // A clone elsewhere stands on a snapshot that only `b` has.
    sim.node(
        "b",
        Event::SnapshotTaken {
            image: ImageId(1),
            name: "v1".parse().unwrap(),
            sealed: LayerId(1),
            top: LayerId(11),
        },
    );
    sim.created("c", 6, 100, vec![LayerId(60), LayerId(1)]);
    sim.seconds(1, &ALL);
    let stop = |sim: &Sim, node: &str| {
        let stop = ok_to_stop(&sim.state, &node_id(node)).unwrap();
        let images = stop.images.iter().map(|image| (image.image.to_string(), image.harm));
        (images.collect::<Vec<_>>(), stop.is_ok())
    };
    let named = |list: &[(u64, Harm)]| -> Vec<(String, Harm)> {
        list.iter()
            .map(|(number, harm)| (format!("appl/vm-{number}"), *harm))
            .collect()
    };
    let (images, ok) = stop(&sim, "b");
    let expect = [
        (1, Harm::NoCopy),
        (6, Harm::NoCopy),
        (2, Harm::Stalled),
        (3, Harm::Degraded),
    ];
    assert_eq!((images, ok), (named(&expect), false));
    // `d` has nothing; `c` only one replica more than wanted.
    assert_eq!(stop(&sim, "d"), (vec![], true));
    assert_eq!(stop(&sim, "c"), (named(&[(6, Harm::NoCopy)]), false));
    sim.drain("b", true);
    let left = drain_of(&sim.state, "b").unwrap();
    assert_eq!((left.replicas, left.owned, left.alone), (2, 1, 2));
    let stop = ok_to_stop(&sim.state, &node_id("b")).unwrap();
    assert!(stop.draining && stop.present && stop.omitted == 0);
    assert!(
        stop.images[2]
            .fix
            .contains("hearth image attach appl/vm-2 --node a --incoming"),
        "{}",
        stop.images[2].fix
    );
}

#[test]
fn more_replicas_are_made_at_once_and_the_number_outlives_a_replay() {
    let mut sim = Sim::cluster(&RACKS);
    sim.replicated(&["a", "b"], 1, 100);
    sim.seconds(20, &ALL);
    assert_eq!(sim.wanted("b", 1, 3).judged, Judged::Valid);
    assert!(matches!(sim.wanted("c", 1, 4).judged, Judged::Void(_)));
    let commands = sim.seconds(1, &ALL);
    assert_eq!(replicated_to(&commands), ["c"]);
    let number = |name: &str| {
        commands[0]
            .reason
            .numbers
            .iter()
            .find(|(known, _)| known == name)
            .unwrap()
            .1
    };
    assert_eq!((number("wanted"), number("grace_ticks")), (3, 0));
    sim.synced("a", 1, "c");
    assert_eq!(sim.seconds(GRACE_TICKS + 100, &ALL), []);
    let replicas = view(&sim.state).images[0].replicas.clone();
    assert_eq!((replicas.wanted, replicas.in_sync), (3, 3));
    let mut replayer = Replayer::new(Until::End);
    for (seq, message) in &sim.log {
        replayer.step(*seq, message);
    }
    let (state, report) = replayer.finish();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(state.digest(), sim.state.digest());
}
