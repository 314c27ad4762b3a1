//! QEMU's own NBD client over restarts of the server: stalled, never failed, as long as the listening socket stays
//! open and the disk has `reconnect-delay`.

mod nbd_support;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::{NbdLimits, NbdServer};
use nbd_support::{EXPORT, Served, have};

const MIB: u64 = 1 << 20;

/// `qemu-io`, fed line by line.
struct QemuIo {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl QemuIo {
    fn new(socket: &Path) -> Self {
        let options = format!(
            "driver=nbd,server.type=unix,server.path={},export={EXPORT},reconnect-delay=30",
            socket.display()
        );
        let mut child = Command::new("qemu-io")
            .args(["--image-opts", &options])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        let input = child.stdin.take().expect("a pipe");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, input, output }
    }

    fn send(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("qemu-io listens");
    }

    /// What it says next that is an answer: a transfer's first line, or a failure.
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert!(
                self.output.read_line(&mut line).expect("qemu-io answers") > 0,
                "qemu-io ended"
            );
            if line.contains("bytes at offset") || line.contains("failed") || line.contains("error") {
                return line.trim_start_matches("qemu-io> ").to_owned();
            }
        }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = writeln!(self.input, "quit");
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qemu_sees_no_error_over_restarts() {
    if !have(&["qemu-io"]) {
        return;
    }
    let disk = Arc::new(MemoryDisk::new(8 * MIB));
    // Writes and reads both take the way through the workers.
    (0..disk.blocks())
        .step_by(2)
        .for_each(|block| disk.set_in_ram(block, false));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("held.sock");
    let holder = UnixListener::bind(&path).unwrap();
    let start = || {
        let server = NbdServer::from_fd(OwnedFd::from(holder.try_clone().unwrap())).unwrap();
        let table = Arc::new(OneExport::shared(EXPORT, disk.clone() as Arc<dyn Disk>));
        Served::start(
            tempfile::tempdir().unwrap(),
            path.clone(),
            server,
            table,
            NbdLimits::default(),
        )
    };
    let mut served = start();
    let mut qemu = QemuIo::new(&path);
    for round in 1..=5_u64 {
        qemu.send(&format!("write -P {round} {round}M 1M"));
        let answer = qemu.answer();
        assert!(answer.starts_with("wrote 1048576/1048576"), "{answer}");
        served.stop();
        // Sent while nobody accepts: it waits for the next server.
        qemu.send(&format!("write -P {} {}k 64k", round + 100, round * 64));
        served = start();
        let answer = qemu.answer();
        assert!(answer.starts_with("wrote 65536/65536"), "{answer}");
        qemu.send(&format!("read -P {round} {round}M 1M"));
        let answer = qemu.answer();
        assert!(answer.starts_with("read 1048576/1048576"), "{answer}");
    }
    let mut byte = [0];
    for round in 1..=5_u64 {
        disk.read(round << 16, &mut byte).unwrap();
        assert_eq!(u64::from(byte[0]), round + 100);
    }
}
