//! Long operations of this node, with their progress.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use hearth_protocol::ByteLen;
use hearth_protocol::rpc::{Failure, FailureKind, JobInfo};

/// Ended jobs remembered, the newest.
const ENDED_MAX: usize = 100;

/// The jobs since the daemon started.
#[derive(Debug, Default)]
pub struct Jobs {
    jobs: Mutex<BTreeMap<u64, Job>>,
}

#[derive(Debug)]
struct Job {
    info: JobInfo,
    cancelled: Arc<AtomicBool>,
}

impl Jobs {
    /// Starts a job on a thread of its own and returns it as it is now. `work` reports (bytes done, bytes in all) and
    /// gives up, leaving nothing behind, when the answer is `false`.
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn start(
        self: &Arc<Self>,
        what: String,
        work: impl FnOnce(&mut dyn FnMut(u64, u64) -> bool) -> Result<(), Failure> + Send + 'static,
    ) -> JobInfo {
        let cancelled = Arc::new(AtomicBool::new(false));
        let job = {
            let mut jobs = self.jobs.lock().expect("jobs lock");
            let id = jobs.last_key_value().map_or(1, |(id, _)| id + 1);
            let ended: Vec<u64> = jobs
                .values()
                .filter(|j| j.info.ended.is_some())
                .map(|j| j.info.id)
                .collect();
            for old in ended.iter().take(ended.len().saturating_sub(ENDED_MAX)) {
                jobs.remove(old);
            }
            let job = JobInfo {
                id,
                what,
                done: ByteLen(0),
                total: ByteLen(0),
                ended: None,
            };
            let cancelled = Arc::clone(&cancelled);
            jobs.insert(
                id,
                Job {
                    info: job.clone(),
                    cancelled,
                },
            );
            job
        };
        let (all, id) = (Arc::clone(self), job.id);
        std::thread::Builder::new()
            .name(format!("job-{id}"))
            .spawn(move || {
                let result = work(&mut |done, total| {
                    all.update(id, |job| (job.done, job.total) = (ByteLen(done), ByteLen(total)));
                    !cancelled.load(Ordering::Relaxed)
                });
                let result = match result {
                    Err(_) if cancelled.load(Ordering::Relaxed) => Err(Failure::new(
                        FailureKind::Failed,
                        "it was cancelled, and what it had made is removed",
                        "",
                    )),
                    other => other,
                };
                all.update(id, |job| job.ended = Some(result));
            })
            .expect("a thread for the job");
        job
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut JobInfo)) {
        if let Some(job) = self.jobs.lock().expect("jobs lock").get_mut(&id) {
            change(&mut job.info);
        }
    }

    /// Asks a job to stop. It is over soon after.
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when it has ended already.
    pub fn cancel(&self, id: u64) -> Result<JobInfo, Failure> {
        let info = self.show(id)?;
        if info.ended.is_some() {
            return Err(Failure::new(
                FailureKind::Conflict,
                format!("job {id} has ended already"),
                format!("hearth job show {id}"),
            ));
        }
        if let Some(job) = self.jobs.lock().expect("jobs lock").get(&id) {
            job.cancelled.store(true, Ordering::Relaxed);
        }
        Ok(info)
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn show(&self, id: u64) -> Result<JobInfo, Failure> {
        let jobs = self.jobs.lock().expect("jobs lock");
        jobs.get(&id).map(|job| job.info.clone()).ok_or_else(|| {
            Failure::new(
                FailureKind::NotFound,
                format!("there is no job {id} on this node"),
                "jobs are forgotten when the daemon restarts: look at the result with hearth image list",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_job_can_be_cancelled_until_it_has_ended() {
        let jobs = Arc::new(Jobs::default());
        let (going, started) = mpsc::channel();
        let (ending, ended) = mpsc::channel();
        let job = jobs.start("count".into(), move |progress| {
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
        ended.recv().unwrap();
        let failure = loop {
            if let Some(result) = jobs.show(job.id).unwrap().ended {
                break result.unwrap_err();
            }
            std::thread::yield_now();
        };
        assert!(failure.message.contains("cancelled"), "{failure}");
        assert_eq!(jobs.cancel(job.id).unwrap_err().kind, FailureKind::Conflict);
        assert_eq!(jobs.cancel(99).unwrap_err().kind, FailureKind::NotFound);
    }
}
