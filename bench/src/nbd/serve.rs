//! The servers under test, each in a process of its own: parts of the node without agent and log.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hearth_node::disk::Disk;
use hearth_node::export::device::{DeviceExports, DeviceOptions};
use hearth_node::export::nbd::{ExportEntry, ExportTable, NbdLimits, NbdServer, SOCKET_MODE, proto};
use hearth_node::store::{Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{NoPeers, Volume};
use hearth_probes::export::{ExportCounter, ExportSource};
use hearth_probes::source::HeatSource;
use hearth_protocol::{ByteLen, Epoch, LeaseId};

const BLOCK_BYTES: u64 = 64 << 10;

/// What is served.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum What {
    /// A new image in a store, all of it in the RAM tier, on an NBD socket
    Memory {
        /// Its unix socket
        socket: PathBuf,
        /// Folder of the store
        store: PathBuf,
    },
    /// A new image in a store, behind a small RAM tier, on an NBD socket
    Volume {
        /// Its unix socket
        socket: PathBuf,
        /// Folder of the store
        store: PathBuf,
    },
    /// A new image in a store, all of it in the RAM tier, as a kernel block device `<folder>/dev/bench/disk`
    Device {
        /// Folder of its links, mounts and store
        folder: PathBuf,
    },
    /// Answers whatever is asked without looking at it: what is left is the load generator's own limit
    Null {
        /// Its unix socket
        socket: PathBuf,
    },
}

/// Serves `size_bytes` until the process is ended.
///
/// # Errors
/// When the socket, the store or the device cannot be had.
pub fn run(what: What, size_bytes: u64) -> Result<()> {
    match what {
        What::Memory { socket, store } => nbd(&socket, in_ram(&store, size_bytes)?),
        What::Volume { socket, store } => nbd(&socket, volume(&store, size_bytes, 8 << 20)?),
        What::Device { folder } => device(&folder, size_bytes),
        What::Null { socket } => null(&socket, size_bytes),
    }
}

/// An image that is written, and then read into a tier that has room for it.
fn in_ram(directory: &Path, size_bytes: u64) -> Result<Arc<Volume>> {
    const STEP: usize = 1 << 20;
    let volume = volume(directory, size_bytes, size_bytes + (64 << 20))?;
    for offset in (0..size_bytes).step_by(STEP) {
        let content = vec![(offset >> 20) as u8 | 1; STEP.min((size_bytes - offset) as usize)];
        volume.write(offset, &content, false)?;
    }
    volume.cache(0, size_bytes)?;
    let held = volume.tier().usage().front.0;
    ensure!(held == size_bytes, "{held} of {size_bytes} bytes are in RAM");
    Ok(volume)
}

fn volume(directory: &Path, size_bytes: u64, ram_bytes: u64) -> Result<Arc<Volume>> {
    let store = Arc::new(Store::open(directory, StoreOptions::default())?);
    let tier = RamTier::new(TierOptions {
        capacity_bytes: ram_bytes,
        front_percent: 25,
        lock: false,
    })?;
    let image = store.create(&"bench/disk".parse()?, size_bytes, BLOCK_BYTES)?.id;
    Ok(Volume::attach(
        store,
        tier,
        image,
        Epoch(1),
        LeaseId(1),
        Arc::new(NoPeers),
    )?)
}

/// One counted export under every name.
struct OneExport(ExportEntry);

impl ExportTable for OneExport {
    fn find(&self, _: &str) -> Option<ExportEntry> {
        Some(self.0.clone())
    }

    fn list(&self, _: &str, _: usize) -> Vec<String> {
        Vec::new() // every name is served
    }
}

/// As in service: requests are counted as heat, and the counts taken once a second.
#[tokio::main(flavor = "current_thread")]
async fn nbd<D: Disk + 'static>(socket: &Path, disk: Arc<D>) -> Result<()> {
    let server = NbdServer::bind_unix(socket, SOCKET_MODE)?;
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
    let entry = ExportEntry::new(disk).counted(counter);
    let shutdown = async { drop(tokio::signal::ctrl_c().await) };
    server
        .run(Arc::new(OneExport(entry)), NbdLimits::default(), shutdown)
        .await?;
    Ok(())
}

fn device(folder: &Path, size_bytes: u64) -> Result<()> {
    let exports = DeviceExports::new(DeviceOptions::new(folder.join("dev"), folder.join("mounts")))?;
    let name = "bench/disk".parse()?;
    exports.attach(&name, in_ram(&folder.join("store"), size_bytes)?)?;
    // The caller closes this process's input to have the device taken away.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    exports.detach(&name)?;
    Ok(())
}

/// Knows the greeting, one option and reads of 4 KiB.
fn null(path: &Path, size_bytes: u64) -> Result<()> {
    const READ_BYTES: usize = 4_096;
    let listener = UnixListener::bind(path).with_context(|| format!("binding {}", path.display()))?;
    for socket in listener.incoming() {
        let mut socket = socket?;
        let mut greeting = [proto::INIT_MAGIC.to_be_bytes(), proto::OPTION_MAGIC.to_be_bytes()].concat();
        greeting.extend([0, 3]);
        // A caller that only looks whether the socket is open hangs up here.
        if socket.write_all(&greeting).is_err() || socket.read_exact(&mut [0; 4 + 16 + 6]).is_err() {
            continue;
        }
        let mut information = proto::info::EXPORT.to_be_bytes().to_vec();
        information.extend(size_bytes.to_be_bytes());
        information.extend([0, 1]);
        for (kind, data) in [
            (proto::option_reply::INFO, &information[..]),
            (proto::option_reply::ACK, &[]),
        ] {
            let mut reply = proto::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            reply.extend(proto::option::GO.to_be_bytes());
            reply.extend(kind.to_be_bytes());
            reply.extend((data.len() as u32).to_be_bytes());
            reply.extend(data);
            socket.write_all(&reply)?;
        }
        let mut input = vec![0; 28 * 256];
        let mut output = vec![0; (16 + READ_BYTES) * 256];
        let mut filled = 0;
        loop {
            let got = socket.read(&mut input[filled..])?;
            if got == 0 {
                break;
            }
            filled += got;
            let whole = filled / 28;
            for (request, reply) in input
                .chunks_exact(28)
                .zip(output.chunks_exact_mut(16 + READ_BYTES))
                .take(whole)
            {
                reply[..4].copy_from_slice(&proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
                reply[8..16].copy_from_slice(&request[8..16]);
            }
            if socket.write_all(&output[..whole * (16 + READ_BYTES)]).is_err() {
                break;
            }
            input.copy_within(whole * 28..filled, 0);
            filled -= whole * 28;
        }
    }
    Ok(())
}
