//! What goes out on one connection, in its order.
//!
//! Whoever has something to say writes it to the socket, if nobody else does and the socket has room: a thread between
//! would have to be woken for it, which takes longer than the write. What the socket has no room for is left to the
//! connection's own thread.
//!
//! Invariants: nobody but that thread ever waits for the peer; frames leave in the order in which they were put in, and
//! each once.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use super::frame::{Frame, PREFIX_BYTES};

/// Frames of one system call; the kernel takes 1,024 pieces, and a frame has three.
const FRAMES_AT_ONCE: usize = 128;
/// Turns after which whoever writes leaves the rest, which others put in meanwhile, to the connection's thread.
const TURNS_MAX: usize = 4;

/// Frames on their way.
#[derive(Default)]
struct Parcel {
    frames: VecDeque<([u8; PREFIX_BYTES], Frame)>,
    /// Bytes of the first one that have left.
    left: usize,
}

impl Parcel {
    /// Sends all of it; with `now`, as far as the socket has room. Says whether all of it has left.
    fn send(&mut self, socket: &OwnedFd, now: bool) -> io::Result<bool> {
        let flags = if now { MsgFlags::MSG_DONTWAIT } else { MsgFlags::empty() } | MsgFlags::MSG_NOSIGNAL;
        while !self.frames.is_empty() {
            let mut skip = self.left;
            let mut slices = Vec::with_capacity(3 * self.frames.len().min(FRAMES_AT_ONCE));
            for (prefix, frame) in self.frames.iter().take(FRAMES_AT_ONCE) {
                for part in [prefix.as_slice(), &frame.head, &frame.data] {
                    let skipped = skip.min(part.len());
                    skip -= skipped;
                    if skipped < part.len() {
                        slices.push(IoSlice::new(&part[skipped..]));
                    }
                }
            }
            match sendmsg::<()>(socket.as_raw_fd(), &slices, &[], flags, None) {
                Ok(sent) => {
                    drop(slices);
                    self.forget(sent);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if now => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn forget(&mut self, sent: usize) {
        self.left += sent;
        while let Some((_, frame)) = self.frames.front() {
            let length = PREFIX_BYTES + frame.head.len() + frame.data.len();
            if self.left < length {
                break;
            }
            self.left -= length;
            self.frames.pop_front();
        }
    }
}

#[derive(Default)]
struct State {
    waiting: Parcel,
    socket: Option<Arc<OwnedFd>>,
    /// Somebody sends; the next ones only put in.
    sending: bool,
    /// It is the connection's thread that does, or has to.
    left_to_thread: bool,
    ended: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends frames as soon as there is a connection with room for them. Gives them back if the connection has ended.
    pub(super) fn put(&self, frames: Vec<Frame>) -> Result<(), Vec<Frame>> {
        let mut state = self.state();
        if state.ended {
            return Err(frames);
        }
        for frame in frames {
            match frame.prefix() {
                Ok(prefix) => state.waiting.frames.push_back((prefix, frame)),
                Err(error) => {
                    tracing::error!(%error, "a frame to a peer cannot be sent");
                    self.end_with(&mut state);
                    return Ok(());
                }
            }
        }
        let Some(socket) = state.socket.clone().filter(|_| !state.sending) else {
            return Ok(());
        };
        state.sending = true;
        for _ in 0..TURNS_MAX {
            let mut parcel = std::mem::take(&mut state.waiting);
            drop(state);
            let sent = parcel.send(&socket, true);
            state = self.state();
            match sent {
                Ok(true) if state.waiting.frames.is_empty() => {
                    state.sending = false;
                    return Ok(());
                }
                Ok(true) => {}
                Ok(false) => {
                    parcel.frames.append(&mut state.waiting.frames);
                    state.waiting = parcel;
                    break;
                }
                Err(error) => {
                    tracing::debug!(%error, "a connection to a peer broke");
                    self.end_with(&mut state);
                    return Ok(());
                }
            }
        }
        state.left_to_thread = true;
        self.changed.notify_all();
        Ok(())
    }

    fn end_with(&self, state: &mut State) {
        state.ended = true;
        state.socket = None;
        state.waiting = Parcel::default();
        self.changed.notify_all();
    }

    /// Whether it takes nothing more.
    pub(super) fn has_ended(&self) -> bool {
        self.state().ended
    }

    /// Ends it: what has not left is dropped.
    pub(super) fn end(&self) {
        self.end_with(&mut self.state());
    }

    /// Sends on a connection what others leave, until it ends. For the connection's own thread.
    pub(super) fn run(&self, socket: OwnedFd) -> io::Result<()> {
        let socket = Arc::new(socket);
        let mut state = self.state();
        state.socket = Some(Arc::clone(&socket));
        state.sending = !state.waiting.frames.is_empty();
        state.left_to_thread = state.sending;
        loop {
            while !state.left_to_thread && !state.ended {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.ended {
                return Ok(());
            }
            let mut parcel = std::mem::take(&mut state.waiting);
            drop(state);
            let sent = parcel.send(&socket, false);
            state = self.state();
            if let Err(error) = sent {
                self.end_with(&mut state);
                return Err(error);
            }
            if state.waiting.frames.is_empty() {
                state.sending = false;
                state.left_to_thread = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn frame(number: u32) -> Frame {
        Frame {
            head: number.to_be_bytes().to_vec(),
            data: vec![number as u8; 3_000].into(),
        }
    }

    #[test]
    fn frames_leave_in_their_order_also_when_the_socket_is_full() {
        const FRAMES: u32 = 2_000;
        let pool = crate::export::nbd::buffer::BufferPool::new(0);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::default();
        // Before there is a connection, too.
        outbox.put(vec![frame(0), frame(1)]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| outbox.run(ours.into()).unwrap());
            // Far more than a socket holds, and nobody reads yet: this must not wait.
            for number in (2..FRAMES).step_by(2) {
                outbox.put(vec![frame(number), frame(number + 1)]).unwrap();
            }
            for number in 0..FRAMES {
                assert_eq!(Frame::read(&mut theirs, &pool).unwrap(), Some(frame(number)));
            }
            outbox.end();
        });
        assert!(outbox.put(vec![frame(0)]).is_err());
        drop(outbox);
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_connection_that_broke_takes_nothing_more() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::default();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| outbox.run(ours.into()));
            drop(theirs);
            while outbox.put(vec![frame(1)]).is_ok() {}
            // It ends, whoever noticed first.
            let _ = thread.join().unwrap();
        });
    }
}
