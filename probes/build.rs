//! Builds the eBPF programs with the nightly compiler and bpf-linker, and leaves the object in `OUT_DIR`.
//!
//! Without those tools the build goes on with a warning and an empty object, and loading the probes says what to
//! install; with `HEARTH_REQUIRE_EBPF=1` the build fails instead.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The package of the programs, and the name of its only binary.
const PACKAGE: &str = "hearth-probes-ebpf";
const REQUIRE: &str = "HEARTH_REQUIRE_EBPF";

fn main() -> anyhow::Result<()> {
    let out = PathBuf::from(variable("OUT_DIR")?);
    let object = out.join("hearth-probes.o");
    println!("cargo::rerun-if-env-changed={REQUIRE}");
    for source in ["ebpf/src", "ebpf/Cargo.toml", "common/src", "common/Cargo.toml"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let missing = match build(&out) {
        Ok(built) => {
            fs::copy(&built, &object)?;
            String::new()
        }
        Err(error) if env::var(REQUIRE).is_ok_and(|value| value == "1") => {
            return Err(error.context(format!("{REQUIRE}=1, but the eBPF programs cannot be built")));
        }
        Err(error) => {
            fs::write(&object, [])?;
            watch_for_tools();
            let missing = format!("{error:#}").replace('\n', " ");
            println!("cargo::warning=built without the eBPF probes: {missing}");
            missing
        }
    };
    println!("cargo::rustc-env=HEARTH_EBPF_MISSING={missing}");
    Ok(())
}

fn variable(name: &str) -> anyhow::Result<String> {
    env::var(name).map_err(|error| anyhow::anyhow!("{name}: {error}"))
}

fn home(name: &str, folder: &str) -> Option<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(folder)))
}

/// Has cargo run this again when a toolchain or a program is installed, and not at every build until then.
fn watch_for_tools() {
    let places = [
        home("CARGO_HOME", ".cargo").map(|home| home.join("bin")),
        home("RUSTUP_HOME", ".rustup").map(|home| home.join("update-hashes")),
        nightly_sysroot()
            .ok()
            .map(|sysroot| sysroot.join("lib/rustlib/components")),
    ];
    for place in places.into_iter().flatten().filter(|place| place.exists()) {
        println!("cargo::rerun-if-changed={}", place.display());
    }
}

/// A command in the nightly toolchain, free of what the outer cargo set for itself.
fn nightly(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", program]);
    for name in [
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "CARGO",
        "CARGO_BUILD_TARGET",
    ] {
        command.env_remove(name);
    }
    command
}

fn nightly_sysroot() -> anyhow::Result<PathBuf> {
    let output = nightly("rustc").args(["--print", "sysroot"]).output();
    match output {
        Ok(output) if output.status.success() => Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim())),
        Ok(_) => anyhow::bail!("run `rustup toolchain install nightly --component rust-src`"),
        Err(error) => anyhow::bail!("cannot run rustup ({error}); install it from https://rustup.rs"),
    }
}

/// The search path with cargo's own folder of programs in it, if bpf-linker is anywhere on it.
fn path_with_linker() -> anyhow::Result<std::ffi::OsString> {
    let mut folders: Vec<_> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    folders.extend(home("CARGO_HOME", ".cargo").map(|home| home.join("bin")));
    anyhow::ensure!(
        folders.iter().any(|folder| folder.join("bpf-linker").is_file()),
        "bpf-linker is not installed; run `cargo xtask setup`"
    );
    Ok(env::join_paths(folders)?)
}

/// Compiles the programs and returns where the object is.
fn build(out: &Path) -> anyhow::Result<PathBuf> {
    let sysroot = nightly_sysroot()?;
    anyhow::ensure!(
        sysroot.join("lib/rustlib/src/rust/library/core").is_dir(),
        "run `rustup component add rust-src --toolchain nightly`"
    );
    let path = path_with_linker()?;
    let endian = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb",
        _ => "bpfel",
    };
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let target = format!("{endian}-unknown-none");
    let target_dir = out.join("target");
    let mut cargo = nightly("cargo");
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "-Z",
            "build-std=core",
            "--package",
            PACKAGE,
            "--target",
            &target,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("PATH", path)
        // Type information of the programs themselves comes from their debug information.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("--cfg=bpf_target_arch=\"{arch}\"\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf"),
        );
    let output = cargo.output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        anyhow::bail!("{cargo:?} failed:\n{tail}");
    }
    Ok(target_dir.join(target).join("release").join(PACKAGE))
}
