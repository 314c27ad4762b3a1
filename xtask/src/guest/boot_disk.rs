//! A disk that a BIOS boots: partition table, GRUB in front of the only partition, ext4 in it. Made from files alone,
//! without root and without mounting anything.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;

/// Where the partition starts: a mebibyte, so that its blocks are aligned whatever an image's block size is.
const PARTITION_BYTES: u64 = 1 << 20;
const SECTOR_BYTES: u64 = 512;
/// Bytes of the first sector that are the boot loader's; the partition table follows.
const BOOT_CODE_BYTES: usize = 440;

/// Where the parts of a boot disk are.
pub struct Parts<'a> {
    /// Unpacked packages, with GRUB in them.
    pub unpacked: &'a Path,
    /// What goes into the file system.
    pub root: &'a Path,
    /// For files in between.
    pub scratch: &'a Path,
}

/// Writes the disk.
///
/// # Errors
/// A tool fails, or the contents do not fit.
pub fn write(parts: &Parts<'_>, command_line: &str, size_bytes: u64, disk: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", disk.display());
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(disk)
        .with_context(cannot)?;
    file.set_len(size_bytes).with_context(cannot)?;
    make_file_system(parts.root, size_bytes, disk)?;

    let grub = parts.unpacked.join("usr/lib/grub/i386-pc");
    let boot = fs::read(grub.join("boot.img")).context("the package grub-pc-bin has no boot.img")?;
    ensure!(
        boot.len() as u64 == SECTOR_BYTES,
        "GRUB's boot.img has {} bytes, not one sector",
        boot.len()
    );
    let core = make_core(parts, command_line)?;
    ensure!(
        (core.len() as u64) < PARTITION_BYTES - SECTOR_BYTES,
        "GRUB does not fit before the partition"
    );

    let mut first = [0; SECTOR_BYTES as usize];
    first[..BOOT_CODE_BYTES].copy_from_slice(&boot[..BOOT_CODE_BYTES]);
    first[446..462].copy_from_slice(&partition(size_bytes)?);
    first[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&first, 0).with_context(cannot)?;
    // GRUB's first sector looks for the rest of it right behind itself unless told otherwise.
    file.write_all_at(&core, SECTOR_BYTES).with_context(cannot)?;
    file.sync_all().with_context(cannot)
}

/// The table's entry for one bootable Linux partition over the rest of the disk.
fn partition(size_bytes: u64) -> Result<[u8; 16]> {
    let start = u32::try_from(PARTITION_BYTES / SECTOR_BYTES)?;
    let sectors = u32::try_from((size_bytes - PARTITION_BYTES) / SECTOR_BYTES).context("the disk is over 2 TiB")?;
    let mut entry = [0; 16];
    entry[0] = 0x80;
    // Cylinders, heads and sectors beyond what they can say: LBA counts.
    entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[4] = 0x83;
    entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    Ok(entry)
}

fn make_file_system(root: &Path, size_bytes: u64, disk: &Path) -> Result<()> {
    // Named one by one: newer versions of the tool turn on what the boot loader cannot read.
    let features = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                    large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
    let mut command = Command::new("mkfs.ext4");
    command
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-O", features])
        .args(["-L", "hearth-golden", "-U", "68656172-7468-4f67-8f6c-64656e000001"])
        .args([
            "-E",
            &format!("offset={PARTITION_BYTES},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"),
        ])
        .arg("-d")
        .arg(root)
        .arg(disk)
        .arg(format!("{}k", (size_bytes - PARTITION_BYTES) / 1024))
        // Debian keeps it where a user's PATH does not look.
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()),
        );
    process::output(&mut command).context("cannot make the golden image's file system; is e2fsprogs installed?")?;
    Ok(())
}

/// GRUB with all it needs built in, which boots without a menu.
fn make_core(parts: &Parts<'_>, command_line: &str) -> Result<Vec<u8>> {
    let script = parts.scratch.join("grub.cfg");
    let core = parts.scratch.join("core.img");
    fs::write(
        &script,
        format!("linux (hd0,msdos1)/boot/vmlinuz {command_line}\ninitrd (hd0,msdos1)/boot/initrd\nboot\n"),
    )
    .with_context(|| format!("cannot write {}", script.display()))?;
    let unpacked = parts.unpacked;
    let libraries =
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|l| unpacked.join(l).display().to_string());
    let mut command = Command::new(unpacked.join("usr/bin/grub-mkimage"));
    command
        .env("LD_LIBRARY_PATH", libraries.join(":"))
        .args(["-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-d"])
        .arg(unpacked.join("usr/lib/grub/i386-pc"))
        .arg("-c")
        .arg(&script)
        .arg("-o")
        .arg(&core)
        .args(["biosdisk", "part_msdos", "ext2", "linux", "boot"]);
    process::output(&mut command).context("cannot put the boot loader together")?;
    fs::read(&core).with_context(|| format!("cannot read {}", core.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_partition_fills_the_disk() {
        let entry = partition(300 << 20).unwrap();
        assert_eq!((entry[0], entry[4]), (0x80, 0x83));
        assert_eq!(u32::from_le_bytes(entry[8..12].try_into().unwrap()), 2048);
        assert_eq!(u32::from_le_bytes(entry[12..].try_into().unwrap()), 299 * 2048);
    }
}
