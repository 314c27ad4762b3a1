//! The server: listeners, the connections they make, and the hold on them.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use hearth_protocol::ImageId;
use tokio::runtime::{self, Handle};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;

use super::buffer::{Budget, BufferPool};
use super::connection::{Arrived, Connection, Control, End, shake_hands};
use super::handshake::Chosen;
use super::limits::NbdLimits;
use super::stream::{Accepted, Listener};
use super::workers::Workers;
use super::{ExportEntry, ExportTable, NbdError, PeerDoor, pace, ring};
use crate::mutants;

/// A connection as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// Number since the server started.
    pub id: u64,
    /// The export it uses, by the name it used; empty during the handshake.
    pub export: String,
    /// The image behind it.
    pub image: Option<ImageId>,
}

struct Held {
    info: ConnectionInfo,
    /// It uses an entry that is served read-only, such as a sealed layer of the image.
    is_view: bool,
    control: Arc<Control>,
}

#[derive(Default)]
struct Registry {
    connections: Mutex<HashMap<u64, Held>>,
    ended: Notify,
    next: AtomicU64,
    refused: AtomicU64,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Held>> {
        self.connections.lock().expect("no panic under this lock")
    }
}

/// A connection's entry in the registry; dropping it removes the entry.
struct Registered {
    id: u64,
    control: Arc<Control>,
    registry: Arc<Registry>,
}

impl Registered {
    /// Enters a new connection; `None` if there are too many in transmission. A crowd that only shakes hands keeps
    /// nobody out: the one that has dawdled longest goes.
    fn new(registry: &Arc<Registry>, connections_max: usize) -> Option<Self> {
        let mut connections = registry.lock();
        if connections.len() >= connections_max && !mutants::CONNECTIONS_UNCOUNTED.is_on() {
            registry.refused.fetch_add(1, Ordering::Relaxed);
            let dawdlers = connections.iter().filter(|(_, held)| held.info.image.is_none());
            let oldest = dawdlers.map(|(id, _)| *id).min()?;
            if let Some(held) = connections.remove(&oldest) {
                held.control.hang_up();
            }
        }
        let id = registry.next.fetch_add(1, Ordering::Relaxed) + 1;
        let control = Arc::new(Control::default());
        let info = ConnectionInfo {
            id,
            export: String::new(),
            image: None,
        };
        connections.insert(
            id,
            Held {
                info,
                is_view: false,
                control: Arc::clone(&control),
            },
        );
        Some(Self {
            id,
            control,
            registry: Arc::clone(registry),
        })
    }

    /// Notes what the connection uses, or says why it may not.
    fn choose(&self, export: &str, entry: &ExportEntry, per_image_max: usize) -> Result<(), String> {
        let mut connections = self.registry.lock();
        let image = entry.disk.image();
        let uses = |held: &&Held| held.info.image == Some(image) && !held.is_view;
        if !entry.read_only
            && connections.values().filter(uses).count() >= per_image_max
            && !mutants::CONNECTIONS_UNCOUNTED.is_on()
        {
            self.registry.refused.fetch_add(1, Ordering::Relaxed);
            return Err(format!(
                "the image has {per_image_max} connections already, the most one image may have: close some first"
            ));
        }
        let held = connections
            .get_mut(&self.id)
            .ok_or("the handshake took longer than others could wait: connect again")?;
        held.info.export = export.to_owned();
        held.info.image = Some(image);
        held.is_view = entry.read_only;
        Ok(())
    }
}

/// The server's table with the bounds on connections in front of it.
struct Admission<'a> {
    table: &'a dyn ExportTable,
    registered: &'a Registered,
    per_image_max: usize,
}

impl ExportTable for Admission<'_> {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        self.table.find(name)
    }

    fn admit(&self, name: &str, entry: &ExportEntry) -> Result<(), String> {
        self.registered.choose(name, entry, self.per_image_max)
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        self.table.list(after, max)
    }

    fn peers(&self) -> Option<&dyn PeerDoor> {
        self.table.peers()
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
        self.registry.ended.notify_waiters();
    }
}

/// The hold on a server's connections. Cheap to clone; works before, during and after [`NbdServer::run`].
#[derive(Clone)]
pub struct NbdHandle {
    registry: Arc<Registry>,
}

impl NbdHandle {
    /// Connections now, by number.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        let mut all: Vec<_> = self.registry.lock().values().map(|held| held.info.clone()).collect();
        all.sort_by_key(|info| info.id);
        all
    }

    /// Connections turned away because there were too many: in all, or of their image.
    pub fn connections_refused(&self) -> u64 {
        self.registry.refused.load(Ordering::Relaxed)
    }

    /// Ends every connection that uses `image`: requests in flight finish and are answered, later ones get
    /// `ESHUTDOWN`, then the server hangs up. Returns when none is left. Take the image out of the export table first,
    /// so that nobody comes back. Connections to entries served [`ExportEntry::read_only`], such as peers that read
    /// the image's sealed layers, go on.
    pub async fn close_export(&self, image: ImageId) {
        loop {
            let mut ended = pin!(self.registry.ended.notified());
            ended.as_mut().enable();
            let mut left = 0;
            for held in self
                .registry
                .lock()
                .values()
                .filter(|held| held.info.image == Some(image) && !held.is_view)
            {
                held.control.refuse();
                left += 1;
            }
            if left == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Asks every connection to finish what is in flight and hang up, and waits until all have.
    async fn hang_up_all(&self) {
        loop {
            let mut ended = pin!(self.registry.ended.notified());
            ended.as_mut().enable();
            let left = {
                let connections = self.registry.lock();
                connections.values().for_each(|held| held.control.hang_up());
                connections.len()
            };
            if left == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// Threads that read and write sockets, each with a runtime of its own, so that nothing else the daemon does stands
/// in a guest's way. Dropping it ends them with the connections they still have.
struct IoThreads {
    handles: Vec<Handle>,
    stops: Vec<oneshot::Sender<()>>,
    joins: Vec<thread::JoinHandle<()>>,
    next: usize,
}

impl IoThreads {
    fn start(count: usize) -> io::Result<Self> {
        let mut threads = Self {
            handles: Vec::new(),
            stops: Vec::new(),
            joins: Vec::new(),
            next: 0,
        };
        for _ in 0..count.max(1) {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let (stop, stopped) = oneshot::channel::<()>();
            threads.handles.push(runtime.handle().clone());
            threads.stops.push(stop);
            let body = move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = pace::stay_awake() => {}
                        () = ring::serve() => {}
                    }
                });
                ring::close();
            };
            threads
                .joins
                .push(thread::Builder::new().name("nbd-io".into()).spawn(body)?);
        }
        Ok(threads)
    }

    fn next(&mut self) -> &Handle {
        self.next = (self.next + 1) % self.handles.len();
        &self.handles[self.next]
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.stops.clear(); // each thread sees its sender go
        for join in self.joins.drain(..) {
            if join.join().is_err() {
                tracing::error!("a thread of the NBD server panicked");
            }
        }
    }
}

/// An NBD server: listeners that all serve one table of exports.
pub struct NbdServer {
    listeners: Vec<Listener>,
    handle: NbdHandle,
}

impl NbdServer {
    /// A server on `listeners`.
    pub fn new(listeners: Vec<Listener>) -> Self {
        Self {
            listeners,
            handle: NbdHandle {
                registry: Arc::default(),
            },
        }
    }

    /// A server on a unix socket with permissions `mode`; see [`Listener::unix`].
    ///
    /// # Errors
    /// As [`Listener::unix`].
    pub fn bind_unix(path: &Path, mode: u32) -> Result<Self, NbdError> {
        Ok(Self::new(vec![Listener::unix(path, mode)?]))
    }

    /// A server on a TCP loopback address; see [`Listener::tcp`].
    ///
    /// # Errors
    /// As [`Listener::tcp`].
    pub fn bind_tcp(address: SocketAddr) -> Result<Self, NbdError> {
        Ok(Self::new(vec![Listener::tcp(address)?]))
    }

    /// A server on an inherited listening socket; see [`Listener::from_fd`].
    ///
    /// # Errors
    /// As [`Listener::from_fd`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NbdError> {
        Ok(Self::new(vec![Listener::from_fd(fd)?]))
    }

    /// The same server, listening in one more place.
    pub fn with(mut self, listener: Listener) -> Self {
        self.listeners.push(listener);
        self
    }

    /// Where it listens: `unix:/path` and `tcp:127.0.0.1:port`.
    pub fn places(&self) -> Vec<String> {
        self.listeners
            .iter()
            .map(|listener| listener.place().to_owned())
            .collect()
    }

    /// The hold on its connections.
    pub fn handle(&self) -> NbdHandle {
        self.handle.clone()
    }

    /// Serves `table` until `shutdown` ends; then requests in flight finish, replies are sent, and every connection
    /// is hung up. Clients that reconnect find the next daemon: nothing that they sent was refused.
    ///
    /// # Errors
    /// [`NbdError::Start`] if threads or listeners cannot be set up. A connection's failure ends that connection.
    pub async fn run(
        self,
        table: Arc<dyn ExportTable>,
        limits: NbdLimits,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), NbdError> {
        let limits = Arc::new(limits);
        let mut threads = IoThreads::start(limits.io_threads).map_err(NbdError::Start)?;
        let context = Arc::new(Context {
            table,
            pool: BufferPool::new(limits.shared_bytes_max),
            workers: Workers::new(limits.workers_max, limits.workers_per_connection_max),
            limits: Arc::clone(&limits),
        });
        let (accepted, mut arrivals) = tokio::sync::mpsc::channel(16);
        let mut accepting = JoinSet::new();
        for listener in self.listeners {
            let acceptor = listener.into_acceptor().map_err(NbdError::Start)?;
            let accepted = accepted.clone();
            tracing::info!(place = acceptor.place(), "serving NBD");
            accepting.spawn(async move {
                loop {
                    match acceptor.accept().await {
                        Ok(socket) => {
                            if accepted.send(socket).await.is_err() {
                                return;
                            }
                        }
                        Err(error) => {
                            // Out of file descriptors, or a client that left at once: the listener itself is fine.
                            tracing::warn!(place = acceptor.place(), %error, "cannot accept an NBD connection");
                            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                        }
                    }
                }
            });
        }
        drop(accepted);
        let mut shutdown = pin!(shutdown);
        loop {
            let socket = tokio::select! {
                () = &mut shutdown => break,
                socket = arrivals.recv() => socket,
            };
            let Some(socket) = socket else { break };
            let Some(registered) = Registered::new(&self.handle.registry, limits.connections_max) else {
                tracing::warn!(
                    limit = limits.connections_max,
                    "an NBD connection was refused: there are too many"
                );
                continue;
            };
            tokio::spawn(converse(
                Arc::clone(&context),
                registered,
                socket,
                threads.next().clone(),
            ));
        }
        accepting.shutdown().await; // closes the listeners, and removes the sockets that were made here
        if tokio::time::timeout(limits.drain_timeout * 2, self.handle.hang_up_all())
            .await
            .is_err()
        {
            let left = self.handle.connections().len();
            tracing::warn!(left, "NBD connections did not end in time; they are cut");
        }
        // Joining threads takes a moment in which this task's thread can do other things.
        let _ = tokio::task::spawn_blocking(move || drop(threads)).await;
        Ok(())
    }
}

struct Context {
    table: Arc<dyn ExportTable>,
    pool: Arc<BufferPool>,
    workers: Workers,
    limits: Arc<NbdLimits>,
}

/// One connection from accept to hang-up. The handshake is done where connections are accepted: a crowd that gets no
/// further takes no time from the threads that serve guests. `thread` is one of those.
async fn converse(context: Arc<Context>, registered: Registered, socket: Accepted, thread: Handle) {
    let id = registered.id;
    let end = match prepare(&context, &registered, socket).await {
        Ok((socket, Arrived::Peer(hello), early)) => {
            if let Some(door) = context.table.peers() {
                door.enter(&hello, socket, early);
            }
            return;
        }
        Ok((socket, Arrived::Client(chosen), early)) => {
            let ready = (socket, chosen, early);
            let serving = thread.spawn(async move { serve(&context, &registered, ready).await });
            // The thread may be gone already: then so is the server.
            serving.await.unwrap_or(End::Closed)
        }
        Err(end) => end,
    };
    match end {
        End::Closed => tracing::debug!(id, "an NBD connection was closed"),
        end => tracing::warn!(id, %end, "an NBD connection was ended"),
    }
}

/// A connection after its handshake: its socket, what it chose, and what it sent behind it.
type Ready = (Accepted, Chosen, Vec<u8>);

async fn prepare(
    context: &Context,
    registered: &Registered,
    socket: Accepted,
) -> Result<(Accepted, Arrived, Vec<u8>), End> {
    let stream = socket.into_stream().map_err(End::Socket)?;
    let limits = &context.limits;
    let table = Admission {
        table: &*context.table,
        registered,
        per_image_max: limits.connections_per_image_max,
    };
    let handshake = shake_hands(&stream, &table, &registered.control);
    let (arrived, early) = match tokio::time::timeout(limits.handshake_timeout, handshake).await {
        Ok(done) => done?,
        Err(_) => return Err(End::HandshakeTimeout),
    };
    Ok((stream.into_accepted().map_err(End::Socket)?, arrived, early))
}

async fn serve(context: &Context, registered: &Registered, (socket, chosen, early): Ready) -> End {
    let stream = match socket.into_stream() {
        Ok(stream) => stream,
        Err(error) => return End::Socket(error),
    };
    let limits = &context.limits;
    let budget = Budget::new(
        Arc::clone(&context.pool),
        limits.connection_bytes_granted,
        limits.connection_bytes_max,
    );
    let lane = context.workers.lane();
    let control = Arc::clone(&registered.control);
    Connection::new(stream, chosen, &early, lane, budget, Arc::clone(limits), control)
        .run()
        .await
}
