//! `cargo xtask bench`: the measurements of DESIGN §11, each with its table under `bench/results`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::workspace::Workspace;

/// What can be measured.
#[derive(clap::Subcommand)]
pub enum What {
    /// Everything, one after the other; wants a quiet machine
    All {
        /// Folder of `.vbt.zst` traces [default: `../shared/traces` beside the clone]
        #[arg(long, env = "HEARTH_TRACES")]
        traces: Option<PathBuf>,
    },
    /// The data path against nbdkit and QEMU
    Nbd,
    /// An image with two replicas against a file on another node, over NFS (if nfs-ganesha and QEMU's NFS driver are
    /// there) and NBD
    Replicas,
    /// What a guest feels of copies to another node, and how fast those are, against nbdcopy
    Moves,
    /// The event log against RocksDB alone, replay, and decisions of a large cluster
    Log,
    /// What the eBPF probes cost
    Probes,
    /// Hit ratios of the production RAM tier over recorded block traces, beside other policies
    Policy {
        /// Folder of `.vbt.zst` traces [default: `../shared/traces` beside the clone]
        #[arg(long, env = "HEARTH_TRACES")]
        traces: Option<PathBuf>,
    },
}

/// Builds the benchmarks and runs what is asked for.
///
/// # Errors
/// The benchmark said why on standard error.
pub fn run(workspace: &Workspace, what: What) -> Result<()> {
    match what {
        What::All { traces } => {
            nbd(workspace)?;
            replicas(workspace)?;
            moves(workspace)?;
            probes(workspace)?;
            log(workspace)?;
            policy(workspace, traces)
        }
        What::Nbd => nbd(workspace),
        What::Replicas => replicas(workspace),
        What::Moves => moves(workspace),
        What::Log => log(workspace),
        What::Probes => probes(workspace),
        What::Policy { traces } => policy(workspace, traces),
    }
}

/// Runs a subcommand of `hearth-bench`, which writes its table itself.
fn hearth_bench(workspace: &Workspace, name: &str, words: &[&std::ffi::OsStr]) -> Result<()> {
    let mut command = workspace.command("cargo");
    command
        .args(["run", "--quiet", "-p", "hearth-bench", "--", name])
        .args(words)
        .arg("--out")
        .arg(format!("bench/results/{name}.md"));
    let status = command.status()?;
    ensure!(status.success(), "the benchmark {name} ended with {status}");
    Ok(())
}

fn nbd(workspace: &Workspace) -> Result<()> {
    hearth_bench(workspace, "nbd", &[])
}

fn replicas(workspace: &Workspace) -> Result<()> {
    with_daemons(workspace, "replicas")
}

fn moves(workspace: &Workspace) -> Result<()> {
    with_daemons(workspace, "moves")
}

/// Measures the daemons as they are started in service, so these are built first.
fn with_daemons(workspace: &Workspace, name: &str) -> Result<()> {
    let mut build = workspace.command("cargo");
    process::passthrough(build.args(["build", "--workspace", "--bins"]))?;
    let mut bench = Command::new(workspace.bin_dir().join("hearth-bench"));
    bench
        .args([name, "--out", &format!("bench/results/{name}.md")])
        .current_dir(&workspace.root)
        .env("HEARTH_BIN_DIR", workspace.bin_dir());
    process::passthrough(&mut bench)
}

fn policy(workspace: &Workspace, traces: Option<PathBuf>) -> Result<()> {
    // Relative paths are the caller's, and cargo runs in the clone.
    let traces = match traces {
        Some(dir) => std::path::absolute(dir)?,
        None => workspace.root.join("../shared/traces"),
    };
    hearth_bench(workspace, "policy", &["--traces".as_ref(), traces.as_os_str()])
}

/// Runs cargo, shows what it prints and keeps its lines that are figures.
fn kept(workspace: &Workspace, words: &str, is_figure: fn(&str) -> bool) -> Result<(bool, String)> {
    let output = workspace
        .command("cargo")
        .args(words.split(' '))
        .stderr(std::process::Stdio::inherit())
        .output()
        .with_context(|| format!("running cargo {words}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    let lines = said.lines().map(|line| line.trim_start_matches('.').trim());
    let lines: Vec<String> = lines
        .filter(|line| is_figure(line))
        .map(|line| format!("- {line}\n"))
        .collect();
    ensure!(!lines.is_empty(), "no figures came of cargo {words}: {}", said.trim());
    Ok((output.status.success(), lines.concat()))
}

fn keep(workspace: &Workspace, name: &str, text: &str) -> Result<()> {
    let folder = workspace.root.join("bench/results");
    std::fs::create_dir_all(&folder)?;
    Ok(std::fs::write(folder.join(name), text)?)
}

fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

fn log(workspace: &Workspace) -> Result<()> {
    let append = "run --quiet -p hearth-scheduler --example append_fold";
    let decide = "test --quiet -p scheduler-core --test scale -- --ignored --nocapture";
    let (appended, append_lines) = kept(workspace, append, |line| line.starts_with('{'))?;
    let (decided, decide_lines) = kept(workspace, decide, |line| line.contains(" ms") || line.contains(" ns"))?;
    let text = format!(
        "# The log\n\nLinux {}.\n\n`cargo {append}`:\n\n{append_lines}\n`cargo {decide}`:\n\n{decide_lines}",
        kernel()
    );
    keep(workspace, "log.md", &text)?;
    ensure!(appended && decided, "a measurement of the log failed, see above");
    Ok(())
}

/// The measurements of the probes are tests, which own the devices they measure.
fn probes(workspace: &Workspace) -> Result<()> {
    let words = "test --quiet -p hearth-probes --test kernel -- --ignored --nocapture --test-threads 1 cost";
    let (met, lines) = kept(workspace, words, |line| line.contains(" ns") || line.contains('%'))?;
    let text = format!(
        "# Cost of the probes\n\n`cargo {words}`, Linux {}: mean run times as the kernel measures them (bpf_stats), and the \
         loss of I/O rate, pair by pair.\n\n{lines}",
        kernel()
    );
    keep(workspace, "probes.md", &text)?;
    ensure!(met, "a target of the probes was missed, see above");
    Ok(())
}
