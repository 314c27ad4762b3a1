//! Long operations of this node, with their progress.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hearth_protocol::ByteLen;
use hearth_protocol::rpc::{Failure, FailureKind, JobInfo};

/// Ended jobs remembered, the newest.
const ENDED_MAX: usize = 100;

/// The jobs since the daemon started.
#[derive(Debug, Default)]
pub struct Jobs {
    jobs: Mutex<BTreeMap<u64, JobInfo>>,
}

impl Jobs {
    /// Starts a job on a thread of its own and returns it as it is now. `work` reports (bytes done, bytes in all).
    ///
    /// # Panics
    /// If the system has no thread left.
    pub fn start(
        self: &Arc<Self>,
        what: String,
        work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<(), Failure> + Send + 'static,
    ) -> JobInfo {
        let job = {
            let mut jobs = self.jobs.lock().expect("jobs lock");
            let id = jobs.last_key_value().map_or(1, |(id, _)| id + 1);
            let ended: Vec<u64> = jobs.values().filter(|j| j.ended.is_some()).map(|j| j.id).collect();
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
            jobs.insert(id, job.clone());
            job
        };
        let (all, id) = (Arc::clone(self), job.id);
        std::thread::Builder::new()
            .name(format!("job-{id}"))
            .spawn(move || {
                let result = work(&mut |done, total| {
                    all.update(id, |job| (job.done, job.total) = (ByteLen(done), ByteLen(total)));
                });
                all.update(id, |job| job.ended = Some(result));
            })
            .expect("a thread for the job");
        job
    }

    fn update(&self, id: u64, change: impl FnOnce(&mut JobInfo)) {
        if let Some(job) = self.jobs.lock().expect("jobs lock").get_mut(&id) {
            change(job);
        }
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn show(&self, id: u64) -> Result<JobInfo, Failure> {
        let jobs = self.jobs.lock().expect("jobs lock");
        jobs.get(&id).cloned().ok_or_else(|| {
            Failure::new(
                FailureKind::NotFound,
                format!("there is no job {id} on this node"),
                "jobs are forgotten when the daemon restarts: look at the result with hearth image list",
            )
        })
    }
}
