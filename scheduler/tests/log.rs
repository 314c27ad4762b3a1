//! The event log: the same bodies in RocksDB and in memory, and damage of every kind on the real files.

use std::path::{Path, PathBuf};

use hearth_bus::Fetched;
use hearth_bus::testing::copy_dir;
use hearth_protocol::chain;
use hearth_protocol::codec::CODEC_VERSION;
use hearth_protocol::command::{Outcome, Reason};
use hearth_protocol::event::HeatFolded;
use hearth_protocol::heat::{HeatOrigin, ImageHeat, LatencySummary, Omitted, TierUse};
use hearth_protocol::{
    ByteLen, Command, CommandId, Envelope, Epoch, Event, ImageId, Incarnation, LayerId, Message, NodeId, Order,
    Publisher, Seq, Term, TickNo, WallMs, subject,
};
use hearth_scheduler::log::{Entry, EventLog, Head, Index, LogError, MemoryLog, RocksLog};

fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

fn entry(seq: u64, publisher: &Publisher, subject: String, event: Event) -> Entry {
    let envelope = Envelope {
        codec: CODEC_VERSION,
        subject: subject.clone(),
        publisher: publisher.clone(),
        incarnation: Incarnation(1),
        publisher_seq: seq,
        time: WallMs(seq),
        reason: String::new(),
    };
    let fetched = Fetched {
        seq: Seq(seq),
        subject,
        message_id: None,
        frame: Message::encode(&envelope, &event).to_frame().into(),
    };
    Entry::from_fetched(fetched).unwrap()
}

/// Six kinds of events over and over, with a foreign message among them; ticks at 1,000 ms each.
fn entries(from: u64, count: u64) -> Vec<Entry> {
    let scheduler = Publisher::Scheduler("s1".parse().unwrap());
    let n1 = Publisher::Node(node("n1"));
    let s1 = "s1".parse().unwrap();
    (from..from + count)
        .map(|seq| match seq % 6 {
            0 => entry(
                seq,
                &n1,
                subject::node(&node("n1")),
                Event::NodeLeft { node: node("n1") },
            ),
            1 => entry(
                seq,
                &scheduler,
                subject::lead(&s1),
                Event::Ticked {
                    term: Term(1),
                    tick: TickNo(seq),
                    time: WallMs(seq * 1000),
                },
            ),
            2 => entry(
                seq,
                &n1,
                subject::image(ImageId(7), &n1),
                Event::ImageDetached {
                    image: ImageId(7),
                    epoch: Epoch(seq),
                },
            ),
            3 => entry(
                seq,
                &scheduler,
                subject::command(&node("n1")),
                Event::CommandGiven(command(seq)),
            ),
            4 => entry(seq, &scheduler, subject::folded_heat(&s1), Event::HeatFolded(heat())),
            _ => Entry::from_fetched(Fetched {
                seq: Seq(seq),
                subject: "hearth.log.node.n1".into(),
                message_id: None,
                frame: format!("no frame of ours, number {seq}").into_bytes().into(),
            })
            .unwrap(),
        })
        .collect()
}

fn command(seq: u64) -> Command {
    Command {
        id: CommandId(seq.into()),
        node: node("n1"),
        term: Term(1),
        tick: TickNo(1),
        expires: TickNo(9),
        order: Order::Demote {
            layer: LayerId(5),
            blocks: Vec::new(),
            bytes: ByteLen(0),
        },
        reason: Reason {
            rule: "test".into(),
            policy_version: 0,
            numbers: Vec::new(),
            rests_on: Vec::new(),
            lost: Vec::new(),
            lost_nodes: Vec::new(),
        },
    }
}

fn heat() -> HeatFolded {
    let image = |id| ImageHeat {
        image: ImageId(id),
        origin: HeatOrigin::Trace,
        layers: Vec::new(),
        omitted: Omitted::default(),
        read_latency: LatencySummary::default(),
        write_latency: LatencySummary::default(),
        ram_hits: 0,
        ram_misses: 0,
    };
    HeatFolded {
        term: Term(1),
        node: node("n2"),
        incarnation: Incarnation(2),
        reports: (1, 1),
        gap: 0,
        time: WallMs(0),
        images: vec![image(7), image(8)],
        tier: TierUse::default(),
        disks: Vec::new(),
        probe_events_total: 0,
        probe_lost_total: 0,
        dropped: Vec::new(),
    }
}

fn on_rocks(body: impl FnOnce(Box<dyn EventLog>)) {
    let dir = tempfile::tempdir().unwrap();
    body(Box::new(RocksLog::open(dir.path()).unwrap()));
}

fn in_memory(body: impl FnOnce(Box<dyn EventLog>)) {
    body(Box::new(MemoryLog::default()));
}

fn reads_back(mut log: Box<dyn EventLog>) {
    assert_eq!(log.head(), Head::default());
    assert_eq!(log.verify().unwrap().count, 0);
    let all = entries(1, 60);
    log.append(&all[..1]).unwrap();
    log.append(&all[1..41]).unwrap();
    assert!(matches!(log.append(&all[43..]), Err(LogError::NotNext { .. })));
    assert!(matches!(log.append(&all[39..]), Err(LogError::NotNext { .. })));
    log.append(&all[41..]).unwrap();
    assert_eq!(log.head().seq, Seq(60));

    // The chain is the protocol's, computed here by itself.
    let mut expected = chain::GENESIS;
    for (entry, record) in all.iter().zip(log.range(Seq(1), 100).unwrap()) {
        let (envelope, payload) = (&entry.message.envelope, &entry.message.payload);
        expected = chain::link(&expected, entry.seq, &chain::part(envelope), &chain::part(payload));
        assert_eq!(
            (record.seq, &record.message, record.chain),
            (entry.seq, &entry.message, expected)
        );
        assert_eq!(record.event(), entry.event);
        assert_eq!(record.subject(), entry.subject);
        assert_eq!(log.get(entry.seq).unwrap().unwrap(), record);
    }
    assert_eq!(log.head().chain, expected);
    let verified = log.verify().unwrap();
    assert_eq!((verified.count, verified.bad), (60, None));
    assert_eq!(log.range(Seq(58), 2).unwrap().len(), 2);
    assert!(log.get(Seq(61)).unwrap().is_none());
}

fn finds(mut log: Box<dyn EventLog>) {
    log.append(&entries(1, 36)).unwrap();
    let seqs = |index: Index, from: u64, max: usize| -> Vec<u64> {
        log.find(&index, Seq(from), max).unwrap().iter().map(|s| s.0).collect()
    };
    assert_eq!(seqs(Index::Image(ImageId(7)), 1, 4), [2, 4, 8, 10]);
    assert_eq!(seqs(Index::Image(ImageId(7)), 9, 2), [10, 14]);
    assert_eq!(seqs(Index::Image(ImageId(8)), 1, 9), [4, 10, 16, 22, 28, 34]);
    assert_eq!(seqs(Index::Image(ImageId(9)), 1, 9), [0; 0]);
    assert_eq!(seqs(Index::Layer(LayerId(5)), 1, 2), [3, 9]);
    assert_eq!(seqs(Index::Node(node("n1")), 1, 4), [2, 3, 6, 8]);
    assert_eq!(seqs(Index::Node(node("n2")), 1, 2), [4, 10]);
    assert_eq!(seqs(Index::Node(node("n")), 1, 2), [0; 0]);
    assert_eq!(seqs(Index::Command(CommandId(9)), 1, 5), [9]);
    assert_eq!(seqs(Index::Kind("ticked".into()), 1, 3), [1, 7, 13]);
    let at = |ms| log.seq_at_time(WallMs(ms)).unwrap().map(|s| s.0);
    assert_eq!(
        (at(0), at(999), at(1000), at(6999), at(7000), at(u64::MAX)),
        (None, None, Some(1), Some(1), Some(7), Some(31))
    );
}

fn stays_with_its_stream(mut log: Box<dyn EventLog>) {
    log.bind("one").unwrap();
    log.bind("one").unwrap();
    assert!(matches!(log.bind("two"), Err(LogError::OtherStream { .. })));
}

#[test]
fn records_read_back_as_written() {
    on_rocks(reads_back);
    in_memory(reads_back);
}

#[test]
fn indexes_find_what_they_should() {
    on_rocks(finds);
    in_memory(finds);
}

#[test]
fn a_log_belongs_to_one_stream() {
    on_rocks(stays_with_its_stream);
    in_memory(stays_with_its_stream);
}

#[test]
fn a_command_and_its_end_are_found_together() {
    on_rocks(|mut log| {
        let n1 = Publisher::Node(node("n1"));
        let end = Event::CommandFinished {
            command: CommandId(3),
            node: node("n1"),
            outcome: Outcome::Refused { why: "no".into() },
        };
        let mut all = entries(1, 3);
        all.push(entry(4, &n1, subject::node(&node("n1")), end));
        log.append(&all).unwrap();
        assert_eq!(
            log.find(&Index::Command(CommandId(3)), Seq(1), 9).unwrap(),
            [Seq(3), Seq(4)]
        );
    });
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Run once for every new layout, by the build that introduces it: `cargo test -p hearth-scheduler --test log --
/// --ignored write_golden`. A directory, once released, never changes.
#[test]
#[ignore = "writes a golden log directory"]
fn write_golden() {
    let dir = golden().join(format!("layout-{}", hearth_scheduler::log::LAYOUT));
    assert!(!dir.exists(), "a golden log is written once");
    let mut log = RocksLog::open(&dir).unwrap();
    log.bind("golden").unwrap();
    log.append(&entries(1, 30)).unwrap();
    let head = log.head();
    drop(log);
    for file in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
        // RocksDB's own diary, its lock, and its options (which name the machine's paths) are no data.
        let name = file.file_name().into_string().unwrap();
        if name.starts_with("LOG") || name == "LOCK" || name.starts_with("OPTIONS") {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    std::fs::write(
        dir.join("HEAD.expected"),
        format!("{} {}\n", head.seq, chain::hex(&head.chain)),
    )
    .unwrap();
}

#[test]
fn logs_of_every_layout_ever_released_open() {
    let mut layouts = 0;
    for layout in std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path()) {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(&layout, dir.path());
        let expected = std::fs::read_to_string(layout.join("HEAD.expected")).unwrap();
        let mut log = RocksLog::open(dir.path()).unwrap();
        log.bind("golden").unwrap();
        let head = log.head();
        assert_eq!(format!("{} {}\n", head.seq, chain::hex(&head.chain)), expected);
        assert_eq!(log.verify().unwrap().bad, None, "{}", layout.display());
        for (entry, record) in entries(1, 30).iter().zip(log.range(Seq(1), 100).unwrap()) {
            assert_eq!(record.event(), entry.event);
        }
        // It goes on as a log of this build.
        log.append(&entries(31, 5)).unwrap();
        assert_eq!(log.verify().unwrap().count, 35);
        layouts += 1;
    }
    assert!(layouts >= 1);
}

/// A RocksDB log of 200 records in files, closed.
fn filled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut log = RocksLog::open(dir.path()).unwrap();
    for from in (1..=200).step_by(20) {
        log.append(&entries(from, 20)).unwrap();
    }
    dir
}

#[test]
fn a_log_reopens_where_it_ended_also_after_a_copy_of_its_files() {
    let dir = filled();
    let head = RocksLog::open(dir.path()).unwrap().head();
    assert_eq!(head.seq, Seq(200));
    let mut log = RocksLog::open(dir.path()).unwrap();
    log.append(&entries(201, 5)).unwrap();
    // What a kill leaves: the files as they are now, without any closing.
    let copied = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copied.path().join(file.file_name())).unwrap();
    }
    let again = RocksLog::open(copied.path()).unwrap();
    assert_eq!(again.head(), log.head());
    assert_eq!(again.verify().unwrap().bad, None);
}

#[test]
fn a_reader_reads_while_the_writer_writes() {
    let dir = filled();
    let mut writer = RocksLog::open(dir.path()).unwrap();
    let mut reader = RocksLog::open_reader(dir.path()).unwrap();
    assert_eq!(reader.head(), writer.head());
    writer.append(&entries(201, 10)).unwrap();
    reader.refresh().unwrap();
    assert_eq!(reader.head(), writer.head());
    let verified = reader.verify().unwrap();
    assert_eq!((verified.count, verified.bad), (210, None));
    assert_eq!(
        reader.find(&Index::Kind("ticked".into()), Seq(200), 9).unwrap(),
        [Seq(205)]
    );
    assert!(RocksLog::open(dir.path()).is_err(), "two writers");
    let nothing = tempfile::tempdir().unwrap();
    assert!(matches!(
        RocksLog::open_reader(nothing.path()),
        Err(LogError::Directory { .. })
    ));
}

/// Opens the store itself, behind the log's back.
fn behind(dir: &Path, act: impl FnOnce(&rocksdb::DB)) {
    let options = rocksdb::Options::default();
    let families = rocksdb::DB::list_cf(&options, dir).unwrap();
    let db = rocksdb::DB::open_cf(&options, dir, families).unwrap();
    act(&db);
}

/// Damages record 77 and returns the first bad position that verify names, with its reason.
fn damaged(act: impl FnOnce(&rocksdb::DB, [u8; 8], Vec<u8>)) -> (u64, String) {
    let dir = filled();
    behind(dir.path(), |db| {
        let key = 77u64.to_be_bytes();
        let value = db.get(key).unwrap().unwrap();
        act(db, key, value);
    });
    let log = RocksLog::open(dir.path()).unwrap();
    let verified = log.verify().unwrap();
    assert_eq!(verified.count, 76, "{verified:?}");
    let (seq, why) = verified.bad.expect("damage is found");
    (seq.0, why)
}

#[test]
fn verify_names_the_first_bad_record() {
    let len = |value: &Vec<u8>| value.len();
    // Every single bit flipped in one record is found: layout, envelope, payload and chain.
    let value_len = {
        let dir = filled();
        let mut found = 0;
        behind(dir.path(), |db| {
            found = len(&db.get(77u64.to_be_bytes()).unwrap().unwrap())
        });
        found
    };
    for byte in [
        0,
        1,
        4,
        5,
        20,
        value_len / 2,
        value_len - 33,
        value_len - 32,
        value_len - 1,
    ] {
        let (seq, why) = damaged(|db, key, mut value| {
            value[byte] ^= 0x10;
            db.put(key, value).unwrap();
        });
        assert_eq!(seq, 77, "byte {byte}: {why}");
    }
    let (seq, why) = damaged(|db, key, _| db.delete(key).unwrap());
    assert!(seq == 77 && why.contains("missing"), "{why}");
    let (seq, _) = damaged(|db, key, value| db.put(key, &value[..value.len() - 7]).unwrap());
    assert_eq!(seq, 77);
    let (seq, why) = damaged(|db, key, _| db.put(key, []).unwrap());
    assert!(seq == 77 && why.contains("cut short"), "{why}");
}

#[test]
fn a_log_without_its_tail_is_refused() {
    let dir = filled();
    behind(dir.path(), |db| db.delete(200u64.to_be_bytes()).unwrap());
    match RocksLog::open(dir.path()) {
        Err(LogError::Damaged { seq, .. }) => assert_eq!(seq, Seq(200)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn flipped_bits_in_the_files_are_found() {
    let dir = filled();
    behind(dir.path(), |db| db.flush().unwrap());
    let tables: Vec<PathBuf> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "sst"))
        .collect();
    assert!(!tables.is_empty());
    // The largest table holds the records.
    let table = tables.iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(table).unwrap();
    bytes[40] ^= 1;
    std::fs::write(table, bytes).unwrap();
    let found = match RocksLog::open(dir.path()) {
        Err(LogError::Damaged { .. } | LogError::Store { .. }) => true,
        Err(other) => panic!("{other}"),
        Ok(log) => log.verify().unwrap().bad.is_some(),
    };
    assert!(found);
}
