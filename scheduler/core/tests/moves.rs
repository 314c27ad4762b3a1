//! Moves of replicas over fake nodes that obey: drains, spreading, rebalancing, drops, and what stops a circle.

mod sim;

use hearth_protocol::command::{Order, Outcome};
use hearth_protocol::view::MoveAccount;
use hearth_protocol::{BlockIndex, Command, Event, ImageId};
use scheduler_core::policy::moves::{
    BREAK_TICKS, CYCLE_TICKS, DROP_REST_TICKS, LOOK_EVERY_TICKS, LOSING_IN_ROW, MOVES_MAX, SCORE_TICKS, STEADY_TICKS,
};
use scheduler_core::policy::rebalance::IMBALANCE_BYTES_MIN;
use scheduler_core::policy::repair::{GRACE_TICKS, GRACE_TICKS_LAST, IN_FLIGHT_MAX};
use scheduler_core::replay::{Replayer, Step, Until};
use scheduler_core::why::{Why, WhyImage};
use scheduler_core::{State, ok_to_stop, view};
use sim::{BLOCK, Sim, node_id};

/// Blocks of an image that is worth a rebalance.
const LARGE: u64 = IMBALANCE_BYTES_MIN / BLOCK;

/// An order in a few words, such as `1: b>c` for a move and `1: -b` for a drop.
fn brief(command: &Command) -> String {
    match &command.order {
        Order::Replicate {
            image, to, replaces, ..
        } => {
            let from = replaces.as_ref().map_or_else(String::new, ToString::to_string);
            format!("{}: {from}>{to}", image.0)
        }
        Order::Drop { image, from, .. } => format!("{}: -{from}", image.0),
        other => panic!("no order about a replica: {other:?}"),
    }
}

/// Seconds in which the named nodes report and obey and copies take no longer than a second; what was ordered.
fn seconds(sim: &mut Sim, count: u64, here: &[&str]) -> Vec<Command> {
    let mut all = Vec::new();
    for _ in 0..count {
        let now = second(sim, here);
        sync(sim, &now);
        all.extend(now);
    }
    all
}

/// One second, after which what was begun is still being copied.
fn second(sim: &mut Sim, here: &[&str]) -> Vec<Command> {
    here.iter().for_each(|node| sim.alive(node));
    let commands = sim.second();
    sim.state.audit().unwrap();
    commands
}

fn sync(sim: &mut Sim, commands: &[Command]) {
    for command in commands {
        if let Order::Replicate { image, to, .. } = &command.order {
            sim.synced(command.node.as_str(), image.0, to.as_str());
        }
    }
}

fn briefs(commands: &[Command]) -> Vec<String> {
    commands.iter().map(brief).collect()
}

fn members(sim: &Sim, image: u128) -> String {
    let members = sim.record(image).unwrap().everyone();
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

fn number(command: &Command, name: &str) -> u64 {
    let found = command.reason.numbers.iter().find(|(known, _)| known == name);
    found.unwrap_or_else(|| panic!("no number {name}")).1
}

fn lost(command: &Command) -> Vec<String> {
    let lost = command.reason.lost_nodes.iter();
    lost.map(|lost| format!("{} {}", lost.node, lost.why)).collect()
}

fn account(state: &State, rule: &str) -> MoveAccount {
    let accounts = view(state).moves;
    accounts.into_iter().find(|account| account.rule == rule).unwrap()
}

fn codes(state: &State) -> Vec<String> {
    view(state).health.into_iter().map(|item| item.code).collect()
}

const FOUR: [(&str, &str); 4] = [("a", "r1"), ("b", "r2"), ("c", "r2"), ("d", "r3")];
const ALL: [&str; 4] = ["a", "b", "c", "d"];

#[test]
fn a_drain_adds_and_then_drops_and_leaves_the_owners_copy() {
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    sim.replicated(&["b", "d"], 2, 100);
    seconds(&mut sim, 10, &ALL);
    sim.drain("b", true);
    let mark = sim.state.seq();
    let mut ordered = Vec::new();
    while ordered.is_empty() {
        ordered = second(&mut sim, &ALL);
    }
    // `d` is emptier than no node and in another rack; `c` would be as well without `b`.
    assert_eq!(briefs(&ordered), ["1: b>c"]);
    assert_eq!(lost(&ordered[0]), ["d fuller"]);
    assert_eq!(
        (ordered[0].reason.rule.as_str(), ordered[0].reason.rests_on.as_slice()),
        ("drain/replicate", &[mark][..])
    );
    // While it is copied nothing is dropped.
    for _ in 0..50 {
        assert_eq!(briefs(&second(&mut sim, &ALL)), [""; 0]);
    }
    assert_eq!(members(&sim, 1), "a b c");
    sim.synced("a", 1, "c");
    let ordered = seconds(&mut sim, 1, &ALL);
    assert_eq!(
        (briefs(&ordered), ordered[0].reason.rule.as_str()),
        (vec!["1: -b".into()], "move/drop")
    );
    assert_eq!(members(&sim, 1), "a c");
    // What `b` serves stays, and is told of.
    assert_eq!(briefs(&seconds(&mut sim, 100, &ALL)), [""; 0]);
    let drain = view(&sim.state).nodes[1].drain.unwrap();
    assert_eq!((drain.replicas, drain.owned, drain.alone), (0, 1, 0));
    assert!(!ok_to_stop(&sim.state, &node_id("b")).unwrap().is_ok());
    // Its guest migrates, and then it is emptied.
    sim.take("d", &["b", "d"], 2);
    assert_eq!(briefs(&seconds(&mut sim, 100, &ALL)), ["2: b>a", "2: -b"]);
    assert!(ok_to_stop(&sim.state, &node_id("b")).unwrap().is_ok());
    assert!(view(&sim.state).nodes[1].drain.unwrap().is_done());
    let account = account(&sim.state, "drain/replicate");
    assert_eq!((account.done, account.failed, account.bytes.0), (2, 0, 200 * BLOCK));
}

#[test]
fn a_drain_moves_few_at_a_time_and_leaves_room_for_repairs() {
    let names: Vec<String> = (0..12).map(|n| format!("n{n:02}")).collect();
    let racks: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    let mut sim = Sim::cluster(&racks);
    let here: Vec<&str> = names.iter().map(String::as_str).collect();
    for image in 1..=8 {
        sim.replicated(&[here[image], here[0]], image as u128, 100);
    }
    seconds(&mut sim, 10, &here);
    sim.drain("n00", true);
    let mut ordered = Vec::new();
    for _ in 0..50 {
        ordered.extend(second(&mut sim, &here));
    }
    assert_eq!(ordered.len(), MOVES_MAX);
    // Repairs have the other places, and no move takes one of theirs.
    for (image, owner) in here.iter().enumerate().take(9).skip(3) {
        sim.loses(owner, image as u128, "n00");
    }
    let mut repairs = Vec::new();
    for _ in 0..2 * GRACE_TICKS_LAST {
        repairs.extend(second(&mut sim, &here));
    }
    assert!(
        repairs.iter().all(|command| command.reason.rule == "repair/replicate"),
        "{repairs:?}"
    );
    assert_eq!(repairs.len(), IN_FLIGHT_MAX - MOVES_MAX);
    sync(&mut sim, &ordered);
    sync(&mut sim, &repairs);
    let rest = seconds(&mut sim, 200, &here);
    assert!(
        rest.iter().all(|command| command.reason.rule != "drain/replicate"),
        "{rest:?}"
    );
    for image in 1..=8u128 {
        assert!(
            !members(&sim, image).contains("n00"),
            "{image}: {}",
            members(&sim, image)
        );
        assert_eq!(sim.record(image).unwrap().members().len(), 2);
    }
}

#[test]
fn what_cannot_move_stays_until_it_can() {
    // Nobody is there to take it.
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2")]);
    sim.replicated(&["a", "b"], 1, 100);
    sim.drain("b", true);
    assert_eq!(briefs(&seconds(&mut sim, 50, &["a", "b"])), [""; 0]);
    sim.join_in("r3", "c", 8);
    assert_eq!(briefs(&seconds(&mut sim, 50, &["a", "b", "c"])), ["1: b>c", "1: -b"]);
    // Nobody serves it, so nobody can copy it.
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    sim.drain("b", true);
    let epoch = sim.record(1).unwrap().epoch();
    sim.node(
        "a",
        Event::ImageDetached {
            image: ImageId(1),
            epoch,
        },
    );
    assert_eq!(briefs(&seconds(&mut sim, 50, &ALL)), [""; 0]);
    sim.take("a", &["a", "b"], 1);
    assert_eq!(briefs(&seconds(&mut sim, 50, &ALL)).len(), 2);
}

#[test]
fn a_move_whose_order_or_joiner_fails_is_given_up_and_another_node_is_asked() {
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    seconds(&mut sim, 10, &ALL);
    sim.drain("b", true);
    sim.deaf.insert(node_id("a"));
    let mut ordered = Vec::new();
    while ordered.is_empty() {
        ordered = second(&mut sim, &ALL);
    }
    assert_eq!(briefs(&ordered), ["1: b>c"]);
    let refused = Event::CommandFinished {
        command: ordered[0].id,
        node: node_id("a"),
        outcome: Outcome::Refused { why: "no room".into() },
    };
    sim.node("a", refused);
    sim.deaf.clear();
    let mut ordered = Vec::new();
    while ordered.is_empty() {
        ordered = second(&mut sim, &ALL);
    }
    assert_eq!(briefs(&ordered), ["1: b>d"]);
    // It dies while it is being synced; the old one stays, and nothing is dropped.
    sim.loses("a", 1, "d");
    assert_eq!(briefs(&seconds(&mut sim, 20, &["a", "b"])), [""; 0]);
    assert_eq!(members(&sim, 1), "a b");
    assert_eq!(account(&sim.state, "drain/replicate").failed, 2);
    // An order that nobody answers is given up by itself.
    sim.deaf.insert(node_id("a"));
    let mut ordered = Vec::new();
    for _ in 0..300 {
        ordered.extend(second(&mut sim, &ALL));
    }
    assert!((2..=6).contains(&ordered.len()), "{:?}", briefs(&ordered));
    assert_eq!(members(&sim, 1), "a b");
}

#[test]
fn a_replica_that_another_loss_needs_is_not_dropped() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r2"), ("c", "r3"), ("d", "r4"), ("e", "r5")]);
    let all = ["a", "b", "c", "d", "e"];
    sim.replicated(&["a", "b", "c"], 1, 100);
    seconds(&mut sim, 10, &all);
    sim.drain("b", true);
    let mut ordered = Vec::new();
    while ordered.is_empty() {
        ordered = second(&mut sim, &all);
    }
    assert_eq!(briefs(&ordered), ["1: b>d"]);
    // `c` goes before `d` is in sync: `d` stands for it, and `b` is moved anew.
    sim.loses("a", 1, "c");
    sync(&mut sim, &ordered);
    assert_eq!(members(&sim, 1), "a b d");
    let here = ["a", "b", "d", "e"];
    assert_eq!(briefs(&seconds(&mut sim, 20, &here)), ["1: b>e", "1: -b"]);
}

#[test]
fn the_new_owner_of_a_drained_replica_keeps_its_copy() {
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    seconds(&mut sim, 10, &ALL);
    sim.drain("b", true);
    let mut ordered = Vec::new();
    while ordered.is_empty() {
        ordered = second(&mut sim, &ALL);
    }
    sync(&mut sim, &ordered);
    // The guest runs on `b` by now: nothing can go from there, and another one is too many.
    sim.take("b", &["a", "b", "c"], 1);
    let ordered = seconds(&mut sim, 100, &ALL);
    assert_eq!(
        (briefs(&ordered), ordered[0].reason.rule.as_str()),
        (vec!["1: -c".into()], "fewer/drop")
    );
    assert_eq!(members(&sim, 1), "a b");
}

#[test]
fn fewer_replicas_are_wanted_and_those_missed_least_go() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r3")]);
    sim.replicated(&["a", "b", "c", "d"], 1, 100);
    seconds(&mut sim, 10, &ALL);
    sim.wanted("a", 1, 2);
    let ordered = seconds(&mut sim, 2 * DROP_REST_TICKS, &ALL);
    assert_eq!(briefs(&ordered), ["1: -b", "1: -d"]);
    assert_eq!(
        lost(&ordered[0]),
        ["d alone_in_fault_domain", "c alone_in_fault_domain", "a owner"]
    );
    assert_eq!((number(&ordered[1], "members"), number(&ordered[1], "wanted")), (3, 2));
    // A location that an operator adds is left alone.
    sim.change("a", 1, |record| record.with_joiner(&node_id("d"), sim::WHOLE).unwrap());
    sim.synced("a", 1, "d");
    assert_eq!(briefs(&seconds(&mut sim, GRACE_TICKS, &ALL)), [""; 0]);
    // On a draining node it is dropped, without a copy elsewhere.
    sim.drain("d", true);
    let ordered = seconds(&mut sim, 20, &ALL);
    assert_eq!(
        (briefs(&ordered), ordered[0].reason.rule.as_str()),
        (vec!["1: -d".into()], "drain/drop")
    );
}

#[test]
fn what_is_being_synced_counts_when_fewer_are_wanted_again() {
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    seconds(&mut sim, 10, &ALL);
    sim.wanted("a", 1, 3);
    let ordered = second(&mut sim, &ALL);
    assert_eq!(briefs(&ordered), ["1: >d"]);
    sim.wanted("a", 1, 2);
    assert_eq!(briefs(&seconds(&mut sim, 10, &ALL)), [""; 0]);
    sync(&mut sim, &ordered);
    assert_eq!(briefs(&seconds(&mut sim, 10, &ALL)), ["1: -d"]);
    // The same, and the sync fails: nothing is one too many.
    sim.wanted("a", 1, 3);
    let ordered = seconds(&mut sim, 100, &["a", "b", "c"]);
    assert_eq!(briefs(&ordered), ["1: >c"]);
    sim.wanted("a", 1, 2);
    seconds(&mut sim, 100, &["a", "b", "c"]);
    assert_eq!(members(&sim, 1), "a b");
}

#[test]
fn replicas_that_share_a_fault_domain_are_spread_once_a_node_elsewhere_has_been_there_for_a_while() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r1")]);
    sim.replicated(&["a", "b"], 1, 100);
    assert_eq!(briefs(&seconds(&mut sim, 50, &["a", "b"])), [""; 0]);
    sim.join_in("r2", "c", 8);
    let here = ["a", "b", "c"];
    assert_eq!(briefs(&seconds(&mut sim, STEADY_TICKS - 10, &here)), [""; 0]);
    let ordered = seconds(&mut sim, 20 + LOOK_EVERY_TICKS, &here);
    assert_eq!(briefs(&ordered), ["1: b>c", "1: -b"]);
    assert_eq!(
        (
            number(&ordered[0], "replicas_in_one_domain"),
            number(&ordered[0], "gain")
        ),
        (2, 1)
    );
    assert_eq!(briefs(&seconds(&mut sim, GRACE_TICKS, &here)), [""; 0]);
    // It lasted, so it paid back.
    seconds(&mut sim, SCORE_TICKS, &here);
    let account = account(&sim.state, "spread/replicate");
    assert_eq!((account.done, account.predicted, account.realised), (1, 1, 1));
    // After a takeover by `c` the other one is in another fault domain already.
    sim.take("c", &["a", "c"], 1);
    assert_eq!(briefs(&seconds(&mut sim, GRACE_TICKS, &here)), [""; 0]);
    // The operator names racks anew: that counts at once.
    sim.domain("a", "r2");
    let ordered = seconds(&mut sim, 20, &here);
    assert_eq!(briefs(&ordered), ["1: a>b", "1: -a"]);
    assert_eq!(ordered[0].reason.rests_on.len(), 1);
}

#[test]
fn a_node_that_joined_empty_gets_replicas_one_at_a_time_until_it_is_not_worth_it() {
    let mut sim = Sim::cluster(&[("o", "r1"), ("a", "r2")]);
    for image in 1..=4 {
        sim.replicated(&["o", "a"], image, LARGE / 2);
    }
    assert_eq!(briefs(&seconds(&mut sim, 50, &["a", "o"])), [""; 0]);
    sim.join_in("r3", "b", 8);
    let here = ["a", "b", "o"];
    let ordered = seconds(&mut sim, STEADY_TICKS + 200, &here);
    // 20 GiB here and nothing there: two move, then both have 10.
    assert_eq!(briefs(&ordered), ["1: a>b", "1: -a", "2: a>b", "2: -a"]);
    assert_eq!(
        (number(&ordered[0], "from_bytes"), number(&ordered[0], "to_bytes")),
        (4 * IMBALANCE_BYTES_MIN / 2, 0)
    );
    assert_eq!(briefs(&seconds(&mut sim, 2 * GRACE_TICKS, &here)), [""; 0]);
}

#[test]
fn nothing_moves_by_itself_while_something_is_being_repaired() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r3"), ("e", "r4")]);
    let all = ["a", "b", "c", "d", "e"];
    sim.replicated(&["a", "b"], 1, 100);
    sim.replicated(&["a", "d", "c"], 2, 100);
    sim.loses("a", 2, "d");
    let ordered = seconds(&mut sim, GRACE_TICKS - 10, &all);
    assert_eq!(briefs(&ordered), [""; 0]);
    let ordered = seconds(&mut sim, 40, &all);
    assert_eq!(brief(&ordered[0]), "2: >d");
    assert_eq!(brief(&ordered[1]), "1: b>e");
}

/// Nodes `a` and `b` with much on one of them, in turn, by images without replicas; the replicas of image 1 follow.
struct Seesaw {
    sim: Sim,
    next: u128,
}

const SEESAW: [&str; 3] = ["a", "b", "o"];

impl Seesaw {
    fn new() -> Self {
        let mut sim = Sim::cluster(&[("o", "r1"), ("a", "r2"), ("b", "r3")]);
        sim.image("o", 99, LARGE);
        sim.replicated(&["o", "a"], 1, LARGE);
        Self { sim, next: 100 }
    }

    /// Puts so much on a node that a replica of image 1 there is to leave; what was ordered for an hour.
    fn load(&mut self, node: &str, ticks: u64) -> Vec<Command> {
        self.next += 1;
        self.sim
            .created(node, self.next, 3 * LARGE, vec![hearth_protocol::LayerId(self.next)]);
        let ordered = seconds(&mut self.sim, ticks, &SEESAW);
        self.sim.node(
            node,
            Event::ImageDeleted {
                image: ImageId(self.next),
            },
        );
        ordered
    }
}

#[test]
fn a_replica_that_goes_in_a_circle_is_left_alone_for_a_doubling_time() {
    let mut seesaw = Seesaw::new();
    assert_eq!(briefs(&seesaw.load("a", 20)), ["1: a>b", "1: -a"]);
    assert!(!codes(&seesaw.sim.state).contains(&"MOVES_PAUSED".into()));
    // Back again: that trips the breaker. The move under way is finished.
    assert_eq!(briefs(&seesaw.load("b", 200)), ["1: b>a", "1: -b"]);
    assert!(codes(&seesaw.sim.state).contains(&"MOVES_PAUSED".into()));
    let until = |sim: &Sim| {
        let mut why = Why::new(WhyImage::Id(ImageId(1)), BlockIndex(0));
        let mut replayer = Replayer::new(Until::End);
        for (seq, message) in &sim.log {
            if let Step::Folded { event, applied, .. } = replayer.step(*seq, message) {
                why.observe(*seq, &event, applied, replayer.state());
            }
        }
        let report = why.answer(replayer.state()).unwrap();
        (report.moves_paused_until, report.to_string())
    };
    let (paused, text) = until(&seesaw.sim);
    let tripped = paused.unwrap().0 - BREAK_TICKS;
    assert!(
        tripped < seesaw.sim.tick.0 && text.contains("\npaused   no automatic moves"),
        "{text}"
    );
    // For an hour it stays where it is, however much lies there.
    let left = paused.unwrap().0 - seesaw.sim.tick.0;
    assert_eq!(briefs(&seesaw.load("a", left - 10)), [""; 0]);
    // Then it moves again, and that is the second circle: two hours.
    assert_eq!(briefs(&seesaw.load("a", 20)), ["1: a>b", "1: -a"]);
    let (paused, _) = until(&seesaw.sim);
    let second = paused.unwrap().0 - seesaw.sim.tick.0;
    assert!((2 * BREAK_TICKS - 30..=2 * BREAK_TICKS).contains(&second), "{second}");
    // A drain is an operator's order and goes on.
    seesaw.sim.drain("b", true);
    assert_eq!(briefs(&seconds(&mut seesaw.sim, 100, &SEESAW)), ["1: b>a", "1: -b"]);
}

#[test]
fn circles_far_apart_trip_nothing() {
    let mut seesaw = Seesaw::new();
    seesaw.sim.keeps_log = false;
    assert_eq!(briefs(&seesaw.load("a", 20)).len(), 2);
    seconds(&mut seesaw.sim, CYCLE_TICKS + 10, &SEESAW);
    assert_eq!(briefs(&seesaw.load("b", 200)), ["1: b>a", "1: -b"]);
    assert!(!codes(&seesaw.sim.state).contains(&"MOVES_PAUSED".into()));
}

#[test]
fn a_rule_whose_moves_do_not_last_is_off_for_a_day() {
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r1"), ("c", "r2")]);
    sim.keeps_log = false;
    let here = ["a", "b", "c"];
    for image in 1..=LOSING_IN_ROW + 1 {
        sim.replicated(&["a", "b"], image.into(), 100);
    }
    let mut ordered = Vec::new();
    while (ordered.len() as u64) < 2 * LOSING_IN_ROW {
        ordered.extend(seconds(&mut sim, 1, &here));
    }
    // What was moved to `c` is lost there before it is scored, and `c` is gone.
    for image in 1..=LOSING_IN_ROW {
        sim.loses("a", image.into(), "c");
    }
    seconds(&mut sim, SCORE_TICKS + 10, &["a"]);
    let account = account(&sim.state, "spread/replicate");
    assert_eq!((account.predicted, account.realised), (LOSING_IN_ROW, 0));
    assert!(account.off_until.is_some() && codes(&sim.state).contains(&"MOVES_OFF".into()));
}

#[test]
fn nodes_that_flap_for_days_cost_a_bounded_number_of_orders() {
    const DAY: u64 = 86_400;
    let mut sim = Sim::cluster(&[("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r2")]);
    sim.keeps_log = false;
    for image in 1..=6 {
        sim.replicated(&["a", "b"], image, LARGE / 4);
    }
    let mut orders = [0u64; 2];
    for second in 0..2 * DAY {
        // `c` and `d` are there for fifteen minutes, which is long enough to move to, and away for a minute.
        let (c, d) = (second % 960 < 900, (second + 480) % 960 < 900);
        let mut here = vec!["a", "b"];
        here.extend(c.then_some("c"));
        here.extend(d.then_some("d"));
        here.iter().for_each(|node| sim.alive(node));
        for (node, is_here) in [("c", c), ("d", d)] {
            for image in 1..=6 {
                if !is_here && sim.record(image).unwrap().everyone().contains(&node_id(node)) {
                    sim.loses("a", image, node);
                }
            }
        }
        let commands = sim.second();
        for command in &commands {
            if let Order::Replicate { image, to, .. } = &command.order
                && here.contains(&to.as_str())
            {
                sim.synced("a", image.0, to.as_str());
            }
        }
        orders[(second / DAY) as usize] +=
            commands.iter().filter(|c| !c.reason.rule.starts_with("repair")).count() as u64;
    }
    sim.state.audit().unwrap();
    // Six images, four moves a day for each, of two orders each; what brings replicas back is repair.
    println!("moves and drops on the first and on the second day: {orders:?}");
    assert!(orders.iter().all(|orders| (2..=6 * 8).contains(orders)), "{orders:?}");
}

#[test]
fn a_replay_derives_the_same_moves_and_why_tells_of_them() {
    let mut sim = Sim::cluster(&FOUR);
    sim.replicated(&["a", "b"], 1, 100);
    seconds(&mut sim, 10, &ALL);
    sim.drain("b", true);
    let ordered = seconds(&mut sim, 50, &ALL);
    assert_eq!(ordered.len(), 2);
    let mut replayer = Replayer::new(Until::End);
    let mut why = Why::new(WhyImage::Name("appl/vm-1".parse().unwrap()), BlockIndex(7));
    let mut read = None;
    for (at, (seq, message)) in sim.log.iter().enumerate() {
        let Step::Folded { event, applied, .. } = replayer.step(*seq, message) else {
            panic!("every message is an event");
        };
        why.observe(*seq, &event, applied, replayer.state());
        // A snapshot in the middle of the move.
        if replayer.state().seq() == *seq && matches!(&*event, Event::CommandFinished { .. }) && read.is_none() {
            read = Some((at, State::decode(&replayer.state().encode()).unwrap()));
        }
    }
    let text = why.answer(replayer.state()).unwrap().to_string();
    assert!(
        text.contains("a replica for c, which is to replace the one on b\n  instead of node d: "),
        "{text}"
    );
    assert!(text.contains("the replica on b goes\n"), "{text}");
    let (state, report) = replayer.finish();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!((report.commands_same, state.digest()), (2, sim.state.digest()));
    let (at, mut state) = read.unwrap();
    for (seq, message) in &sim.log[at + 1..] {
        state.apply(*seq, &message.envelope().unwrap(), &message.event().unwrap());
    }
    assert_eq!(state.digest(), sim.state.digest());
}
