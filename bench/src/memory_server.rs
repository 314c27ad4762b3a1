//! Serves a disk in memory over NBD until it is interrupted: the server alone, without store and log.
//!
//! The disk is full of data, every read is answered in line, and requests are counted as heat, as in service.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
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

/// Serves `size` bytes on the unix socket `path`.
///
/// # Errors
/// When the socket cannot be had.
#[tokio::main(flavor = "current_thread")]
pub async fn run(path: &Path, size: u64) -> Result<()> {
    let disk = MemoryDisk::new(size);
    for block in 0..disk.blocks() {
        disk.write((block as u64) << 16, &[block as u8; 64 << 10], false)?;
        disk.set_in_ram(block, true);
    }
    let server = NbdServer::bind_unix(path, SOCKET_MODE)?;
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
                eprintln!("cannot drain the counters: {error}");
            }
        }
    });
    let entry = ExportEntry::new(Arc::new(disk)).counted(counter);
    server.run(Arc::new(Table(entry)), limits, shutdown).await?;
    Ok(())
}
