//! Switches that break a safety rule each, so that tests can show that they would notice. In builds without the
//! feature `mutants` each is a constant `false` and costs nothing.
//!
//! `HEARTH_MUTANT=NAME` turns one on for a whole process: the test that guards its rule then fails.

#[cfg(feature = "mutants")]
use std::sync::atomic::{AtomicU8, Ordering};

/// One switch.
#[derive(Debug)]
pub struct Switch {
    /// Its name for `HEARTH_MUTANT`.
    pub name: &'static str,
    /// 0: not asked yet, 1: off, 2: on.
    #[cfg(feature = "mutants")]
    state: AtomicU8,
}

impl Switch {
    const fn new(name: &'static str) -> Self {
        Self {
            name,
            #[cfg(feature = "mutants")]
            state: AtomicU8::new(0),
        }
    }

    /// Always off.
    #[cfg(not(feature = "mutants"))]
    #[inline]
    pub const fn is_on(&self) -> bool {
        false
    }

    /// Whether the rule is broken now.
    #[cfg(feature = "mutants")]
    pub fn is_on(&self) -> bool {
        if self.state.load(Ordering::Relaxed) == 0 {
            self.set(std::env::var("HEARTH_MUTANT").as_deref() == Ok(self.name));
        }
        self.state.load(Ordering::Relaxed) == 2
    }

    /// Breaks the rule, or keeps it again.
    #[cfg(feature = "mutants")]
    pub fn set(&self, on: bool) {
        self.state.store(1 + u8::from(on), Ordering::Relaxed);
    }
}

macro_rules! switches {
    ($($(#[doc = $doc:literal])+ $switch:ident, $name:literal;)+) => {
        $($(#[doc = $doc])+ pub static $switch: Switch = Switch::new($name);)+

        /// Every switch.
        pub static ALL: &[&Switch] = &[$(&$switch),+];
    };
}

switches! {
    /// Fills are published without looking for writes that began meanwhile (rule 11).
    FILL_UNCHECKED, "fill-unchecked";
    /// The RAM tier lets in what comes, over its size (rule 10).
    RAM_UNLIMITED, "ram-unlimited";
    /// Writes are acknowledged from memory and reach the disk with the next flush.
    WRITE_BACK, "write-back";
    /// A flush syncs nothing.
    FLUSH_WITHOUT_FSYNC, "flush-without-fsync";
    /// A flush commits the records of blocks whose bytes were not synced.
    COMMIT_WITHOUT_DATA, "commit-without-data";
    /// A flush that failed is tried again and believed (rule 5).
    FSYNC_RETRIED, "fsync-retried";
    /// A flush that failed does not close the image (rule 5).
    FAILED_FLUSH_FORGOTTEN, "failed-flush-forgotten";
    /// A closed image is open again after a restart of the daemon (rule 5).
    CLOSED_FORGOTTEN, "closed-forgotten";
    /// A sync that failed leaves no mark at once, only the slower note in the image's metadata (rule 5).
    DOUBT_UNMARKED, "doubt-unmarked";
    /// A sync that fails while the journal is shortened is only logged (rule 5).
    COMPACTION_UNCHECKED, "compaction-unchecked";
    /// The first part of a short write is taken for all of it.
    SHORT_WRITE_TRUSTED, "short-write-trusted";
    /// A durable write does not look whether the records of its blocks are durable.
    DURABLE_UNCOMMITTED, "durable-uncommitted";
    /// Records that were not committed count after a power loss.
    POWER_LOSS_UNSEEN, "power-loss-unseen";
    /// Bytes of writes that a power loss undid stay in the data file.
    UNSCRUBBED, "unscrubbed";
    /// A replica's mark is believed before it was synced (rule 4).
    MARK_UNSYNCED, "mark-unsynced";
    /// A region is unmarked although one of its blocks is marked (rule 4).
    REGION_UNMARKED_EARLY, "region-unmarked-early";
    /// A region with marked blocks gets the store's new life with its next write (rule 4).
    MARK_RENEWED, "mark-renewed";
    /// A replica whose disk failed takes writes again after a restart (rule 5).
    FAILED_REPLICA_REOPENED, "failed-replica-reopened";
    /// Reads of an image with replicas are answered from RAM by whoever ever owned it (rule 3).
    RAM_UNLEASED, "ram-unleased";
    /// A replica's copies in RAM stay as they are when their blocks are written (rule 11).
    MEMBER_RAM_STALE, "member-ram-stale";
    /// A member writes blocks that it did not mark (rule 4).
    WRITE_UNMARKED, "write-unmarked";
    /// A node follows a stream that does not hold what it has read before.
    ROLLBACK_UNSEEN, "rollback-unseen";
    /// NBD requests over the payload limit are carried out.
    OVERSIZE_TAKEN, "oversize-taken";
    /// NBD connections are taken however many there are, of one image and in all.
    CONNECTIONS_UNCOUNTED, "connections-uncounted";
    /// NBD replies and payloads are held whatever memory they take.
    MEMORY_UNCOUNTED, "memory-uncounted";
}
