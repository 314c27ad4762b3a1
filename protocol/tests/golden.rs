//! Golden files: what each codec version wrote must decode for ever.
//!
//! `golden/v1/<kind>.hrt` is a frame as it travels and is stored, `golden/v1/<kind>.json` what it says. The frames of
//! a released version are never written again. While version 1 is unreleased, `BLESS=1 cargo test -p hearth-protocol
//! --test golden` writes both anew; a new field needs a serde default from the release on.

use std::path::PathBuf;
use std::sync::Arc;

use hearth_protocol::aggregate::Change;
use hearth_protocol::command::{Alternative, Demotion, LostNode, Order, Outcome, Promotion, Reason, Resident};
use hearth_protocol::event::{CheckHow, CopiesChecked, HeatFolded, ImageAttached, ImageCreated, NodeJoined};
use hearth_protocol::heat::{
    BlockHeat, DiskUse, HeatOrigin, HeatReport, ImageHeat, LatencySummary, LayerHeat, Omitted, TierUse, pack,
};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::record::{Extent, Nodes, Record, Run, Stamp};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, CommandId, Envelope, Epoch, Event, HeatScore, ImageId, Incarnation, LayerId, LeaseId,
    Message, NodeId, Publisher, Seq, SetVersion, Term, TickNo, WallMs,
};

const IMAGE: ImageId = ImageId(0x1111_2222_3333_4444_5555_6666_7777_8888);
const LAYER: LayerId = LayerId(0xaaaa_bbbb_cccc_dddd_eeee_ffff_0000_1111);
const TOP: LayerId = LayerId(0xdddd_0000_0000_0000_0000_0000_0000_0001);
const COMMAND: CommandId = CommandId(0xc0c0_0000_0000_0000_0000_0000_0000_0042);

fn node() -> NodeId {
    "node-1".parse().unwrap()
}

fn nodes(names: &[&str]) -> Nodes {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn stamp(epoch: u64, set_version: u64) -> Stamp {
    Stamp {
        epoch: Epoch(epoch),
        lease: LeaseId(9),
        set_version: SetVersion(set_version),
    }
}

fn run(first: u64, members: &[&str], joiners: &[&str]) -> Run {
    Run {
        first: BlockIndex(first),
        members: nodes(members),
        joiners: nodes(joiners),
    }
}

fn latency() -> LatencySummary {
    LatencySummary {
        count: 7,
        p50_us: 120,
        p99_us: 900,
        max_us: 1_500,
    }
}

fn images() -> Vec<ImageHeat> {
    let records = [
        BlockHeat {
            block: BlockIndex(3),
            reads: 12,
            writes: 1,
            bursts: 4,
            bytes: 53_248,
        },
        BlockHeat {
            block: BlockIndex(300),
            reads: 1,
            writes: 0,
            bursts: 1,
            bytes: 4_096,
        },
    ];
    vec![ImageHeat {
        image: IMAGE,
        origin: HeatOrigin::Ebpf,
        layers: vec![LayerHeat {
            layer: LAYER,
            blocks: pack(&records),
        }],
        omitted: Omitted {
            blocks: 1,
            reads: 2,
            writes: 3,
            bytes: 20_480,
            lost: 0,
        },
        read_latency: latency(),
        write_latency: LatencySummary::default(),
        ram_hits: 10,
        ram_misses: 3,
    }]
}

fn tier() -> TierUse {
    TierUse {
        capacity: ByteLen(64 << 20),
        front: ByteLen(1 << 20),
        main: ByteLen(2 << 20),
        front_capacity: ByteLen(16 << 20),
        main_capacity: ByteLen(48 << 20),
    }
}

fn disks() -> Vec<DiskUse> {
    vec![DiskUse {
        device: "nvme0n1".into(),
        read_latency: latency(),
        write_latency: LatencySummary::default(),
    }]
}

fn command(order: Order) -> Event {
    Event::CommandGiven(Command {
        id: COMMAND,
        node: node(),
        term: Term(3),
        tick: TickNo(77),
        expires: TickNo(97),
        order,
        reason: Reason {
            rule: "tier/promote".into(),
            policy_version: 1,
            numbers: vec![("threshold_score".into(), HeatScore::whole(2).0)],
            rests_on: vec![Seq(40), Seq(41)],
            lost: vec![Alternative {
                layer: LAYER,
                block: BlockIndex(9),
                score: HeatScore::whole(1),
                why: "below_margin".into(),
            }],
            lost_nodes: Vec::new(),
        },
    })
}

fn replicate(blocks: Option<Extent>, replaces: Option<&str>) -> Event {
    let Event::CommandGiven(mut command) = command(Order::Replicate {
        layer: TOP,
        image: IMAGE,
        epoch: Epoch(2),
        set_version: SetVersion(5),
        to: "node-3".parse().unwrap(),
        blocks,
        bytes: ByteLen(1 << 30),
        replaces: replaces.map(|node| node.parse().unwrap()),
    }) else {
        unreachable!()
    };
    command.reason = Reason {
        rule: "repair/replicate".into(),
        policy_version: 1,
        numbers: vec![("members".into(), 1), ("wanted".into(), 2)],
        rests_on: vec![Seq(40)],
        lost: Vec::new(),
        lost_nodes: vec![LostNode {
            node: "node-4".parse().unwrap(),
            why: "same_fault_domain".into(),
        }],
    };
    Event::CommandGiven(command)
}

/// One event of every kind, by file name; several where an enum inside has several shapes.
fn events() -> Vec<(&'static str, Event)> {
    vec![
        (
            "image_created",
            Event::ImageCreated(ImageCreated {
                image: IMAGE,
                name: "appl/vm-1".parse().unwrap(),
                size: ByteLen(1 << 30),
                block_size: ByteLen(64 << 10),
                layers: vec![TOP, LAYER],
                parent: Some((ImageId(5), "v1".parse().unwrap())),
                node: node(),
                set_version: SetVersion(1),
                members: Nodes::new(),
            }),
        ),
        (
            "image_created_replicas",
            Event::ImageCreated(ImageCreated {
                image: IMAGE,
                name: "appl/vm-2".parse().unwrap(),
                size: ByteLen(1 << 30),
                block_size: ByteLen(64 << 10),
                layers: vec![TOP],
                parent: None,
                node: node(),
                set_version: SetVersion(1),
                members: nodes(&["node-1", "node-2"]),
            }),
        ),
        (
            "locations_changed",
            Event::LocationsChanged {
                image: IMAGE,
                change: Change {
                    by: node(),
                    from: stamp(2, 3),
                    to: Arc::new(
                        Record::new(
                            stamp(2, 4),
                            vec![
                                run(0, &["node-1", "node-2"], &[]),
                                run(128, &["node-1", "node-2"], &["node-3"]),
                            ],
                        )
                        .unwrap(),
                    ),
                    stale: None,
                },
            },
        ),
        (
            "locations_changed_forced",
            Event::LocationsChanged {
                image: IMAGE,
                change: Change {
                    by: node(),
                    from: stamp(2, 4),
                    to: Arc::new(Record::new(stamp(3, 5), vec![run(0, &["node-1"], &[])]).unwrap()),
                    stale: Some(stamp(2, 3)),
                },
            },
        ),
        (
            "image_attached",
            Event::ImageAttached(ImageAttached {
                image: IMAGE,
                node: node(),
                epoch: Epoch(2),
                lease: LeaseId(9),
                set_version: SetVersion(1),
                device: true,
            }),
        ),
        (
            "image_detached",
            Event::ImageDetached {
                image: IMAGE,
                epoch: Epoch(2),
            },
        ),
        (
            "snapshot_taken",
            Event::SnapshotTaken {
                image: IMAGE,
                name: "v2".parse().unwrap(),
                sealed: LAYER,
                top: TOP,
            },
        ),
        (
            "snapshot_deleted",
            Event::SnapshotDeleted {
                image: IMAGE,
                name: "v2".parse().unwrap(),
            },
        ),
        (
            "image_resized",
            Event::ImageResized {
                image: IMAGE,
                size: ByteLen(4 << 30),
                sealed: LAYER,
                top: TOP,
            },
        ),
        (
            "replicas_set",
            Event::ReplicasSet {
                image: IMAGE,
                wanted: 3,
            },
        ),
        (
            "copies_checked",
            Event::CopiesChecked(CopiesChecked {
                image: IMAGE,
                how: CheckHow::Repair,
                first: BlockIndex(16),
                blocks: 240,
                differing: 3,
                repaired: 2,
                copies: [("node-2".parse().unwrap(), 3), ("node-3".parse().unwrap(), 1)].into(),
                named: vec![BlockIndex(20), BlockIndex(21), BlockIndex(77)],
            }),
        ),
        (
            "image_exported",
            Event::ImageExported {
                image: IMAGE,
                snapshot: Some("v1".parse().unwrap()),
                path: "/srv/backup/vm-1.qcow2".into(),
                format: "qcow2".into(),
                allocated: ByteLen(1 << 30),
            },
        ),
        ("image_deleted", Event::ImageDeleted { image: IMAGE }),
        (
            "layer_sealed",
            Event::LayerSealed {
                layer: LAYER,
                node: node(),
                allocated: ByteLen(1 << 20),
            },
        ),
        (
            "layer_dropped",
            Event::LayerDropped {
                layer: LAYER,
                node: node(),
            },
        ),
        (
            "node_joined",
            Event::NodeJoined(NodeJoined {
                node: node(),
                incarnation: Incarnation(1),
                storage_incarnation: Incarnation(2),
                previous: Some((Incarnation(3), 44)),
                ram: ByteLen(64 << 20),
                main: ByteLen(48 << 20),
                fault_domain: "rack-1".into(),
                peer_address: "tcp:127.0.0.1:10809".into(),
                layers: vec![LAYER],
                heat_source: "ebpf".into(),
            }),
        ),
        ("node_left", Event::NodeLeft { node: node() }),
        (
            "command_finished_done",
            Event::CommandFinished {
                command: COMMAND,
                node: node(),
                outcome: Outcome::Done {
                    done: vec![BlockIndex(3), BlockIndex(300)],
                    skipped: vec![(BlockIndex(9), "written_during_fill".into())],
                    bytes: ByteLen(128 << 10),
                    took_us: 1_234,
                },
            },
        ),
        (
            "command_finished_refused",
            Event::CommandFinished {
                command: COMMAND,
                node: node(),
                outcome: Outcome::Refused {
                    why: "the layer is under another epoch".into(),
                },
            },
        ),
        (
            "term_started",
            Event::TermStarted {
                term: Term(3),
                previous: Some((Incarnation(8), Seq(39))),
            },
        ),
        (
            "ticked",
            Event::Ticked {
                term: Term(3),
                tick: TickNo(77),
                time: WallMs(1_700_000_000_123),
            },
        ),
        (
            "heat_folded",
            Event::HeatFolded(HeatFolded {
                term: Term(3),
                node: node(),
                incarnation: Incarnation(1),
                reports: (5, 6),
                gap: 1,
                time: WallMs(1_700_000_000_100),
                images: images(),
                tier: tier(),
                disks: disks(),
                probe_events_total: 1_000,
                probe_lost_total: 0,
                dropped: vec![(LAYER, vec![BlockIndex(4)])],
            }),
        ),
        (
            "policy_set",
            Event::PolicySet {
                term: Term(3),
                version: 1,
                policy: TierPolicy::default(),
                reason: "larger nodes".into(),
            },
        ),
        (
            "node_drain_set",
            Event::NodeDrainSet {
                term: Term(3),
                node: node(),
                draining: true,
                reason: "a new disk".into(),
            },
        ),
        (
            "fault_domain_set",
            Event::FaultDomainSet {
                term: Term(3),
                node: node(),
                fault_domain: "rack-2".into(),
                reason: "moved".into(),
            },
        ),
        (
            "digest_recorded",
            Event::DigestRecorded {
                term: Term(3),
                at: Seq(41),
                state: [0x5a; 32],
                decisions: [0xa5; 32],
                chain: None,
            },
        ),
        (
            "digest_recorded_chain",
            Event::DigestRecorded {
                term: Term(3),
                at: Seq(41),
                state: [0x5a; 32],
                decisions: [0xa5; 32],
                chain: Some([0xc3; 32]),
            },
        ),
        (
            "log_recovered",
            Event::LogRecovered {
                term: Term(3),
                positions: (Seq(40), Seq(44)),
                reason: "the disk of nats-1 was restored".into(),
            },
        ),
        (
            "loss_accepted",
            Event::LossAccepted {
                term: Term(3),
                positions: (Seq(40), Seq(44)),
                chain: [0xc3; 32],
                reason: "there is no newer backup".into(),
            },
        ),
        (
            "command_given_promote",
            command(Order::Promote {
                layer: LAYER,
                epoch: Epoch(2),
                set_version: SetVersion(1),
                from: node(),
                blocks: vec![Promotion {
                    block: BlockIndex(3),
                    score: HeatScore::whole(4),
                    displaces: Some(Resident {
                        score: HeatScore::whole(1),
                        layer: TOP,
                        block: BlockIndex(8),
                    }),
                    heat_seq: Seq(41),
                }],
                bytes: ByteLen(64 << 10),
            }),
        ),
        (
            "command_given_demote",
            command(Order::Demote {
                layer: TOP,
                blocks: vec![Demotion {
                    block: BlockIndex(8),
                    score: HeatScore::whole(1),
                }],
                bytes: ByteLen(64 << 10),
            }),
        ),
        ("command_given_replicate", replicate(None, None)),
        ("command_given_replicate_move", replicate(None, Some("node-2"))),
        (
            "command_given_drop",
            command(Order::Drop {
                layer: TOP,
                image: IMAGE,
                epoch: Epoch(2),
                set_version: SetVersion(7),
                from: "node-2".parse().unwrap(),
                keep: 2,
            }),
        ),
        (
            "command_given_replicate_blocks",
            replicate(
                Some(Extent {
                    first: BlockIndex(16),
                    last: BlockIndex(31),
                }),
                None,
            ),
        ),
    ]
}

fn envelope(event: &Event) -> Envelope {
    let publisher = match event.term() {
        Some(_) => Publisher::Scheduler("sched-1".parse().unwrap()),
        None => Publisher::Node(node()),
    };
    Envelope {
        codec: 1,
        subject: format!("hearth.log.golden.{}", event.kind()),
        publisher,
        incarnation: Incarnation(1),
        publisher_seq: 12,
        time: WallMs(1_700_000_000_000),
        reason: match event {
            Event::ImageResized { .. } => "the database grows".into(),
            _ => String::new(),
        },
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

fn blessing() -> bool {
    std::env::var("BLESS").is_ok_and(|v| v == "1")
}

/// Compares a file with what it must hold, or writes it.
fn check(name: &str, expect: &[u8]) {
    let path = folder().join(name);
    if blessing() {
        std::fs::create_dir_all(folder()).unwrap();
        std::fs::write(&path, expect).unwrap();
    }
    let found = std::fs::read(&path).unwrap_or_else(|e| panic!("{name}: {e}; BLESS=1 writes golden files"));
    assert!(
        found == expect,
        "{name} is not what this build writes: a released format must not change.\nfound    {}\nexpected {}",
        String::from_utf8_lossy(&found),
        String::from_utf8_lossy(expect)
    );
}

#[test]
fn every_event_has_a_golden_file_and_still_reads_as_its_json() {
    let mut kinds = std::collections::BTreeSet::new();
    for (name, event) in events() {
        kinds.insert(event.kind());
        let message = Message::encode(&envelope(&event), &event);
        let json = serde_json::json!({ "envelope": envelope(&event), "event": event });
        let text = serde_json::to_string_pretty(&json).unwrap() + "\n";
        check(&format!("{name}.hrt"), &message.to_frame());
        check(&format!("{name}.json"), text.as_bytes());
        // What the file says, read back from its bytes alone.
        let frame = std::fs::read(folder().join(format!("{name}.hrt"))).unwrap();
        let read = Message::from_frame(&frame).unwrap();
        let read = serde_json::json!({ "envelope": read.envelope().unwrap(), "event": read.event().unwrap() });
        let written = std::fs::read_to_string(folder().join(format!("{name}.json"))).unwrap();
        assert_eq!(
            read,
            serde_json::from_str::<serde_json::Value>(&written).unwrap(),
            "{name}"
        );
    }
    // Every variant of `Event`: adding one without a golden file fails here.
    assert_eq!(kinds.len(), 26);
}

#[test]
fn a_heat_report_has_a_golden_file() {
    let report = HeatReport {
        node: node(),
        incarnation: Incarnation(1),
        report_seq: 5,
        time: WallMs(1_700_000_000_100),
        window_ms: 1_000,
        images: images(),
        tier: tier(),
        disks: disks(),
        probe_events_total: 1_000,
        probe_lost_total: 0,
        dropped: vec![(LAYER, vec![BlockIndex(4)])],
    };
    check("heat_report.mp", &report.encode());
    let bytes = std::fs::read(folder().join("heat_report.mp")).unwrap();
    assert_eq!(HeatReport::decode(&bytes).unwrap(), report);
}

#[test]
fn unknown_fields_of_a_newer_minor_format_are_ignored() {
    // A payload with one more field, as a later build may write under the same codec version.
    let event = Event::NodeLeft { node: node() };
    let json = serde_json::json!({ "NodeLeft": { "node": "node-1", "drained": true } });
    let payload = rmp_serde::to_vec_named(&json).unwrap();
    let message = Message {
        envelope: Message::encode(&envelope(&event), &event).envelope,
        payload,
    };
    assert_eq!(message.event().unwrap(), event);
}
