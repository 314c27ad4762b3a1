//! The kernel block device: Hearth's FUSE file under a loop device, against QEMU's.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::peers::{hearth, start};
use super::{MEMORY_BYTES, Options, load};
use crate::report::{Spread, Table};

const READ_BYTES: usize = 4 << 10;

/// A device whose server ends with this.
struct Device {
    name: &'static str,
    path: PathBuf,
    child: Child,
    /// Set up by us, not by the server.
    looped: bool,
}

impl Device {
    fn hearth(dir: &Path) -> Result<Self> {
        let path = dir.join("dev/bench/disk");
        let child = start(
            hearth(MEMORY_BYTES, &[Path::new("device"), dir])?,
            Stdio::piped(),
            || path.exists(),
        )?;
        Ok(Self {
            name: "hearth",
            path,
            child,
            looped: false,
        })
    }

    fn qemu(dir: &Path, in_memory: &Path) -> Result<Self> {
        let (backing, mount) = (in_memory.join("backing"), dir.join("mount"));
        let file = File::create(&backing)?;
        let data = vec![0x5a; 1 << 20];
        for offset in (0..MEMORY_BYTES).step_by(data.len()) {
            file.write_all_at(&data, offset)?;
        }
        File::create(&mount)?;
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", backing.display()))
            .arg("--export")
            .arg(format!(
                "type=fuse,id=export,node-name=disk,writable=on,mountpoint={}",
                mount.display()
            ));
        let child = start(command, Stdio::null(), || {
            mount.metadata().is_ok_and(|found| found.len() == MEMORY_BYTES)
        })?;
        let mut device = Self {
            name: "qemu-storage-daemon --export fuse",
            path: PathBuf::new(),
            child,
            looped: true,
        };
        let made = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", "4096"])
            .arg(&mount)
            .output()
            .context("running losetup, from util-linux")?;
        ensure!(
            made.status.success(),
            "losetup: {}",
            String::from_utf8_lossy(&made.stderr).trim()
        );
        device.path = String::from_utf8(made.stdout)?.trim().into();
        Ok(device)
    }

    /// Random direct reads by `threads` threads; operations per second and the server's processor time for each.
    fn measure(&self, threads: u64, length: Duration) -> Result<(f64, f64)> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .with_context(|| format!("opening {}", self.path.display()))?;
        let cpu_before = load::cpu_time(self.child.id())?;
        let (started, over) = (Instant::now(), AtomicBool::new(false));
        let reads = std::thread::scope(|scope| {
            let run = |seed| {
                let (file, over) = (&file, &over);
                scope.spawn(move || read_at_random(file, seed, over))
            };
            let running: Vec<_> = (1..=threads).map(run).collect();
            std::thread::sleep(length);
            over.store(true, Ordering::Relaxed);
            running
                .into_iter()
                .map(|thread| thread.join().expect("a reader does not panic"))
                .sum::<std::io::Result<u64>>()
        })?;
        let took = started.elapsed();
        let cpu = load::cpu_time(self.child.id())? - cpu_before;
        Ok((
            reads as f64 / took.as_secs_f64(),
            cpu.as_secs_f64() * 1e6 / reads as f64,
        ))
    }
}

fn read_at_random(file: &File, seed: u64, over: &AtomicBool) -> std::io::Result<u64> {
    let mut memory = vec![0u8; 2 * READ_BYTES];
    let aligned = memory.as_ptr().align_offset(READ_BYTES);
    let buffer = &mut memory[aligned..][..READ_BYTES];
    let (mut state, mut done) = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15), 0);
    while !over.load(Ordering::Relaxed) {
        let page = load::random(&mut state) % (MEMORY_BYTES / READ_BYTES as u64);
        file.read_exact_at(buffer, page * READ_BYTES as u64)?;
        done += 1;
    }
    Ok(done)
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.looped {
            let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
            // QEMU's unmounts when it is asked to end.
            // SAFETY: a signal to our own child, which was not waited for yet.
            unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        }
        // Hearth's takes its device away when its input ends.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Measures both in turn.
///
/// # Errors
/// A device that cannot be had, or a failed read.
pub fn compare(options: &Options) -> Result<String> {
    let heading = "4 KiB random direct reads of RAM through a kernel block device (FUSE + loop)";
    if !options.wants(heading) {
        return Ok(String::new());
    }
    eprintln!("{heading}");
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
    let in_memory = tempfile::tempdir_in("/dev/shm")?;
    let devices = [
        Device::hearth(dirs[0].path())?,
        Device::qemu(dirs[1].path(), in_memory.path())?,
    ];
    let columns = ["server", "threads", "operations/s", "server CPU µs per operation"];
    let mut table = Table::new(heading, &columns);
    let mut notes = Vec::new();
    for threads in [1, 16] {
        let mut figures = [Vec::new(), Vec::new()];
        for _ in 0..options.rounds.max(1) {
            for (device, figures) in devices.iter().zip(&mut figures) {
                figures.push(device.measure(threads, Duration::from_secs_f64(options.seconds))?);
            }
        }
        for (device, figures) in devices.iter().zip(&figures) {
            table.row(&[
                device.name.to_owned(),
                threads.to_string(),
                Spread::new(figures.iter().map(|f| f.0).collect()).to_string(),
                Spread::new(figures.iter().map(|f| f.1).collect()).to_string(),
            ]);
        }
        let ratios = figures[0]
            .iter()
            .zip(&figures[1])
            .map(|(ours, theirs)| ours.0 / theirs.0);
        let ratios = Spread::new(ratios.collect());
        let verdict = ratios.at_least(1.5);
        notes.push(format!(
            "{threads} threads, round by round: {ratios} × operations/s{verdict}."
        ));
    }
    notes.iter().for_each(|note| table.note(note));
    Ok(table.finish())
}
