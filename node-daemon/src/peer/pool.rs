//! Reads of sealed layers from whichever peers have them.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hearth_protocol::LayerId;

use super::address::PeerAddress;
use super::client::PeerClient;
use super::{PeerError, PeerLimits};
use crate::disk::DiskError;
use crate::export::nbd::ExportName;

/// Addresses of the peers that hold a layer, nearest first: `unix:/path` or `tcp:127.0.0.1:port`.
pub type Resolver = dyn Fn(LayerId) -> Vec<String> + Send + Sync;

/// Clients unused for this long are dropped when a new one is made.
const UNUSED_AFTER: Duration = Duration::from_secs(120);

/// Clients keyed by (address, layer), made as needed. Share it between threads.
pub struct PeerPool {
    resolver: Box<Resolver>,
    limits: PeerLimits,
    clients: Mutex<HashMap<(String, LayerId), Arc<PeerClient>>>,
    waiting: (Mutex<()>, Condvar),
}

impl PeerPool {
    /// A pool that asks `resolver` for each read: it is called often and must be quick.
    pub fn new(limits: PeerLimits, resolver: impl Fn(LayerId) -> Vec<String> + Send + Sync + 'static) -> Self {
        Self {
            resolver: Box::new(resolver),
            limits,
            clients: Mutex::default(),
            waiting: Default::default(),
        }
    }

    /// Fills `buf` from `offset` of a sealed layer: asks each peer that holds it in turn, again and again with
    /// back-off, until one answers or [`PeerLimits::read_timeout`] is over.
    ///
    /// # Errors
    /// [`DiskError::Io`] with the last peer's failure.
    pub fn read(&self, layer: LayerId, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let deadline = Instant::now() + self.limits.read_timeout;
        loop {
            let mut last = PeerError::Nobody { layer };
            let mut retry_at = Instant::now() + self.limits.retry_delay_max;
            for address in (self.resolver)(layer) {
                let outcome = self.client(&address, layer).and_then(|client| {
                    client.try_read(offset, buf).inspect_err(|_| {
                        retry_at = retry_at.min(client.retry_at().unwrap_or_else(Instant::now));
                    })
                });
                match outcome {
                    Ok(()) => return Ok(()),
                    // Another copy may do better, also where this peer said no.
                    Err(PeerError::BackingOff { .. }) if !matches!(last, PeerError::Nobody { .. }) => {}
                    Err(error) => last = error,
                }
            }
            // No peer may ever be asked more often than this, also where each says no at once.
            let retry_at = retry_at.max(Instant::now() + self.limits.retry_delay_min);
            if retry_at >= deadline {
                let what = format!("read {} bytes at {offset} of layer {layer} from its peers", buf.len());
                return Err(DiskError::Io {
                    what,
                    source: std::io::Error::other(last),
                });
            }
            let pause = retry_at.saturating_duration_since(Instant::now());
            let guard = self.waiting.0.lock().expect("no panic under this lock");
            drop(
                self.waiting
                    .1
                    .wait_timeout(guard, pause)
                    .expect("no panic under this lock"),
            );
        }
    }

    /// Tells waiting reads that peers came or went.
    pub fn peers_changed(&self) {
        self.waiting.1.notify_all();
    }

    /// Clients now.
    pub fn clients(&self) -> usize {
        self.clients.lock().expect("no panic under this lock").len()
    }

    fn client(&self, address: &str, layer: LayerId) -> Result<Arc<PeerClient>, PeerError> {
        let key = (address.to_owned(), layer);
        let mut clients = self.clients.lock().expect("no panic under this lock");
        if let Some(client) = clients.get(&key) {
            return Ok(Arc::clone(client));
        }
        let parsed: PeerAddress = address.parse()?;
        clients.retain(|_, client| {
            let in_use = Arc::strong_count(client) > 1;
            in_use || client.last_used().is_some_and(|at| at.elapsed() < UNUSED_AFTER)
        });
        let export = ExportName::sealed_layer(layer).to_string();
        let client = Arc::new(PeerClient::lazy(parsed, &export, self.limits.clone()));
        clients.insert(key, Arc::clone(&client));
        Ok(client)
    }
}
