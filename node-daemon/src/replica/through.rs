//! Reads at the destination of a hand-over, before the source has sealed: they go through to the source's export, which is
//! what the guest's own QEMU on the source reads from.

use std::sync::{Arc, Mutex, PoisonError};

use hearth_protocol::{ImageName, NodeId};

use crate::peer::{PeerClient, PeerError, PeerLimits};

/// A client of the source's export, kept for as long as the source stays the same.
#[derive(Default)]
pub(super) struct Through {
    client: Mutex<Option<(NodeId, Arc<PeerClient>)>>,
}

impl Through {
    /// Fills `buf` from the source's export; `address` is where the source listens.
    pub(super) fn read(
        &self,
        owner: &NodeId,
        address: Option<String>,
        image: &ImageName,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), PeerError> {
        let client = {
            let mut known = self.client.lock().unwrap_or_else(PoisonError::into_inner);
            match &*known {
                Some((of, client)) if of == owner => Arc::clone(client),
                _ => {
                    let unknown = || PeerError::Protocol(format!("no address of {owner} is known"));
                    let address = address.ok_or_else(unknown)?.parse()?;
                    let client = PeerClient::lazy(address, image.as_str(), PeerLimits::default());
                    let client = Arc::new(client);
                    *known = Some((owner.clone(), Arc::clone(&client)));
                    client
                }
            }
        };
        client.try_read(offset, buf)
    }
}
