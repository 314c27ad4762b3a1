//! Which units are in RAM, and where: a sharded index over compact entries.
//!
//! A shard's lock also orders access to the bytes of its units: readers copy out under the shared lock, so that an
//! eviction or an update cannot tear what they see.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{OnceLock, RwLock};

use hashbrown::HashTable;

use super::arena::Arena;
use super::burst::{BurstClock, Heat};
use super::front::Marks;
use super::slots::{PAGE, Place, SLOT};
use super::{LayerHandle, Region, mix};

/// Most shards: enough that two readers seldom meet.
const SHARDS_MAX: usize = 256;

/// Slots of 64 KiB for each shard: fewer would make half-empty tables.
const SLOTS_PER_SHARD: usize = 64;

/// Entries are made in chunks that never move, so that readers need no lock to reach one.
const CHUNK: usize = 4096;

const TOUCHED: u8 = 1;
const MAIN: u8 = 2;
/// Read ahead of its use, and not used yet.
const AHEAD: u8 = 4;
const LOG_SHIFT: u32 = 3;

/// A unit's name, and its hash, worked out once for each access.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Layer number and unit number.
    pub name: u64,
    /// The name, spread over 64 bits.
    pub hash: u64,
}

impl From<u64> for Key {
    fn from(name: u64) -> Self {
        Self { name, hash: mix(name) }
    }
}

/// A unit's name.
#[inline]
pub fn key_of(layer: LayerHandle, unit: u32) -> Key {
    Key::from(u64::from(layer.number) << 32 | u64::from(unit))
}

/// One resident; 16 bytes. `name`, `place` and the size in `flags` change only while the entry is in no shard.
#[derive(Default)]
struct Entry {
    name: AtomicU64,
    place: AtomicU32,
    /// When its last burst began.
    stamp: AtomicU16,
    /// Bursts; while it is read ahead and unused, in the upper half, and the class of the guess in the lower.
    count: AtomicU8,
    flags: AtomicU8,
}

impl Entry {
    fn heat(&self) -> Heat {
        let count = self.count.load(Ordering::Relaxed);
        let ahead = self.flags.load(Ordering::Relaxed) & AHEAD != 0;
        Heat {
            count: if ahead { count >> 4 } else { count },
            stamp: self.stamp.load(Ordering::Relaxed),
        }
    }

    /// Stores the unit's heat. Two readers may do so at once; what one of them counted is then lost.
    fn set_heat(&self, heat: Heat) {
        self.count.store(heat.count, Ordering::Relaxed);
        self.stamp.store(heat.stamp, Ordering::Relaxed);
    }

    /// Counts a touch, if it begins a new burst.
    #[inline]
    fn touch(&self, flags: u8, clock: &BurstClock) {
        if let Some(heat) = self.heat().touched(clock.now()) {
            self.set_heat(heat);
            self.flags.fetch_or(TOUCHED, Ordering::Relaxed);
            clock.count(1 << (flags >> LOG_SHIFT));
        }
    }
}

/// What a look for a unit found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It is not in RAM.
    Miss,
    /// It was copied out.
    Hit,
    /// It was copied out, and had been read ahead of this, its first use, by a guess of this class.
    FirstUse(u8),
}

#[derive(Default)]
struct Shard {
    table: RwLock<HashTable<u32>>,
    hits: AtomicU64,
}

/// The index.
pub struct Residents {
    shards: Box<[Shard]>,
    chunks: Box<[OnceLock<Box<[Entry]>>]>,
    ids: AtomicU32,
    /// Tells bursts apart.
    pub clock: BurstClock,
}

/// A filled unit that is to become visible.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Its name.
    pub key: Key,
    /// The entry made for it.
    pub id: u32,
    /// Its room.
    pub place: Place,
    /// Logarithm of its size.
    pub log: u8,
    /// Where it goes.
    pub region: Region,
    /// Its bursts so far.
    pub heat: Heat,
    /// The class of the guess, if it was read ahead of its use.
    pub ahead: Option<u8>,
}

/// What became of an [`Arrival`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    /// It is visible.
    Done,
    /// Its bytes are not what the store holds any more.
    Stale,
    /// Another copy of the unit is there, in this region.
    Present(Region),
}

/// A unit that left.
#[derive(Debug, Clone, Copy)]
pub struct Gone {
    /// The room it had.
    pub place: Place,
    /// Its size.
    pub bytes: usize,
    /// Where it was.
    pub region: Region,
    /// The class of the guess, if it was read ahead and never used.
    pub unused: Option<u8>,
}

impl Residents {
    /// Nothing resident, in an arena of `bytes`.
    pub fn new(bytes: usize) -> Self {
        Self {
            shards: (0..(bytes / SLOT / SLOTS_PER_SHARD)
                .next_power_of_two()
                .clamp(8, SHARDS_MAX))
                .map(|_| Shard::default())
                .collect(),
            chunks: (0..(bytes / PAGE).div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
            ids: AtomicU32::new(0),
            clock: BurstClock::new(bytes as u64),
        }
    }

    fn shard(&self, hash: u64) -> &Shard {
        &self.shards[hash as usize & (self.shards.len() - 1)]
    }

    #[inline]
    fn entry(&self, id: u32) -> &Entry {
        let chunk = self.chunks[id as usize / CHUNK].get();
        &chunk.expect("an id is given out after its chunk was made")[id as usize % CHUNK]
    }

    #[inline]
    fn is(&self, id: u32, key: Key) -> bool {
        self.entry(id).name.load(Ordering::Relaxed) == key.name
    }

    /// Makes one more id. The caller holds the policy lock.
    pub fn new_id(&self) -> u32 {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        self.chunks[id as usize / CHUNK].get_or_init(|| (0..CHUNK).map(|_| Entry::default()).collect());
        id
    }

    /// Copies out part of a unit, and counts the touch.
    #[inline]
    pub fn read(&self, arena: &Arena, key: Key, within: usize, buf: &mut [u8]) -> Look {
        let shard = self.shard(key.hash);
        let table = shard.table.read().expect("shard lock");
        let Some(id) = table.find(key.hash, |id| self.is(*id, key)) else {
            return Look::Miss;
        };
        let entry = self.entry(*id);
        let flags = entry.flags.load(Ordering::Relaxed);
        assert!(
            within + buf.len() <= 1 << (flags >> LOG_SHIFT),
            "a read reaches past its unit"
        );
        let mut look = Look::Hit;
        if flags & AHEAD == 0 {
            entry.touch(flags, &self.clock);
        } else {
            // The first use of a unit read ahead is what its admission would have been: it sets no mark.
            let (packed, heat) = (entry.count.load(Ordering::Relaxed), entry.heat());
            if entry.flags.fetch_and(!AHEAD, Ordering::Relaxed) & AHEAD != 0 {
                entry.set_heat(heat.counted(self.clock.now()));
                self.clock.count(1 << (flags >> LOG_SHIFT));
                look = Look::FirstUse(packed & 15);
            }
        }
        let at = Place(entry.place.load(Ordering::Relaxed)).offset() + within;
        // SAFETY: the unit is in the table, and every writer of its bytes holds the shard's lock exclusively.
        unsafe { arena.read(at, buf) };
        drop(table);
        shard.hits.fetch_add(1, Ordering::Relaxed);
        look
    }

    fn change(&self, key: Key, within: usize, len: usize, f: impl FnOnce(usize)) -> bool {
        let table = self.shard(key.hash).table.write().expect("shard lock");
        let Some(id) = table.find(key.hash, |id| self.is(*id, key)) else {
            return false;
        };
        let entry = self.entry(*id);
        let flags = entry.flags.load(Ordering::Relaxed);
        assert!(
            within + len <= 1 << (flags >> LOG_SHIFT),
            "a write reaches past its unit"
        );
        if flags & AHEAD == 0 {
            entry.touch(flags, &self.clock);
        }
        f(Place(entry.place.load(Ordering::Relaxed)).offset() + within);
        true
    }

    /// Writes part of a unit, if it is resident; says whether it is.
    pub fn write(&self, arena: &Arena, key: Key, within: usize, data: &[u8]) -> bool {
        self.change(key, within, data.len(), |at| {
            // SAFETY: the shard's lock is held exclusively, and the range lies within this unit's room.
            unsafe { arena.write(at, data) }
        })
    }

    /// Zeroes part of a unit, if it is resident.
    pub fn zero(&self, arena: &Arena, key: Key, within: usize, len: usize) {
        self.change(key, within, len, |at| {
            // SAFETY: the shard's lock is held exclusively, and the range lies within this unit's room.
            unsafe { arena.zero(at, len) }
        });
    }

    /// Which region holds a unit.
    pub fn region(&self, key: Key) -> Option<Region> {
        let table = self.shard(key.hash).table.read().expect("shard lock");
        let id = table.find(key.hash, |id| self.is(*id, key))?;
        Some(region_of(self.entry(*id).flags.load(Ordering::Relaxed)))
    }

    /// Makes a filled unit visible, unless another copy of it is, and if `still` says so under the lock. The caller
    /// holds the policy lock.
    pub fn publish(&self, unit: Arrival, still: impl FnOnce() -> bool) -> Published {
        let Arrival {
            key,
            id,
            place,
            log,
            region,
            heat,
            ahead,
        } = unit;
        let mut table = self.shard(key.hash).table.write().expect("shard lock");
        if let Some(other) = table.find(key.hash, |id| self.is(*id, key)) {
            return Published::Present(region_of(self.entry(*other).flags.load(Ordering::Relaxed)));
        }
        if !still() {
            return Published::Stale;
        }
        let entry = self.entry(id);
        entry.name.store(key.name, Ordering::Relaxed);
        entry.place.store(place.0, Ordering::Relaxed);
        let region = if region == Region::Main { MAIN } else { 0 };
        let (ahead, packed) = match ahead {
            Some(class) => (AHEAD, heat.count << 4 | class & 15),
            None => (0, heat.count),
        };
        entry.count.store(packed, Ordering::Relaxed);
        entry.stamp.store(heat.stamp, Ordering::Relaxed);
        entry.flags.store(log << LOG_SHIFT | region | ahead, Ordering::Relaxed);
        let hash_of = |id: &u32| mix(self.entry(*id).name.load(Ordering::Relaxed));
        if table.len() == table.capacity() {
            // Left to itself the table would double as soon as its places for removed units run out.
            let mut fresh = HashTable::with_capacity(table.len() + table.len() / 8 + 1);
            for id in table.drain() {
                fresh.insert_unique(hash_of(&id), id, hash_of);
            }
            *table = fresh;
        }
        table.insert_unique(key.hash, id, hash_of);
        Published::Done
    }

    /// Changes a resident unit's region; returns its id. The caller holds the policy lock and knows it is resident.
    pub fn set_region(&self, key: Key, region: Region) -> u32 {
        let table = self.shard(key.hash).table.write().expect("shard lock");
        let id = *table
            .find(key.hash, |id| self.is(*id, key))
            .expect("residency changes only under the policy lock");
        let flags = &self.entry(id).flags;
        match region {
            Region::Main => flags.fetch_or(MAIN, Ordering::Relaxed),
            Region::Front => flags.fetch_and(!MAIN, Ordering::Relaxed),
        };
        id
    }

    /// Takes a unit out. The caller holds the policy lock, and may use the room when this returns.
    pub fn remove(&self, key: Key) -> Option<(u32, Gone)> {
        let mut table = self.shard(key.hash).table.write().expect("shard lock");
        let found = table.find_entry(key.hash, |id| self.is(*id, key)).ok()?;
        let (id, _) = found.remove();
        let entry = self.entry(id);
        let flags = entry.flags.load(Ordering::Relaxed);
        Some((
            id,
            Gone {
                place: Place(entry.place.load(Ordering::Relaxed)),
                bytes: 1 << (flags >> LOG_SHIFT),
                region: region_of(flags),
                unused: (flags & AHEAD != 0).then(|| entry.count.load(Ordering::Relaxed) & 15),
            },
        ))
    }

    /// Takes a unit out by its id, which the policy knows to be resident.
    pub fn remove_id(&self, id: u32) -> Gone {
        let key = Key::from(self.entry(id).name.load(Ordering::Relaxed));
        let (found, gone) = self.remove(key).expect("the policy's units are resident");
        assert_eq!(found, id, "one unit has two entries");
        gone
    }

    /// All resident units of a layer.
    pub fn units_of(&self, layer: LayerHandle) -> Vec<u32> {
        let mut units = Vec::new();
        for shard in &self.shards {
            for id in shard.table.read().expect("shard lock").iter() {
                let name = self.entry(*id).name.load(Ordering::Relaxed);
                if (name >> 32) as u32 == layer.number {
                    units.push(name as u32);
                }
            }
        }
        units
    }

    /// Units resident now.
    pub fn count(&self) -> u64 {
        let len = |s: &Shard| s.table.read().expect("shard lock").len() as u64;
        self.shards.iter().map(len).sum()
    }

    /// Reads answered so far.
    pub fn hits(&self) -> u64 {
        self.shards.iter().map(|s| s.hits.load(Ordering::Relaxed)).sum()
    }

    /// Bytes of bookkeeping that grow with the number of residents.
    pub fn overhead_bytes(&self) -> u64 {
        let tables: usize = self
            .shards
            .iter()
            .map(|s| s.table.read().expect("shard lock").allocation_size())
            .sum();
        let entries = self.ids.load(Ordering::Relaxed) as usize * size_of::<Entry>();
        (tables + entries) as u64
    }
}

impl Marks for &Residents {
    fn take_touched(&mut self, id: u32) -> bool {
        self.entry(id).flags.fetch_and(!TOUCHED, Ordering::Relaxed) & TOUCHED != 0
    }

    fn key(&self, id: u32) -> u64 {
        mix(self.entry(id).name.load(Ordering::Relaxed))
    }

    fn heat(&self, id: u32) -> Heat {
        self.entry(id).heat()
    }

    fn is_ahead(&self, id: u32) -> bool {
        self.entry(id).flags.load(Ordering::Relaxed) & AHEAD != 0
    }

    fn now(&self) -> u16 {
        self.clock.now()
    }
}

fn region_of(flags: u8) -> Region {
    if flags & MAIN != 0 { Region::Main } else { Region::Front }
}

const _: () = assert!(size_of::<Entry>() == 16 && PAGE == 4096);
