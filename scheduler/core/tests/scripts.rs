//! Golden event scripts: a few lines of what happens, and the commands that follow, word for word.
//!
//! `scripts/<name>.script` is the input, `scripts/<name>.expect` the transcript; `BLESS=1` writes the transcripts anew,
//! and a change of policy shows as a diff of text. Lines of a script:
//!
//! ```text
//! join NODE MAIN_BLOCKS            a node daemon starts
//! image NUMBER NODE BLOCKS         an attached image of one layer of the same number
//! clone NUMBER NODE LAYER          an attached image over that layer
//! snapshot IMAGE NODE NEW_TOP      seals the image's first layer
//! heat NODE IMAGE LAYER B:N ...    reads of block B in N bursts; B:N:w writes; B:N:lost with a loss in the window
//! alive NODE                       a report without heat
//! drop NODE LAYER B ...            the node says a write made these copies stale
//! policy FIELD=VALUE ...           sets policy numbers
//! deaf NODE / hears NODE           whether the node obeys and answers
//! second [N]                       N seconds pass: tick, decide, obey
//! ```

#![allow(clippy::disallowed_methods, reason = "BLESS=1 comes from the environment")]

mod sim;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use hearth_protocol::command::Order;
use hearth_protocol::{BlockIndex, Command, Event, ImageId, LayerId};
use scheduler_core::why::number_text;
use sim::{Sim, node_id, reads, writes};

fn show(command: &Command, out: &mut String) {
    let layer = command.order.layer().0;
    let (what, blocks): (String, Vec<String>) = match &command.order {
        Order::Promote { blocks, from, .. } => (
            format!("promote layer {layer} on {} from {from}", command.node),
            blocks
                .iter()
                .map(|p| {
                    let over = p.displaces.map_or(String::new(), |d| {
                        format!(" over {}/{}:{}", d.layer.0, d.block, d.score.bursts_text())
                    });
                    format!("{}:{}{over} (seq {})", p.block, p.score.bursts_text(), p.heat_seq)
                })
                .collect(),
        ),
        Order::Demote { blocks, .. } => (
            format!("demote layer {layer} on {}", command.node),
            blocks
                .iter()
                .map(|d| format!("{}:{}", d.block, d.score.bursts_text()))
                .collect(),
        ),
        Order::Replicate { to, .. } => (
            format!("replicate layer {layer} on {} to {to}", command.node),
            Vec::new(),
        ),
        Order::Drop { from, .. } => (
            format!("drop layer {layer} on {} from {from}", command.node),
            Vec::new(),
        ),
    };
    writeln!(out, "  {what}: {}", blocks.join(", ")).unwrap();
    let reason = &command.reason;
    let numbers: Vec<_> = reason
        .numbers
        .iter()
        .map(|(name, value)| number_text(name, *value))
        .collect();
    writeln!(
        out,
        "    {} under policy {}: {}",
        reason.rule,
        reason.policy_version,
        numbers.join(", ")
    )
    .unwrap();
    let seqs: Vec<_> = reason.rests_on.iter().map(|s| s.to_string()).collect();
    if !seqs.is_empty() {
        writeln!(out, "    rests on seq {}", seqs.join(" ")).unwrap();
    }
    for lost in &reason.lost {
        let score = lost.score.bursts_text();
        writeln!(out, "    not {}/{}:{score} {}", lost.layer.0, lost.block, lost.why).unwrap();
    }
}

fn heat(sim: &mut Sim, words: &[&str]) {
    let [node, image, layer, records @ ..] = words else {
        panic!("heat NODE IMAGE LAYER B:N ...");
    };
    let mut lost = 0;
    let records: Vec<_> = records
        .iter()
        .map(|record| {
            let parts: Vec<_> = record.split(':').collect();
            let (block, bursts) = (parts[0].parse().unwrap(), parts[1].parse().unwrap());
            match parts.get(2) {
                Some(&"w") => writes(block, bursts),
                Some(&"lost") => {
                    lost = 1;
                    reads(block, bursts)
                }
                _ => reads(block, bursts),
            }
        })
        .collect();
    let (image, layer) = (image.parse().unwrap(), layer.parse().unwrap());
    sim.heat_with(node, image, layer, &records, |h| h.images[0].omitted.lost = lost);
}

fn policy(sim: &mut Sim, words: &[&str]) {
    sim.policy(|policy| {
        let mut json = serde_json::to_value(&*policy).unwrap();
        for word in words {
            let (field, value) = word.split_once('=').unwrap();
            json[field] = serde_json::from_str(value).unwrap();
        }
        *policy = serde_json::from_value(json).unwrap();
    });
}

fn line(sim: &mut Sim, words: &[&str], out: &mut String) {
    match words {
        ["join", node, blocks] => sim.join(node, blocks.parse().unwrap()),
        ["image", number, node, blocks] => sim.image(node, number.parse().unwrap(), blocks.parse().unwrap()),
        ["clone", number, node, layer] => {
            let number = number.parse().unwrap();
            sim.created(
                node,
                number,
                1_000,
                vec![LayerId(number), LayerId(layer.parse().unwrap())],
            );
            sim.attach(node, number, 1);
        }
        ["snapshot", image, node, top] => {
            let image = image.parse().unwrap();
            sim.node(
                node,
                Event::SnapshotTaken {
                    image: ImageId(image),
                    name: "v1".parse().unwrap(),
                    sealed: LayerId(image),
                    top: LayerId(top.parse().unwrap()),
                },
            );
        }
        ["heat", rest @ ..] => heat(sim, rest),
        ["alive", node] => sim.alive(node),
        ["drop", node, layer, blocks @ ..] => {
            let layer = LayerId(layer.parse().unwrap());
            let blocks: Vec<_> = blocks.iter().map(|b| BlockIndex(b.parse().unwrap())).collect();
            let known = sim.nodes.get_mut(&node_id(node)).unwrap();
            known.ram.retain(|(l, b)| *l != layer || !blocks.contains(b));
            sim.heat_with(node, 0, 0, &[], |h| {
                h.images.clear();
                h.dropped = vec![(layer, blocks)];
            });
        }
        ["policy", rest @ ..] => policy(sim, rest),
        ["deaf", node] => sim.deaf.extend([node_id(node)]),
        ["hears", node] => sim.deaf.retain(|deaf| *deaf != node_id(node)),
        ["second", count @ ..] => {
            for _ in 0..count.first().map_or(1, |n| n.parse().unwrap()) {
                let commands = sim.second();
                if !commands.is_empty() {
                    writeln!(out, "tick {}", sim.tick).unwrap();
                }
                commands.iter().for_each(|command| show(command, out));
            }
            for (node, known) in &sim.nodes {
                let ram: Vec<_> = known.ram.iter().map(|(l, b)| format!("{}/{b}", l.0)).collect();
                writeln!(out, "  ram of {node}: {}", ram.join(" ")).unwrap();
            }
        }
        other => panic!("no such line: {other:?}"),
    }
}

fn check(path: &Path) {
    let script = std::fs::read_to_string(path).unwrap();
    let mut sim = Sim::default();
    let mut out = String::new();
    for text in script.lines() {
        let words: Vec<_> = text.split('#').next().unwrap().split_whitespace().collect();
        if !words.is_empty() {
            writeln!(out, "> {}", words.join(" ")).unwrap();
            line(&mut sim, &words, &mut out);
            sim.state.audit().unwrap();
        }
    }
    let expect = path.with_extension("expect");
    if std::env::var("BLESS").is_ok_and(|v| v == "1") {
        std::fs::write(&expect, &out).unwrap();
    }
    let expected = std::fs::read_to_string(&expect).unwrap_or_default();
    for (number, (found, expected)) in out.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "{}, line {}", expect.display(), number + 1);
    }
    assert_eq!(
        out.lines().count(),
        expected.lines().count(),
        "{}: length",
        expect.display()
    );
}

#[test]
fn every_script_gives_its_transcript() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut scripts: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "script"))
        .collect();
    scripts.sort();
    assert!(scripts.len() >= 4);
    scripts.iter().for_each(|path| check(path));
}
