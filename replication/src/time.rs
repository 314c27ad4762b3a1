//! Durations of the protocol, on the boot-time clock of one node. Readings of two nodes are never compared.

use serde::{Deserialize, Serialize};

/// A reading of a node's boot-time clock in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BootMs(pub u64);

impl BootMs {
    /// The reading `ms` later.
    pub const fn after(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// How long a read lease holds, counted from before its request was sent (T).
pub const READ_LEASE_MS: u64 = 3_000;

/// How long a new owner waits before it opens without the old owner's seal: 1.25 T. So it is safe while the old owner's
/// clock loses less than a fifth of what the new owner's clock counts.
pub const TAKEOVER_WAIT_MS: u64 = READ_LEASE_MS / 4 * 5;
