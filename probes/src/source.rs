//! A source of heat: the eBPF probes, an export's own counters, or a recorded trace.

use hdrhistogram::Histogram;
use hearth_protocol::heat::{BlockHeat, DiskUse, HeatOrigin};
use hearth_protocol::{ByteLen, ImageId};

/// Which way the bytes went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// From the disk to the guest.
    Read,
    /// To the disk: writes, trims and zeroes.
    Write,
}

/// What one image saw in one window.
#[derive(Debug, Clone)]
pub struct ImageWindow {
    /// Which image.
    pub image: ImageId,
    /// Its block size in bytes.
    pub block_size: ByteLen,
    /// Blocks with any access, strictly ascending.
    pub blocks: Vec<BlockHeat>,
    /// Accesses that could not be counted per block.
    pub lost: u64,
    /// Read latency as the guest felt it, microseconds.
    pub read_latency: Histogram<u64>,
    /// Write latency as the guest felt it, microseconds.
    pub write_latency: Histogram<u64>,
}

/// What a source saw since it was drained last.
#[derive(Debug, Clone, Default)]
pub struct Window {
    /// Images with any access, ascending by id.
    pub images: Vec<ImageWindow>,
    /// Physical disks with any access.
    pub disks: Vec<DiskUse>,
    /// Accesses (bios or requests) of known images seen since the source started.
    pub events_total: u64,
    /// Block accesses lost since the source started: `sum of block counts + lost = submitted`.
    pub lost_total: u64,
    /// Accesses whose latency is known not to be measured since the source started. Their touches are counted.
    pub untimed_total: u64,
}

/// Something that counts block accesses. Everything above it runs without a kernel.
pub trait HeatSource: Send {
    /// What kind it is.
    fn origin(&self) -> HeatOrigin;

    /// Takes what was counted since the last call.
    ///
    /// # Errors
    /// What was attempted and why it failed; the counts stay for the next call.
    fn drain(&mut self) -> Result<Window, HeatError>;
}

/// Why a heat source failed.
#[derive(Debug, thiserror::Error)]
pub enum HeatError {
    /// The kernel or the machine cannot run the probes; says what to install or change.
    #[error("cannot use the eBPF probes: {why}")]
    Unavailable {
        /// What is missing and what to do.
        why: String,
    },
    /// An operation on a loaded probe failed.
    #[error("{what}: {source}")]
    Failed {
        /// What was attempted, on what.
        what: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
