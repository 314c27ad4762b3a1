//! Small files that are replaced whole: a header line with kind, version and checksum, then the body.
//!
//! Replacement is atomic: temporary name, sync, rename, sync of the directory. A reader sees the old or the new file,
//! and knows a damaged one.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use hearth_protocol::chain;

use super::error::StoreError;
use super::fault::{Faults, Site};

/// What kind of file, and the format version that this build writes.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// One word.
    pub name: &'static str,
    /// Highest version known.
    pub version: u32,
}

/// Replaces the file's content and makes it survive a power loss.
///
/// # Errors
/// [`StoreError`]; the old content is then still there, or the new one is but may not survive a power loss.
pub fn replace(path: &Path, kind: Kind, body: &[u8], faults: &Faults) -> Result<(), StoreError> {
    put(path, kind, body, faults)?;
    sync_dir(path.parent().expect("a file in the store has a directory"), faults)
}

/// Replaces the file's content; the new name is durable after [`sync_dir`].
///
/// # Errors
/// [`StoreError`]; the old content is then still there.
pub fn put(path: &Path, kind: Kind, body: &[u8], faults: &Faults) -> Result<(), StoreError> {
    let temporary = path.with_extension("new");
    let header = format!("hearth {} {} {}\n", kind.name, kind.version, checksum(kind, body));
    let write = || {
        faults.at(Site::MetaWrite)?;
        let mut file = File::create(&temporary)?;
        file.write_all(header.as_bytes())?;
        file.write_all(body)?;
        file.sync_all()?;
        faults.at(Site::MetaRename)?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        // The old file is still in place; a temporary one left over is overwritten next time.
        let _ = fs::remove_file(&temporary);
        StoreError::io(format!("cannot replace {}", path.display()), source)
    })
}

/// Reads the file and checks it.
///
/// # Errors
/// [`StoreError::Damaged`], [`StoreError::Newer`], or the operating system's error.
pub fn read(path: &Path, kind: Kind) -> Result<Vec<u8>, StoreError> {
    let mut bytes = fs::read(path).map_err(StoreError::at("read", path))?;
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
pub fn sync_dir(dir: &Path, faults: &Faults) -> Result<(), StoreError> {
    faults
        .at(Site::DirSync)
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(StoreError::at("sync directory", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        name: "test",
        version: 3,
    };

    #[test]
    fn damage_is_seen_and_newer_versions_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        let none = Faults::default();
        replace(&path, KIND, b"{}", &none).unwrap();
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
        replace(&path, Kind { version: 4, ..KIND }, b"{}", &none).unwrap();
        assert!(matches!(read(&path, KIND), Err(StoreError::Newer { found: 4, .. })));
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        replace(&path, KIND, b"old", &Faults::default()).unwrap();
        for site in [Site::MetaWrite, Site::MetaRename] {
            let faults = Faults::hook(move |at| {
                if at == site {
                    Err(std::io::ErrorKind::StorageFull.into())
                } else {
                    Ok(())
                }
            });
            let err = replace(&path, KIND, b"new", &faults).unwrap_err();
            assert!(matches!(err, StoreError::NoSpace(_)), "{err}");
            assert_eq!(read(&path, KIND).unwrap(), b"old");
        }
    }
}
