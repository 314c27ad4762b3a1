//! Import of a raw disk image file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use hearth_protocol::ImageName;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};

use super::Store;
use super::blockmap::BlockState;
use super::direct::AlignedBuf;
use super::error::StoreError;
use super::image::{ImageMeta, check_shape};
use super::layer::Layer;
use crate::disk::DiskError;

/// Bytes read at once, at least one block.
const CHUNK: u64 = 1 << 20;

/// Starts of files that people mistake for raw disks, and what to do with them.
const FOREIGN: [(&[u8], &str); 12] = [
    (
        b"QFI\xfb",
        "it is a qcow2 image: convert it with `qemu-img convert -O raw`",
    ),
    (b"QED\0", "it is a QED image: convert it with `qemu-img convert -O raw`"),
    (b"KDMV", "it is a VMDK image: convert it with `qemu-img convert -O raw`"),
    (
        b"# Disk Descripto",
        "it is a VMDK descriptor: convert it with `qemu-img convert -O raw`",
    ),
    (
        b"vhdxfile",
        "it is a VHDX image: convert it with `qemu-img convert -O raw`",
    ),
    (
        b"conectix",
        "it is a VHD image: convert it with `qemu-img convert -O raw`",
    ),
    (b"<<< ", "it is a VDI image: convert it with `qemu-img convert -O raw`"),
    (b"\x1f\x8b", "it is gzip-compressed: unpack it first"),
    (b"\xfd7zXZ\0", "it is xz-compressed: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "it is zstd-compressed: unpack it first"),
    (b"BZh", "it is bzip2-compressed: unpack it first"),
    (b"PK\x03\x04", "it is a zip archive: unpack it first"),
];

impl Store {
    /// Creates an image from a raw file or block device; holes and blocks of zeros take no space. `progress` hears
    /// bytes done and bytes in all, and stops the import by returning `false`.
    ///
    /// # Errors
    /// [`StoreError::NotRaw`] for what is not a raw disk image, also when it changes size meanwhile;
    /// [`StoreError::Exists`]; [`StoreError`]. Nothing stays behind.
    pub fn import(
        &self,
        name: &ImageName,
        path: &Path,
        block_size: u64,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<ImageMeta, StoreError> {
        let (file, length) = open_raw(path)?;
        let size = length.next_multiple_of(4096);
        check_shape(size, block_size)?;
        self.with_name(name, || {
            let layer = self.create_layer(size, block_size)?;
            let filled = fill(&layer, &file, path, length, progress)
                .and_then(|()| layer.seal().map_err(|err| from_disk(path, err)));
            let committed = filled.and_then(|()| self.commit_image(name, size, block_size, vec![layer.id()], None));
            committed.inspect_err(|_| {
                let _ = self.remove_layer(layer.id());
            })
        })
    }
}

fn not_raw(path: &Path, why: impl Into<String>) -> StoreError {
    StoreError::NotRaw {
        path: path.to_owned(),
        why: why.into(),
    }
}

fn open_raw(path: &Path) -> Result<(File, u64), StoreError> {
    let file = File::open(path).map_err(StoreError::at("open", path))?;
    let kind = file.metadata().map_err(StoreError::at("look at", path))?;
    let length = if kind.file_type().is_block_device() {
        lseek(&file, 0, Whence::SeekEnd).map_err(|err| StoreError::at("measure", path)(err.into()))? as u64
    } else if kind.is_file() {
        kind.len()
    } else {
        return Err(not_raw(path, "it is neither a file nor a block device"));
    };
    if length == 0 {
        return Err(not_raw(path, "it is empty"));
    }
    let mut head = vec![0; length.min(512) as usize];
    file.read_exact_at(&mut head, 0).map_err(StoreError::at("read", path))?;
    if let Some((_, why)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(not_raw(path, *why));
    }
    if !length.is_multiple_of(512) {
        return Err(not_raw(
            path,
            format!(
                "it has {length} bytes, which is no whole number of 512-byte sectors: it is truncated or no disk image"
            ),
        ));
    }
    Ok((file, length))
}

fn from_disk(path: &Path, err: DiskError) -> StoreError {
    match err {
        DiskError::NoSpace(what) => StoreError::NoSpace(format!("importing {}: {what}", path.display())),
        DiskError::Io { what, source } => StoreError::Io { what, source },
        other => StoreError::Io {
            what: format!("cannot import {}", path.display()),
            source: io::Error::other(other.to_string()),
        },
    }
}

fn fill(
    layer: &Layer,
    file: &File,
    path: &Path,
    length: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), StoreError> {
    let block_size = layer.block_size();
    let chunk = CHUNK.max(block_size);
    let mut buf = AlignedBuf::default();
    let mut at = 0;
    while at < length {
        if !progress(at, length) {
            return Err(StoreError::Io {
                what: format!("import of {}", path.display()),
                source: io::Error::new(io::ErrorKind::Interrupted, "stopped on request"),
            });
        }
        // Where the file has a hole, go on at the block in which its next data begins.
        match lseek(file.as_fd(), at as i64, Whence::SeekData) {
            Ok(data) => at = at.max(data as u64 / block_size * block_size),
            Err(nix::errno::Errno::ENXIO) => break,
            // Block devices and some file systems know no holes.
            Err(_) => {}
        }
        let take = chunk.min(length - at);
        let bytes = buf.get(take.next_multiple_of(4096) as usize);
        let (read, pad) = bytes.split_at_mut(take as usize);
        file.read_exact_at(read, at).map_err(|err| match err.kind() {
            io::ErrorKind::UnexpectedEof => not_raw(path, format!("it became shorter than {length} bytes meanwhile")),
            _ => StoreError::at("read", path)(err),
        })?;
        pad.fill(0);
        write_blocks(layer, at, bytes).map_err(|err| from_disk(path, err))?;
        at += take;
    }
    let now = file.metadata().map_err(StoreError::at("look at", path))?;
    if now.is_file() && now.len() != length {
        return Err(not_raw(
            path,
            format!("its size changed from {length} to {} bytes meanwhile", now.len()),
        ));
    }
    // What was read will not be read again: leave the page cache to others.
    let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    progress(length, length);
    Ok(())
}

/// Writes the blocks of a chunk that are not all zeros, runs of them at once.
fn write_blocks(layer: &Layer, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
    let block_size = layer.block_size() as usize;
    let first = offset / layer.block_size();
    let mut run: Option<usize> = None;
    let count = bytes.len().div_ceil(block_size);
    for i in 0..=count {
        let has_data = i < count
            && bytes[i * block_size..bytes.len().min((i + 1) * block_size)]
                .iter()
                .any(|b| *b != 0);
        match (run, has_data) {
            (None, true) => run = Some(i),
            (Some(start), false) => {
                let part = &bytes[start * block_size..bytes.len().min(i * block_size)];
                layer.write(offset + (start * block_size) as u64, part, false)?;
                layer.mark(first + start as u64, (i - start) as u64, BlockState::Data)?;
                run = None;
            }
            _ => {}
        }
    }
    Ok(())
}
