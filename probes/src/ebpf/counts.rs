//! Counts that only grow in the kernel, read as the difference to the last reading: so nothing is lost between
//! reading and resetting.

use std::borrow::BorrowMut;

use aya::maps::{Array, MapData, MapError, PerCpuArray};
use hdrhistogram::Histogram;
use hearth_probes_common::abi::{Latencies, Totals, latency_index};
use hearth_probes_common::latency::BUCKETS;

use crate::tally::record_latency;

/// [`Totals`] as aya reads them.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct RawTotals(Totals);

// SAFETY: three u64, every bit pattern valid, no padding.
unsafe impl aya::Pod for RawTotals {}

/// Totals of every slot.
pub struct TotalsReader<T: BorrowMut<MapData>> {
    map: PerCpuArray<T, RawTotals>,
    last: Vec<Totals>,
}

impl<T: BorrowMut<MapData>> TotalsReader<T> {
    /// Reads `map`, in which nothing has been counted yet.
    pub fn new(map: PerCpuArray<T, RawTotals>) -> Self {
        let last = vec![Totals::default(); map.len() as usize];
        Self { map, last }
    }

    /// What a slot counted since it was read last.
    pub fn read(&mut self, slot: u32) -> Result<Totals, MapError> {
        let mut now = Totals::default();
        for RawTotals(cpu) in self.map.get(&slot, 0)?.iter() {
            now.events += cpu.events;
            now.lost += cpu.lost;
            now.untimed += cpu.untimed;
        }
        let last = std::mem::replace(&mut self.last[slot as usize], now);
        Ok(Totals {
            events: now.events - last.events,
            lost: now.lost - last.lost,
            untimed: now.untimed - last.untimed,
        })
    }
}

/// Latency histograms of every slot or disk.
pub struct LatencyReader<T: BorrowMut<MapData>> {
    map: Array<T, Latencies>,
    last: Vec<Option<Box<Latencies>>>,
}

impl<T: BorrowMut<MapData>> LatencyReader<T> {
    /// Reads `map`, in which nothing has been counted yet.
    pub fn new(map: Array<T, Latencies>) -> Self {
        let last = vec![None; map.len() as usize];
        Self { map, last }
    }

    /// Adds what a slot counted in one direction since it was read last.
    pub fn read(&mut self, slot: u32, write: bool, into: &mut Histogram<u64>) -> Result<(), MapError> {
        let index = latency_index(slot, write);
        let now = self.map.get(&index, 0)?;
        let last = self.last[index as usize].get_or_insert_with(|| Box::new([0; BUCKETS]));
        for (bucket, (now, last)) in (0u32..).zip(now.iter().zip(last.iter())) {
            if now != last {
                record_latency(into, bucket, now - last);
            }
        }
        **last = now;
        Ok(())
    }
}
