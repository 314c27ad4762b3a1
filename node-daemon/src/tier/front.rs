//! What the front's replacement policy must be able to do. One file per policy; the tier calls it under one lock,
//! never on a hit.

use super::burst::Heat;

/// What a policy may ask about residents.
pub trait Marks {
    /// Whether a new burst of reads began since this was last asked; clears the mark.
    fn take_touched(&mut self, id: u32) -> bool;

    /// The unit's key, as it was given to [`FrontPolicy::admitted`].
    fn key(&self, id: u32) -> u64;

    /// Its bursts.
    fn heat(&self, id: u32) -> Heat;

    /// Whether it was read ahead of its use, and not used yet.
    fn is_ahead(&self, id: u32) -> bool;

    /// The current tick of the tier's clock.
    fn now(&self) -> u16;
}

/// Decides which resident of the front leaves next.
pub trait FrontPolicy: Send {
    /// What is remembered of a unit that is about to come in; it is then forgotten here.
    fn recall(&mut self, key: u64) -> Heat;

    /// A unit came in. `key` is the same whenever that unit comes again.
    fn admitted(&mut self, id: u32, bytes: usize, now: u16);

    /// A unit that is not resident was touched without coming in; says whether that began a burst.
    fn passed_by(&mut self, key: u64, now: u16) -> bool;

    /// Chooses a unit to leave and forgets it; `None` when the front is empty.
    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32>;

    /// A unit left by other means: promoted, made stale, or its layer is gone.
    fn removed(&mut self, id: u32);

    /// Sets the part of the front that newcomers pass through, in percent.
    fn set_window(&mut self, percent: u8);

    /// Bytes of memory that the policy uses for residents, and for what it remembers of units that left.
    fn overhead_bytes(&self) -> (usize, usize);
}
