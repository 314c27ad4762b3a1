//! Finds and removes what a dead daemon left: loop devices, mounts and links below this daemon's roots.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use super::DeviceError;
use super::loop_dev::LoopDevice;
use super::session::MOUNT_TYPE;

/// Removes every device of ours below `mount_root` but those mounted on `kept`, and every link below `link_root` that
/// leads to no device.
pub(super) fn clean(mount_root: &Path, link_root: &Path, kept: &[PathBuf]) -> Result<(), DeviceError> {
    // Loop devices first: under a mount that is gone they can no longer be told from others.
    for (device, file) in LoopDevice::below(mount_root) {
        if !kept.contains(&file) {
            tracing::info!(
                "removing the loop device {} that an earlier daemon left",
                device.path().display()
            );
            remove_loop(device)?;
        }
    }
    for mount in mounts_below(mount_root)? {
        if !kept.contains(&mount) {
            tracing::info!("unmounting {} that an earlier daemon left", mount.display());
            remove_mount(&mount)?;
        }
    }
    let devices = LoopDevice::below(mount_root).into_iter();
    let in_service: Vec<PathBuf> = devices
        .filter(|(_, file)| kept.contains(file))
        .map(|(d, _)| d.path())
        .collect();
    for project in folders(link_root) {
        for link in fs::read_dir(&project).into_iter().flatten().flatten() {
            let link = link.path();
            if fs::read_link(&link).is_ok_and(|target| !in_service.contains(&target)) {
                remove_link(&link)?;
            }
        }
    }
    Ok(())
}

fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// Takes a loop device down, at the latest when its last user closes it.
pub(super) fn remove_loop(device: LoopDevice) -> Result<(), DeviceError> {
    device
        .clear_when_unused()
        .map_err(|e| DeviceError::step(format!("removing the loop device {}", device.path().display()), e))
}

/// Unmounts a file and removes the mount point; no mount is no error. If it is still open somewhere, its connection is
/// ended, so that nothing waits on it for ever.
pub(super) fn remove_mount(mount: &Path) -> Result<(), DeviceError> {
    let failed = |what: &str, e: io::Error| DeviceError::step(format!("{what} {}", mount.display()), e);
    match umount2(mount, MntFlags::empty()) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(_) => match umount2(mount, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH) {
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(e) => return Err(failed("unmounting", e.into())),
        },
    }
    remove_file(mount).map_err(|e| failed("removing the mount point", e))?;
    remove_empty_parent(mount);
    Ok(())
}

/// Removes a device's link.
pub(super) fn remove_link(link: &Path) -> Result<(), DeviceError> {
    remove_file(link).map_err(|e| DeviceError::step(format!("removing the link {}", link.display()), e))?;
    remove_empty_parent(link);
    Ok(())
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Removes the project's folder with its last image. One that is not empty stays.
fn remove_empty_parent(path: &Path) {
    if let Some(parent) = path.parent() {
        let _ = fs::remove_dir(parent);
    }
}

/// Mount points of ours below `root`, deepest mount first.
fn mounts_below(root: &Path) -> Result<Vec<PathBuf>, DeviceError> {
    let table =
        fs::read_to_string("/proc/self/mountinfo").map_err(|e| DeviceError::step("reading /proc/self/mountinfo", e))?;
    Ok(parse_mounts(&table, root))
}

fn parse_mounts(table: &str, root: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let kind = after.split(' ').next()?;
            let point = unescape(before.split(' ').nth(4)?);
            (kind == MOUNT_TYPE && point.starts_with(root)).then_some(point)
        })
        .collect();
    found.reverse();
    found
}

/// Undoes the octal escapes of `/proc/self/mountinfo` (space, tab, newline, backslash).
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_mounts_below_the_root_are_found() {
        let table = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:50 / /run/h/n1/p/a rw,nosuid - fuse.hearth hearth:p/a rw,user_id=0
41 22 0:51 / /run/h/n1/p/with\\040space rw,nosuid shared:7 - fuse.hearth hearth:p/b rw
42 22 0:52 / /run/h/n10/p/c rw - fuse.hearth hearth:p/c rw
43 22 0:53 / /run/h/n1/other rw - tmpfs tmpfs rw
";
        assert_eq!(
            parse_mounts(table, Path::new("/run/h/n1")),
            [PathBuf::from("/run/h/n1/p/with space"), PathBuf::from("/run/h/n1/p/a")]
        );
    }
}
