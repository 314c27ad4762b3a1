//! The distribution's packages as parts of the golden image: found, downloaded and unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// Kernels, the smallest first: Debian's for virtual machines, Debian's, Ubuntu's for virtual machines, Ubuntu's.
const KERNELS: [&str; 4] = [
    "linux-image-cloud-amd64",
    "linux-image-amd64",
    "linux-image-virtual",
    "linux-image-generic",
];
/// The rest: the guest's tools, the boot loader, the program that puts it together, and a library of that.
const OTHERS: [&str; 4] = ["busybox-static", "grub-pc-bin", "grub-common", "libdevmapper1.02.1"];
/// Dependencies followed from a kernel's metapackage before it counts as broken.
const PACKAGES_MAX: usize = 8;

/// A package in the version that apt would install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    name: String,
    version: String,
}

impl Package {
    /// `name=version`, as apt takes it.
    pub fn exact(&self) -> String {
        format!("{}={}", self.name, self.version)
    }

    fn find(name: &str) -> Result<Option<Self>> {
        let policy = process::output(Command::new("apt-cache").args(["policy", name]).env("LC_ALL", "C"))?;
        let candidate = policy.lines().find_map(|l| l.trim().strip_prefix("Candidate: "));
        Ok(match candidate {
            None | Some("(none)") => None,
            Some(version) => Some(Self {
                name: name.into(),
                version: version.into(),
            }),
        })
    }
}

/// All packages that a golden image is made of.
///
/// # Errors
/// This is no Debian or Ubuntu, or its package lists are empty.
pub fn resolve() -> Result<Vec<Package>> {
    let hint = "run `apt-get update`; the golden image is built on Debian 12 or later, or Ubuntu 24.04";
    let mut kernel = None;
    for name in KERNELS {
        kernel = Package::find(name).context(hint)?;
        if kernel.is_some() {
            break;
        }
    }
    let Some(kernel) = kernel else {
        bail!("apt knows none of {}; {hint}", KERNELS.join(", "))
    };
    let mut found = vec![kernel];
    // The metapackage leads to the image, which may lead to modules packaged apart.
    let mut next = 0;
    while next < found.len() && found.len() < PACKAGES_MAX {
        for name in kernel_dependencies(&found[next].name)? {
            if found.iter().all(|p| p.name != name)
                && let Some(package) = Package::find(&name)?
            {
                found.push(package);
            }
        }
        next += 1;
    }
    for name in OTHERS {
        found.push(Package::find(name)?.with_context(|| format!("apt does not know {name}; {hint}"))?);
    }
    Ok(found)
}

fn kernel_dependencies(package: &str) -> Result<Vec<String>> {
    let shown = process::output(
        Command::new("apt-cache")
            .args(["depends", "--important", package])
            .env("LC_ALL", "C"),
    )?;
    let names = shown.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
    Ok(names.filter(|n| is_kernel(n)).map(str::to_owned).collect())
}

/// Whether a package holds one kernel version's files.
fn is_kernel(name: &str) -> bool {
    ["linux-image-", "linux-modules-"].iter().any(|start| {
        name.strip_prefix(start)
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// Downloads what `folder` does not hold yet, and returns the package files.
///
/// # Errors
/// The mirror cannot be reached.
pub fn download(packages: &[Package], folder: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut files = Vec::new();
    for package in packages {
        if let Some(file) = find_file(package, folder)? {
            files.push(file);
            continue;
        }
        process::output(
            Command::new("apt-get")
                .args(["download", "-q", &package.exact()])
                .current_dir(folder),
        )
        .with_context(|| {
            format!(
                "cannot download {}; check the network, or run `apt-get update`",
                package.exact()
            )
        })?;
        let file = find_file(package, folder)?;
        files
            .push(file.with_context(|| format!("apt-get downloaded {}, but no file of it appeared", package.exact()))?);
    }
    Ok(files)
}

fn find_file(package: &Package, folder: &Path) -> Result<Option<PathBuf>> {
    // apt writes an epoch's colon as %3a.
    let start = format!("{}_{}_", package.name, package.version.replace(':', "%3a"));
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        if entry
            .file_name()
            .to_str()
            .is_some_and(|n| n.starts_with(&start) && n.ends_with(".deb"))
        {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Unpacks package files over each other into `root`.
///
/// # Errors
/// One is damaged: it is removed, so that the next attempt downloads it again.
pub fn unpack(files: &[PathBuf], root: &Path) -> Result<()> {
    for file in files {
        let unpacked = process::output(Command::new("dpkg-deb").arg("-x").arg(file).arg(root));
        if unpacked.is_err() {
            let _ = fs::remove_file(file);
        }
        unpacked.with_context(|| format!("{} was damaged and is removed; try again", file.display()))?;
    }
    ensure!(root.is_dir(), "nothing was unpacked into {}", root.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_of_one_kernel_version_are_followed() {
        for good in ["linux-image-6.1.0-56-cloud-amd64", "linux-modules-6.8.0-31-generic"] {
            assert!(is_kernel(good), "{good}");
        }
        for bad in [
            "linux-image-amd64",
            "kmod",
            "linux-base",
            "linux-modules-extra-6.8.0-31-generic",
            "initramfs-tools",
        ] {
            assert!(!is_kernel(bad), "{bad}");
        }
    }
}
