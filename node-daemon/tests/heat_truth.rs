//! Heat is true on Hearth's own kernel device: what the eBPF probes count per block at a FUSE file under a loop device
//! equals a log of what was submitted. Needs root; says SKIP without.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::export::device::{DeviceExports, DeviceInfo, DeviceOptions};
use hearth_node::export::nbd::memory::MemoryDisk;
use hearth_probes::testing::{KIB, Load, MIB, NamedLoads, Order, Target, check, loads};
use hearth_probes::{EbpfOptions, EbpfSource, HeatError};
use hearth_protocol::ImageName;
use tempfile::TempDir;

const SIZE_BYTES: u64 = 256 * MIB;

/// Of Hearth's images, and of the disk under the device.
const BLOCK_BYTES: u64 = 64 * KIB;

/// The probes, or why they cannot run here.
fn probes() -> Result<EbpfSource, String> {
    DeviceExports::available()?;
    EbpfSource::load(EbpfOptions::default()).map_err(|error| match error {
        HeatError::Unavailable { .. } => error.to_string(),
        _ => panic!("{error}"),
    })
}

/// One kernel device, open, and gone when the test ends, however it ends.
struct Device {
    exports: DeviceExports,
    name: ImageName,
    info: DeviceInfo,
    /// `None` only while the device is being removed.
    file: Option<File>,
    _folder: TempDir,
}

impl Device {
    fn over(disk: Arc<dyn Disk>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = DeviceOptions::new(folder.path().join("dev"), folder.path().join("mnt"));
        let exports = DeviceExports::new(options).unwrap();
        let name: ImageName = "appl/heat-truth".parse().unwrap();
        let info = exports.attach(&name, disk).unwrap();
        // From here on a failure removes the device.
        let mut device = Self {
            exports,
            name,
            info,
            file: None,
            _folder: folder,
        };
        let opened = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT)
            .open(&device.info.path);
        device.file = Some(opened.unwrap());
        device
    }

    fn target(&self) -> Target<'_> {
        Target {
            file: self.file.as_ref().expect("the device is in use"),
            size_bytes: SIZE_BYTES,
            major: self.info.major,
            minor: self.info.minor,
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device that is open cannot be removed.
        self.file = None;
        if let Err(error) = self.exports.detach(&self.name) {
            println!("at the end: {error}");
        }
    }
}

/// Six threads at once, each with another kind of request.
fn everything_at_once(count: u64) -> NamedLoads {
    let load = |length, align, shift, order, write_percent, count| Load {
        length,
        shift,
        align,
        order,
        write_percent,
        count,
    };
    let long = count / 20;
    (
        "six threads: 4 and 256 KiB, reads and writes, from the start of blocks and from within",
        vec![
            load(4 * KIB, BLOCK_BYTES, 0, Order::Random, 0, count),
            load(4 * KIB, BLOCK_BYTES, BLOCK_BYTES - 4 * KIB, Order::Random, 100, count),
            load(4 * KIB, 4 * KIB, 0, Order::Sequential, 100, count),
            load(256 * KIB, BLOCK_BYTES, 0, Order::Sequential, 50, long),
            load(256 * KIB, BLOCK_BYTES, 60 * KIB, Order::Sequential, 0, long),
            load(256 * KIB, 4 * KIB, 4 * KIB, Order::Random, 100, long),
        ],
    )
}

#[test]
fn kernel_device_counts_are_exact() {
    let source = match probes() {
        Ok(source) => source,
        Err(reason) => {
            assert!(
                !std::env::var("REQUIRE_E2E").is_ok_and(|value| value == "1"),
                "REQUIRE_E2E=1, but: {reason}"
            );
            return println!("SKIP: {reason}");
        }
    };
    let disk = MemoryDisk::with_blocks(SIZE_BYTES, BLOCK_BYTES);
    // Both ways through the export: answered in line from RAM, and by a thread that waits for the disk.
    for block in (1..disk.blocks()).step_by(2) {
        disk.set_in_ram(block, false);
    }
    let device = Device::over(Arc::new(disk));
    let mut every = loads(0, 15_000);
    every.push(everything_at_once(10_000));
    check(&source, &device.target(), BLOCK_BYTES, &every);
    // Every sector of the device a block of its own: 65,536 of them, so long requests touch many.
    check(&source, &device.target(), 4 * KIB, &every);
}
