//! Stock clients, unmodified, against the NBD server.

mod nbd_support;

use std::fs;
use std::sync::Arc;

use hearth_node::disk::{Disk, ExtentKind};
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::{ExportEntry, ExportTable, NbdLimits};
use nbd_support::{EXPORT, Served, have, noise, ok, run, text};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;

fn read(disk: &MemoryDisk, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    disk.read(offset, &mut bytes).unwrap();
    bytes
}

#[test]
fn nbdinfo_says_what_is_true() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let writable = Served::new(Arc::new(MemoryDisk::new(8 * MIB)));
    let sealed = Served::new(Arc::new(MemoryDisk::new(8 * MIB).read_only()));
    let can = |served: &Served, what: &str| {
        let output = run("nbdinfo", &["--can", what, &served.uri()]);
        // 0 yes, 2 no; anything else is an error.
        match output.status.code() {
            Some(0) => true,
            Some(2) => false,
            other => panic!(
                "nbdinfo --can {what}: {other:?} {}",
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    };
    let both = [
        "cache",
        "df",
        "flush",
        "multi-conn",
        "connect",
        "read",
        "structured-reply",
    ];
    for what in both {
        assert!(can(&writable, what) && can(&sealed, what), "{what}");
    }
    for what in ["fast-zero", "fua", "trim", "write", "zero"] {
        assert!(can(&writable, what) && !can(&sealed, what), "{what}");
    }
    assert!(!can(&writable, "read-only") && can(&sealed, "read-only"));
    assert!(!can(&writable, "rotational") && !can(&writable, "tls"));
    let info: serde_json::Value = serde_json::from_str(&ok("nbdinfo", &["--json", &writable.uri()])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 8 * MIB);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], BLOCK);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let contexts: Vec<_> = export["contexts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c.as_str().unwrap())
        .collect();
    assert_eq!(
        contexts,
        ["base:allocation", "hearth:tier", "hearth:synced", "hearth:heat"]
    );
    let list = ok("nbdinfo", &["--list", &writable.uri_of("")]);
    assert!(list.contains(EXPORT), "{list}");
    let unknown = run("nbdinfo", &[&writable.uri_of("appl/none")]);
    let why = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && why.contains("appl/none"), "{why}");
}

#[test]
fn nbdinfo_shows_tiers_and_holes() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(MIB));
    disk.write(4 * BLOCK, &noise(1, 4 * BLOCK as usize), false).unwrap();
    (0..6).for_each(|block| disk.set_in_ram(block, false));
    let served = Served::new(disk);
    let map = |kind: &str| {
        let json = ok("nbdinfo", &[&format!("--map={kind}"), "--json", &served.uri()]);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
        let number = |row: &serde_json::Value, key: &str| row[key].as_u64().unwrap();
        rows.iter()
            .map(|row| (number(row, "length") / BLOCK, number(row, "type")))
            .collect::<Vec<_>>()
    };
    assert_eq!(map("base:allocation"), [(4, 3), (4, 0), (8, 3)]);
    assert_eq!(map("hearth:tier"), [(4, 3), (2, 1), (2, 0), (8, 3)]);
    assert_eq!(map("hearth:synced"), [(16, 1)]);
    assert_eq!(map("hearth:heat"), [(6, 0), (10, 15)]);
}

#[test]
fn nbdcopy_copies_both_ways() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(32 * MIB));
    let served = Served::new(disk.clone());
    let (source, target) = (served.file("source"), served.file("target"));
    let mut bytes = noise(2, 32 * MIB as usize);
    bytes[5 * MIB as usize..20 * MIB as usize].fill(0);
    fs::write(&source, &bytes).unwrap();
    for connections in ["1", "4"] {
        disk.trim(0, 32 * MIB, false).unwrap();
        let options = ["-C", connections, "-R", "64", "--flush"];
        let (uri, source, target) = (served.uri(), text(&source), text(&target));
        ok(
            "nbdcopy",
            &[&options[..], &["--destination-is-zero", source, &uri]].concat(),
        );
        assert!(
            read(&disk, 0, 32 * MIB) == bytes,
            "to the server over {connections} connections"
        );
        let holes = disk.extents(0, 32 * MIB, ExtentKind::Allocation, 10).unwrap();
        assert!(
            holes.iter().any(|run| run.status == 3 && run.length >= 14 * MIB),
            "{holes:?}"
        );
        ok("nbdcopy", &[&options[..], &[&uri, target]].concat());
        assert!(
            fs::read(target).unwrap() == bytes,
            "from the server over {connections} connections"
        );
        // Half the blocks in RAM, half not: both ways through the server in one copy.
        (0..disk.blocks())
            .step_by(2)
            .for_each(|block| disk.set_in_ram(block, false));
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    if !have(&["qemu-img"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(16 * MIB));
    let served = Served::new(disk.clone());
    let uri = served.uri();
    let (source, back) = (served.file("source.raw"), served.file("back.qcow2"));
    let mut bytes = noise(3, 16 * MIB as usize);
    bytes[3 * MIB as usize..9 * MIB as usize].fill(0);
    fs::write(&source, &bytes).unwrap();
    ok(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-W",
            "-m",
            "8",
            "-f",
            "raw",
            "-O",
            "raw",
            text(&source),
            &uri,
        ],
    );
    assert!(read(&disk, 0, 16 * MIB) == bytes);
    ok("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);
    ok("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&back)]);
    ok("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, text(&back)]);
    let map: Vec<serde_json::Value> =
        serde_json::from_str(&ok("qemu-img", &["map", "-f", "raw", "--output=json", &uri])).unwrap();
    let zero: u64 = map
        .iter()
        .filter(|row| row["zero"] == true)
        .map(|row| row["length"].as_u64().unwrap())
        .sum();
    assert_eq!(zero, 6 * MIB);
}

#[test]
fn qemu_io_writes_flushes_discards_and_zeroes() {
    if !have(&["qemu-io"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(4 * MIB));
    let served = Served::new(disk.clone());
    let uri = served.uri();
    let steps = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512k 4k",
        "flush",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "write -z -f 196609 1023",
        "discard 256k 128k",
        "aio_write -P 0x33 1000 3000",
        "aio_read 0 2M",
        "aio_flush",
        "read -P 0x22 512k 4k",
        "read -P 0 64k 128k",
        "read -P 0x33 1000 3000",
        "read -P 0 256k 128k",
        "read -P 0x11 600k 100k",
    ];
    let mut arguments = vec!["-f", "raw"];
    steps.iter().for_each(|step| arguments.extend(["-c", step]));
    arguments.push(&uri);
    let output = ok("qemu-io", &arguments);
    assert!(!output.contains("failed") && !output.contains("error"), "{output}");
    assert_eq!(read(&disk, 196_608, 1)[0], 0x11);
    assert!(read(&disk, 196_609, 1_023).iter().all(|byte| *byte == 0));
    let holes = disk.extents(0, MIB, ExtentKind::Allocation, 100).unwrap();
    let hole_bytes: u64 = holes.iter().filter(|run| run.status == 3).map(|run| run.length).sum();
    assert_eq!(
        hole_bytes,
        3 * BLOCK,
        "unmapped zeroes and the discard are holes, plain zeroes are not: {holes:?}"
    );
}

#[test]
fn fio_verifies_what_it_wrote_while_blocks_come_and_go() {
    if !have(&["fio", "fio --enghelp=nbd"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(64 * MIB));
    let served = Served::new(disk.clone());
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let tier = std::thread::spawn({
        let (disk, done) = (disk.clone(), done.clone());
        move || {
            let mut round = 0;
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                disk.set_in_ram(round % disk.blocks(), (round / 7) % 2 == 0);
                round += 1;
                std::thread::yield_now();
            }
        }
    });
    let uri = format!("--uri={}", served.uri());
    ok(
        "fio",
        &[
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randwrite",
            "--bsrange=512-128k",
            "--bs_unaligned=1",
            "--iodepth=32",
            "--numjobs=4",
            "--size=16m",
            "--offset_increment=16m",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--do_verify=1",
            "--verify_fatal=1",
            "--fsync=64",
            "--group_reporting",
            "--thread",
        ],
    );
    done.store(true, std::sync::atomic::Ordering::Release);
    tier.join().unwrap();
}

#[test]
fn libnbd_speaks_every_command() {
    if !have(&["nbdsh"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(4 * MIB));
    let served = Served::new(disk);
    let script = r#"
import errno
def fails(number, call):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == number, (e.string, e.errno)
        return
    raise AssertionError("no error")
h.set_strict_mode(0)
size = h.get_size()
assert h.can_multi_conn() and h.can_df() and h.can_fast_zero() and h.can_cache()
h.pwrite(b"abc" * 1000, 777, nbd.CMD_FLAG_FUA)
assert h.pread(3000, 777) == b"abc" * 1000
assert h.pread(3000, 777, nbd.CMD_FLAG_DF) == b"abc" * 1000
h.cache(size, 0)
h.flush()
h.zero(65536, 65536, nbd.CMD_FLAG_FAST_ZERO)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
fails(errno.ENOTSUP, lambda: h.zero(10, 65536, nbd.CMD_FLAG_FAST_ZERO))
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 0) == bytes(65536)
fails(errno.EINVAL, lambda: h.pread(512, size))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size - 511))
fails(errno.ENOSPC, lambda: h.zero(512, size - 511))
fails(errno.EINVAL, lambda: h.trim(512, size - 511))
fails(errno.EINVAL, lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE))
# A refused write's payload does not derail what follows.
assert h.pread(3, 65536 * 3) == bytes(3)
# A sparse read arrives as pieces.
kinds = []
h.pwrite(b"y" * 65536, 3 * 65536)
h.pread_structured(5 * 65536, 0, lambda b, offset, status, err: kinds.append((offset, len(b), status)))
assert (3 * 65536, 65536, nbd.READ_DATA) in kinds and (4 * 65536, 65536, nbd.READ_HOLE) in kinds, kinds
found = {}
h.block_status(size, 0, lambda context, offset, entries, err: found.setdefault(context, entries))
assert set(found) == {"base:allocation", "hearth:tier"}, found
one = {}
h.block_status(size, 0, lambda context, offset, entries, err: one.setdefault(context, entries), nbd.CMD_FLAG_REQ_ONE)
assert all(len(entries) == 2 for entries in one.values()), one
"#;
    let setup = format!(
        "h.add_meta_context('base:allocation'); h.add_meta_context('hearth:tier'); h.connect_uri('{}')",
        served.uri()
    );
    ok("nbdsh", &["-c", &setup, "-c", script]);
}

/// Serves a writable disk read-only.
struct ReadOnlyTable(OneExport);

impl ExportTable for ReadOnlyTable {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        self.0.find(name).map(ExportEntry::read_only)
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        self.0.list(after, max)
    }
}

#[test]
fn a_read_only_export_refuses_every_write() {
    if !have(&["nbdsh"]) {
        return;
    }
    let table = Arc::new(ReadOnlyTable(OneExport::new(EXPORT, MemoryDisk::new(MIB))));
    let served = Served::with(table, NbdLimits::default());
    let script = r#"
import errno
h.set_strict_mode(0)
assert h.is_read_only()
for call in [lambda: h.pwrite(b"x" * 512, 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)]:
    try:
        call()
        raise AssertionError("no error")
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e.string
assert h.pread(512, 0) == bytes(512)
h.flush()
h.shutdown()
"#;
    ok("nbdsh", &["-u", &served.uri(), "-c", script]);
}
