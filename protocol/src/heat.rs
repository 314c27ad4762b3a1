//! Heat on the wire: what a node reports once a second, and what the leader folds into the log.
//!
//! Records are packed columns, not one map each: a block costs some 6 bytes instead of 60, and the log keeps up with
//! 500,000 records a second. The packing is versioned by its first byte.

use serde::{Deserialize, Serialize};

use crate::ids::{ImageId, Incarnation, LayerId, NodeId};
use crate::units::{BlockIndex, ByteLen, WallMs};

/// What one block saw in one window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct BlockHeat {
    /// Which block, in units of the image's block size.
    pub block: BlockIndex,
    /// Reads that touched it.
    pub reads: u32,
    /// Writes, trims and zeroes that touched it.
    pub writes: u32,
    /// Distinct tenths of a second in which it was touched (POLICY §3): 1 to 10 for a one-second window.
    pub bursts: u32,
    /// Bytes read and written within it.
    pub bytes: u64,
}

/// Where counts were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeatOrigin {
    /// eBPF programs at the kernel block device.
    Ebpf,
    /// The NBD export's own counters.
    Export,
    /// A recorded trace.
    Trace,
}

impl HeatOrigin {
    /// The word users see.
    pub fn as_str(self) -> &'static str {
        match self {
            HeatOrigin::Ebpf => "ebpf",
            HeatOrigin::Export => "export",
            HeatOrigin::Trace => "trace",
        }
    }
}

/// Blocks packed by [`pack`]; ascending by block.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PackedHeat(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// Why packed heat cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Packed by a newer Hearth.
    #[error("heat is packed in version {0}, this build reads version 1")]
    Version(u8),
    /// Ends within a record, or a number is too large for its column.
    #[error("packed heat is damaged at byte {0}")]
    Damaged(usize),
}

const PACK_VERSION: u8 = 1;

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Packs records that ascend strictly by block: per record LEB128 of block distance, reads, writes, bursts, bytes.
///
/// # Panics
/// If the records do not ascend strictly.
pub fn pack(records: &[BlockHeat]) -> PackedHeat {
    let mut out = Vec::with_capacity(1 + records.len() * 8);
    out.push(PACK_VERSION);
    let mut next = 0;
    for record in records {
        let distance = record.block.0.checked_sub(next).expect("heat records ascend by block");
        put(&mut out, distance);
        put(&mut out, record.reads.into());
        put(&mut out, record.writes.into());
        put(&mut out, record.bursts.into());
        put(&mut out, record.bytes);
        next = record.block.0 + 1;
    }
    PackedHeat(out)
}

impl PackedHeat {
    /// Iterates over the records without building them all; stops after the first error.
    pub fn iter(&self) -> HeatIter<'_> {
        HeatIter {
            bytes: &self.0,
            at: 0,
            next: 0,
            failed: false,
        }
    }

    /// All records.
    ///
    /// # Errors
    /// [`PackError`] where the bytes are not what [`pack`] writes.
    pub fn unpack(&self) -> Result<Vec<BlockHeat>, PackError> {
        self.iter().collect()
    }
}

/// Iterator of [`PackedHeat::iter`].
#[derive(Debug, Clone)]
pub struct HeatIter<'a> {
    bytes: &'a [u8],
    at: usize,
    next: u64,
    failed: bool,
}

impl HeatIter<'_> {
    fn number(&mut self) -> Result<u64, PackError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at).ok_or(PackError::Damaged(self.at))?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                return Err(PackError::Damaged(self.at));
            }
            value |= part << shift;
            self.at += 1;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(PackError::Damaged(self.at))
    }

    fn small(&mut self) -> Result<u32, PackError> {
        let at = self.at;
        self.number()?.try_into().map_err(|_| PackError::Damaged(at))
    }

    fn record(&mut self) -> Result<BlockHeat, PackError> {
        let at = self.at;
        let block = self.number()?.checked_add(self.next).ok_or(PackError::Damaged(at))?;
        let record = BlockHeat {
            block: BlockIndex(block),
            reads: self.small()?,
            writes: self.small()?,
            bursts: self.small()?,
            bytes: self.number()?,
        };
        self.next = block.checked_add(1).ok_or(PackError::Damaged(at))?;
        Ok(record)
    }
}

impl Iterator for HeatIter<'_> {
    type Item = Result<BlockHeat, PackError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        if self.at == 0 {
            match self.bytes.first() {
                None => return None,
                Some(&PACK_VERSION) => self.at = 1,
                Some(&other) => {
                    self.failed = true;
                    return Some(Err(PackError::Version(other)));
                }
            }
        }
        if self.at == self.bytes.len() {
            return None;
        }
        let record = self.record();
        self.failed = record.is_err();
        Some(record)
    }
}

/// Heat of one image's blocks that lie in one layer. Block numbers count from the image's start; a clone shares its
/// golden image's layer, so the same (layer, block) may come from several images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerHeat {
    /// The layer that held the blocks when the window ended.
    pub layer: LayerId,
    /// The blocks.
    pub blocks: PackedHeat,
}

/// What a window left out or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Omitted {
    /// Blocks that did not fit the node's share of the report.
    pub blocks: u64,
    /// Their reads.
    pub reads: u64,
    /// Their writes.
    pub writes: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Accesses the probes could not count per block (map full). Heat with losses never drives a move by itself.
    pub lost: u64,
}

/// Percentiles of one latency histogram over one window, microseconds; count 0 means no request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Requests measured.
    pub count: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Largest.
    pub max_us: u64,
}

/// One image in one window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHeat {
    /// Which image.
    pub image: ImageId,
    /// Where it was counted.
    pub origin: HeatOrigin,
    /// Its blocks' heat by layer, ascending by layer id.
    pub layers: Vec<LayerHeat>,
    /// What is not in `layers`.
    pub omitted: Omitted,
    /// Reads as the guest felt them.
    pub read_latency: LatencySummary,
    /// Writes as the guest felt them.
    pub write_latency: LatencySummary,
    /// Block reads that were answered from RAM in the window.
    pub ram_hits: u64,
    /// Block reads that were not.
    pub ram_misses: u64,
}

/// The node's RAM tier at the end of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TierUse {
    /// Size of the arena.
    pub capacity: ByteLen,
    /// Bytes held by the front (blocks the node admitted by itself).
    pub front: ByteLen,
    /// Bytes held by the main region (blocks the scheduler promoted).
    pub main: ByteLen,
    /// Bytes the front may use.
    pub front_capacity: ByteLen,
    /// Bytes the main region may use.
    pub main_capacity: ByteLen,
}

/// One physical disk in one window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    /// Kernel name, such as `nvme0n1`.
    pub device: String,
    /// Read latency, issue to completion.
    pub read_latency: LatencySummary,
    /// Write latency, issue to completion.
    pub write_latency: LatencySummary,
}

/// What a node publishes once a second on `hearth.heat.<node>`; also its sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatReport {
    /// Who reports.
    pub node: NodeId,
    /// Its process start.
    pub incarnation: Incarnation,
    /// Exactly last + 1 within the incarnation, from 1: gaps are counted by the leader.
    pub report_seq: u64,
    /// End of the window, the node's wall clock.
    pub time: WallMs,
    /// Length of the window in milliseconds.
    pub window_ms: u64,
    /// Images with any access in the window, ascending by id.
    pub images: Vec<ImageHeat>,
    /// The RAM tier.
    pub tier: TierUse,
    /// Physical disks with any access.
    pub disks: Vec<DiskUse>,
    /// Records the probes saw since the daemon started.
    pub probe_events_total: u64,
    /// Records the probes lost since the daemon started.
    pub probe_lost_total: u64,
    /// Main-region copies that left RAM without an order since the last report (a write made them stale).
    pub dropped: Vec<(LayerId, Vec<BlockIndex>)>,
}

impl HeatReport {
    /// A report of a second in which nothing happened.
    pub fn idle(node: NodeId, incarnation: Incarnation, report_seq: u64) -> Self {
        Self {
            node,
            incarnation,
            report_seq,
            time: WallMs(0),
            window_ms: 1_000,
            images: Vec::new(),
            tier: TierUse::default(),
            disks: Vec::new(),
            probe_events_total: 0,
            probe_lost_total: 0,
            dropped: Vec::new(),
        }
    }

    /// The bytes that travel: MessagePack with field names.
    ///
    /// # Panics
    /// Never: a report always encodes.
    pub fn encode(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).expect("a heat report always encodes")
    }

    /// Reads a report.
    ///
    /// # Errors
    /// The decoder's complaint.
    pub fn decode(bytes: &[u8]) -> Result<Self, rmp_serde::decode::Error> {
        rmp_serde::from_slice(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packed_heat_reads_back(mut raw in prop::collection::vec((any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<u64>()), 0..200)) {
            raw.iter_mut().for_each(|r| r.0 &= u64::MAX >> 1);
            raw.sort();
            raw.dedup_by_key(|r| r.0);
            let records: Vec<_> = raw.into_iter().map(|(block, reads, writes, bursts, bytes)| BlockHeat { block: BlockIndex(block), reads, writes, bursts, bytes }).collect();
            prop_assert_eq!(pack(&records).unpack().unwrap(), records);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = PackedHeat(bytes).unpack();
        }
    }
}
