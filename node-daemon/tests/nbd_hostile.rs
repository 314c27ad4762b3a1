//! Clients that break the protocol, or keep it to do harm: the server answers, hangs up, or waits, and others are
//! served on.

mod nbd_support;

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_node::disk::Disk;
use hearth_node::export::nbd::NbdLimits;
use hearth_node::export::nbd::memory::{MemoryDisk, OneExport};
use hearth_node::export::nbd::proto::{self, Errno, be16, be32, be64, command, command_flag, option};
use nbd_support::gated::{Gated, IN_RAM_FROM};
use nbd_support::raw::Raw;
use nbd_support::{EXPORT, Served, noise};

const MIB: u64 = 1 << 20;

fn memory() -> Arc<MemoryDisk> {
    Arc::new(MemoryDisk::new(64 * MIB))
}

fn limited(disk: Arc<dyn Disk>, limits: NbdLimits) -> Served {
    Served::with(Arc::new(OneExport::shared(EXPORT, disk)), limits)
}

/// A fresh client is served: whatever went before, the server is well.
fn serves(served: &Served) {
    let mut raw = Raw::transmitting(&served.socket, EXPORT);
    raw.request(command::READ, 0, 9, 0, 512);
    assert_eq!(raw.simple_reply(), (9, 0));
    assert!(raw.receive(512).is_some());
}

#[test]
fn nonsense_before_transmission_ends_that_session_only() {
    let served = Served::new(memory());
    let option = |option: u32, length: u32| {
        [
            &proto::OPTION_MAGIC.to_be_bytes()[..],
            &option.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    };
    let cases: [(&str, Vec<u8>); 6] = [
        ("unknown client flags", vec![0xff; 4]),
        ("no option magic", [&[0, 0, 0, 3][..], &[7; 16]].concat()),
        (
            "an option of 4 GiB",
            [&[0, 0, 0, 3][..], &option(option::GO, u32::MAX)].concat(),
        ),
        (
            "a name of 1 MiB",
            [&[0, 0, 0, 3][..], &option(option::EXPORT_NAME, 1 << 20)].concat(),
        ),
        (
            "an unknown name",
            [&[0, 0, 0, 3][..], &option(option::EXPORT_NAME, 4), b"none"].concat(),
        ),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: hearth\r\n\r\n".to_vec()),
    ];
    for (what, bytes) in cases {
        let mut raw = Raw::greeted(&served.socket);
        raw.send(&bytes);
        raw.hung_up();
        println!("{what}: hung up");
        serves(&served);
    }
    // Cut in the middle of each message.
    for length in [1, 3, 4, 10, 20] {
        let mut raw = Raw::greeted(&served.socket);
        raw.send(&[&[0, 0, 0, 3][..], &option(option::GO, 64)].concat()[..length]);
        raw.socket.shutdown(Shutdown::Write).unwrap();
        raw.hung_up();
    }
    serves(&served);
}

#[test]
fn noise_in_transmission_ends_that_session_only() {
    let served = Served::new(memory());
    for seed in 0..32 {
        let mut raw = Raw::transmitting(&served.socket, EXPORT);
        let mut bytes = noise(seed, 4_096);
        if seed % 2 == 0 {
            // Well-formed heads with random content go deeper.
            for head in bytes.chunks_exact_mut(28) {
                head[..4].copy_from_slice(&proto::REQUEST_MAGIC.to_be_bytes());
                head[6] = 0;
                head[7] %= 9;
                head[16..20].fill(0);
            }
        }
        raw.send(&bytes);
        let _ = raw.socket.shutdown(Shutdown::Write);
        raw.hung_up();
    }
    serves(&served);
    assert_eq!(served.handle.connections_refused(), 0);
}

#[test]
fn requests_out_of_bounds_are_refused_and_the_stream_stays_in_step() {
    let served = Served::new(memory());
    let size = 64 * MIB;
    let mut raw = Raw::transmitting(&served.socket, EXPORT);
    let cases = [
        (command::READ, 0, size, 512, Errno::Inval),
        (command::READ, 0, u64::MAX - 100, 512, Errno::Inval),
        (command::READ, 0, 0, (32 << 20) + 1, Errno::Inval),
        (command::READ, 0, 0, u32::MAX, Errno::Inval),
        (command::READ, command_flag::DF, 0, 512, Errno::Inval),
        (command::TRIM, 0, size - 1, 2, Errno::Inval),
        (command::WRITE_ZEROES, 0, size - 1, 2, Errno::NoSpace),
        (command::WRITE_ZEROES, 1 << 12, 0, 2, Errno::Inval),
        (command::BLOCK_STATUS, 0, 0, 512, Errno::Inval),
        (command::CACHE, 0, 0, u32::MAX, Errno::Inval),
        (77, 0, 0, 0, Errno::Inval),
    ];
    for (cookie, (command, flags, offset, length, errno)) in (0..).zip(cases) {
        raw.request(command, flags, cookie, offset, length);
        raw.refused(cookie, errno);
    }
    // Refused writes: their payload is passed over, up to twice the limit.
    for (cookie, offset, length) in [(100, size, 512), (101, 0, (32 << 20) + 1), (102, u64::MAX, 1 << 20)] {
        raw.request(command::WRITE, 0, cookie, offset, length);
        raw.send(&vec![1; length as usize]);
        let errno = if offset == 0 { Errno::Inval } else { Errno::NoSpace };
        raw.refused(cookie, errno);
    }
    raw.request(command::READ, 0, 103, 0, 0);
    assert_eq!(raw.simple_reply(), (103, 0));
    raw.request(command::WRITE, 0, 104, 0, u32::MAX);
    raw.hung_up();
    serves(&served);
}

#[test]
fn extended_headers_are_spoken() {
    let disk = memory();
    disk.write(65_536, &[5; 100], false).unwrap();
    let served = Served::new(disk);
    let mut contexts = [
        &(EXPORT.len() as u32).to_be_bytes(),
        EXPORT.as_bytes(),
        &1_u32.to_be_bytes(),
    ]
    .concat();
    contexts.extend_from_slice(&15_u32.to_be_bytes());
    contexts.extend_from_slice(b"base:allocation");
    let options = [(option::EXTENDED_HEADERS, vec![]), (option::SET_META_CONTEXT, contexts)];
    let mut raw = Raw::negotiated(&served.socket, EXPORT, &options);
    let request = |command: u16, flags: u16, offset: u64, length: u64| {
        let mut out = proto::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&command.to_be_bytes());
        [7, offset, length]
            .iter()
            .for_each(|n: &u64| out.extend_from_slice(&n.to_be_bytes()));
        out
    };
    let chunk = |raw: &mut Raw| {
        let head = raw.receive(32).expect("a chunk");
        assert_eq!((be32(&head, 0), be64(&head, 8)), (proto::EXTENDED_REPLY_MAGIC, 7));
        let data = raw.receive(be64(&head, 24) as usize).expect("its data");
        (be16(&head, 6), data)
    };
    raw.send(&request(command::READ, 0, 65_530, 16));
    let (kind, data) = chunk(&mut raw);
    assert_eq!(
        (kind, be64(&data, 0), &data[8..]),
        (1, 65_530, &[0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5][..])
    );
    raw.send(
        &[
            request(command::WRITE, command_flag::PAYLOAD_LEN, 0, 4),
            b"four".to_vec(),
        ]
        .concat(),
    );
    assert_eq!(chunk(&mut raw), (0, vec![]));
    raw.send(&request(command::BLOCK_STATUS, 0, 0, 64 * MIB));
    let (kind, data) = chunk(&mut raw);
    assert_eq!((kind, be32(&data, 4)), (6, 2));
    assert_eq!((be64(&data, 8), be64(&data, 16)), (131_072, 0));
    assert_eq!((be64(&data, 24), be64(&data, 32)), (64 * MIB - 131_072, 3));
    // A write without its payload flag, payload where none belongs, and a length beyond 32 bits: all refused.
    raw.send(
        &[
            request(command::TRIM, command_flag::PAYLOAD_LEN, 0, 4),
            b"four".to_vec(),
        ]
        .concat(),
    );
    assert_eq!(be32(&chunk(&mut raw).1, 0), Errno::Inval as u32);
    raw.send(&request(command::WRITE_ZEROES, 0, 0, 1 << 40));
    assert_eq!(be32(&chunk(&mut raw).1, 0), Errno::NoSpace as u32);
    raw.send(&request(command::WRITE, command_flag::PAYLOAD_LEN, 0, 1 << 40));
    raw.hung_up();
    serves(&served);
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4_096
}

#[test]
fn a_client_that_never_reads_gets_back_pressure() {
    let disk = memory();
    disk.write(0, &noise(1, 32 << 20), false).unwrap();
    // Not in RAM, so that replies take buffers.
    (0..disk.blocks()).for_each(|block| disk.set_in_ram(block, false));
    let served = Served::new(disk);
    let before = resident();
    let mut greedy: Vec<Raw> = (0..4).map(|_| Raw::transmitting(&served.socket, EXPORT)).collect();
    for raw in &mut greedy {
        raw.socket.set_nonblocking(true).unwrap();
        let mut sent = 0;
        // Asks for 8 GiB of replies and reads none; the socket fills, and the requests stop being taken.
        for cookie in 0..8_192 {
            match raw
                .socket
                .write(&proto::request_header(command::READ, 0, cookie, 0, 1 << 20))
            {
                Ok(28) => sent += 1,
                _ => break,
            }
        }
        assert!(sent > 64, "{sent}");
    }
    for _ in 0..50 {
        serves(&served);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 4 * (64 + 16) * MIB, "memory grew by {} MiB", grown / MIB);
}

#[test]
fn a_stalled_client_loses_its_memory_to_those_who_wait() {
    let limits = NbdLimits {
        connection_bytes_granted: 64 << 10,
        shared_bytes_max: 4 << 20,
        stall_timeout: Duration::from_millis(200),
        ..NbdLimits::default()
    };
    let served = limited(memory(), limits);
    let mut hoarder = Raw::transmitting(&served.socket, EXPORT);
    // Announces 4 MiB, sends one byte, and holds all shared memory with it.
    hoarder.request(command::WRITE, 0, 1, 0, 4 << 20);
    hoarder.send(&[0]);
    // Small requests do not need the shared part.
    serves(&served);
    let mut other = Raw::transmitting(&served.socket, EXPORT);
    other.request(command::WRITE, 0, 2, 0, 1 << 20);
    other.send(&vec![1; 1 << 20]);
    assert_eq!(other.simple_reply(), (2, 0));
    hoarder.hung_up();
}

#[test]
fn slow_handshakes_and_crowds_are_turned_away() {
    let limits = NbdLimits {
        connections_max: 4,
        handshake_timeout: Duration::from_millis(300),
        ..NbdLimits::default()
    };
    let served = limited(memory(), limits);
    let start = Instant::now();
    let mut idle: Vec<Raw> = (0..4).map(|_| Raw::greeted(&served.socket)).collect();
    // Who comes while all places are taken by dawdlers gets that of the oldest.
    serves(&served);
    assert_eq!(served.handle.connections_refused(), 1);
    idle[0].hung_up();
    idle[1].send(&3_u32.to_be_bytes());
    for raw in &mut idle {
        raw.hung_up();
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    let mut places_free = false;
    while !places_free {
        places_free = served.handle.connections().is_empty();
        std::thread::yield_now();
    }
    // Nobody in transmission is turned out for a newcomer.
    let mut guests: Vec<Raw> = (0..4).map(|_| Raw::transmitting(&served.socket, EXPORT)).collect();
    let mut fifth = Raw {
        socket: UnixStream::connect(&served.socket).unwrap(),
    };
    assert!(fifth.receive(1).is_none(), "the fifth connection is closed at once");
    assert_eq!(served.handle.connections_refused(), 2);
    for guest in &mut guests {
        guest.request(command::READ, 0, 1, 0, 512);
        assert_eq!(guest.simple_reply(), (1, 0));
    }
}

#[test]
fn a_hanging_disk_holds_up_neither_hits_nor_other_connections() {
    let disk = Gated::new(1, false);
    let limits = NbdLimits {
        workers_max: 4,
        workers_per_connection_max: 2,
        ..NbdLimits::default()
    };
    let served = limited(disk.clone(), limits);
    let mut stuck = Raw::transmitting(&served.socket, EXPORT);
    for cookie in 0..100 {
        stuck.request(command::READ, 0, cookie, 0, 512);
    }
    // A hit overtakes on the same connection, a flush on another one still finds a worker.
    stuck.request(command::READ, 0, 1_000, IN_RAM_FROM, 512);
    assert_eq!(stuck.simple_reply(), (1_000, 0));
    stuck.receive(512).unwrap();
    let mut other = Raw::transmitting(&served.socket, EXPORT);
    other.request(command::FLUSH, 0, 5, 0, 0);
    assert_eq!(other.simple_reply(), (5, 0));
    disk.open();
    let mut cookies: Vec<u64> = (0..100)
        .map(|_| {
            let (cookie, errno) = stuck.simple_reply();
            assert_eq!(errno, 0);
            stuck.receive(512).unwrap();
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..100).collect::<Vec<_>>());
}

#[test]
fn failures_below_become_errors_not_hang_ups() {
    let disk = Gated::new(1, true);
    disk.open();
    let served = Served::new(disk);
    let mut raw = Raw::transmitting(&served.socket, EXPORT);
    let cases = [
        (command::FLUSH, 0, Errno::Io),
        (command::TRIM, 512, Errno::Io),
        (command::WRITE_ZEROES, 512, Errno::Shutdown),
        (command::CACHE, 512, Errno::Io),
    ];
    for (cookie, (command, length, errno)) in (0..).zip(cases) {
        raw.request(command, 0, cookie, 0, length);
        raw.refused(cookie, errno);
    }
    serves(&served);
}

#[test]
fn a_client_that_vanishes_takes_its_waiting_requests_with_it() {
    let disk = Gated::new(1, false);
    let served = limited(
        disk.clone(),
        NbdLimits {
            workers_per_connection_max: 2,
            ..NbdLimits::default()
        },
    );
    for _ in 0..8 {
        let mut raw = Raw::transmitting(&served.socket, EXPORT);
        for cookie in 0..200 {
            raw.request(command::READ, 0, cookie, 0, 4_096);
        }
    }
    disk.open();
    while !served.handle.connections().is_empty() {
        std::thread::yield_now();
    }
    serves(&served);
}
