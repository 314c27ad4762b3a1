//! Where other nodes are, and their sealed layers can be read, remembered over restarts so that no I/O needs NATS.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::RwLock;

use hearth_protocol::{LayerId, NodeId};
use serde::Serialize;
use serde::de::DeserializeOwned;

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

/// Something that is written down when it changes, and known again after a restart.
struct Remembered<T> {
    known: RwLock<T>,
    file: PathBuf,
    faults: Faults,
}

impl<T: Serialize + DeserializeOwned + Default + PartialEq + Clone> Remembered<T> {
    fn open(file: PathBuf, faults: Faults) -> io::Result<Self> {
        let known = read_note(&file, "remove it, it is made anew")?.unwrap_or_default();
        Ok(Self {
            known: RwLock::new(known),
            file,
            faults,
        })
    }

    fn set(&self, fresh: T) -> io::Result<()> {
        {
            let mut known = self.known.write().expect("peers lock");
            if *known == fresh {
                return Ok(());
            }
            known.clone_from(&fresh);
        }
        replace_note(&self.file, &serde_json::to_vec_pretty(&fresh)?, &self.faults)
    }
}

/// Addresses by layer and by node, each `unix:/path` or `tcp:address:port`.
pub struct Peers {
    layers: Remembered<BTreeMap<LayerId, Vec<String>>>,
    nodes: Remembered<BTreeMap<NodeId, String>>,
}

impl Peers {
    /// What was known when the last process ended, beside the store.
    ///
    /// # Errors
    /// When a file cannot be read or is damaged.
    pub fn open(store: &Path, faults: &Faults) -> io::Result<Self> {
        Ok(Self {
            layers: Remembered::open(store.join("peers"), faults.clone())?,
            nodes: Remembered::open(store.join("peer-nodes"), faults.clone())?,
        })
    }

    /// Where a layer can be read.
    pub fn addresses_of(&self, layer: LayerId) -> Vec<String> {
        let layers = self.layers.known.read().expect("peers lock");
        layers.get(&layer).cloned().unwrap_or_default()
    }

    /// Where a node listens.
    pub fn address_of(&self, node: &NodeId) -> Option<String> {
        self.nodes.known.read().expect("peers lock").get(node).cloned()
    }

    /// Replaces what is known, and writes it down if it changed.
    ///
    /// # Errors
    /// The file system's; the new addresses are used all the same.
    pub fn set(&self, layers: BTreeMap<LayerId, Vec<String>>, nodes: BTreeMap<NodeId, String>) -> io::Result<()> {
        self.layers.set(layers).and(self.nodes.set(nodes))
    }
}
