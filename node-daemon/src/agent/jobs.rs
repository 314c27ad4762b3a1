//! Long operations of this node, with their progress.
//!
//! What a job is doing is in its own thread and ends with the daemon; what is known of it is also in a file, so that the next
//! process can say what became of it, and gives no number out twice.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hearth_bus::wall_now;
use hearth_protocol::event::CopiesChecked;
use hearth_protocol::rpc::{Failure, FailureKind, JobInfo, JobKind};
use hearth_protocol::{ByteLen, ImageName};

use crate::store::fault::Faults;
use crate::store::os::{read_note, replace_note};

/// Ended jobs remembered, the newest.
const ENDED_MAX: usize = 100;

/// How often a job that is paused looks whether it may go on.
const PAUSED_LOOK: Duration = Duration::from_millis(50);

/// Name of the file.
pub const FILE: &str = "jobs.json";

/// The jobs that run, and the last ones that ended, also in earlier processes.
#[derive(Debug)]
pub struct Jobs {
    jobs: Mutex<BTreeMap<u64, Job>>,
    /// Where they are written down, held while that is done.
    kept: Mutex<PathBuf>,
    faults: Faults,
}

#[derive(Debug)]
struct Job {
    info: JobInfo,
    wishes: Arc<Wishes>,
}

/// What operators want of a job.
#[derive(Debug, Default)]
struct Wishes {
    cancelled: AtomicBool,
    paused: AtomicBool,
}

/// What a job is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Go on.
    GoOn,
    /// Stand still until it is resumed.
    Pause,
    /// End.
    Cancel,
}

/// A job as its own work sees it.
pub struct Working {
    jobs: Arc<Jobs>,
    id: u64,
    wishes: Arc<Wishes>,
}

impl Working {
    /// Says how far it is, in bytes done and in all, and hears what it is to do.
    pub fn report(&self, done: u64, total: u64) -> Wish {
        self.jobs
            .update(self.id, |job| (job.done, job.total) = (ByteLen(done), ByteLen(total)));
        if self.wishes.cancelled.load(Ordering::Relaxed) {
            Wish::Cancel
        } else if self.wishes.paused.load(Ordering::Relaxed) {
            Wish::Pause
        } else {
            Wish::GoOn
        }
    }

    /// Says how far it is and stands still while it is to; `false` if it is to end.
    pub fn goes_on(&self, done: u64, total: u64) -> bool {
        loop {
            match self.report(done, total) {
                Wish::GoOn => return true,
                Wish::Cancel => return false,
                Wish::Pause => std::thread::sleep(PAUSED_LOOK),
            }
        }
    }

    /// Says what was found about copies so far.
    pub fn found(&self, checked: &CopiesChecked) {
        self.jobs.update(self.id, |job| job.found = Some(checked.clone()));
    }
}

/// What becomes of what a job did when it does not come to its end.
fn left_behind(kind: JobKind) -> (&'static str, &'static str) {
    match kind {
        JobKind::Import | JobKind::Export => ("what it had made is removed", "begin it again"),
        JobKind::Join => (
            "the node does not count as a copy",
            "hearth location add begins it again",
        ),
        JobKind::Prewarm => ("what it brought into RAM stays", "begin it again"),
        JobKind::Scrub | JobKind::Sync => ("what it did so far stays", "begin it again, with --blocks for the rest"),
    }
}

impl Jobs {
    /// The jobs that an earlier process wrote down in a folder. Those that it did not end have ended with it.
    pub fn open(dir: &Path, faults: Faults) -> Arc<Self> {
        let path = dir.join(FILE);
        let kept: Vec<JobInfo> = read_note(&path, "delete it: only what is known of earlier jobs is in it")
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "what is known of earlier jobs cannot be read");
                None
            })
            .unwrap_or_default();
        let ended = |mut info: JobInfo| {
            if info.ended.is_none() {
                let (left, hint) = left_behind(info.kind);
                let message = format!("the daemon ended while it ran, and the job with it: {left}");
                info.ended = Some(Err(Failure::new(FailureKind::Failed, message, hint)));
                info.paused = false;
            }
            let wishes = Arc::default();
            (info.id, Job { info, wishes })
        };
        Arc::new(Self {
            jobs: Mutex::new(kept.into_iter().map(ended).collect()),
            kept: Mutex::new(path),
            faults,
        })
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<u64, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down what is known. Where that fails, a restart forgets it, and nothing else.
    fn keep(&self) {
        let path = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let written = serde_json::to_vec(&self.list())
            .map_err(std::io::Error::other)
            .and_then(|bytes| replace_note(&path, &bytes, &self.faults));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write down what jobs there are");
        }
    }

    /// Starts a job whose work asks, between any two steps, whether it goes on: with (bytes done, bytes in all). It stands
    /// still there while it is paused, and gives up, leaving nothing behind, when the answer is `false`.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn start(
        self: &Arc<Self>,
        kind: JobKind,
        image: ImageName,
        what: String,
        work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> Result<(), Failure> + Send + 'static,
    ) -> JobInfo {
        self.start_working(kind, image, what, |working| {
            work(&mut |done, total| working.goes_on(done, total))
        })
    }

    /// Starts a job on a thread of its own and returns it as it is now.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn start_working(
        self: &Arc<Self>,
        kind: JobKind,
        image: ImageName,
        what: String,
        work: impl FnOnce(&Working) -> Result<(), Failure> + Send + 'static,
    ) -> JobInfo {
        let wishes: Arc<Wishes> = Arc::default();
        let job = {
            let mut jobs = self.jobs();
            let id = jobs.last_key_value().map_or(1, |(id, _)| id + 1);
            let ended: Vec<u64> = jobs
                .values()
                .filter(|j| j.info.ended.is_some())
                .map(|j| j.info.id)
                .collect();
            for old in ended.iter().take(ended.len().saturating_sub(ENDED_MAX)) {
                jobs.remove(old);
            }
            let info = JobInfo {
                id,
                kind,
                image,
                began: wall_now(),
                paused: false,
                found: None,
                what,
                done: ByteLen(0),
                total: ByteLen(0),
                ended: None,
            };
            let wishes = Arc::clone(&wishes);
            let job = Job {
                info: info.clone(),
                wishes,
            };
            jobs.insert(id, job);
            info
        };
        let working = Working {
            jobs: Arc::clone(self),
            id: job.id,
            wishes,
        };
        std::thread::Builder::new()
            .name(format!("job-{}", job.id))
            .spawn(move || {
                working.jobs.keep();
                let result = match work(&working) {
                    Err(_) if working.wishes.cancelled.load(Ordering::Relaxed) => {
                        let message = format!("it was cancelled, and {}", left_behind(kind).0);
                        Err(Failure::new(FailureKind::Failed, message, ""))
                    }
                    other => other,
                };
                let (jobs, id) = (&working.jobs, working.id);
                jobs.update(id, |job| (job.ended, job.paused) = (Some(result), false));
                jobs.keep();
            })
            .expect("a thread for the job");
        job
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut JobInfo)) {
        if let Some(job) = self.jobs().get_mut(&id) {
            change(&mut job.info);
        }
    }

    /// Has a job told something, unless it has ended.
    fn wish(&self, id: u64, tell: impl FnOnce(&mut Job)) -> Result<JobInfo, Failure> {
        let mut jobs = self.jobs();
        let job = jobs.get_mut(&id).ok_or_else(|| unknown(id))?;
        if job.info.ended.is_some() {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("job {id} has ended already"),
                format!("hearth job show {id}"),
            ));
        }
        tell(job);
        Ok(job.info.clone())
    }

    /// Asks a job to stop. It is over soon after.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when it has ended already.
    pub fn cancel(&self, id: u64) -> Result<JobInfo, Failure> {
        self.wish(id, |job| job.wishes.cancelled.store(true, Ordering::Relaxed))
    }

    /// Has a job stand still from its next step on, or go on.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when it has ended already.
    pub fn pause(&self, id: u64, paused: bool) -> Result<JobInfo, Failure> {
        self.wish(id, |job| {
            job.wishes.paused.store(paused, Ordering::Relaxed);
            job.info.paused = paused;
        })
    }

    /// All that are known, ascending by id.
    pub fn list(&self) -> Vec<JobInfo> {
        self.jobs().values().map(|job| job.info.clone()).collect()
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn show(&self, id: u64) -> Result<JobInfo, Failure> {
        self.jobs()
            .get(&id)
            .map(|job| job.info.clone())
            .ok_or_else(|| unknown(id))
    }
}

fn unknown(id: u64) -> Failure {
    Failure::new(
        FailureKind::NotFound,
        format!("there is no job {id} on this node"),
        "hearth job list shows the jobs of all nodes; old ones are forgotten",
    )
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn ended(jobs: &Jobs, id: u64) -> Failure {
        loop {
            if let Some(result) = jobs.show(id).unwrap().ended {
                return result.unwrap_err();
            }
            std::thread::yield_now();
        }
    }

    fn image() -> ImageName {
        "a/b".parse().unwrap()
    }

    #[test]
    fn a_job_can_be_cancelled_until_it_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(dir.path(), Faults::default());
        let (going, started) = mpsc::channel();
        let (ending, ended_at) = mpsc::channel();
        let job = jobs.start(JobKind::Export, image(), "count".into(), move |progress| {
            let mut done = 0;
            while progress(done, 0) {
                done += 1;
                let _ = going.send(());
            }
            ending.send(()).unwrap();
            Err(Failure::new(FailureKind::Failed, "stopped", ""))
        });
        started.recv().unwrap();
        assert_eq!(jobs.show(job.id).unwrap().ended, None);
        jobs.cancel(job.id).unwrap();
        ended_at.recv().unwrap();
        let failure = ended(&jobs, job.id);
        assert!(failure.message.contains("cancelled"), "{failure}");
        assert_eq!(jobs.cancel(job.id).unwrap_err().kind, FailureKind::Conflict);
        assert_eq!(jobs.cancel(99).unwrap_err().kind, FailureKind::NotFound);
    }

    #[test]
    fn a_paused_job_takes_no_step_and_can_be_cancelled() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::open(dir.path(), Faults::default());
        // Each step says that it begins, and waits until it is allowed to end.
        let (allow, allowed) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let job = jobs.start(JobKind::Scrub, image(), "count".into(), move |progress| {
            let mut done = 0;
            while progress(done, 9) {
                done += 1;
                tell.send(done).unwrap();
                allowed.recv().unwrap();
            }
            Err(Failure::new(FailureKind::Failed, "stopped", ""))
        });
        assert_eq!(told.recv(), Ok(1));
        assert!(jobs.pause(job.id, true).unwrap().paused);
        // The step under way ends, and the next one may not begin.
        allow.send(()).unwrap();
        assert!(told.recv_timeout(PAUSED_LOOK * 4).is_err());
        jobs.pause(job.id, false).unwrap();
        assert_eq!(told.recv(), Ok(2));
        jobs.pause(job.id, true).unwrap();
        allow.send(()).unwrap();
        jobs.cancel(job.id).unwrap();
        let failure = ended(&jobs, job.id);
        assert!(failure.message.contains("what it did so far stays"), "{failure}");
        assert!(!jobs.show(job.id).unwrap().paused);
    }

    #[test]
    fn the_next_process_says_what_became_of_a_job_and_counts_on() {
        let dir = tempfile::tempdir().unwrap();
        let before = Jobs::open(dir.path(), Faults::default());
        let (going, started) = mpsc::channel();
        let (_end, never) = mpsc::channel::<()>();
        before.start(JobKind::Join, image(), "have b hold a/b".into(), move |progress| {
            progress(3, 9);
            going.send(()).unwrap();
            let _ = never.recv();
            Ok(())
        });
        started.recv().unwrap();
        let after = Jobs::open(dir.path(), Faults::default());
        let failure = ended(&after, 1);
        assert!(failure.message.contains("does not count as a copy"), "{failure}");
        assert!(failure.hint.contains("location add"), "{failure:?}");
        let next = after.start(JobKind::Prewarm, image(), "warm".into(), |_| Ok(()));
        assert_eq!(next.id, 2);
    }
}
