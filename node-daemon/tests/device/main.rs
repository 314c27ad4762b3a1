//! The kernel device export against the real kernel: FUSE, loop devices, fio, ext4. Needs root; says SKIP without.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hearth_node::disk::Disk;
use hearth_node::export::device::{DeviceError, DeviceExports, DeviceInfo, DeviceOptions};
use hearth_protocol::ImageName;
use tempfile::TempDir;

mod double;
mod guest;
mod restart;

use double::Double;

const MIB: u64 = 1 << 20;

/// Whether the test can run; otherwise says why not, and fails where everything must run.
fn runs(tools: &[&str]) -> bool {
    let missing = tools
        .iter()
        .find(|tool| Command::new(tool).arg("--version").output().is_err());
    let reason = match (DeviceExports::available(), missing) {
        (Ok(()), None) => return true,
        (Err(reason), _) => reason,
        (_, Some(tool)) => format!("{tool} is not installed"),
    };
    assert!(
        std::env::var("REQUIRE_E2E").as_deref() != Ok("1"),
        "must run, but: {reason}"
    );
    println!("SKIP: {reason}");
    false
}

/// Devices below a folder of their own, detached when the test ends, however it ends.
struct Bench {
    exports: DeviceExports,
    folder: TempDir,
    name: ImageName,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let exports = DeviceExports::new(options(folder.path())).unwrap();
        Self {
            exports,
            folder,
            name: name(),
        }
    }

    fn attach(&self, disk: &Arc<Double>) -> DeviceInfo {
        let info = self
            .exports
            .attach(&self.name, Arc::clone(disk) as Arc<dyn Disk>)
            .unwrap();
        println!("{info:?}");
        info
    }
}

/// A device over a disk, if the test can run.
fn scene(tools: &[&str], disk: Double) -> Option<(Bench, Arc<Double>, DeviceInfo)> {
    if !runs(tools) {
        return None;
    }
    let (bench, disk) = (Bench::new(), Arc::new(disk));
    let info = bench.attach(&disk);
    Some((bench, disk, info))
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(e) = self.exports.detach(&self.name) {
            println!("at the end: {e}");
        }
    }
}

fn options(folder: &Path) -> DeviceOptions {
    DeviceOptions::new(folder.join("dev"), folder.join("mnt"))
}

fn name() -> ImageName {
    "appl/vm-1".parse().unwrap()
}

/// Runs a program to its end; its output if it succeeded.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn open_direct(path: &Path) -> File {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .unwrap()
}

/// A buffer that direct I/O accepts.
fn aligned(length: usize, fill: u8) -> (Vec<u8>, std::ops::Range<usize>) {
    let space = vec![fill; length + 4096];
    let start = space.as_ptr().align_offset(4096);
    (space, start..start + length)
}

fn sys(info: &DeviceInfo, entry: &str) -> String {
    let node = info.node.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{node}/{entry}"))
        .unwrap()
        .trim()
        .to_string()
}

#[test]
fn the_device_is_as_asked_and_leaves_nothing_behind() {
    // Not a multiple of the disk's block size.
    let size = 3 * MIB + 4096;
    let Some((bench, disk, info)) = scene(&[], Double::in_memory(size).half_in_ram()) else {
        return;
    };
    assert_eq!(
        info.path,
        bench.folder.path().canonicalize().unwrap().join("dev/appl/vm-1")
    );
    assert_eq!(fs::read_link(&info.path).unwrap(), info.node);
    assert_eq!(
        (
            sys(&info, "loop/dio").as_str(),
            sys(&info, "queue/logical_block_size").as_str()
        ),
        ("1", "4096")
    );
    assert_eq!(sys(&info, "size").parse::<u64>().unwrap() * 512, size);
    assert_eq!(sys(&info, "dev"), format!("{}:{}", info.major, info.minor));
    assert!(!info.survives_restart && info.why_not.is_some());
    assert_eq!(bench.exports.info(&bench.name), Some(info.clone()));

    let again = bench
        .exports
        .attach(&bench.name, Arc::clone(&disk) as Arc<dyn Disk>)
        .unwrap_err();
    assert!(matches!(again, DeviceError::Attached { .. }), "{again}");

    // The last 4 KiB, over the device.
    let device = open_direct(&info.path);
    let (out, range) = aligned(4096, 0xa5);
    device.write_all_at(&out[range], size - 4096).unwrap();
    let (mut back, range) = aligned(8192, 0);
    device.read_exact_at(&mut back[range.clone()], size - 8192).unwrap();
    assert!(back[range.clone()][..4096].iter().all(|b| *b == 0) && back[range][4096..].iter().all(|b| *b == 0xa5));
    drop(device);

    // Any offset and length over the file below it, also past its end.
    let file = File::options()
        .read(true)
        .write(true)
        .open(bench.folder.path().join("mnt/appl/vm-1"))
        .unwrap();
    file.write_all_at(b"straddles", 65_533).unwrap();
    let mut text = [0; 9];
    file.read_exact_at(&mut text, 65_533).unwrap();
    assert_eq!(&text, b"straddles");
    assert_eq!(file.read_at(&mut [0; 64], size - 10).unwrap(), 10);
    assert_eq!(file.read_at(&mut [0; 64], size).unwrap(), 0);
    assert_eq!(file.set_len(17).unwrap_err().kind(), ErrorKind::PermissionDenied);
    drop(file);

    bench.exports.detach(&bench.name).unwrap();
    assert!(!info.path.exists() && !info.path.parent().unwrap().exists());
    assert_eq!(fs::read_dir(bench.folder.path().join("mnt")).unwrap().count(), 0);
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(bench.folder.path().to_str().unwrap())
    );
    let absent = bench.exports.detach(&bench.name).unwrap_err();
    assert!(matches!(absent, DeviceError::NotAttached(_)), "{absent}");
}

#[test]
fn fio_finds_every_byte_at_depth_32() {
    let Some((_bench, disk, info)) = scene(&["fio"], Double::in_memory(64 * MIB).half_in_ram()) else {
        return;
    };
    for (pattern, block) in [("randwrite", "4k-64k"), ("write", "1m-1m")] {
        run(
            "fio",
            &[
                "--name=verify",
                &format!("--filename={}", info.path.display()),
                "--ioengine=libaio",
                "--direct=1",
                "--iodepth=32",
                "--numjobs=1",
                &format!("--rw={pattern}"),
                &format!("--bsrange={block}"),
                "--blockalign=4k",
                "--size=64m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--do_verify=1",
                "--randrepeat=0",
            ],
        );
    }
    assert!(Double::get(&disk.ram_reads) > 100 && Double::get(&disk.reads) > 100);
}

#[test]
fn an_ext4_lives_on_it() {
    let Some((bench, disk, info)) = scene(&["fio", "/sbin/mkfs.ext4"], Double::in_memory(64 * MIB)) else {
        return;
    };
    let device = info.path.to_str().unwrap();
    run("/sbin/mkfs.ext4", &["-q", "-F", device]);
    let tree = bench.folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    let tree_text = tree.to_str().unwrap();
    run("mount", &["-o", "discard", device, tree_text]);
    for i in 0..200u32 {
        fs::write(tree.join(format!("file-{i}")), i.to_le_bytes().repeat(5_000)).unwrap();
    }
    let flushes = Double::get(&disk.flushes);
    File::open(tree.join("file-7")).unwrap().sync_all().unwrap();
    assert!(
        Double::get(&disk.flushes) > flushes,
        "fsync in the file system reaches the disk as a flush"
    );

    let refused = bench.exports.detach(&bench.name).unwrap_err();
    assert!(
        refused.to_string().contains(&format!("mounted on {tree_text}")),
        "{refused}"
    );

    for i in 0..100u32 {
        fs::remove_file(tree.join(format!("file-{i}"))).unwrap();
    }
    run("umount", &[tree_text]);
    assert!(!disk.trimmed.lock().unwrap().is_empty(), "deleted files were discarded");
    run("/sbin/fsck.ext4", &["-f", "-n", device]);
    run("mount", &["-o", "ro", device, tree_text]);
    for i in 100..200u32 {
        assert_eq!(
            fs::read(tree.join(format!("file-{i}"))).unwrap(),
            i.to_le_bytes().repeat(5_000)
        );
    }
    run("umount", &[tree_text]);
}

#[test]
fn discards_and_zeroes_reach_the_disk_as_such() {
    let Some((_bench, disk, info)) = scene(&["blkdiscard"], Double::in_memory(16 * MIB)) else {
        return;
    };
    let device = info.path.to_str().unwrap();
    let file = open_direct(&info.path);
    let (ones, range) = aligned(MIB as usize, 0xff);
    for i in 0..16 {
        file.write_all_at(&ones[range.clone()], i * MIB).unwrap();
    }
    run("blkdiscard", &["--offset", "1052672", "--length", "8192", device]);
    assert_eq!(*disk.trimmed.lock().unwrap(), [(MIB + 4096, 8192)]);
    assert!(disk.zeroed.lock().unwrap().is_empty());
    run(
        "blkdiscard",
        &["--zeroout", "--offset", "4096", "--length", "4096", device],
    );
    let zeroed: u64 = disk
        .zeroed
        .lock()
        .unwrap()
        .iter()
        .chain(&disk.trimmed.lock().unwrap()[1..])
        .map(|r| r.1)
        .sum();
    assert_eq!(zeroed, 4096);

    let (mut back, range) = aligned(12288, 0);
    file.read_exact_at(&mut back[range.clone()], 0).unwrap();
    let kinds: Vec<u8> = back[range.clone()].chunks(4096).map(|c| c[0]).collect();
    assert_eq!(kinds, [0xff, 0, 0xff]);
    file.read_exact_at(&mut back[range.clone()], MIB + 4096).unwrap();
    let kinds: Vec<u8> = back[range].chunks(4096).map(|c| c[0]).collect();
    assert_eq!(kinds, [0, 0, 0xff]);
}

#[test]
fn a_flush_reaches_the_disk() {
    let Some((_bench, disk, info)) = scene(&[], Double::in_memory(MIB)) else {
        return;
    };
    let file = open_direct(&info.path);
    // Setting the loop device up flushes too.
    let before = Double::get(&disk.flushes);
    for expected in 1..=3 {
        file.sync_all().unwrap();
        assert_eq!(Double::get(&disk.flushes) - before, expected);
    }
}

#[test]
fn detaching_a_device_in_use_is_refused_and_changes_nothing() {
    let Some((bench, _disk, info)) = scene(&[], Double::in_memory(MIB)) else {
        return;
    };
    let file = open_direct(&info.path);
    let refused = bench.exports.detach(&bench.name).unwrap_err();
    assert!(matches!(refused, DeviceError::Busy { .. }), "{refused}");
    assert!(
        refused.to_string().contains(&format!("pid {}", std::process::id())),
        "{refused}"
    );
    let (data, range) = aligned(4096, 1);
    file.write_all_at(&data[range], 0).unwrap();
    // It did not become one that vanishes with its last user.
    drop(file);
    let file = open_direct(&info.path);
    let (mut back, range) = aligned(4096, 0);
    file.read_exact_at(&mut back[range.clone()], 0).unwrap();
    assert_eq!(back[range.start], 1);
    drop(file);
    bench.exports.detach(&bench.name).unwrap();
}

/// udev opens a device that was written to for a moment, which is no use of it.
#[test]
fn a_look_into_the_device_does_not_keep_it_from_being_detached() {
    let Some((bench, disk, info)) = scene(&[], Double::in_memory(MIB)) else {
        return;
    };
    let file = open_direct(&info.path);
    let before = Double::get(&disk.flushes);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The detach has begun when it flushes; the look goes on over its first attempts.
            while Double::get(&disk.flushes) == before {
                std::thread::yield_now();
            }
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(150) {
                std::thread::yield_now();
            }
            drop(file);
        });
        bench.exports.detach(&bench.name).unwrap();
    });
}

#[test]
fn thirty_two_reads_wait_for_the_disk_at_once() {
    // No read returns before 32 are inside, so a shallower export would hang here.
    let Some((_bench, disk, info)) = scene(&["fio"], Double::in_memory(MIB).gated(32)) else {
        return;
    };
    std::thread::scope(|scope| {
        for i in 0..32u64 {
            let path = &info.path;
            scope.spawn(move || {
                let (mut back, range) = aligned(4096, 0);
                open_direct(path).read_exact_at(&mut back[range], i * 8192).unwrap();
            });
        }
    });
    assert_eq!(Double::get(&disk.reads), 32);
}

#[test]
fn a_read_only_disk_is_a_read_only_device() {
    let Some((_bench, _disk, info)) = scene(&[], Double::in_memory(MIB).read_only()) else {
        return;
    };
    assert_eq!(sys(&info, "ro"), "1");
    let write = File::options()
        .write(true)
        .open(&info.path)
        .and_then(|f| f.write_at(&[1; 4096], 0));
    assert!(write.is_err());
    let mut back = [1; 512];
    File::open(&info.path).unwrap().read_exact_at(&mut back, 0).unwrap();
    assert_eq!(back, [0; 512]);
}

#[test]
fn a_failing_disk_is_an_io_error_and_can_be_detached() {
    let Some((bench, disk, info)) = scene(&[], Double::in_memory(MIB)) else {
        return;
    };
    let file = open_direct(&info.path);
    disk.writes_fail.store(true, Ordering::SeqCst);
    let (data, range) = aligned(4096, 1);
    assert_eq!(
        file.write_at(&data[range], 0).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(file);
    let unclean = bench.exports.detach(&bench.name).unwrap_err();
    assert!(matches!(unclean, DeviceError::Flush { .. }), "{unclean}");
    assert!(!info.path.exists() && bench.exports.list().is_empty());
}
