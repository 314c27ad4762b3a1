//! Writes, as the tier sees them: copies are updated or leave, and no fill that overlaps a write is believed.

use super::resident::{Key, key_of};
use super::{LayerHandle, RamTier, Seen};

impl RamTier {
    /// A write, trim or zero of `count` units begins. Ends when the ticket is dropped; whatever was not
    /// [updated](WriteTicket::update) until then leaves RAM.
    pub fn begin_write(&self, layer: LayerHandle, first: u32, count: u32) -> WriteTicket<'_> {
        for unit in first..first + count {
            self.guards.begin_write(key_of(layer, unit).hash);
        }
        WriteTicket {
            tier: self,
            layer,
            first,
            count,
            kept: false,
        }
    }
}

/// A write under way. Dropping it without [`WriteTicket::keep`] removes the units' RAM copies: that is what a failed
/// or partial write must do.
pub struct WriteTicket<'a> {
    tier: &'a RamTier,
    layer: LayerHandle,
    first: u32,
    count: u32,
    kept: bool,
}

impl WriteTicket<'_> {
    /// Writes `data`, which the store has taken, into the RAM copies too. `offset` is in bytes from the layer's start.
    pub fn update(&self, offset: u64, data: &[u8]) {
        self.each(offset, data.len(), |key, within, range| {
            if !self.tier.residents.write(&self.tier.arena, key, within, &data[range]) {
                self.tier.passed_by(self.layer, key);
            }
            self.tier.sample(key.hash, self.layer.unit_log, Seen::Write);
        });
    }

    /// As [`Self::update`] with zeros.
    pub fn update_zero(&self, offset: u64, length: usize) {
        self.each(offset, length, |key, within, range| {
            self.tier.residents.zero(&self.tier.arena, key, within, range.len());
        });
    }

    fn each(&self, offset: u64, length: usize, mut f: impl FnMut(Key, usize, std::ops::Range<usize>)) {
        let unit_bytes = self.layer.unit_bytes();
        let mut at = 0;
        while at < length {
            let from = offset + at as u64;
            let within = from % unit_bytes;
            let take = ((unit_bytes - within) as usize).min(length - at);
            let unit = (from / unit_bytes) as u32;
            assert!((self.first..self.first + self.count).contains(&unit));
            f(key_of(self.layer, unit), within as usize, at..at + take);
            at += take;
        }
    }

    /// Drops the RAM copies of units: they became zero and need no RAM.
    pub fn invalidate(&self, first: u32, count: u32) {
        for unit in first..first + count {
            self.tier.invalidate(self.layer, unit);
        }
    }

    /// The write succeeded as a whole and its copies are up to date.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for WriteTicket<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.invalidate(self.first, self.count);
        }
        for unit in self.first..self.first + self.count {
            self.tier.guards.end_write(key_of(self.layer, unit).hash);
        }
    }
}
