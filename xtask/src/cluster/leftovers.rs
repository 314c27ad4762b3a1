//! Mounts and loop devices that a killed daemon leaves behind: undone, but only those under our own folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;
use crate::step::note;

/// Undoes what is left under a folder when dropped.
#[derive(Debug)]
pub(super) struct Leftovers {
    dir: PathBuf,
}

impl Leftovers {
    pub(super) fn under(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        // Loop devices first: they hold the mounts busy.
        for device in loop_devices(&self.dir) {
            run(Command::new("losetup").arg("-d").arg(device));
        }
        for mount in mounts(&self.dir) {
            run(Command::new("umount").arg("-l").arg(mount));
        }
    }
}

fn run(command: &mut Command) {
    if let Err(error) = process::output(command) {
        note(format!("left behind: {error:#}"));
    }
}

/// Loop devices whose backing file lies under `dir`, as the kernel lists them.
fn loop_devices(dir: &Path) -> Vec<PathBuf> {
    let blocks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    blocks
        .filter_map(|entry| {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            backing
                .starts_with(dir.to_str()?)
                .then(|| Path::new("/dev").join(entry.file_name()))
        })
        .collect()
}

/// Mount points under `dir`, innermost first.
fn mounts(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<_> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .filter(|path| path.starts_with(dir))
        .collect();
    found.reverse();
    found
}
