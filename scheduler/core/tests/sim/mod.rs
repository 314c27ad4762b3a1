//! A cluster in a test: a log in memory, one scheduler, and fake nodes that obey.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hearth_protocol::aggregate::{Aggregate, Change};
use hearth_protocol::command::{Order, Outcome};
use hearth_protocol::event::{HeatFolded, ImageAttached, ImageCreated, NodeJoined};
use hearth_protocol::heat::{BlockHeat, HeatOrigin, ImageHeat, LatencySummary, LayerHeat, Omitted, TierUse, pack};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::record::{Extent, Record};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, Envelope, Epoch, Event, ImageId, Incarnation, LayerId, LeaseId, Message, NodeId,
    Publisher, SchedulerId, Seq, SetVersion, Term, TickNo, WallMs, subject,
};
use scheduler_core::{Applied, Judged, State};

pub const BLOCK: u64 = 64 << 10;
/// All blocks of any image.
pub const WHOLE: Extent = Extent {
    first: BlockIndex(0),
    last: BlockIndex(u64::MAX),
};
pub const LEADER: &str = "sched-1";

pub fn node_id(name: &str) -> NodeId {
    name.parse().expect("a node id")
}

/// Reads of one block, spread over `bursts` tenths of a second.
pub fn reads(block: u64, bursts: u32) -> BlockHeat {
    BlockHeat {
        block: BlockIndex(block),
        reads: bursts,
        writes: 0,
        bursts,
        bytes: u64::from(bursts) * 4096,
    }
}

pub fn writes(block: u64, bursts: u32) -> BlockHeat {
    BlockHeat {
        reads: 0,
        writes: bursts,
        ..reads(block, bursts)
    }
}

/// A node that does what it is told, at once or when asked to.
#[derive(Debug, Clone, Default)]
pub struct FakeNode {
    pub incarnation: u128,
    pub report_seq: u64,
    /// Its main region.
    pub ram: BTreeSet<(LayerId, BlockIndex)>,
    pub promoted_bytes: Vec<u64>,
}

/// See the module.
pub struct Sim {
    pub log: Vec<(Seq, Message)>,
    /// The last log position.
    pub seq: Seq,
    /// Off for a simulated day.
    pub keeps_log: bool,
    pub state: State,
    pub applied: Vec<Applied>,
    pub nodes: BTreeMap<NodeId, FakeNode>,
    records: BTreeMap<ImageId, Aggregate>,
    numbers: BTreeMap<(Publisher, Incarnation), u64>,
    pub term: Term,
    pub tick: TickNo,
    pub time: WallMs,
    /// Commands of the last tick.
    pub commands: Vec<Command>,
    /// Nodes in here hear nothing.
    pub deaf: BTreeSet<NodeId>,
}

impl Default for Sim {
    fn default() -> Self {
        let mut sim = Self {
            log: Vec::new(),
            seq: Seq(0),
            keeps_log: true,
            state: State::default(),
            applied: Vec::new(),
            nodes: BTreeMap::new(),
            records: BTreeMap::new(),
            numbers: BTreeMap::new(),
            term: Term(1),
            tick: TickNo(0),
            time: WallMs(1_000_000),
            commands: Vec::new(),
            deaf: BTreeSet::new(),
        };
        sim.lead(Event::TermStarted {
            term: Term(1),
            previous: None,
        });
        sim
    }
}

impl Sim {
    /// Nodes in their fault domains.
    pub fn cluster(nodes: &[(&str, &str)]) -> Self {
        let mut sim = Self::default();
        for (node, rack) in nodes {
            sim.join_in(rack, node, 8);
        }
        sim
    }

    /// Seconds in which the named nodes report and obey; what was ordered.
    pub fn seconds(&mut self, count: u64, here: &[&str]) -> Vec<Command> {
        let mut all = Vec::new();
        for _ in 0..count {
            here.iter().for_each(|node| self.alive(node));
            all.extend(self.second());
        }
        self.state.audit().unwrap();
        all
    }

    /// Publishes and folds an event.
    pub fn publish(&mut self, publisher: Publisher, incarnation: Incarnation, event: &Event) -> Applied {
        let number = self.numbers.entry((publisher.clone(), incarnation)).or_default();
        *number += 1;
        let envelope = Envelope {
            codec: 1,
            subject: match event {
                Event::CommandGiven(command) => subject::command(&command.node),
                _ => "hearth.log.test".into(),
            },
            publisher,
            incarnation,
            publisher_seq: *number,
            time: self.time,
            reason: String::new(),
        };
        self.append(&envelope, event)
    }

    pub fn append(&mut self, envelope: &Envelope, event: &Event) -> Applied {
        self.seq = self.seq.next();
        let seq = self.seq;
        if self.keeps_log {
            self.log.push((seq, Message::encode(envelope, event)));
        }
        let applied = self.state.apply(seq, envelope, event);
        if applied.judged == Judged::Valid {
            self.keep_record(event);
        }
        self.applied.push(applied);
        applied
    }

    fn keep_record(&mut self, event: &Event) {
        match event {
            Event::ImageCreated(created) => {
                if let Ok(new) = Aggregate::new(created.set_version, created.members.clone()) {
                    self.records.insert(created.image, new);
                }
            }
            Event::LocationsChanged { image, change } => {
                let known = self
                    .records
                    .get_mut(image)
                    .expect("a valid change is of a known record");
                known.judge(change).expect("a valid change");
            }
            Event::ImageDeleted { image } => drop(self.records.remove(image)),
            _ => {}
        }
    }

    /// The leader uses up a number that never arrives.
    pub fn burn(&mut self) {
        let leader = Publisher::Scheduler(LEADER.parse().expect("a scheduler id"));
        *self.numbers.entry((leader, Incarnation(1))).or_default() += 1;
    }

    pub fn lead(&mut self, event: Event) -> Applied {
        let id: SchedulerId = LEADER.parse().expect("a scheduler id");
        self.publish(Publisher::Scheduler(id), Incarnation(1), &event)
    }

    pub fn node(&mut self, node: &str, event: Event) -> Applied {
        let id = node_id(node);
        let incarnation = Incarnation(self.nodes[&id].incarnation);
        self.publish(Publisher::Node(id), incarnation, &event)
    }

    /// A node starts, with room for `main_blocks` blocks of 64 KiB in its main region.
    pub fn join(&mut self, node: &str, main_blocks: u64) {
        self.join_in("rack-1", node, main_blocks);
    }

    /// See [`Sim::join`]; in a fault domain.
    pub fn join_in(&mut self, fault_domain: &str, node: &str, main_blocks: u64) {
        let id = node_id(node);
        let known = self.nodes.entry(id.clone()).or_default();
        known.incarnation += 1;
        known.report_seq = 0;
        known.ram.clear();
        let incarnation = Incarnation(known.incarnation);
        self.node(
            node,
            Event::NodeJoined(NodeJoined {
                node: id,
                incarnation,
                storage_incarnation: Incarnation(7),
                previous: None,
                ram: ByteLen(main_blocks * BLOCK * 5 / 4),
                main: ByteLen(main_blocks * BLOCK),
                fault_domain: fault_domain.into(),
                peer_address: "tcp:127.0.0.1:10809".into(),
                layers: Vec::new(),
                heat_source: "export".into(),
            }),
        );
    }

    /// An attached image of one layer, `appl/<name>`.
    pub fn image(&mut self, node: &str, number: u128, blocks: u64) {
        self.created(node, number, blocks, vec![LayerId(number)]);
        self.attach(node, number, 1);
    }

    pub fn created(&mut self, node: &str, number: u128, blocks: u64, layers: Vec<LayerId>) {
        self.node(
            node,
            Event::ImageCreated(ImageCreated {
                image: ImageId(number),
                name: format!("appl/vm-{number}").parse().expect("an image name"),
                size: ByteLen(blocks * BLOCK),
                block_size: ByteLen(BLOCK),
                layers,
                parent: None,
                node: node_id(node),
                set_version: SetVersion(1),
                members: Default::default(),
            }),
        );
    }

    pub fn attach(&mut self, node: &str, number: u128, epoch: u64) {
        self.node(
            node,
            Event::ImageAttached(ImageAttached {
                image: ImageId(number),
                node: node_id(node),
                epoch: Epoch(epoch),
                lease: LeaseId(u128::from(epoch)),
                set_version: SetVersion(1),
                device: false,
            }),
        );
    }

    /// An image with replicas, attached by the first of the nodes.
    pub fn replicated(&mut self, nodes: &[&str], number: u128, blocks: u64) {
        self.created_on(nodes[0], nodes, number, blocks);
        self.take(nodes[0], nodes, number);
    }

    pub fn created_on(&mut self, node: &str, members: &[&str], number: u128, blocks: u64) -> Applied {
        self.node(
            node,
            Event::ImageCreated(ImageCreated {
                image: ImageId(number),
                name: format!("appl/vm-{number}").parse().expect("an image name"),
                size: ByteLen(blocks * BLOCK),
                block_size: ByteLen(BLOCK),
                layers: vec![LayerId(number)],
                parent: None,
                node: node_id(node),
                set_version: SetVersion(1),
                members: members.iter().map(|node| node_id(node)).collect(),
            }),
        )
    }

    /// A node becomes the owner of an image, with some of its members.
    pub fn take(&mut self, node: &str, members: &[&str], number: u128) -> Applied {
        let members = members.iter().map(|node| node_id(node)).collect();
        self.change(node, number, |record| {
            let lease = LeaseId(u128::from(record.epoch().0) + 1);
            record.granted(lease, &members).expect("a member stays")
        })
    }

    /// A node leaves an image's set, as its owner says.
    pub fn loses(&mut self, owner: &str, number: u128, node: &str) -> Applied {
        let gone = [node_id(node)].into();
        self.change(owner, number, |record| record.without(&gone).expect("a member stays"))
    }

    /// A joiner is in sync.
    pub fn synced(&mut self, owner: &str, number: u128, node: &str) -> Applied {
        let node = node_id(node);
        self.change(owner, number, |record| {
            record.with_member(&node, WHOLE).expect("one more member")
        })
    }

    /// An operator has a node drained, or no longer.
    pub fn drain(&mut self, node: &str, draining: bool) -> Applied {
        self.lead(Event::NodeDrainSet {
            term: self.term,
            node: node_id(node),
            draining,
            reason: String::new(),
        })
    }

    /// An operator says in which fault domain a node is.
    pub fn domain(&mut self, node: &str, fault_domain: &str) -> Applied {
        self.lead(Event::FaultDomainSet {
            term: self.term,
            node: node_id(node),
            fault_domain: fault_domain.into(),
            reason: String::new(),
        })
    }

    /// A node that holds an image says how many replicas it is to have.
    pub fn wanted(&mut self, node: &str, number: u128, wanted: u64) -> Applied {
        let image = ImageId(number);
        self.node(node, Event::ReplicasSet { image, wanted })
    }

    /// An image's record as the log has it.
    pub fn record(&self, number: u128) -> Option<Arc<Record>> {
        self.records.get(&ImageId(number)).map(|known| known.record.clone())
    }

    /// A node publishes a change of an image's record.
    pub fn change(&mut self, by: &str, number: u128, change: impl FnOnce(&Record) -> Record) -> Applied {
        let record = self.record(number).expect("an image with replicas");
        self.node(
            by,
            Event::LocationsChanged {
                image: ImageId(number),
                change: Change {
                    by: node_id(by),
                    from: record.stamp(),
                    to: Arc::new(change(&record)),
                    stale: None,
                },
            },
        )
    }

    /// Folds one window of one image and layer.
    pub fn heat(&mut self, node: &str, image: u128, layer: u128, records: &[BlockHeat]) -> Applied {
        self.heat_with(node, image, layer, records, |_| {})
    }

    pub fn heat_with(
        &mut self,
        node: &str,
        image: u128,
        layer: u128,
        records: &[BlockHeat],
        change: impl FnOnce(&mut HeatFolded),
    ) -> Applied {
        let known = self.nodes.get_mut(&node_id(node)).expect("a node that joined");
        known.report_seq += 1;
        let mut heat = HeatFolded {
            term: self.term,
            node: node_id(node),
            incarnation: Incarnation(known.incarnation),
            reports: (known.report_seq, known.report_seq),
            gap: 0,
            time: self.time,
            images: vec![ImageHeat {
                image: ImageId(image),
                origin: HeatOrigin::Export,
                layers: vec![LayerHeat {
                    layer: LayerId(layer),
                    blocks: pack(records),
                }],
                omitted: Omitted::default(),
                read_latency: LatencySummary::default(),
                write_latency: LatencySummary::default(),
                ram_hits: 0,
                ram_misses: 0,
            }],
            tier: TierUse::default(),
            disks: Vec::new(),
            probe_events_total: 0,
            probe_lost_total: 0,
            dropped: Vec::new(),
        };
        change(&mut heat);
        self.lead(Event::HeatFolded(heat))
    }

    /// A report without heat: the node lives.
    pub fn alive(&mut self, node: &str) {
        self.heat_with(node, 0, 0, &[], |h| h.images.clear());
    }

    pub fn policy(&mut self, change: impl FnOnce(&mut TierPolicy)) {
        let (version, policy) = self.state.policy();
        let (version, mut policy) = (version + 1, policy.clone());
        change(&mut policy);
        self.lead(Event::PolicySet {
            term: self.term,
            version,
            policy,
            reason: "test".into(),
        });
    }

    /// One second: tick, decide, give the commands; the nodes that hear obey.
    pub fn second(&mut self) -> Vec<Command> {
        let commands = self.tick_only(1_000);
        for command in &commands {
            self.lead(Event::CommandGiven(command.clone()));
        }
        for command in &commands {
            if !self.deaf.contains(&command.node) {
                self.obey(command);
            }
        }
        commands
    }

    /// A tick and its decisions, not given.
    pub fn tick_only(&mut self, after_ms: u64) -> Vec<Command> {
        self.tick = self.tick.next();
        self.time = WallMs(self.time.0 + after_ms);
        let applied = self.lead(Event::Ticked {
            term: self.term,
            tick: self.tick,
            time: self.time,
        });
        assert!(applied.decide);
        self.commands = self.state.decide();
        assert_eq!(self.commands, self.state.decide(), "deciding changes nothing");
        self.commands.clone()
    }

    /// The node executes a command and says so.
    pub fn obey(&mut self, command: &Command) {
        let node = self.nodes.get_mut(&command.node).expect("a node that joined");
        let (done, bytes) = match &command.order {
            Order::Promote {
                layer, blocks, bytes, ..
            } => {
                node.promoted_bytes.push(bytes.0);
                for block in blocks {
                    assert!(node.ram.insert((*layer, block.block)), "promoted twice: {block:?}");
                }
                (blocks.iter().map(|b| b.block).collect::<Vec<_>>(), *bytes)
            }
            Order::Demote { layer, blocks, bytes } => {
                for block in blocks {
                    assert!(
                        node.ram.remove(&(*layer, block.block)),
                        "demoted what was not there: {block:?}"
                    );
                }
                (blocks.iter().map(|b| b.block).collect(), *bytes)
            }
            Order::Replicate { image, to, blocks, .. } => {
                // The owner has begun: the joiner stands in the record before the answer.
                let (image, to, blocks) = (*image, to.clone(), blocks.unwrap_or(WHOLE));
                self.change(&command.node.to_string(), image.0, |record| {
                    record.with_joiner(&to, blocks).expect("one more joiner")
                });
                (Vec::new(), ByteLen(0))
            }
            Order::Drop { image, from, .. } => {
                // The smaller set is in the log before the answer.
                let gone = [from.clone()].into();
                self.change(&command.node.to_string(), image.0, |record| {
                    record.without(&gone).expect("a member stays")
                });
                (Vec::new(), ByteLen(0))
            }
        };
        self.done(command, done, bytes);
    }

    fn done(&mut self, command: &Command, mut done: Vec<BlockIndex>, bytes: ByteLen) {
        done.sort();
        let name = command.node.to_string();
        self.node(
            &name,
            Event::CommandFinished {
                command: command.id,
                node: command.node.clone(),
                outcome: Outcome::Done {
                    done,
                    skipped: Vec::new(),
                    bytes,
                    took_us: 100,
                },
            },
        );
    }

    /// Blocks of a layer in a node's main region, ascending.
    pub fn ram(&self, node: &str, layer: u128) -> Vec<u64> {
        let in_layer = |(l, _): &&(LayerId, BlockIndex)| *l == LayerId(layer);
        self.nodes[&node_id(node)]
            .ram
            .iter()
            .filter(in_layer)
            .map(|(_, b)| b.0)
            .collect()
    }
}
