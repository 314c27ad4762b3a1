//! A disk slowed down for some processes by the kernel's blkio controller, so that a fast development disk behaves
//! like a busy shared one. The kernel also counts there what really reached the device.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cgroup::ControlGroup;

/// A control group whose processes read a device at a limited rate; removed when dropped.
#[derive(Debug)]
pub struct Throttle {
    group: ControlGroup,
    /// Whole disk under the store, `major:minor`.
    device: String,
    /// Reads per second allowed.
    pub read_iops_max: u64,
}

impl Throttle {
    /// Limits reads of the disk under `path`.
    ///
    /// # Errors
    /// There is no blkio controller that we may use, or no disk under `path`; the text says which.
    pub fn new(path: &Path, read_iops_max: u64) -> Result<Self> {
        let device = disk_under(path)?;
        let group = ControlGroup::new("blkio", "io")?;
        if group.is_unified() {
            group.write("io.max", &format!("{device} riops={read_iops_max}"))?;
        } else {
            let value = format!("{device} {read_iops_max}");
            group.write("blkio.throttle.read_iops_device", &value)?;
        }
        Ok(Self {
            group,
            device,
            read_iops_max,
        })
    }

    /// Puts a process with all its threads under the limit.
    ///
    /// # Errors
    /// It has ended.
    pub fn add(&self, pid: u32) -> Result<()> {
        self.group.add(pid)
    }

    /// Reads that reached the device from the processes under the limit, counted by the kernel.
    ///
    /// # Errors
    /// The control group is gone.
    pub fn device_reads(&self) -> Result<u64> {
        self.counted("blkio.throttle.io_serviced", "rios=")
    }

    /// Bytes of those reads.
    ///
    /// # Errors
    /// The control group is gone.
    pub fn device_read_bytes(&self) -> Result<u64> {
        self.counted("blkio.throttle.io_service_bytes", "rbytes=")
    }

    fn counted(&self, own_file: &str, unified_key: &str) -> Result<u64> {
        let file = if self.group.is_unified() { "io.stat" } else { own_file };
        Ok(reads_of(&self.group.read(file)?, &self.device, unified_key))
    }
}

/// The whole disk that the file system of `path` lies on, as `major:minor`; limits are set on disks only.
fn disk_under(path: &Path) -> Result<String> {
    let dev = fs::metadata(path)
        .with_context(|| format!("cannot look at {}", path.display()))?
        .st_dev();
    let id = format!("{}:{}", libc::major(dev), libc::minor(dev));
    let block = fs::canonicalize(format!("/sys/dev/block/{id}"))
        .with_context(|| format!("{} lies on no block device ({id})", path.display()))?;
    let disk = if block.join("partition").exists() {
        block.parent().unwrap_or(&block)
    } else {
        &block
    };
    let id = fs::read_to_string(disk.join("dev")).with_context(|| format!("{} has no number", disk.display()))?;
    Ok(id.trim().to_owned())
}

/// Reads of `device` in a file such as `blkio.throttle.io_serviced` (`254:0 Read 17`), or behind `key` in `io.stat`
/// (`254:0 rbytes=1 rios=17`).
fn reads_of(text: &str, device: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix(device)?.strip_prefix(' '))
        .find_map(|rest| match rest.strip_prefix("Read ") {
            Some(number) => number.trim().parse().ok(),
            None => rest.split(' ').find_map(|part| part.strip_prefix(key)?.parse().ok()),
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_found_in_both_hierarchies() {
        let old = "254:0 Read 1000\n254:0 Write 3\n254:0 Total 1003\nTotal 1003\n";
        assert_eq!(reads_of(old, "254:0", "rios="), 1000);
        assert_eq!(
            reads_of("8:0 rbytes=4096 wbytes=0 rios=17 wios=0\n", "8:0", "rios="),
            17
        );
        assert_eq!(
            reads_of("8:0 rbytes=4096 wbytes=0 rios=17 wios=0\n", "8:0", "rbytes="),
            4096
        );
        assert_eq!(reads_of("8:16 rbytes=4096 rios=17\n", "8:1", "rios="), 0);
    }

    #[test]
    fn a_throttled_process_reads_slowly_and_is_counted() -> Result<()> {
        use std::os::unix::process::CommandExt;
        use std::process::{Command, Stdio};
        use std::time::Instant;

        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), vec![1u8; 4 << 20])?;
        file.as_file().sync_all()?;
        let throttle = match Throttle::new(file.path(), 200) {
            Ok(throttle) => throttle,
            Err(error) => {
                eprintln!("SKIP: {error:#}");
                assert!(
                    !crate::setup::strict(),
                    "REQUIRE_E2E=1 and the disk cannot be throttled: {error:#}"
                );
                return Ok(());
            }
        };
        // The shell waits in its control group until it may go on; dd replaces it.
        let mut child = Command::new("sh")
            .args([
                "-c",
                "read go; exec dd iflag=direct bs=4096 count=300 of=/dev/null if=\"$1\"",
                "sh",
            ])
            .arg(file.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        throttle.add(child.id())?;
        let start = Instant::now();
        drop(child.stdin.take());
        assert!(child.wait()?.success());
        let took = start.elapsed().as_secs_f64();
        // A few more where dd itself had to be read from the disk.
        let reads = throttle.device_reads()?;
        assert!((300..400).contains(&reads), "{reads} reads counted");
        assert!(took >= 1.0, "300 reads at 200 a second took {took} s");
        Ok(())
    }
}
