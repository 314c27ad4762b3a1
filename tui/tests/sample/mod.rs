//! A made-up cluster that warms up, for tests and the example: the same views for the same second, always.

use hearth_protocol::command::{Alternative, Demotion, Outcome, Promotion, Resident};
use hearth_protocol::heat::{HeatOrigin, LatencySummary, TierUse};
use hearth_protocol::policy::TierPolicy;
use hearth_protocol::view::{
    ClusterView, DecisionView, HealthItem, HeatCell, ImageHeatView, ImageView, NodeView, Totals,
};
use hearth_protocol::{
    BlockIndex, ByteLen, Command, CommandId, Epoch, HeatScore, ImageId, LayerId, Order, Reason, Seq, SetVersion, Term,
    TickNo, WallMs,
};

const START_MS: u64 = 1_763_660_000_000;
const MIB: u64 = 1 << 20;

fn mix(mut x: u64) -> u64 {
    // splitmix64, see <https://prng.di.unimi.it/splitmix64.c>
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// How warm the cluster is after `s` seconds, parts per thousand.
fn warmth(s: u64) -> u64 {
    1000 - 1000 * 20 / (20 + s)
}

fn latency(count: u64, p50_us: u64, p99_us: u64) -> LatencySummary {
    LatencySummary {
        count,
        p50_us,
        p99_us,
        max_us: p99_us * 3,
    }
}

const IMAGES: [(&str, &str, u64, bool); 5] = [
    ("appl/vm-1", "node-1", 1_900, true),
    ("appl/vm-2", "node-2", 940, true),
    ("appl/vm-3", "node-3", 12_400, true),
    ("db/orders", "node-1", 430, true),
    ("masters/debian-12", "node-2", 0, false),
];

fn image(n: usize, s: u64) -> ImageView {
    let (name, node, reads, attached) = IMAGES[n];
    let wobble = mix(s * 31 + n as u64) % 100;
    let hit = (warmth(s) * (95 - 7 * n as u64) / 100).saturating_sub(wobble / 2);
    let reads = reads * (900 + wobble * 2) / 1000;
    ImageView {
        id: ImageId(0xa000 + n as u128),
        name: name.parse().unwrap(),
        size: ByteLen(2048 * MIB),
        block_size: ByteLen(65_536),
        node: node.parse().unwrap(),
        attached,
        epoch: Epoch(u64::from(attached)),
        parent: (n < 3).then(|| ("masters/debian-12".parse().unwrap(), "v1".parse().unwrap())),
        snapshots: if n == 4 { vec!["v1".parse().unwrap()] } else { vec![] },
        origin: attached.then_some(HeatOrigin::Ebpf),
        reads_per_s: reads,
        writes_per_s: reads / 9,
        hit_permille: (reads > 0).then_some(hit),
        read_latency: latency(reads, 60 + (1000 - hit) / 3, 400 + (1000 - hit) * 14 + wobble * 9),
        write_latency: latency(reads / 9, 210, 1_900),
        tracked_blocks: s.min(40) * 90 + 100 * n as u64,
        resident_blocks: if attached { warmth(s) * 700 / 1000 } else { 0 },
        replicas: Default::default(),
    }
}

fn node(n: u64, s: u64, absent: bool) -> NodeView {
    let capacity = 128 * MIB;
    NodeView {
        id: format!("node-{}", n + 1).parse().unwrap(),
        present: !absent,
        last_report: TickNo(if absent { s.saturating_sub(9) } else { s }),
        fault_domain: format!("rack-{}", n % 2 + 1),
        tier: TierUse {
            capacity: ByteLen(capacity),
            front: ByteLen(32 * MIB * warmth(s * 3) / 1000),
            main: ByteLen(96 * MIB * warmth(s) / 1000 * (9 - 2 * n) / 9),
            front_capacity: ByteLen(32 * MIB),
            main_capacity: ByteLen(96 * MIB),
        },
        heat_source: "ebpf".into(),
        probe_events_total: 15_230 * s * (n + 1),
        probe_lost_total: 0,
        in_flight: ByteLen(if s % 3 == n { 4 * MIB } else { 0 }),
        images: if n == 0 { 2 } else { 1 },
        disk_read: latency(900, 180, 2_400 + 300 * n),
        held: ByteLen(40 << 30),
        drain: None,
    }
}

fn decision(tick: u64, s: u64) -> DecisionView {
    let n = (tick % 3) as usize;
    let blocks = 1 + mix(tick) % 24;
    let promote = tick % 4 != 3;
    let layer = LayerId(0xb000 + n as u128);
    let block = |i: u64| BlockIndex(mix(tick) % 20_000 + i);
    let order = if promote {
        Order::Promote {
            layer,
            epoch: Epoch(1),
            set_version: SetVersion(1),
            from: IMAGES[n].1.parse().unwrap(),
            blocks: (0..blocks)
                .map(|i| Promotion {
                    block: block(i),
                    score: HeatScore((9 << 16) - i * 9_000),
                    displaces: (tick > 12).then_some(Resident {
                        score: HeatScore(52_000),
                        layer,
                        block: BlockIndex(7),
                    }),
                    heat_seq: Seq(tick * 4),
                })
                .collect(),
            bytes: ByteLen(blocks * 65_536),
        }
    } else {
        Order::Demote {
            layer,
            blocks: (0..blocks)
                .map(|i| Demotion {
                    block: block(i),
                    score: HeatScore(9_000 + i * 100),
                })
                .collect(),
            bytes: ByteLen(blocks * 65_536),
        }
    };
    let done: Vec<_> = (0..blocks).map(block).collect();
    let ended = (tick < s).then(|| {
        let outcome = if tick % 11 == 5 {
            Outcome::Refused {
                why: "layer is at epoch 2".into(),
            }
        } else if tick % 5 == 1 && blocks > 1 {
            Outcome::Done {
                skipped: vec![(done[0], "written_during_fill".into())],
                done: done[1..].to_vec(),
                bytes: ByteLen((blocks - 1) * 65_536),
                took_us: 11_000 + blocks * 420,
            }
        } else {
            Outcome::Done {
                done,
                skipped: vec![],
                bytes: ByteLen(blocks * 65_536),
                took_us: 9_000 + blocks * 400,
            }
        };
        (Seq(tick * 6 + 5), outcome)
    });
    DecisionView::new(
        Seq(tick * 6 + 3),
        WallMs(START_MS + tick * 1000),
        Command {
            id: CommandId(u128::from(mix(tick)) << 64 | u128::from(mix(tick + 1))),
            node: IMAGES[n].1.parse().unwrap(),
            term: Term(3),
            tick: TickNo(tick),
            expires: TickNo(tick + 10),
            order,
            reason: Reason {
                rule: if promote { "tier/promote" } else { "tier/demote" }.into(),
                policy_version: 2,
                numbers: if promote {
                    vec![
                        ("threshold_score".into(), 2 << 16),
                        ("margin_percent".into(), 150),
                        ("budget_bytes".into(), 64 * MIB),
                    ]
                } else {
                    vec![("demote_below_score".into(), 16_384)]
                },
                rests_on: (tick.saturating_sub(3)..tick).map(|t| Seq(t * 6 + 1)).collect(),
                lost: vec![Alternative {
                    layer,
                    block: BlockIndex(31_000),
                    score: HeatScore(120_000),
                    why: "below_margin".into(),
                }],
                lost_nodes: vec![],
            },
        },
        vec![IMAGES[n].0.parse().unwrap()],
        ended,
        false,
    )
}

/// The cluster after `s` seconds; node-3 is away from second 90 to 110.
pub fn view(s: u64) -> ClusterView {
    let away = (90..110).contains(&s);
    let mut health = Vec::new();
    if away {
        health.push(HealthItem {
            code: "NODE_ABSENT".into(),
            severity: "error".into(),
            message: "node-3 has not reported for 9 ticks; its images are served by nobody else".into(),
            fix: "look at the node: systemctl status hearth-node".into(),
        });
        health.push(HealthItem {
            code: "COMMAND_EXPIRED".into(),
            severity: "warning".into(),
            message: "2 commands to node-3 expired without an answer".into(),
            fix: "hearth log list --kind command_given --node node-3".into(),
        });
    }
    ClusterView {
        moves: Vec::new(),
        seq: Seq(s * 6 + 4),
        time: WallMs(START_MS + s * 1000),
        term: Term(3),
        leader: Some("sched-1".parse().unwrap()),
        tick: TickNo(s),
        digest: format!("{:016x}{:016x}", mix(s), mix(s + 7)),
        nodes: (0..3).map(|n| node(n, s, n == 2 && away)).collect(),
        images: (0..IMAGES.len()).map(|n| image(n, s)).collect(),
        decisions: (s.saturating_sub(60).max(2)..=s.max(2))
            .map(|tick| decision(tick, s))
            .collect(),
        health,
        policy: (2, TierPolicy::default()),
        totals: Totals {
            events: s * 6 + 4,
            void: 1,
            blocks_promoted: s * 11,
            blocks_demoted: s * 4,
            blocks_skipped: s / 5,
            report_gaps: 0,
            repeats: 0,
        },
    }
}

/// The heat of the n-th image after `s` seconds: a boot area, a hot table, a scan that passes, and single hot blocks.
pub fn heat(n: usize, s: u64) -> ImageHeatView {
    let blocks = 32_768u64;
    let scan = s * 400 % blocks;
    let mut cells = Vec::new();
    for b in 0..blocks {
        let noise = mix(b * 7 + n as u64);
        let mut score = 0;
        if b < 1_500 && noise.is_multiple_of(3) {
            score += 40_000 + noise % 200_000;
        }
        let from_table = b.abs_diff(11_000 + n as u64 * 900);
        if from_table < 900 {
            score += (900 - from_table) * 900 + noise % 60_000;
        }
        let from_tail = b.abs_diff(25_500);
        if from_tail < 2_500 && noise.is_multiple_of(7) {
            score += (2_500 - from_tail) * 60;
        }
        if b >= scan.saturating_sub(1_200) && b < scan {
            score += 12_000;
        }
        if noise.is_multiple_of(701) {
            score += 600_000;
        }
        if score > 0 {
            cells.push(HeatCell {
                block: BlockIndex(b),
                score: HeatScore(score),
                ram: score > 1_300_000 - warmth(s) * 1_100 && !noise.is_multiple_of(16),
            });
        }
    }
    ImageHeatView {
        image: ImageId(0xa000 + n as u128),
        blocks,
        block_size: ByteLen(65_536),
        cells,
        omitted: 0,
    }
}
