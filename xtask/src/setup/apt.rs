//! Packages of Debian 12, 13 and Ubuntu 24.04.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{How, Missing, Purpose, strict};
use crate::process;
use crate::step::{note, step};
use crate::workspace::Workspace;

/// How one sees that a package's content is there, whoever installed it.
enum Present {
    /// A program on `PATH`.
    Program(&'static str),
    /// libclang with its development link, in any version.
    Libclang,
}

struct Package {
    name: &'static str,
    present: Present,
    why: &'static str,
    needed: Needed,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Needed {
    /// Nothing compiles without it.
    ToBuild,
    /// The demo's guests, and the tests.
    ByDemo,
    /// Stock clients that only tests use.
    ByTests,
}

const fn program(name: &'static str, program: &'static str, why: &'static str, needed: Needed) -> Package {
    Package {
        name,
        present: Present::Program(program),
        why,
        needed,
    }
}

const PACKAGES: &[Package] = &[
    program("g++", "c++", "compiles RocksDB", Needed::ToBuild),
    Package {
        name: "libclang-dev",
        present: Present::Libclang,
        why: "reads RocksDB's headers",
        needed: Needed::ToBuild,
    },
    program("qemu-system-x86", "qemu-system-x86_64", "runs guests", Needed::ByDemo),
    program("e2fsprogs", "mkfs.ext4", "makes the golden image", Needed::ByDemo),
    program("xz-utils", "xz", "unpacks the guest's modules", Needed::ByDemo),
    program("zstd", "zstd", "unpacks the guest's modules", Needed::ByDemo),
    program("qemu-utils", "qemu-img", "stock client", Needed::ByTests),
    program("libnbd-bin", "nbdinfo", "stock client", Needed::ByTests),
    program("python3-libnbd", "nbdsh", "stock client", Needed::ByTests),
    program(
        "nbdkit",
        "nbdkit",
        "the peer that benchmarks compare with",
        Needed::ByTests,
    ),
    program("fio", "fio", "load with verification", Needed::ByTests),
    program("iproute2", "ip", "networks that tests take apart", Needed::ByTests),
    program("nftables", "nft", "networks that tests take apart", Needed::ByTests),
];

pub(super) fn missing(workspace: &Workspace, purpose: Purpose) -> Vec<Missing> {
    let lists = lists_are_empty(workspace).then(|| Missing {
        what: "package lists".into(),
        why: "the golden image is made of packages",
        how: How::AptLists,
    });
    PACKAGES
        .iter()
        .filter(|package| purpose == Purpose::Test || package.needed != Needed::ByTests)
        .filter(|package| !is_present(workspace, &package.present))
        .map(|package| Missing {
            what: package.name.into(),
            why: package.why,
            how: How::Apt {
                required: package.needed == Needed::ToBuild,
            },
        })
        .chain(lists)
        .collect()
}

/// Whether apt has never been told what there is, as in a fresh container.
fn lists_are_empty(workspace: &Workspace) -> bool {
    let Some(apt_cache) = workspace.find_program("apt-cache") else {
        return false;
    };
    process::output(Command::new(apt_cache).args(["show", "--no-all-versions", "grub-pc-bin"])).is_err()
}

fn is_present(workspace: &Workspace, present: &Present) -> bool {
    match present {
        Present::Program(name) => workspace.find_program(name).is_some(),
        Present::Libclang => has_libclang(),
    }
}

/// Looks where Debian and Ubuntu put `libclang.so` and where a distribution without versions does.
fn has_libclang() -> bool {
    let versioned = Path::new("/usr/lib").read_dir().into_iter().flatten().flatten();
    versioned
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("llvm"))
        })
        .map(|path| path.join("lib"))
        .chain(["/usr/lib".into(), "/usr/lib64".into()])
        .any(|dir| dir.join("libclang.so").exists())
}

pub(super) fn install(workspace: &Workspace, missing: &[Missing]) -> Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .filter(|m| matches!(m.how, How::Apt { .. }))
        .map(|m| m.what.as_str())
        .collect();
    let wants_lists = missing.iter().any(|m| m.how == How::AptLists);
    if packages.is_empty() && !wants_lists {
        return Ok(());
    }
    let required = missing.iter().any(|m| m.how == How::Apt { required: true });
    match step(&format!("fetch package lists, install {}", packages.join(" ")), || {
        apt_get(workspace, &["update"])?;
        if packages.is_empty() {
            return Ok(());
        }
        let mut words = vec!["install", "-y", "--no-install-recommends", "--no-remove"];
        words.extend(&packages);
        let Err(error) = apt_get(workspace, &words) else {
            return Ok(());
        };
        // What somebody installed from elsewhere may be in the way, as newer qemu-utils are. It is his; only a run
        // that insists may replace it, and then all that was needed is looked for again.
        if !strict() {
            return Err(error);
        }
        words.retain(|word| *word != "--no-remove");
        apt_get(workspace, &words)?;
        let lost: Vec<&str> = PACKAGES
            .iter()
            .filter(|package| !is_present(workspace, &package.present))
            .map(|package| package.name)
            .collect();
        if lost.is_empty() {
            return Ok(());
        }
        note(format!("{} had to make room, and is installed again", lost.join(" ")));
        let mut words = vec!["install", "-y", "--no-install-recommends"];
        words.extend(lost);
        apt_get(workspace, &words)
    }) {
        Err(error) if required || strict() => Err(error.context(format!(
            "install these packages yourself, then run this again: {}",
            packages.join(" ")
        ))),
        Err(error) => {
            note(format!("going on without {}: {error:#}", packages.join(" ")));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn apt_get(workspace: &Workspace, words: &[&str]) -> Result<()> {
    let apt = workspace
        .find_program("apt-get")
        .context("there is no apt-get here; only Debian and Ubuntu are set up by themselves")?;
    // SAFETY: geteuid has no arguments, no failure and no side effect.
    let mut command = if unsafe { libc::geteuid() } == 0 {
        Command::new(apt)
    } else if process::succeeds(Command::new("sudo").args(["-n", "true"])) {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "--preserve-env=DEBIAN_FRONTEND"]).arg(apt);
        sudo
    } else {
        bail!("apt-get needs root, and sudo asks for a password");
    };
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .args(words);
    process::output(&mut command).map(drop)
}
