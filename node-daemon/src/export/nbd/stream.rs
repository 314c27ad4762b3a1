//! Sockets: a connection's stream, unix or TCP, and the listeners that make them.

use std::fs::{self, File, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, setsockopt, sockopt};
use tokio::io::{Interest, Ready};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::NbdError;

/// Socket buffers asked for, so that a batch of replies fits; the kernel caps it.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;
/// Connections the kernel keeps for a listener that is busy.
const BACKLOG: u32 = 128;
/// First file descriptor that systemd passes (sd_listen_fds).
const LISTEN_FDS_START: i32 = 3;

/// A connected socket, not yet tied to a runtime.
pub enum Accepted {
    /// A unix socket.
    Unix(StdUnixStream),
    /// A TCP socket.
    Tcp(std::net::TcpStream),
}

impl Accepted {
    /// Ties the socket to the runtime of the calling task.
    pub fn into_stream(self) -> io::Result<Stream> {
        Ok(match self {
            Accepted::Unix(stream) => Stream::Unix(UnixStream::from_std(stream)?),
            Accepted::Tcp(stream) => Stream::Tcp(TcpStream::from_std(stream)?),
        })
    }
}

/// A connection's socket. None of the `try_` calls waits.
pub enum Stream {
    /// A unix socket.
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self {
            Stream::Unix($stream) => $call,
            Stream::Tcp($stream) => $call,
        }
    };
}

impl Stream {
    /// Unties the socket from its runtime.
    ///
    /// # Errors
    /// The runtime's, when it is shutting down.
    pub fn into_accepted(self) -> io::Result<Accepted> {
        Ok(match self {
            Stream::Unix(stream) => Accepted::Unix(stream.into_std()?),
            Stream::Tcp(stream) => Accepted::Tcp(stream.into_std()?),
        })
    }

    /// Reads what is there.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_read(buf))
    }

    /// Reads what is there into several buffers.
    pub fn try_read_vectored(&self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_read_vectored(bufs))
    }

    /// Writes what fits.
    pub fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_write(buf))
    }

    /// Writes what fits from several buffers.
    pub fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, stream => stream.try_write_vectored(bufs))
    }

    /// Waits until reading or writing may get further.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        either!(self, stream => stream.ready(interest).await)
    }

    /// Writes all of `bytes`, waiting as needed.
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ready(Interest::WRITABLE).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

enum Kind {
    Unix(StdUnixListener),
    Tcp(std::net::TcpListener),
}

/// A listening socket, not yet tied to a runtime.
pub struct Listener {
    kind: Kind,
    place: String,
    /// What to remove at the end, if this process made it.
    bound: Option<Bound>,
}

/// A socket file that this process made, and the lock that says so.
struct Bound {
    path: PathBuf,
    inode: (u64, u64),
    /// Somebody else goes on listening there.
    stays: bool,
    _lock: Flock<File>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        let still_ours = fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if still_ours
            && !self.stays
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the NBD socket");
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

impl Listener {
    /// Listens on a unix socket at `path` with permissions `mode`. A socket that a dead daemon left is replaced.
    ///
    /// # Errors
    /// [`NbdError::InUse`] if a daemon serves there now, [`NbdError::NotSocket`] if something else has the name.
    pub fn unix(path: &Path, mode: u32) -> Result<Self, NbdError> {
        let failed = |what: &'static str| {
            let path = path.to_owned();
            move |source: io::Error| NbdError::Listen {
                what,
                place: path.display().to_string(),
                source,
            }
        };
        let lock_path = with_suffix(path, ".lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(failed("create the lock of"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| NbdError::InUse { path: path.to_owned() })?;
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(NbdError::NotSocket { path: path.to_owned() }),
            Ok(_) if StdUnixStream::connect(path).is_ok() => {
                return Err(NbdError::InUse { path: path.to_owned() });
            }
            _ => {}
        }
        // Bound beside its place and moved there: never visible with other permissions, never absent in between.
        let fresh = with_suffix(path, ".new");
        if fs::symlink_metadata(&fresh).is_ok_and(|m| m.file_type().is_socket()) {
            fs::remove_file(&fresh).map_err(failed("clear the way for"))?;
        }
        let listener = StdUnixListener::bind(&fresh).map_err(failed("bind"))?;
        fs::set_permissions(&fresh, Permissions::from_mode(mode)).map_err(failed("set permissions of"))?;
        let made = fs::symlink_metadata(&fresh).map_err(failed("look at"))?;
        fs::rename(&fresh, path).map_err(failed("put in place"))?;
        let bound = Bound {
            path: path.to_owned(),
            inode: (made.dev(), made.ino()),
            stays: false,
            _lock: lock,
        };
        Ok(Self {
            kind: Kind::Unix(listener),
            place: format!("unix:{}", path.display()),
            bound: Some(bound),
        })
    }

    /// Leaves the socket in its place at the end, because a holder of descriptors keeps it open: clients that come
    /// while no daemon runs wait for the next one.
    pub fn stays(&mut self) {
        if let Some(bound) = &mut self.bound {
            bound.stays = true;
        }
    }

    /// Listens on a TCP address, which must be a loopback address until the server has TLS.
    ///
    /// # Errors
    /// [`NbdError::NotLoopback`], or why the address cannot be bound.
    pub fn tcp(address: SocketAddr) -> Result<Self, NbdError> {
        if !address.ip().is_loopback() {
            return Err(NbdError::NotLoopback { address });
        }
        let listener = std::net::TcpListener::bind(address).map_err(|source| NbdError::Listen {
            what: "bind",
            place: address.to_string(),
            source,
        })?;
        let address = listener.local_addr().unwrap_or(address);
        Ok(Self {
            kind: Kind::Tcp(listener),
            place: format!("tcp:{address}"),
            bound: None,
        })
    }

    /// Takes over a listening socket that another process opened, such as systemd or the daemon before this one.
    ///
    /// # Errors
    /// [`NbdError::Inherited`] if it is not a listening unix socket or one on a loopback address.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NbdError> {
        let number = fd.as_raw_fd();
        let refused = |why: String| NbdError::Inherited { fd: number, why };
        let listening =
            nix::sys::socket::getsockopt(&fd, sockopt::AcceptConn).map_err(|error| refused(error.to_string()))?;
        if !listening {
            return Err(refused("it is not listening".into()));
        }
        let name: SockaddrStorage = getsockname(number).map_err(|error| refused(error.to_string()))?;
        match name.family() {
            Some(AddressFamily::Unix) => {
                let listener = StdUnixListener::from(fd);
                let place = listener
                    .local_addr()
                    .ok()
                    .and_then(|a| a.as_pathname().map(|p| format!("unix:{}", p.display())))
                    .unwrap_or_else(|| "unix:".into());
                Ok(Self {
                    kind: Kind::Unix(listener),
                    place,
                    bound: None,
                })
            }
            Some(AddressFamily::Inet | AddressFamily::Inet6) => {
                let listener = std::net::TcpListener::from(fd);
                let address = listener.local_addr().map_err(|error| refused(error.to_string()))?;
                if !address.ip().is_loopback() {
                    return Err(NbdError::NotLoopback { address });
                }
                Ok(Self {
                    kind: Kind::Tcp(listener),
                    place: format!("tcp:{address}"),
                    bound: None,
                })
            }
            other => Err(refused(format!("its address family is {other:?}"))),
        }
    }

    /// Where it listens: `unix:/path` or `tcp:127.0.0.1:port`, as the peer client takes it.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Ties the listener to the runtime of the calling task.
    pub(super) fn into_acceptor(self) -> io::Result<Acceptor> {
        let kind = match self.kind {
            Kind::Unix(listener) => {
                listener.set_nonblocking(true)?;
                AcceptorKind::Unix(UnixListener::from_std(listener)?)
            }
            Kind::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                AcceptorKind::Tcp(TcpListener::from_std(listener)?)
            }
        };
        Ok(Acceptor {
            kind,
            place: self.place,
            _bound: self.bound,
        })
    }

    /// A duplicate of the listening socket, to be handed to the daemon that takes over.
    ///
    /// # Errors
    /// The system's, such as no file descriptor left.
    pub fn duplicate_fd(&self) -> io::Result<OwnedFd> {
        match &self.kind {
            Kind::Unix(listener) => listener.as_fd().try_clone_to_owned(),
            Kind::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
        }
    }
}

enum AcceptorKind {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A listener at work.
pub(super) struct Acceptor {
    kind: AcceptorKind,
    place: String,
    _bound: Option<Bound>,
}

impl Acceptor {
    /// The next connection, with its buffers set up.
    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        let accepted = match &self.kind {
            AcceptorKind::Unix(listener) => Accepted::Unix(listener.accept().await?.0.into_std()?),
            AcceptorKind::Tcp(listener) => {
                let stream = listener.accept().await?.0;
                stream.set_nodelay(true)?;
                Accepted::Tcp(stream.into_std()?)
            }
        };
        let fd = match &accepted {
            Accepted::Unix(stream) => stream.as_fd(),
            Accepted::Tcp(stream) => stream.as_fd(),
        };
        // Larger is faster, never needed: a kernel that refuses is no error.
        let _ = setsockopt(&fd, sockopt::SndBuf, &SOCKET_BUFFER_BYTES);
        let _ = setsockopt(&fd, sockopt::RcvBuf, &SOCKET_BUFFER_BYTES);
        Ok(accepted)
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }
}

/// The listening sockets that the environment hands to this process (`LISTEN_PID`, `LISTEN_FDS`: systemd's socket
/// activation, or a daemon that hands over). Call once, early: it owns file descriptors 3 and up from then on.
///
/// # Errors
/// [`NbdError::Inherited`] if one of them cannot be served.
pub fn listener_from_env() -> Result<Vec<Listener>, NbdError> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").unwrap_or(0).min(BACKLOG);
    (0..count as i32)
        .map(|place| {
            let fd = LISTEN_FDS_START + place;
            let flags = nix::fcntl::FdFlag::FD_CLOEXEC;
            // SAFETY: only borrowed for the call; if the number is no open file, the call says so.
            let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(flags)).map_err(|error| NbdError::Inherited {
                fd,
                why: error.to_string(),
            })?;
            // SAFETY: the environment says that this open file was passed to this process to own.
            Listener::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })
        })
        .collect()
}
