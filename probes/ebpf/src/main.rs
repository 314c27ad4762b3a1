//! The eBPF programs of Hearth's block I/O probes: filter by device, read fields, aggregate. Nothing else.
//!
//! `probes/build.rs` compiles this for the eBPF target. For the host it is an empty program, so that commands over the
//! whole workspace work.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod atomic;
#[cfg(target_arch = "bpf")]
mod bio;
#[cfg(target_arch = "bpf")]
mod fields;
#[cfg(target_arch = "bpf")]
mod heat;
#[cfg(target_arch = "bpf")]
mod in_flight;
#[cfg(target_arch = "bpf")]
mod request;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// Helpers such as the clock are open to GPL-compatible programs only; the crate is under Apache-2.0 as well.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
