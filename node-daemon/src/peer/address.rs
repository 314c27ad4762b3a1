//! Where a peer serves NBD.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// A peer's NBD socket: `unix:/path` or `tcp:127.0.0.1:port`, as nodes announce it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PeerAddress {
    /// A unix socket, for a node on the same machine.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no peer address: use unix:/path or tcp:127.0.0.1:port")]
pub struct PeerAddressError(String);

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            PeerAddress::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for PeerAddress {
    type Err = PeerAddressError;

    fn from_str(text: &str) -> Result<Self, PeerAddressError> {
        let unix = || {
            text.strip_prefix("unix:")
                .filter(|path| path.starts_with('/'))
                .map(PathBuf::from)
        };
        let tcp = || text.strip_prefix("tcp:").and_then(|address| address.parse().ok());
        unix()
            .map(PeerAddress::Unix)
            .or_else(|| tcp().map(PeerAddress::Tcp))
            .ok_or_else(|| PeerAddressError(text.chars().take(120).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_what_they_print() {
        for text in ["unix:/run/hearth/nbd.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:10809"] {
            assert_eq!(text.parse::<PeerAddress>().unwrap().to_string(), text);
        }
        for text in ["", "unix:", "unix:relative", "tcp:host:1", "tcp:127.0.0.1", "/run/x"] {
            assert!(text.parse::<PeerAddress>().is_err(), "{text}");
        }
    }
}
