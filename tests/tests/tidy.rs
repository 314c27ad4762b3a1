//! Rules about the source itself: sizes, leftovers, and what each crate must not know (ARCHITECTURE).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Lines of one file; more needs a split, not an exception.
const LINES_MAX: usize = 1_000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests' folder has a parent")
}

/// Source files of the clone with their text, relative to its root.
fn sources() -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut open = vec![root().to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    open.push(path);
                }
            } else if ["rs", "toml", "md", "py", "sh"]
                .iter()
                .any(|ext| name.ends_with(&format!(".{ext}")))
            {
                let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
                found.push((path.strip_prefix(root())?.to_owned(), text));
            }
        }
    }
    ensure!(
        found.len() > 20,
        "found only {} source files under {}",
        found.len(),
        root().display()
    );
    found.sort();
    Ok(found)
}

fn cargo(words: &[&str]) -> Result<String> {
    let out = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(words)
        .args(["--locked", "--offline"])
        .output()
        .with_context(|| format!("cannot start cargo {}", words.join(" ")))?;
    ensure!(
        out.status.success(),
        "cargo {} failed: {}",
        words.join(" "),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8(out.stdout)?)
}

/// Everything that a crate's normal build contains, itself included.
fn built_into(package: &str) -> Result<BTreeSet<String>> {
    let tree = cargo(&["tree", "-p", package, "-e", "normal", "--prefix", "none"])?;
    Ok(tree
        .lines()
        .filter_map(|line| Some(line.split_whitespace().next()?.to_owned()))
        .collect())
}

/// (package, direct dependency) for every member of the workspace, development dependencies left out.
fn direct() -> Result<Vec<(String, String)>> {
    let metadata: Value = serde_json::from_str(&cargo(&["metadata", "--no-deps", "--format-version", "1"])?)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut pairs = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["kind"] != "dev" {
                let on = dependency["name"].as_str().context("a dependency without a name")?;
                pairs.push((name.to_owned(), on.to_owned()));
            }
        }
    }
    Ok(pairs)
}

#[test]
fn files_are_short() -> Result<()> {
    for (path, text) in sources()? {
        let lines = text.lines().count();
        ensure!(
            lines <= LINES_MAX,
            "{} has {lines} lines; split it, {LINES_MAX} are too many to read",
            path.display()
        );
    }
    Ok(())
}

#[test]
fn nothing_is_left_over() -> Result<()> {
    // Put together here, so that this file does not find itself.
    let leftovers = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!("));
    for (path, text) in sources()? {
        if path.extension().is_none_or(|ext| ext != "rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if let Some(found) = leftovers.iter().find(|found| line.contains(found.as_str())) {
                anyhow::bail!("{}:{}: `{found}..)` was left over", path.display(), number + 1);
            }
        }
    }
    Ok(())
}

#[test]
fn every_crate_has_the_workspace_lints() -> Result<()> {
    for (path, text) in sources()? {
        if path.file_name().is_some_and(|name| name == "Cargo.toml") && text.contains("[package]") {
            ensure!(
                text.contains("[lints]\nworkspace = true"),
                "{} does not say `[lints] workspace = true`",
                path.display()
            );
        }
    }
    Ok(())
}

#[test]
fn the_core_is_pure() -> Result<()> {
    let forbidden = [
        "tokio",
        "async-nats",
        "futures",
        "rocksdb",
        "rand",
        "getrandom",
        "tracing",
        "chrono",
        "time",
    ];
    for package in ["scheduler-core", "hearth-protocol", "hearth-replication"] {
        let built = built_into(package)?;
        ensure!(
            built.contains("serde"),
            "the dependency tree of {package} reads wrong: {built:?}"
        );
        for name in forbidden {
            ensure!(!built.contains(name), "{package} must not know {name}");
        }
    }
    Ok(())
}

#[test]
fn the_replication_protocol_stands_on_ids_and_units_alone() -> Result<()> {
    let allowed = ["hearth-protocol", "serde", "thiserror"];
    for (package, on) in direct()? {
        ensure!(
            package != "hearth-replication" || allowed.contains(&on.as_str()),
            "hearth-replication must not depend on {on}, only on {allowed:?}"
        );
    }
    Ok(())
}

/// The ban lists are in force only while they are there.
#[test]
fn pure_crates_ban_clocks_randomness_and_io() -> Result<()> {
    let banned = [
        "std::collections::HashMap",
        "std::time::Instant::now",
        "std::time::SystemTime::now",
        "std::env::var",
        "std::fs::File",
        "std::net::TcpStream",
        "std::thread::spawn",
    ];
    for folder in ["scheduler/core", "replication"] {
        let path = root().join(folder).join("clippy.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for name in banned {
            ensure!(
                text.contains(&format!("\"{name}\"")),
                "{} does not ban {name}",
                path.display()
            );
        }
    }
    Ok(())
}

#[test]
fn each_outside_thing_has_its_crates() -> Result<()> {
    // (dependency, the only packages that may name it)
    let rules: &[(&str, &[&str])] = &[
        ("aya", &["hearth-probes"]),
        ("aya-build", &["hearth-probes"]),
        ("aya-ebpf", &["hearth-probes-ebpf"]),
        ("rocksdb", &["hearth-scheduler"]),
        (
            "async-nats",
            &[
                "hearth-bus",
                "hearth-scheduler",
                "hearth-node",
                "hearth-ctl",
                "hearth-tests",
            ],
        ),
        ("ratatui", &["hearth-tui", "hearth-ctl"]),
        ("stateright", &[]),
    ];
    for (package, on) in direct()? {
        if let Some((_, allowed)) = rules.iter().find(|(name, _)| *name == on) {
            ensure!(
                allowed.contains(&package.as_str()),
                "{package} must not depend on {on}, only {allowed:?} may"
            );
        }
    }
    Ok(())
}

#[test]
fn the_data_path_never_calls_nats() -> Result<()> {
    for (path, text) in sources()? {
        let data_path = ["volume", "tier", "store", "peer", "replica", "export"]
            .iter()
            .any(|part| path.starts_with(format!("node-daemon/src/{part}")));
        ensure!(
            !data_path || !text.contains("async_nats"),
            "{} names async_nats; only the agent may",
            path.display()
        );
    }
    Ok(())
}

/// The licences that deny.toml allows, so that there is one list.
fn allowed_licences() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(root().join("deny.toml")).context("cannot read deny.toml")?;
    let (_, list) = text
        .split_once("\nallow = [")
        .context("deny.toml has no list `allow`")?;
    let (list, _) = list
        .split_once(']')
        .context("the list `allow` in deny.toml does not end")?;
    Ok(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether an SPDX expression can be met with `allowed`. AND binds tighter than OR; old crates write `/` for OR.
fn is_met(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression.trim();
    if let Some((left, right)) = split_outside(expression, &[" OR ", "/"]) {
        return is_met(left, allowed) || is_met(right, allowed);
    }
    if let Some((left, right)) = split_outside(expression, &[" AND "]) {
        return is_met(left, allowed) && is_met(right, allowed);
    }
    match expression.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => is_met(inner, allowed),
        None => allowed.contains(expression),
    }
}

/// Splits at the first of `separators` that is not within parentheses.
fn split_outside<'a>(expression: &'a str, separators: &[&str]) -> Option<(&'a str, &'a str)> {
    let mut depth = 0;
    for (at, letter) in expression.char_indices() {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        for separator in separators {
            if depth == 0 && expression[at..].starts_with(separator) {
                return Some((&expression[..at], &expression[at + separator.len()..]));
            }
        }
    }
    None
}

#[test]
fn dependencies_have_licences_that_we_allow() -> Result<()> {
    let allowed = allowed_licences()?;
    ensure!(is_met("(MIT OR GPL-3.0) AND ISC", &allowed) && !is_met("MIT AND GPL-3.0", &allowed));
    ensure!(is_met("GPL-2.0 / MIT", &allowed) && !is_met("", &allowed));
    let tree = cargo(&[
        "tree",
        "--workspace",
        "-e",
        "normal,build",
        "--prefix",
        "none",
        "--format",
        "{p}|{l}",
    ])?;
    let mut crates = 0;
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let (package, licence) = line.split_once('|').context("cargo tree printed no licence")?;
        let licence = licence.trim_end_matches("(*)");
        ensure!(
            is_met(licence, &allowed),
            "{package} has licence {licence:?}, which deny.toml does not allow"
        );
        crates += 1;
    }
    ensure!(crates > 100, "cargo tree listed only {crates} crates");
    Ok(())
}
