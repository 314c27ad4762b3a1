//! What the front's replacement policy must be able to do. One file per policy; the tier calls it under one lock,
//! never on a hit.

/// Decides which resident of the front leaves next.
pub trait FrontPolicy: Send {
    /// A unit came in. `key` is the same whenever that unit comes again.
    fn admitted(&mut self, id: u32, key: u64, bytes: usize);

    /// Chooses a unit to leave and forgets it. `touched` says whether a unit was read since it was last asked, and
    /// clears that mark.
    fn victim(&mut self, touched: &mut dyn FnMut(u32) -> bool) -> Option<u32>;

    /// A unit left by other means: promoted, made stale, or its layer is gone.
    fn removed(&mut self, id: u32);

    /// Bytes of memory that the policy uses for itself.
    fn overhead_bytes(&self) -> usize;
}
