//! What the front's replacement policy must be able to do. One file per policy; the tier calls it under one lock,
//! never on a hit.

use super::burst::Heat;

/// What a policy may ask about residents.
pub trait Marks {
    /// Whether a new burst of reads began since this was last asked; clears the mark.
    fn take_touched(&mut self, id: u32) -> bool;

    /// The unit's key, the same whenever that unit comes again.
    fn key(&self, id: u32) -> u64;

    /// Its bursts.
    fn heat(&self, id: u32) -> Heat;

    /// Whether it was read ahead of its use, and not used yet.
    fn is_ahead(&self, id: u32) -> bool;

    /// The current tick of the tier's clock.
    fn now(&self) -> u16;
}

/// How a front treats newcomers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The part of it that they pass through, in percent.
    pub window_percent: u8,
    /// At the window's end they must have been touched in more bursts than what would leave for them; else it is
    /// enough that they were touched again, and one that comes back soon after it left need not pass the window.
    pub duel: bool,
}

/// Decides which resident of the front leaves next.
pub trait FrontPolicy: Send {
    /// What is remembered of a unit that is about to come in; it is then forgotten here.
    fn recall(&mut self, key: u64) -> Heat;

    /// A unit came in. `remembered` is what [`Self::recall`] said of it, or nothing if it was read ahead.
    fn admitted(&mut self, id: u32, bytes: usize, now: u16, remembered: Heat);

    /// A unit that is not resident was touched without coming in; says whether that began a burst.
    fn passed_by(&mut self, key: u64, now: u16) -> bool;

    /// Whether anything is remembered of a unit that is not resident.
    fn remembers(&self, key: u64) -> bool;

    /// Chooses a unit to leave and forgets it; `None` when the front is empty.
    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32>;

    /// A unit left by other means: promoted, made stale, or its layer is gone.
    fn removed(&mut self, id: u32);

    /// Changes how newcomers are treated from now on.
    fn set_shape(&mut self, shape: Shape);

    /// Bytes of memory that the policy uses for residents, and for what it remembers of units that left.
    fn overhead_bytes(&self) -> (usize, usize);
}
