//! What holds for any log whatever: nothing panics, repeats and void events change nothing but counters, every account
//! recounts, budgets and capacities hold, and a replay ends at the same digests.

use std::collections::{BTreeMap, BTreeSet};

use hearth_protocol::command::{Alternative, Demotion, LostNode, Order, Outcome, Promotion, Reason};
use hearth_protocol::heat::{BlockHeat, PackedHeat, TierUse};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::record::{Extent, Record, Run};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, CommandId, Envelope, Epoch, Event, HeatScore, ImageId, Incarnation, LayerId, LeaseId,
    NodeId, Publisher, Seq, SetVersion, Term, TickNo, WallMs,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::policy::repair::{GRACE_TICKS, GRACE_TICKS_LAST, IN_FLIGHT_MAX};
use crate::replay::{Replayer, Until};
use crate::state::{Facts, Judged, Odd, State};

#[path = "../tests/sim/mod.rs"]
pub(crate) mod sim;

use sim::{BLOCK, Sim, node_id};

const NODES: [&str; 4] = ["n1", "n2", "n3", "n4"];

/// One thing that happens. Small ids, so that they meet; numbers from the edges, so that they overflow if they can.
#[derive(Debug, Clone)]
enum Op {
    Join(usize, u64),
    Image(usize, u128),
    Clone(usize, u128, u128),
    Attach(usize, u128),
    Detach(usize, u128),
    Delete(usize, u128),
    Snapshot(usize, u128, u128),
    Resize(usize, u128, u128),
    Heat(usize, u128, u128, Vec<BlockHeat>, u64),
    Drop(usize, u128, Vec<u64>),
    Capacity(usize, u64),
    Damaged(usize, u128, Vec<u8>),
    Second(bool),
    Tick(u64, u64),
    Policy(TierPolicy),
    Answer(usize, bool),
    Repeat(usize),
    Skip(u64),
    Replicated(usize, u128, usize),
    Record(usize, u128, usize, Edit),
    Later(u64),
    Drain(usize, bool),
    Domain(usize, u64),
    Wanted(usize, u128, u64),
    Any(Publisher, u64, Box<Event>),
}

/// A change of an image's record, sound or not.
#[derive(Debug, Clone, Copy)]
enum Edit {
    Take,
    Lose,
    Join,
    JoinSome(u64),
    Sync,
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        2 => Just(Edit::Take),
        3 => Just(Edit::Lose),
        2 => Just(Edit::Join),
        1 => (0..30u64).prop_map(Edit::JoinSome),
        2 => Just(Edit::Sync),
    ]
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0..20u64, 1 => Just(u64::MAX), 1 => Just(u64::MAX - 1), 1 => any::<u64>()]
}

fn record() -> impl Strategy<Value = BlockHeat> {
    let count = || prop_oneof![4 => 0..12u32, 1 => Just(u32::MAX)];
    (0..40u64, count(), count(), count(), number()).prop_map(|(block, reads, writes, bursts, bytes)| BlockHeat {
        block: BlockIndex(block),
        reads,
        writes,
        bursts,
        bytes,
    })
}

fn records() -> impl Strategy<Value = Vec<BlockHeat>> {
    vec(record(), 0..12).prop_map(|mut records| {
        records.sort();
        records.dedup_by_key(|r| r.block);
        records
    })
}

fn policy() -> impl Strategy<Value = TierPolicy> {
    (
        any::<bool>(),
        number(),
        number(),
        number(),
        number(),
        number(),
        number(),
    )
        .prop_map(
            |(enabled, half_life_s, margin, threshold_bursts, rate, below, in_flight)| TierPolicy {
                enabled,
                half_life_s,
                margin_percent: margin.saturating_add(100),
                threshold_bursts,
                promote_bytes_per_s_max: rate.saturating_mul(BLOCK),
                demote_below_centibursts: below,
                in_flight_bytes_max: in_flight.saturating_mul(BLOCK),
            },
        )
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        (1..5u128, vec((0..40u64, number()), 0..5)).prop_map(|(layer, blocks)| Order::Promote {
            layer: LayerId(layer),
            epoch: Epoch(1),
            set_version: SetVersion(1),
            from: node_id("n1"),
            blocks: blocks
                .into_iter()
                .map(|(block, score)| Promotion {
                    block: BlockIndex(block),
                    score: HeatScore(score),
                    displaces: None,
                    heat_seq: Seq(score),
                })
                .collect(),
            bytes: ByteLen(0),
        }),
        (1..5u128, vec((0..40u64, number()), 0..5)).prop_map(|(layer, blocks)| Order::Demote {
            layer: LayerId(layer),
            blocks: blocks
                .into_iter()
                .map(|(block, score)| Demotion {
                    block: BlockIndex(block),
                    score: HeatScore(score),
                })
                .collect(),
            bytes: ByteLen(0),
        }),
        (1..5u128, number(), 0..NODES.len(), any::<bool>()).prop_map(|(image, epoch, to, part)| Order::Replicate {
            layer: LayerId(image),
            image: ImageId(image),
            epoch: Epoch(epoch),
            set_version: SetVersion(epoch),
            to: node_id(NODES[to]),
            blocks: part.then_some(sim::WHOLE),
            bytes: ByteLen(epoch),
            replaces: part.then_some(node_id(NODES[(to + 1) % NODES.len()])),
        }),
        (1..5u128, number(), 0..NODES.len()).prop_map(|(image, epoch, from)| Order::Drop {
            layer: LayerId(image),
            image: ImageId(image),
            epoch: Epoch(epoch),
            set_version: SetVersion(epoch),
            from: node_id(NODES[from]),
            keep: epoch,
        }),
    ]
}

fn any_event() -> impl Strategy<Value = Event> {
    let node = || (0..NODES.len()).prop_map(|n| node_id(NODES[n]));
    prop_oneof![
        (number(), number()).prop_map(|(term, seq)| Event::TermStarted {
            term: Term(term),
            previous: Some((Incarnation(1), Seq(seq))),
        }),
        (number(), number(), number()).prop_map(|(term, tick, time)| Event::Ticked {
            term: Term(term),
            tick: TickNo(tick >> 1),
            time: WallMs(time),
        }),
        (node(), order(), number(), number(), number()).prop_map(|(node, order, term, tick, expires)| {
            Event::CommandGiven(Command {
                id: CommandId(u128::from(tick)),
                node,
                term: Term(term),
                tick: TickNo(tick),
                expires: TickNo(expires),
                order,
                reason: Reason {
                    rule: "é".repeat(50),
                    policy_version: 0,
                    numbers: Vec::new(),
                    rests_on: vec![Seq(1); 10],
                    lost: vec![
                        Alternative {
                            layer: LayerId(1),
                            block: BlockIndex(1),
                            score: HeatScore(1),
                            why: "ü".repeat(99),
                        };
                        6
                    ],
                    lost_nodes: vec![
                        LostNode {
                            node: node_id("n1"),
                            why: "ü".repeat(99),
                        };
                        6
                    ],
                },
            })
        }),
        (node(), number(), vec(0..40u64, 0..5)).prop_map(|(node, id, blocks)| Event::CommandFinished {
            command: CommandId(u128::from(id)),
            node,
            outcome: Outcome::Done {
                done: blocks.into_iter().map(BlockIndex).collect(),
                skipped: vec![(BlockIndex(3), "x".into())],
                bytes: ByteLen(1),
                took_us: 1,
            },
        }),
        (node(), 1..5u128).prop_map(|(node, layer)| Event::LayerSealed {
            layer: LayerId(layer),
            node,
            allocated: ByteLen(1),
        }),
        (node(), 1..5u128).prop_map(|(node, layer)| Event::LayerDropped {
            layer: LayerId(layer),
            node
        }),
        node().prop_map(|node| Event::NodeLeft { node }),
        (number(), node(), any::<bool>()).prop_map(|(term, node, draining)| Event::NodeDrainSet {
            term: Term(term),
            node,
            draining,
            reason: String::new(),
        }),
        (number(), node(), 0..4u64).prop_map(|(term, node, rack)| Event::FaultDomainSet {
            term: Term(term),
            node,
            fault_domain: format!("rack-{rack}"),
            reason: String::new(),
        }),
        (1..5u128, 0..10u64).prop_map(|(image, wanted)| Event::ReplicasSet {
            image: ImageId(image),
            wanted,
        }),
        (number(), policy()).prop_map(|(term, policy)| Event::PolicySet {
            term: Term(term),
            version: 9,
            policy,
            reason: String::new(),
        }),
    ]
}

fn publisher() -> impl Strategy<Value = Publisher> {
    prop_oneof![
        (0..NODES.len()).prop_map(|n| Publisher::Node(node_id(NODES[n]))),
        Just(Publisher::Scheduler(sim::LEADER.parse().unwrap())),
        Just(Publisher::Scheduler("sched-2".parse().unwrap())),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let node = || 0..NODES.len();
    let id = || 1..5u128;
    prop_oneof![
        1 => (node(), 0..6u64).prop_map(|(n, main)| Op::Join(n, main)),
        2 => (node(), id()).prop_map(|(n, i)| Op::Image(n, i)),
        1 => (node(), id(), id()).prop_map(|(n, i, l)| Op::Clone(n, i, l)),
        1 => (node(), id()).prop_map(|(n, i)| Op::Attach(n, i)),
        1 => (node(), id()).prop_map(|(n, i)| Op::Detach(n, i)),
        1 => (node(), id()).prop_map(|(n, i)| Op::Delete(n, i)),
        1 => (node(), id(), id()).prop_map(|(n, i, l)| Op::Snapshot(n, i, l)),
        1 => (node(), id(), id()).prop_map(|(n, i, l)| Op::Resize(n, i, l)),
        12 => (node(), id(), id(), records(), prop_oneof![5 => Just(0), 1 => number()])
            .prop_map(|(n, i, l, r, lost)| Op::Heat(n, i, l, r, lost)),
        1 => (node(), id(), vec(0..40u64, 0..5)).prop_map(|(n, l, b)| Op::Drop(n, l, b)),
        1 => (node(), 0..6u64).prop_map(|(n, c)| Op::Capacity(n, c)),
        1 => (node(), id(), vec(any::<u8>(), 0..20)).prop_map(|(n, l, b)| Op::Damaged(n, l, b)),
        10 => any::<bool>().prop_map(Op::Second),
        1 => (number(), number()).prop_map(|(tick, time)| Op::Tick(tick >> 1, time)),
        1 => policy().prop_map(Op::Policy),
        4 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(i, ok)| Op::Answer(i.index(64), ok)),
        2 => any::<prop::sample::Index>().prop_map(|i| Op::Repeat(i.index(1 << 20))),
        1 => (1..5u64).prop_map(Op::Skip),
        2 => (node(), id(), node()).prop_map(|(n, i, other)| Op::Replicated(n, i, other)),
        6 => (node(), id(), node(), edit()).prop_map(|(n, i, other, e)| Op::Record(n, i, other, e)),
        3 => (1..700u64).prop_map(Op::Later),
        1 => (node(), any::<bool>()).prop_map(|(n, on)| Op::Drain(n, on)),
        1 => (node(), 0..3u64).prop_map(|(n, rack)| Op::Domain(n, rack)),
        2 => (node(), id(), 1..4u64).prop_map(|(n, i, wanted)| Op::Wanted(n, i, wanted)),
        2 => (publisher(), number(), any_event()).prop_map(|(p, n, e)| Op::Any(p, n, Box::new(e))),
    ]
}

/// A state with everything taken out that a void or repeated event may change.
fn neutral(state: &State) -> State {
    let mut state = state.clone();
    let facts = &mut state.data.facts;
    facts.seq = Seq(0);
    facts.totals = Default::default();
    facts.publishers = Default::default();
    facts.odd = Odd {
        publisher_gaps: 0,
        ..facts.odd
    };
    state
}

fn joined(sim: &Sim, node: usize) -> bool {
    sim.nodes.contains_key(&node_id(NODES[node]))
}

fn run(sim: &mut Sim, given: &mut Vec<Command>, op: &Op) {
    match op {
        Op::Join(node, main) => sim.join(NODES[*node], *main),
        Op::Second(give) => {
            let commands = sim.tick_only(1_000);
            if *give {
                for command in &commands {
                    sim.lead(Event::CommandGiven(command.clone()));
                }
                given.extend(commands);
            }
        }
        Op::Tick(tick, time) => {
            let applied = sim.lead(Event::Ticked {
                term: sim.term,
                tick: TickNo(*tick),
                time: WallMs(*time),
            });
            if applied.decide {
                sim.tick = TickNo(*tick);
            }
        }
        Op::Policy(policy) => sim.policy(|p| *p = policy.clone()),
        Op::Answer(index, ok) if !given.is_empty() => {
            let command = given.swap_remove(index % given.len());
            let blocks: Vec<BlockIndex> = match &command.order {
                Order::Promote { blocks, .. } => blocks.iter().map(|p| p.block).collect(),
                Order::Demote { blocks, .. } => blocks.iter().map(|d| d.block).collect(),
                // An answer that names blocks where none are asked for.
                Order::Replicate { .. } | Order::Drop { .. } => vec![BlockIndex(1), BlockIndex(2)],
            };
            let half = blocks.len().div_ceil(2);
            let outcome = if *ok {
                Outcome::Done {
                    done: blocks[..half].to_vec(),
                    skipped: blocks[half..].iter().map(|b| (*b, "written".into())).collect(),
                    bytes: ByteLen(1),
                    took_us: 1,
                }
            } else {
                Outcome::Refused { why: "no".into() }
            };
            let name = command.node.to_string();
            sim.node(
                &name,
                Event::CommandFinished {
                    command: command.id,
                    node: command.node.clone(),
                    outcome,
                },
            );
        }
        Op::Later(ticks) => {
            sim.tick = TickNo(sim.tick.0 + ticks);
            sim.tick_only(1_000);
            for (node, name) in NODES.iter().enumerate() {
                if joined(sim, node) {
                    sim.alive(name);
                }
            }
        }
        Op::Repeat(index) if !sim.log.is_empty() => {
            let (_, message) = &sim.log[index % sim.log.len()];
            let (envelope, event) = (message.envelope().unwrap(), message.event().unwrap());
            let applied = sim.append(&envelope, &event);
            assert_eq!(applied.judged, Judged::Repeat);
        }
        Op::Skip(numbers) => {
            for _ in 0..*numbers {
                sim.burn();
            }
        }
        Op::Any(publisher, number, event) => {
            let envelope = Envelope {
                codec: 1,
                subject: String::new(),
                publisher: publisher.clone(),
                incarnation: Incarnation(99),
                publisher_seq: *number,
                time: WallMs(*number),
                reason: String::new(),
            };
            sim.append(&envelope, event);
            if sim.state.leader().is_some_and(|l| l.as_str() != sim::LEADER) {
                // Another scheduler took over; the one of the test comes back under a higher term.
                sim.term = sim.state.term().next();
                sim.lead(Event::TermStarted {
                    term: sim.term,
                    previous: None,
                });
            }
            sim.term = sim.state.term();
            sim.tick = sim.state.data.facts.validity.tick();
        }
        _ => node_op(sim, op),
    }
}

fn node_op(sim: &mut Sim, op: &Op) {
    let node = match op {
        Op::Image(n, ..)
        | Op::Clone(n, ..)
        | Op::Attach(n, ..)
        | Op::Detach(n, ..)
        | Op::Delete(n, ..)
        | Op::Snapshot(n, ..)
        | Op::Resize(n, ..)
        | Op::Heat(n, ..)
        | Op::Drop(n, ..)
        | Op::Capacity(n, ..)
        | Op::Damaged(n, ..)
        | Op::Replicated(n, ..)
        | Op::Drain(n, ..)
        | Op::Domain(n, ..)
        | Op::Wanted(n, ..)
        | Op::Record(n, ..) => *n,
        _ => return,
    };
    if !joined(sim, node) {
        return;
    }
    let name = NODES[node];
    let epoch = |sim: &Sim, image: u128| {
        sim.state
            .data
            .facts
            .validity
            .image(ImageId(image))
            .map_or(0, |i| i.epoch.0)
    };
    match op {
        Op::Image(_, image) => sim.image(name, *image, 30),
        Op::Clone(_, image, layer) => sim.created(name, *image, 30, vec![LayerId(100 + image), LayerId(*layer)]),
        Op::Attach(_, image) => sim.attach(name, *image, epoch(sim, *image) + 1),
        Op::Detach(_, image) => {
            let epoch = Epoch(epoch(sim, *image));
            sim.node(
                name,
                Event::ImageDetached {
                    image: ImageId(*image),
                    epoch,
                },
            );
        }
        Op::Resize(_, image, layer) => {
            sim.node(
                name,
                Event::ImageResized {
                    image: ImageId(*image),
                    size: ByteLen((256 + *layer as u64) << 16),
                    sealed: LayerId(*image),
                    top: LayerId(300 + layer),
                },
            );
        }
        Op::Delete(_, image) => {
            sim.node(name, Event::ImageDeleted { image: ImageId(*image) });
        }
        Op::Snapshot(_, image, layer) => {
            sim.node(
                name,
                Event::SnapshotTaken {
                    image: ImageId(*image),
                    name: "v1".parse().unwrap(),
                    sealed: LayerId(*image),
                    top: LayerId(200 + layer),
                },
            );
        }
        Op::Heat(_, image, layer, records, lost) => {
            sim.heat_with(name, *image, *layer, records, |h| h.images[0].omitted.lost = *lost);
        }
        Op::Drop(_, layer, blocks) => {
            sim.heat_with(name, 1, 1, &[], |h| {
                h.dropped = vec![(LayerId(*layer), blocks.iter().copied().map(BlockIndex).collect())];
            });
        }
        Op::Capacity(_, blocks) => {
            sim.heat_with(name, 1, 1, &[], |h| {
                h.tier = TierUse {
                    capacity: ByteLen(8 * BLOCK),
                    main_capacity: ByteLen(blocks * BLOCK),
                    ..TierUse::default()
                };
            });
        }
        Op::Replicated(_, image, other) => {
            sim.created_on(name, &[name, NODES[*other]], *image, 30);
            if sim.record(*image).is_some() {
                sim.take(name, &NODES, *image);
            }
        }
        Op::Record(_, image, other, edit) => {
            let Some(record) = sim.record(*image) else {
                return;
            };
            let other = node_id(NODES[*other]);
            let some = |first: u64| Extent {
                first: BlockIndex(first),
                ..sim::WHOLE
            };
            let edited = match edit {
                Edit::Take => record.granted(LeaseId(u128::from(record.epoch().0) + 1), &record.members()),
                Edit::Lose => record.without(&[other].into()),
                Edit::Join => record.with_joiner(&other, sim::WHOLE),
                Edit::JoinSome(first) => record.with_joiner(&other, some(*first)),
                Edit::Sync => record.with_member(&other, sim::WHOLE),
            };
            if let Ok(edited) = edited {
                sim.change(name, *image, |_| edited);
            }
        }
        Op::Drain(_, on) => {
            sim.drain(name, *on);
        }
        Op::Domain(_, 0) => {
            sim.domain(name, "");
        }
        Op::Domain(_, rack) => {
            sim.domain(name, &format!("rack-{rack}"));
        }
        Op::Wanted(_, image, wanted) => {
            sim.wanted(name, *image, *wanted);
        }
        Op::Damaged(_, layer, bytes) => {
            sim.heat_with(name, 1, *layer, &[], |h| {
                h.images[0].layers[0].blocks = PackedHeat(bytes.clone());
            });
        }
        _ => {}
    }
}

/// What every list of decisions keeps to, however wild the log before it was.
fn check_decisions(state: &State) {
    let facts = &state.data.facts;
    let mut promoted: BTreeMap<&NodeId, u64> = BTreeMap::new();
    let mut demoted: BTreeMap<&NodeId, u64> = BTreeMap::new();
    let commands = state.decide();
    for command in &commands {
        match &command.order {
            Order::Promote { bytes, blocks, .. } => {
                *promoted.entry(&command.node).or_default() += bytes.0;
                for block in blocks {
                    assert!(block.score >= HeatScore(0) && block.heat_seq.0 > 0);
                }
            }
            Order::Demote { bytes, .. } => {
                assert!(!promoted.contains_key(&command.node), "a demotion after a promotion");
                *demoted.entry(&command.node).or_default() += bytes.0;
            }
            Order::Replicate {
                image,
                to,
                replaces: Some(from),
                ..
            } => check_move(facts, &command.node, *image, from, to),
            Order::Replicate { image, to, .. } => check_replicate(facts, &command.node, *image, to),
            Order::Drop { image, from, keep, .. } => check_drop(facts, &command.node, *image, from, *keep),
        }
    }
    let targets: Vec<&NodeId> = commands
        .iter()
        .filter_map(|c| match &c.order {
            Order::Replicate { to, .. } => Some(to),
            Order::Promote { .. } | Order::Demote { .. } | Order::Drop { .. } => None,
        })
        .collect();
    assert!(targets.len() <= IN_FLIGHT_MAX, "too many replicas at once");
    let distinct: BTreeSet<_> = targets.iter().collect();
    assert_eq!(distinct.len(), targets.len(), "two replicas for one node at once");
    for (node, bytes) in promoted {
        let on = &state.data.blocks[node];
        let per_tick = facts.policy.promote_bytes_per_s_max.saturating_mul(facts.tick_ms) / 1_000;
        assert!(bytes <= per_tick, "over the budget of a tick");
        assert!(
            bytes.saturating_add(on.arriving_bytes) <= facts.policy.in_flight_bytes_max,
            "over the limit in flight"
        );
        let used = on.resident_bytes + on.arriving_bytes + on.doubtful_bytes + bytes;
        let out = demoted.get(node).copied().unwrap_or(0);
        assert!(used - out <= facts.nodes[node].main_capacity(), "over the capacity");
    }
}

/// What every order about a replica keeps to; the image's record.
fn check_owned<'a>(facts: &'a Facts, owner: &NodeId, image: ImageId) -> &'a Record {
    let known = &facts.catalog.images[&image];
    let is_present = facts.nodes.get(owner).is_some_and(|node| facts.present(node));
    assert!(
        known.attached && known.node == *owner && is_present,
        "nobody could copy it"
    );
    let record = &facts.validity.image(image).unwrap().locations.as_ref().unwrap().record;
    assert!(
        record.runs().iter().all(|run| run.joiners.is_empty()),
        "two changes at once"
    );
    record
}

fn takes(facts: &Facts, node: &NodeId) -> bool {
    facts.takers().any(|(taker, _)| taker == node)
}

/// What every order to move a replica keeps to.
fn check_move(facts: &Facts, owner: &NodeId, image: ImageId, from: &NodeId, to: &NodeId) {
    let record = check_owned(facts, owner, image);
    assert!(takes(facts, to), "a node that takes nothing gets a replica");
    assert!(from != owner, "the owner's copy moves");
    assert!(record.members().contains(from) && !record.everyone().contains(to));
    let wanted = facts.catalog.images[&image].replicas.as_ref().unwrap().wanted;
    let has_all = |run: &Run| run.members.len() as u64 >= wanted;
    assert!(record.runs().iter().all(has_all), "a degraded image moves");
}

/// What every order to drop a replica keeps to.
fn check_drop(facts: &Facts, owner: &NodeId, image: ImageId, from: &NodeId, keep: u64) {
    let record = check_owned(facts, owner, image);
    let wanted = facts.catalog.images[&image].replicas.as_ref().unwrap().wanted;
    assert!(keep >= 1 && keep == wanted && from != owner);
    let left = |run: &Run| run.members.iter().filter(|node| *node != from).count() as u64;
    assert!(
        record.runs().iter().all(|run| left(run) >= keep),
        "too few would be left"
    );
}

/// What every order to replicate keeps to.
fn check_replicate(facts: &Facts, owner: &NodeId, image: ImageId, to: &NodeId) {
    let record = check_owned(facts, owner, image);
    let known = &facts.catalog.images[&image];
    assert!(takes(facts, to), "a node that takes nothing gets a replica");
    let wanted = known.replicas.as_ref().unwrap().wanted;
    let is_short = |run: &Run| (run.members.len() as u64) < wanted && !run.members.contains(to);
    assert!(record.runs().iter().any(is_short), "a replica too many");
    let short = &facts.repairs.short[&image];
    let over = |ticks: u64, tick: TickNo| facts.tick.0 - tick.0 >= ticks;
    let last = short.fewest == 1 && over(GRACE_TICKS_LAST, short.fell.tick);
    assert!(
        short.asked || last || over(GRACE_TICKS, short.since.tick),
        "within the grace time"
    );
}

proptest! {
    #[test]
    fn whatever_happens(ops in vec(op(), 0..120)) {
        let mut sim = Sim::default();
        sim.join("n1", 3);
        sim.image("n1", 1, 30);
        let mut given = Vec::new();
        for op in &ops {
            let before = (neutral(&sim.state), sim.log.len());
            run(&mut sim, &mut given, op);
            if sim.log.len() == before.1 + 1 && sim.applied.last().unwrap().judged != Judged::Valid {
                prop_assert!(neutral(&sim.state) == before.0, "{:?} changed the state", sim.applied.last());
            }
            if matches!(op, Op::Second(_)) {
                check_decisions(&sim.state);
            }
            prop_assert_eq!(sim.state.audit(), Ok(()));
        }
        crate::view(&sim.state);
        crate::image_heat(&sim.state, ImageId(1));
        // A snapshot reads back equal, and a replay from nothing ends at the same state.
        let encoded = rmp_serde::to_vec_named(&sim.state).unwrap();
        prop_assert!(rmp_serde::from_slice::<State>(&encoded).unwrap() == sim.state);
        let mut replayer = Replayer::new(Until::End);
        for (seq, message) in &sim.log {
            replayer.step(*seq, message);
        }
        prop_assert!(*replayer.state() == sim.state);
        prop_assert_eq!(replayer.state().digest(), sim.state.digest());
    }
}
