//! What one image's session wants of this node's disk: done on the thread that asked, or by the pool.
//!
//! Invariant: an end is reported once, behind what it is the end of; a mark is durable before what it marks is written.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hearth_protocol::{BlockIndex, NodeId};
use hearth_replication::member::Durable;
use hearth_replication::owner::OpId;
use hearth_replication::request::{RequestId, Work};
use hearth_replication::session::Input;

use super::super::Notice;
use super::super::piece::{Body, Piece};
use super::{Replica, Taken, Wants};
use crate::disk::{Disk, DiskError};
use crate::mutants;
use crate::store::StoreError;

/// Pause before a record that found no room is tried again.
const ROOM_AGAIN: Duration = Duration::from_millis(100);

/// A write that takes longer waited for the disk: the kernel alone takes a few microseconds.
const SLOW: Duration = Duration::from_micros(50);

/// Threads that are called for one batch of slow writes.
const HELPERS_MAX: usize = 16;

/// What waits for the disk.
pub(super) enum Job {
    Perform {
        from: NodeId,
        id: RequestId,
        work: Work,
        anew: BTreeSet<BlockIndex>,
        piece: Option<Piece>,
    },
    Persist(Durable),
    Forget,
    ReadThrough {
        op: OpId,
        owner: NodeId,
    },
}

impl Job {
    /// Whether it takes longer than a write that the kernel takes at once.
    fn is_long(&self) -> bool {
        !matches!(
            self,
            Job::Perform {
                work: Work::Write { fua: false, .. },
                ..
            }
        )
    }
}

/// Jobs that several threads may share.
struct Shift {
    jobs: Mutex<VecDeque<Job>>,
    /// Whether further threads were called.
    called: AtomicBool,
}

impl Shift {
    fn of(jobs: VecDeque<Job>) -> Arc<Self> {
        Arc::new(Self {
            jobs: Mutex::new(jobs),
            called: AtomicBool::new(false),
        })
    }

    fn jobs(&self) -> MutexGuard<'_, VecDeque<Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replica {
    /// Leaves jobs to the pool.
    pub(super) fn leave(&self, jobs: VecDeque<Job>) {
        if !jobs.is_empty() {
            self.call(&Shift::of(jobs), 1);
        }
    }

    /// Has threads of the pool work a shift off.
    fn call(&self, shift: &Arc<Shift>, threads: usize) {
        for _ in 0..threads {
            let Some(this) = self.this.upgrade() else { return };
            let shift = Arc::clone(shift);
            self.around.pool.run(move || this.work_shift(&shift));
        }
    }

    /// Does jobs, and what follows from them, on this thread and on as many others as it takes.
    pub(super) fn work_off(&self, jobs: VecDeque<Job>) {
        if !jobs.is_empty() {
            self.work_shift(&Shift::of(jobs));
        }
    }

    /// Writes that the kernel takes at once are done one after the other and reported together: to wake a thread for each
    /// takes longer. Once one has to wait for the disk, other threads do the rest at the same time.
    fn work_shift(&self, shift: &Arc<Shift>) {
        let mut ended = Vec::new();
        loop {
            let (job, left) = {
                let mut jobs = shift.jobs();
                (jobs.pop_front(), jobs.len())
            };
            let Some(job) = job else {
                if ended.is_empty() {
                    return;
                }
                self.report(&mut ended, shift);
                continue;
            };
            let long = job.is_long();
            if long || self.slow.load(Ordering::Relaxed) {
                self.report(&mut ended, shift);
                if left > 0 && !shift.called.swap(true, Ordering::Relaxed) {
                    self.call(shift, left.min(HELPERS_MAX));
                }
            }
            let began = Instant::now();
            ended.extend(self.work(job));
            if !long {
                self.slow.store(began.elapsed() > SLOW, Ordering::Relaxed);
            }
        }
    }

    fn report(&self, ended: &mut Vec<Taken>, shift: &Shift) {
        if !ended.is_empty() {
            let mut wants = Wants::default();
            self.take(std::mem::take(ended), &mut wants);
            let more = self.settle(wants);
            if !more.is_empty() {
                shift.jobs().extend(more);
                shift.called.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Does a job, and says how it ended.
    pub(super) fn work(&self, job: Job) -> Option<Taken> {
        Some(match job {
            Job::Perform {
                from,
                id,
                work: Work::Hash(extent),
                ..
            } => {
                let hashes = self.hashes(extent);
                (Input::Hashed { from, id, hashes }, None, None)
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
                (ended, None, brought)
            }
            Job::Persist(durable) => {
                let put = self.around.store.put_durable(self.image, &durable);
                if let Err(error @ StoreError::NoSpace(_)) = &put {
                    // Nothing of it counts, so it is no failure of the disk. Until there is room this copy keeps to the
                    // record it has, and whoever asked waits or goes on without it.
                    tracing::warn!(image = %self.shape.name, %error, "a record waits for room in the store");
                    std::thread::sleep(ROOM_AGAIN);
                    self.leave([Job::Persist(durable)].into());
                    return None;
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
                (Input::Persisted { ok }, None, None)
            }
            Job::ReadThrough { op, owner } => return self.read_through(op, &owner),
            Job::Forget => {
                match self.forget() {
                    Ok(()) => self.notice(Notice::Forgotten),
                    Err(error) => {
                        tracing::error!(image = %self.shape.name, %error, "a copy that others hold cannot be deleted");
                    }
                }
                return None;
            }
        })
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
