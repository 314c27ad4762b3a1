//! The process that keeps descriptors for daemons. It knows nothing of what they are, does nothing with them, and is
//! small enough to never need a restart itself.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr, sockopt};

use super::{Answer, Ask, ENTRIES_MAX, METADATA_BYTES_MAX, NAME_BYTES_MAX, NAMES_PER_PAGE, receive, send};

/// Connections at a time: daemons of one machine, with room for the old and the new one of each.
const CONNECTIONS_MAX: usize = 64;

/// Names a connection for the time of its life.
type ConnectionId = u64;

struct Entry {
    fd: OwnedFd,
    metadata: String,
    /// Who stored or took it last.
    owner: ConnectionId,
}

#[derive(Default)]
struct Holder {
    entries: BTreeMap<String, Entry>,
    connections: BTreeMap<ConnectionId, OwnedFd>,
    connections_so_far: u64,
}

/// Keeps descriptors for whoever connects to `socket` as the same user, until killed or, with `exit_when_unused`,
/// until it holds nothing and the last client has gone. Says `ready` on standard output once it listens.
///
/// # Errors
/// If another holder has the socket, or it cannot be made.
pub fn run(socket_path: &Path, exit_when_unused: bool) -> io::Result<()> {
    let folder = socket_path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let lock_path = socket_path.with_extension("lock");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another descriptor holder has {}; use that one", socket_path.display()),
            ));
        }
        Err(TryLockError::Error(e)) => return Err(e),
    }
    // Bound beside its place and moved there: whoever finds it is answered. Under the lock a socket of either name can
    // only be a dead holder's.
    let fresh = socket_path.with_extension("new");
    for left_behind in [socket_path, &fresh] {
        match fs::remove_file(left_behind) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    // If memory runs out, everything else goes first; only root may ask for that.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let listener = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(&fresh)?)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
    socket::listen(&listener, Backlog::new(16)?)?;
    fs::rename(&fresh, socket_path)?;
    // Whoever started it may have gone already; that is no reason to end.
    let _ = writeln!(io::stdout(), "ready").and_then(|()| io::stdout().flush());
    if exit_when_unused {
        // A daemon started it and may end first: whoever reads that one's output must not wait for this process.
        let null = File::options().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(&null)?;
        nix::unistd::dup2_stderr(&null)?;
    }
    Holder::default().serve(&listener, exit_when_unused)?;
    fs::remove_file(socket_path)
}

impl Holder {
    fn serve(&mut self, listener: &OwnedFd, exit_when_unused: bool) -> io::Result<()> {
        loop {
            let ready = self.wait(listener)?;
            for id in ready.connections {
                if !self.exchange(id) {
                    self.connections.remove(&id);
                }
            }
            if ready.listener {
                self.accept(listener);
            }
            let used = !self.connections.is_empty() || !self.entries.is_empty() || self.connections_so_far == 0;
            if exit_when_unused && !used {
                return Ok(());
            }
        }
    }

    fn wait(&self, listener: &OwnedFd) -> io::Result<Ready> {
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        polled.extend(
            self.connections
                .values()
                .map(|c| PollFd::new(c.as_fd(), PollFlags::POLLIN)),
        );
        loop {
            match poll(&mut polled, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                other => break other.map(drop)?,
            }
        }
        let any = |p: &PollFd<'_>| p.any().unwrap_or(true);
        Ok(Ready {
            listener: any(&polled[0]),
            connections: self
                .connections
                .keys()
                .zip(&polled[1..])
                .filter(|(_, p)| any(p))
                .map(|(id, _)| *id)
                .collect(),
        })
    }

    fn accept(&mut self, listener: &OwnedFd) {
        use std::os::fd::FromRawFd;
        let Ok(raw) = socket::accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else {
            return;
        };
        // SAFETY: accept4 just made this descriptor; nobody else knows it.
        let connection = unsafe { OwnedFd::from_raw_fd(raw) };
        let own = nix::unistd::geteuid().as_raw();
        let peer = socket::getsockopt(&connection, sockopt::PeerCredentials).map(|c| c.uid());
        if peer != Ok(own) && peer != Ok(0) || self.connections.len() >= CONNECTIONS_MAX {
            return;
        }
        self.connections_so_far += 1;
        self.connections.insert(self.connections_so_far, connection);
    }

    /// Reads one request and answers it; false if the connection is over.
    fn exchange(&mut self, id: ConnectionId) -> bool {
        let Some(connection) = self.connections.get(&id) else {
            return false;
        };
        let Ok(Some((ask, fd))) = receive::<Ask>(connection.as_fd()) else {
            return false;
        };
        let answer = self.answer(id, ask, fd);
        let with = match &answer {
            (Answer::Taken { .. }, Some(name)) => self.entries.get(name).map(|e| e.fd.as_fd()),
            _ => None,
        };
        self.connections
            .get(&id)
            .is_some_and(|connection| send(connection.as_fd(), &answer.0, with).is_ok())
    }

    /// What to answer, and the entry whose descriptor goes with it.
    fn answer(&mut self, id: ConnectionId, ask: Ask, fd: Option<OwnedFd>) -> (Answer, Option<String>) {
        let refused = |why: String| (Answer::Refused { why }, None);
        let foreign = |entry: &Entry| entry.owner != id && self.connections.contains_key(&entry.owner);
        match ask {
            Ask::Store { name, metadata } => {
                let Some(fd) = fd else {
                    return refused("no descriptor came with it".into());
                };
                let name_fits = (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control);
                if !name_fits || metadata.len() > METADATA_BYTES_MAX {
                    return refused(format!(
                        "names have 1 to {NAME_BYTES_MAX} bytes without control characters, metadata up to \
                         {METADATA_BYTES_MAX}"
                    ));
                }
                if self.entries.get(&name).is_some_and(foreign) {
                    return (Answer::Owned, None);
                }
                if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&name) {
                    return refused(format!("it holds {ENTRIES_MAX} descriptors already"));
                }
                self.entries.insert(
                    name,
                    Entry {
                        fd,
                        metadata,
                        owner: id,
                    },
                );
                (Answer::Done, None)
            }
            Ask::Take { name } => {
                let owned = self.entries.get(&name).is_some_and(foreign);
                match self.entries.get_mut(&name) {
                    None => (Answer::Missing, None),
                    Some(_) if owned => (Answer::Owned, None),
                    Some(entry) => {
                        entry.owner = id;
                        (
                            Answer::Taken {
                                metadata: entry.metadata.clone(),
                            },
                            Some(name),
                        )
                    }
                }
            }
            Ask::Remove { name } => match self.entries.get(&name) {
                None => (Answer::Missing, None),
                Some(entry) if foreign(entry) => (Answer::Owned, None),
                Some(_) => {
                    self.entries.remove(&name);
                    (Answer::Done, None)
                }
            },
            Ask::List { after } => {
                let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
                let mut names: Vec<String> = self
                    .entries
                    .range(above)
                    .take(NAMES_PER_PAGE + 1)
                    .map(|(n, _)| n.clone())
                    .collect();
                let more = names.len() > NAMES_PER_PAGE;
                names.truncate(NAMES_PER_PAGE);
                (Answer::Names { names, more }, None)
            }
        }
    }
}

struct Ready {
    listener: bool,
    connections: Vec<ConnectionId>,
}
