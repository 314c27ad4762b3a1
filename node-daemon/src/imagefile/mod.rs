//! Disk image files that an image is exported into: written under a temporary name beside the file, so that the file
//! itself is there only when it is complete; sparse where the disk has zeros.

mod qcow2;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hearth_protocol::rpc::ImageFormat;

use qcow2::Qcow2;

/// What is written at a time: a cluster of qcow2, and the smallest hole of a raw file.
pub const CLUSTER: usize = 64 << 10;

/// A file that is being written, from the disk's start to its end; removed when dropped unfinished.
#[derive(Debug)]
pub struct ImageFile {
    target: PathBuf,
    partial: PathBuf,
    content: Content,
    finished: bool,
}

#[derive(Debug)]
enum Content {
    Raw(File),
    Qcow2(Qcow2),
}

impl ImageFile {
    /// Begins the file for a disk of `size` bytes. What an export that was cut off left under the temporary name is
    /// replaced.
    ///
    /// # Errors
    /// The file system's.
    pub fn create(target: &Path, format: ImageFormat, size: u64) -> io::Result<Self> {
        let name = target
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it names no file"))?;
        let mut partial = name.to_owned();
        partial.push(".hearth-partial");
        let partial = target.with_file_name(partial);
        match fs::remove_file(&partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        // A guest's disk is nobody else's business.
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&partial)?;
        let content = match format {
            ImageFormat::Raw => Content::Raw(file),
            ImageFormat::Qcow2 => Content::Qcow2(Qcow2::new(file, size)),
        };
        let made = Self {
            target: target.to_owned(),
            partial,
            content,
            finished: false,
        };
        if let Content::Raw(file) = &made.content {
            file.set_len(size)?;
        }
        Ok(made)
    }

    /// Writes one cluster; `offset` is a multiple of [`CLUSTER`] above every offset before it, and only the disk's
    /// last cluster may be shorter. Clusters that are left out are zeros.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&mut self, offset: u64, cluster: &[u8]) -> io::Result<()> {
        match &mut self.content {
            Content::Raw(file) => file.write_all_at(cluster, offset),
            Content::Qcow2(qcow2) => qcow2.write(offset, cluster),
        }
    }

    /// Makes everything durable and gives the file its name. Returns the bytes that it takes up.
    ///
    /// # Errors
    /// The file system's; with [`io::ErrorKind::AlreadyExists`] when `replace` is false and the name is taken.
    pub fn finish(mut self, replace: bool) -> io::Result<u64> {
        let file = match &mut self.content {
            Content::Raw(file) => file,
            Content::Qcow2(qcow2) => qcow2.finish()?,
        };
        file.sync_all()?;
        let allocated = std::os::unix::fs::MetadataExt::blocks(&file.metadata()?) * 512;
        if replace {
            fs::rename(&self.partial, &self.target)?;
        } else {
            // A hard link fails where a rename would replace.
            fs::hard_link(&self.partial, &self.target)?;
            fs::remove_file(&self.partial)?;
        }
        self.finished = true;
        let dir = match self.target.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        File::open(dir)?.sync_all()?;
        Ok(allocated)
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if !self.finished {
            // What cannot be removed is replaced by the next export to the same file.
            let _ = fs::remove_file(&self.partial);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const SIZE: u64 = (600 << 20) + 4096;

    /// Clusters with data: at the start, on both sides of the first 512 MiB, and the short one at the end.
    fn clusters() -> Vec<(u64, Vec<u8>)> {
        let data = |offset: u64, len: usize| {
            let word = (offset / CLUSTER as u64 + 1) as u8;
            (offset, vec![word; len])
        };
        vec![
            data(0, CLUSTER),
            data(3 * CLUSTER as u64, CLUSTER),
            data((512 << 20) - CLUSTER as u64, CLUSTER),
            data(512 << 20, CLUSTER),
            data(600 << 20, 4096),
        ]
    }

    fn write(target: &Path, format: ImageFormat) -> u64 {
        let mut file = ImageFile::create(target, format, SIZE).unwrap();
        for (offset, bytes) in clusters() {
            file.write(offset, &bytes).unwrap();
        }
        file.finish(false).unwrap()
    }

    #[test]
    fn a_raw_file_is_sparse_and_has_the_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let allocated = write(&path, ImageFormat::Raw);
        assert!(allocated < 2 << 20, "{allocated}");
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), SIZE);
        for (offset, bytes) in clusters() {
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, offset).unwrap();
            assert_eq!(found, bytes, "{offset}");
        }
        let mut hole = [1; 16];
        file.read_exact_at(&mut hole, 5 * CLUSTER as u64).unwrap();
        assert_eq!(hole, [0; 16]);
    }

    #[test]
    fn qemu_finds_the_same_disk_in_a_qcow2_file_and_nothing_wrong_with_it() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIP: qemu-img is missing: apt-get install qemu-utils");
            assert!(std::env::var_os("REQUIRE_E2E").is_none(), "REQUIRE_E2E=1");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (raw, qcow2) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
        write(&raw, ImageFormat::Raw);
        write(&qcow2, ImageFormat::Qcow2);
        let qemu_img = |words: &[&str]| {
            let out = Command::new("qemu-img")
                .args(words)
                .arg(&qcow2)
                .args(words.first().filter(|w| **w == "compare").map(|_| &raw))
                .output()
                .unwrap();
            assert!(
                out.status.success(),
                "{words:?}: {}{}",
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
        };
        qemu_img(&["check", "-f", "qcow2"]);
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw"]);
    }

    #[test]
    fn a_file_that_is_there_stays_and_an_unfinished_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        fs::write(&path, "precious").unwrap();
        let file = ImageFile::create(&path, ImageFormat::Raw, 4096).unwrap();
        let error = file.finish(false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        drop(ImageFile::create(&path, ImageFormat::Raw, 4096).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a partial file was left");
        let file = ImageFile::create(&path, ImageFormat::Raw, 4096).unwrap();
        file.finish(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 4096]);
    }
}
