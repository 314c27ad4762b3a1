//! A nats-server of our own: loopback, a free port, and every acknowledged message on disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::daemon::Daemon;
use crate::wait;

const START_WITHIN: Duration = Duration::from_secs(20);

/// A running nats-server.
#[derive(Debug)]
pub struct Nats {
    program: PathBuf,
    dir: PathBuf,
    /// 0 until the server chose one; kept over restarts.
    port: u16,
    daemon: Daemon,
}

impl Nats {
    /// Starts a server that keeps its streams under `dir`.
    ///
    /// # Errors
    /// It does not start; its log is in the text.
    pub fn start(program: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (daemon, port) = launch(program, dir, 0)?;
        Ok(Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
            port,
            daemon,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Kills it, as a crash would, and starts it again on the same port and streams.
    ///
    /// # Errors
    /// It does not come back.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        (self.daemon, self.port) = launch(&self.program, &self.dir, self.port)?;
        Ok(())
    }
}

fn launch(program: &Path, dir: &Path, port: u16) -> Result<(Daemon, u16)> {
    let config = dir.join("nats.conf");
    let listen = if port == 0 { "-1".to_owned() } else { port.to_string() };
    let text = format!(
        "host: 127.0.0.1\nport: {listen}\nserver_name: hearth\nports_file_dir: {dir:?}\n\
         jetstream {{ store_dir: {store:?}, sync_interval: always }}\n",
        store = dir.join("streams"),
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut daemon = Daemon::start(
        "nats-server",
        Command::new(program).arg("--config").arg(&config),
        &dir.join("nats.log"),
    )?;
    let ports = dir.join(format!("nats-server_{}.ports", daemon.pid()));
    let port = wait::until("nats-server to listen", START_WITHIN, || {
        daemon.check_running()?;
        let Ok(text) = fs::read(&ports) else { return Ok(None) };
        let Ok(ports) = serde_json::from_slice::<serde_json::Value>(&text) else {
            return Ok(None);
        };
        let url = ports["nats"][0].as_str();
        Ok(url.and_then(|url| url.rsplit(':').next()?.parse().ok()))
    })?;
    Ok((daemon, port))
}
