//! What the front's replacement policy must be able to do. One file per policy; the tier calls it under one lock,
//! never on a hit.

/// What a policy may ask about residents.
pub trait Marks {
    /// Whether a unit was read since this was last asked; clears the mark.
    fn take_touched(&mut self, id: u32) -> bool;

    /// The unit's key, as it was given to [`FrontPolicy::admitted`].
    fn key(&self, id: u32) -> u64;
}

/// Decides which resident of the front leaves next.
pub trait FrontPolicy: Send {
    /// A unit came in. `key` is the same whenever that unit comes again.
    fn admitted(&mut self, id: u32, key: u64, bytes: usize);

    /// Chooses a unit to leave and forgets it; `None` when the front is empty.
    fn victim(&mut self, marks: &mut dyn Marks) -> Option<u32>;

    /// A unit left by other means: promoted, made stale, or its layer is gone.
    fn removed(&mut self, id: u32);

    /// Bytes of memory that the policy uses for residents, and for what it remembers of units that left.
    fn overhead_bytes(&self) -> (usize, usize);
}
