//! The fault arm: named places where a test can make the store fail, write short, pause or be watched. Inert unless a
//! test installs a hook: then the cost is one branch.
//!
//! [`Site`] is the one list of places; every change that the store makes on disk goes through [`super::os`], which
//! names its site. `tests/store_sites.rs` holds both to that.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a site does to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Reads bytes.
    Read,
    /// Writes bytes.
    Write,
    /// Makes earlier changes survive a power loss.
    Sync,
    /// Makes or frees space, or changes a file's length.
    Space,
    /// Makes, renames or removes a name.
    Name,
    /// Nothing: a moment between two calls.
    Moment,
}

macro_rules! sites {
    ($($(#[doc = $doc:literal])+ $site:ident, $name:literal, $verb:ident;)+) => {
        /// A place where the store is about to call the operating system, or just has.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Site { $($(#[doc = $doc])+ $site,)+ }

        impl Site {
            /// Every site.
            pub const ALL: &[Site] = &[$(Site::$site),+];

            /// Its name, as on a command line.
            pub const fn name(self) -> &'static str {
                match self { $(Site::$site => $name,)+ }
            }

            /// What it does.
            pub const fn verb(self) -> Verb {
                match self { $(Site::$site => Verb::$verb,)+ }
            }
        }
    };
}

sites! {
    /// Creation of a directory that the store stands on.
    StoreDirCreate, "store-dir-create", Name;
    /// Sync of the store's directory, so that the directories in it survive a power loss.
    StoreDirSync, "store-dir-sync", Sync;
    /// Creation of the store's lock file.
    LockCreate, "lock-create", Name;
    /// Creation of a layer's directory.
    LayerDirCreate, "layer-dir-create", Name;
    /// Creation of a layer's data file.
    DataCreate, "data-create", Name;
    /// Setting the length of a new data file.
    DataSize, "data-size", Space;
    /// Before a read of a layer's data file.
    DataRead, "data-read", Read;
    /// After a successful read of a layer's data file, before the bytes are used.
    DataReadDone, "data-read-done", Moment;
    /// A write to a layer's data file.
    DataWrite, "data-write", Write;
    /// A write to a layer's data file that is durable by itself (FUA).
    DataWriteDurable, "data-write-durable", Write;
    /// After a successful write to a layer's data file, before its blocks are recorded as valid.
    DataWriteDone, "data-write-done", Moment;
    /// Punching a hole into a layer's data file.
    DataPunch, "data-punch", Space;
    /// Zeroing a range of a layer's data file in place.
    DataZero, "data-zero", Space;
    /// Allocating a range of a layer's data file.
    DataReserve, "data-reserve", Space;
    /// Sync of a layer's data file.
    DataSync, "data-sync", Sync;
    /// Creation of a journal.
    JournalCreate, "journal-create", Name;
    /// Sync of a new, empty journal.
    JournalCreateSync, "journal-create-sync", Sync;
    /// Reserving space for a journal.
    JournalReserve, "journal-reserve", Space;
    /// Appending a record to a journal.
    JournalAppend, "journal-append", Write;
    /// Appending a commit to a journal.
    JournalCommit, "journal-commit", Write;
    /// Cutting off what a failed append may have left.
    JournalCut, "journal-cut", Space;
    /// Sync of a journal.
    JournalSync, "journal-sync", Sync;
    /// Creation of a bitmap file under its temporary name.
    BitmapCreate, "bitmap-create", Name;
    /// Writing a bitmap file.
    BitmapWrite, "bitmap-write", Write;
    /// Sync of a bitmap file.
    BitmapSync, "bitmap-sync", Sync;
    /// Giving a bitmap file its final name.
    BitmapRename, "bitmap-rename", Name;
    /// Creation of a layer's metadata file under its temporary name.
    LayerMetaCreate, "layer-meta-create", Name;
    /// Writing a layer's metadata file.
    LayerMetaWrite, "layer-meta-write", Write;
    /// Sync of a layer's metadata file.
    LayerMetaSync, "layer-meta-sync", Sync;
    /// Giving a layer's metadata file its final name.
    LayerMetaRename, "layer-meta-rename", Name;
    /// Creation of the mark that a layer's bytes are in doubt.
    DoubtCreate, "doubt-create", Name;
    /// Writing into that mark what happened.
    DoubtWrite, "doubt-write", Write;
    /// Removing that mark, once the image was opened anew without what is in doubt.
    DoubtRemove, "doubt-remove", Name;
    /// Sync of a layer's directory.
    LayerDirSync, "layer-dir-sync", Sync;
    /// Sync of the directory of layers.
    LayersDirSync, "layers-dir-sync", Sync;
    /// Creation of an image's directory.
    ImageDirCreate, "image-dir-create", Name;
    /// Creation of an image's metadata file under its temporary name.
    ImageMetaCreate, "image-meta-create", Name;
    /// Writing an image's metadata file.
    ImageMetaWrite, "image-meta-write", Write;
    /// Sync of an image's metadata file.
    ImageMetaSync, "image-meta-sync", Sync;
    /// Giving an image's metadata file its final name.
    ImageMetaRename, "image-meta-rename", Name;
    /// Removing an image's metadata file: the image is deleted.
    ImageMetaRemove, "image-meta-remove", Name;
    /// Creation of a replica's file of marks under its temporary name.
    MarksCreate, "marks-create", Name;
    /// Writing a replica's file of marks.
    MarksWrite, "marks-write", Write;
    /// Sync of a replica's new file of marks.
    MarksSync, "marks-sync", Sync;
    /// Giving a replica's file of marks its final name.
    MarksRename, "marks-rename", Name;
    /// Reserving space for marks.
    MarksReserve, "marks-reserve", Space;
    /// Appending marks.
    MarksAppend, "marks-append", Write;
    /// Sync of appended marks.
    MarksAppendSync, "marks-append-sync", Sync;
    /// Cutting off what a failed append of marks may have left.
    MarksCut, "marks-cut", Space;
    /// Sync of an image's directory.
    ImageDirSync, "image-dir-sync", Sync;
    /// Sync of the directory of images.
    ImagesDirSync, "images-dir-sync", Sync;
    /// Removing an image's directory.
    ImageDirRemove, "image-dir-remove", Name;
    /// Removing a layer's directory.
    LayerDirRemove, "layer-dir-remove", Name;
    /// Creation of one of the daemon's own small files under its temporary name.
    NoteCreate, "note-create", Name;
    /// Writing one of the daemon's own small files.
    NoteWrite, "note-write", Write;
    /// Sync of one of the daemon's own small files.
    NoteSync, "note-sync", Sync;
    /// Giving one of the daemon's own small files its final name.
    NoteRename, "note-rename", Name;
    /// Sync of the directory of the daemon's own small files.
    NoteDirSync, "note-dir-sync", Sync;
    /// Removing what nobody needs any more; whether it works changes nothing.
    Discard, "discard", Name;
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Site {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().copied().find(|site| site.name() == name);
        found.ok_or_else(|| format!("there is no fault site {name:?}"))
    }
}

/// What is about to be done at a site.
#[derive(Debug, Clone, Copy)]
pub enum Action<'a> {
    /// A read.
    Read,
    /// `bytes` at `offset`; `durable` before the call returns.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: &'a [u8],
        /// On stable storage when it returns.
        durable: bool,
    },
    /// The range reads as zero afterwards.
    Zero {
        /// Where.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range gets space; its content stays.
    Reserve,
    /// The file gets this length.
    SetLen(u64),
    /// The file or directory survives a power loss.
    Sync,
    /// An empty file is there afterwards.
    Create,
    /// A directory is there afterwards.
    CreateDir,
    /// The file has this name afterwards.
    Rename {
        /// The final name.
        to: &'a Path,
    },
    /// The file, or the directory with all in it, is gone afterwards.
    Remove,
    /// Nothing.
    Moment,
}

/// A call that is about to be made.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Where in the store.
    pub site: Site,
    /// On which file or directory.
    pub path: &'a Path,
    /// What.
    pub action: Action<'a>,
}

/// What a hook lets happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The call.
    Go,
    /// A write of this many bytes at most, as the operating system may do. Anything else goes on whole.
    Short(usize),
}

type Hook = dyn Fn(&Call<'_>) -> io::Result<Verdict> + Send + Sync;

/// What happens at each [`Site`]. The default does nothing.
#[derive(Clone, Default)]
pub struct Faults(Option<Arc<Hook>>);

impl Faults {
    /// Calls `hook` at every site; an error it returns is reported as the operating system's.
    pub fn hook(hook: impl Fn(&Call<'_>) -> io::Result<Verdict> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    /// Whether there is a hook.
    pub fn is_armed(&self) -> bool {
        self.0.is_some()
    }

    /// Asks the hook, if there is one.
    ///
    /// # Errors
    /// What the hook returns.
    #[inline]
    pub fn at(&self, site: Site, path: &Path, action: Action<'_>) -> io::Result<Verdict> {
        match &self.0 {
            None => Ok(Verdict::Go),
            Some(hook) => hook(&Call { site, path, action }),
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

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// `EIO`, nothing done.
    Eio,
    /// `ENOSPC`, nothing done.
    Enospc,
    /// A write of the first half, then `EIO`.
    ShortEio,
    /// A write of the first half, then `ENOSPC`.
    ShortEnospc,
    /// A write of the first half, and the rest if it is asked for.
    Short,
}

impl Failure {
    /// Every way.
    pub const ALL: &[Failure] = &[
        Failure::Eio,
        Failure::Enospc,
        Failure::ShortEio,
        Failure::ShortEnospc,
        Failure::Short,
    ];

    /// Whether it makes sense at a site of that kind.
    pub fn fits(self, verb: Verb) -> bool {
        match verb {
            Verb::Moment => false,
            Verb::Write => true,
            Verb::Read => self == Failure::Eio,
            Verb::Sync | Verb::Space | Verb::Name => matches!(self, Failure::Eio | Failure::Enospc),
        }
    }

    fn error(self) -> io::Error {
        io::Error::from_raw_os_error(match self {
            Failure::Enospc | Failure::ShortEnospc => libc::ENOSPC,
            _ => libc::EIO,
        })
    }
}

/// A fault at one site: lets `skip` calls pass, then fails one, or all from there on.
#[derive(Debug)]
pub struct Arm {
    site: Site,
    failure: Failure,
    skip: u64,
    for_good: bool,
    seen: AtomicU64,
    fired: AtomicU64,
    halves: AtomicU64,
}

impl Arm {
    /// Waits for the call after `skip` others.
    pub fn new(site: Site, failure: Failure, skip: u64, for_good: bool) -> Self {
        Self {
            site,
            failure,
            skip,
            for_good,
            seen: AtomicU64::new(0),
            fired: AtomicU64::new(0),
            halves: AtomicU64::new(0),
        }
    }

    /// How often it failed a call.
    pub fn fired(&self) -> u64 {
        self.fired.load(Ordering::SeqCst)
    }

    /// What becomes of a call.
    ///
    /// # Errors
    /// The fault.
    pub fn answer(&self, call: &Call<'_>) -> io::Result<Verdict> {
        if call.site != self.site {
            return Ok(Verdict::Go);
        }
        if self.halves.swap(0, Ordering::SeqCst) == 1 {
            // The rest of a write whose first half was let through.
            return match self.failure {
                Failure::Short => Ok(Verdict::Go),
                failure => Err(failure.error()),
            };
        }
        let n = self.seen.fetch_add(1, Ordering::SeqCst);
        if n < self.skip || (n > self.skip && !self.for_good) {
            return Ok(Verdict::Go);
        }
        self.fired.fetch_add(1, Ordering::SeqCst);
        match (self.failure, call.action) {
            (Failure::ShortEio | Failure::ShortEnospc | Failure::Short, Action::Write { bytes, .. }) => {
                self.halves.store(1, Ordering::SeqCst);
                // Whole sectors where there are any, as direct I/O counts them.
                let half = bytes.len() / 2;
                Ok(Verdict::Short(if half > 512 { half / 512 * 512 } else { half.max(1) }))
            }
            (failure, _) => Err(failure.error()),
        }
    }
}

impl FromStr for Arm {
    type Err = String;

    /// Reads `SITE FAILURE SKIP [for-good]`, such as `data-sync eio 2`.
    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || format!("{text:?} is not `SITE eio|enospc|short-eio|short-enospc|short SKIP [for-good]`");
        let words: Vec<_> = text.split_whitespace().collect();
        let (site, failure, skip, for_good) = match words.as_slice() {
            [site, failure, skip] => (site, failure, skip, false),
            [site, failure, skip, "for-good"] => (site, failure, skip, true),
            _ => return Err(usage()),
        };
        let failure = match *failure {
            "eio" => Failure::Eio,
            "enospc" => Failure::Enospc,
            "short-eio" => Failure::ShortEio,
            "short-enospc" => Failure::ShortEnospc,
            "short" => Failure::Short,
            _ => return Err(usage()),
        };
        let skip = skip.parse().map_err(|_| usage())?;
        Ok(Self::new(site.parse()?, failure, skip, for_good))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        for site in Site::ALL {
            assert_eq!(site.name().parse::<Site>().as_ref(), Ok(site));
        }
        assert!("data".parse::<Site>().is_err());
        assert!("data-sync eio".parse::<Arm>().is_err() && "data-sync eoi 1".parse::<Arm>().is_err());
    }

    #[test]
    fn an_arm_fails_the_call_it_was_told_to() {
        let call = |site| Call {
            site,
            path: Path::new("x"),
            action: Action::Write {
                offset: 0,
                bytes: &[0; 4096],
                durable: false,
            },
        };
        let arm: Arm = "data-write short-eio 1".parse().unwrap();
        let answers: Vec<_> = (0..4).map(|_| arm.answer(&call(Site::DataWrite)).ok()).collect();
        let go = Some(Verdict::Go);
        assert_eq!(answers, [go, Some(Verdict::Short(2048)), None, go]);
        assert_eq!(arm.answer(&call(Site::JournalAppend)).unwrap(), Verdict::Go);
        let arm: Arm = "data-write enospc 0 for-good".parse().unwrap();
        assert!((0..3).all(|_| arm.answer(&call(Site::DataWrite)).unwrap_err().raw_os_error() == Some(libc::ENOSPC)));
        assert_eq!(arm.fired(), 3);
    }
}
