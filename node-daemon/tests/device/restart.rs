//! Daemons that die: with a descriptor holder the device lives on, without one its remains are cleaned up.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;

use hearth_node::export::device::{DeviceExports, DeviceOptions};
use hearth_node::export::fdstore::FdStore;

use super::double::Double;
use super::{MIB, aligned, name, open_direct, options, runs};

/// Folder that a child process serves from; set only for children of these tests.
const CHILD_FOLDER: &str = "HEARTH_TEST_DEVICE_CHILD";
/// Whether the child leaves its connections with a holder.
const CHILD_HOLDS: &str = "HEARTH_TEST_DEVICE_HOLDS";

fn holder_options(folder: &Path) -> DeviceOptions {
    let holder = Path::new(env!("CARGO_BIN_EXE_hearth-fd-holder"));
    let store = FdStore::connect_or_start(&folder.join("holder.sock"), holder).unwrap();
    DeviceOptions {
        fdstore: Some(Arc::new(store)),
        ..options(folder)
    }
}

/// Not a test by itself: what the children of the tests below run.
#[test]
fn child_daemon() {
    let Some(folder) = std::env::var_os(CHILD_FOLDER).map(PathBuf::from) else {
        return;
    };
    let options = if std::env::var_os(CHILD_HOLDS).is_some() {
        holder_options(&folder)
    } else {
        options(&folder)
    };
    let exports = DeviceExports::new(options).unwrap();
    let waiting = exports.waiting().len();
    let disk = Arc::new(Double::in_file(&folder.join("disk")).half_in_ram());
    let info = exports.attach(&name(), disk).unwrap();
    println!("\nserving {waiting} {} {}", info.survives_restart, info.node.display());
    // Until killed, or until the parent is gone.
    let _ = std::io::stdin().lines().next();
    exports.detach(&name()).unwrap();
    println!("\ndetached");
}

/// A daemon of its own process, killed when dropped.
pub struct Daemon {
    child: Child,
    output: BufReader<ChildStdout>,
    /// Devices that it took over.
    pub waiting: usize,
    pub survives: bool,
    /// The device.
    pub node: PathBuf,
}

impl Daemon {
    /// Serves the file `disk` in `folder`, which is made if it is missing.
    pub fn start(folder: &Path, holds: bool) -> Self {
        let disk = folder.join("disk");
        if !disk.exists() {
            File::create(&disk).unwrap().set_len(64 * MIB).unwrap();
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "restart::child_daemon", "--nocapture"]);
        command
            .env(CHILD_FOLDER, folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if holds {
            command.env(CHILD_HOLDS, "1");
        }
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let words = wait_for(&mut output, "serving");
        let node = PathBuf::from(&words[3]);
        Self {
            child,
            output,
            waiting: words[1].parse().unwrap(),
            survives: words[2] == "true",
            node,
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Lets it detach and end by itself.
    pub fn finish(mut self) {
        drop(self.child.stdin.take());
        wait_for(&mut self.output, "detached");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for(output: &mut impl BufRead, first: &str) -> Vec<String> {
    for line in output.lines() {
        let words: Vec<String> = line.unwrap().split(' ').map(str::to_string).collect();
        if words[0] == first {
            return words;
        }
    }
    panic!("the child ended without saying {first:?}");
}

/// A daemon whose device survives it; `None` where the kernel has no such device.
fn surviving() -> Option<(tempfile::TempDir, Daemon)> {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(folder.path(), true);
    if !daemon.survives {
        println!("SKIP: this kernel cannot send FUSE requests again");
        daemon.finish();
        return None;
    }
    Some((folder, daemon))
}

#[test]
fn users_of_the_device_only_wait_while_the_daemon_is_killed_and_restarted() {
    if !runs(&["fio"]) {
        return;
    }
    let Some((folder, mut daemon)) = surviving() else {
        return;
    };
    assert_eq!(daemon.waiting, 0);
    let node = daemon.node.clone();
    let mut fio = Command::new("fio")
        .args([
            "--name=verify",
            "--ioengine=libaio",
            "--direct=1",
            "--iodepth=32",
            "--rw=randrw",
            "--bs=4k",
        ])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--verify_backlog=64",
            "--size=64m",
            "--loops=100",
        ])
        .args(["--time_based", "--runtime=6", "--output-format=json"])
        .arg(format!("--filename={}", node.display()))
        .arg(format!("--output={}", folder.path().join("fio.json").display()))
        .spawn()
        .unwrap();
    let file = open_direct(&node);
    for round in 0..8 {
        // fio has 32 requests under way at any time.
        daemon.kill();
        daemon = Daemon::start(folder.path(), true);
        assert_eq!((daemon.waiting, &daemon.node), (1, &node), "round {round}");
        let (mut back, range) = aligned(4096, 0);
        file.read_exact_at(&mut back[range], 0).unwrap();
    }
    let status = fio.wait().unwrap();
    let report = fs::read_to_string(folder.path().join("fio.json")).unwrap();
    assert!(status.success(), "{report}");
    let report: serde_json::Value = serde_json::from_str(&report[report.find('{').unwrap()..]).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0);
    println!(
        "fio: {} writes, {} reads",
        job["write"]["total_ios"], job["read"]["total_ios"]
    );
    drop(file);
    daemon.finish();
}

#[test]
fn a_killed_daemons_remains_are_cleaned_up() {
    if !runs(&[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(folder.path(), false);
    assert!(!daemon.survives);
    let mounted = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(folder.path().to_str().unwrap())
    };
    assert!(mounted());
    daemon.kill();
    let mut byte = [0];
    assert!(
        File::open(&daemon.node).unwrap().read_exact_at(&mut byte, 0).is_err(),
        "nobody answers"
    );
    let exports = DeviceExports::new(options(folder.path())).unwrap();
    assert!(exports.waiting().is_empty() && !mounted());
    assert_eq!(fs::read_dir(folder.path().join("dev")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(folder.path().join("mnt")).unwrap().count(), 0);
}

#[test]
fn a_device_nobody_wants_any_more_is_given_up() {
    if !runs(&[]) {
        return;
    }
    let Some((folder, mut daemon)) = surviving() else {
        return;
    };
    let file = open_direct(&daemon.node);
    daemon.kill();
    let waiting_read = std::thread::spawn(move || {
        let (mut back, range) = aligned(4096, 0);
        file.read_exact_at(&mut back[range], 0)
    });
    let exports = DeviceExports::new(holder_options(folder.path())).unwrap();
    let waiting = exports.waiting();
    assert_eq!(
        (waiting.len(), &waiting[0].name, waiting[0].size_bytes),
        (1, &name(), 64 * MIB)
    );
    assert_eq!(exports.give_up_waiting().unwrap(), [name()]);
    assert!(
        waiting_read.join().unwrap().is_err(),
        "its user gets an error, and no longer waits"
    );
    assert!(exports.waiting().is_empty());
    assert_eq!(fs::read_dir(folder.path().join("mnt")).unwrap().count(), 0);
}
