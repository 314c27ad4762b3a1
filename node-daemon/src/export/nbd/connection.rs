//! One client's connection, from handshake to hang-up.
//!
//! One task reads the socket in large batches, answers what is in RAM in line, hands the rest to the
//! [workers](super::workers), and sends replies in large batches. It reads no further while the client leaves its
//! replies unread or too much is in flight, so a connection's memory is bounded whatever the client does.

use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use hearth_probes::source::Op;
use tokio::io::Interest;
use tokio::sync::Notify;

use super::buffer::{Budget, Buffer};
use super::handshake::{self, Chosen, Handshake, Step};
use super::job::{Failure, Job, Outcome, Terms};
use super::limits::NbdLimits;
use super::output::{Output, REPLY_ROOM_BYTES};
use super::proto::{self, Errno, Framing, Head, Malformed, PAYLOAD_BYTES_MAX, Request, command};
use super::ring::{self, Pending};
use super::stream::Stream;
use super::workers::{Completion, Lane, Submission};
use super::{ExportEntry, ExportTable, pace};

/// Bytes read from the socket at once; large enough for a few hundred requests or a batch of small writes.
const INPUT_BYTES: usize = 128 << 10;
/// A rest of a payload from this on is read with little of what comes behind it.
const LARGE_PAYLOAD_BYTES_MIN: usize = 16 << 10;
/// That little: the next header, and a batch of requests without payload.
const BEHIND_LARGE_BYTES: usize = 1 << 10;
/// Longest read answered from RAM straight into the output arena.
const ARENA_READ_BYTES_MAX: u64 = 64 << 10;
/// Longest read answered from RAM in line; copying more would hold up the other connections of this thread.
const INLINE_READ_BYTES_MAX: u64 = 256 << 10;
/// Batches after which the task lets others of its thread run.
const ROUNDS_PER_TURN: u32 = 16;
/// Largest payload that is read and thrown away, so that its request can be refused politely.
const SKIPPED_PAYLOAD_BYTES_MAX: u64 = 2 * PAYLOAD_BYTES_MAX as u64;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The client hung up, or was asked to go.
    #[error("closed")]
    Closed,
    /// It hung up within a message.
    #[error("the client hung up in the middle of a message")]
    Cut,
    /// What it sent is not the protocol.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The handshake took too long.
    #[error("the handshake took too long")]
    HandshakeTimeout,
    /// It moved nothing while others waited for the memory it held, or did not take its last replies.
    #[error("the client takes no replies, or finishes no request")]
    Stalled,
    /// The socket failed.
    #[error("{0}")]
    Socket(#[source] io::Error),
}

/// What the server wants of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Wish {
    Serve = 0,
    /// Finish what is in flight and hang up; the client comes back and sends the rest again.
    HangUp = 1,
    /// As that, but what still arrives is refused: the export is gone.
    Refuse = 2,
}

/// The server's hold on a connection.
#[derive(Debug, Default)]
pub struct Control {
    wish: AtomicU8,
    changed: Notify,
}

impl Control {
    /// Asks the connection to finish what is in flight and hang up.
    pub fn hang_up(&self) {
        self.set(Wish::HangUp);
    }

    /// Asks the connection to finish what is in flight, refuse what still arrives, and hang up.
    pub fn refuse(&self) {
        self.set(Wish::Refuse);
    }

    fn set(&self, wish: Wish) {
        self.wish.fetch_max(wish as u8, Ordering::AcqRel);
        self.changed.notify_one();
    }

    fn wish(&self) -> Wish {
        match self.wish.load(Ordering::Acquire) {
            0 => Wish::Serve,
            1 => Wish::HangUp,
            _ => Wish::Refuse,
        }
    }
}

/// Carries out the handshake. Bytes that arrive behind it are left for [`Connection`].
///
/// # Errors
/// [`End`]; the client may have got a polite reason.
pub async fn shake_hands(
    stream: &Stream,
    table: &dyn ExportTable,
    control: &Control,
) -> Result<(Arrived, Vec<u8>), End> {
    tokio::select! {
        biased;
        done = converse(stream, table) => done,
        () = control.changed.notified() => Err(End::Closed),
    }
}

/// What came out of a handshake.
pub enum Arrived {
    /// A client that chose an export.
    Client(Chosen),
    /// A node, and what it said of itself.
    Peer(Vec<u8>),
}

async fn converse(stream: &Stream, table: &dyn ExportTable) -> Result<(Arrived, Vec<u8>), End> {
    let mut handshake = Handshake::default();
    let (mut input, mut at) = (Vec::new(), 0);
    let mut out = handshake::greeting().to_vec();
    let mut chunk = [0; 4_096];
    loop {
        stream.write_all(&out).await.map_err(End::Socket)?;
        out.clear();
        let (used, step) = handshake.step(&input[at..], &mut out, table)?;
        at += used;
        match step {
            Step::Again => {}
            Step::Ended => {
                stream.write_all(&out).await.map_err(End::Socket)?;
                return Err(End::Closed);
            }
            Step::Transmit(chosen) => {
                stream.write_all(&out).await.map_err(End::Socket)?;
                input.drain(..at);
                return Ok((Arrived::Client(*chosen), input));
            }
            Step::Peer(hello) => {
                stream.write_all(&out).await.map_err(End::Socket)?;
                input.drain(..at);
                return Ok((Arrived::Peer(hello), input));
            }
            Step::More => {
                // The handshake asks for more only below its bound on an option, so `input` stays bounded too.
                input.drain(..at);
                at = 0;
                let read = loop {
                    match stream.try_read(&mut chunk) {
                        Ok(read) => break read,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            stream.ready(Interest::READABLE).await.map_err(End::Socket)?;
                        }
                        Err(error) => return Err(End::Socket(error)),
                    }
                };
                match read {
                    0 if input.is_empty() => return Err(End::Closed),
                    0 => return Err(End::Cut),
                    read => input.extend_from_slice(&chunk[..read]),
                }
            }
        }
    }
}

/// Where the input stands.
enum Receiving {
    /// Between requests, or within a header.
    Header,
    /// Within a write's payload.
    Payload {
        request: Request,
        buffer: Buffer,
        filled: usize,
    },
    /// Within the payload of a request that is refused.
    Skip {
        request: Request,
        left: u64,
        failure: Failure,
    },
}

/// Why no further request was taken.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// The rest has not arrived.
    Input,
    /// The replies before it must be sent.
    Output,
    /// Requests in flight must end, or memory must come back.
    Room,
}

/// A connection in transmission.
pub struct Connection {
    stream: Stream,
    entry: ExportEntry,
    framing: Framing,
    terms: Arc<Terms>,
    limits: Arc<NbdLimits>,
    control: Arc<Control>,
    lane: Lane,
    budget: Budget,
    input: Box<[u8]>,
    start: usize,
    end: usize,
    receiving: Receiving,
    received: Instant,
    output: Output,
    submissions: Vec<Submission>,
    arrived: Vec<Completion>,
    in_flight: usize,
    /// The client said good-bye, or its direction is closed: finish and go.
    leaving: bool,
}

impl Connection {
    /// A connection after its handshake; `early` is what arrived behind it.
    pub fn new(
        stream: Stream,
        chosen: Chosen,
        early: &[u8],
        lane: Lane,
        budget: Budget,
        limits: Arc<NbdLimits>,
        control: Arc<Control>,
    ) -> Self {
        let disk = &chosen.entry.disk;
        let terms = Terms {
            size: disk.size_bytes(),
            block_size: disk.block_size_bytes(),
            read_only: chosen.entry.is_read_only(),
            structured: chosen.framing >= Framing::Structured,
            contexts: chosen.contexts,
        };
        let mut input = vec![0; INPUT_BYTES.max(early.len())].into_boxed_slice();
        input[..early.len()].copy_from_slice(early);
        Self {
            stream,
            entry: chosen.entry,
            framing: chosen.framing,
            terms: Arc::new(terms),
            limits,
            control,
            lane,
            budget,
            input,
            start: 0,
            end: early.len(),
            receiving: Receiving::Header,
            received: Instant::now(),
            output: Output::default(),
            submissions: Vec::new(),
            arrived: Vec::new(),
            in_flight: 0,
            leaving: false,
        }
    }

    /// Serves until the end. When this returns, no request of the connection uses the disk any more.
    pub async fn run(mut self) -> End {
        let end = match self.serve().await {
            Ok(()) => End::Closed,
            Err(end) => end,
        };
        pace::came_back(self.in_flight - self.arrived.len());
        self.in_flight -= self.lane.cancel() + self.arrived.len();
        while self.in_flight > 0 {
            self.lane.completions().arrived().await;
            self.arrived.clear();
            self.lane.completions().take(&mut self.arrived);
            self.in_flight -= self.arrived.len();
        }
        end
    }

    async fn serve(&mut self) -> Result<(), End> {
        let mut rounds = 0;
        loop {
            self.absorb();
            let pause = self.process()?;
            self.lane.submit(&mut self.submissions);
            ring::submit();
            let (sent, released) = self.output.send(&self.stream).map_err(hung_up)?;
            if released > 0 {
                self.budget.release(released);
            }
            if sent > 0 {
                pace::replies_left();
            }
            if self.is_finished() {
                return Ok(());
            }
            let more = match pause {
                Pause::Input => self.takes_input() && self.fill()?,
                Pause::Output => self.output.is_empty() || sent > 0 && self.output.room() >= REPLY_ROOM_BYTES,
                Pause::Room => released > 0,
            };
            let unanswered = !self.arrived.is_empty() && self.output.room() >= REPLY_ROOM_BYTES;
            if !more && !unanswered {
                self.wait(pause).await?;
                continue;
            }
            rounds += 1;
            if rounds % ROUNDS_PER_TURN == 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    fn takes_input(&self) -> bool {
        !self.leaving && self.control.wish() != Wish::HangUp
    }

    fn is_finished(&self) -> bool {
        let going = self.leaving || self.control.wish() != Wish::Serve;
        going && self.in_flight == 0 && self.arrived.is_empty() && self.output.is_empty()
    }

    /// Turns what the workers finished into replies, as far as there is room.
    fn absorb(&mut self) {
        // Taken even while the client leaves its replies: they are not with the disk any more.
        if self.in_flight > self.arrived.len() {
            let before = self.arrived.len();
            self.lane.completions().take(&mut self.arrived);
            pace::came_back(self.arrived.len() - before);
        }
        while self.output.room() >= REPLY_ROOM_BYTES
            && let Some(completion) = self.arrived.pop()
        {
            let Completion {
                request,
                received,
                mut reserved,
                outcome,
            } = completion;
            self.in_flight -= 1;
            if let Some(counter) = &self.entry.counter
                && let Some(op) = op_of(request.command)
            {
                counter.latency(op, received.elapsed().as_micros() as u64);
            }
            if !matches!(outcome, Outcome::Data(_) | Outcome::Pieces(..) | Outcome::Status(_)) {
                self.budget.release(reserved);
                reserved = 0;
            }
            self.output.reply(self.framing, &request, outcome, reserved);
        }
    }

    /// Takes requests off the input until something is missing.
    fn process(&mut self) -> Result<Pause, End> {
        let mut hits: u64 = 0;
        let pause = loop {
            if self.leaving || self.control.wish() == Wish::HangUp {
                break Pause::Input;
            }
            let available = &self.input[self.start..self.end];
            match &mut self.receiving {
                Receiving::Header => {
                    if self.output.room() < REPLY_ROOM_BYTES {
                        break Pause::Output;
                    }
                    if self.in_flight >= self.limits.requests_in_flight_max {
                        break Pause::Room;
                    }
                    let Some(request) = proto::parse_request(self.framing, available)? else {
                        break Pause::Input;
                    };
                    match self.admit(&request, &mut hits)? {
                        None => self.start += self.framing.request_bytes(),
                        Some(pause) => break pause,
                    }
                }
                Receiving::Payload { buffer, filled, .. } => {
                    let take = available.len().min(buffer.len() - *filled);
                    buffer[*filled..*filled + take].copy_from_slice(&available[..take]);
                    *filled += take;
                    self.start += take;
                    if *filled < buffer.len() {
                        break Pause::Input;
                    }
                    if let Receiving::Payload { request, buffer, .. } =
                        std::mem::replace(&mut self.receiving, Receiving::Header)
                    {
                        self.submit(request, Some(buffer), request.payload_length as usize);
                    }
                }
                Receiving::Skip { left, .. } => {
                    let take = (available.len() as u64).min(*left);
                    *left -= take;
                    self.start += take as usize;
                    if *left > 0 {
                        break Pause::Input;
                    }
                    if let Receiving::Skip { request, failure, .. } =
                        std::mem::replace(&mut self.receiving, Receiving::Header)
                    {
                        self.output.reply(self.framing, &request, Outcome::Failed(failure), 0);
                    }
                }
            }
        };
        if hits > 0
            && let Some(counter) = &self.entry.counter
        {
            // One look at the clock for the batch: its replies leave together.
            let us = self.received.elapsed().as_micros() as u64;
            (0..hits).for_each(|_| counter.latency(Op::Read, us));
        }
        Ok(pause)
    }

    /// Begins one request whose header is at the front of the input. `Some` means that nothing happened: try again.
    fn admit(&mut self, request: &Request, hits: &mut u64) -> Result<Option<Pause>, End> {
        let mut checked = self.terms.check(request);
        if request.command == command::DISC {
            self.leaving = true;
            return Ok(None);
        }
        if self.control.wish() == Wish::Refuse {
            checked = Err(Failure::new(Errno::Shutdown, "the image is being detached"));
        }
        if let Err(failure) = checked {
            if request.payload_length > SKIPPED_PAYLOAD_BYTES_MAX {
                return Err(Malformed::PayloadLength(request.payload_length).into());
            }
            if request.payload_length == 0 {
                self.output.reply(self.framing, request, Outcome::Failed(failure), 0);
            } else {
                self.receiving = Receiving::Skip {
                    request: *request,
                    left: request.payload_length,
                    failure,
                };
            }
            return Ok(None);
        }
        let length = request.length as usize; // checked: within the disk, and for data within the payload limit
        let moves_data = matches!(request.command, command::READ | command::WRITE);
        if request.command == command::READ && request.length <= ARENA_READ_BYTES_MAX {
            let head = proto::read_header(self.framing, request.cookie, request.offset, request.length);
            let head = head.as_bytes();
            if self.output.room() < head.len() + length {
                return Ok(Some(Pause::Output));
            }
            let slot = self.output.slot(head.len() + length);
            if length == 0 || self.entry.disk.try_read_ram(request.offset, &mut slot[head.len()..]) {
                slot[..head.len()].copy_from_slice(head);
                self.output.commit(head.len() + length);
                self.count(request);
                *hits += 1;
                return Ok(None);
            }
        }
        if moves_data && length == 0 {
            self.output.reply(self.framing, request, Outcome::Done, 0);
            return Ok(None);
        }
        // What the reply holds until it is sent.
        let held = match request.command {
            command::READ | command::WRITE => length,
            command::BLOCK_STATUS => self.terms.status_bytes_max(request),
            _ => 0,
        };
        if held > 0 && !self.budget.reserve(held) {
            return Ok(Some(Pause::Room));
        }
        self.count(request);
        if !moves_data {
            self.submit(*request, None, held);
            return Ok(None);
        }
        let mut buffer = self.budget.pool().take(length);
        if request.command == command::WRITE {
            self.receiving = Receiving::Payload {
                request: *request,
                buffer,
                filled: 0,
            };
        } else if (ARENA_READ_BYTES_MAX + 1..=INLINE_READ_BYTES_MAX).contains(&request.length)
            && self.entry.disk.try_read_ram(request.offset, &mut buffer)
        {
            *hits += 1;
            self.output.reply(self.framing, request, Outcome::Data(buffer), length);
        } else if request.length <= ARENA_READ_BYTES_MAX
            && self.in_flight < self.limits.workers_per_connection_max
            && ring::has_room()
            && let Some(from) = self.entry.disk.file_read(request.offset, length)
        {
            ring::begin(Pending {
                request: *request,
                received: self.received,
                reserved: length,
                buffer,
                from,
                disk: Arc::clone(&self.entry.disk),
                completions: Arc::clone(self.lane.completions()),
            });
            self.went();
        } else {
            self.submit(*request, Some(buffer), length);
        }
        Ok(None)
    }

    /// One more request is with the disk.
    fn went(&mut self) {
        self.in_flight += 1;
        pace::handed_over(1);
    }

    fn count(&self, request: &Request) {
        if let Some(counter) = &self.entry.counter
            && let Some(op) = op_of(request.command)
        {
            counter.count(op, request.offset, request.length);
        }
    }

    fn submit(&mut self, request: Request, buffer: Option<Buffer>, reserved: usize) {
        let disk = Arc::clone(&self.entry.disk);
        let job = Job {
            request,
            buffer,
            disk,
            terms: Arc::clone(&self.terms),
        };
        self.submissions.push(Submission {
            job,
            received: self.received,
            reserved,
        });
        self.went();
    }

    /// Reads what the socket has; says whether there was anything.
    fn fill(&mut self) -> Result<bool, End> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.input.len() {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let read = match &mut self.receiving {
            // The input is used up here: what comes first, belongs to the payload, and is read to its place.
            Receiving::Payload { buffer, filled, .. } => {
                let rest = &mut buffer[*filled..];
                let wanted = rest.len();
                // Behind a large payload comes another: that, too, is better read to its place than copied there.
                let behind = if wanted >= LARGE_PAYLOAD_BYTES_MIN {
                    &mut self.input[..BEHIND_LARGE_BYTES]
                } else {
                    &mut self.input
                };
                let mut parts = [IoSliceMut::new(rest), IoSliceMut::new(behind)];
                self.stream.try_read_vectored(&mut parts).inspect(|read| {
                    *filled += (*read).min(wanted);
                    self.end = read.saturating_sub(wanted);
                })
            }
            Receiving::Header | Receiving::Skip { .. } => self
                .stream
                .try_read(&mut self.input[self.end..])
                .inspect(|read| self.end += read),
        };
        match read {
            Ok(0) if matches!(self.receiving, Receiving::Header) && self.start == self.end => {
                self.leaving = true;
                Ok(true)
            }
            Ok(0) => Err(End::Cut),
            Ok(_) => {
                self.received = Instant::now();
                pace::requests_came(self.received);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(hung_up(error)),
        }
    }

    /// Waits for whatever can get the connection further.
    async fn wait(&mut self, pause: Pause) -> Result<(), End> {
        let reads = pause == Pause::Input && self.takes_input();
        let interest = match (reads, self.output.is_empty()) {
            (true, true) => Some(Interest::READABLE),
            (true, false) => Some(Interest::READABLE | Interest::WRITABLE),
            (false, false) => Some(Interest::WRITABLE),
            (false, true) => None,
        };
        let going = self.leaving || self.control.wish() != Wish::Serve;
        // Only the client can end this wait: it has replies to take, or a request to finish.
        let on_client =
            self.in_flight == 0 && (!self.output.is_empty() || matches!(self.receiving, Receiving::Payload { .. }));
        let patience = if going {
            self.limits.drain_timeout
        } else {
            self.limits.stall_timeout
        };
        tokio::select! {
            biased;
            ready = async { self.stream.ready(interest.unwrap_or(Interest::READABLE)).await }, if interest.is_some() => {
                ready.map_err(End::Socket)?;
            }
            () = self.lane.completions().arrived(), if self.in_flight > 0 => {}
            () = self.control.changed.notified() => {}
            () = self.budget.room(), if self.budget.waits() => {}
            () = tokio::time::sleep(patience), if on_client && (going || self.budget.holds_shared()) => {
                if going || self.budget.pool().is_short() {
                    return Err(End::Stalled);
                }
            }
        }
        Ok(())
    }
}

/// A socket's failure; a client that went away is no failure.
fn hung_up(error: io::Error) -> End {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => End::Closed,
        _ => End::Socket(error),
    }
}

/// How heat counts a command; `None`: not at all.
fn op_of(command: u16) -> Option<Op> {
    match command {
        command::READ => Some(Op::Read),
        command::WRITE | command::TRIM | command::WRITE_ZEROES => Some(Op::Write),
        _ => None,
    }
}

const _: () = assert!(INPUT_BYTES > Head::BYTES_MAX);
