//! Threads that wait for disks and peers, shared by all connections and divided fairly between them.
//!
//! Each connection has a lane. Lanes with work wait in one queue and give one job per turn, and one lane never
//! occupies more than its share of the threads: a client that sends much, or whose disk hangs, delays itself.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use tokio::sync::Notify;

use super::job::{Failure, Job, Outcome};
use super::proto::{Request, command};
use crate::disk::{Begun, DiskError};

/// A request that a worker finished.
pub struct Completion {
    /// Which.
    pub request: Request,
    /// When it was received.
    pub received: Instant,
    /// Budget bytes it holds.
    pub reserved: usize,
    /// How it ended.
    pub outcome: Outcome,
}

/// Where a connection's completions arrive.
#[derive(Default)]
pub struct Completions {
    queue: Mutex<Vec<Completion>>,
    arrived: Notify,
}

impl Completions {
    /// Adds one.
    pub fn push(&self, completion: Completion) {
        self.queue.lock().expect("no panic under this lock").push(completion);
        self.arrived.notify_one();
    }

    /// Moves what has arrived behind what `into` holds, keeping both allocations in use.
    pub fn take(&self, into: &mut Vec<Completion>) {
        let mut queue = self.queue.lock().expect("no panic under this lock");
        if into.is_empty() {
            std::mem::swap(&mut *queue, into);
        } else {
            into.append(&mut queue);
        }
    }

    /// Ends when something arrived since it ended last.
    pub async fn arrived(&self) {
        self.arrived.notified().await;
    }
}

/// A job on its way, and where its completion goes.
pub struct Submission {
    /// The work.
    pub job: Job,
    /// When its request was received.
    pub received: Instant,
    /// Budget bytes it holds.
    pub reserved: usize,
}

/// Requests that one worker begins together; the lane's next ones are another's.
const BATCH_MAX: usize = 64;

/// A request that was begun and whose end comes later. If nobody tells it, as after a bug, the request fails.
struct Place {
    completion: Option<(Request, Instant, usize)>,
    completions: Arc<Completions>,
}

impl Place {
    fn tell(&mut self, outcome: Outcome) {
        if let Some((request, received, reserved)) = self.completion.take() {
            self.completions.push(Completion {
                request,
                received,
                reserved,
                outcome,
            });
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.tell(Outcome::Failed(Failure::internal()));
    }
}

struct LaneState {
    jobs: VecDeque<Submission>,
    running: usize,
    /// Whether the lane stands in the queue.
    queued: bool,
    completions: Arc<Completions>,
}

#[derive(Default)]
struct State {
    lanes: HashMap<u64, LaneState>,
    queue: VecDeque<u64>,
    next_lane: u64,
    threads: usize,
    /// Threads that wait and were not called yet.
    idle: usize,
    /// Calls that no waiting thread has answered yet.
    calls: usize,
    stopping: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    threads_max: usize,
    per_lane_max: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under this lock")
    }
}

/// The threads. They are started as work demands, and end when this is dropped and their jobs are done.
pub struct Workers {
    shared: Arc<Shared>,
}

impl Workers {
    /// At most `threads_max` threads, at most `per_lane_max` of them for one lane.
    pub fn new(threads_max: usize, per_lane_max: usize) -> Self {
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            threads_max: threads_max.max(1),
            per_lane_max: per_lane_max.clamp(1, threads_max.max(1)),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// A lane for a connection.
    pub fn lane(&self) -> Lane {
        let completions = Arc::new(Completions::default());
        let mut state = self.shared.lock();
        state.next_lane += 1;
        let id = state.next_lane;
        let lane = LaneState {
            jobs: VecDeque::new(),
            running: 0,
            queued: false,
            completions: Arc::clone(&completions),
        };
        state.lanes.insert(id, lane);
        Lane {
            id,
            shared: Arc::clone(&self.shared),
            completions,
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
    }
}

/// A connection's way to the workers. Dropping it drops the jobs that have not begun; none of them was acknowledged.
pub struct Lane {
    id: u64,
    shared: Arc<Shared>,
    completions: Arc<Completions>,
}

impl Lane {
    /// Where this lane's completions arrive.
    pub fn completions(&self) -> &Arc<Completions> {
        &self.completions
    }

    /// Hands over all of `submissions`.
    pub fn submit(&self, submissions: &mut Vec<Submission>) {
        if submissions.is_empty() {
            return;
        }
        let (mut wake, mut start) = (0, 0);
        {
            let mut state = self.shared.lock();
            let State {
                lanes,
                queue,
                idle,
                calls,
                threads,
                ..
            } = &mut *state;
            let lane = lanes.get_mut(&self.id).expect("a lane lives as long as its handle");
            // Those that are begun together need one worker.
            let begun = submissions
                .iter()
                .filter(|submission| submission.job.is_begun())
                .count();
            let added = submissions.len() - begun + usize::from(begun > 0);
            lane.jobs.extend(submissions.drain(..));
            enqueue(self.id, lane, queue, self.shared.per_lane_max);
            let useful = added.min(self.shared.per_lane_max.saturating_sub(lane.running));
            wake += useful.min(*idle);
            *idle -= wake;
            *calls += wake;
            start += (useful - wake).min(self.shared.threads_max - *threads);
            *threads += start;
        }
        for _ in 0..wake {
            self.shared.work.notify_one();
        }
        for _ in 0..start {
            let shared = Arc::clone(&self.shared);
            let spawned = thread::Builder::new()
                .name("nbd-worker".into())
                .spawn(move || work(&shared));
            if let Err(error) = spawned {
                let mut state = self.shared.lock();
                state.threads -= 1;
                assert!(
                    state.threads > 0,
                    "cannot start a thread for disk I/O: {error}; raise the limit on tasks"
                );
            }
        }
    }
    /// Drops the jobs that have not begun, and says how many.
    pub fn cancel(&self) -> usize {
        let jobs = self
            .shared
            .lock()
            .lanes
            .get_mut(&self.id)
            .map(|lane| std::mem::take(&mut lane.jobs));
        jobs.map_or(0, |jobs| jobs.len()) // dropped outside the lock: buffers go back to their pool
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let jobs = {
            let mut state = self.shared.lock();
            let Some(lane) = state.lanes.get_mut(&self.id) else {
                return;
            };
            let jobs = std::mem::take(&mut lane.jobs);
            if lane.running == 0 && !lane.queued {
                state.lanes.remove(&self.id);
            } else {
                // The worker that ends its last job, or finds it in the queue, removes it.
                lane.completions = Arc::new(Completions::default());
            }
            jobs
        };
        drop(jobs); // outside the lock: buffers go back to their pool
    }
}

fn enqueue(id: u64, lane: &mut LaneState, queue: &mut VecDeque<u64>, per_lane_max: usize) {
    if !lane.queued && !lane.jobs.is_empty() && lane.running < per_lane_max {
        lane.queued = true;
        queue.push_back(id);
    }
}

/// Takes the next job, waiting for one, and with one that is only begun those behind it that are, too; `None` when the
/// server is gone and nothing is left.
fn next(shared: &Shared, taken: &mut Vec<Submission>) -> Option<(u64, Arc<Completions>)> {
    let mut state = shared.lock();
    loop {
        while let Some(id) = state.queue.pop_front() {
            let State { lanes, queue, .. } = &mut *state;
            let lane = lanes.get_mut(&id).expect("a queued lane is kept");
            lane.queued = false;
            if let Some(submission) = lane.jobs.pop_front() {
                let begun = submission.job.is_begun();
                taken.push(submission);
                while begun
                    && taken.len() < BATCH_MAX
                    && let Some(submission) = lane.jobs.pop_front_if(|submission| submission.job.is_begun())
                {
                    taken.push(submission);
                }
                lane.running += 1;
                enqueue(id, lane, queue, shared.per_lane_max);
                return Some((id, Arc::clone(&lane.completions)));
            }
            if lane.running == 0 && Arc::strong_count(&lane.completions) == 1 {
                lanes.remove(&id); // its connection is gone
            }
        }
        if state.stopping {
            state.threads -= 1;
            return None;
        }
        state.idle += 1;
        let not_called = |state: &mut State| state.calls == 0 && !state.stopping;
        state = shared
            .work
            .wait_while(state, not_called)
            .expect("no panic under this lock");
        match state.calls.checked_sub(1) {
            Some(left) => state.calls = left,
            None => state.idle -= 1,
        }
    }
}

/// Begins requests of one disk. Their ends come on whatever thread.
fn begin(taken: &mut Vec<Submission>, completions: &Arc<Completions>) {
    let disk = Arc::clone(&taken[0].job.disk);
    let begun = taken.drain(..).map(|submission| {
        let Submission {
            mut job,
            received,
            reserved,
        } = submission;
        let mut place = Place {
            completion: Some((job.request, received, reserved)),
            completions: Arc::clone(completions),
        };
        let is_write = job.request.command == command::WRITE;
        let tell = Box::new(move |ended: Result<(), DiskError>| {
            place.tell(match ended {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Failed(Failure::of(&error, is_write)),
            });
        });
        Begun {
            change: job.change(),
            tell,
        }
    });
    let begun: Vec<Begun> = begun.collect();
    if catch_unwind(AssertUnwindSafe(|| disk.begin(begun))).is_err() {
        tracing::error!(image = %disk.image(), "a disk call panicked");
    }
}

/// Carries out one request.
fn carry_out(submission: Submission, completions: &Completions) {
    let Submission {
        mut job,
        received,
        reserved,
    } = submission;
    // A bug behind `Disk` must fail one request, not take a thread and the guest's queue with it.
    let outcome = catch_unwind(AssertUnwindSafe(|| job.run())).unwrap_or_else(|_| {
        tracing::error!(image = %job.disk.image(), request = ?job.request, "a disk call panicked");
        Outcome::Failed(Failure::internal())
    });
    let request = job.request;
    drop(job); // first: who hears of the completion may count on the disk being released
    completions.push(Completion {
        request,
        received,
        reserved,
        outcome,
    });
}

fn work(shared: &Shared) {
    let mut taken = Vec::new();
    while let Some((id, completions)) = next(shared, &mut taken) {
        if taken[0].job.is_begun() {
            begin(&mut taken, &completions);
        } else {
            taken
                .drain(..)
                .for_each(|submission| carry_out(submission, &completions));
        }
        drop(completions);
        let mut state = shared.lock();
        let State { lanes, queue, .. } = &mut *state;
        let lane = lanes.get_mut(&id).expect("a running lane is kept");
        lane.running -= 1;
        enqueue(id, lane, queue, shared.per_lane_max);
        if lane.running == 0 && !lane.queued && Arc::strong_count(&lane.completions) == 1 {
            lanes.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::buffer::BufferPool;
    use super::super::job::Terms;
    use super::super::memory::MemoryDisk;
    use super::super::proto::command;
    use super::*;
    use crate::disk::Disk;

    fn submission(disk: &Arc<dyn Disk>, cookie: u64) -> Submission {
        let pool = BufferPool::new(0);
        let request = Request {
            flags: 0,
            command: command::READ,
            cookie,
            offset: 0,
            length: 512,
            payload_length: 0,
        };
        let terms = Terms {
            size: 1 << 20,
            block_size: 4_096,
            read_only: false,
            structured: false,
            contexts: Vec::new(),
        };
        let job = Job {
            request,
            buffer: Some(pool.take(512)),
            disk: Arc::clone(disk),
            terms: Arc::new(terms),
        };
        Submission {
            job,
            received: Instant::now(),
            reserved: 512,
        }
    }

    #[tokio::test]
    async fn every_job_completes_once_and_lanes_go_away() {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 20));
        let workers = Workers::new(4, 2);
        let lanes: Vec<Lane> = (0..3).map(|_| workers.lane()).collect();
        for lane in &lanes {
            lane.submit(&mut (0..100).map(|cookie| submission(&disk, cookie)).collect());
        }
        for lane in &lanes {
            let (mut cookies, mut batch) = (Vec::new(), Vec::new());
            while cookies.len() < 100 {
                lane.completions().arrived().await;
                lane.completions().take(&mut batch);
                cookies.extend(batch.drain(..).map(|completion| completion.request.cookie));
            }
            cookies.sort_unstable();
            assert_eq!(cookies, (0..100).collect::<Vec<_>>());
        }
        let shared = Arc::clone(&workers.shared);
        assert!(shared.lock().threads <= 4);
        drop(lanes);
        drop(workers);
        while Arc::strong_count(&shared) > 1 {
            tokio::task::yield_now().await;
        }
        let state = shared.lock();
        assert_eq!((state.threads, state.lanes.len()), (0, 0));
    }
}
