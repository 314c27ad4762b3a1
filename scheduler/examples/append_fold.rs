//! Measures the log on one core: append (synced) and fold of heat events, beside raw RocksDB batch writes of the same
//! bytes, and a replay of what was written. Prints one JSON line.
//!
//! `cargo run --release -p hearth-scheduler --example append_fold -- [DIR]`

use std::time::Instant;

use hearth_bus::Fetched;
use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::event::{HeatFolded, ImageCreated, NodeJoined};
use hearth_protocol::heat::{BlockHeat, HeatOrigin, ImageHeat, LatencySummary, LayerHeat, Omitted, TierUse, pack};
use hearth_protocol::{
    BlockIndex, ByteLen, Envelope, Event, ImageId, Incarnation, LayerId, Message, Publisher, Seq, SetVersion, Term,
    TickNo, WallMs, subject,
};
use hearth_scheduler::log::{Entry, EventLog, RocksLog};
use hearth_scheduler::replica::Replica;

/// Seconds of cluster time that are recorded.
const TICKS: u64 = 60;
/// Nodes, one heat event each per tick.
const NODES: u64 = 10;
/// Block records per heat event: 100,000 a second over all nodes, the cluster's budget.
const RECORDS: u64 = 10_000;

struct Writer {
    seq: u64,
    entries: Vec<Entry>,
}

impl Writer {
    fn put(&mut self, publisher: &Publisher, subject: String, event: Event) {
        self.seq += 1;
        let envelope = Envelope {
            codec: CODEC_VERSION,
            subject: subject.clone(),
            publisher: publisher.clone(),
            incarnation: Incarnation(1),
            publisher_seq: self.seq,
            time: WallMs(0),
            reason: String::new(),
        };
        let fetched = Fetched {
            seq: Seq(self.seq),
            subject,
            message_id: None,
            frame: Message::encode(&envelope, &event).to_frame().into(),
        };
        self.entries
            .push(Entry::from_fetched(fetched).expect("an event of this build"));
    }
}

fn heat(node: u64, tick: u64) -> HeatFolded {
    let blocks: Vec<_> = (0..RECORDS)
        .map(|i| BlockHeat {
            block: BlockIndex((i * 7 + tick * 13) % 60_000),
            reads: 1 + (i % 9) as u32,
            writes: (i % 3) as u32,
            bursts: 1 + (i % 10) as u32,
            bytes: 4096 * (1 + i % 16),
        })
        .collect();
    let mut blocks = blocks;
    blocks.sort();
    blocks.dedup_by_key(|b| b.block);
    HeatFolded {
        term: Term(1),
        node: format!("n{node}").parse().expect("a node id"),
        incarnation: Incarnation(1),
        reports: (tick, tick),
        gap: 0,
        time: WallMs(tick * 1000),
        images: vec![ImageHeat {
            image: ImageId(node.into()),
            origin: HeatOrigin::Trace,
            layers: vec![LayerHeat {
                layer: LayerId(node.into()),
                blocks: pack(&blocks),
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
    }
}

fn recording() -> Vec<Vec<Entry>> {
    let id = "s1".parse().expect("a scheduler id");
    let scheduler = Publisher::Scheduler("s1".parse().expect("a scheduler id"));
    let mut writer = Writer {
        seq: 0,
        entries: Vec::new(),
    };
    let start = Event::TermStarted {
        term: Term(1),
        previous: None,
    };
    writer.put(&scheduler, subject::lead(&id), start);
    for n in 0..NODES {
        let node: hearth_protocol::NodeId = format!("n{n}").parse().expect("a node id");
        let own = Publisher::Node(node.clone());
        let joined = NodeJoined {
            node: node.clone(),
            incarnation: Incarnation(1),
            storage_incarnation: Incarnation(1),
            previous: None,
            ram: ByteLen(1 << 30),
            main: ByteLen(1 << 30),
            fault_domain: "here".into(),
            peer_address: "unix:/nowhere".into(),
            layers: Vec::new(),
            heat_source: "trace".into(),
        };
        writer.put(&own, subject::node(&node), Event::NodeJoined(joined));
        let created = ImageCreated {
            image: ImageId(n.into()),
            name: format!("bench/n{n}").parse().expect("an image name"),
            size: ByteLen(60_000 << 16),
            block_size: ByteLen(1 << 16),
            layers: vec![LayerId(n.into())],
            parent: None,
            node,
            set_version: SetVersion(1),
            members: Default::default(),
        };
        writer.put(
            &own,
            subject::image(ImageId(n.into()), &own),
            Event::ImageCreated(created),
        );
    }
    let mut batches = vec![std::mem::take(&mut writer.entries)];
    for tick in 1..=TICKS {
        for node in 0..NODES {
            writer.put(
                &scheduler,
                subject::folded_heat(&id),
                Event::HeatFolded(heat(node, tick)),
            );
        }
        let ticked = Event::Ticked {
            term: Term(1),
            tick: TickNo(tick),
            time: WallMs(tick * 1000),
        };
        writer.put(&scheduler, subject::lead(&id), ticked);
        batches.push(std::mem::take(&mut writer.entries));
    }
    batches
}

fn main() {
    let dir = std::env::args().nth(1).map_or_else(std::env::temp_dir, Into::into);
    let dir = dir.join(format!("hearth-append-fold-{}", std::process::id()));
    let batches = recording();
    let records = (TICKS * NODES * RECORDS) as f64;

    let raw_dir = dir.join("raw");
    std::fs::create_dir_all(&raw_dir).expect("a directory for the measurement");
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    let raw = rocksdb::DB::open(&options, &raw_dir).expect("a raw store");
    let mut synced = rocksdb::WriteOptions::default();
    synced.set_sync(true);
    let start = Instant::now();
    for batch in &batches {
        let mut writes = rocksdb::WriteBatch::default();
        for entry in batch {
            let value = [entry.message.envelope.as_slice(), &entry.message.payload].concat();
            writes.put(entry.seq.0.to_be_bytes(), value);
        }
        raw.write_opt(writes, &synced).expect("a raw write");
    }
    let raw_s = start.elapsed().as_secs_f64();

    let mut log = RocksLog::open(&dir.join("log")).expect("a log");
    let start = Instant::now();
    for batch in &batches {
        log.append(batch).expect("an append");
    }
    let append_s = start.elapsed().as_secs_f64();

    let mut replica = Replica::new("s2".parse().expect("a scheduler id"));
    let start = Instant::now();
    for entry in batches.iter().flatten() {
        replica.take(entry);
    }
    let fold_s = start.elapsed().as_secs_f64();

    let start = Instant::now();
    let replayed = Replica::replay("s3".parse().expect("a scheduler id"), &log).expect("a replay");
    let replay_s = start.elapsed().as_secs_f64();
    assert_eq!(replayed.state().digest(), replica.state().digest());
    assert_eq!(replayed.state().totals().void, 0);

    println!(
        "{{\"records\":{records},\"raw_s\":{raw_s:.3},\"append_s\":{append_s:.3},\"append_over_raw\":{:.2},\
         \"fold_s\":{fold_s:.3},\"append_fold_records_per_s\":{:.0},\"replay_s\":{replay_s:.3},\
         \"replay_times_real_time\":{:.1}}}",
        raw_s / append_s,
        records / (append_s + fold_s),
        TICKS as f64 / replay_s,
    );
    std::fs::remove_dir_all(&dir).expect("the measurement's directory goes");
}
