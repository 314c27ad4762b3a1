//! Every input that fuzzing kept, and every one that once was a finding, through the bodies of the fuzz targets
//! (`fuzz/bodies`), which say what must hold.

#[path = "../../fuzz/bodies/nbd.rs"]
mod nbd;
#[path = "../../fuzz/bodies/store.rs"]
mod store;

use std::path::Path;

/// Runs all inputs of a target's corpus; says how many.
fn replay(target: &str, run: fn(&[u8])) -> usize {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut count = 0;
    for entry in entries {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&std::fs::read(&path).unwrap());
        count += 1;
    }
    count
}

#[test]
fn nbd_sessions_replay() {
    assert!(replay("nbd", nbd::run) > 10);
}

#[test]
fn store_metadata_replays() {
    assert!(replay("store", store::run) > 10);
}
