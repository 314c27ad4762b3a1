//! The loaded programs with their maps, and the drain.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::{fs, io};

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{BtfTracePoint, ProgramError};
use aya::{Ebpf, EbpfLoader};
use hearth_probes_common::abi::{DISKS_MAX, Device, IN_FLIGHT_BUCKETS, InFlight, InFlightBucket};
use hearth_protocol::heat::DiskUse;
use hearth_protocol::{ByteLen, ImageId, units};

use super::counts::{LatencyReader, RawTotals, TotalsReader};
use super::slots::{DeviceNumber, Slots};
use super::sys::{self, SharedWords};
use super::windows::{self, Taken, Windows};
use super::{EbpfOptions, ProgramCost, btf, failed, layout, unavailable};
use crate::source::{HeatError, Window};
use crate::tally::{ImageTally, latency_histogram, summary};

/// The compiled programs; empty if the build had no tools for them.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/hearth-probes.o"));

/// Why [`OBJECT`] is empty.
const MISSING: &str = env!("HEARTH_EBPF_MISSING");

/// The program that counts accesses: a run of it that the kernel leaves out is an access lost.
const BIO_QUEUE: (&str, &str) = ("bio_queue", "block_bio_queue");
const BIO_PROGRAMS: [(&str, &str); 3] = [
    ("bio_complete", "block_bio_complete"),
    ("bio_request_complete", "block_rq_complete"),
    BIO_QUEUE,
];
const REQUEST_PROGRAMS: [(&str, &str); 2] = [
    ("request_complete", "block_rq_complete"),
    ("request_issue", "block_rq_issue"),
];

/// [`Device`] as aya writes it.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct RawDevice(Device);

// SAFETY: two u32, every bit pattern valid, no padding.
unsafe impl aya::Pod for RawDevice {}

/// A physical disk that is measured.
struct Disk {
    name: String,
    slot: u32,
}

/// The programs in the kernel and what is known about them here.
pub struct Probes {
    ebpf: Ebpf,
    kernel_types: aya::Btf,
    devices: HashMap<MapData, u32, RawDevice>,
    disks_map: HashMap<MapData, u32, u32>,
    windows: Windows,
    /// The table of bios in flight, entries of [`InFlight`].
    in_flight: SharedWords,
    totals: TotalsReader<MapData>,
    latencies: LatencyReader<MapData>,
    disk_latencies: LatencyReader<MapData>,
    slots: Slots,
    disks: Vec<Disk>,
    requests_attached: bool,
    /// What was taken from the kernel and not handed out yet.
    tallies: BTreeMap<u32, ImageTally>,
    events_total: u64,
    lost_total: u64,
    /// Accesses whose latency was not measured.
    untimed_total: u64,
    missed: u64,
}

/// Says what a refusal of the kernel means for the user.
fn explain_load(error: ProgramError) -> HeatError {
    let text = match &error {
        ProgramError::LoadError { io_error, verifier_log } => match io_error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) if verifier_log.to_string().is_empty() => {
                "the kernel does not permit it; run as root or with CAP_BPF and CAP_PERFMON, and check that kernel \
                 lockdown is not in confidentiality mode"
                    .to_string()
            }
            _ => format!(
                "this kernel refuses the programs ({io_error}); Linux 5.17 or newer is needed. It said: {verifier_log}"
            ),
        },
        other => format!("this kernel refuses the programs: {other}"),
    };
    unavailable(text)
}

fn attach(ebpf: &mut Ebpf, programs: &[(&'static str, &'static str)], types: &aya::Btf) -> Result<(), HeatError> {
    for (name, tracepoint) in programs {
        let program: &mut BtfTracePoint = ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| unavailable(format!("the built-in object has no program {name}; rebuild Hearth")))?;
        program.load(tracepoint, types).map_err(explain_load)?;
        program
            .attach()
            .map_err(|error| failed(format!("attaching to the tracepoint {tracepoint}"), error))?;
    }
    Ok(())
}

impl Probes {
    /// Loads the programs and starts those that watch images.
    pub fn load(options: EbpfOptions) -> Result<Self, HeatError> {
        if OBJECT.is_empty() {
            return Err(unavailable(format!(
                "this Hearth was built without them: {MISSING}; then build again"
            )));
        }
        let raw = fs::read(layout::KERNEL_BTF).map_err(|error| {
            unavailable(format!(
                "{}: {error}; a kernel with CONFIG_DEBUG_INFO_BTF is needed, which Debian's and Ubuntu's have",
                layout::KERNEL_BTF
            ))
        })?;
        let offsets = btf::Btf::parse(raw)
            .and_then(|types| layout::offsets(&types))
            .map_err(|error| unavailable(format!("{error}; Linux 5.17 or newer is needed")))?;
        let kernel_types = aya::Btf::from_sys_fs().map_err(|error| failed("reading the kernel's type data", error))?;
        let buckets = windows::buckets(options.blocks_max);
        let mask = buckets - 1;
        let mut loader = EbpfLoader::new();
        loader
            .btf(Some(&kernel_types))
            .map_max_entries("DEVICES", options.devices_max)
            .map_max_entries("HEAT", 2 * buckets)
            .map_max_entries("CLAIMED", windows::claimed_words(buckets))
            .override_global("HEAT_MASK", &mask, true)
            .map_max_entries("TOTALS", options.devices_max)
            .map_max_entries("LATENCIES", 2 * options.devices_max);
        for (name, offset) in &offsets {
            loader.override_global(name, offset, true);
        }
        let mut ebpf = loader.load(OBJECT).map_err(|error| {
            unavailable(format!(
                "{error}; run as root or with CAP_BPF and CAP_PERFMON on Linux 5.17 or newer"
            ))
        })?;
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .ok_or_else(|| unavailable(format!("the built-in object has no map {name}; rebuild Hearth")))
        };
        // Open until the programs are loaded, which refer to it by descriptor.
        let bios = take("BIOS")?;
        let wrong = |error| failed("reading the maps of the built-in object", error);
        let windows = Windows::map(
            take("CONTROL")?,
            take("HEAT")?,
            take("CLAIMED")?,
            take("RANGES")?,
            buckets,
        )
        .map_err(|error| failed("mapping the probes' tables", error))?;
        let in_flight = windows::descriptor(&bios)
            .and_then(|table| SharedWords::map(table, IN_FLIGHT_BUCKETS as usize * size_of::<InFlightBucket>() / 8))
            .map_err(|error| failed("mapping the table of bios in flight", error))?;
        let devices = take("DEVICES")?.try_into().map_err(wrong)?;
        let disks_map = take("DISKS")?.try_into().map_err(wrong)?;
        let totals = aya::maps::PerCpuArray::<_, RawTotals>::try_from(take("TOTALS")?).map_err(wrong)?;
        let latencies = Array::try_from(take("LATENCIES")?).map_err(wrong)?;
        let disk_latencies = Array::try_from(take("DISK_LATENCIES")?).map_err(wrong)?;
        attach(&mut ebpf, &BIO_PROGRAMS, &kernel_types)?;
        Ok(Self {
            ebpf,
            kernel_types,
            devices,
            disks_map,
            windows,
            in_flight,
            totals: TotalsReader::new(totals),
            latencies: LatencyReader::new(latencies),
            disk_latencies: LatencyReader::new(disk_latencies),
            slots: Slots::new(options.devices_max),
            disks: Vec::new(),
            requests_attached: false,
            tallies: BTreeMap::new(),
            events_total: 0,
            lost_total: 0,
            untimed_total: 0,
            missed: 0,
        })
    }

    /// See [`super::EbpfSource::attach_device`].
    pub fn attach_device(
        &mut self,
        device: DeviceNumber,
        image: ImageId,
        block_size: ByteLen,
    ) -> Result<(), HeatError> {
        assert!(units::is_block_size(block_size.get()), "{block_size} is no block size");
        let DeviceNumber { major, minor } = device;
        let what = format!("attaching the probes to block device {major}:{minor}");
        if fs::exists(format!("/sys/dev/block/{major}:{minor}/partition")).unwrap_or(false) {
            return Err(failed(
                what,
                "it is a partition; attach the whole disk, I/O to its partitions is counted there",
            ));
        }
        if let Some((_, slot)) = self.slots.of(device) {
            return Err(failed(
                what,
                format!("it is attached to image {} already; detach it first", slot.image),
            ));
        }
        let Some(slot) = self.slots.take(device, image, block_size) else {
            return Err(failed(what, "all slots are in use; load the probes for more devices"));
        };
        let value = RawDevice(Device {
            slot,
            block_shift: block_size.get().trailing_zeros(),
        });
        if let Err(error) = self.devices.insert(device.word(), value, 0) {
            self.slots.rest(slot);
            return Err(failed(what, error));
        }
        Ok(())
    }

    /// See [`super::EbpfSource::detach_device`].
    pub fn detach_device(&mut self, device: DeviceNumber) -> Result<(), HeatError> {
        let what = format!(
            "detaching the probes from block device {}:{}",
            device.major, device.minor
        );
        let Some((slot, _)) = self.slots.of(device) else {
            return Err(failed(what, "it is not attached"));
        };
        self.devices
            .remove(&device.word())
            .map_err(|error| failed(what, error))?;
        self.slots.rest(slot);
        Ok(())
    }

    /// See [`super::EbpfSource::watch_disk`].
    pub fn watch_disk(&mut self, name: &str) -> Result<(), HeatError> {
        let what = format!("watching disk {name:?}");
        if self.disks.iter().any(|disk| disk.name == name) {
            return Ok(());
        }
        if name.is_empty() || name.contains(['/', '.']) {
            return Err(failed(what, "a kernel name such as nvme0n1 is expected"));
        }
        let number = fs::read_to_string(format!("/sys/block/{name}/dev")).map_err(|error| {
            failed(
                what.clone(),
                io::Error::new(error.kind(), format!("/sys/block/{name}/dev: {error}")),
            )
        })?;
        let device = number
            .trim()
            .split_once(':')
            .and_then(|(major, minor)| {
                Some(DeviceNumber {
                    major: major.parse().ok()?,
                    minor: minor.parse().ok()?,
                })
            })
            .ok_or_else(|| failed(what.clone(), format!("its device number {number:?} cannot be read")))?;
        let slot = self.disks.len() as u32;
        if slot >= DISKS_MAX {
            return Err(failed(what, format!("{DISKS_MAX} disks are watched already")));
        }
        self.disks_map
            .insert(device.word(), slot, 0)
            .map_err(|error| failed(what, error))?;
        self.disks.push(Disk {
            name: name.into(),
            slot,
        });
        if !self.requests_attached {
            attach(&mut self.ebpf, &REQUEST_PROGRAMS, &self.kernel_types)?;
            self.requests_attached = true;
        }
        Ok(())
    }

    fn runs(&self, program: &str) -> Result<sys::Runs, HeatError> {
        let what = || format!("asking the kernel about program {program}");
        let loaded = self
            .ebpf
            .program(program)
            .ok_or_else(|| failed(what(), "it is not in the object"))?;
        let fd = loaded.fd().map_err(|error| failed(what(), error))?;
        sys::runs(fd.as_fd()).map_err(|error| failed(what(), error))
    }

    /// See [`super::EbpfSource::cost`].
    pub fn cost(&self) -> Result<Vec<ProgramCost>, HeatError> {
        let requests = if self.requests_attached {
            &REQUEST_PROGRAMS[..]
        } else {
            &[]
        };
        let programs = BIO_PROGRAMS.iter().chain(requests);
        let cost = |(name, tracepoint): &(&'static str, &'static str)| {
            let runs = self.runs(name)?;
            Ok(ProgramCost {
                tracepoint,
                runs: runs.count,
                total_ns: runs.time_ns,
                missed: runs.missed,
            })
        };
        programs.map(cost).collect()
    }

    fn drain_windows(&mut self) -> Result<(), HeatError> {
        let Self {
            windows,
            slots,
            tallies,
            ..
        } = self;
        let block_sizes: BTreeMap<_, _> = slots.iter().map(|(number, slot)| (number, slot.block_size)).collect();
        // Every count carries the slot of a device that was attached at most two windows ago.
        let new_tally =
            |slot: u32| ImageTally::new(*block_sizes.get(&slot).expect("a slot rests while it can be counted to"));
        let take = |slot: u32, taken: Taken| {
            let tally = tallies.entry(slot).or_insert_with(|| new_tally(slot));
            match taken {
                Taken::Block(block, counts) => tally.add(block, &counts),
                Taken::Range {
                    op,
                    offset,
                    length,
                    burst,
                } => tally.add_request(op, offset, length, burst),
            }
        };
        windows
            .drain(take)
            .map_err(|error| failed("waiting for running probes", error))
    }

    fn read_totals(&mut self) -> Result<(), HeatError> {
        let reading = |error| failed("reading the probes' totals", error);
        for (number, slot) in self.slots.iter() {
            let totals = self.totals.read(number).map_err(reading)?;
            let tally = self
                .tallies
                .entry(number)
                .or_insert_with(|| ImageTally::new(slot.block_size));
            tally.events += totals.events;
            tally.lost += totals.lost;
            self.untimed_total += totals.untimed;
            self.latencies
                .read(number, false, &mut tally.read_latency)
                .map_err(reading)?;
            self.latencies
                .read(number, true, &mut tally.write_latency)
                .map_err(reading)?;
        }
        Ok(())
    }

    fn read_disks(&mut self) -> Result<Vec<DiskUse>, HeatError> {
        let mut disks = Vec::new();
        for disk in &self.disks {
            let (mut read, mut write) = (latency_histogram(), latency_histogram());
            let reading = |error| failed(format!("reading the latency of disk {}", disk.name), error);
            self.disk_latencies.read(disk.slot, false, &mut read).map_err(reading)?;
            self.disk_latencies.read(disk.slot, true, &mut write).map_err(reading)?;
            if !read.is_empty() || !write.is_empty() {
                disks.push(DiskUse {
                    device: disk.name.clone(),
                    read_latency: summary(&read),
                    write_latency: summary(&write),
                });
            }
        }
        Ok(disks)
    }

    /// See [`super::EbpfSource::unfinished`].
    pub fn unfinished(&self) -> u64 {
        let entries = self.in_flight.chunks_exact(size_of::<InFlight>() / 8);
        entries.filter(|words| words[0].load(Relaxed) != 0).count() as u64
    }

    /// See [`crate::source::HeatSource::drain`].
    pub fn drain(&mut self) -> Result<Window, HeatError> {
        self.drain_windows()?;
        self.read_totals()?;
        let missed = self.runs(BIO_QUEUE.0)?.missed;
        let disks = self.read_disks()?;
        // Nothing fails from here on: what was taken is handed out exactly once.
        self.lost_total += missed - std::mem::replace(&mut self.missed, missed);
        let mut images: BTreeMap<ImageId, ImageTally> = BTreeMap::new();
        for (number, tally) in std::mem::take(&mut self.tallies) {
            self.events_total += tally.events;
            self.lost_total += tally.lost;
            let (_, slot) = self
                .slots
                .iter()
                .find(|(used, _)| *used == number)
                .expect("a slot with counts is in use");
            match images.entry(slot.image) {
                std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert(tally)),
                std::collections::btree_map::Entry::Occupied(mut entry) => entry.get_mut().merge(tally),
            }
        }
        self.slots.window_drained();
        Ok(Window {
            images: images
                .into_iter()
                .filter(|(_, tally)| !tally.is_empty())
                .map(|(image, tally)| tally.into_window(image))
                .collect(),
            disks,
            events_total: self.events_total,
            lost_total: self.lost_total,
            untimed_total: self.untimed_total,
        })
    }
}
