//! One image with replicas on this node: its session, this node's copy, and the operations that wait.
//!
//! Invariants:
//! - Outputs of one step are taken in their order while the session is locked. What waits for a disk is done after that,
//!   and its end is the next input; so a lock is never held over a wait.
//! - Reads are answered from RAM only while this node owns the image, holds all of it, has its members' read leases, and
//!   nothing is being written.
//! - An operation that was begun ends with an answer or a denial.

mod work;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak, mpsc};
use std::time::{Duration, Instant};

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::Record;
use hearth_protocol::{ImageId, NodeId};
use hearth_replication::mutants::Rules;
use hearth_replication::owner::{Ask, Check, Denial, OpId};
use hearth_replication::request::{Bytes, Hashes, Work};
use hearth_replication::session::{Input, Message, Output, Session};
use hearth_replication::time::BootMs;

use self::work::Job;
use super::felt::Felt;
use super::piece::{Body, Piece, to_frame};
use super::pool::Pool;
use super::shape::Shape;
use super::through::Through;
use super::{Notice, Noticed};
use crate::disk::{Disk, DiskError};
use crate::mutants;
use crate::peer::{Frame, Links};
use crate::store::{Marks, Store, StoreError};
use crate::volume::Volume;

/// How long the end of an ownership may take: its members' answers, and a change of the set if one does not answer.
const SEAL_WITHIN: Duration = Duration::from_secs(10);

/// Pause before a read at the destination of a hand-over is tried again.
const READ_THROUGH_AGAIN: Duration = Duration::from_millis(20);

/// Blocks whose hashes one request may ask for; more would make an answer that no frame holds.
const HASHES_MAX: u64 = 4_096;

/// How often one thing is told of in the journal.
const TOLD_EVERY_MS: u64 = 10_000;
/// How long a read lease may be missing before that is told of: a set that changes lacks one for a moment.
const WAIT_UNTOLD_MS: u64 = 1_000;

/// This node's copy.
#[derive(Clone)]
pub struct Copy {
    /// Its blocks.
    pub volume: Arc<Volume>,
    /// Its intent marks.
    pub marks: Arc<Marks>,
}

/// What an image's sessions share with those of the others.
#[derive(Clone)]
pub struct Around {
    /// This node.
    pub me: NodeId,
    /// The local replicas.
    pub store: Arc<Store>,
    /// The other nodes.
    pub links: Arc<Links>,
    /// Threads for what other nodes ask of the disk.
    pub pool: Arc<Pool>,
    /// To the agent.
    pub notices: tokio::sync::broadcast::Sender<Noticed>,
}

/// How an operation ended; a read brings what it found.
pub type Ended = Result<Option<Piece>, Denial>;

/// An operation, and who is told of its end.
pub struct Asked {
    /// What.
    pub ask: Ask,
    /// A write's bytes; where within its blocks a read wants to read.
    pub piece: Option<Piece>,
    /// Told once, on any thread; must not wait.
    pub tell: Box<dyn FnOnce(Ended) + Send>,
}

/// What members of blocks have.
type Compared = BTreeMap<NodeId, Hashes>;

/// Who is told of an operation's end.
enum Tell {
    /// A client.
    Client(Box<dyn FnOnce(Ended) + Send>),
    /// Who looks after the copies; of what was only written anew nothing is told but that it is done.
    Check(mpsc::SyncSender<Result<Compared, Denial>>),
}

/// An operation's end.
enum End {
    Done(Option<Piece>),
    Compared(Compared),
    Denied(Denial),
}

impl Tell {
    fn tell(self, end: End) {
        match (self, end) {
            (Tell::Client(tell), End::Done(piece)) => tell(Ok(piece)),
            (Tell::Client(tell), End::Compared(_)) => tell(Ok(None)),
            (Tell::Client(tell), End::Denied(denial)) => tell(Err(denial)),
            // Whoever asked waits.
            (Tell::Check(tell), End::Done(_)) => drop(tell.send(Ok(BTreeMap::new()))),
            (Tell::Check(tell), End::Compared(hashes)) => drop(tell.send(Ok(hashes))),
            (Tell::Check(tell), End::Denied(denial)) => drop(tell.send(Err(denial))),
        }
    }
}

/// An operation that has begun.
struct Op {
    piece: Option<Piece>,
    writes: bool,
    /// When it began, if the waits of clients are counted and it is one.
    began: Option<Instant>,
    tell: Tell,
}

struct Core {
    session: Session,
    ops: HashMap<OpId, Op>,
    next_op: u64,
}

impl Core {
    /// Enters an operation under a number of its own.
    fn enter(&mut self, op: Op) -> OpId {
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(id, op);
        id
    }
}

/// What steps of the session want done, in their order; all of it after the lock is given back.
#[derive(Default)]
struct Wants {
    /// Frames to each node, and whether they answer it.
    frames: Vec<(NodeId, bool, Vec<Frame>)>,
    ended: Vec<(Op, End)>,
    jobs: VecDeque<Job>,
}

impl Wants {
    fn send(&mut self, to: NodeId, answers: bool, frame: Frame) {
        match self
            .frames
            .iter_mut()
            .find(|(node, kind, _)| *node == to && *kind == answers)
        {
            Some((_, _, frames)) => frames.push(frame),
            None => self.frames.push((to, answers, vec![frame])),
        }
    }
}

/// What another node says, and the bytes that came with it.
pub type Said = (Message, Option<Piece>);

/// An input, what arrived with its message, and what a read found whose end it tells.
type Taken = (Input, Option<Piece>, Option<Piece>);

/// When a read may be answered from RAM without asking the session.
#[derive(Default)]
struct Quick {
    /// The reading of the boot-time clock up to which it may be; 0: not at all.
    until_ms: AtomicU64,
    /// Writes under way, and how many there ever were.
    writing: AtomicU64,
    begun: AtomicU64,
}

/// See the module.
pub struct Replica {
    image: ImageId,
    shape: Shape,
    around: Around,
    core: Mutex<Core>,
    copy: RwLock<Option<Copy>>,
    quick: Quick,
    through: Through,
    felt: Felt,
    /// Bytes copied to joining nodes, without those that are zero.
    copied: AtomicU64,
    /// Whether the last write took the disk's time, not only the kernel's.
    slow: AtomicBool,
    /// Readings of the boot-time clock up to which something is not told of again.
    full_told_until_ms: AtomicU64,
    wait_told_until_ms: AtomicU64,
    /// The set version recorded here when a write last found no room; 0 if none did.
    full_at: AtomicU64,
    this: Weak<Replica>,
}

/// This node's boot-time clock.
pub fn boot_now() -> BootMs {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("Linux has a boot-time clock");
    BootMs(now.tv_sec() as u64 * 1_000 + now.tv_nsec() as u64 / 1_000_000)
}

impl Replica {
    /// An image as this node's disk has it, if it holds a copy, and as far as the log is known.
    pub fn new(
        image: ImageId,
        shape: Shape,
        around: Around,
        copy: Option<(Copy, hearth_replication::session::Replica)>,
        log: Aggregate,
    ) -> Arc<Self> {
        let (copy, kept) = copy.unzip();
        let session = Session::new(around.me.clone(), Rules::default(), kept, log);
        Arc::new_cyclic(|this| Self {
            image,
            shape,
            around,
            core: Mutex::new(Core {
                session,
                ops: HashMap::new(),
                next_op: 1,
            }),
            copy: RwLock::new(copy),
            quick: Quick::default(),
            through: Through::default(),
            felt: Felt::default(),
            copied: AtomicU64::new(0),
            slow: AtomicBool::new(false),
            full_told_until_ms: AtomicU64::new(0),
            wait_told_until_ms: AtomicU64::new(0),
            full_at: AtomicU64::new(0),
            this: this.clone(),
        })
    }

    /// Which image.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// This node.
    pub fn me(&self) -> &NodeId {
        &self.around.me
    }

    /// What it looks like.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// This node's copy, if it holds one.
    pub fn copy(&self) -> Option<Copy> {
        self.copy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long its clients wait.
    pub fn felt(&self) -> &Felt {
        &self.felt
    }

    /// Bytes copied to joining nodes since the daemon started, without those that are zero.
    pub fn copied_bytes(&self) -> u64 {
        self.copied.load(Ordering::Relaxed)
    }

    /// Counts what another node's or this node's copy is given of what was read.
    fn count_copy(&self, work: &Work, bytes: &Bytes, piece: Option<&Piece>) {
        let copies = matches!(work, Work::Write { .. }) && !matches!(bytes, Bytes::OfClient(_) | Bytes::OfRequest);
        if let Some(Piece {
            body: Body::Data(data), ..
        }) = piece.filter(|_| copies)
        {
            self.copied.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the session.
    pub fn look<T>(&self, at: impl FnOnce(&Session) -> T) -> T {
        at(&self.core().session)
    }

    /// When the session wants to be told that time passed.
    pub fn wake_at(&self) -> Option<BootMs> {
        self.core().session.wake_at()
    }

    /// Takes an input that comes without bytes. What has to wait for the disk is left to the pool.
    pub fn step(&self, input: Input) {
        let mut wants = Wants::default();
        self.take(vec![(input, None, None)], &mut wants);
        let jobs = self.settle(wants);
        self.leave(jobs);
    }

    /// Gives this node a copy.
    pub fn prepare(&self, copy: Copy, kept: hearth_replication::session::Replica) {
        *self.copy.write().unwrap_or_else(PoisonError::into_inner) = Some(copy);
        self.step(Input::Prepare(kept));
    }

    /// Takes what another node says, and the bytes that came with it.
    pub fn received(&self, from: &NodeId, messages: Vec<Said>) {
        let sound = messages
            .into_iter()
            .filter(|(message, piece)| self.is_within(from, message, piece));
        let inputs = sound.map(|(message, piece)| {
            let answers = matches!(message, Message::Answer { .. });
            let (arrived, brought) = if answers { (None, piece) } else { (piece, None) };
            let from = from.clone();
            (Input::Peer { from, message }, arrived, brought)
        });
        let mut wants = Wants::default();
        self.take(inputs.collect(), &mut wants);
        let jobs = self.settle(wants);
        self.leave(jobs);
    }

    /// Whether a message asks for nothing past the image's end.
    fn is_within(&self, from: &NodeId, message: &Message, piece: &Option<Piece>) -> bool {
        let Message::Request(request) = message else {
            return true;
        };
        let fits = |extent| piece.as_ref().is_some_and(|piece| self.shape.holds(piece, extent));
        let within = match &request.work {
            Work::Read(extent) => extent.last <= self.shape.end() && piece.as_ref().is_none_or(|_| fits(*extent)),
            Work::Hash(extent) => {
                let blocks = extent.last.0.checked_sub(extent.first.0);
                extent.last <= self.shape.end() && blocks.is_some_and(|more| more < HASHES_MAX)
            }
            Work::Write { extent, .. } => extent.last <= self.shape.end() && fits(*extent),
            Work::Flush { .. } | Work::Renew { .. } => true,
        };
        if !within {
            tracing::warn!(image = %self.shape.name, %from, "a node asks for what lies past the image's end; ignored");
        }
        within
    }

    /// Begins operations of clients, all in one step. May wait for this node's disk, never for other nodes.
    pub fn begin(&self, asked: Vec<Asked>) {
        let jobs = self.enter(asked);
        self.work_off(jobs);
    }

    /// As [`Self::begin`], on a thread that may wait for the disk.
    pub(super) fn begin_elsewhere(&self, asked: Vec<Asked>) {
        if let Some(this) = self.this.upgrade() {
            self.around.pool.run(move || this.begin(asked));
        }
    }

    fn enter(&self, asked: Vec<Asked>) -> VecDeque<Job> {
        let writes = |ask: &Ask| matches!(ask, Ask::Write { .. });
        let writing = asked.iter().filter(|asked| writes(&asked.ask)).count() as u64;
        if writing > 0 {
            self.quick.writing.fetch_add(writing, Ordering::SeqCst);
            self.quick.begun.fetch_add(writing, Ordering::SeqCst);
        }
        let mut wants = Wants::default();
        {
            let mut core = self.core();
            for Asked { ask, piece, tell } in asked {
                let writes = writes(&ask);
                let began = self.felt.begin().filter(|_| ask != Ask::Flush);
                let op = core.enter(Op {
                    piece,
                    writes,
                    began,
                    tell: Tell::Client(tell),
                });
                self.step_one(&mut core, Input::Client { op, ask }, (None, None), &mut wants);
            }
            self.stepped(&core);
        }
        self.settle(wants)
    }

    /// Carries out an operation of a client and waits for its end; a read brings what it found.
    ///
    /// # Errors
    /// Why it was not done, or is not known to be done.
    pub fn ask(&self, ask: Ask, piece: Option<Piece>) -> Result<Option<Piece>, Denial> {
        let (tell, ended) = mpsc::sync_channel(1);
        let tell = Box::new(move |end| {
            // Whoever asked waits.
            let _ = tell.send(end);
        });
        let mut jobs = self.enter(vec![Asked { ask, piece, tell }]);
        // This thread may wait: what it asked of its own disk it does itself.
        if let Some(job) = jobs.pop_front() {
            let mut wants = Wants::default();
            self.take(self.work(job).into_iter().collect(), &mut wants);
            jobs.extend(self.settle(wants));
        }
        self.leave(jobs);
        ended.recv().unwrap_or(Err(Denial::Detached))
    }

    /// Compares copies, or writes them anew, and waits for the end; a comparison brings what each member has.
    ///
    /// # Errors
    /// Why it was not done, or is not known to be done.
    pub fn check(&self, check: Check) -> Result<BTreeMap<NodeId, Hashes>, Denial> {
        let (tell, ended) = mpsc::sync_channel(1);
        let mut wants = Wants::default();
        {
            let mut core = self.core();
            let op = core.enter(Op {
                piece: None,
                writes: false,
                began: None,
                tell: Tell::Check(tell),
            });
            self.step_one(&mut core, Input::Check { op, check }, (None, None), &mut wants);
            self.stepped(&core);
        }
        let jobs = self.settle(wants);
        self.leave(jobs);
        ended.recv().unwrap_or(Err(Denial::Detached))
    }

    /// Fills `buf` from RAM if all of it is there and may be answered without asking anybody.
    pub fn read_ram(&self, offset: u64, buf: &mut [u8]) -> bool {
        let begun = self.quick.begun.load(Ordering::SeqCst);
        if self.quick.writing.load(Ordering::SeqCst) != 0 {
            return false;
        }
        let until = self.quick.until_ms.load(Ordering::SeqCst);
        let over = until == 0 || (until != u64::MAX && boot_now().0 >= until);
        if over && !mutants::RAM_UNLEASED.is_on() {
            return false;
        }
        let copy = self.copy.read().unwrap_or_else(PoisonError::into_inner);
        let read = copy.as_ref().is_some_and(|copy| copy.volume.try_read_ram(offset, buf));
        read && self.quick.begun.load(Ordering::SeqCst) == begun
    }

    /// Steps of the session, under one lock. With each input comes what arrived with the message, and what a read found
    /// whose end it tells.
    fn take(&self, inputs: Vec<Taken>, wants: &mut Wants) {
        if inputs.is_empty() {
            return;
        }
        let mut core = self.core();
        for (input, arrived, brought) in inputs {
            self.step_one(&mut core, input, (arrived, brought), wants);
        }
        self.stepped(&core);
    }

    fn step_one(&self, core: &mut Core, input: Input, bytes: (Option<Piece>, Option<Piece>), wants: &mut Wants) {
        for output in core.session.step(boot_now(), input) {
            self.carry_out(core, output, (&bytes.0, &bytes.1), wants);
        }
    }

    /// Before anybody is told of what was stepped.
    fn stepped(&self, core: &Core) {
        self.quick
            .until_ms
            .store(self.answers_quickly(&core.session), Ordering::SeqCst);
    }

    /// Tells other nodes and clients; what is left waits for the disk.
    fn settle(&self, wants: Wants) -> VecDeque<Job> {
        for (to, answers, frames) in wants.frames {
            if answers {
                self.around.links.answer(&to, frames);
            } else {
                self.around.links.ask(&to, frames);
            }
        }
        for (op, end) in wants.ended {
            if op.writes {
                self.quick.writing.fetch_sub(1, Ordering::SeqCst);
            }
            self.felt.end(op.began, op.writes);
            op.tell.tell(end);
        }
        wants.jobs
    }

    /// See [`Quick::until_ms`].
    fn answers_quickly(&self, session: &Session) -> u64 {
        let whole = |record: &Arc<Record>| record.runs().iter().all(|run| run.members.contains(&self.around.me));
        let sound = session.is_open() && session.record().is_some_and(whole) && session.has_sound_copy();
        match session.answers_until() {
            _ if !sound => 0,
            Some(until) => until.0,
            None => u64::MAX,
        }
    }

    fn carry_out(
        &self,
        core: &mut Core,
        output: Output,
        (arrived, brought): (&Option<Piece>, &Option<Piece>),
        wants: &mut Wants,
    ) {
        let jobs = &mut wants.jobs;
        let piece_of = |core: &Core, bytes: Bytes| match bytes {
            Bytes::None => None,
            Bytes::OfClient(op) => core.ops.get(&op).and_then(|op| op.piece.clone()),
            Bytes::OfRequest => arrived.clone(),
            Bytes::OfAnswer { .. } | Bytes::OfWork { .. } => brought.clone(),
        };
        match output {
            Output::Perform {
                from,
                id,
                work,
                anew,
                bytes,
                ..
            } => {
                let piece = piece_of(core, bytes.clone());
                self.count_copy(&work, &bytes, piece.as_ref());
                jobs.push_back(Job::Perform {
                    from,
                    id,
                    work,
                    anew,
                    piece,
                });
            }
            Output::Persist(durable) => jobs.push_back(Job::Persist(durable)),
            // In its place among the outputs: a block that is marked again later is marked behind this.
            Output::Unmark(blocks) => {
                if let Some(copy) = self.copy() {
                    copy.marks.unmark(&blocks);
                }
            }
            Output::Forget => jobs.push_back(Job::Forget),
            Output::Send { to, message, bytes } => {
                let piece = piece_of(core, bytes.clone());
                if let Message::Request(request) = &message {
                    self.count_copy(&request.work, &bytes, piece.as_ref());
                }
                let answers = matches!(
                    message,
                    Message::Answer { .. } | Message::Raised(_) | Message::NotRaised { .. } | Message::Told { .. }
                );
                let frame = to_frame(self.image, message, piece.as_ref());
                wants.send(to, answers, frame);
            }
            Output::Acknowledge { op, bytes } => {
                let piece = piece_of(core, bytes);
                wants
                    .ended
                    .extend(core.ops.remove(&op).map(|op| (op, End::Done(piece))));
            }
            Output::Compared { op, hashes } => {
                wants
                    .ended
                    .extend(core.ops.remove(&op).map(|op| (op, End::Compared(hashes))));
            }
            Output::Deny { op, denial } => {
                wants
                    .ended
                    .extend(core.ops.remove(&op).map(|op| (op, End::Denied(denial))));
            }
            Output::ReadThrough { op, owner } => jobs.push_back(Job::ReadThrough { op, owner }),
            Output::Publish(change) => self.notice(Notice::Publish(change)),
            Output::Opened => self.notice(Notice::Opened),
            Output::GivenUp(setback) => self.notice(Notice::GivenUp(setback)),
            Output::Ended(denial) => self.notice(Notice::Ended(denial)),
            Output::Joined(node) => self.notice(Notice::Joined(node)),
            Output::NotChanged { node, denial } => self.notice(Notice::NotChanged(node, denial)),
            Output::Left(node) => self.notice(Notice::Left(node)),
        }
    }

    fn notice(&self, notice: Notice) {
        // Nobody listens when the daemon ends.
        let _ = self.around.notices.send((self.image, notice));
    }

    /// Whether this node's copy takes writes, if it has room.
    fn is_sound(&self) -> bool {
        self.copy().is_some_and(|copy| copy.volume.poisoned().is_none())
    }

    fn tell_full(&self, error: &DiskError) {
        let now = boot_now();
        let version = self.look(|session| Some(session.standing()?.record?.stamp().set_version.0));
        self.full_at.store(version.unwrap_or(0), Ordering::Relaxed);
        if self.full_told_until_ms.load(Ordering::Relaxed) <= now.0 {
            self.full_told_until_ms
                .store(now.after(TOLD_EVERY_MS).0, Ordering::Relaxed);
            tracing::error!(
                image = %self.shape.name, %error,
                "the store is full: beside other copies this one leaves the set, the last one refuses writes; make room"
            );
        }
    }

    /// Whether this node's copy is out of the set because it had no room for a write.
    pub fn left_for_room(&self) -> bool {
        let full_at = self.full_at.load(Ordering::Relaxed);
        full_at != 0
            && self.look(|session| {
                let recorded = session.standing().and_then(|standing| standing.record);
                recorded.is_some_and(|record| record.stamp().set_version.0 == full_at)
                    && !session.aggregate().record.everyone().contains(&self.around.me)
            })
    }

    /// The members that clients of this node wait for: their read leases have been missing for a while.
    pub fn waits_for(&self) -> Vec<NodeId> {
        let then = BootMs(boot_now().0.saturating_sub(WAIT_UNTOLD_MS));
        self.look(|session| match session.owner().filter(|owner| owner.is_busy()) {
            Some(owner) => owner.unleased(then).into_iter().collect(),
            None => Vec::new(),
        })
    }

    /// Says in the journal whom clients wait for. Who cannot reach the other nodes may not reach NATS either, so nobody
    /// could ask.
    pub fn tell_waiting(&self) {
        let now = boot_now();
        if self.wait_told_until_ms.load(Ordering::Relaxed) > now.0 {
            return;
        }
        let members = self.waits_for();
        if !members.is_empty() {
            self.wait_told_until_ms
                .store(now.after(TOLD_EVERY_MS).0, Ordering::Relaxed);
            tracing::warn!(
                image = %self.shape.name, ?members,
                "reads and writes wait: these members do not answer, and they leave the set only through the log"
            );
        }
    }

    /// A read at the destination of a hand-over. One that the source does not answer any more is asked here anew: then it
    /// waits until this node is the owner.
    fn read_through(&self, id: OpId, owner: &NodeId) -> Option<Taken> {
        let wanted = self.core().ops.get(&id)?.piece.clone();
        let Some(Piece {
            offset,
            body: Body::Wanted(length),
        }) = wanted
        else {
            self.end(id, End::Denied(Denial::Detached));
            return None;
        };
        let mut bytes = vec![0; length as usize];
        let address = self.around.links.address(owner);
        match self.through.read(owner, address, &self.shape.name, offset, &mut bytes) {
            Ok(()) => {
                let body = Body::of(bytes);
                self.end(id, End::Done(Some(Piece { offset, body })));
                None
            }
            Err(error) => {
                tracing::info!(image = %self.shape.name, %owner, %error, "the source does not answer a read; it is asked here again");
                // The source is about to seal, or down: its seal or another attempt comes in its time.
                std::thread::sleep(READ_THROUGH_AGAIN);
                let mut core = self.core();
                let op = core.ops.remove(&id)?;
                let id = core.enter(op);
                let ask = Ask::Read(self.shape.extent(offset, length));
                Some((Input::Client { op: id, ask }, None, None))
            }
        }
    }

    fn end(&self, id: OpId, end: End) {
        let op = self.core().ops.remove(&id);
        if let Some(op) = op {
            let wants = Wants {
                ended: vec![(op, end)],
                ..Wants::default()
            };
            self.settle(wants);
        }
    }

    /// Ends this node's ownership in order: everything is on stable storage everywhere, and the next owner need not wait.
    ///
    /// # Errors
    /// Its members do not answer in time; in words.
    pub fn seal(&self) -> Result<(), String> {
        let began = Instant::now();
        self.step(Input::Seal { to: None });
        while self.look(|session| session.owner().is_some()) {
            if began.elapsed() > SEAL_WITHIN {
                return Err("its members do not answer, so its next attach waits for its leases to end".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Deletes this node's copy.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn forget(&self) -> Result<(), StoreError> {
        let copy = self.copy.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(copy) = copy
            && let Err(error) = copy.volume.detach()
        {
            tracing::warn!(image = %self.shape.name, %error, "the last flush of a copy that is deleted failed");
        }
        self.around.store.forget_replica(self.image)
    }

    /// Closes this node's copy in order, at the end of the daemon: the next start has nothing to recover.
    ///
    /// # Errors
    /// [`DiskError`] if not everything could be made durable.
    pub fn close(&self) -> Result<(), DiskError> {
        match self.copy() {
            Some(copy) => copy.volume.detach(),
            None => Ok(()),
        }
    }
}
