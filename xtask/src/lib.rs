//! Set-up, demo and test of the Hearth workspace, and the harness that starts a cluster of real processes for the
//! demo and for the end-to-end tests.
//!
//! It is not part of Hearth: it starts Hearth's programs as a user would, and looks at them only through the `hearth`
//! command, sockets and files. Invariant: whatever it started or mounted, it ends, also when it fails.

pub mod bench;
pub mod cgroup;
pub mod check;
pub mod cli;
pub mod cluster;
pub mod demo;
pub mod guest;
pub mod moving;
pub mod mutants;
pub mod process;
pub mod setup;
pub mod step;
pub mod throttle;
pub mod wait;
pub mod workspace;
