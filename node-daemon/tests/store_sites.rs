//! The store changes nothing on disk but through `store/os.rs`, where every call names its site for the fault arm.

use std::fs;
use std::path::{Path, PathBuf};

use hearth_node::store::fault::Site;

/// How Rust code changes files. Names, not meanings: this is a net, not a proof.
const CHANGES: [&str; 24] = [
    "fs::write",
    "fs::rename",
    "fs::remove",
    "fs::create",
    "fs::copy",
    "fs::hard_link",
    "fs::set_permissions",
    "File::create",
    "OpenOptions",
    ".write_all(",
    ".write_all_at(",
    ".write_at(",
    ".write_vectored(",
    ".sync_all(",
    ".sync_data(",
    ".set_len(",
    "fallocate(",
    "ftruncate(",
    "pwrite",
    "writev",
    "fsync(",
    "fdatasync(",
    "unlink",
    "renameat",
];

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

/// Lines of a source file without its tests.
fn product(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned()
}

fn bypasses(path: &Path, text: &str) -> Vec<String> {
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        // A call that names its site goes through.
        .filter(|(_, line)| !line.contains("(Site::"))
        .filter(|(_, line)| CHANGES.iter().any(|change| line.contains(change)))
        .map(|(i, line)| format!("{}:{}: {}", path.display(), i + 1, line.trim()))
        .collect()
}

#[test]
fn every_change_on_disk_goes_through_the_fault_arm() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let os = src.join("store/os.rs");
    let mut files: Vec<_> = sources(&src.join("store"));
    files.extend(sources(&src.join("volume")));
    files.extend(["served.rs", "peers.rs", "gone.rs", "node.rs"].map(|name| src.join("agent").join(name)));
    assert!(files.len() > 20 && files.contains(&os));
    let found: Vec<_> = files
        .iter()
        .filter(|path| **path != os)
        .flat_map(|path| bypasses(path, &product(path)))
        .collect();
    assert!(
        found.is_empty(),
        "changes that the fault arm cannot reach:\n{}",
        found.join("\n")
    );
    // The net catches what it is for.
    assert!(bypasses(&os, &product(&os)).len() > 8);
}

#[test]
fn every_site_is_used() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&src.join("store"));
    let text: String = files
        .iter()
        .filter(|path| !path.ends_with("fault.rs"))
        .map(|path| product(path))
        .collect();
    for site in Site::ALL {
        assert!(
            text.contains(&format!("Site::{site:?}")),
            "no call names the site {site}"
        );
    }
}
