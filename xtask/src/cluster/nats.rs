//! A nats-server of our own: a loopback address, a free port, and every acknowledged message on disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::daemon::Daemon;
use super::host::Host;
use crate::wait;

const START_WITHIN: Duration = Duration::from_secs(20);

/// 0 until the server chose them; kept over restarts.
#[derive(Debug, Clone, Copy, Default)]
struct Ports {
    clients: u16,
    monitor: u16,
}

/// A running nats-server.
#[derive(Debug)]
pub struct Nats {
    program: PathBuf,
    dir: PathBuf,
    host: Host,
    ports: Ports,
    daemon: Daemon,
}

impl Nats {
    /// Starts a server that keeps its streams under `dir`.
    ///
    /// # Errors
    /// It does not start; its log is in the text.
    pub fn start(program: &Path, dir: &Path, host: &Host) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let (daemon, ports) = launch(program, dir, host, Ports::default())?;
        Ok(Self {
            program: program.to_owned(),
            dir: dir.to_owned(),
            host: host.clone(),
            ports,
            daemon,
        })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("nats://{}:{}", self.host.address(), self.ports.clients)
    }

    /// Where it tells its settings.
    pub fn monitor_url(&self) -> String {
        format!("http://{}:{}", self.host.address(), self.ports.monitor)
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    /// Kills it, as a crash would, and starts it again on the same ports and streams.
    ///
    /// # Errors
    /// It does not come back.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.crash_and_restart_after(|_| Ok(()))
    }

    /// As [`Nats::crash_and_restart`]; meanwhile something is done with the folder of its streams.
    ///
    /// # Errors
    /// That fails, or it does not come back.
    pub fn crash_and_restart_after(&mut self, meanwhile: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        self.daemon.kill()?;
        meanwhile(&self.dir.join("streams"))?;
        (self.daemon, self.ports) = launch(&self.program, &self.dir, &self.host, self.ports)?;
        Ok(())
    }
}

fn launch(program: &Path, dir: &Path, host: &Host, ports: Ports) -> Result<(Daemon, Ports)> {
    let config = dir.join("nats.conf");
    let any = |port: u16| if port == 0 { "-1".to_owned() } else { port.to_string() };
    let text = format!(
        "listen: \"{address}:{clients}\"\nhttp: \"{address}:{monitor}\"\nserver_name: hearth\n\
         ports_file_dir: {dir:?}\njetstream {{ store_dir: {store:?}, sync_interval: always }}\n",
        address = host.address(),
        clients = any(ports.clients),
        monitor = any(ports.monitor),
        store = dir.join("streams"),
    );
    fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
    let mut daemon = Daemon::start(
        "nats-server",
        host.command(program).arg("--config").arg(&config),
        &dir.join("nats.log"),
    )?;
    let file = dir.join(format!("nats-server_{}.ports", daemon.pid()));
    let ports = wait::until("nats-server to listen", START_WITHIN, || {
        daemon.check_running()?;
        // Absent or half written at first.
        let Ok(said) = serde_json::from_slice::<Value>(&fs::read(&file).unwrap_or_default()) else {
            return Ok(None);
        };
        let port = |key: &str| said[key][0].as_str()?.rsplit(':').next()?.parse().ok();
        Ok(port("nats")
            .zip(port("monitoring"))
            .map(|(clients, monitor)| Ports { clients, monitor }))
    })?;
    Ok((daemon, ports))
}
