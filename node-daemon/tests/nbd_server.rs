//! The server's life: sockets that stay over restarts, detach, good-byes, counted heat.

mod nbd_support;

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use hearth_node::disk::Disk;
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::proto::{Errno, command};
use hearth_node::export::nbd::{ExportEntry, ExportTable, Listener, NbdError, NbdLimits, NbdServer, page};
use hearth_probes::export::{ExportCounter, ExportSource};
use hearth_probes::source::HeatSource;
use hearth_protocol::{ByteLen, ImageId};
use nbd_support::gated::{Gated, IN_RAM_FROM};
use nbd_support::raw::Raw;
use nbd_support::{EXPORT, Served};

const MIB: u64 = 1 << 20;

fn table(disk: Arc<dyn Disk>) -> Arc<dyn ExportTable> {
    Arc::new(OneExport::shared(EXPORT, disk))
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nbd.sock");
    drop(UnixListener::bind(&path).unwrap()); // dead: the file stays
    let listener = Listener::unix(&path, 0o660).unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
    assert!(matches!(Listener::unix(&path, 0o660), Err(NbdError::InUse { .. })));
    drop(listener);
    assert!(!path.exists(), "the daemon that made it removes it");
    let foreign = UnixListener::bind(&path).unwrap();
    assert!(matches!(Listener::unix(&path, 0o660), Err(NbdError::InUse { .. })));
    drop(foreign);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Listener::unix(&path, 0o660), Err(NbdError::NotSocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn only_loopback_is_served_without_tls() {
    assert!(matches!(
        Listener::tcp("0.0.0.0:0".parse().unwrap()),
        Err(NbdError::NotLoopback { .. })
    ));
    let open = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    assert!(matches!(
        Listener::from_fd(OwnedFd::from(open)),
        Err(NbdError::NotLoopback { .. })
    ));
    let connected = UnixStream::pair().unwrap().0;
    assert!(matches!(
        Listener::from_fd(OwnedFd::from(connected)),
        Err(NbdError::Inherited { .. })
    ));
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    assert!(listener.place().starts_with("tcp:127.0.0.1:"));
}

#[test]
fn a_listening_socket_outlives_its_server() {
    let disk = Arc::new(MemoryDisk::new(MIB));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("held.sock");
    let holder = UnixListener::bind(&path).unwrap();
    for round in 0..3_u8 {
        let server = NbdServer::from_fd(OwnedFd::from(holder.try_clone().unwrap())).unwrap();
        let own = tempfile::tempdir().unwrap();
        let mut served = Served::start(own, path.clone(), server, table(disk.clone()), NbdLimits::default());
        let mut raw = Raw::transmitting(&path, EXPORT);
        raw.request(command::WRITE, 0, 1, u64::from(round), 1);
        raw.send(&[round + 1]);
        assert_eq!(raw.simple_reply(), (1, 0));
        served.stop();
        raw.hung_up();
        assert!(path.exists());
    }
    // Nobody accepts now, yet nobody is refused: the client waits in the queue for the next daemon.
    let early = UnixStream::connect(&path).unwrap();
    let server = NbdServer::from_fd(OwnedFd::from(holder)).unwrap();
    let own = tempfile::tempdir().unwrap();
    let served = Served::start(own, path.clone(), server, table(disk.clone()), NbdLimits::default());
    let mut early = Raw { socket: early };
    assert_eq!(&early.receive(8).unwrap(), b"NBDMAGIC");
    let mut bytes = [0; 3];
    disk.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3]);
    drop(served);
}

/// Two images under two names.
struct Two(Arc<Gated>, Arc<Gated>);

impl ExportTable for Two {
    fn find(&self, name: &str) -> Option<ExportEntry> {
        match name {
            "p/one" => Some(ExportEntry::new(self.0.clone())),
            "p/two" => Some(ExportEntry::new(self.1.clone())),
            // What peers see of the first image: its sealed layers.
            "p/one-sealed" => Some(ExportEntry::new(self.0.clone()).read_only()),
            _ => None,
        }
    }

    fn list(&self, after: &str, max: usize) -> Vec<String> {
        page(["p/one".into(), "p/two".into()].into_iter(), after, max)
    }
}

#[test]
fn detach_finishes_what_is_in_flight_refuses_the_rest_and_spares_others() {
    let two = Two(Gated::new(1, false), Gated::new(2, false));
    let one = two.0.clone();
    let served = Served::with(Arc::new(two), NbdLimits::default());
    let mut client = Raw::transmitting(&served.socket, "p/one");
    let mut bystanders = ["p/two", "p/one-sealed"].map(|name| Raw::transmitting(&served.socket, name));
    client.request(command::WRITE, 0, 1, 0, 4);
    client.send(b"four");
    one.wait_reached();
    let closing = std::thread::spawn({
        let handle = served.handle.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(handle.close_export(ImageId(1)));
        }
    });
    // Once the connection knows, it refuses what is new; until then it serves it.
    let mut cookie = 2;
    loop {
        client.request(command::READ, 0, cookie, IN_RAM_FROM, 4);
        match client.simple_reply() {
            (found, 0) => {
                assert_eq!(found, cookie);
                client.receive(4).unwrap();
            }
            refused => {
                assert_eq!(refused, (cookie, Errno::Shutdown as u32));
                break;
            }
        }
        cookie += 1;
    }
    assert!(!closing.is_finished(), "a write is still in flight");
    one.open();
    assert_eq!(client.simple_reply(), (1, 0), "the write in flight is answered");
    client.hung_up();
    closing.join().unwrap();
    assert_eq!(one.peek(0, 4), b"four");
    for bystander in &mut bystanders {
        bystander.request(command::READ, 0, 7, IN_RAM_FROM, 4);
        assert_eq!(bystander.simple_reply(), (7, 0));
    }
    assert_eq!(served.handle.connections().len(), 2);
}

#[test]
fn a_stop_answers_what_is_in_flight_and_refuses_nothing() {
    let two = Two(Gated::new(1, false), Gated::new(2, false));
    let one = two.0.clone();
    let mut served = Served::with(Arc::new(two), NbdLimits::default());
    let mut client = Raw::transmitting(&served.socket, "p/one");
    client.request(command::WRITE, 0, 1, 0, 4);
    client.send(b"four");
    one.wait_reached();
    let release = std::thread::spawn({
        let (one, socket) = (one.clone(), served.socket.clone());
        move || {
            // The socket's file goes when the server stops accepting.
            while socket.exists() {
                std::thread::yield_now();
            }
            one.open();
        }
    });
    served.stop();
    release.join().unwrap();
    assert_eq!(client.simple_reply(), (1, 0));
    client.hung_up();
}

#[test]
fn a_good_bye_waits_for_its_replies() {
    let gated = Gated::new(1, false);
    let served = Served::new(gated.clone());
    let mut client = Raw::transmitting(&served.socket, EXPORT);
    client.request(command::WRITE, 0, 1, 0, 4);
    client.send(b"four");
    client.request(command::DISC, 0, 2, 0, 0);
    client.request(command::READ, 0, 3, 0, 4); // after the good-bye: not looked at
    gated.wait_reached();
    gated.open();
    assert_eq!(client.simple_reply(), (1, 0));
    client.hung_up();
}

/// A counted export.
struct Counted(Arc<MemoryDisk>, Arc<ExportCounter>);

impl ExportTable for Counted {
    fn find(&self, _: &str) -> Option<ExportEntry> {
        Some(ExportEntry::new(self.0.clone()).counted(self.1.clone()))
    }

    fn list(&self, _: &str, _: usize) -> Vec<String> {
        Vec::new()
    }
}

#[test]
fn every_request_is_counted_once_whichever_way_it_goes() {
    let disk = Arc::new(MemoryDisk::new(MIB));
    disk.set_in_ram(1, false);
    let counter = ExportCounter::new(disk.image(), ByteLen(64 << 10));
    let source = ExportSource::new();
    source.register(Arc::clone(&counter));
    let served = Served::with(Arc::new(Counted(disk, counter)), NbdLimits::default());
    let mut client = Raw::transmitting(&served.socket, EXPORT);
    let requests = [
        (command::READ, 0, 4_096),       // block 0, a hit
        (command::READ, 65_536, 4_096),  // block 1, a miss
        (command::READ, 61_440, 8_192),  // both
        (command::WRITE, 131_072, 4),    // block 2
        (command::TRIM, 196_608, 512),   // block 3
        (command::FLUSH, 0, 0),          // none
        (command::CACHE, 0, 4_096),      // none
        (command::READ, 2 * MIB, 4_096), // refused, none
    ];
    for (cookie, (command, offset, length)) in (0..).zip(requests) {
        client.request(command, 0, cookie, offset, length);
        if command == command::WRITE {
            client.send(&vec![1; length as usize]);
        }
        let (_, errno) = client.simple_reply();
        if command == command::READ && errno == 0 {
            client.receive(length as usize).unwrap();
        }
    }
    let mut source = source;
    let window = source.drain().unwrap();
    let image = &window.images[0];
    let counts: Vec<_> = image
        .blocks
        .iter()
        .map(|b| (b.block.get(), b.reads, b.writes))
        .collect();
    assert_eq!(counts, [(0, 2, 0), (1, 2, 0), (2, 0, 1), (3, 0, 1)]);
    assert_eq!((image.read_latency.len(), image.write_latency.len()), (3, 2));
}
