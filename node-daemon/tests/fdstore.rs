//! The descriptor holder: what is left with it comes back, to one owner at a time. Needs no root.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use hearth_node::export::fdstore::{ENTRIES_MAX, FdStore, FdStoreError, METADATA_BYTES_MAX, NAME_BYTES_MAX};
use tempfile::TempDir;

fn holder() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hearth-fd-holder"))
}

fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("holder.sock");
    (folder, socket)
}

fn file_with(text: &str) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn text_of(fd: std::os::fd::OwnedFd) -> String {
    let mut file = File::from(fd);
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn what_is_stored_comes_back_with_its_note() {
    let (_folder, socket) = folder();
    let store = FdStore::connect_or_start(&socket, holder()).unwrap();
    store.store("a", file_with("first").as_fd(), "note one").unwrap();
    store.store("b", file_with("second").as_fd(), "").unwrap();
    store.store("a", file_with("newer").as_fd(), "note two").unwrap();
    assert_eq!(store.list("").unwrap(), ["a", "b"]);
    assert_eq!(store.list("b").unwrap(), ["b"]);
    let kept = store.take("a").unwrap().unwrap();
    assert_eq!(
        (kept.metadata.as_str(), text_of(kept.fd).as_str()),
        ("note two", "newer")
    );
    assert!(store.take("a").unwrap().is_some(), "it stays until removed");
    store.remove("a").unwrap();
    store.remove("a").unwrap();
    assert!(store.take("a").unwrap().is_none());
    store.remove("b").unwrap();
}

/// Scripts and units wait for the socket's name: from then on nobody may be refused.
#[test]
fn whoever_finds_the_socket_is_answered() {
    for _ in 0..100 {
        let (_folder, socket) = folder();
        let mut child = Command::new(holder())
            .arg("--socket")
            .arg(&socket)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while !socket.exists() {
            assert!(child.try_wait().unwrap().is_none(), "the holder ended");
            std::hint::spin_loop();
        }
        let found = FdStore::connect(&socket).map(drop);
        child.kill().unwrap();
        child.wait().unwrap();
        found.unwrap();
    }
}

#[test]
fn an_entry_changes_hands_only_when_its_owner_is_gone() {
    let (_folder, socket) = folder();
    let first = FdStore::connect_or_start(&socket, holder()).unwrap();
    first.store("a", file_with("text").as_fd(), "").unwrap();
    let second = FdStore::connect(&socket).unwrap();
    let stolen = second.store("a", file_with("other").as_fd(), "").unwrap_err();
    assert!(stolen.to_string().contains("another living process"), "{stolen}");
    assert!(second.remove("a").is_err());
    // Waits until the first connection is closed.
    let taker = thread::spawn(move || {
        let kept = second.take("a").unwrap().unwrap();
        second.remove("a").unwrap();
        kept
    });
    assert_eq!(first.list("").unwrap(), ["a"]);
    drop(first);
    assert_eq!(text_of(taker.join().unwrap().fd), "text");
}

#[test]
fn many_entries_are_listed_and_limits_are_kept() {
    let (_folder, socket) = folder();
    let store = FdStore::connect_or_start(&socket, holder()).unwrap();
    let file = file_with("");
    let refused = |result: Result<(), FdStoreError>| matches!(result, Err(FdStoreError::Refused { .. }));
    assert!(refused(store.store("", file.as_fd(), "")));
    assert!(refused(store.store("line\nbreak", file.as_fd(), "")));
    assert!(refused(store.store(&"n".repeat(NAME_BYTES_MAX + 1), file.as_fd(), "")));
    assert!(refused(store.store(
        "a",
        file.as_fd(),
        &"m".repeat(METADATA_BYTES_MAX + 1)
    )));
    let pad = "\"".repeat(NAME_BYTES_MAX - 4);
    let names: Vec<String> = (0..ENTRIES_MAX).map(|i| format!("{i:04}{pad}")).collect();
    for name in &names {
        store.store(name, file.as_fd(), "").unwrap();
    }
    assert!(refused(store.store("one more", file.as_fd(), "")));
    assert_eq!(store.list("").unwrap(), names);
    for name in &names {
        store.remove(name).unwrap();
    }
}

#[test]
fn a_holder_ends_when_it_is_not_used_and_there_is_only_one() {
    let (_folder, socket) = folder();
    let start = || {
        let mut child: Child = Command::new(holder())
            .args([Path::new("--socket"), &socket, Path::new("--exit-when-unused")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        let is_ready = child.stdout.as_mut().unwrap().read_exact(&mut ready).is_ok();
        (child, is_ready)
    };
    let (mut first, ready) = start();
    assert!(ready);
    let (second, ready) = start();
    let second = second.wait_with_output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(
        !ready && !second.status.success() && said.contains("another descriptor holder"),
        "{said}"
    );

    let store = FdStore::connect(&socket).unwrap();
    store.store("a", file_with("").as_fd(), "").unwrap();
    drop(store);
    // Nobody is connected, but it holds something.
    let store = FdStore::connect(&socket).unwrap();
    assert!(store.take("a").unwrap().is_some());
    store.remove("a").unwrap();
    drop(store);
    assert!(first.wait().unwrap().success());
    assert!(!socket.exists());
    let gone = FdStore::connect(&socket).unwrap_err();
    assert!(gone.to_string().contains("hearth-fd-holder --socket"), "{gone}");
}
