//! Named places where a test can make the store fail, pause or die. Inert unless a test installs a hook: then the
//! cost is one branch.

use std::fmt;
use std::io;
use std::sync::Arc;

/// A place where the store is about to call the operating system, or just has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// Before a read of a layer's data file.
    DataRead,
    /// After a successful read of a layer's data file, before the bytes are used.
    DataReadDone,
    /// Before a write to a layer's data file.
    DataWrite,
    /// After a successful write to a layer's data file, before its blocks are recorded as valid.
    DataWriteDone,
    /// Before a hole is punched or a range zeroed in a layer's data file.
    DataPunch,
    /// Before a layer's data file is synced.
    DataSync,
    /// Before a record is appended to a layer's journal.
    JournalAppend,
    /// Before a layer's journal is synced.
    JournalSync,
    /// Before a bitmap or metadata file is written under its temporary name.
    MetaWrite,
    /// Before a bitmap or metadata file takes its final name.
    MetaRename,
    /// Before a directory is synced.
    DirSync,
}

impl Site {
    /// Every site, for tests that go through all of them.
    pub const ALL: [Site; 11] = [
        Site::DataRead,
        Site::DataReadDone,
        Site::DataWrite,
        Site::DataWriteDone,
        Site::DataPunch,
        Site::DataSync,
        Site::JournalAppend,
        Site::JournalSync,
        Site::MetaWrite,
        Site::MetaRename,
        Site::DirSync,
    ];
}

type Hook = dyn Fn(Site) -> io::Result<()> + Send + Sync;

/// What happens at each [`Site`]. The default does nothing.
#[derive(Clone, Default)]
pub struct Faults(Option<Arc<Hook>>);

impl Faults {
    /// Calls `hook` at every site; an error it returns is reported as the operating system's.
    pub fn hook(hook: impl Fn(Site) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    /// Asks the hook, if there is one.
    ///
    /// # Errors
    /// What the hook returns.
    #[inline]
    pub fn at(&self, site: Site) -> io::Result<()> {
        match &self.0 {
            None => Ok(()),
            Some(hook) => hook(site),
        }
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Faults(hook)"
        } else {
            "Faults(none)"
        })
    }
}
