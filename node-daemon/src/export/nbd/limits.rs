//! Every bound of the server, with its reason: what a client can make the daemon spend.

use std::time::Duration;

/// Bounds of an NBD server. [`NbdLimits::default`] suits a node of any size.
#[derive(Debug, Clone)]
pub struct NbdLimits {
    /// Connections at a time. One more takes the place of the oldest that has not finished its handshake; if all
    /// have, it is closed at once. A guest needs one to a few.
    pub connections_max: usize,
    /// Connections that use one image (its own export, not the sealed layers that peers read) at a time; more are
    /// refused with a reason. `nbdcopy` opens 4, QEMU up to 16.
    pub connections_per_image_max: usize,
    /// Time from accept to transmission. A client that dawdles longer holds a place others need.
    pub handshake_timeout: Duration,
    /// Requests of one connection that are with the workers at a time. QEMU sends 16, `nbdcopy` 64.
    pub requests_in_flight_max: usize,
    /// Buffer bytes that one connection may hold: unsent replies and unfinished writes. Two of the largest requests.
    pub connection_bytes_max: usize,
    /// Buffer bytes that every connection may hold whatever the others hold, so that nobody can starve a guest.
    pub connection_bytes_granted: usize,
    /// Buffer bytes beyond the granted ones, of all connections together.
    pub shared_bytes_max: usize,
    /// A connection that holds shared bytes and moves none for this long is closed if another one waits for them.
    pub stall_timeout: Duration,
    /// Threads that wait for disks and peers on behalf of all connections.
    pub workers_max: usize,
    /// Threads that one connection may occupy, so that a slow disk or peer leaves some for the others.
    pub workers_per_connection_max: usize,
    /// Threads that read and write sockets.
    pub io_threads: usize,
    /// Time that a connection gets to take its last replies when its export is closed or the server stops.
    pub drain_timeout: Duration,
}

impl Default for NbdLimits {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            connections_max: 1_024,
            connections_per_image_max: 64,
            handshake_timeout: Duration::from_secs(10),
            requests_in_flight_max: 256,
            connection_bytes_max: 64 << 20,
            connection_bytes_granted: 512 << 10,
            shared_bytes_max: 512 << 20,
            stall_timeout: Duration::from_secs(30),
            workers_max: 48,
            workers_per_connection_max: 32,
            io_threads: cpus.clamp(1, 4),
            drain_timeout: Duration::from_secs(5),
        }
    }
}
