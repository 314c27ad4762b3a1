//! The tier policy over fake nodes that obey.

mod sim;

use hearth_protocol::command::{Order, Outcome};
use hearth_protocol::event::HeatFolded;
use hearth_protocol::heat::{BlockHeat, PackedHeat, TierUse};
use hearth_protocol::{BlockIndex, ByteLen, Command, Event, ImageId, LayerId, NodeId, SnapshotName};
use scheduler_core::policy::tier::COMMANDS_PER_TICK_MAX;
use scheduler_core::{COMMAND_TICKS, REST_TICKS, State};
use sim::{BLOCK, Sim, node_id, reads, writes};

fn small(main_blocks: u64) -> Sim {
    let mut sim = Sim::default();
    sim.join("n1", main_blocks);
    sim.image("n1", 1, 1_000);
    sim
}

fn verbs(commands: &[Command]) -> Vec<&'static str> {
    commands.iter().map(|c| c.order.verb()).collect()
}

fn finish(sim: &mut Sim, command: &Command, outcome: Outcome) {
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

#[test]
fn a_block_over_the_threshold_is_in_ram_after_the_next_tick() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 1), reads(7, 2), reads(9, 5)]);
    sim.second();
    assert_eq!(sim.ram("n1", 1), [7, 9]);
    sim.heat("n1", 1, 1, &[reads(3, 2)]);
    sim.second();
    assert_eq!(sim.ram("n1", 1), [3, 7, 9]);
    sim.state.audit().unwrap();
}

#[test]
fn writes_earn_nothing_and_mixed_windows_their_share() {
    let mut sim = small(4);
    let mixed = BlockHeat {
        writes: 9,
        ..reads(5, 1)
    };
    sim.heat(
        "n1",
        1,
        1,
        &[writes(3, 10), BlockHeat { bursts: 10, ..mixed }, reads(9, 5)],
    );
    sim.second();
    assert_eq!(sim.ram("n1", 1), [9]);
    let (_, score) = sim.state.block(&node_id("n1"), LayerId(1), BlockIndex(5));
    assert_eq!(score.bursts_text(), "1.00");
}

#[test]
fn hotter_blocks_displace_the_coldest_and_demotions_go_first() {
    let mut sim = small(2);
    sim.heat("n1", 1, 1, &[reads(1, 4), reads(2, 6)]);
    sim.second();
    sim.heat("n1", 1, 1, &[reads(3, 7), reads(4, 8)]);
    let commands = sim.second();
    // 8 against 4 pays; 7 against 6 does not, at a margin of 150 %.
    assert_eq!(verbs(&commands), ["demote", "promote"]);
    assert_eq!(sim.ram("n1", 1), [2, 4]);
    let Order::Promote { blocks, .. } = &commands[1].order else {
        unreachable!()
    };
    assert_eq!(blocks[0].displaces.unwrap().block, BlockIndex(1));
    assert_eq!(commands[1].reason.lost[0].block, BlockIndex(3));
    assert_eq!(commands[1].reason.lost[0].why, "below_margin");
    sim.state.audit().unwrap();
}

#[test]
fn blocks_of_equal_heat_never_change_places() {
    let mut sim = small(4);
    let mut moves = 0;
    for second in 0..600 {
        let first = if second % 2 == 0 { 0 } else { 8 };
        let records: Vec<_> = (first..first + 8).map(|b| reads(b, 5)).collect();
        sim.heat("n1", 1, 1, &records);
        let commands = sim.second();
        if second > 3 {
            moves += commands.len();
        }
    }
    assert_eq!(moves, 0);
    assert_eq!(sim.ram("n1", 1).len(), 4);
}

#[test]
fn a_residents_place_is_lost_only_to_the_margin() {
    let mut sim = small(1);
    sim.policy(|p| p.margin_percent = 200);
    sim.heat("n1", 1, 1, &[reads(1, 5)]);
    sim.second();
    for _ in 0..2 {
        sim.heat("n1", 1, 1, &[reads(2, 4)]);
        sim.second();
        assert_eq!(sim.ram("n1", 1), [1]);
    }
    sim.heat("n1", 1, 1, &[reads(2, 3)]);
    sim.second();
    assert_eq!(sim.ram("n1", 1), [2]);
}

#[test]
fn no_more_than_the_budget_is_ordered() {
    let mut sim = small(1_000);
    sim.policy(|p| {
        p.promote_bytes_per_s_max = 10 * BLOCK + 1;
        p.in_flight_bytes_max = 25 * BLOCK;
    });
    sim.deaf.insert(node_id("n1"));
    let records: Vec<_> = (0..100).map(|b| reads(b, 5)).collect();
    let mut counts = Vec::new();
    for _ in 0..5 {
        sim.heat("n1", 1, 1, &records);
        counts.push(sim.second().iter().map(|c| c.order.block_count()).sum::<usize>());
    }
    assert_eq!(counts, [10, 10, 5, 0, 0]);
    assert_eq!(sim.state.main_bytes(&node_id("n1")), (ByteLen(0), ByteLen(25 * BLOCK)));
    // Two ticks within a second share a second's bytes.
    let mut sim = small(1_000);
    sim.policy(|p| p.promote_bytes_per_s_max = 10 * BLOCK);
    sim.heat("n1", 1, 1, &records);
    sim.tick_only(1_000);
    sim.heat("n1", 1, 1, &records);
    let commands = sim.tick_only(500);
    assert_eq!(commands.iter().map(|c| c.order.block_count()).sum::<usize>(), 5);
}

#[test]
fn heat_with_losses_makes_no_candidate() {
    let mut sim = small(4);
    let lossy = |h: &mut HeatFolded| h.images[0].omitted.lost = 1;
    sim.heat_with("n1", 1, 1, &[reads(3, 9)], lossy);
    assert!(sim.second().is_empty());
    // With one clean window it moves, on the clean event's seq.
    sim.heat("n1", 1, 1, &[reads(3, 1)]);
    let clean = sim.state.seq();
    let commands = sim.second();
    assert_eq!(commands[0].reason.rests_on, [clean]);
    let view = scheduler_core::view(&sim.state);
    assert!(view.health.iter().any(|h| h.code == "HEAT_LOST" && !h.fix.is_empty()));
}

#[test]
fn a_damaged_pack_is_left_out_whole() {
    let mut sim = small(4);
    let damage = |h: &mut HeatFolded| {
        let PackedHeat(bytes) = &mut h.images[0].layers[0].blocks;
        bytes.pop();
    };
    sim.heat_with("n1", 1, 1, &[reads(3, 9), reads(4, 9)], damage);
    assert!(sim.second().is_empty());
    let view = scheduler_core::view(&sim.state);
    assert!(view.health.iter().any(|h| h.code == "HEAT_DAMAGED"));
}

#[test]
fn a_new_process_has_an_empty_main_region() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    sim.second();
    sim.join("n1", 4);
    sim.attach("n1", 1, 2);
    assert_eq!(sim.state.main_bytes(&node_id("n1")).0, ByteLen(0));
    sim.second();
    assert_eq!(sim.ram("n1", 1), [3]);
    sim.state.audit().unwrap();
}

#[test]
fn an_answer_of_an_earlier_process_moves_nothing() {
    let mut sim = small(4);
    sim.deaf.insert(node_id("n1"));
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    let commands = sim.second();
    let before = sim.nodes[&node_id("n1")].incarnation;
    sim.join("n1", 4);
    sim.nodes.get_mut(&node_id("n1")).unwrap().incarnation = before;
    sim.obey(&commands[0]);
    assert_eq!(sim.state.main_bytes(&node_id("n1")).0, ByteLen(0));
    sim.state.audit().unwrap();
}

#[test]
fn a_copy_that_a_write_dropped_rests_and_comes_back() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    sim.second();
    sim.nodes.get_mut(&node_id("n1")).unwrap().ram.clear();
    sim.heat_with("n1", 1, 1, &[reads(3, 9)], |h| {
        h.dropped = vec![(LayerId(1), vec![BlockIndex(3)])];
    });
    for _ in 0..REST_TICKS - 1 {
        assert!(sim.second().is_empty());
        sim.alive("n1");
    }
    sim.second();
    assert_eq!(sim.ram("n1", 1), [3]);
    sim.state.audit().unwrap();
}

#[test]
fn skipped_and_refused_blocks_rest() {
    let refused = |_: &Command| Outcome::Refused { why: "busy".into() };
    let skipped = |c: &Command| {
        let Order::Promote { blocks, .. } = &c.order else {
            unreachable!()
        };
        Outcome::Done {
            done: Vec::new(),
            skipped: blocks.iter().map(|p| (p.block, "written_during_fill".into())).collect(),
            bytes: ByteLen(0),
            took_us: 1,
        }
    };
    for answer in [&refused as &dyn Fn(&Command) -> Outcome, &skipped] {
        let mut sim = small(4);
        sim.deaf.insert(node_id("n1"));
        sim.heat("n1", 1, 1, &[reads(3, 9)]);
        let commands = sim.second();
        finish(&mut sim, &commands[0], answer(&commands[0]));
        assert_eq!(sim.state.main_bytes(&node_id("n1")), (ByteLen(0), ByteLen(0)));
        for _ in 0..REST_TICKS - 1 {
            sim.alive("n1");
            assert!(sim.second().is_empty());
        }
        sim.alive("n1");
        sim.second();
        assert_eq!(sim.second().len() + sim.commands.len(), 0, "ordered again once");
        assert_eq!(sim.state.main_bytes(&node_id("n1")).1, ByteLen(BLOCK));
        sim.state.audit().unwrap();
    }
}

#[test]
fn an_unanswered_command_is_settled() {
    let mut sim = small(4);
    sim.deaf.insert(node_id("n1"));
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    let lost = sim.second().remove(0);
    for _ in 0..COMMAND_TICKS {
        sim.alive("n1");
        assert!(sim.second().is_empty());
    }
    sim.alive("n1");
    // The command's own node did execute it; only its answer was lost.
    sim.nodes
        .get_mut(&node_id("n1"))
        .unwrap()
        .ram
        .insert((LayerId(1), BlockIndex(3)));
    sim.deaf.clear();
    let commands = sim.second();
    assert_eq!(commands[0].reason.rule, "tier/settle");
    sim.alive("n1");
    sim.second();
    assert_eq!(sim.ram("n1", 1), [3]);
    // A very late answer changes nothing more.
    finish(
        &mut sim,
        &lost,
        Outcome::Done {
            done: vec![BlockIndex(3)],
            skipped: Vec::new(),
            bytes: ByteLen(BLOCK),
            took_us: 1,
        },
    );
    assert_eq!(sim.state.main_bytes(&node_id("n1")).0, ByteLen(BLOCK));
    sim.state.audit().unwrap();
}

#[test]
fn cold_residents_leave_though_nobody_wants_their_place() {
    let mut sim = small(4);
    sim.policy(|p| p.half_life_s = 10);
    sim.heat("n1", 1, 1, &[reads(3, 2)]);
    sim.second();
    assert_eq!(sim.ram("n1", 1), [3]);
    // 2 bursts are under a quarter of one after more than three half-lives.
    for second in 1..=31 {
        sim.alive("n1");
        let commands = sim.second();
        assert_eq!(commands.len(), usize::from(second == 30), "second {second}");
    }
    assert!(sim.ram("n1", 1).is_empty());
    sim.state.audit().unwrap();
}

#[test]
fn a_region_that_shrank_is_emptied_to_its_size() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(1, 3), reads(2, 4), reads(3, 5), reads(4, 6)]);
    sim.second();
    sim.heat_with("n1", 1, 1, &[], |h| {
        h.tier = TierUse {
            capacity: ByteLen(5 * BLOCK),
            main_capacity: ByteLen(2 * BLOCK),
            ..TierUse::default()
        };
    });
    let commands = sim.second();
    assert_eq!(commands[0].reason.rule, "tier/shrink");
    assert_eq!(sim.ram("n1", 1), [3, 4]);
}

#[test]
fn nothing_is_ordered_from_absent_nodes_or_without_the_policy() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    sim.policy(|p| p.enabled = false);
    assert!(sim.second().is_empty());
    for _ in 0..10 {
        sim.second();
    }
    sim.policy(|p| p.enabled = true);
    assert!(sim.second().is_empty(), "absent");
    let view = scheduler_core::view(&sim.state);
    assert_eq!(view.health[0].code, "NODE_ABSENT");
    sim.alive("n1");
    assert_eq!(sim.second().len(), 1);
}

#[test]
fn a_growing_layer_is_read_only_where_it_is_attached_and_under_its_epoch() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    let detached = Event::ImageDetached {
        image: ImageId(1),
        epoch: hearth_protocol::Epoch(1),
    };
    sim.node("n1", detached);
    assert!(sim.second().is_empty());
    sim.attach("n1", 1, 2);
    let commands = sim.second();
    let Order::Promote { epoch, from, .. } = &commands[0].order else {
        unreachable!()
    };
    assert_eq!((epoch.0, from), (2, &node_id("n1")));
}

#[test]
fn clones_share_blocks_and_read_them_from_the_node_that_has_them() {
    let mut sim = Sim::default();
    sim.join("n1", 4);
    sim.join("n2", 4);
    sim.image("n1", 1, 100);
    let name: SnapshotName = "v1".parse().unwrap();
    sim.node(
        "n1",
        Event::SnapshotTaken {
            image: ImageId(1),
            name,
            sealed: LayerId(1),
            top: LayerId(11),
        },
    );
    for clone in [2, 3] {
        sim.created("n2", clone, 100, vec![LayerId(clone), LayerId(1)]);
        sim.attach("n2", clone, 1);
    }
    // Each clone's heat alone is under the threshold.
    sim.heat("n2", 2, 1, &[reads(5, 1)]);
    sim.heat("n2", 3, 1, &[reads(5, 1)]);
    let commands = sim.second();
    let Order::Promote { from, blocks, .. } = &commands[0].order else {
        unreachable!()
    };
    assert_eq!((from, blocks.len()), (&node_id("n1"), 1));
    assert_eq!(sim.ram("n2", 1), [5]);
    assert!(sim.ram("n1", 1).is_empty());
    for clone in [2, 3] {
        let heat = scheduler_core::image_heat(&sim.state, ImageId(clone)).unwrap();
        assert!(heat.cells[0].ram && heat.cells.len() == 1);
    }
    // When the last image on the layer is gone, the copies are taken out by command.
    for image in [2, 3] {
        sim.node(
            "n2",
            Event::ImageDetached {
                image: ImageId(image),
                epoch: hearth_protocol::Epoch(1),
            },
        );
        sim.node("n2", Event::ImageDeleted { image: ImageId(image) });
    }
    sim.node(
        "n1",
        Event::ImageDetached {
            image: ImageId(1),
            epoch: hearth_protocol::Epoch(1),
        },
    );
    sim.node("n1", Event::ImageDeleted { image: ImageId(1) });
    let commands = sim.second();
    assert_eq!(commands[0].reason.rule, "tier/cold");
    assert!(sim.ram("n2", 1).is_empty());
    sim.state.audit().unwrap();
}

#[test]
fn reports_are_folded_once() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 1)]);
    sim.heat_with("n1", 1, 1, &[reads(3, 1)], |h| h.reports = (1, 1));
    assert!(sim.second().is_empty());
    assert_eq!(sim.state.folded_reports(&node_id("n1")).unwrap().1, 1);
    assert_eq!(sim.state.totals().repeats, 1);
}

#[test]
fn a_half_life_change_keeps_the_scores() {
    let mut sim = small(4);
    sim.heat("n1", 1, 1, &[reads(3, 9), reads(4, 7)]);
    sim.second();
    let score = |state: &State, block| {
        let node: NodeId = node_id("n1");
        state.block(&node, LayerId(1), BlockIndex(block)).1.0
    };
    let before = (score(&sim.state, 3), score(&sim.state, 4));
    sim.policy(|p| p.half_life_s = 5);
    assert_eq!(before, (score(&sim.state, 3), score(&sim.state, 4)));
    for _ in 0..5 {
        sim.alive("n1");
        sim.second();
    }
    assert!(score(&sim.state, 3).abs_diff(before.0 / 2) < 100);
    sim.state.audit().unwrap();
}

#[test]
fn commands_are_cut_at_their_limit_and_ids_differ() {
    let mut sim = Sim::default();
    sim.join("n1", 3_000);
    sim.image("n1", 1, 10_000);
    sim.policy(|p| p.promote_bytes_per_s_max = 1 << 40);
    sim.policy(|p| p.in_flight_bytes_max = 1 << 40);
    let records: Vec<_> = (0..2_500).map(|b| reads(b, 5)).collect();
    sim.heat("n1", 1, 1, &records);
    let commands = sim.second();
    let counts: Vec<_> = commands.iter().map(|c| c.order.block_count()).collect();
    assert_eq!(counts, [1_024, 1_024, 452]);
    assert!(commands[0].id != commands[1].id && commands[1].id != commands[2].id);
}

#[test]
fn a_block_that_keeps_failing_is_tried_ever_less_often() {
    let mut sim = small(4);
    sim.deaf.insert(node_id("n1"));
    sim.heat("n1", 1, 1, &[reads(3, 9)]);
    let mut tries = Vec::new();
    for _ in 0..130 {
        sim.alive("n1");
        for command in sim.second() {
            tries.push(sim.tick.0);
            let skipped = vec![(BlockIndex(3), "not_in_layer".into())];
            let outcome = Outcome::Done {
                done: Vec::new(),
                skipped,
                bytes: ByteLen(0),
                took_us: 1,
            };
            finish(&mut sim, &command, outcome);
        }
    }
    assert_eq!(tries, [1, 9, 25, 57, 121]);
    sim.state.audit().unwrap();
}

#[test]
fn a_demotion_that_finds_nothing_or_is_refused_is_not_repeated_with_every_tick() {
    let not_there = Outcome::Done {
        done: Vec::new(),
        skipped: vec![(BlockIndex(3), "not_in_main_region".into())],
        bytes: ByteLen(0),
        took_us: 1,
    };
    let refused = Outcome::Refused { why: "busy".into() };
    for (answer, resident, orders) in [(not_there, 0, 1), (refused, BLOCK, 3)] {
        let mut sim = small(4);
        sim.policy(|p| p.half_life_s = 1);
        sim.heat("n1", 1, 1, &[reads(3, 2)]);
        sim.second();
        sim.deaf.insert(node_id("n1"));
        let mut given = 0;
        for _ in 0..3 + 2 * REST_TICKS + 2 {
            sim.alive("n1");
            for command in sim.second() {
                assert_eq!(command.reason.rule, "tier/cold");
                given += 1;
                finish(&mut sim, &command, answer.clone());
            }
        }
        assert_eq!(given, orders);
        for _ in 0..REST_TICKS {
            sim.alive("n1");
            sim.tick_only(1_000);
        }
        assert_eq!(sim.state.main_bytes(&node_id("n1")).0, ByteLen(resident));
        sim.state.audit().unwrap();
    }
}

#[test]
fn nodes_left_out_of_a_full_tick_come_first_at_the_next() {
    // 100 nodes, each with 60 layers of one hot block: 60 commands a node, 6,000 in all.
    let mut sim = Sim::default();
    let names: Vec<String> = (0..100).map(|n| format!("n{n:03}")).collect();
    for (n, name) in names.iter().enumerate() {
        sim.join(name, 100);
        for image in 0..60 {
            let number = (n * 60 + image + 1) as u128;
            sim.image(name, number, 10);
            sim.heat(name, number, number, &[reads(1, 5)]);
        }
    }
    let first = sim.second().len();
    assert!((COMMANDS_PER_TICK_MAX..COMMANDS_PER_TICK_MAX + 60).contains(&first));
    assert_eq!(first + sim.second().len(), 6_000);
    assert!(sim.nodes.values().all(|n| n.ram.len() == 60));
}
