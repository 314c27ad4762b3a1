//! What went wrong with an image since it was attached, in words for people.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Volume;
use crate::disk::DiskError;

/// Failures since attach.
#[derive(Default)]
pub(super) struct Trouble {
    /// The store was full at the last write that needed room.
    full: AtomicBool,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    refused_full: u64,
    reads: u64,
    writes: u64,
    last: String,
}

impl Trouble {
    pub fn note_read(&self, err: &DiskError) {
        if let DiskError::Io { .. } = err {
            let mut counts = self.counts.lock().expect("trouble lock");
            counts.reads += 1;
            counts.last = err.to_string();
        }
    }

    pub fn note_write(&self, err: &DiskError) {
        match err {
            DiskError::NoSpace(_) => {
                let mut counts = self.counts.lock().expect("trouble lock");
                counts.refused_full += 1;
                self.full.store(true, Ordering::Release);
            }
            DiskError::Io { .. } => {
                let mut counts = self.counts.lock().expect("trouble lock");
                counts.writes += 1;
                counts.last = err.to_string();
            }
            _ => {}
        }
    }

    /// A write that needed room got it.
    pub fn found_room(&self) {
        if self.full.load(Ordering::Relaxed) {
            self.full.store(false, Ordering::Release);
        }
    }
}

impl Volume {
    /// What is wrong with the image and what to do, in words; `None` while all is well.
    pub fn trouble(&self) -> Option<String> {
        let mut parts = Vec::new();
        if let Some(closed) = Self::top(&self.stack()).poisoned() {
            let lost = if closed.doubt {
                "; writes that were not flushed before may be lost"
            } else {
                ""
            };
            parts.push(format!(
                "takes no more writes: {}{lost}. Look at the disk under the store, then detach and attach the image, \
                 and let the guest check its file systems",
                closed.why
            ));
        } else if let Some(lost) = self.recovery.map(|r| r.dropped).filter(|dropped| *dropped > 0) {
            parts.push(format!(
                "was recovered at attach: {lost} changes of blocks that were never flushed are gone. Let the guest \
                 check its file systems"
            ));
        }
        let counts = self.trouble.counts.lock().expect("trouble lock");
        if self.trouble.full.load(Ordering::Acquire) {
            parts.push(format!(
                "the store is full: {} writes were refused since attach. Delete images or add disk space; writes go on \
                 by themselves then",
                counts.refused_full
            ));
        }
        if counts.reads + counts.writes > 0 {
            parts.push(format!(
                "{} reads and {} writes failed since attach, the last: {}. Look at the disk under the store",
                counts.reads, counts.writes, counts.last
            ));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}
