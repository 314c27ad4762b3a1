//! The demo's guests: booted together, set to work together, measured together.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::figures::Latency;
use crate::guest::{Accel, Guest, GuestDisk, GuestOptions, Phase};
use crate::step::note;

/// Memory of each guest.
const MEMORY_MIB: u64 = 192;

/// Time in which a guest must have booted: software emulation on two busy cores takes minutes.
const BOOT_WITHIN: Duration = Duration::from_secs(420);

/// Time that a phase may take beyond its length, and an orderly stop in all.
const GRACE: Duration = Duration::from_secs(120);

/// Length of one round of work while promotions settle.
const ROUND: Duration = Duration::from_secs(5);

/// Part of the guest's data that it works on.
pub const SPAN_MIB: u64 = 96;

/// A disk for a guest.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image's name.
    pub name: String,
    /// Its id, as the log calls it.
    pub image_id: String,
    /// How the guest reaches it.
    pub path: GuestDisk,
}

/// Running guests.
pub struct Fleet {
    guests: Vec<Guest>,
}

impl Fleet {
    /// Boots a guest from each disk and waits until all are up.
    ///
    /// # Errors
    /// QEMU is missing, or a guest does not come up; the end of its console is in the text.
    pub fn boot(accelerator: Accel, consoles: &Path, disks: &[Disk]) -> Result<Self> {
        let mut guests = Vec::new();
        for disk in disks {
            let name = disk.name.replace('/', "-");
            guests.push(Guest::boot(&GuestOptions {
                disk: disk.path.clone(),
                accel: accelerator,
                memory_mib: MEMORY_MIB,
                console_log: consoles.join(format!("{name}.console")),
                qmp_sockets: Vec::new(),
                incoming: false,
                name,
            })?);
        }
        let start = Instant::now();
        for (guest, disk) in guests.iter_mut().zip(disks) {
            let ready = guest.wait_ready(BOOT_WITHIN.saturating_sub(start.elapsed()))?;
            note(format!("{} is up, its kernel since {} ms", disk.name, ready.boot_ms));
        }
        Ok(Self { guests })
    }

    /// How many run.
    pub fn count(&self) -> usize {
        self.guests.len()
    }

    /// Lets all work for `length` at the same time. The median is the middle guest's, the 99th percentile the worst
    /// guest's: percentiles of different guests cannot be merged.
    ///
    /// # Errors
    /// A guest ended, saw an I/O error, or read other bytes than it wrote.
    pub fn measure(&mut self, name: &str, length: Duration) -> Result<Latency> {
        for (index, guest) in self.guests.iter_mut().enumerate() {
            guest.start_phase(&Phase {
                name: name.into(),
                seconds: length.as_secs_f64(),
                // The same hot blocks in every phase, others in every guest.
                seed: index as u64 + 1,
                span_mib: SPAN_MIB,
                ..Phase::default()
            })?;
        }
        let mut medians = Vec::new();
        let mut latency = Latency::default();
        for guest in &mut self.guests {
            let result = guest.finish_phase(length + GRACE)?;
            if result.errors + result.corrupt > 0 {
                bail!(
                    "in phase {name} a guest saw {} I/O errors and {} wrong pages: {}",
                    result.errors,
                    result.corrupt,
                    result.first_failure
                );
            }
            ensure!(result.reads > 0, "in phase {name} a guest read nothing");
            medians.push(result.read_p50_us);
            latency.p99_us = latency.p99_us.max(result.read_p99_us);
            latency.reads += result.reads;
            latency.writes += result.writes;
        }
        medians.sort_by(f64::total_cmp);
        latency.p50_us = medians[medians.len() / 2];
        Ok(latency)
    }

    /// Lets all work, round after round, until `enough`.
    ///
    /// # Errors
    /// Those of [`Fleet::measure`], or it is not enough `within` the time.
    pub fn work_until(&mut self, within: Duration, mut enough: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            self.measure("warm", ROUND)?;
            if enough()? {
                return Ok(());
            }
            if start.elapsed() > within {
                bail!(
                    "the scheduler's promotions did not come to rest within {} s",
                    within.as_secs()
                );
            }
        }
    }

    /// Shuts all down in order; their file systems must be clean.
    ///
    /// # Errors
    /// One does not stop, or its file system is not clean.
    pub fn shut_down(self) -> Result<()> {
        self.guests.into_iter().try_for_each(|guest| guest.stop(GRACE))
    }
}

/// How a guest reaches an image that was attached.
pub fn path(device: Option<&str>, socket: &str, export: &str) -> GuestDisk {
    match device {
        Some(device) => GuestDisk::Device(PathBuf::from(device)),
        None => GuestDisk::Nbd {
            socket: PathBuf::from(socket),
            export: export.to_owned(),
        },
    }
}
