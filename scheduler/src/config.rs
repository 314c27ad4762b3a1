//! The scheduler's configuration: command line over file. Unknown keys are errors, and nothing has a hidden default.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use hearth_bus::settings::Wanted;
use hearth_protocol::SchedulerId;
use hearth_protocol::limits::TICK_MS;
use serde::Deserialize;

use crate::replica::SNAPSHOT_EVERY_TICKS;

/// Between two snapshots, unless told otherwise.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(SNAPSHOT_EVERY_TICKS * TICK_MS);

/// Keeps the cluster's event log, folds it and decides.
#[derive(Debug, Parser)]
#[command(name = "hearth-scheduler", version)]
pub struct Arguments {
    /// TOML file with the same settings (nats, id, dir, dev, replicas, nats_monitor, nats_credentials,
    /// heat_retention, snapshot_every)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// NATS servers, separated by commas
    #[arg(long, value_name = "URL", env = "HEARTH_NATS")]
    nats: Option<String>,
    /// This scheduler's id, unique and for ever: a-z 0-9 - _
    #[arg(long)]
    id: Option<SchedulerId>,
    /// Directory of the event log
    #[arg(long)]
    dir: Option<PathBuf>,
    /// For development: lets one server, and writes that are not synced, pass with a warning
    #[arg(long)]
    dev: bool,
    /// Copies of the streams [default: 3, with --dev 1]
    #[arg(long)]
    replicas: Option<usize>,
    /// Monitoring address of a NATS server (http://HOST:PORT), to read its sync_interval; repeat for each server
    #[arg(long, value_name = "URL")]
    nats_monitor: Vec<String>,
    /// NATS credentials file
    #[arg(long, value_name = "FILE")]
    nats_credentials: Option<PathBuf>,
    /// How long the log keeps what heat events say, such as 30d; decisions older than that can be verified by hash but
    /// not derived again [default: for ever]
    #[arg(long, value_name = "TIME")]
    heat_retention: Option<String>,
    /// How much time passes between two snapshots of the state, such as 5m: a start folds only what came after the
    /// last one. Taken at every tenth tick at the soonest [default: 1m]
    #[arg(long, value_name = "TIME")]
    snapshot_every: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    nats: Option<String>,
    id: Option<SchedulerId>,
    dir: Option<PathBuf>,
    dev: Option<bool>,
    replicas: Option<usize>,
    nats_monitor: Option<Vec<String>>,
    nats_credentials: Option<PathBuf>,
    heat_retention: Option<String>,
    snapshot_every: Option<String>,
}

/// What a scheduler is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// NATS servers, separated by commas.
    pub nats: String,
    /// Who this is.
    pub id: SchedulerId,
    /// Directory of the event log.
    pub dir: PathBuf,
    /// See [`Wanted::dev`].
    pub dev: bool,
    /// See [`Wanted::replicas`].
    pub replicas: usize,
    /// See [`Wanted::monitors`].
    pub nats_monitor: Vec<String>,
    /// NATS credentials file.
    pub nats_credentials: Option<PathBuf>,
    /// See [`crate::run::Retention::heat`].
    pub heat_retention: Option<Duration>,
    /// Between two snapshots.
    pub snapshot_every: Duration,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: std::io::Error,
    },
    /// The file says something unknown or impossible.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What, and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Something that must be said is missing.
    #[error("{0} is not set: give --{0}, or {0} in the file of --config")]
    Missing(&'static str),
    /// A time that is none.
    #[error("{setting} is {text:?}: {why}; use a number with its unit, such as 30d, 12h or 5m")]
    Time {
        /// Which setting.
        setting: &'static str,
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: humantime::DurationError,
    },
    /// A number that makes no sense.
    #[error("replicas is {0}, use 1, 3 or 5")]
    Replicas(usize),
}

impl Arguments {
    /// Reads the file, if one is named, and puts the command line over it.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
                    path: path.clone(),
                    source,
                })?;
                toml::from_str(&text).map_err(|source| ConfigError::Parse {
                    path: path.clone(),
                    source: Box::new(source),
                })?
            }
        };
        let dev = self.dev || file.dev.unwrap_or(false);
        let replicas = self.replicas.or(file.replicas).unwrap_or(if dev { 1 } else { 3 });
        if ![1, 3, 5].contains(&replicas) {
            return Err(ConfigError::Replicas(replicas));
        }
        let nats_monitor = if self.nats_monitor.is_empty() {
            file.nats_monitor.unwrap_or_default()
        } else {
            self.nats_monitor
        };
        let heat_retention = self.heat_retention.or(file.heat_retention);
        let snapshot_every = self.snapshot_every.or(file.snapshot_every);
        Ok(Config {
            heat_retention: time("heat_retention", heat_retention)?,
            snapshot_every: time("snapshot_every", snapshot_every)?.unwrap_or(SNAPSHOT_EVERY),
            nats: self.nats.or(file.nats).ok_or(ConfigError::Missing("nats"))?,
            id: self.id.or(file.id).ok_or(ConfigError::Missing("id"))?,
            dir: self.dir.or(file.dir).ok_or(ConfigError::Missing("dir"))?,
            dev,
            replicas,
            nats_monitor,
            nats_credentials: self.nats_credentials.or(file.nats_credentials),
        })
    }
}

fn time(setting: &'static str, text: Option<String>) -> Result<Option<Duration>, ConfigError> {
    text.map(|text| humantime::parse_duration(&text).map_err(|why| ConfigError::Time { setting, text, why }))
        .transpose()
}

impl Config {
    /// [`Config::snapshot_every`] in ticks, at least one.
    pub fn snapshot_every_ticks(&self) -> u64 {
        let ticks = self.snapshot_every.as_millis() / u128::from(TICK_MS);
        u64::try_from(ticks).unwrap_or(u64::MAX).max(1)
    }

    /// What it asks of its servers.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            replicas: self.replicas,
            dev: self.dev,
            monitors: self.nats_monitor.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(file: &str, arguments: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scheduler.toml");
        std::fs::write(&path, file).unwrap();
        let mut all = vec!["hearth-scheduler", "--config", path.to_str().unwrap()];
        all.extend(arguments);
        Arguments::try_parse_from(all).unwrap().resolve()
    }

    #[test]
    fn the_command_line_comes_over_the_file() {
        let file = "nats = 'nats://a:1'\nid = 's1'\ndir = '/d'\nreplicas = 5";
        let config = resolve(file, &["--id", "s2", "--nats-monitor", "http://a:2"]).unwrap();
        assert_eq!(
            (config.nats.as_str(), config.id.as_str(), config.replicas),
            ("nats://a:1", "s2", 5)
        );
        assert_eq!(config.nats_monitor, ["http://a:2"]);
        let dev = resolve("nats = 'nats://a:1'\nid = 's1'\ndir = '/d'", &["--dev"]).unwrap();
        assert!(dev.dev && dev.replicas == 1);
    }

    #[test]
    fn what_is_unknown_or_missing_is_an_error() {
        let unknown = resolve("colour = 'red'", &[]).unwrap_err().to_string();
        assert!(unknown.contains("colour"), "{unknown}");
        let missing = resolve("nats = 'nats://a:1'\nid = 's1'", &[]).unwrap_err().to_string();
        assert!(missing.contains("--dir"), "{missing}");
        assert!(resolve("id = 'NOT AN ID'", &[]).is_err());
        assert!(resolve("nats = 'n'\nid = 's'\ndir = '/d'\nreplicas = 2", &[]).is_err());
        let unit = resolve("nats = 'n'\nid = 's'\ndir = '/d'\nheat_retention = '30'", &["--dev"]);
        let unit = unit.unwrap_err().to_string();
        assert!(
            unit.contains("heat_retention is") && unit.contains("such as 30d"),
            "{unit}"
        );
        let unit = resolve(
            "nats = 'n'\nid = 's'\ndir = '/d'",
            &["--dev", "--snapshot-every", "soon"],
        );
        let unit = unit.unwrap_err().to_string();
        assert!(unit.contains("snapshot_every is \"soon\""), "{unit}");
    }

    #[test]
    fn snapshots_come_at_whole_ticks() {
        let ticks = |arguments: &[&str]| {
            let config = resolve("nats = 'n'\nid = 's'\ndir = '/d'", arguments).unwrap();
            config.snapshot_every_ticks()
        };
        assert_eq!(ticks(&[]), 60);
        assert_eq!(ticks(&["--snapshot-every", "5m"]), 300);
        assert_eq!(ticks(&["--snapshot-every", "1ms"]), 1);
    }
}
