//! The `ebpf` arm: heat counted in the kernel, at the block devices that belong to images.
//!
//! A count is never taken from a process: the kernel maps a device number to a slot, this module maps slots to images.
//! Its invariant is the one of the programs: `sum of block counts + lost = block touches submitted`, for every window
//! that was drained, however many CPUs count meanwhile.

mod btf;
mod counts;
mod layout;
mod probes;
mod slots;
mod sys;
mod windows;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hearth_probes_common::abi::SLOTS_MAX;
use hearth_protocol::heat::HeatOrigin;
use hearth_protocol::{ByteLen, ImageId};

use self::probes::Probes;
use self::slots::DeviceNumber;
use crate::source::{HeatError, HeatSource, Window};

/// Most blocks that a window can be made for: 10 GiB of kernel memory.
const BLOCKS_MAX: u32 = 1 << 26;

/// Sizes of the kernel's maps, fixed when the programs are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EbpfOptions {
    /// Distinct blocks of all images together that one window surely holds; touches of blocks beyond the table that is
    /// made for them are counted as lost. A block takes 160 bytes of kernel memory, rounded up to a power of two.
    pub blocks_max: u32,
    /// Devices that can be attached at a time, at most 32,768. One takes some 7 KiB of kernel memory.
    pub devices_max: u32,
}

impl Default for EbpfOptions {
    fn default() -> Self {
        Self {
            blocks_max: 1 << 18,
            devices_max: 256,
        }
    }
}

/// What one program costs, measured by the kernel itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProgramCost {
    /// The tracepoint it runs at.
    pub tracepoint: &'static str,
    /// Runs since the statistics were switched on.
    pub runs: u64,
    /// Time of all of them, nanoseconds.
    pub total_ns: u64,
    /// Runs that the kernel left out because the program was interrupted by itself.
    pub missed: u64,
}

impl ProgramCost {
    /// Mean time of a run, nanoseconds; 0 without runs.
    pub fn mean_ns(&self) -> f64 {
        if self.runs == 0 {
            0.0
        } else {
            self.total_ns as f64 / self.runs as f64
        }
    }
}

/// While it lives, the kernel measures the run time of every eBPF program on this machine.
#[derive(Debug)]
pub struct CostMeter {
    _statistics: std::os::fd::OwnedFd,
}

/// The loaded programs. Clones share them: keep one to attach devices, give one to the drain. The programs leave the
/// kernel with the last clone.
#[derive(Clone)]
pub struct EbpfSource {
    probes: Arc<Mutex<Probes>>,
}

impl std::fmt::Debug for EbpfSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EbpfSource").finish_non_exhaustive()
    }
}

/// Whether this build has the eBPF programs in it; if not, loading says what to install.
pub fn is_built_in() -> bool {
    !probes::OBJECT.is_empty()
}

impl EbpfSource {
    /// Loads the programs into the kernel and starts them.
    ///
    /// # Errors
    /// [`HeatError::Unavailable`] with what to install or change if this build or this machine cannot run them.
    ///
    /// # Panics
    /// If an option is out of its range.
    pub fn load(options: EbpfOptions) -> Result<Self, HeatError> {
        assert!(
            (1..=BLOCKS_MAX).contains(&options.blocks_max),
            "1 to {BLOCKS_MAX} blocks"
        );
        assert!(
            (1..=SLOTS_MAX).contains(&options.devices_max),
            "1 to {SLOTS_MAX} devices"
        );
        let probes = Arc::new(Mutex::new(Probes::load(options)?));
        Ok(Self { probes })
    }

    fn probes(&self) -> MutexGuard<'_, Probes> {
        // A panic between two steps leaves counts in the kernel or in the window, both of which are still right.
        self.probes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts I/O to a whole block device as an image's from now on.
    ///
    /// # Errors
    /// [`HeatError::Failed`] if the device is a partition or already attached, if there is no free slot, or from the
    /// kernel.
    ///
    /// # Panics
    /// If `block_size` is no power of two between 4 KiB and 4 MiB.
    pub fn attach_device(&self, major: u32, minor: u32, image: ImageId, block_size: ByteLen) -> Result<(), HeatError> {
        self.probes()
            .attach_device(DeviceNumber { major, minor }, image, block_size)
    }

    /// Stops counting a device. What was counted so far is in the next window.
    ///
    /// # Errors
    /// [`HeatError::Failed`] if the device is not attached, or from the kernel.
    pub fn detach_device(&self, major: u32, minor: u32) -> Result<(), HeatError> {
        self.probes().detach_device(DeviceNumber { major, minor })
    }

    /// Measures the latency of a physical disk, such as `nvme0n1`, from now on.
    ///
    /// # Errors
    /// [`HeatError::Failed`] if there is no such disk, if too many are watched, or from the kernel.
    pub fn watch_disk(&self, name: &str) -> Result<(), HeatError> {
        self.probes().watch_disk(name)
    }

    /// Accesses that are in flight, or whose end was not seen. One of the latter is counted in
    /// [`Window::untimed_total`] when its place is needed: `events = latencies measured + untimed + unfinished`.
    pub fn unfinished(&self) -> u64 {
        self.probes().unfinished()
    }

    /// Has the kernel measure run times until the meter is dropped.
    ///
    /// # Errors
    /// [`HeatError::Failed`] from the kernel.
    pub fn meter(&self) -> Result<CostMeter, HeatError> {
        let statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime)
            .map_err(|error| failed("switching the kernel's eBPF statistics on", error))?;
        Ok(CostMeter {
            _statistics: statistics,
        })
    }

    /// What each attached program cost while a [`CostMeter`] lived.
    ///
    /// # Errors
    /// [`HeatError::Failed`] from the kernel.
    pub fn cost(&self) -> Result<Vec<ProgramCost>, HeatError> {
        self.probes().cost()
    }
}

impl HeatSource for EbpfSource {
    fn origin(&self) -> HeatOrigin {
        HeatOrigin::Ebpf
    }

    fn drain(&mut self) -> Result<Window, HeatError> {
        self.probes().drain()
    }
}

fn failed(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> HeatError {
    HeatError::Failed {
        what: what.into(),
        source: source.into(),
    }
}

fn unavailable(why: impl Into<String>) -> HeatError {
    HeatError::Unavailable { why: why.into() }
}
