//! What folding, deciding and digesting cost at DESIGN §11's size: 1,000 nodes, 50,000 images.
//!
//! Times are of the thread on its processor, so that a busy machine does not count. Run with `cargo test --release -p scheduler-core --test scale -- --ignored --nocapture`. It prints figures; bounds
//! far above the targets catch a change of order and pass on a busy machine.

mod sim;

use std::sync::Arc;
use std::time::Duration;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::command::Order;
use hearth_protocol::event::{HeatFolded, ImageAttached, ImageCreated, NodeJoined};
use hearth_protocol::heat::{BlockHeat, HeatOrigin, ImageHeat, LatencySummary, LayerHeat, Omitted, TierUse, pack};
use hearth_protocol::record::{Nodes, Record, Stamp};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, Envelope, Epoch, Event, ImageId, Incarnation, LayerId, LeaseId, NodeId, Publisher,
    Seq, SetVersion, Term, TickNo, WallMs,
};
use scheduler_core::State;
use sim::{BLOCK, node_id};

struct Cluster {
    state: State,
    seq: u64,
    numbers: std::collections::BTreeMap<Publisher, u64>,
    tick: u64,
    random: u64,
}

impl Cluster {
    fn publish(&mut self, publisher: &Publisher, event: &Event) -> Duration {
        let number = self.numbers.entry(publisher.clone()).or_default();
        *number += 1;
        self.seq += 1;
        let envelope = Envelope {
            codec: 1,
            subject: String::new(),
            publisher: publisher.clone(),
            incarnation: Incarnation(1),
            publisher_seq: *number,
            time: WallMs(0),
            reason: String::new(),
        };
        let from = on_cpu();
        self.state.apply(Seq(self.seq), &envelope, event);
        on_cpu() - from
    }

    /// An owner changes an image's record.
    fn change(&mut self, owner: &NodeId, image: u128, from: SetVersion, to: &Arc<Record>) {
        let (epoch, lease) = match from {
            SetVersion(1) => (Epoch(0), LeaseId(0)),
            _ => (Epoch(1), LeaseId(1)),
        };
        let change = Change {
            by: owner.clone(),
            from: Stamp {
                epoch,
                lease,
                set_version: from,
            },
            to: to.clone(),
            stale: None,
        };
        let event = Event::LocationsChanged {
            image: ImageId(image),
            change,
        };
        self.publish(&Publisher::Node(owner.clone()), &event);
    }

    /// xorshift64: the same numbers on every run.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// Time this thread has spent on a processor (proc_pid_schedstat(5)).
fn on_cpu() -> Duration {
    // The kernel brings the figure up to date when the thread yields or at its own tick.
    std::thread::yield_now();
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells a thread's processor time");
    let nanos = stat.split_whitespace().next().and_then(|n| n.parse().ok());
    Duration::from_nanos(nanos.expect("its first number is nanoseconds on the processor"))
}

fn leader() -> Publisher {
    Publisher::Scheduler("sched-1".parse().unwrap())
}

fn name(node: u64) -> NodeId {
    node_id(&format!("node-{node:04}"))
}

/// With `replicas`, every image has a second member on the next node.
fn build(nodes: u64, images_per_node: u64, replicas: bool) -> Cluster {
    let mut cluster = Cluster {
        state: State::default(),
        seq: 0,
        numbers: Default::default(),
        tick: 0,
        random: 0x9e37_79b9_7f4a_7c15,
    };
    cluster.publish(
        &leader(),
        &Event::TermStarted {
            term: Term(1),
            previous: None,
        },
    );
    for n in 0..nodes {
        let id = name(n);
        let publisher = Publisher::Node(id.clone());
        cluster.publish(
            &publisher,
            &Event::NodeJoined(NodeJoined {
                node: id.clone(),
                incarnation: Incarnation(1),
                storage_incarnation: Incarnation(7),
                previous: None,
                ram: ByteLen(10_000 * BLOCK),
                main: ByteLen(8_000 * BLOCK),
                fault_domain: format!("rack-{}", n / 20),
                peer_address: String::new(),
                layers: Vec::new(),
                heat_source: "export".into(),
            }),
        );
        for i in 0..images_per_node {
            let number = u128::from(n * images_per_node + i + 1);
            cluster.publish(
                &publisher,
                &Event::ImageCreated(ImageCreated {
                    image: ImageId(number),
                    name: format!("p/i{number}").parse().unwrap(),
                    size: ByteLen(1 << 40),
                    block_size: ByteLen(BLOCK),
                    layers: vec![LayerId(number)],
                    parent: None,
                    node: id.clone(),
                    set_version: SetVersion(1),
                    members: if replicas { members(n, nodes) } else { Nodes::new() },
                }),
            );
            if replicas {
                let record = Aggregate::new(SetVersion(1), members(n, nodes)).unwrap().record;
                let record = record.granted(LeaseId(1), &members(n, nodes)).unwrap();
                cluster.change(&id, number, SetVersion(1), &Arc::new(record));
                continue;
            }
            cluster.publish(
                &publisher,
                &Event::ImageAttached(ImageAttached {
                    image: ImageId(number),
                    node: id.clone(),
                    epoch: Epoch(1),
                    lease: LeaseId(1),
                    set_version: SetVersion(1),
                    device: true,
                }),
            );
        }
    }
    cluster
}

/// The nodes that hold the images of the `n`-th.
fn members(n: u64, nodes: u64) -> Nodes {
    [name(n), name((n + 1) % nodes)].into()
}

/// One window of one node: `per_image` skewed blocks of each of its images.
fn window(cluster: &mut Cluster, node: u64, images_per_node: u64, per_image: u64, report: u64) -> Event {
    let mut images = Vec::new();
    for i in 0..images_per_node {
        let number = u128::from(node * images_per_node + i + 1);
        let mut blocks: Vec<u64> = (0..per_image)
            .map(|_| {
                // Two of three accesses go to a tenth of the blocks.
                let random = cluster.random();
                let span = if random.is_multiple_of(3) { 10_000 } else { 100 };
                (random >> 8) % span
            })
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        let records: Vec<_> = blocks
            .into_iter()
            .map(|block| BlockHeat {
                block: BlockIndex(block),
                reads: 3,
                writes: 0,
                bursts: 1 + (block % 3) as u32,
                bytes: 12_288,
            })
            .collect();
        images.push(ImageHeat {
            image: ImageId(number),
            origin: HeatOrigin::Ebpf,
            layers: vec![LayerHeat {
                layer: LayerId(number),
                blocks: pack(&records),
            }],
            omitted: Omitted::default(),
            read_latency: LatencySummary::default(),
            write_latency: LatencySummary::default(),
            ram_hits: 1,
            ram_misses: 1,
        });
    }
    Event::HeatFolded(HeatFolded {
        term: Term(1),
        node: name(node),
        incarnation: Incarnation(1),
        reports: (report, report),
        gap: 0,
        time: WallMs(0),
        images,
        tier: TierUse::default(),
        disks: Vec::new(),
        probe_events_total: 0,
        probe_lost_total: 0,
        dropped: Vec::new(),
    })
}

fn records_of(event: &Event) -> u64 {
    let Event::HeatFolded(heat) = event else { return 0 };
    heat.images
        .iter()
        .flat_map(|i| &i.layers)
        .map(|l| l.blocks.iter().count() as u64)
        .sum()
}

fn finish(cluster: &mut Cluster, command: &Command) {
    use hearth_protocol::command::Outcome;
    let mut done: Vec<BlockIndex> = match &command.order {
        Order::Promote { blocks, .. } => blocks.iter().map(|p| p.block).collect(),
        Order::Demote { blocks, .. } => blocks.iter().map(|d| d.block).collect(),
        Order::Replicate { .. } | Order::Drop { .. } => Vec::new(),
    };
    done.sort();
    cluster.publish(
        &Publisher::Node(command.node.clone()),
        &Event::CommandFinished {
            command: command.id,
            node: command.node.clone(),
            outcome: Outcome::Done {
                done,
                skipped: Vec::new(),
                bytes: ByteLen(0),
                took_us: 1,
            },
        },
    );
}

fn run(nodes: u64, images_per_node: u64, per_image: u64, ticks: u64) -> (Duration, f64) {
    let mut cluster = build(nodes, images_per_node, false);
    let (mut folded, mut fold_time) = (0, Duration::ZERO);
    let (mut worst, mut commands_total, mut blocks_total) = (Duration::ZERO, 0, 0);
    let (mut tick_worst, mut last) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..ticks {
        for node in 0..nodes {
            let report = cluster.tick + 1;
            let event = window(&mut cluster, node, images_per_node, per_image, report);
            folded += records_of(&event);
            fold_time += cluster.publish(&leader(), &event);
        }
        cluster.tick += 1;
        let ticked = Event::Ticked {
            term: Term(1),
            tick: TickNo(cluster.tick),
            time: WallMs(1_000 * cluster.tick),
        };
        tick_worst = tick_worst.max(cluster.publish(&leader(), &ticked));
        let from = on_cpu();
        let commands = cluster.state.decide();
        last = on_cpu() - from;
        worst = worst.max(last);
        commands_total += commands.len();
        for command in &commands {
            blocks_total += command.order.block_count();
            cluster.publish(&leader(), &Event::CommandGiven(command.clone()));
            finish(&mut cluster, command);
        }
    }
    let from = on_cpu();
    let digest = cluster.state.digest();
    let digest_time = on_cpu() - from;
    let from = on_cpu();
    let view = scheduler_core::view(&cluster.state);
    let view_time = on_cpu() - from;
    assert_eq!(view.images.len() as u64, nodes * images_per_node);
    cluster.state.audit().unwrap();
    let per_record = fold_time.as_nanos() as f64 / folded as f64;
    println!(
        "{nodes} nodes, {} images, {} blocks tracked: fold {per_record:.0} ns a record ({folded} records), tick {tick_worst:?}, decide {worst:?} at worst, {last:?} the last, \
         {commands_total} commands of {blocks_total} blocks in {ticks} ticks, digest {digest_time:?}, view with digest {view_time:?}, state {}",
        nodes * images_per_node,
        cluster.state.tracked_blocks(),
        hearth_protocol::chain::hex(&digest),
    );
    (worst, per_record)
}

#[test]
#[ignore = "measures: run it with --release, --ignored and --nocapture"]
fn a_thousand_nodes_are_decided_within_the_tick() {
    let (decide, per_record) = run(1_000, 50, 10, 12);
    assert!(decide < Duration::from_secs(2), "decide took {decide:?}");
    assert!(per_record < 10_000.0, "a record took {per_record} ns");
}

#[test]
fn a_small_cluster_is_decided_in_no_time() {
    let (decide, _) = run(4, 10, 100, 10);
    assert!(decide < Duration::from_secs(2), "decide took {decide:?}");
}

/// A whole rack is lost: every image of which one member is left is degraded at once.
fn lose_a_rack(nodes: u64, images_per_node: u64) -> (Duration, u64) {
    let mut cluster = build(nodes, images_per_node, true);
    let lost = 10..30;
    let mut degraded = 0;
    for n in (0..nodes).filter(|n| !lost.contains(n) && lost.contains(&((n + 1) % nodes))) {
        for i in 0..images_per_node {
            let number = u128::from(n * images_per_node + i + 1);
            let record = Aggregate::new(SetVersion(1), members(n, nodes)).unwrap().record;
            let record = record.granted(LeaseId(1), &members(n, nodes)).unwrap();
            let left = record.without(&[name((n + 1) % nodes)].into()).unwrap();
            cluster.change(&name(n), number, SetVersion(2), &Arc::new(left));
            degraded += 1;
        }
    }
    // Their owners are gone: they wait in the index, and cost a look each.
    for n in lost.clone() {
        for i in 0..images_per_node {
            let number = u128::from(n * images_per_node + i + 1);
            let record = Aggregate::new(SetVersion(1), members(n, nodes)).unwrap().record;
            let record = record.granted(LeaseId(1), &members(n, nodes)).unwrap();
            let left = record.without(&[name((n + 1) % nodes)].into()).unwrap();
            cluster.change(&name(n), number, SetVersion(2), &Arc::new(left));
            degraded += 1;
        }
    }
    let (mut worst, mut ordered) = (Duration::ZERO, 0);
    for tick in 1..=40 {
        for node in (0..nodes).filter(|n| !lost.contains(n)) {
            let event = window(&mut cluster, node, 0, 0, tick);
            cluster.publish(&leader(), &event);
        }
        let ticked = Event::Ticked {
            term: Term(1),
            tick: TickNo(tick),
            time: WallMs(1_000 * tick),
        };
        cluster.publish(&leader(), &ticked);
        let from = on_cpu();
        let commands = cluster.state.decide();
        worst = worst.max(on_cpu() - from);
        for command in &commands {
            assert!(matches!(command.order, Order::Replicate { .. }));
            ordered += 1;
            cluster.publish(&leader(), &Event::CommandGiven(command.clone()));
        }
    }
    cluster.state.audit().unwrap();
    println!(
        "{nodes} nodes, {} images with two replicas, {degraded} degraded: decide {worst:?} at worst, {ordered} orders",
        nodes * images_per_node
    );
    (worst, ordered)
}

#[test]
#[ignore = "measures: run it with --release, --ignored and --nocapture"]
fn a_lost_rack_is_decided_within_the_tick() {
    let (decide, ordered) = lose_a_rack(1_000, 50);
    assert!(decide < Duration::from_secs(2), "decide took {decide:?}");
    assert!(ordered > 0);
}

#[test]
fn a_small_clusters_lost_rack_is_decided_in_no_time() {
    let (decide, ordered) = lose_a_rack(60, 5);
    assert!(decide < Duration::from_secs(2), "decide took {decide:?}");
    assert!(ordered > 0);
}
