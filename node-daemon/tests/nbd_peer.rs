//! The peer client against the server it is made for.

mod nbd_support;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::{ExportName, NbdLimits, NbdServer};
use hearth_node::peer::{PeerClient, PeerError, PeerLimits, PeerPool};
use hearth_protocol::LayerId;
use nbd_support::{Served, noise};

const MIB: u64 = 1 << 20;
const LAYER: LayerId = LayerId(0xabc);

fn quick() -> PeerLimits {
    PeerLimits {
        request_timeout: Duration::from_millis(500),
        read_timeout: Duration::from_secs(2),
        retry_delay_min: Duration::from_millis(5),
        retry_delay_max: Duration::from_millis(50),
        ..PeerLimits::default()
    }
}

fn layer_disk() -> (Arc<MemoryDisk>, Vec<u8>) {
    let bytes = noise(4, 48 << 20);
    let disk = MemoryDisk::new(48 * MIB);
    disk.write(0, &bytes, false).unwrap();
    (Arc::new(disk), bytes)
}

fn serve(disk: &Arc<MemoryDisk>) -> Served {
    let name = ExportName::sealed_layer(LAYER).to_string();
    Served::with(Arc::new(OneExport::shared(&name, disk.clone())), NbdLimits::default())
}

fn address(served: &Served) -> String {
    format!("unix:{}", served.socket.display())
}

fn export() -> String {
    ExportName::sealed_layer(LAYER).to_string()
}

#[test]
fn reads_are_true_at_any_offset_and_length_from_many_threads() {
    let (disk, bytes) = layer_disk();
    (0..disk.blocks())
        .step_by(2)
        .for_each(|block| disk.set_in_ram(block, false));
    let served = serve(&disk);
    let client = PeerClient::connect(&address(&served), &export()).unwrap();
    assert_eq!(client.size().unwrap(), 48 * MIB);
    let mut all = vec![0; 48 << 20]; // longer than one request may be
    client.read(0, &mut all).unwrap();
    assert!(all == bytes);
    thread::scope(|scope| {
        for seed in 0..16_usize {
            let (client, bytes) = (&client, &bytes);
            scope.spawn(move || {
                for step in 0..50 {
                    let offset = (seed * 1_000_003 + step * 7_777_777) % (47 << 20);
                    let mut buf = vec![0; 1 + (seed * step * 131) % 100_000];
                    client.read(offset as u64, &mut buf).unwrap();
                    assert!(buf == bytes[offset..offset + buf.len()]);
                }
            });
        }
    });
    assert!(served.handle.connections().len() <= PeerLimits::default().connections_max);
}

#[test]
fn tcp_works_like_unix() {
    let (disk, bytes) = layer_disk();
    let server = NbdServer::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let place = server.places()[0].clone();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("none");
    let table = Arc::new(OneExport::shared(&export(), disk));
    let _served = Served::start(directory, socket, server, table, NbdLimits::default());
    let client = PeerClient::connect(&place, &export()).unwrap();
    let mut buf = vec![0; 100_000];
    client.read(12_345, &mut buf).unwrap();
    assert!(buf == bytes[12_345..112_345]);
}

#[test]
fn a_peer_that_comes_back_is_found_again() {
    let (disk, bytes) = layer_disk();
    let mut served = serve(&disk);
    let address = address(&served);
    let pool = PeerPool::new(quick(), move |_| vec![address.clone()]);
    let mut buf = vec![0; 4_096];
    pool.read(LAYER, 0, &mut buf).unwrap();
    served.stop();
    let error = pool.read(LAYER, 0, &mut buf).unwrap_err().to_string();
    assert!(error.contains("from its peers"), "{error}");
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buf = vec![0; 4_096];
            pool.read(LAYER, 8_192, &mut buf).map(|()| buf)
        });
        // The same path, a new server: the read above waits for it.
        let server = NbdServer::bind_unix(&served.socket, 0o660).unwrap();
        let own = tempfile::tempdir().unwrap();
        let table = Arc::new(OneExport::shared(&export(), disk.clone()));
        let _again = Served::start(own, served.socket.clone(), server, table, NbdLimits::default());
        assert!(reader.join().unwrap().unwrap() == bytes[8_192..12_288]);
    });
}

#[test]
fn the_next_peer_is_asked_when_one_fails_or_refuses() {
    let (disk, bytes) = layer_disk();
    let good = serve(&disk);
    // Serves something else under another name.
    let wrong = Served::new(disk.clone());
    let addresses = [
        "unix:/nonexistent/hearth.sock".to_owned(),
        "nonsense".to_owned(),
        address(&wrong),
        address(&good),
    ];
    let pool = PeerPool::new(quick(), move |_| addresses.to_vec());
    for _ in 0..20 {
        let mut buf = vec![0; 4_096];
        pool.read(LAYER, 4_096, &mut buf).unwrap();
        assert!(buf == bytes[4_096..8_192]);
    }
    assert!(wrong.handle.connections().is_empty());
}

#[test]
fn nobody_to_ask_is_an_error_in_time() {
    let resolved = Arc::new(Mutex::new(0));
    let pool = PeerPool::new(quick(), {
        let resolved = resolved.clone();
        move |layer| {
            assert_eq!(layer, LAYER);
            *resolved.lock().unwrap() += 1;
            Vec::new()
        }
    });
    let start = Instant::now();
    let error = pool.read(LAYER, 0, &mut [0; 512]).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5));
    let hearth_node::disk::DiskError::Io { source, .. } = error else {
        panic!("{error}")
    };
    assert!(source.to_string().contains("no node announces"), "{source}");
    assert!(*resolved.lock().unwrap() > 1, "asked again while waiting");
}

#[test]
fn hostile_and_silent_servers_are_survived() {
    let directory = tempfile::tempdir().unwrap();
    let scripts: [(&str, Vec<u8>); 5] = [
        ("silent", vec![]),
        ("not NBD", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        (
            "old",
            [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &[0; 200]].concat(),
        ),
        (
            "endless option reply",
            [
                &b"NBDMAGICIHAVEOPT\x00\x03"[..],
                &0x0003_e889_0455_65a9_u64.to_be_bytes(),
                &7_u32.to_be_bytes(),
                &3_u32.to_be_bytes(),
                &u32::MAX.to_be_bytes(),
            ]
            .concat(),
        ),
        (
            "no size",
            [
                &b"NBDMAGICIHAVEOPT\x00\x03"[..],
                &0x0003_e889_0455_65a9_u64.to_be_bytes(),
                &7_u32.to_be_bytes(),
                &1_u32.to_be_bytes(),
                &0_u32.to_be_bytes(),
            ]
            .concat(),
        ),
    ];
    for (place, (what, script)) in scripts.into_iter().enumerate() {
        let path = directory.path().join(format!("{place}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let _ = socket.write_all(&script);
            let _ = socket.read_to_end(&mut Vec::new()); // until the client gives up
        });
        let parsed = format!("unix:{}", path.display()).parse().unwrap();
        let client = PeerClient::lazy(parsed, &export(), quick());
        let start = Instant::now();
        let error = client.try_read(0, &mut [0; 512]).unwrap_err();
        println!("{what}: {error}");
        assert!(
            matches!(error, PeerError::Broken { .. } | PeerError::Protocol(_)),
            "{what}: {error}"
        );
        assert!(
            matches!(client.try_read(0, &mut [0; 512]), Err(PeerError::BackingOff { .. })),
            "{what}"
        );
        assert!(start.elapsed() < Duration::from_secs(3), "{what}");
        server.join().unwrap();
    }
}
