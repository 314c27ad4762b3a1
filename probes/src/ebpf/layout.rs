//! The fields that the programs read, found in the running kernel's type data.

use crate::ebpf::btf::{Btf, BtfError};

/// Where the kernel keeps its own type data.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Offsets of the fields the programs read, by the name of the program's global that takes each.
pub type Offsets = Vec<(&'static str, u32)>;

/// Finds every offset, and checks that the tracepoints pass what the programs expect.
///
/// # Errors
/// [`BtfError`] naming what this kernel does not have.
pub fn offsets(btf: &Btf) -> Result<Offsets, BtfError> {
    let bio = btf.tracepoint_struct("block_bio_queue", 0, "bio")?;
    btf.tracepoint_struct("block_bio_complete", 1, "bio")?;
    let request = btf.tracepoint_struct("block_rq_issue", 0, "request")?;
    btf.tracepoint_struct("block_rq_complete", 0, "request")?;
    let (bdev_offset, bdev) = btf.pointer(bio, "bi_bdev")?;
    let (disk_offset, disk) = btf.pointer(bdev, "bd_disk")?;
    let (queue_offset, queue) = btf.pointer(request, "q")?;
    Ok(vec![
        ("BIO_SECTOR", btf.field(bio, "bi_iter.bi_sector", 8)?.0),
        ("BIO_SIZE", btf.field(bio, "bi_iter.bi_size", 4)?.0),
        ("BIO_OPF", btf.field(bio, "bi_opf", 4)?.0),
        ("BIO_BDEV", bdev_offset),
        ("BIO_NEXT", btf.pointer(bio, "bi_next")?.0),
        ("BIO_PRIVATE", btf.pointer(bio, "bi_private")?.0),
        ("BDEV_DISK", disk_offset),
        ("DISK_MAJOR", btf.field(disk, "major", 4)?.0),
        ("DISK_FIRST_MINOR", btf.field(disk, "first_minor", 4)?.0),
        ("REQUEST_QUEUE", queue_offset),
        ("QUEUE_DISK", btf.pointer(queue, "disk")?.0),
        ("REQUEST_BIO", btf.pointer(request, "bio")?.0),
        ("REQUEST_OPF", btf.field(request, "cmd_flags", 4)?.0),
        ("REQUEST_LENGTH", btf.field(request, "__data_len", 4)?.0),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_has_every_field() {
        let bytes = match std::fs::read(KERNEL_BTF) {
            Ok(bytes) => bytes,
            Err(error) => {
                assert!(
                    !std::env::var("REQUIRE_E2E").is_ok_and(|value| value == "1"),
                    "{KERNEL_BTF}: {error}"
                );
                println!("SKIP: {KERNEL_BTF}: {error}");
                return;
            }
        };
        let offsets = offsets(&Btf::parse(bytes).unwrap()).unwrap();
        let mut bio: Vec<_> = offsets
            .iter()
            .filter(|(name, _)| name.starts_with("BIO_"))
            .map(|(_, at)| at)
            .collect();
        bio.sort();
        bio.dedup();
        assert_eq!(bio.len(), 6, "six different fields: {offsets:?}");
    }
}
