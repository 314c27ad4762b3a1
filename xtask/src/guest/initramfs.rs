//! The guest's initial RAM file system: busybox, the modules that reach the disk, in the order they need each other.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What must be there before the root file system can be mounted. Those built into the kernel have no file.
const MODULES: [&str; 4] = ["crc32c_generic", "virtio_pci", "virtio_blk", "ext4"];

/// An archive in the format that the kernel unpacks at boot (`newc`, described in the kernel's
/// `Documentation/driver-api/early-userspace/buffer-format.rst`). Times and owners are zero, so equal contents make
/// equal archives.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.entries += 1;
        let links = 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            u32::try_from(data.len()).expect("a boot file is far below 4 GiB"),
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Adds a folder.
    pub fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    /// Adds an executable file.
    pub fn file(&mut self, name: &str, data: &[u8]) {
        self.entry(name, 0o100_755, (0, 0), data);
    }

    /// Adds a character device.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

/// Builds the initial RAM file system from unpacked packages.
///
/// # Errors
/// A module cannot be read or unpacked.
pub fn build(modules_root: &Path, busybox: &[u8], init: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "root", "modules"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("bin/busybox", busybox);
    archive.file("init", init.as_bytes());
    let mut order = String::new();
    for (name, data) in modules(modules_root)? {
        archive.file(&format!("modules/{name}.ko"), &data);
        order.push_str(&format!("{name}.ko\n"));
    }
    archive.file("modules.order", order.as_bytes());
    Ok(archive.finish())
}

/// The modules of [`MODULES`] and what they depend on, each after what it needs.
fn modules(root: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    find_modules(root, &mut files)?;
    let mut ordered = Vec::new();
    for module in MODULES {
        add_module(module, &files, &mut ordered)?;
    }
    Ok(ordered)
}

/// Every module below `folder` by its name, in which the kernel takes `-` and `_` for the same.
fn find_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find_modules(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|n| n.to_str())
            && let Some((module, "" | ".xz" | ".zst" | ".gz")) = name.split_once(".ko")
        {
            files.insert(module.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn add_module(name: &str, files: &BTreeMap<String, PathBuf>, ordered: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    let Some(path) = files.get(name) else { return Ok(()) };
    if ordered.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let data = unpacked(path)?;
    for needed in depends(&data) {
        add_module(&needed, files, ordered)?;
    }
    ordered.push((name.to_owned(), data));
    Ok(())
}

/// A module's bytes, whatever the distribution packs it with.
fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let out = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .output()
        .with_context(|| format!("cannot start {tool} to unpack {}; install it", path.display()))?;
    ensure!(
        out.status.success(),
        "{tool} cannot unpack {}: {}",
        path.display(),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(out.stdout)
}

/// The modules that a module names in its `depends=` line.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|w| w == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|b| *b == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|n| !n.is_empty())
        .map(|n| n.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_has_the_format_that_the_kernel_reads() {
        let mut archive = Archive::default();
        archive.file("init", b"hello");
        let bytes = archive.finish();
        let head = std::str::from_utf8(&bytes[..110]).unwrap();
        assert_eq!(&head[..6], "070701");
        assert_eq!(&head[14..22], "000081ed", "mode");
        assert_eq!(&head[54..62], "00000005", "size");
        assert_eq!(&head[94..102], "00000005", "length of the name with its zero");
        assert_eq!(&bytes[110..114], b"init");
        assert_eq!(&bytes[116..121], b"hello");
        assert!(bytes.len().is_multiple_of(4));
    }

    #[test]
    fn dependencies_stand_in_the_module_itself() {
        let module = b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(depends(module), ["virtio", "virtio_ring"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"no such thing").is_empty());
    }
}
