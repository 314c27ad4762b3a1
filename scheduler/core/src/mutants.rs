//! Switches that break one rule each, so that it can be shown which test notices. Only a build with the feature
//! `mutants` has them; there `HEARTH_MUTANT` names the one that is on.
//!
//! | switch | what it breaks |
//! |---|---|
//! | `chain-unchecked` | a record's chain value is not compared |
//! | `void-applied` | a void event is applied |
//! | `duplicate-applied` | an event that its publisher delivered before counts again |
//! | `lost-uncounted` | heat of a window that lost samples counts as clean |
//! | `hash-order` | decisions come in the order of a hash table |
//! | `drop-unchecked` | a replica is dropped however few are left |
//! | `circle-unseen` | no breaker trips |

/// Whether a switch is on. Constant in production builds.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is_on(_name: &str) -> bool {
    false
}

/// Whether a switch is on.
#[cfg(feature = "mutants")]
#[allow(
    clippy::disallowed_methods,
    reason = "the switch comes from the environment, in these builds only"
)]
pub fn is_on(name: &str) -> bool {
    std::env::var("HEARTH_MUTANT").is_ok_and(|on| on == name)
}

/// Puts things into the order of a hash table.
#[cfg(feature = "mutants")]
#[allow(clippy::disallowed_types, reason = "that is what it is for")]
pub(crate) fn in_hash_order<T>(things: Vec<T>) -> Vec<T> {
    let table: std::collections::HashMap<_, _> = things.into_iter().enumerate().collect();
    table.into_values().collect()
}

/// Never called: there is nothing to break in a production build.
#[cfg(not(feature = "mutants"))]
pub(crate) fn in_hash_order<T>(things: Vec<T>) -> Vec<T> {
    things
}
