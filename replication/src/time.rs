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

/// How often read leases are renewed: two renewals may be lost before one runs out.
pub const RENEW_MS: u64 = READ_LEASE_MS / 3;

/// How soon leases are renewed again where one is missing, so that a new member or a new connection does not hold up
/// answers for a third of T, and a connection that breaks again and again is not asked in a loop.
pub const RENEW_AGAIN_MS: u64 = 250;

/// How long a request or a record to be recorded may be unanswered before the member is taken to have failed: longer, and
/// guests would wait for one slow disk; its lease would be gone by then anyway.
pub const ANSWER_MS: u64 = READ_LEASE_MS;

/// How long renewals may be unanswered while operations wait before the member is taken to have failed: its lease held for
/// T and has then been missing for 2 T.
pub const SILENT_MS: u64 = 3 * READ_LEASE_MS;

/// How soon a member is asked again to record a record: a broken connection loses the question.
pub const RAISE_AGAIN_MS: u64 = 500;

/// How soon a change is published again while the log shows neither it nor another one.
pub const PUBLISH_AGAIN_MS: u64 = 1_000;

/// How soon a takeover asks again who has not told where it stands.
pub const ASK_AGAIN_MS: u64 = 300;

/// How long a takeover asks before it goes on with what it was told: a node that is down never tells.
pub const ASK_MS: u64 = 1_000;

/// How soon the destination of a hand-over is told again that the source has sealed.
pub const SEALED_AGAIN_MS: u64 = 500;

/// How soon a destination takes over again what the log has decided for it: each time costs an epoch.
pub const TAKE_AGAIN_MS: u64 = 500;

/// How much later than asked for a wake-up may come before this node itself is taken to have stood still: then what is
/// unanswered may wait in its own sockets, and counts as asked now.
pub const OVERSLEPT_MS: u64 = 500;
