//! Serves a disk in memory over NBD until it is interrupted: the server alone, for measurements against other servers.
//!
//! `cargo run --release --example nbd_memory -- SOCKET [MIB] [miss]`. The disk is full of data and its requests are
//! counted as heat; with `miss` no read is answered in line, so that the way through the workers is measured.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::MemoryDisk;
use hearth_node::export::nbd::{ExportEntry, ExportTable, NbdLimits, NbdServer, SOCKET_MODE};
use hearth_probes::export::{ExportCounter, ExportSource};
use hearth_probes::source::HeatSource;
use hearth_protocol::ByteLen;

/// One counted export under every name.
struct Table(ExportEntry);

impl ExportTable for Table {
    fn find(&self, _: &str) -> Option<ExportEntry> {
        Some(self.0.clone())
    }

    fn list(&self) -> Vec<String> {
        vec![String::new()]
    }
}

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
    let counter = ExportCounter::new(disk.image(), ByteLen(disk.block_size_bytes()));
    let mut source = ExportSource::new();
    source.register(Arc::clone(&counter));
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if let Err(error) = source.drain() {
                tracing::warn!(%error, "cannot drain the counters");
            }
        }
    });
    let entry = ExportEntry::new(Arc::new(disk)).counted(counter);
    server.run(Arc::new(Table(entry)), limits, shutdown).await?;
    Ok(())
}
