//! Nightly Rust with its library source, and bpf-linker: they build the eBPF programs and nothing else.
//!
//! bpf-linker is built against the LLVM that the nightly compiler itself ships, so it needs no LLVM packages and
//! always speaks that compiler's bitcode.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace::Workspace;

/// The newest bpf-linker that the pinned aya was tested with.
const BPF_LINKER: &str = "bpf-linker@0.13.0";

/// A program of the nightly toolchain.
pub fn nightly(workspace: &Workspace, program: &str) -> Command {
    let mut command = workspace.command("rustup");
    command.args(["run", "nightly", program]);
    // `cargo xtask` runs under one toolchain and tells its children so; these want the other one.
    for name in ["RUSTUP_TOOLCHAIN", "RUSTC", "CARGO"] {
        command.env_remove(name);
    }
    command
}

/// Whether the nightly toolchain has clippy.
pub fn has_nightly_clippy(workspace: &Workspace) -> bool {
    process::succeeds(nightly(workspace, "cargo-clippy").arg("--version"))
}

/// Root of the nightly toolchain.
fn sysroot(workspace: &Workspace) -> Result<PathBuf> {
    process::output(nightly(workspace, "rustc").args(["--print", "sysroot"])).map(PathBuf::from)
}

/// LLVM's major version in that toolchain.
fn llvm_major(workspace: &Workspace) -> Result<u32> {
    let said = process::output(nightly(workspace, "rustc").args(["--version", "--verbose"]))?;
    said.lines()
        .find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse().ok())
        .with_context(|| format!("nightly rustc does not say its LLVM version:\n{said}"))
}

/// The LLVM library of a toolchain, such as `libLLVM.so.22.1-rust-1.97.0-nightly`.
fn llvm_library(sysroot: &Path) -> Result<PathBuf> {
    let dir = sysroot.join("lib");
    fs::read_dir(&dir)
        .with_context(|| format!("cannot list {}", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("libLLVM.so."))
        })
        .with_context(|| format!("there is no libLLVM.so.* in {}", dir.display()))
}

pub(super) fn check_nightly(workspace: &Workspace) -> Result<(), String> {
    let sysroot = sysroot(workspace).map_err(|_| "not installed".to_owned())?;
    let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
    if source.exists() {
        Ok(())
    } else {
        Err("rust-src is not installed".into())
    }
}

pub(super) fn install_nightly(workspace: &Workspace) -> Result<()> {
    if sysroot(workspace).is_err() {
        let words = ["toolchain", "install", "nightly", "--profile", "minimal"];
        process::output(workspace.command("rustup").args(words))?;
    }
    let words = ["component", "add", "rust-src", "--toolchain", "nightly"];
    process::output(workspace.command("rustup").args(words)).map(drop)
}

/// A bpf-linker is fit when it runs and its LLVM is the one that nightly's bitcode is written by.
pub(super) fn check_bpf_linker(workspace: &Workspace) -> Result<(), String> {
    let path = workspace.find_program("bpf-linker").ok_or("not found")?;
    process::output(Command::new(&path).arg("--version"))
        .map_err(|error| format!("{} does not run: {error:#}", path.display()))?;
    let linked = process::output(Command::new("ldd").arg(&path)).map_err(|error| format!("{error:#}"))?;
    let Some(library) = linked.lines().find(|line| line.contains("libLLVM")) else {
        // Linked statically: nobody can say against what, so its owner is trusted.
        return Ok(());
    };
    let major = llvm_major(workspace).map_err(|error| format!("{error:#}"))?;
    let names = [
        format!("libLLVM.so.{major}."),
        format!("libLLVM-{major}"),
        format!("libLLVM.so.{major}-"),
    ];
    if names.iter().any(|name| library.contains(name.as_str())) {
        Ok(())
    } else {
        Err(format!(
            "{} is linked against `{}`, nightly has LLVM {major}",
            path.display(),
            library.trim()
        ))
    }
}

pub(super) fn install_bpf_linker(workspace: &Workspace) -> Result<()> {
    let sysroot = sysroot(workspace)?;
    let library = llvm_library(&sysroot)?;
    let major = llvm_major(workspace)?;
    let prefix = tempfile::tempdir().context("cannot make a temporary folder")?;
    let lib = prefix.path().join("lib");
    fs::create_dir(&lib)?;
    std::os::unix::fs::symlink(&library, lib.join("libLLVM.so"))?;
    process::output(
        workspace
            .command("cargo")
            .args(["install", BPF_LINKER, "--force", "--no-default-features", "--features"])
            .arg(format!("llvm-{major}"))
            // Into cargo's own folder of programs, where plain `cargo build` finds it too.
            // Build output in a folder of its own: it must not share locks or flags with the workspace's build.
            .env("CARGO_TARGET_DIR", workspace.cache.join("bpf-linker-target"))
            .env("LLVM_PREFIX", prefix.path())
            .env(
                "RUSTFLAGS",
                format!("-C link-arg=-Wl,-rpath,{}", sysroot.join("lib").display()),
            ),
    )?;
    check_bpf_linker(workspace).map_err(|why| anyhow::anyhow!("the bpf-linker just built is unfit: {why}"))
}
