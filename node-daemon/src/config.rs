//! The node daemon's configuration file (TOML). An unknown key or a wrong unit is an error, never a default.

use std::path::{Path, PathBuf};

use hearth_protocol::{ByteLen, NodeId};
use serde::{Deserialize, Deserializer, de};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// It is no valid TOML, has an unknown key, or a value of the wrong kind.
    #[error("the configuration {path} is not valid: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What and where.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value out of its range.
    #[error("the configuration {path} is not valid: {why}")]
    Range {
        /// The file.
        path: PathBuf,
        /// Which key, and its range.
        why: String,
    },
}

/// Where heat is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum HeatChoice {
    /// By eBPF where the kernel and the privileges allow it, else by the exports; the daemon says which.
    #[default]
    Auto,
    /// By eBPF, or the daemon does not start.
    Ebpf,
    /// By the exports only.
    Export,
}

/// A copy that goes slower than this, in bytes per second, hardly ever ends.
pub const SLOWEST_MOVE: ByteLen = ByteLen(8 << 20);

/// The file's keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// This node's id, for ever.
    pub id: NodeId,
    /// NATS URL, such as `nats://127.0.0.1:4222`.
    pub nats: String,
    /// Directory of the store; created if missing.
    pub store_dir: PathBuf,
    /// Size of the RAM tier: bytes, or a text such as `"4GiB"`.
    #[serde(deserialize_with = "size")]
    pub ram_bytes: ByteLen,
    /// Share of the RAM tier that admits misses by itself; the scheduler owns the rest. 1 to 100.
    #[serde(default = "front_percent")]
    pub front_percent: u8,
    /// NBD unix socket, one stable path per node.
    pub socket: PathBuf,
    /// Where peers read this node's sealed layers: `tcp:127.0.0.1:PORT` (loopback only until TLS exists) or
    /// `unix:/path`. Absent: peers on the same machine use `socket`.
    #[serde(default)]
    pub peer_listen: Option<String>,
    /// Directory for links to kernel block devices.
    #[serde(default = "device_link_root")]
    pub device_link_root: PathBuf,
    /// Directory under which FUSE files are mounted.
    #[serde(default = "mount_root")]
    pub mount_root: PathBuf,
    /// Where heat is counted.
    #[serde(default)]
    pub heat: HeatChoice,
    /// Fault domain, such as a rack.
    #[serde(default = "fault_domain")]
    pub fault_domain: String,
    /// Socket of the descriptor holder that keeps exports open over restarts of this daemon.
    #[serde(default)]
    pub fd_holder: Option<PathBuf>,
    /// Worker threads for requests that wait for a disk or a peer.
    #[serde(default = "io_threads")]
    pub io_threads: usize,
    /// Bytes per second that the link to one other node may carry for copies of replicas, all together: bytes, or a text
    /// such as `"200MiB"`.
    #[serde(default = "move_rate", deserialize_with = "size")]
    pub move_bytes_per_second: ByteLen,
}

fn front_percent() -> u8 {
    94
}

fn device_link_root() -> PathBuf {
    "/dev/hearth".into()
}

fn mount_root() -> PathBuf {
    "/run/hearth/fuse".into()
}

fn fault_domain() -> String {
    "default".into()
}

fn io_threads() -> usize {
    32
}

fn move_rate() -> ByteLen {
    ByteLen(200 << 20)
}

fn size<'de, D: Deserializer<'de>>(d: D) -> Result<ByteLen, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Bytes(u64),
        Text(String),
    }
    match Either::deserialize(d)? {
        Either::Bytes(bytes) => Ok(ByteLen(bytes)),
        Either::Text(text) => text.parse().map_err(de::Error::custom),
    }
}

impl NodeConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the key.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let range = |why: String| {
            Err(ConfigError::Range {
                path: path.to_owned(),
                why,
            })
        };
        if config.ram_bytes.0 < 4 << 20 {
            return range(format!("ram_bytes is {}, use at least 4MiB", config.ram_bytes.iec()));
        }
        if !(1..=100).contains(&config.front_percent) {
            return range(format!("front_percent is {}, use 1 to 100", config.front_percent));
        }
        if !(1..=1024).contains(&config.io_threads) {
            return range(format!("io_threads is {}, use 1 to 1024", config.io_threads));
        }
        if config.move_bytes_per_second < SLOWEST_MOVE {
            return range(format!(
                "move_bytes_per_second is {}, use at least {}",
                config.move_bytes_per_second.iec(),
                SLOWEST_MOVE.iec()
            ));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        id = "node-1"
        nats = "nats://127.0.0.1:4222"
        store_dir = "/tmp/s"
        ram_bytes = "64MiB"
        socket = "/tmp/s.sock"
    "#;

    fn check(text: &str, expect: &str) {
        let error = NodeConfig::parse(text, Path::new("node.toml")).unwrap_err().to_string();
        assert!(error.contains(expect) && error.contains("node.toml"), "{error}");
    }

    #[test]
    fn a_small_file_is_enough_and_mistakes_are_named() {
        assert_eq!(
            NodeConfig::parse(GOOD, Path::new("x")).unwrap().ram_bytes,
            ByteLen(64 << 20)
        );
        check(&format!("{GOOD}\nram_bytess = 3"), "ram_bytess");
        check(&GOOD.replace("64MiB", "64 megs"), "64 megs");
        check(&GOOD.replace("64MiB", "4KiB"), "at least 4MiB");
        check(&GOOD.replace("node-1", "../x"), "node id");
        check(&format!("{GOOD}\nfront_percent = 0"), "front_percent");
        check(&format!("{GOOD}\nmove_bytes_per_second = \"7MiB\""), "at least 8MiB");
        check(&GOOD.replace("store_dir", "store"), "store");
    }
}
