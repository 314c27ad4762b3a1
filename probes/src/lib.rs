//! Block I/O heat from the kernel: loads the eBPF programs, names the devices that belong to images, and drains
//! counts once a second. The arms of [`source::HeatSource`] beside it run without a kernel.
//!
//! This is the only crate that knows aya. It knows no network, no store and no scheduler.

pub mod ebpf;
pub mod export;
pub mod source;
pub mod tally;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trace;

pub use ebpf::{EbpfOptions, EbpfSource};
pub use export::{ExportCounter, ExportSource};
pub use source::{HeatError, HeatSource, ImageWindow, Op, Window};
pub use trace::{TraceReader, TraceSource};
