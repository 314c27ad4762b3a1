//! Several connections to one export of one peer, opened as needed and reused.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::address::PeerAddress;
use super::session::Session;
use super::{PeerError, PeerLimits};

#[derive(Default)]
struct State {
    idle: Vec<Session>,
    /// Connections, idle or in use or being opened.
    open: usize,
    /// No connection is attempted before this.
    retry_at: Option<Instant>,
    retry_delay: Duration,
    last_used: Option<Instant>,
}

/// Reads from one export of one peer. Share it between threads: each read uses a connection of its own.
pub struct PeerClient {
    address: PeerAddress,
    export: String,
    limits: PeerLimits,
    state: Mutex<State>,
    changed: Condvar,
}

impl PeerClient {
    /// Connects to `address` (`unix:/path` or `tcp:127.0.0.1:port`) and checks that it serves `export`.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn connect(address: &str, export: &str) -> Result<Self, PeerError> {
        let client = Self::lazy(address.parse()?, export, PeerLimits::default());
        client.size()?;
        Ok(client)
    }

    /// A client that connects at its first read.
    pub fn lazy(address: PeerAddress, export: &str, limits: PeerLimits) -> Self {
        let export = export.to_owned();
        Self {
            address,
            export,
            limits,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The peer.
    pub fn address(&self) -> &PeerAddress {
        &self.address
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }

    /// When it was used last, if ever.
    pub fn last_used(&self) -> Option<Instant> {
        self.lock().last_used
    }

    /// Size of the export in bytes.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn size(&self) -> Result<u64, PeerError> {
        let (session, _) = self.check_out(Instant::now() + self.limits.request_timeout)?;
        let size = session.size();
        self.check_in(session);
        Ok(size)
    }

    /// Fills `buf` from `offset`, reconnecting with back-off for as long as [`PeerLimits::read_timeout`].
    ///
    /// # Errors
    /// [`PeerError::Refused`] if the peer says no, else the last failure once time is up.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), PeerError> {
        let deadline = Instant::now() + self.limits.read_timeout;
        loop {
            let failed = match self.try_read(offset, buf) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_final() => return Err(error),
                Err(error) => error,
            };
            let retry_at = self.retry_at().unwrap_or_else(Instant::now);
            if retry_at >= deadline {
                return Err(failed);
            }
            self.wait_until(retry_at);
        }
    }

    /// Fills `buf` from `offset` if the peer can be reached now.
    ///
    /// # Errors
    /// [`PeerError::BackingOff`] at once if an attempt failed a moment ago; else what happened.
    pub fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<(), PeerError> {
        let deadline = Instant::now() + self.limits.request_timeout;
        loop {
            let (mut session, fresh) = self.check_out(deadline)?;
            match session.read(offset, buf) {
                Ok(()) => {
                    self.check_in(session);
                    return Ok(());
                }
                Err(error @ PeerError::Refused { .. }) => {
                    self.check_in(session);
                    return Err(error);
                }
                Err(error) => {
                    drop(session);
                    self.forget(fresh);
                    // A connection that idled may have been closed since; a fresh one tells the truth.
                    if fresh || Instant::now() >= deadline {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// When the next connection may be attempted, if not now.
    pub fn retry_at(&self) -> Option<Instant> {
        self.lock().retry_at.filter(|at| *at > Instant::now())
    }

    fn wait_until(&self, at: Instant) {
        let mut state = self.lock();
        while let Some(left) = at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if !state.idle.is_empty() {
                return;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("no panic under this lock")
                .0;
        }
    }

    /// A connection, and whether it is new.
    fn check_out(&self, deadline: Instant) -> Result<(Session, bool), PeerError> {
        let mut state = self.lock();
        state.last_used = Some(Instant::now());
        loop {
            if let Some(session) = state.idle.pop() {
                return Ok((session, false));
            }
            let now = Instant::now();
            if let Some(retry_at) = state.retry_at.filter(|at| *at > now) {
                return Err(PeerError::BackingOff {
                    address: self.address.to_string(),
                    left: retry_at - now,
                });
            }
            if state.open < self.limits.connections_max {
                break;
            }
            if now >= deadline {
                return Err(PeerError::Busy {
                    address: self.address.to_string(),
                });
            }
            state = self
                .changed
                .wait_timeout(state, deadline - now)
                .expect("no panic under this lock")
                .0;
        }
        state.open += 1;
        drop(state);
        match Session::open(&self.address, &self.export, self.limits.request_timeout) {
            Ok(session) => {
                let mut state = self.lock();
                state.retry_at = None;
                state.retry_delay = Duration::ZERO;
                Ok((session, true))
            }
            Err(error) => {
                self.forget(true);
                Err(error)
            }
        }
    }

    fn check_in(&self, session: Session) {
        self.lock().idle.push(session);
        self.changed.notify_one();
    }

    /// Notes that a connection is gone; if it was a new one, the next attempt waits.
    fn forget(&self, fresh: bool) {
        let mut state = self.lock();
        state.open -= 1;
        if fresh {
            let delay = (state.retry_delay * 2).clamp(self.limits.retry_delay_min, self.limits.retry_delay_max);
            state.retry_delay = delay;
            state.retry_at = Some(Instant::now() + delay);
        }
        drop(state);
        self.changed.notify_all();
    }
}
