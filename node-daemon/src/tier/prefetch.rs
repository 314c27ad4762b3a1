//! Sequential prefetch.
