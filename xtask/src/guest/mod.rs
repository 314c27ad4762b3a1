//! Real guests: a golden image built from the distribution's packages, and QEMU machines that boot from disks which
//! Hearth serves, read and write with skew, and check every byte.
//!
//! The host drives a guest over its serial console: a guest says that it is ready, is told to run a phase, and answers
//! with one line of JSON.

mod accel;
mod boot_disk;
mod golden;
mod initramfs;
mod packages;
mod vm;
/// What runs inside the guest. It is compiled for the guest when the image is built; here only its tests are.
#[cfg(test)]
#[allow(dead_code)]
mod workload;

pub use accel::{Accel, choose};
pub use golden::{DATA_MIB, build_golden, build_golden_with};
pub use vm::{Guest, GuestDisk, GuestOptions, Phase, PhaseResult, Ready, Stall};
