//! The real daemon with a fault in its store, under libnbd: what a guest is told, and what a restart of the daemon
//! makes of it.

mod daemon_support;
mod nbd_support;
mod store_support;

use std::time::Duration;

use daemon_support::{Daemon, IMAGE, become_daemon};
use nbd_support::have;
use store_support::{LibNbd, Refusal, Request};

const WRITE: Request = Request::Write { fua: false };

/// Not a test by itself: the daemon.
#[test]
fn child_daemon() {
    become_daemon();
}

fn scene(nbd: &mut LibNbd, dir: &std::path::Path, fault: &str) -> Daemon {
    let mut daemon = Daemon::start(dir, |store| {
        store.create(&IMAGE.parse().unwrap(), 1 << 20, 64 << 10).unwrap().id
    });
    assert!(nbd.connect(&daemon.socket(), IMAGE));
    nbd.ask(WRITE, 0, 4096, 1).unwrap();
    nbd.ask(Request::Flush, 0, 0, 0).unwrap();
    daemon.restart_with_fault("child_daemon", fault);
    assert!(nbd.connect(&daemon.socket(), IMAGE));
    daemon
}

#[test]
fn a_flush_that_failed_stays_failed_over_a_restart_of_the_daemon() {
    if !have(&["nbdsh"]) {
        return;
    }
    let mut nbd = LibNbd::start().expect("Debian's Python is there with nbdsh");
    // The attach syncs the data file once.
    for fault in [
        "data-sync eio 1",
        "journal-sync eio 0",
        "data-sync enospc 1",
        "journal-commit short-eio 0",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = scene(&mut nbd, dir.path(), fault);
        nbd.ask(WRITE, 65_536, 4096, 2).unwrap();
        let refused = nbd.ask(Request::Flush, 0, 0, 0);
        assert!(
            matches!(refused, Err(Refusal::Io | Refusal::NoSpace)),
            "{fault}: {refused:?}"
        );
        for again in [Request::Flush, WRITE] {
            assert_eq!(nbd.ask(again, 0, 4096, 3), Err(Refusal::Io), "{fault}: {again:?}");
        }
        // A client that asks again after a reconnect is not told that all is well.
        daemon.die_and_restart(Duration::ZERO);
        assert!(nbd.connect(&daemon.socket(), IMAGE));
        for again in [Request::Flush, WRITE] {
            assert_eq!(
                nbd.ask(again, 0, 4096, 3),
                Err(Refusal::Io),
                "{fault}, restarted: {again:?}"
            );
        }
        for (at, value) in [(0, 1), (65_536, 2)] {
            assert_eq!(nbd.tell(&format!("read {at} 4096 {value}")), "ok", "{fault}: at {at}");
        }
    }
}

#[test]
fn a_write_that_failed_may_be_asked_again() {
    if !have(&["nbdsh"]) {
        return;
    }
    let mut nbd = LibNbd::start().expect("Debian's Python is there with nbdsh");
    for (fault, refusal) in [
        ("data-write eio 0", Refusal::Io),
        ("data-write short-enospc 0", Refusal::NoSpace),
        ("journal-append short-eio 0", Refusal::Io),
        ("journal-reserve enospc 0", Refusal::NoSpace),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = scene(&mut nbd, dir.path(), fault);
        assert_eq!(nbd.ask(WRITE, 65_536, 8192, 2), Err(refusal), "{fault}");
        assert_eq!(
            nbd.tell("read 65536 8192 0"),
            "ok",
            "{fault}: half a write stayed behind"
        );
        nbd.ask(WRITE, 65_536, 4096, 3).unwrap();
        nbd.ask(Request::Flush, 0, 0, 0).unwrap();
        daemon.die_and_restart(Duration::ZERO);
        assert!(nbd.connect(&daemon.socket(), IMAGE));
        for (at, value) in [(0, 1), (65_536, 3), (69_632, 0)] {
            assert_eq!(nbd.tell(&format!("read {at} 4096 {value}")), "ok", "{fault}: at {at}");
        }
    }
}
