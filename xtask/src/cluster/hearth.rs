//! The `hearth` command, as a script would use it: JSON out, exit codes checked.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::host::Host;
use crate::process;

/// The `hearth` program and the cluster it talks to.
#[derive(Debug, Clone)]
pub struct Hearth {
    program: PathBuf,
    nats: String,
    host: Host,
}

impl Hearth {
    /// For the cluster behind this nats-server, run on a host that reaches it.
    pub fn new(program: &Path, nats: String, host: Host) -> Self {
        Self {
            program: program.to_owned(),
            nats,
            host,
        }
    }

    /// A command line, ready to run.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command(&self.program);
        command.env("HEARTH_NATS", &self.nats).args(words);
        command
    }

    /// Runs it and returns what it prints.
    ///
    /// # Errors
    /// It fails; what it printed is in the text.
    pub fn text(&self, words: &[&str]) -> Result<String> {
        process::output(&mut self.command(words))
    }

    /// Runs it with `-o json` and reads what it prints.
    ///
    /// # Errors
    /// It fails, or prints no JSON.
    pub fn json(&self, words: &[&str]) -> Result<Value> {
        let mut command = self.command(words);
        command.args(["-o", "json"]);
        let shown = process::shown(&command);
        let text = process::output(&mut command)?;
        serde_json::from_str(&text).with_context(|| format!("`{shown}` printed no JSON: {text:.400}"))
    }

    /// Runs it with `-o jsonl` and reads every line.
    ///
    /// # Errors
    /// It fails, or a line is no JSON.
    pub fn json_lines(&self, words: &[&str]) -> Result<Vec<Value>> {
        let mut command = self.command(words);
        command.args(["-o", "jsonl"]);
        let shown = process::shown(&command);
        let text = process::output(&mut command)?;
        text.lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("`{shown}` printed no JSON: {line:.400}")))
            .collect()
    }
}
