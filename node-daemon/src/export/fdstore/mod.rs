//! A place for file descriptors that must outlive the daemon: the `/dev/fuse` connection of a kernel device, a
//! listening socket. A small process, the *holder*, keeps them; a restarted daemon takes them back.
//!
//! This module is the protocol and the daemon's side of it; [`holder`] is the process. One packet per message over a
//! `SOCK_SEQPACKET` unix socket, descriptors beside it (`SCM_RIGHTS`).
//!
//! Invariant: an entry belongs to the connection that stored or took it, and nobody else gets it before that
//! connection is closed. The kernel closes it only when the last thread of its process has ended, so whoever takes an
//! entry knows that no write of the earlier daemon is still on its way.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
};
use serde::{Deserialize, Serialize};

pub mod holder;

/// Longest name of an entry, in bytes: room for a path.
pub const NAME_BYTES_MAX: usize = 1_024;
/// Longest metadata of an entry, in bytes.
pub const METADATA_BYTES_MAX: usize = 8 << 10;
/// Entries in one holder: an image is one, and a process has about a thousand descriptors by default.
pub const ENTRIES_MAX: usize = 900;
/// Names in one answer to a listing, so that it fits a packet.
const NAMES_PER_PAGE: usize = 64;
/// Largest packet: a page of the longest names, each byte of which may need two in JSON, with room. Below the kernel's
/// default for a unix socket, 208 KiB.
const PACKET_BYTES_MAX: usize = 192 << 10;
const _: () = assert!(PACKET_BYTES_MAX > 2 * NAMES_PER_PAGE * NAME_BYTES_MAX + 6 * METADATA_BYTES_MAX);
/// How long [`FdStore::take`] waits for the earlier owner's process to be gone.
const OWNER_GONE_WITHIN: Duration = Duration::from_secs(30);
/// Between two looks whether it is.
const OWNER_GONE_POLL: Duration = Duration::from_millis(10);

/// Why the holder did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FdStoreError {
    /// No holder answers.
    #[error("no descriptor holder answers on {socket}: {source}; start hearth-fd-holder --socket {socket}")]
    Connect {
        /// Its socket.
        socket: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The holder's program did not start.
    #[error("starting the descriptor holder {program}: {source}; install hearth-fd-holder beside the daemon")]
    Start {
        /// The program.
        program: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The connection broke or carried something else.
    #[error("talking to the descriptor holder: {0}; devices survive no restart until the daemon is started again")]
    Talk(#[source] io::Error),
    /// The holder said no.
    #[error("the descriptor holder refused {name:?}: {why}")]
    Refused {
        /// The entry.
        name: String,
        /// Its reason.
        why: String,
    },
}

/// What a daemon asks of the holder.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// Keep the descriptor sent with this, in place of an older one of the name.
    Store { name: String, metadata: String },
    /// Give it back and keep a copy.
    Take { name: String },
    /// Close it.
    Remove { name: String },
    /// Names from after this one on.
    List { after: String },
}

/// What the holder answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Done,
    /// The descriptor comes with it.
    Taken {
        metadata: String,
    },
    Missing,
    /// Another living process owns it.
    Owned,
    Names {
        names: Vec<String>,
        more: bool,
    },
    Refused {
        why: String,
    },
}

/// A descriptor that was kept, and what was noted beside it.
#[derive(Debug)]
pub struct Kept {
    /// The descriptor; close-on-exec.
    pub fd: OwnedFd,
    /// What its owner wrote beside it.
    pub metadata: String,
}

/// A connection to the holder.
#[derive(Debug)]
pub struct FdStore {
    socket: Mutex<OwnedFd>,
    path: PathBuf,
}

impl FdStore {
    /// Connects to the holder that listens on `socket`.
    ///
    /// # Errors
    /// [`FdStoreError::Connect`].
    pub fn connect(socket: &Path) -> Result<Self, FdStoreError> {
        let attempt = || -> nix::Result<OwnedFd> {
            let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
            socket::connect(fd.as_raw_fd(), &UnixAddr::new(socket)?)?;
            Ok(fd)
        };
        match attempt() {
            Ok(fd) => Ok(Self {
                socket: Mutex::new(fd),
                path: socket.to_path_buf(),
            }),
            Err(e) => Err(FdStoreError::Connect {
                socket: socket.display().to_string(),
                source: e.into(),
            }),
        }
    }

    /// Connects to the holder on `socket`, and starts `program` as one if none answers. It gets a process group of
    /// its own, so that neither the daemon's end nor a Ctrl-C ends it, and leaves by itself when it holds nothing and
    /// nobody is connected.
    ///
    /// # Errors
    /// [`FdStoreError::Start`], [`FdStoreError::Connect`].
    pub fn connect_or_start(socket: &Path, program: &Path) -> Result<Self, FdStoreError> {
        if let Ok(store) = Self::connect(socket) {
            return Ok(store);
        }
        let failed = |source| FdStoreError::Start {
            program: program.display().to_string(),
            source,
        };
        let mut child = Command::new(program)
            .arg("--socket")
            .arg(socket)
            .arg("--exit-when-unused")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            // It says "ready" once it listens, or ends; then the pipe closes.
            BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        }
        let store = Self::connect(socket);
        // Collects the exit status, so that a holder that ended leaves no zombie.
        let reaper = thread::Builder::new()
            .name("hearth-fd-reaper".into())
            .stack_size(64 << 10);
        reaper.spawn(move || child.wait()).map_err(failed)?;
        store
    }

    /// The holder's socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves a copy of `fd` with the holder, in place of an earlier one of that name.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn store(&self, name: &str, fd: BorrowedFd<'_>, metadata: &str) -> Result<(), FdStoreError> {
        let ask = Ask::Store {
            name: name.into(),
            metadata: metadata.into(),
        };
        match self.ask(&ask, Some(fd))?.0 {
            Answer::Done => Ok(()),
            other => Err(unexpected(name, other)),
        }
    }

    /// Takes the entry back; the holder keeps its copy until [`FdStore::remove`]. Waits while the process that stored
    /// it still lives. `None`: there is none of that name.
    ///
    /// # Errors
    /// [`FdStoreError`]; `Refused` if the other process lives on.
    pub fn take(&self, name: &str) -> Result<Option<Kept>, FdStoreError> {
        let started = Instant::now();
        loop {
            match self.ask(&Ask::Take { name: name.into() }, None)? {
                (Answer::Taken { metadata }, Some(fd)) => return Ok(Some(Kept { fd, metadata })),
                (Answer::Missing, _) => return Ok(None),
                (Answer::Owned, _) if started.elapsed() < OWNER_GONE_WITHIN => thread::sleep(OWNER_GONE_POLL),
                (other, _) => return Err(unexpected(name, other)),
            }
        }
    }

    /// Makes the holder close its copy, if it has one.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn remove(&self, name: &str) -> Result<(), FdStoreError> {
        match self.ask(&Ask::Remove { name: name.into() }, None)?.0 {
            Answer::Done | Answer::Missing => Ok(()),
            other => Err(unexpected(name, other)),
        }
    }

    /// Names of all entries that start with `prefix`, sorted.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn list(&self, prefix: &str) -> Result<Vec<String>, FdStoreError> {
        let mut found: Vec<String> = Vec::new();
        let mut after = String::new();
        loop {
            match self.ask(&Ask::List { after: after.clone() }, None)?.0 {
                Answer::Names { names, more } => {
                    if let Some(last) = names.last() {
                        after.clone_from(last);
                    }
                    let ended = names.is_empty() || !more;
                    found.extend(names.into_iter().filter(|n| n.starts_with(prefix)));
                    if ended {
                        return Ok(found);
                    }
                }
                other => return Err(unexpected(prefix, other)),
            }
        }
    }

    fn ask(&self, ask: &Ask, fd: Option<BorrowedFd<'_>>) -> Result<(Answer, Option<OwnedFd>), FdStoreError> {
        // One exchange at a time. A panic inside would leave an answer unread, but nothing in here panics.
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        send(socket.as_fd(), ask, fd).map_err(FdStoreError::Talk)?;
        match receive(socket.as_fd()).map_err(FdStoreError::Talk)? {
            Some(answer) => Ok(answer),
            None => Err(FdStoreError::Talk(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it has ended",
            ))),
        }
    }
}

fn unexpected(name: &str, answer: Answer) -> FdStoreError {
    let why = match answer {
        Answer::Refused { why } => why,
        Answer::Owned => "another living process owns it; end that one first".into(),
        other => format!("it answered {other:?}; daemon and holder are of different versions"),
    };
    FdStoreError::Refused { name: name.into(), why }
}

/// Sends one message as one packet.
fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
    let sent = socket::sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        rights.as_slice(),
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    if sent != bytes.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "a packet was cut"));
    }
    Ok(())
}

/// Receives one message; `None` when the other side has closed.
fn receive<T: for<'de> Deserialize<'de>>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; PACKET_BYTES_MAX];
    let mut control = cmsg_space!([std::os::fd::RawFd; 1]);
    let (length, fd, flags) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = loop {
            match socket::recvmsg::<UnixAddr>(
                socket.as_raw_fd(),
                &mut parts,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        let mut fd = None;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                for raw in raw {
                    // SAFETY: the kernel just made this descriptor for this process; nobody else knows it.
                    fd = Some(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
        }
        (message.bytes, fd, message.flags)
    };
    if length == 0 {
        return Ok(None);
    }
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a packet is larger than any that is sent",
        ));
    }
    Ok(Some((serde_json::from_slice(&bytes[..length])?, fd)))
}
