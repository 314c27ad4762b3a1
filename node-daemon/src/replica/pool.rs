//! Threads that wait for this node's disk on behalf of other nodes, so that a slow disk holds up no connection.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

type Job = Box<dyn FnOnce() + Send>;

/// See the module. Its threads end with it.
pub struct Pool {
    jobs: Sender<Job>,
}

impl Pool {
    /// A pool of `threads` threads.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let (jobs, waiting) = mpsc::channel::<Job>();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..threads.max(1) {
            let waiting = Arc::clone(&waiting);
            let body = move || {
                loop {
                    // The lock is held while waiting for a job, not while doing one.
                    let job = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    match job {
                        Ok(job) => job(),
                        Err(_) => return,
                    }
                }
            };
            thread::Builder::new().name("replica-io".into()).spawn(body)?;
        }
        Ok(Self { jobs })
    }

    /// Does a job on one of the threads.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        // Its threads live as long as this.
        let _ = self.jobs.send(Box::new(job));
    }
}
