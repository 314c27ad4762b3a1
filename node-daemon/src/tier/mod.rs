//! The RAM tier: clean copies of hot blocks in one bounded, locked arena, shared by all images of a node.
//!
//! Keyed by (layer, unit): clones share their golden image's copies. A *unit* is a block, or 64 KiB of a larger one.
//! Two regions share the arena. The *front* admits misses by itself, per access ([`front::FrontPolicy`]); the *main*
//! region holds what the scheduler promoted, until it demotes it.
//!
//! Invariants: bytes held never exceed the regions' sizes; a copy never outlives the bytes it was read from
//! (`guard`); a hit takes one shared lock of one shard and allocates nothing.
//!
//! Locks, in this order: `policy` (room, queues; never on a hit), then one shard (which units are resident, and who
//! may touch their bytes).

mod ahead;
mod arena;
mod budget;
mod burst;
mod fill;
pub mod front;
mod front_burst;
mod ghost;
mod guard;
mod history;
mod inflight;
pub mod prefetch;
mod resident;
mod shadow;
mod slots;
mod write;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use hearth_protocol::heat::TierUse;
use hearth_protocol::{BlockIndex, ByteLen, LayerId};

pub use ahead::Replayed;
use arena::Arena;
use budget::Budget;
pub use fill::Filled;
use front::{FrontPolicy, Shape};
use front_burst::BurstFront;
pub use guard::FillToken;
use guard::WriteGuards;
use history::History;
use inflight::InFlight;
pub(crate) use inflight::Lead;
pub use resident::Look;
use resident::{Key, Residents, key_of};
use shadow::{Advice, SHAPES, Shadows};
use slots::{SLOT, Slots};
pub use write::WriteTicket;

/// How to build a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TierOptions {
    /// Size of the arena; rounded down to whole slots of 64 KiB.
    pub capacity_bytes: u64,
    /// Least part of it that the node fills by itself, in percent: it has what the main region leaves, too. With 0 it
    /// fills nothing by itself.
    pub front_percent: u8,
    /// Lock the arena into RAM, as far as the system allows.
    pub lock: bool,
}

impl TierOptions {
    /// A locked tier with the recommended front: on no recorded trace did a larger main region hit more than the
    /// front would have with the room (`docs/adr/0004`).
    pub fn of_bytes(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            front_percent: 94,
            lock: true,
        }
    }
}

/// A layer as the tier knows it; cheap to copy, valid while the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerHandle {
    number: u32,
    unit_log: u8,
}

impl LayerHandle {
    /// Bytes in a unit of this layer.
    pub fn unit_bytes(self) -> u64 {
        1 << self.unit_log
    }
}

/// Which part of the tier holds a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Admitted by the node on a miss.
    Front,
    /// Promoted by the scheduler.
    Main,
}

/// Totals since the tier was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierCounters {
    /// Unit reads answered.
    pub hits: u64,
    /// Units let into the front on a miss.
    pub admitted: u64,
    /// Units that the front dropped for want of room.
    pub evicted: u64,
    /// Units moved or read into the main region.
    pub promoted: u64,
    /// Units dropped from the main region by order.
    pub demoted: u64,
    /// Fills dropped because a write began meanwhile.
    pub fills_dropped: u64,
    /// Copies dropped because a write failed, the block became zero, or its image was detached.
    pub invalidated: u64,
    /// Units read ahead that were used.
    pub ahead_used: u64,
    /// Units read ahead that the front dropped unused.
    pub ahead_wasted: u64,
}

/// An access, as the shadows are told of it.
enum Seen {
    /// A read; whether RAM had the unit on demand, and whether it was read below for it.
    Read {
        hit: bool,
        below: bool,
    },
    Write,
}

#[derive(Default)]
struct Counters {
    promoted: AtomicU64,
    demoted: AtomicU64,
    fills_dropped: AtomicU64,
    invalidated: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

struct LayerInfo {
    id: LayerId,
    block_size: u64,
}

#[derive(Default)]
struct Layers {
    by_id: HashMap<LayerId, LayerHandle>,
    infos: Vec<LayerInfo>,
}

/// Room and queues; locked on misses, promotions and failures, never on hits.
struct Policy {
    slots: Slots,
    free_ids: Vec<u32>,
    front: Box<dyn FrontPolicy>,
    front_bytes: u64,
    main_bytes: u64,
    /// Main-region copies that left without an order, as (layer number, unit).
    dropped: HashSet<(u32, u32)>,
    /// Totals; see [`TierCounters`].
    admitted: u64,
    evicted: u64,
}

impl Policy {
    fn bytes_of(&mut self, region: Region) -> &mut u64 {
        match region {
            Region::Front => &mut self.front_bytes,
            Region::Main => &mut self.main_bytes,
        }
    }
}

/// The tier.
pub struct RamTier {
    arena: Arena,
    residents: Residents,
    guards: WriteGuards,
    in_flight: InFlight,
    policy: Mutex<Policy>,
    layers: RwLock<Layers>,
    counters: Counters,
    budget: Budget,
    history: Mutex<History>,
    shadows: Mutex<Shadows>,
    /// Which units the shadows follow; see [`Shadows::is_sampled`]. None without a front.
    sampled_below: AtomicU32,
    /// The front's shape, as the shadows advise: its place in [`SHAPES`].
    shape: AtomicU8,
    capacity: u64,
    front_capacity: u64,
    main_capacity: u64,
    /// What the main region may hold now: less than its capacity while the front would hit more with the room.
    main_allowed: AtomicU64,
}

/// The main region gives room back when the tier hits less than a front alone would, by more than this.
const MAIN_LOSS_PERMILLE: i64 = 5;

/// It is given some back when the tier hits more than a front alone would, by at least this.
const MAIN_GAIN_PERMILLE: i64 = 10;

/// Spreads a number over 64 bits (the finalizer of splitmix64).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl RamTier {
    /// Builds an empty tier.
    ///
    /// # Errors
    /// The operating system's, when it has no address space for the arena.
    pub fn new(options: TierOptions) -> std::io::Result<Arc<Self>> {
        let count = (options.capacity_bytes / SLOT as u64).min(u64::from(u32::MAX) / 16) as u32;
        let capacity = u64::from(count) * SLOT as u64;
        let percent = u64::from(options.front_percent.min(100));
        let front_capacity = u64::from(count) * percent / 100 * SLOT as u64;
        let main_capacity = capacity - front_capacity;
        let slots = count << u32::from(crate::mutants::RAM_UNLIMITED.is_on());
        let arena = Arena::new(slots as usize * SLOT, options.lock)?;
        if let Some(why) = arena.lock_refused() {
            tracing::warn!("{why}");
        }
        Ok(Arc::new(Self {
            arena,
            residents: Residents::new(slots as usize * SLOT),
            guards: WriteGuards::new(),
            in_flight: InFlight::new(),
            policy: Mutex::new(Policy {
                slots: Slots::new(slots),
                free_ids: Vec::new(),
                front: Box::new(BurstFront::new(SHAPES[0])),
                front_bytes: 0,
                main_bytes: 0,
                dropped: HashSet::new(),
                admitted: 0,
                evicted: 0,
            }),
            layers: RwLock::default(),
            counters: Counters::default(),
            budget: Budget::new(Shadows::sampled_below(capacity)),
            history: Mutex::new(History::new(ahead::history_misses(capacity))),
            shadows: Mutex::new(Shadows::new(capacity)),
            sampled_below: AtomicU32::new(if front_capacity > 0 {
                Shadows::sampled_below(capacity)
            } else {
                0
            }),
            shape: AtomicU8::new(0),
            main_allowed: AtomicU64::new(main_capacity),
            capacity,
            front_capacity,
            main_capacity,
        }))
    }

    /// Why the arena is not locked into RAM, if that was asked for and refused.
    pub fn lock_refused(&self) -> Option<&str> {
        self.arena.lock_refused()
    }

    /// Makes a layer known, or finds it again.
    pub fn register(&self, id: LayerId, block_size: u64) -> LayerHandle {
        let mut layers = self.layers.write().expect("layer table lock");
        if let Some(handle) = layers.by_id.get(&id) {
            return *handle;
        }
        let handle = LayerHandle {
            number: layers.infos.len() as u32,
            unit_log: block_size.min(SLOT as u64).ilog2() as u8,
        };
        layers.infos.push(LayerInfo { id, block_size });
        layers.by_id.insert(id, handle);
        handle
    }

    fn policy(&self) -> MutexGuard<'_, Policy> {
        self.policy.lock().expect("tier policy lock")
    }

    /// Copies part of a unit into `buf` if it is resident.
    #[inline]
    pub fn read(&self, layer: LayerHandle, unit: u32, within: usize, buf: &mut [u8]) -> bool {
        self.look(layer, unit, within, buf) != Look::Miss
    }

    /// As [`Self::read`]; tells a first use of a unit read ahead, which the prefetchers want to hear of.
    #[inline]
    pub fn look(&self, layer: LayerHandle, unit: u32, within: usize, buf: &mut [u8]) -> Look {
        debug_assert!(within + buf.len() <= layer.unit_bytes() as usize);
        let key = key_of(layer, unit);
        let look = self.residents.read(&self.arena, key, within, buf);
        match look {
            Look::Miss => return look,
            Look::Hit => {}
            Look::FirstUse(class) => self.budget.used(class),
        }
        let seen = Seen::Read {
            hit: look == Look::Hit,
            below: false,
        };
        self.sample(key.hash, layer.unit_log, seen);
        look
    }

    #[inline]
    fn is_sampled(&self, hash: u64) -> bool {
        Shadows::is_sampled(hash, self.sampled_below.load(Ordering::Relaxed))
    }

    /// Shows an access to the shadows, if its unit is sampled.
    #[inline]
    fn sample(&self, hash: u64, log: u8, seen: Seen) {
        if self.is_sampled(hash) {
            self.show(hash, log, seen);
        }
    }

    /// Shows an access of a sampled unit to the shadows, and takes their advice. Never waits.
    fn show(&self, hash: u64, log: u8, seen: Seen) {
        let Ok(mut shadows) = self.shadows.try_lock() else {
            return;
        };
        let (read, hit, below) = match seen {
            Seen::Read { hit, below } => (true, hit, below),
            Seen::Write => (false, false, false),
        };
        let (would_hit, advice) = shadows.access(hash, log, read, hit);
        drop(shadows);
        self.budget.sampled(read && !would_hit, below);
        if let Some(advice) = advice {
            self.take(advice);
        }
    }

    fn take(&self, advice: Advice) {
        self.shape.store(advice.shape, Ordering::Relaxed);
        if self.sampled_below.swap(advice.sampled_below, Ordering::Relaxed) != advice.sampled_below {
            self.budget.resample(advice.sampled_below);
        }
        let allowed = self.main_allowed.load(Ordering::Relaxed);
        // What is empty costs nothing.
        let holds = || self.policy.try_lock().is_ok_and(|policy| policy.main_bytes > 0);
        let next = if advice.missed_permille > MAIN_LOSS_PERMILLE && holds() {
            allowed / 4
        } else if advice.missed_permille < -MAIN_GAIN_PERMILLE {
            (allowed + self.main_capacity / 64).min(self.main_capacity)
        } else {
            allowed
        };
        self.main_allowed.store(next, Ordering::Relaxed);
    }

    /// Whether misses are let in at all.
    pub fn has_front(&self) -> bool {
        self.front_capacity > 0
    }

    /// Which region holds a unit, if any does.
    pub fn region(&self, layer: LayerHandle, unit: u32) -> Option<Region> {
        self.residents.region(key_of(layer, unit))
    }

    /// Must be called before the bytes of a later [`Self::fill`] are read.
    pub fn begin_fill(&self, layer: LayerHandle, unit: u32) -> FillToken {
        self.guards.begin_fill(key_of(layer, unit).hash)
    }

    /// See [`InFlight::lead_or_wait`].
    pub(crate) fn lead_or_wait(&self, layer: LayerHandle, unit: u32) -> Option<Lead<'_>> {
        let key = key_of(layer, unit);
        self.in_flight.lead_or_wait(key.name, key.hash)
    }

    fn shape(&self) -> Shape {
        SHAPES[usize::from(self.shape.load(Ordering::Relaxed))]
    }

    /// Drops a unit wherever it is; says from which region.
    fn remove(&self, key: Key) -> Option<Region> {
        // Most writes touch blocks that are not in RAM: look before locking the policy.
        self.residents.region(key)?;
        let mut policy = self.policy();
        let (id, gone) = self.residents.remove(key)?;
        match gone.region {
            Region::Front => {
                policy.front.removed(id);
                policy.front_bytes -= gone.bytes as u64;
            }
            Region::Main => policy.main_bytes -= gone.bytes as u64,
        }
        policy.slots.give(gone.place, gone.bytes);
        policy.free_ids.push(id);
        if let Some(class) = gone.unused {
            self.budget.unread(class, 1);
        }
        Some(gone.region)
    }

    /// Drops a unit from the main region by order. False if it was not there.
    pub fn demote(&self, layer: LayerHandle, unit: u32) -> bool {
        let key = key_of(layer, unit);
        if self.residents.region(key) != Some(Region::Main) || self.remove(key).is_none() {
            return false;
        }
        count(&self.counters.demoted);
        true
    }

    /// Drops a copy that a write made stale, and remembers it for the heat report if it was promoted.
    fn invalidate(&self, layer: LayerHandle, unit: u32) {
        if let Some(region) = self.remove(key_of(layer, unit)) {
            count(&self.counters.invalidated);
            if region == Region::Main {
                self.policy().dropped.insert((layer.number, unit));
            }
        }
    }

    /// Drops every copy of a layer: its image was detached, or attached under a new epoch, or deleted.
    pub fn forget_layer(&self, layer: LayerHandle) {
        for unit in self.residents.units_of(layer) {
            self.invalidate(layer, unit);
        }
    }

    /// Drops what was promoted of a layer, because whoever promoted it counts on it no more.
    pub fn forget_promoted(&self, layer: LayerHandle) {
        for unit in self.residents.units_of(layer) {
            if self.region(layer, unit) == Some(Region::Main) {
                self.invalidate(layer, unit);
            }
        }
    }

    /// Sizes and use, as heat reports carry them.
    pub fn usage(&self) -> TierUse {
        let policy = self.policy();
        TierUse {
            capacity: ByteLen(self.capacity),
            front: ByteLen(policy.front_bytes),
            main: ByteLen(policy.main_bytes),
            front_capacity: ByteLen(if self.front_capacity == 0 {
                0
            } else {
                self.capacity - policy.main_bytes
            }),
            main_capacity: ByteLen(self.main_allowed.load(Ordering::Relaxed)),
        }
    }

    /// Totals since the tier was built.
    pub fn counters(&self) -> TierCounters {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let (ahead_used, ahead_wasted) = self.budget.totals();
        let (admitted, evicted) = {
            let policy = self.policy();
            (policy.admitted, policy.evicted)
        };
        TierCounters {
            hits: self.residents.hits(),
            admitted,
            evicted,
            promoted: get(&self.counters.promoted),
            demoted: get(&self.counters.demoted),
            fills_dropped: get(&self.counters.fills_dropped),
            invalidated: get(&self.counters.invalidated),
            ahead_used,
            ahead_wasted,
        }
    }

    /// Main-region blocks that left without an order since the last call, ascending: for the heat report.
    pub fn take_dropped(&self) -> Vec<(LayerId, Vec<BlockIndex>)> {
        let dropped = std::mem::take(&mut self.policy().dropped);
        let layers = self.layers.read().expect("layer table lock");
        let mut by_layer: BTreeMap<LayerId, Vec<BlockIndex>> = BTreeMap::new();
        for (number, unit) in dropped {
            let info = &layers.infos[number as usize];
            let units_per_block = info.block_size.div_ceil(SLOT as u64);
            by_layer
                .entry(info.id)
                .or_default()
                .push(BlockIndex(u64::from(unit) / units_per_block));
        }
        for blocks in by_layer.values_mut() {
            blocks.sort_unstable();
            blocks.dedup();
        }
        by_layer.into_iter().collect()
    }

    /// Bytes of bookkeeping: for each resident unit, and in all with what is remembered of units that left.
    pub fn overhead(&self) -> (u64, u64) {
        let (queues, ghosts) = self.policy().front.overhead_bytes();
        let residents = self.residents.overhead_bytes() + queues as u64;
        let each = residents.checked_div(self.residents.count()).unwrap_or(0);
        (each, residents + ghosts as u64)
    }

    /// See [`InFlight::try_lead`].
    pub(crate) fn try_lead(&self, layer: LayerHandle, unit: u32) -> Option<Lead<'_>> {
        let key = key_of(layer, unit);
        self.in_flight.try_lead(key.name, key.hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = SLOT as u64;

    fn tier(units: u64) -> Arc<RamTier> {
        let options = TierOptions {
            lock: false,
            ..TierOptions::of_bytes(units * UNIT)
        };
        RamTier::new(options).expect("address space for the arena")
    }

    /// Reads a unit as a volume does; says whether it was there.
    fn access(tier: &RamTier, layer: LayerHandle, unit: u32) -> bool {
        let hit = tier.read(layer, unit, 0, &mut [0; 8]);
        if !hit {
            let token = tier.begin_fill(layer, unit);
            assert_eq!(tier.fill(layer, unit, token, &[1; 16], Region::Front), Filled::Done);
        }
        hit
    }

    /// POLICY: at most 40 bytes for a resident block, 16 for one that is remembered; shadows and recorded misses
    /// bounded. Sizes as the allocator was asked for them, after growth and churn.
    #[test]
    fn bookkeeping_stays_within_its_bytes() {
        for units in [4_096u64, 10_000, 16_384] {
            let tier = tier(units);
            let layer = tier.register(LayerId(1), UNIT);
            for i in 0..units * 6 {
                access(&tier, layer, (mix(i % (units * 2)) % (units * 8)) as u32);
            }
            let residents = tier.residents.count();
            assert_eq!(residents, units, "the tier is full");
            let (each, _) = tier.overhead();
            assert!(each <= 40, "{each} bytes for each of {units} residents");
            let (_, ghosts) = tier.policy().front.overhead_bytes();
            assert!(
                ghosts as u64 <= 16 * 4 * units,
                "{ghosts} bytes of ghosts of {units} units"
            );
            let (shadows, history) = tier.fixed_overhead();
            assert!(shadows <= 1 << 20, "{shadows} bytes of shadows");
            assert!(
                history <= 16 * ahead::history_misses(tier.capacity) as u64,
                "{history} bytes of misses"
            );
        }
    }

    #[test]
    fn the_front_has_what_the_main_region_leaves() {
        let tier = tier(64);
        let layer = tier.register(LayerId(1), UNIT);
        for unit in 0..64 {
            access(&tier, layer, unit);
        }
        assert_eq!(tier.usage().front, ByteLen(64 * UNIT));
        assert_eq!(tier.promote_resident(layer, 3), Some(Filled::Done));
        let token = tier.begin_fill(layer, 70);
        assert_eq!(tier.fill(layer, 70, token, &[2; 16], Region::Main), Filled::Done);
        let usage = tier.usage();
        assert_eq!((usage.main, usage.front), (ByteLen(2 * UNIT), ByteLen(62 * UNIT)));
        assert_eq!(usage.front_capacity, ByteLen(62 * UNIT));
        assert!(tier.region(layer, 3) == Some(Region::Main) && tier.region(layer, 70) == Some(Region::Main));
    }

    /// Promoted blocks that nobody reads cost hits that a front alone would have: the main region shrinks.
    #[test]
    fn a_main_region_that_does_not_pay_gives_its_room_back() {
        let tier = tier(100);
        let layer = tier.register(LayerId(1), UNIT);
        for unit in 1_000..1_006 {
            let token = tier.begin_fill(layer, unit);
            assert_eq!(tier.fill(layer, unit, token, &[1; 16], Region::Main), Filled::Done);
        }
        let before = tier.usage().main_capacity.0;
        for i in 0..20_000 {
            access(&tier, layer, i % 97);
        }
        assert!(tier.usage().main_capacity.0 < before / 4, "{:?}", tier.usage());
    }

    #[test]
    fn with_the_front_off_nothing_comes_in_by_itself() {
        let tier = RamTier::new(TierOptions {
            capacity_bytes: 16 * UNIT,
            front_percent: 0,
            lock: false,
        })
        .expect("address space for the arena");
        let layer = tier.register(LayerId(1), UNIT);
        let token = tier.begin_fill(layer, 0);
        assert!(!tier.has_front());
        assert_eq!(tier.fill(layer, 0, token, &[1; 16], Region::Front), Filled::Full);
        assert_eq!(tier.fill(layer, 0, token, &[1; 16], Region::Main), Filled::Done);
        assert_eq!(tier.grant_sequential(64, 8, UNIT).1, 0);
        assert_eq!(tier.missed(layer, 1), None);
    }

    #[test]
    fn a_unit_read_ahead_is_counted_as_used_or_wasted_once() {
        let tier = tier(64);
        let layer = tier.register(LayerId(1), UNIT);
        assert_eq!(
            tier.grant_sequential(8, 2, UNIT).1,
            0,
            "nothing was missed yet: there is nothing to waste"
        );
        for unit in 1_000..1_100 {
            access(&tier, layer, unit);
            assert_eq!(tier.missed(layer, unit), None);
        }
        let (class, granted) = tier.grant_sequential(8, 2, UNIT);
        assert_eq!(granted, 2);
        for unit in 0..2 {
            let token = tier.begin_fill(layer, unit);
            assert_eq!(tier.fill_ahead(layer, unit, token, &[1; 16], class), Filled::Done);
        }
        assert_eq!(tier.look(layer, 0, 0, &mut [0; 8]), Look::FirstUse(class));
        assert_eq!(tier.look(layer, 0, 0, &mut [0; 8]), Look::Hit);
        for unit in 100..600 {
            access(&tier, layer, unit);
        }
        let counters = tier.counters();
        assert_eq!((counters.ahead_used, counters.ahead_wasted), (1, 1));
    }
}
