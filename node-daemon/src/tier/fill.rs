//! How a unit comes into RAM: its room is taken under the policy lock, its bytes are copied outside of it, so that
//! misses wait for each other's bookkeeping only, and under the lock again it becomes visible.
//!
//! Invariants: a place belongs to one fill from when it is taken until it is published or given back; what is
//! published is fresh (rule 11) and the only copy of its unit.

use std::sync::atomic::Ordering;

use super::burst::Heat;
use super::guard::FillToken;
use super::resident::{Arrival, Key, Published, key_of};
use super::slots::Place;
use super::{LayerHandle, Policy, RamTier, Region, Seen, count};
use crate::mutants;

/// What became of a fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// The copy is in RAM.
    Done,
    /// It was there already, in the region asked for or a better one.
    Present,
    /// A write to the block began since the read did: dropped (rule 11).
    Stale,
    /// The region has no room.
    Full,
}

impl RamTier {
    /// Offers a whole unit that was read after `token` was taken. The last unit of an image may be shorter.
    pub fn fill(&self, layer: LayerHandle, unit: u32, token: FillToken, data: &[u8], region: Region) -> Filled {
        self.fill_as(layer, unit, token, data, region, None)
    }

    pub(super) fn fill_as(
        &self,
        layer: LayerHandle,
        unit: u32,
        token: FillToken,
        data: &[u8],
        region: Region,
        ahead: Option<u8>,
    ) -> Filled {
        let bytes = layer.unit_bytes();
        assert!(
            data.len() as u64 <= bytes,
            "{} bytes are offered as a unit of {bytes}",
            data.len()
        );
        let key = key_of(layer, unit);
        let place = match self.reserve(key, bytes, token, region) {
            Ok(place) => place,
            Err(filled) => return filled,
        };
        // SAFETY: the place was free when it was taken, and nobody else has it until it is published or given back:
        // no reader knows it, and no other fill.
        unsafe {
            self.arena.write(place.offset(), data);
            // The unit was the image's last; a larger image on the same layer reads zeros behind it.
            let end = place.offset() + data.len();
            self.arena.zero(end, bytes as usize - data.len());
        }
        let filled = self.publish(layer, key, token, place, region, ahead);
        if filled != Filled::Done {
            return filled;
        }
        if ahead.is_some() {
            if self.is_sampled(key.hash) {
                self.budget.sampled(false, true);
            }
        } else if region == Region::Front {
            self.residents.clock.count(bytes);
            let seen = Seen::Read {
                hit: false,
                below: true,
            };
            self.sample(key.hash, layer.unit_log, seen);
        }
        Filled::Done
    }

    /// Takes room for a unit, or says what becomes of the fill without it. The room counts as its region's from now on.
    fn reserve(&self, key: Key, bytes: u64, token: FillToken, region: Region) -> Result<Place, Filled> {
        let mut policy = self.policy();
        // Whoever fills the front has just missed the unit: that it came meanwhile is rare, and seen at the end.
        if region == Region::Main {
            match self.residents.region(key) {
                Some(Region::Front) => return Err(self.move_to_main(&mut policy, key, bytes)),
                Some(Region::Main) => return Err(Filled::Present),
                None => {}
            }
        }
        if !self.guards.is_fresh(token) {
            count(&self.counters.fills_dropped);
            return Err(Filled::Stale);
        }
        let allowed = match region {
            Region::Front => self.front_capacity > 0 && policy.main_bytes + bytes <= self.capacity,
            Region::Main => policy.main_bytes + bytes <= self.main_allowed.load(Ordering::Relaxed),
        };
        if !allowed {
            return Err(Filled::Full);
        }
        while policy.front_bytes + policy.main_bytes + bytes > self.capacity
            && !mutants::RAM_UNLIMITED.is_on()
            && self.evict(&mut policy)
        {}
        let place = loop {
            match policy.slots.take(bytes as usize) {
                Some(place) => break place,
                // Units of other sizes hold the slots: the front gives way.
                None if self.evict(&mut policy) => {}
                None => return Err(Filled::Full),
            }
        };
        *policy.bytes_of(region) += bytes;
        Ok(place)
    }

    /// Makes a filled unit visible, or gives its room back.
    fn publish(
        &self,
        layer: LayerHandle,
        key: Key,
        token: FillToken,
        place: Place,
        region: Region,
        ahead: Option<u8>,
    ) -> Filled {
        let bytes = layer.unit_bytes();
        let mut policy = self.policy();
        let now = self.residents.clock.now();
        let recalled = policy.front.recall(key.hash);
        let (heat, remembered) = match ahead {
            Some(_) => (recalled, Heat::default()),
            None => (recalled.counted(now), recalled),
        };
        let id = policy.free_ids.pop().unwrap_or_else(|| self.residents.new_id());
        let arrival = Arrival {
            key,
            id,
            place,
            log: layer.unit_log,
            region,
            heat,
            ahead,
        };
        let published = self.residents.publish(arrival, || self.guards.is_fresh(token));
        if published == Published::Done {
            match region {
                Region::Front => {
                    policy.front.admitted(id, bytes as usize, now, remembered);
                    policy.admitted += 1;
                }
                Region::Main => self.promoted(&mut policy, key),
            }
            return Filled::Done;
        }
        policy.free_ids.push(id);
        policy.slots.give(place, bytes as usize);
        *policy.bytes_of(region) -= bytes;
        match (published, region) {
            (Published::Present(Region::Front), Region::Main) => self.move_to_main(&mut policy, key, bytes),
            (Published::Present(_), _) => Filled::Present,
            _ => {
                count(&self.counters.fills_dropped);
                Filled::Stale
            }
        }
    }

    /// Moves a unit from the front to the main region, without reading it again.
    pub fn promote_resident(&self, layer: LayerHandle, unit: u32) -> Option<Filled> {
        let key = key_of(layer, unit);
        let mut policy = self.policy();
        match self.residents.region(key)? {
            Region::Main => Some(Filled::Present),
            Region::Front => Some(self.move_to_main(&mut policy, key, layer.unit_bytes())),
        }
    }

    fn move_to_main(&self, policy: &mut Policy, key: Key, bytes: u64) -> Filled {
        if policy.main_bytes + bytes > self.main_allowed.load(Ordering::Relaxed) {
            return Filled::Full;
        }
        let id = self.residents.set_region(key, Region::Main);
        policy.front.removed(id);
        policy.front_bytes -= bytes;
        policy.main_bytes += bytes;
        self.promoted(policy, key);
        Filled::Done
    }

    fn promoted(&self, policy: &mut Policy, key: Key) {
        policy.dropped.remove(&((key.name >> 32) as u32, key.name as u32));
        count(&self.counters.promoted);
    }

    /// Drops one unit of the front; false if it has none.
    fn evict(&self, policy: &mut Policy) -> bool {
        policy.front.set_shape(self.shape());
        let Some(id) = policy.front.victim(&mut &self.residents) else {
            return false;
        };
        let gone = self.residents.remove_id(id);
        policy.front_bytes -= gone.bytes as u64;
        policy.slots.give(gone.place, gone.bytes);
        policy.free_ids.push(id);
        policy.evicted += 1;
        if let Some(class) = gone.unused {
            self.budget.wasted(class);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};

    use hearth_protocol::LayerId;

    use super::*;
    use crate::tier::slots::SLOT;
    use crate::tier::{Look, TierOptions, mix};

    const UNIT: usize = 4096;

    fn tier(slots: usize) -> Arc<RamTier> {
        let options = TierOptions {
            lock: false,
            ..TierOptions::of_bytes((slots * SLOT) as u64)
        };
        RamTier::new(options).expect("address space for the arena")
    }

    /// A unit's bytes in one version: the same eight bytes again and again.
    fn bytes_of(unit: u32, version: u64) -> Vec<u8> {
        (u64::from(unit) << 32 | version).to_le_bytes().repeat(UNIT / 8)
    }

    /// The version in a unit's bytes; checks that they are that unit's, and of one version.
    fn version_of(unit: u32, bytes: &[u8]) -> u64 {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let first = word(0);
        assert_eq!(first >> 32, u64::from(unit), "another unit's bytes");
        for at in (0..bytes.len()).step_by(8) {
            assert_eq!(word(at), first, "unit {unit} is torn at byte {at}");
        }
        first & u64::from(u32::MAX)
    }

    /// Readers that fill what they miss, all at once and without taking turns, promotions, demotions and writes, in a
    /// tier that has room for half of the units. Whoever reads a unit gets its own bytes, of one version, and of none
    /// older than the last write that had ended before.
    #[test]
    fn what_is_read_is_whole_and_never_older_than_the_last_write() {
        const UNITS: u32 = 64;
        const ROUNDS: u64 = 20_000;
        let tier = tier(2);
        let layer = tier.register(LayerId(1), UNIT as u64);
        // What the store has; a write ends when its copy in RAM is up to date.
        let stored: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
        let ended: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
        let done = AtomicBool::new(false);
        let (hits, present) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let reader = |seed: u64| {
            let mut buf = vec![0; UNIT];
            for i in 0..ROUNDS {
                // Half of the reads fall on eight units, which the readers miss together.
                let random = mix(seed << 32 | i);
                let unit = random as u32 % if random >> 40 & 1 == 0 { 8 } else { UNITS };
                let at = unit as usize;
                let least = ended[at].load(Ordering::SeqCst);
                if tier.look(layer, unit, 0, &mut buf) != Look::Miss {
                    hits.fetch_add(1, Ordering::Relaxed);
                    let got = version_of(unit, &buf);
                    assert!(got >= least, "unit {unit}: version {got} after {least} was written");
                } else {
                    let token = tier.begin_fill(layer, unit);
                    let data = bytes_of(unit, stored[at].load(Ordering::SeqCst));
                    let region = if random >> 50 & 3 == 0 {
                        Region::Main
                    } else {
                        Region::Front
                    };
                    if tier.fill(layer, unit, token, &data, region) == Filled::Present {
                        present.fetch_add(1, Ordering::Relaxed);
                    }
                }
                match random >> 56 & 15 {
                    0 => {
                        tier.promote_resident(layer, unit);
                    }
                    1 => {
                        tier.demote(layer, unit);
                    }
                    _ => {}
                }
            }
        };
        let writer = || {
            let mut i = 0;
            while !done.load(Ordering::Relaxed) {
                i += 1;
                let unit = mix(i) as u32 % UNITS;
                let at = unit as usize;
                let version = stored[at].load(Ordering::SeqCst) + 1;
                let ticket = tier.begin_write(layer, unit, 1);
                stored[at].store(version, Ordering::SeqCst);
                // Every eighth write fails after the store took it: its copy leaves.
                if i % 8 != 0 {
                    ticket.update((at * UNIT) as u64, &bytes_of(unit, version));
                    ticket.keep();
                } else {
                    drop(ticket);
                }
                ended[at].store(version, Ordering::SeqCst);
                std::thread::yield_now();
            }
        };
        std::thread::scope(|scope| {
            let writing = scope.spawn(writer);
            let readers: Vec<_> = (0..3).map(|seed| scope.spawn(move || reader(seed + 1))).collect();
            let ended: Vec<_> = readers.into_iter().map(|r| r.join()).collect();
            done.store(true, Ordering::Relaxed);
            writing.join().expect("the writer");
            assert!(ended.iter().all(Result::is_ok), "a reader saw what it must not");
        });
        assert!(hits.into_inner() > 1_000, "there were hits to check");
        let usage = tier.usage();
        let held = tier.residents.count() * UNIT as u64;
        assert_eq!(usage.front.0 + usage.main.0, held, "what is accounted is what is held");
        // Every place came back.
        tier.forget_layer(layer);
        let mut policy = tier.policy();
        assert_eq!((policy.front_bytes, policy.main_bytes), (0, 0));
        for place in 0..2 * SLOT / UNIT {
            assert!(policy.slots.take(UNIT).is_some(), "place {place} is lost");
        }
    }

    /// Two fills of one unit that both found room: the second finds the first's copy, and its room comes back.
    #[test]
    fn of_two_fills_at_once_one_is_kept() {
        let tier = tier(4);
        let layer = tier.register(LayerId(1), UNIT as u64);
        for unit in 0..2_000 {
            let ready = Barrier::new(2);
            let fill = || {
                let token = tier.begin_fill(layer, unit);
                ready.wait();
                tier.fill(layer, unit, token, &bytes_of(unit, 1), Region::Front)
            };
            let (one, other) = std::thread::scope(|scope| {
                let one = scope.spawn(fill);
                let other = fill();
                (one.join().expect("the other thread"), other)
            });
            let done = [one, other].iter().filter(|f| **f == Filled::Done).count();
            assert!(
                done == 1 && [one, other].contains(&Filled::Present),
                "unit {unit}: {one:?} and {other:?}"
            );
            let held = tier.residents.count() * UNIT as u64;
            assert_eq!(tier.usage().front.0, held, "unit {unit}");
        }
    }

    /// A write that begins while the bytes are copied: they are dropped, and the room comes back.
    #[test]
    fn a_fill_that_a_write_overtakes_while_it_copies_is_dropped() {
        let tier = tier(2);
        let layer = tier.register(LayerId(1), UNIT as u64);
        let key = key_of(layer, 3);
        let token = tier.begin_fill(layer, 3);
        let place = tier.reserve(key, UNIT as u64, token, Region::Front).expect("room");
        drop(tier.begin_write(layer, 3, 1));
        assert_eq!(
            tier.publish(layer, key, token, place, Region::Front, None),
            Filled::Stale
        );
        assert_eq!(tier.region(layer, 3), None);
        assert_eq!(tier.usage().front.0, 0);
        assert_eq!(tier.counters().fills_dropped, 1);
    }
}
