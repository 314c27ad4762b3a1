//! What the store allows and refuses: names, shapes, clones, snapshots, deletion, import, leftovers.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::{Parent, Store, StoreError, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::{BlockSource, NoPeers, Volume, map_of};
use hearth_protocol::rpc::FailureKind;
use hearth_protocol::{Epoch, ImageId, ImageName, LayerId, LeaseId};

const BLOCK: u64 = 64 << 10;

fn open(dir: &Path) -> Arc<Store> {
    Arc::new(Store::open(dir, StoreOptions::default()).unwrap())
}

fn tier() -> Arc<RamTier> {
    RamTier::new(TierOptions {
        capacity_bytes: 4 << 20,
        front_percent: 25,
        lock: false,
    })
    .unwrap()
}

fn attach(store: &Arc<Store>, image: ImageId, epoch: u64) -> Result<Arc<Volume>, StoreError> {
    let lease = LeaseId(epoch.into());
    Volume::attach(store.clone(), tier(), image, Epoch(epoch), lease, Arc::new(NoPeers))
}

fn name(text: &str) -> ImageName {
    text.parse().unwrap()
}

#[track_caller]
fn refused<T>(result: Result<T, StoreError>, kind: FailureKind, says: &str) {
    let err = result.err().expect("this must be refused");
    assert_eq!(err.kind(), kind, "{err}");
    assert!(err.to_string().contains(says), "{err}");
}

#[test]
fn two_daemons_cannot_open_one_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    refused(
        Store::open(dir.path(), StoreOptions::default()),
        FailureKind::Refused,
        "open in another process",
    );
    drop(store);
    open(dir.path());
}

#[test]
fn names_sizes_and_block_sizes_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    store.create(&name("p/a"), 1 << 20, BLOCK).unwrap();
    refused(
        store.create(&name("p/a"), 1 << 20, BLOCK),
        FailureKind::Conflict,
        "exists already",
    );
    for (size, block) in [
        (0, BLOCK),
        (5000, BLOCK),
        (1 << 60, BLOCK),
        (1 << 20, 5000),
        (1 << 20, 8 << 20),
        (16 << 40, 4096),
    ] {
        refused(store.create(&name("p/b"), size, block), FailureKind::Usage, "use ");
    }
    assert_eq!(store.images().len(), 1);
}

#[test]
fn an_image_is_attached_once_and_never_under_an_older_right() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = store.create(&name("p/a"), 1 << 20, BLOCK).unwrap().id;
    let volume = attach(&store, id, 5).unwrap();
    refused(attach(&store, id, 6), FailureKind::Refused, "detach it first");
    volume.detach().unwrap();
    volume.detach().unwrap();
    assert!(matches!(volume.write(0, &[1], false), Err(DiskError::ShuttingDown)));
    refused(attach(&store, id, 4), FailureKind::Usage, "epoch");
    let other = Volume::attach(store.clone(), tier(), id, Epoch(5), LeaseId(77), Arc::new(NoPeers));
    refused(other, FailureKind::Usage, "epoch");
    attach(&store, id, 6).unwrap().detach().unwrap();
    assert_eq!(store.image(id).unwrap().record.epoch, Epoch(6));
}

#[test]
fn deletion_respects_clones_and_gives_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let golden = store.create(&name("p/golden"), 4 << 20, BLOCK).unwrap().id;
    let volume = attach(&store, golden, 1).unwrap();
    refused(store.delete(golden), FailureKind::Refused, "detach");
    refused(
        store.snapshot(golden, &"v1".parse().unwrap()),
        FailureKind::Refused,
        "detach",
    );
    volume.write(0, &vec![9; 1 << 20], false).unwrap();
    volume.snapshot(&"v1".parse().unwrap()).unwrap();
    assert!(matches!(
        volume.snapshot(&"v1".parse().unwrap()),
        Err(StoreError::Exists { .. })
    ));
    volume.write(0, &[5; 4096], false).unwrap();
    volume.detach().unwrap();

    let clone = store
        .clone_image(golden, &"v1".parse().unwrap(), &name("p/clone"))
        .unwrap();
    assert_eq!(store.allocated(clone.id).unwrap(), 0);
    refused(
        store.clone_image(golden, &"v2".parse().unwrap(), &name("p/x")),
        FailureKind::NotFound,
        "no snapshot v2",
    );
    refused(store.delete(golden), FailureKind::Refused, "p/clone");
    let sealed = store.sealed_layers();
    assert_eq!(sealed, [clone.stack[1]]);
    assert!(store.layer_allocated(sealed[0]).unwrap() >= 1 << 20);

    let volume = attach(&store, clone.id, 1).unwrap();
    let mut buf = [0; 4096];
    volume.read(0, &mut buf).unwrap();
    assert_eq!(buf, [9; 4096], "the clone sees the snapshot, not what came after it");
    volume.detach().unwrap();

    assert_eq!(store.delete(clone.id).unwrap(), [clone.stack[0]]);
    assert_eq!(store.delete(golden).unwrap().len(), 2);
    assert!(store.sealed_layers().is_empty());
    assert_eq!(std::fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
    refused(store.delete(golden), FailureKind::NotFound, "no image");
}

#[test]
fn what_a_crash_left_over_is_removed_and_what_is_foreign_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let kept = store.create(&name("p/a"), 1 << 20, BLOCK).unwrap();
    let torn = store.create(&name("p/b"), 1 << 20, BLOCK).unwrap();
    drop(store);
    std::fs::remove_file(dir.path().join("images").join(torn.id.to_string()).join("meta")).unwrap();
    std::fs::write(dir.path().join("layers").join("notes.txt"), "mine").unwrap();
    let store = open(dir.path());
    assert_eq!(store.images(), [kept]);
    assert!(!dir.path().join("layers").join(torn.top().to_string()).exists());
    assert!(!dir.path().join("images").join(torn.id.to_string()).exists());
    assert!(dir.path().join("layers").join("notes.txt").exists());
}

#[test]
fn a_damaged_image_is_named_and_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let image = store.create(&name("p/a"), 1 << 20, BLOCK).unwrap();
    let bitmap = dir.path().join("layers").join(image.top().to_string()).join("bitmap");
    let mut bytes = std::fs::read(&bitmap).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&bitmap, bytes).unwrap();
    refused(attach(&store, image.id, 1), FailureKind::Failed, "bitmap is damaged");
    refused(attach(&store, image.id, 1), FailureKind::Failed, "bitmap is damaged");
}

#[test]
fn growing_keeps_the_content_and_reads_zero_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Not a whole number of blocks, so that the old end lies within one.
    let small = BLOCK + 8192;
    let id = store.create(&name("p/a"), small, BLOCK).unwrap().id;
    let volume = attach(&store, id, 1).unwrap();
    volume.write(0, &vec![4; small as usize], false).unwrap();
    volume.detach().unwrap();
    refused(store.grow(id, 4096), FailureKind::Refused, "cannot shrink");
    let large = 4 * BLOCK;
    store.grow(id, large).unwrap();
    let volume = attach(&store, id, 2).unwrap();
    assert_eq!(volume.size_bytes(), large);
    volume.write(small + 100, &[6; 10], false).unwrap();
    let mut buf = vec![1; large as usize];
    volume.read(0, &mut buf).unwrap();
    assert!(buf[..small as usize].iter().all(|b| *b == 4));
    let mut rest = vec![0; (large - small) as usize];
    rest[100..110].fill(6);
    assert!(buf[small as usize..] == rest);
}

#[test]
fn import_takes_raw_disks_and_says_what_else_it_was_given() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("store"));
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(40 << 20).unwrap();
    file.write_all_at(&vec![7; 100_000], 3 << 20).unwrap();
    file.write_all_at(&vec![0; 1 << 20], 20 << 20).unwrap();
    file.write_all_at(&[8; 512], (40 << 20) - 512).unwrap();
    let mut heard = Vec::new();
    let meta = store
        .import(&name("p/i"), &path, BLOCK, &mut |done, all| {
            heard.push((done, all));
            true
        })
        .unwrap();
    assert!(heard.windows(2).all(|w| w[0].0 <= w[1].0) && heard.last() == Some(&(40 << 20, 40 << 20)));
    assert!(
        store.allocated(meta.id).unwrap() <= 4 * BLOCK,
        "holes and zeros take no space"
    );
    let expect = std::fs::read(&path).unwrap();
    let volume = attach(&store, meta.id, 1).unwrap();
    let mut got = vec![1; expect.len()];
    volume.read(0, &mut got).unwrap();
    assert!(got == expect);
    assert!(volume.recovery().is_none());

    let stopped = store.import(&name("p/s"), &path, BLOCK, &mut |done, _| done == 0);
    assert!(stopped.unwrap_err().to_string().contains("stopped"));
    let cases: [(&[u8], &str); 5] = [
        (b"", "it is empty"),
        (b"QFI\xfb and the rest", "qemu-img convert"),
        (b"\x1f\x8b gzip", "unpack it first"),
        (b"half a sector", "truncated"),
        (&[1; 700], "truncated"),
    ];
    for (bytes, says) in cases {
        let path = dir.path().join("bad");
        std::fs::write(&path, bytes).unwrap();
        refused(
            store.import(&name("p/bad"), &path, BLOCK, &mut |_, _| true),
            FailureKind::Usage,
            says,
        );
    }
    refused(
        store.import(&name("p/bad"), dir.path(), BLOCK, &mut |_, _| true),
        FailureKind::Usage,
        "neither",
    );
    let cut = path.clone();
    let shrunk = store.import(&name("p/bad"), &path, BLOCK, &mut |_, _| {
        std::fs::OpenOptions::new()
            .write(true)
            .open(&cut)
            .unwrap()
            .set_len(30 << 20)
            .unwrap();
        true
    });
    refused(shrunk, FailureKind::Usage, "meanwhile");
    drop(volume);
    let layers = std::fs::read_dir(dir.path().join("store/layers")).unwrap().count();
    assert_eq!(
        (store.images().len(), layers),
        (1, 1),
        "failed imports leave nothing behind"
    );
    // 512-byte sectors that are no whole pages are padded.
    std::fs::write(dir.path().join("odd"), vec![3; 4096 + 512]).unwrap();
    let odd = store
        .import(&name("p/odd"), &dir.path().join("odd"), BLOCK, &mut |_, _| true)
        .unwrap();
    assert_eq!(odd.size, 8192);
}

/// Serves a sealed layer of one store to another, as a peer would.
struct Peer(Arc<Volume>, LayerId);

impl BlockSource for Peer {
    fn read_block(&self, layer: LayerId, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        assert_eq!(layer, self.1);
        self.0.read(offset, buf)
    }
}

#[test]
fn a_clone_of_a_layer_on_another_node_reads_through_and_keeps_what_it_writes() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let remote = open(there.path());
    let golden = remote.create(&name("p/golden"), 1 << 20, BLOCK).unwrap().id;
    let volume = attach(&remote, golden, 1).unwrap();
    volume.write(0, &vec![9; 1 << 20], false).unwrap();
    volume.snapshot(&"v0".parse().unwrap()).unwrap();
    volume.write(BLOCK, &[8; 512], false).unwrap();
    let meta = volume.snapshot(&"v1".parse().unwrap()).unwrap();
    let layer = meta.snapshots[1].layer;
    let sealed = Volume::open_sealed(remote.clone(), tier(), layer, Arc::new(NoPeers)).unwrap();
    assert!(sealed.is_read_only() && matches!(sealed.write(0, &[1], false), Err(DiskError::ReadOnly(_))));
    sealed.flush().unwrap();

    let store = open(here.path());
    let parent = Parent {
        image: golden,
        name: name("p/golden"),
        snapshot: "v1".parse().unwrap(),
    };
    let clone = store
        .clone_remote(&name("p/clone"), 1 << 20, BLOCK, meta.stack[1..].to_vec(), parent)
        .unwrap();
    let peer = Arc::new(Peer(sealed, layer));
    let volume = Volume::attach(store.clone(), tier(), clone.id, Epoch(1), LeaseId(1), peer).unwrap();
    let mut expect = vec![9; 1 << 20];
    expect[BLOCK as usize..BLOCK as usize + 512].fill(8);
    volume.write(2 * BLOCK + 10, &[1; 5], false).unwrap();
    expect[2 * BLOCK as usize + 10..2 * BLOCK as usize + 15].fill(1);
    let mut got = vec![0; 1 << 20];
    volume.read(0, &mut got).unwrap();
    assert!(got == expect);
    let words: Vec<_> = volume.map().iter().map(|r| (r.first.0, r.count, r.layer)).collect();
    assert!(words.contains(&(2, 1, Some(clone.top()))), "{words:?}");
    assert!(volume.counters().remote_bytes > 0);
    // Promotion of a remote layer's block brings it into this node's RAM.
    let done = volume
        .promote(layer, &[hearth_protocol::BlockIndex(5)], Epoch(0), u64::MAX)
        .unwrap();
    assert_eq!(done.done.len(), 1);
    assert!(volume.try_read_ram(5 * BLOCK, &mut [0; 4096]));
    volume.detach().unwrap();
    let (meta, layers) = store.look_at(clone.id).unwrap();
    assert_eq!(
        map_of(layers, meta.size, meta.block_size, &tier())
            .iter()
            .map(|r| r.count)
            .sum::<u64>(),
        16
    );
}

#[test]
fn one_damaged_image_leaves_the_others_and_all_layers_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let golden = store.create(&name("p/golden"), 1 << 20, BLOCK).unwrap().id;
    store.snapshot(golden, &"v1".parse().unwrap()).unwrap();
    let clone = store
        .clone_image(golden, &"v1".parse().unwrap(), &name("p/clone"))
        .unwrap();
    drop(store);
    let meta = dir.path().join("images").join(clone.id.to_string()).join("meta");
    let good = std::fs::read(&meta).unwrap();
    let layers = || std::fs::read_dir(dir.path().join("layers")).unwrap().count();
    let before = layers();
    for bad in [&good[..good.len() / 2], b"", b"\x7fELF"] {
        std::fs::write(&meta, bad).unwrap();
        let store = open(dir.path());
        let damaged = store.damaged();
        assert_eq!(damaged.len(), 1);
        assert_eq!(damaged[0].0, clone.id);
        let words = damaged[0].1.to_string();
        assert!(words.contains("damaged") && words.contains("restore it"), "{words}");
        assert_eq!(layers(), before, "a layer of the damaged image went");
        refused(attach(&store, clone.id, 1), FailureKind::Failed, "is damaged");
        attach(&store, golden, 1).unwrap().detach().unwrap();
        assert_eq!(std::fs::read(&meta).unwrap(), bad, "the evidence was changed");
    }
    // A parent that is deleted meanwhile leaves its layers, whoever may stand on them.
    let store = open(dir.path());
    assert_eq!(store.delete(golden).unwrap(), []);
    assert_eq!(layers(), before);
    // Restored, it is an image again without a restart.
    std::fs::write(&meta, &good).unwrap();
    attach(&store, clone.id, 1).unwrap().detach().unwrap();
    assert!(store.damaged().is_empty());
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.images().len(), 1);
    assert!(layers() < before, "what nobody uses goes once all is known");
}
