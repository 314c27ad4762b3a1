//! The log as the simulation finds it: the images, of one run each or of some.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_protocol::aggregate::Change;
use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::event::ImageCreated;
use hearth_protocol::record::{Nodes, Record, Run};
use hearth_protocol::{
    BlockIndex, ByteLen, Envelope, Event, Incarnation, LayerId, LeaseId, NodeId, Publisher, SetVersion, WallMs, subject,
};

use crate::chance::Chance;
use crate::log::{Log, image_id};
use crate::plan::Plan;

/// Bytes of a block; nothing is moved, so it only has to be valid.
const BLOCK: u64 = 4_096;

/// The log with every image of a plan.
pub fn log(plan: &Plan, ids: &[NodeId], chance: &mut Chance) -> Log {
    let mut log = Log::default();
    let mut number = 0;
    for image in 0..plan.images {
        let members = some(plan, ids, chance);
        let by = members.first().expect("a member").clone();
        let mut says = |log: &mut Log, event| {
            number += 1;
            let envelope = Envelope {
                codec: CODEC_VERSION,
                subject: subject::image(image_id(image), &Publisher::Node(by.clone())),
                publisher: Publisher::Node(by.clone()),
                // A life before the first one here.
                incarnation: Incarnation(1 << 64),
                publisher_seq: number,
                time: WallMs(0),
                reason: String::new(),
            };
            let published = log.publish(envelope, event, None, false);
            assert!(
                matches!(published, crate::log::Published::Counts(..)),
                "the beginning is valid"
            );
        };
        let created = Event::ImageCreated(ImageCreated {
            image: image_id(image),
            name: format!("vm/disk-{image}").parse().expect("a name"),
            size: ByteLen(plan.blocks * BLOCK),
            block_size: ByteLen(BLOCK),
            layers: vec![LayerId(image as u128 + 1)],
            parent: None,
            node: by.clone(),
            set_version: SetVersion(1),
            members: members.clone(),
        });
        says(&mut log, created);
        if !chance.happens(400) {
            continue;
        }
        // An owner that is gone gave its runs other members.
        let mut starts = BTreeSet::from([0]);
        starts.extend((0..2).map(|_| chance.below(plan.blocks)));
        let wanted: Vec<(u64, Nodes)> = starts.into_iter().map(|at| (at, some(plan, ids, chance))).collect();
        let granted = log.now[image].record.granted(LeaseId(image as u128 + 1), &members);
        let mut records = vec![granted.expect("all members")];
        for step in 0..3 {
            let mut stamp = records.last().expect("one").stamp();
            stamp.set_version = stamp.set_version.next();
            let run = |(at, wanted): &(u64, Nodes)| Run {
                first: BlockIndex(*at),
                members: match step {
                    0 => members.clone(),
                    1 => &members | wanted,
                    _ => wanted.clone(),
                },
                joiners: if step == 0 { wanted - &members } else { Nodes::new() },
            };
            let record = Record::new(stamp, wanted.iter().map(run).collect());
            records.push(record.expect("a record"));
        }
        for record in records {
            let change = Change {
                by: by.clone(),
                from: log.now[image].record.stamp(),
                to: Arc::new(record),
                stale: None,
            };
            let image = image_id(image);
            says(&mut log, Event::LocationsChanged { image, change });
        }
    }
    log.begin();
    log
}

/// As many nodes as there are to be copies.
fn some(plan: &Plan, ids: &[NodeId], chance: &mut Chance) -> Nodes {
    let mut members = Nodes::new();
    while members.len() < plan.copies {
        members.extend(chance.pick(ids));
    }
    members
}
