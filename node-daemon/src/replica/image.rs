//! One image with replicas on this node: its session, this node's copy, and the operations that wait.
//!
//! Invariants:
//! - Outputs of one step are taken in their order while the session is locked. What waits for a disk is done after that,
//!   and its end is the next input; so a lock is never held over a wait.
//! - Reads are answered from RAM only while this node owns the image, holds all of it, has its members' read leases, and
//!   nothing is being written.
//! - An operation that was begun ends with an answer or a denial.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::Record;
use hearth_protocol::{BlockIndex, ImageId, NodeId};
use hearth_replication::mutants::Rules;
use hearth_replication::owner::{Ask, Check, Denial, OpId};
use hearth_replication::request::{Bytes, Hashes, RequestId, Work};
use hearth_replication::session::{Input, Message, Output, Session};
use hearth_replication::time::BootMs;

use super::felt::Felt;
use super::piece::{Body, Piece, to_frame};
use super::pool::Pool;
use super::shape::Shape;
use super::through::Through;
use super::{Notice, Noticed};
use crate::disk::{Disk, DiskError};
use crate::mutants;
use crate::peer::Links;
use crate::store::{Marks, Store, StoreError};
use crate::volume::Volume;

/// How long the end of an ownership may take: its members' answers, and a change of the set if one does not answer.
const SEAL_WITHIN: Duration = Duration::from_secs(10);

/// Pause before a read at the destination of a hand-over is tried again.
const READ_THROUGH_AGAIN: Duration = Duration::from_millis(20);

/// Pause before a record that found no room is tried again.
const ROOM_AGAIN: Duration = Duration::from_millis(100);

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

/// How an operation ended.
enum Ending {
    /// It is done; with what a read found.
    Done(Option<Piece>),
    /// What members have.
    Compared(BTreeMap<NodeId, Hashes>),
}

/// An operation that somebody waits for.
struct Op {
    piece: Option<Piece>,
    ended: Mutex<Option<Result<Ending, Denial>>>,
    changed: Condvar,
}

struct Core {
    session: Session,
    ops: HashMap<OpId, Arc<Op>>,
    next_op: u64,
}

impl Core {
    /// Enters an operation under a number of its own.
    fn enter(&mut self, op: Arc<Op>) -> OpId {
        let id = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(id, op);
        id
    }
}

/// What is done after the lock is given back.
enum Job {
    Perform {
        from: NodeId,
        id: RequestId,
        work: Work,
        anew: BTreeSet<BlockIndex>,
        piece: Option<Piece>,
    },
    Persist(hearth_replication::member::Durable),
    Forget,
    ReadThrough {
        op: OpId,
        owner: NodeId,
    },
}

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
        let jobs = self.take(&mut self.core(), input, None, None);
        self.leave(jobs);
    }

    /// Gives this node a copy.
    pub fn prepare(&self, copy: Copy, kept: hearth_replication::session::Replica) {
        *self.copy.write().unwrap_or_else(PoisonError::into_inner) = Some(copy);
        self.step(Input::Prepare(kept));
    }

    /// Takes what another node says, and the bytes that came with it.
    pub fn received(&self, from: &NodeId, message: Message, piece: Option<Piece>) {
        if let Message::Request(request) = &message {
            let fits = |extent| piece.as_ref().is_some_and(|piece| self.shape.holds(piece, extent));
            let sound = match &request.work {
                Work::Read(extent) => extent.last <= self.shape.end() && piece.as_ref().is_none_or(|_| fits(*extent)),
                Work::Hash(extent) => {
                    let blocks = extent.last.0.checked_sub(extent.first.0);
                    extent.last <= self.shape.end() && blocks.is_some_and(|more| more < HASHES_MAX)
                }
                Work::Write { extent, .. } => extent.last <= self.shape.end() && fits(*extent),
                Work::Flush { .. } | Work::Renew { .. } => true,
            };
            if !sound {
                tracing::warn!(image = %self.shape.name, %from, "a node asks for what lies past the image's end; ignored");
                return;
            }
        }
        let from = from.clone();
        let (arrived, brought) = match &message {
            Message::Answer { .. } => (None, piece),
            _ => (piece, None),
        };
        let jobs = self.take(&mut self.core(), Input::Peer { from, message }, arrived, brought);
        self.leave(jobs);
    }

    /// Carries out an operation of a client and waits for its end; a read brings what it found.
    ///
    /// # Errors
    /// Why it was not done, or is not known to be done.
    pub fn ask(&self, ask: Ask, piece: Option<Piece>) -> Result<Option<Piece>, Denial> {
        let writes = matches!(ask, Ask::Write { .. });
        let began = self.felt.begin();
        if writes {
            self.quick.writing.fetch_add(1, Ordering::SeqCst);
            self.quick.begun.fetch_add(1, Ordering::SeqCst);
        }
        let result = self.carried_out(piece, |op| Input::Client { op, ask });
        if writes {
            self.quick.writing.fetch_sub(1, Ordering::SeqCst);
        }
        self.felt.end(began.filter(|_| ask != Ask::Flush));
        result.map(|ending| match ending {
            Ending::Done(piece) => piece,
            Ending::Compared(_) => None,
        })
    }

    /// Compares copies, or writes them anew, and waits for the end; a comparison brings what each member has.
    ///
    /// # Errors
    /// Why it was not done, or is not known to be done.
    pub fn check(&self, check: Check) -> Result<BTreeMap<NodeId, Hashes>, Denial> {
        let ending = self.carried_out(None, |op| Input::Check { op, check })?;
        Ok(match ending {
            Ending::Compared(hashes) => hashes,
            Ending::Done(_) => BTreeMap::new(),
        })
    }

    /// Enters an operation and waits for its end.
    fn carried_out(&self, piece: Option<Piece>, input: impl FnOnce(OpId) -> Input) -> Result<Ending, Denial> {
        let op = Arc::new(Op {
            piece,
            ended: Mutex::new(None),
            changed: Condvar::new(),
        });
        let jobs = {
            let mut core = self.core();
            let id = core.enter(Arc::clone(&op));
            self.take(&mut core, input(id), None, None)
        };
        // This thread may wait: what it asked of its own disk it does itself.
        jobs.into_iter().for_each(|job| self.work(job));
        let mut ended = op.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match ended.take() {
                Some(result) => return result,
                None => ended = op.changed.wait(ended).unwrap_or_else(PoisonError::into_inner),
            }
        }
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

    /// One step of the session. `arrived` came with the message being taken, `brought` is what a read found whose end is
    /// being taken.
    fn take(&self, core: &mut Core, input: Input, arrived: Option<Piece>, brought: Option<Piece>) -> Vec<Job> {
        let outputs = core.session.step(boot_now(), input);
        let mut jobs = Vec::new();
        for output in outputs {
            self.carry_out(core, output, (&arrived, &brought), &mut jobs);
        }
        self.quick
            .until_ms
            .store(self.answers_quickly(&core.session), Ordering::SeqCst);
        jobs
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
        jobs: &mut Vec<Job>,
    ) {
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
                jobs.push(Job::Perform {
                    from,
                    id,
                    work,
                    anew,
                    piece,
                });
            }
            Output::Persist(durable) => jobs.push(Job::Persist(durable)),
            // In its place among the outputs: a block that is marked again later is marked behind this.
            Output::Unmark(blocks) => {
                if let Some(copy) = self.copy() {
                    copy.marks.unmark(&blocks);
                }
            }
            Output::Forget => jobs.push(Job::Forget),
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
                if answers {
                    self.around.links.answer(&to, frame);
                } else {
                    self.around.links.ask(&to, frame);
                }
            }
            Output::Acknowledge { op, bytes } => {
                let piece = piece_of(core, bytes);
                end(core.ops.remove(&op), Ok(Ending::Done(piece)));
            }
            Output::Compared { op, hashes } => end(core.ops.remove(&op), Ok(Ending::Compared(hashes))),
            Output::Deny { op, denial } => end(core.ops.remove(&op), Err(denial)),
            Output::ReadThrough { op, owner } => jobs.push(Job::ReadThrough { op, owner }),
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

    /// Leaves jobs to the pool.
    fn leave(&self, jobs: Vec<Job>) {
        for job in jobs {
            let Some(this) = self.this.upgrade() else { return };
            self.around.pool.run(move || this.work(job));
        }
    }

    /// Does a job, and what follows from it.
    fn work(&self, job: Job) {
        let jobs = match job {
            Job::Perform {
                from,
                id,
                work: Work::Hash(extent),
                ..
            } => {
                let hashes = self.hashes(extent);
                self.take(&mut self.core(), Input::Hashed { from, id, hashes }, None, None)
            }
            Job::Perform {
                from,
                id,
                work,
                anew,
                piece,
            } => {
                let (ended, brought) = match self.perform(&work, &anew, piece) {
                    Ok(brought) => (Input::Finished { from, id, ok: true }, brought),
                    Err(error @ DiskError::NoSpace(_)) if matches!(work, Work::Write { .. }) && self.is_sound() => {
                        self.tell_full(&error);
                        (Input::NoRoom { from, id }, None)
                    }
                    Err(error) => {
                        tracing::error!(image = %self.shape.name, %error, "this node's copy failed; it leaves the set");
                        (Input::Finished { from, id, ok: false }, None)
                    }
                };
                self.take(&mut self.core(), ended, None, brought)
            }
            Job::Persist(durable) => {
                let put = self.around.store.put_durable(self.image, &durable);
                if let Err(error @ StoreError::NoSpace(_)) = &put {
                    // Nothing of it counts, so it is no failure of the disk. Until there is room this copy keeps to the
                    // record it has, and whoever asked waits or goes on without it.
                    tracing::warn!(image = %self.shape.name, %error, "a record waits for room in the store");
                    std::thread::sleep(ROOM_AGAIN);
                    return self.leave(vec![Job::Persist(durable)]);
                }
                if let Err(error) = &put {
                    tracing::error!(image = %self.shape.name, %error, "a record cannot be made durable here");
                }
                let ok = put.is_ok();
                if let (true, Some(record), Some(copy)) = (ok, &durable.record, self.copy())
                    && copy.volume.epoch() != record.epoch()
                {
                    copy.volume.set_epoch(record.epoch());
                }
                self.take(&mut self.core(), Input::Persisted { ok }, None, None)
            }
            Job::ReadThrough { op, owner } => match self.read_through(op, &owner) {
                Some(jobs) => jobs,
                None => return,
            },
            Job::Forget => {
                match self.forget() {
                    Ok(()) => self.notice(Notice::Forgotten),
                    Err(error) => {
                        tracing::error!(image = %self.shape.name, %error, "a copy that others hold cannot be deleted");
                    }
                }
                return;
            }
        };
        self.leave(jobs);
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
    fn read_through(&self, id: OpId, owner: &NodeId) -> Option<Vec<Job>> {
        let op = self.core().ops.get(&id).cloned()?;
        let Some(Piece {
            offset,
            body: Body::Wanted(length),
        }) = op.piece
        else {
            end(self.core().ops.remove(&id), Err(Denial::Detached));
            return None;
        };
        let mut bytes = vec![0; length as usize];
        let address = self.around.links.address(owner);
        let read = self.through.read(owner, address, &self.shape.name, offset, &mut bytes);
        let mut core = self.core();
        core.ops.remove(&id);
        match read {
            Ok(()) => {
                let body = Body::of(bytes);
                end(Some(op), Ok(Ending::Done(Some(Piece { offset, body }))));
                None
            }
            Err(error) => {
                tracing::info!(image = %self.shape.name, %owner, %error, "the source does not answer a read; it is asked here again");
                drop(core);
                // The source is about to seal, or down: its seal or another attempt comes in its time.
                std::thread::sleep(READ_THROUGH_AGAIN);
                core = self.core();
                let id = core.enter(op);
                let ask = Ask::Read(self.shape.extent(offset, length));
                Some(self.take(&mut core, Input::Client { op: id, ask }, None, None))
            }
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

    fn perform(
        &self,
        work: &Work,
        anew: &BTreeSet<BlockIndex>,
        piece: Option<Piece>,
    ) -> Result<Option<Piece>, DiskError> {
        let Some(copy) = self.copy() else {
            return Err(DiskError::ShuttingDown);
        };
        let (volume, piece) = match work {
            Work::Read(extent) => {
                let Piece { offset, body } = piece.unwrap_or_else(|| self.shape.bytes(*extent));
                let mut bytes = vec![0; body.length() as usize];
                copy.volume.read(offset, &mut bytes)?;
                let body = Body::of(bytes);
                return Ok(Some(Piece { offset, body }));
            }
            Work::Flush { .. } => {
                copy.volume.flush()?;
                return copy.marks.anew(anew, self.around.store.incarnation()).map(|()| None);
            }
            Work::Hash(_) | Work::Renew { .. } => return Ok(None),
            Work::Write { extent, .. } => {
                // Also for a block that an earlier write has marked: that mark may still be on its way to the disk.
                if !mutants::WRITE_UNMARKED.is_on() {
                    let marked = copy.marks.before_write(*extent, self.around.store.incarnation());
                    marked.inspect_err(|error| copy.volume.note_refused(error))?;
                }
                (copy.volume, piece)
            }
        };
        let fua = matches!(work, Work::Write { fua: true, .. });
        match piece {
            Some(Piece {
                offset,
                body: Body::Data(bytes),
            }) => volume.write(offset, &bytes, fua)?,
            Some(Piece {
                offset,
                body: Body::Zeros { length, keep_allocated },
            }) if keep_allocated => volume.write_zeroes(offset, length, true, fua)?,
            Some(Piece {
                offset,
                body: Body::Zeros { length, .. },
            }) => volume.trim(offset, length, fua)?,
            Some(Piece {
                body: Body::Wanted(_), ..
            })
            | None => {
                return Err(DiskError::Io {
                    what: format!("a write to image {} came without its bytes", self.shape.name),
                    source: std::io::ErrorKind::InvalidData.into(),
                });
            }
        }
        Ok(None)
    }
}

fn end(op: Option<Arc<Op>>, result: Result<Ending, Denial>) {
    let Some(op) = op else { return };
    *op.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
    op.changed.notify_all();
}
