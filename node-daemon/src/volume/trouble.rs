//! What went wrong with an image since it was attached, in words for people.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Volume;
use crate::disk::DiskError;
use crate::store::Closed;

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

/// The code of an image whose store is full.
pub const STORE_FULL: &str = "STORE_FULL";

/// One thing that is wrong with an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ailment {
    /// A stable code such as `IMAGE_CLOSED`.
    pub code: &'static str,
    /// Whether the guest is refused something now.
    pub error: bool,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub fix: String,
}

impl Ailment {
    /// An image that takes no more writes, and why.
    pub fn closed(closed: &Closed) -> Self {
        let lost = if closed.doubt {
            "; writes that were not flushed before may be lost"
        } else {
            ""
        };
        Self {
            code: "IMAGE_CLOSED",
            error: true,
            what: format!("takes no more writes: {}{lost}", closed.why),
            fix:
                "Look at the disk under the store, then detach and attach the image (hearth image detach, hearth image \
                  attach), and let the guest check its file systems"
                    .into(),
        }
    }
}

/// Ailments in one text; `None` without any.
pub fn in_words(ailments: &[Ailment]) -> Option<String> {
    let parts: Vec<_> = ailments.iter().map(|a| format!("{}. {}", a.what, a.fix)).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

impl Volume {
    /// Counts a write that was refused before it came here.
    pub fn note_refused(&self, err: &DiskError) {
        self.trouble.note_write(err);
    }

    /// What is wrong with the image, worst first.
    pub fn ailments(&self) -> Vec<Ailment> {
        let mut all = Vec::new();
        if let Some(closed) = Self::top(&self.stack()).poisoned() {
            all.push(Ailment::closed(closed));
        } else if let Some(lost) = self.recovery.map(|r| r.dropped).filter(|dropped| *dropped > 0) {
            all.push(Ailment {
                code: "IMAGE_RECOVERED",
                error: false,
                what: format!("was recovered at attach: {lost} changes of blocks that were never flushed are gone"),
                fix: "Let the guest check its file systems".into(),
            });
        }
        let counts = self.trouble.counts.lock().expect("trouble lock");
        if self.trouble.full.load(Ordering::Acquire) {
            all.push(Ailment {
                code: STORE_FULL,
                error: true,
                what: format!(
                    "the store is full: {} writes were refused since attach",
                    counts.refused_full
                ),
                fix: "Delete images or add disk space; writes go on by themselves then".into(),
            });
        }
        if counts.reads + counts.writes > 0 {
            all.push(Ailment {
                code: "IMAGE_IO_FAILED",
                error: false,
                what: format!(
                    "{} reads and {} writes failed since attach, the last: {}",
                    counts.reads, counts.writes, counts.last
                ),
                fix: "Look at the disk under the store".into(),
            });
        }
        all
    }

    /// The same in words; `None` while all is well.
    pub fn trouble(&self) -> Option<String> {
        in_words(&self.ailments())
    }
}
