//! The golden image: a bootable disk built from the distribution's packages, once per content.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::boot_disk::{self, Parts};
use super::{initramfs, packages};
use crate::process;

/// Changed whenever the way of building changes in a manner that the other inputs of the key do not show.
const BUILD_VERSION: u32 = 1;
/// Room for kernel, initial RAM file system, busybox, journal and the file system's own tables.
const SYSTEM_MIB: u64 = 80;
/// Data that the workload reads and writes, unless chosen otherwise.
pub const DATA_MIB: u64 = 192;

const WORKLOAD: &str = include_str!("workload.rs");
const INITRAMFS_INIT: &str = include_str!("initramfs-init.sh");
const ROOT_INIT: &str = include_str!("root-init.sh");
/// What GRUB gives the kernel. The panic setting makes QEMU end instead of showing a dead machine for ever.
const COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=1 panic=-1 random.trust_cpu=on tsc=reliable nomodeset";

/// Builds the golden image with [`DATA_MIB`] of data, or finds it in `cache` if it was built before.
///
/// # Errors
/// See [`build_golden_with`].
pub fn build_golden(cache: &Path) -> Result<PathBuf> {
    build_golden_with(cache, DATA_MIB)
}

/// Builds a golden image with `data_mib` of data for the workload, or finds it in `cache`. The result is a raw disk
/// image; it is never changed in place.
///
/// # Errors
/// Packages cannot be had, or a tool is missing or fails.
pub fn build_golden_with(cache: &Path, data_mib: u64) -> Result<PathBuf> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "guests are built for x86_64 only; run the demo without guests on this machine"
    );
    let folder = cache.join("golden");
    let packages = packages::resolve()?;
    let exact: Vec<String> = packages.iter().map(packages::Package::exact).collect();
    let key = key(&[
        &BUILD_VERSION.to_string(),
        &data_mib.to_string(),
        &exact.join(" "),
        WORKLOAD,
        INITRAMFS_INIT,
        ROOT_INIT,
        COMMAND_LINE,
    ]);
    let image = folder.join(format!("golden-{key:016x}.raw"));
    if image.is_file() {
        return Ok(image);
    }
    let debs = packages::download(&packages, &folder.join("debs"))?;
    let scratch = tempfile::Builder::new()
        .prefix("build-")
        .tempdir_in(&folder)
        .with_context(|| format!("cannot make a folder in {}", folder.display()))?;
    let unpacked = scratch.path().join("unpacked");
    let root = scratch.path().join("root");
    packages::unpack(&debs, &unpacked)?;
    make_root(&unpacked, &root, scratch.path(), data_mib)?;
    let disk = scratch.path().join("disk.raw");
    let parts = Parts {
        unpacked: &unpacked,
        root: &root,
        scratch: scratch.path(),
    };
    boot_disk::write(&parts, COMMAND_LINE, (SYSTEM_MIB + data_mib) << 20, &disk)?;
    // Complete under its name or not there at all.
    fs::rename(&disk, &image).with_context(|| format!("cannot put {} in place", image.display()))?;
    Ok(image)
}

/// FNV-1a over the parts with their lengths: names a build, guards against nothing hostile.
fn key(parts: &[&str]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    let mut take = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for part in parts {
        take(&part.len().to_le_bytes());
        take(part.as_bytes());
    }
    hash
}

/// Fills the folder that becomes the guest's root file system.
fn make_root(unpacked: &Path, root: &Path, scratch: &Path, data_mib: u64) -> Result<()> {
    for folder in ["bin", "boot", "data", "dev", "proc", "sbin", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder)).with_context(|| format!("cannot make {folder} for the guest"))?;
    }
    let busybox = read_first(unpacked, &["bin/busybox", "usr/bin/busybox"])?;
    let workload = compile_workload(scratch)?;
    executable(&root.join("bin/busybox"), &busybox)?;
    executable(&root.join("sbin/init"), ROOT_INIT.as_bytes())?;
    fs::copy(&workload, root.join("bin/workload")).context("cannot copy the workload for the guest")?;

    let kernel = only_with_prefix(&unpacked.join("boot"), "vmlinuz-")?;
    fs::copy(&kernel, root.join("boot/vmlinuz")).with_context(|| format!("cannot copy {}", kernel.display()))?;
    let modules = ["lib/modules", "usr/lib/modules"].map(|m| unpacked.join(m));
    let modules = modules
        .iter()
        .find(|m| m.is_dir())
        .context("the kernel's package holds no modules")?;
    let initrd = initramfs::build(modules, &busybox, INITRAMFS_INIT)?;
    fs::write(root.join("boot/initrd"), initrd).context("cannot write the initial RAM file system")?;

    let mut make = Command::new(&workload);
    make.arg("make").arg(root.join("data/pages")).arg(data_mib.to_string());
    process::output(&mut make).context("cannot fill the guest's data file")?;
    Ok(())
}

/// Compiles the guest's program so that it needs nothing but a kernel.
fn compile_workload(scratch: &Path) -> Result<PathBuf> {
    let source = scratch.join("workload.rs");
    let program = scratch.join("workload");
    fs::write(&source, WORKLOAD).with_context(|| format!("cannot write {}", source.display()))?;
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command
        .args([
            "--edition",
            "2024",
            "--crate-name",
            "workload",
            "-O",
            "-C",
            "target-feature=+crt-static",
        ])
        .args(["-C", "strip=symbols", "-o"])
        .arg(&program)
        .arg(&source)
        // Not the settings of the workspace's own build, which may ask for another target.
        .env_remove("RUSTFLAGS");
    process::output(&mut command)
        .context("cannot compile the guest's workload; is libc6-dev (build-essential) installed?")?;
    Ok(program)
}

fn executable(path: &Path, data: &[u8]) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    fs::write(path, data).with_context(cannot)?;
    File::open(path)
        .and_then(|f| f.set_permissions(fs::Permissions::from_mode(0o755)))
        .with_context(cannot)
}

fn read_first(unpacked: &Path, candidates: &[&str]) -> Result<Vec<u8>> {
    let found = candidates.iter().map(|c| unpacked.join(c)).find(|p| p.is_file());
    let found = found.with_context(|| format!("the packages hold none of {}", candidates.join(", ")))?;
    fs::read(&found).with_context(|| format!("cannot read {}", found.display()))
}

fn only_with_prefix(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_name().to_str().is_some_and(|n| n.starts_with(prefix)))
        .map(|e| e.path())
        .collect();
    ensure!(
        found.len() == 1,
        "expected one {prefix}* in {}, found {}",
        folder.display(),
        found.len()
    );
    Ok(found.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_depends_on_every_part_and_its_borders() {
        let keys = [
            key(&["a", "b"]),
            key(&["ab", ""]),
            key(&["", "ab"]),
            key(&["b", "a"]),
            key(&["a", "b", ""]),
        ];
        for (i, a) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|b| a != b), "{keys:x?}");
        }
    }
}
