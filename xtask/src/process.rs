//! Commands that run to their end: quietly, with their output shown only when they fail, or passed through.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Lines of a failed command's output that its error shows.
const LINES_SHOWN_MAX: usize = 40;

/// The command as a person would type it.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .map(|word| {
            if word.is_empty() || word.contains(char::is_whitespace) {
                format!("'{word}'")
            } else {
                word.into_owned()
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a command and returns its standard output, trimmed.
///
/// # Errors
/// It cannot start, or fails: the end of its output is in the error.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let stdout = String::from_utf8_lossy(&out.stdout);
    if !out.status.success() {
        let all = format!("{stdout}{}", String::from_utf8_lossy(&out.stderr));
        let lines: Vec<_> = all.lines().collect();
        let from = lines.len().saturating_sub(LINES_SHOWN_MAX);
        bail!("`{shown}` ended with {}:\n{}", out.status, lines[from..].join("\n"));
    }
    Ok(stdout.trim().to_owned())
}

/// A stock client of the distribution. Its Python modules, such as libnbd's for `nbdsh`, belong to its own Python,
/// whichever other one comes first in the user's path.
pub fn stock(program: &str) -> Command {
    let mut command = Command::new(program);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:/bin:{path}"));
    command
}

/// Whether a command can start and succeeds; its output is thrown away.
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs a command with its output passed through.
///
/// # Errors
/// It cannot start, or fails.
pub fn passthrough(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` ended with {status}");
    }
    Ok(())
}

/// Runs a command, passes both its outputs through to stderr line by line, and shows each line to `look`.
/// Returns whether it succeeded.
///
/// # Errors
/// It cannot start.
pub fn watched(command: &mut Command, mut look: impl FnMut(&str) + Send) -> Result<bool> {
    let shown = shown(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    let stdout = child.stdout.take().context("the child's stdout was not piped")?;
    let stderr = child.stderr.take().context("the child's stderr was not piped")?;
    let (send, lines) = std::sync::mpsc::channel::<String>();
    std::thread::scope(|scope| {
        let also = send.clone();
        scope.spawn(move || forward(BufReader::new(stdout), &send));
        scope.spawn(move || forward(BufReader::new(stderr), &also));
        for line in lines {
            eprintln!("{line}");
            look(&line);
        }
    });
    let status = child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    Ok(status.success())
}

fn forward(reader: impl BufRead, to: &std::sync::mpsc::Sender<String>) {
    for line in reader.split(b'\n').map_while(std::io::Result::ok) {
        if to.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
            return;
        }
    }
}
