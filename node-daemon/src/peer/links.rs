//! Connections between nodes that carry [`Frame`]s both ways.
//!
//! A node dials the peers that it asks something of, and answers on the connections that were dialed to it. Sending never
//! waits: frames queue up behind a connection that is being made, and are dropped with one that breaks. So whoever sends
//! is told by [`Receive::lost`] that what it asked on a connection will not be answered, and it alone knows what that
//! means: nothing is ever sent twice here.
//!
//! It is not secured: like NBD it goes over unix sockets and loopback addresses only, until there is TLS.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use hearth_protocol::NodeId;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::PeerError;
use super::address::PeerAddress;
use super::frame::Frame;
use super::outbox::Outbox;
use super::session::{broken, protocol, shake_hands_as_peer};
use crate::export::nbd::PeerDoor;
use crate::export::nbd::buffer::BufferPool;
use crate::export::nbd::stream::Accepted;

/// How long a connection may take to be made, handshake included.
const DIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before a peer that could not be reached is dialed again.
const DIAL_AGAIN: Duration = Duration::from_millis(250);
/// A connection whose other end has not acknowledged what was sent for this long is dead, in milliseconds.
const UNACKNOWLEDGED_MS_MAX: u32 = 4_000;
/// Connections that were dialed to this node; each peer needs one.
const ENTERED_MAX: usize = 256;
/// Bytes read at once.
const BUFFER_BYTES: usize = 256 << 10;
/// Frames that arrived together and are delivered together.
const DELIVERED_MAX: usize = 64;

/// Takes what arrives.
pub trait Receive: Send + Sync {
    /// Frames of a peer that arrived together, in their order. Called by the connection's own thread: the next ones wait
    /// until this returns.
    fn received(&self, from: &NodeId, frames: Vec<Frame>);

    /// What was asked of a peer and not answered will not be.
    fn lost(&self, peer: &NodeId);
}

/// What nodes tell each other of themselves in the handshake.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// Who speaks.
    pub node: NodeId,
    /// Whom it means to reach: an address may have gone to another node meanwhile.
    pub to: Option<NodeId>,
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn dial(address: &PeerAddress) -> io::Result<Self> {
        Ok(match address {
            PeerAddress::Unix(path) => Socket::Unix(UnixStream::connect(path)?),
            PeerAddress::Tcp(address) => Socket::Tcp(TcpStream::connect_timeout(address, DIAL_TIMEOUT)?),
        })
    }

    fn accepted(socket: Accepted) -> io::Result<Self> {
        let socket = match socket {
            Accepted::Unix(stream) => {
                stream.set_nonblocking(false)?;
                Socket::Unix(stream)
            }
            Accepted::Tcp(stream) => {
                stream.set_nonblocking(false)?;
                Socket::Tcp(stream)
            }
        };
        socket.prepare()?;
        Ok(socket)
    }

    /// Without delays, and dead when the other end is.
    fn prepare(&self) -> io::Result<()> {
        if let Socket::Tcp(stream) = self {
            stream.set_nodelay(true)?;
            setsockopt(stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS_MAX)?;
        }
        self.set_timeout(None)
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(stream) => stream
                .set_read_timeout(timeout)
                .and_then(|()| stream.set_write_timeout(timeout)),
            Socket::Tcp(stream) => stream
                .set_read_timeout(timeout)
                .and_then(|()| stream.set_write_timeout(timeout)),
        }
    }

    fn twin(&self) -> io::Result<Self> {
        Ok(match self {
            Socket::Unix(stream) => Socket::Unix(stream.try_clone()?),
            Socket::Tcp(stream) => Socket::Tcp(stream.try_clone()?),
        })
    }

    /// Ends both directions, also for the twin.
    fn shut(&self) {
        let _ = match self {
            Socket::Unix(stream) => stream.shutdown(Shutdown::Both),
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        match socket {
            Socket::Unix(stream) => stream.into(),
            Socket::Tcp(stream) => stream.into(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.read(buf),
            Socket::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => stream.write(buf),
            Socket::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One end of a connection.
struct Queue {
    number: u64,
    out: Arc<Outbox>,
}

#[derive(Default)]
struct State {
    next: u64,
    dialed: HashMap<NodeId, Queue>,
    /// Of each peer the last connection that it dialed.
    entered: HashMap<NodeId, Queue>,
    entered_now: usize,
    dial_again: HashMap<NodeId, Instant>,
}

/// Says where a peer listens, as nodes announce it.
pub type Resolve = dyn Fn(&NodeId) -> Option<String> + Send + Sync;

/// See the module.
pub struct Links {
    me: NodeId,
    resolve: Box<Resolve>,
    receive: OnceLock<Weak<dyn Receive>>,
    state: Mutex<State>,
    /// For the bytes of what arrives.
    buffers: Arc<BufferPool>,
    this: Weak<Links>,
}

impl Links {
    /// No connections yet. `resolve` says where a peer listens, as nodes announce it.
    pub fn new(me: NodeId, resolve: impl Fn(&NodeId) -> Option<String> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            me,
            resolve: Box::new(resolve),
            receive: OnceLock::new(),
            state: Mutex::default(),
            buffers: BufferPool::new(0),
            this: this.clone(),
        })
    }

    /// Names who takes what arrives; the first call counts.
    pub fn deliver_to(&self, receive: Weak<dyn Receive>) {
        let _ = self.receive.set(receive);
    }

    /// Where a peer listens, if that is known.
    pub fn address(&self, peer: &NodeId) -> Option<String> {
        (self.resolve)(peer)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receiver(&self) -> Option<Arc<dyn Receive>> {
        self.receive.get()?.upgrade()
    }

    /// Asks something of a peer, on the connection that this node dialed or dials now.
    pub fn ask(&self, peer: &NodeId, mut frames: Vec<Frame>) {
        let mut state = loop {
            let state = self.state();
            // The thread of one that has ended is about to say so.
            let known = state.dialed.get(peer).filter(|queue| !queue.out.has_ended());
            let Some(out) = known.map(|queue| Arc::clone(&queue.out)) else {
                break state;
            };
            drop(state);
            match out.put(frames) {
                Ok(()) => return,
                Err(back) => frames = back,
            }
        };
        state.next += 1;
        let number = state.next;
        let out = Arc::new(Outbox::default());
        // It has just begun, so it takes them.
        let _ = out.put(frames);
        let queue = Queue {
            number,
            out: Arc::clone(&out),
        };
        state.dialed.insert(peer.clone(), queue);
        let wait = state.dial_again.get(peer).copied();
        drop(state);
        let Some(this) = self.this.upgrade() else { return };
        let peer = peer.clone();
        let dial = move || this.dialed(&peer, number, wait, &out);
        if let Err(error) = thread::Builder::new().name("peer-out".into()).spawn(dial) {
            tracing::error!(%error, "cannot start a thread for a peer");
        }
    }

    /// Answers a peer, on the connection that it dialed last. Without one the answers are dropped: whoever asked knows.
    pub fn answer(&self, peer: &NodeId, frames: Vec<Frame>) {
        let known = self.state().entered.get(peer).map(|queue| Arc::clone(&queue.out));
        if let Some(out) = known {
            let _ = out.put(frames);
        }
    }

    /// A connection of this node's own, from dialing to its end.
    fn dialed(&self, peer: &NodeId, number: u64, wait: Option<Instant>, out: &Outbox) {
        if let Some(left) = wait.and_then(|until| until.checked_duration_since(Instant::now())) {
            thread::sleep(left);
        }
        let again = match self.dial(peer) {
            Ok(socket) => {
                tracing::debug!(%peer, "connected");
                self.converse(peer, socket, &[], out);
                None
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot reach a peer");
                out.end();
                Some(Instant::now() + DIAL_AGAIN)
            }
        };
        {
            let mut state = self.state();
            if state.dialed.get(peer).is_some_and(|queue| queue.number == number) {
                state.dialed.remove(peer);
            }
            match again {
                Some(at) => state.dial_again.insert(peer.clone(), at),
                None => state.dial_again.remove(peer),
            };
        }
        if let Some(receive) = self.receiver() {
            receive.lost(peer);
        }
    }

    fn dial(&self, peer: &NodeId) -> Result<Socket, PeerError> {
        let address = (self.resolve)(peer).ok_or_else(|| protocol(format!("no address of {peer} is known")))?;
        let mut socket = Socket::dial(&address.parse()?).map_err(|error| broken("connect", error))?;
        let setting = |error| broken("set up", error);
        socket.set_timeout(Some(DIAL_TIMEOUT)).map_err(setting)?;
        let hello = Hello {
            node: self.me.clone(),
            to: Some(peer.clone()),
        };
        shake_hands_as_peer(&mut socket, &hello)?;
        socket.prepare().map_err(setting)?;
        Ok(socket)
    }

    /// Sends what is put into `out` and delivers what comes, until the connection breaks. `early` came behind the
    /// handshake.
    fn converse(&self, peer: &NodeId, socket: Socket, early: &[u8], out: &Outbox) {
        let (Ok(reading), Ok(writing)) = (socket.twin(), socket.twin()) else {
            return out.end();
        };
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut reading = BufReader::with_capacity(BUFFER_BYTES, early.chain(reading));
                self.deliver(peer, &mut reading);
                out.end();
            });
            if let Err(error) = out.run(writing.into()) {
                tracing::debug!(%peer, %error, "a connection to a peer broke");
            }
            socket.shut();
        });
    }

    fn deliver(&self, peer: &NodeId, from: &mut BufReader<impl Read>) {
        loop {
            let mut frames = Vec::new();
            let ends = loop {
                match Frame::read(from, &self.buffers) {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break true,
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        tracing::warn!(%peer, %error, "a peer does not speak as a node does; it is hung up on");
                        break true;
                    }
                    Err(error) => {
                        tracing::debug!(%peer, %error, "a connection to a peer broke");
                        break true;
                    }
                }
                if frames.len() >= DELIVERED_MAX || !Frame::is_whole(from.buffer()) {
                    break false;
                }
            };
            if !frames.is_empty() {
                match self.receiver() {
                    Some(receive) => receive.received(peer, frames),
                    None => return,
                }
            }
            if ends {
                return;
            }
        }
    }
}

impl PeerDoor for Links {
    fn greet(&self, hello: &[u8]) -> Result<Vec<u8>, String> {
        let hello: Hello = serde_json::from_slice(hello).map_err(|error| format!("no node says that: {error}"))?;
        if hello.to.as_ref() != Some(&self.me) {
            return Err(format!("this is node {}", self.me));
        }
        if (self.resolve)(&hello.node).is_none() {
            return Err(format!(
                "node {} has not joined as far as {} knows",
                hello.node, self.me
            ));
        }
        let answer = Hello {
            node: self.me.clone(),
            to: Some(hello.node),
        };
        serde_json::to_vec(&answer).map_err(|error| error.to_string())
    }

    fn enter(&self, hello: &[u8], socket: Accepted, early: Vec<u8>) {
        let (Ok(hello), Some(this)) = (serde_json::from_slice::<Hello>(hello), self.this.upgrade()) else {
            return;
        };
        let out = Arc::new(Outbox::default());
        let number = {
            let mut state = self.state();
            if state.entered_now >= ENTERED_MAX {
                tracing::warn!(peer = %hello.node, "a peer is hung up on: {ENTERED_MAX} connections of peers are open");
                return;
            }
            state.entered_now += 1;
            state.next += 1;
            let number = state.next;
            let queue = Queue {
                number,
                out: Arc::clone(&out),
            };
            if let Some(older) = state.entered.insert(hello.node.clone(), queue) {
                older.out.end();
            }
            number
        };
        let body = move || {
            if let Ok(socket) = Socket::accepted(socket) {
                this.converse(&hello.node, socket, &early, &out);
            }
            let mut state = this.state();
            state.entered_now -= 1;
            if state
                .entered
                .get(&hello.node)
                .is_some_and(|queue| queue.number == number)
            {
                state.entered.remove(&hello.node);
            }
        };
        if let Err(error) = thread::Builder::new().name("peer-in".into()).spawn(body) {
            tracing::error!(%error, "cannot start a thread for a peer");
        }
    }
}
