//! End-to-end tests on real parts: see the folder `tests/`. The cluster that they start is [`xtask`]'s, the same as
//! the demo's.
