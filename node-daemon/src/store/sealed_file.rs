//! Small files that are replaced whole: a header line with kind, version and checksum, then the body.
//!
//! Replacement is atomic: temporary name, sync, rename, sync of the directory. A reader sees the old or the new file,
//! and knows a damaged one.

use std::fs;
use std::path::Path;

use hearth_protocol::chain;

use super::error::StoreError;
use super::fault::{Faults, Site};
use super::os::{self, FileSites};

/// What kind of file, and the format version that this build writes.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// One word.
    pub name: &'static str,
    /// Highest version known.
    pub version: u32,
    /// Where its replacement can fail.
    pub sites: FileSites,
}

/// Replaces the file's content; the new name is durable after [`sync_dir`].
///
/// # Errors
/// [`StoreError`]; the old content is then still there.
pub fn put(path: &Path, kind: Kind, body: &[u8], faults: &Faults) -> Result<(), StoreError> {
    let header = header(kind, body);
    os::replace(kind.sites, path, &[header.as_bytes(), body], faults)
        .map(drop)
        .map_err(StoreError::at("replace", path))
}

/// Reads the file and checks it.
///
/// # Errors
/// [`StoreError::Damaged`], [`StoreError::Newer`], or the operating system's error.
pub fn read(path: &Path, kind: Kind) -> Result<Vec<u8>, StoreError> {
    decode(path, kind, fs::read(path).map_err(StoreError::at("read", path))?)
}

/// Checks a file's content and returns its body. `path` only names it in errors.
///
/// # Errors
/// [`StoreError::Damaged`], [`StoreError::Newer`].
pub fn decode(path: &Path, kind: Kind, mut bytes: Vec<u8>) -> Result<Vec<u8>, StoreError> {
    let damaged = |why: &str| StoreError::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    let end = bytes
        .iter()
        .take(200)
        .position(|b| *b == b'\n')
        .ok_or_else(|| damaged("it has no header"))?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| damaged("its header is no text"))?;
    let mut words = header.split(' ');
    if words.next() != Some("hearth") || words.next() != Some(kind.name) {
        return Err(damaged(&format!("it is no hearth {} file", kind.name)));
    }
    let version: u32 = words
        .next()
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| damaged("its header has no version"))?;
    if version > kind.version {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found: version,
            known: kind.version,
        });
    }
    let sum = words.next().unwrap_or_default().to_owned();
    bytes.drain(..=end);
    if sum != checksum(Kind { version, ..kind }, &bytes) {
        return Err(damaged("its checksum does not fit"));
    }
    Ok(bytes)
}

/// The header line of a file with that body.
pub fn header(kind: Kind, body: &[u8]) -> String {
    format!("hearth {} {} {}\n", kind.name, kind.version, checksum(kind, body))
}

/// Covers the header's words too.
fn checksum(kind: Kind, body: &[u8]) -> String {
    let mut bytes = format!("{} {} ", kind.name, kind.version).into_bytes();
    bytes.extend_from_slice(body);
    chain::hex(&chain::part(&bytes))
}

/// Makes names created, renamed or removed in the directory survive a power loss.
///
/// # Errors
/// The operating system's.
pub fn sync_dir(site: Site, dir: &Path, faults: &Faults) -> Result<(), StoreError> {
    os::sync_dir(site, dir, faults).map_err(StoreError::at("sync directory", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fault::{Arm, Failure};

    const KIND: Kind = Kind {
        name: "test",
        version: 3,
        sites: FileSites {
            create: Site::BitmapCreate,
            write: Site::BitmapWrite,
            sync: Site::BitmapSync,
            rename: Site::BitmapRename,
        },
    };

    #[test]
    fn damage_is_seen_and_newer_versions_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let none = Faults::default();
        put(&path, KIND, b"{}", &none).unwrap();
        assert_eq!(read(&path, KIND).unwrap(), b"{}");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(read(&path, KIND).is_err(), "flipping bit 0 of byte {at} went unseen");
        }
        for len in 0..good.len() {
            fs::write(&path, &good[..len]).unwrap();
            assert!(read(&path, KIND).is_err(), "cutting to {len} bytes went unseen");
        }
        put(&path, Kind { version: 4, ..KIND }, b"{}", &none).unwrap();
        assert!(matches!(read(&path, KIND), Err(StoreError::Newer { found: 4, .. })));
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        put(&path, KIND, b"old", &Faults::default()).unwrap();
        let sites = KIND.sites;
        for site in [sites.create, sites.write, sites.sync, sites.rename] {
            for skip in 0..2 {
                let arm = Arm::new(site, Failure::Enospc, skip, false);
                let faults = Faults::hook(move |call| arm.answer(call));
                match put(&path, KIND, b"new", &faults) {
                    // Only the body's write is a second call.
                    Ok(()) => assert!(skip == 1 && site != sites.write),
                    Err(err) => {
                        assert!(matches!(err, StoreError::NoSpace(_)), "{err}");
                        assert_eq!(read(&path, KIND).unwrap(), b"old");
                        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
                    }
                }
                put(&path, KIND, b"old", &Faults::default()).unwrap();
            }
        }
    }
}
