//! Where other nodes' sealed layers can be read, remembered over restarts so that no I/O needs NATS.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::RwLock;

use hearth_protocol::LayerId;

use crate::disk::DiskError;
use crate::peer::PeerPool;
use crate::store::fault::Faults;
use crate::store::os::{read_note, replace_note};
use crate::volume::BlockSource;

impl BlockSource for PeerPool {
    fn read_block(&self, layer: LayerId, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.read(layer, offset, buf)
    }
}

/// Addresses by layer.
pub struct Peers {
    addresses: RwLock<BTreeMap<LayerId, Vec<String>>>,
    file: PathBuf,
    faults: Faults,
}

impl Peers {
    /// What was known when the last process ended.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged.
    pub fn open(file: PathBuf, faults: Faults) -> io::Result<Self> {
        let addresses = read_note(&file, "remove it, it is made anew")?.unwrap_or_default();
        Ok(Self {
            addresses: RwLock::new(addresses),
            file,
            faults,
        })
    }

    /// Where a layer can be read, `unix:/path` or `tcp:address:port`.
    pub fn addresses_of(&self, layer: LayerId) -> Vec<String> {
        self.addresses
            .read()
            .expect("peers lock")
            .get(&layer)
            .cloned()
            .unwrap_or_default()
    }

    /// Replaces what is known, and writes it down if it changed.
    ///
    /// # Errors
    /// The file system's; the new addresses are used all the same.
    pub fn set(&self, fresh: BTreeMap<LayerId, Vec<String>>) -> io::Result<()> {
        {
            let mut addresses = self.addresses.write().expect("peers lock");
            if *addresses == fresh {
                return Ok(());
            }
            addresses.clone_from(&fresh);
        }
        replace_note(&self.file, &serde_json::to_vec_pretty(&fresh)?, &self.faults)
    }
}
