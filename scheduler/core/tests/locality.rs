//! A replica follows its guest, over fake nodes that obey.

mod sim;

use hearth_protocol::Command;
use hearth_protocol::command::Order;
use scheduler_core::policy::locality::SETTLED_TICKS;
use scheduler_core::policy::moves::LOOK_EVERY_TICKS;
use scheduler_core::policy::repair::GRACE_TICKS_LAST;
use scheduler_core::view;
use sim::Sim;

/// An order in a few words, such as `b>c` for a move and `-b` for a drop.
fn brief(command: &Command) -> String {
    match &command.order {
        Order::Replicate { to, replaces, .. } => {
            let from = replaces.as_ref().map_or_else(String::new, ToString::to_string);
            format!("{from}>{to}")
        }
        Order::Drop { from, .. } => format!("-{from}"),
        other => panic!("no order about a replica: {other:?}"),
    }
}

/// Seconds in which the named nodes are there, and copies take no longer than a second; what was ordered.
fn seconds(sim: &mut Sim, count: u64, here: &[&str]) -> Vec<Command> {
    let mut all = Vec::new();
    for _ in 0..count {
        here.iter().for_each(|node| sim.alive(node));
        let commands = sim.second();
        sim.state.audit().unwrap();
        for command in &commands {
            if let Order::Replicate { image, to, .. } = &command.order {
                sim.synced(command.node.as_str(), image.0, to.as_str());
            }
        }
        all.extend(commands);
    }
    all
}

fn briefs(commands: &[Command]) -> Vec<String> {
    commands.iter().map(brief).collect()
}

fn members(sim: &Sim, image: u128) -> String {
    let members = sim.record(image).unwrap().everyone();
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

const ALL: [&str; 4] = ["a", "b", "c", "d"];
/// Long enough for a move to be ordered, and its end.
const SOON: u64 = SETTLED_TICKS + 2 * LOOK_EVERY_TICKS;

fn cluster(racks: [&str; 4]) -> Sim {
    let nodes: Vec<_> = ALL.into_iter().zip(racks).collect();
    let mut sim = Sim::cluster(&nodes);
    sim.replicated(&["a", "b"], 1, 100);
    seconds(&mut sim, 20, &ALL);
    sim
}

#[test]
fn a_replica_follows_its_guest_and_leaves_no_fault_domain_empty() {
    let check = |racks, to: &str, expect: &[&str], left: &str| {
        let mut sim = cluster(racks);
        sim.take(to, &["a", "b"], 1);
        let taken = sim.state.seq();
        let orders = seconds(&mut sim, SOON, &ALL);
        assert_eq!(briefs(&orders), expect, "{racks:?}");
        assert_eq!(members(&sim, 1), left, "{racks:?}");
        let Some(first) = orders.first() else { return };
        assert_eq!(
            (first.reason.rule.as_str(), first.reason.rests_on.as_slice()),
            ("locality/replicate", &[taken][..])
        );
        assert_eq!(
            briefs(&seconds(&mut sim, 100, &ALL)),
            [""; 0],
            "it is where its guest is"
        );
    };
    // The member in the rack of the guest's node goes.
    check(["r1", "r2", "r2", "r3"], "c", &["b>c", "-b"], "a c");
    check(["r1", "r2", "r1", "r3"], "c", &["a>c", "-a"], "b c");
    // Both are as far: the higher id goes.
    check(["r1", "r2", "r3", "r4"], "d", &["b>d", "-b"], "a d");
    // It holds it already.
    check(["r1", "r2", "r3", "r4"], "b", &[], "a b");
}

#[test]
fn who_passes_through_gets_nothing_copied() {
    let mut sim = cluster(["r1", "r2", "r3", "r4"]);
    for visit in 0..20 {
        sim.take(["c", "d"][visit % 2], &["a", "b"], 1);
        assert_eq!(briefs(&seconds(&mut sim, SETTLED_TICKS - 1, &ALL)), [""; 0]);
    }
    sim.take("a", &["a", "b"], 1);
    assert_eq!(briefs(&seconds(&mut sim, 100, &ALL)), [""; 0]);
}

#[test]
fn what_is_degraded_is_repaired_first_and_where_the_guest_is() {
    let mut sim = cluster(["r1", "r2", "r3", "r4"]);
    // `a` died with the guest, which goes on on `d`; `c` is as good a place by all else, and has the lower id.
    let here = ["b", "c", "d"];
    sim.take("d", &["b"], 1);
    assert_eq!(briefs(&seconds(&mut sim, GRACE_TICKS_LAST - 5, &here)), [""; 0]);
    let orders = seconds(&mut sim, 100, &here);
    assert_eq!((briefs(&orders), members(&sim, 1).as_str()), (vec![">d".into()], "b d"));
    assert_eq!(orders[0].reason.rule, "repair/replicate");
    let lost: Vec<_> = orders[0]
        .reason
        .lost_nodes
        .iter()
        .map(|lost| (lost.node.as_str(), lost.why.as_str()))
        .collect();
    assert_eq!(lost, [("a", "absent"), ("c", "not_the_guests")]);
}

#[test]
fn a_guest_that_goes_to_and_fro_trips_the_breaker() {
    let mut sim = cluster(["r1", "r2", "r3", "r4"]);
    let mut ordered = 0;
    for turn in 0..10 {
        let to = ["c", "b"][turn % 2];
        let members: Vec<String> = members(&sim, 1).split(' ').map(Into::into).collect();
        let members: Vec<&str> = members.iter().map(String::as_str).collect();
        sim.take(to, &members, 1);
        let orders = seconds(&mut sim, SOON, &ALL);
        ordered += orders.iter().filter(|command| brief(command).contains('>')).count();
    }
    // There, and once back: then it is left alone for an hour, wherever its guest is.
    assert_eq!(ordered, 2);
    let codes: Vec<_> = view(&sim.state).health.into_iter().map(|item| item.code).collect();
    assert!(codes.contains(&"MOVES_PAUSED".into()), "{codes:?}");
}
