//! Where a part of the cluster runs: in this machine's own network, or in a network namespace that somebody made.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// See the module. It makes no namespace and removes none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    address: Ipv4Addr,
    namespace: Option<PathBuf>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST,
            namespace: None,
        }
    }
}

impl Host {
    /// A namespace by its file, and the address that is its own there.
    pub fn in_namespace(namespace: &Path, address: Ipv4Addr) -> Self {
        Self {
            address,
            namespace: Some(namespace.to_owned()),
        }
    }

    /// What parts of the cluster listen on there.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// A program that will run there, as the same process that is started. Its mounts stay this machine's: a mount
    /// namespace of its own would look to a node's store like a loss of power.
    pub fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut net = std::ffi::OsString::from("--net=");
                net.push(namespace);
                let mut command = Command::new("nsenter");
                command.arg(net).arg(program);
                command
            }
        }
    }
}
