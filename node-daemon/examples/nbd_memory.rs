//! Serves a disk in memory over NBD until it is interrupted: the server alone, for measurements against other servers.
//!
//! `cargo run --release --example nbd_memory -- SOCKET [MIB] [miss]`. The disk is full of data; with `miss` no read is
//! answered in line, so that the way through the workers is measured.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::{NbdLimits, NbdServer, SOCKET_MODE};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let mut arguments = std::env::args().skip(1);
    let path: PathBuf = arguments
        .next()
        .context("usage: nbd_memory SOCKET [MIB] [miss]")?
        .into();
    let mib: u64 = arguments
        .next()
        .map_or(Ok(256), |text| text.parse())
        .context("MIB is a number")?;
    let miss = arguments.next().is_some_and(|word| word == "miss");
    let disk = MemoryDisk::new(mib << 20);
    for block in 0..disk.blocks() {
        disk.write((block as u64) << 16, &[block as u8; 64 << 10], false)?;
        disk.set_in_ram(block, !miss);
    }
    let server = NbdServer::bind_unix(&path, SOCKET_MODE)?;
    let shutdown = async { drop(tokio::signal::ctrl_c().await) };
    let limits = NbdLimits {
        io_threads: 1,
        ..NbdLimits::default()
    };
    server.run(Arc::new(OneExport::new("", disk)), limits, shutdown).await?;
    Ok(())
}
