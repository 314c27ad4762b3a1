//! What the store allows and refuses with replicas, and how their record and their failure outlive the daemon.

mod store_support;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::fault::{Arm, Failure, Faults, Site};
use hearth_node::store::{ImageMeta, NewReplica, Replica, Store, StoreError};
use hearth_node::volume::{MemberVolume, NoPeers, Volume};
use hearth_protocol::rpc::FailureKind;
use hearth_protocol::{BlockIndex, Epoch, ImageId, LayerId, LeaseId};
use store_support::replica::{IMAGE, LAYER, Node, attach_member, durable, extent, new_replica, tier};
use store_support::{fast_dir, open, read_all};

const BLOCK: u64 = 64 << 10;
const SIZE: u64 = 16 * BLOCK;
const SHAPE: (u64, u64) = (SIZE, BLOCK);

fn none() -> Faults {
    Faults::default()
}

fn armed(site: Site, failure: Failure, skip: u64) -> (Faults, Arc<Arm>) {
    let arm = Arc::new(Arm::new(site, failure, skip, false));
    let hook = arm.clone();
    (Faults::hook(move |call| hook.answer(call)), arm)
}

#[track_caller]
fn refused<T>(result: Result<T, StoreError>, kind: FailureKind, says: &str) {
    let err = result.err().expect("this must be refused");
    assert_eq!(err.kind(), kind, "{err}");
    assert!(err.to_string().contains(says), "{err}");
}

/// Ends a store with nothing open.
fn end(store: Arc<Store>) {
    while Arc::strong_count(&store) > 1 {
        std::thread::yield_now();
    }
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

fn write(member: &MemberVolume, block: u64, value: u8) -> Result<(), DiskError> {
    member.marks.before_write(extent(block, block), member.incarnation)?;
    member.volume.write(block * BLOCK, &[value; BLOCK as usize], false)
}

#[test]
fn a_replica_is_made_under_given_ids_once() {
    let dir = fast_dir();
    let store = open(dir.path(), 1, none());
    let new = new_replica(SIZE, BLOCK, Some(durable(1)));
    let meta = store.create_replica(&new).unwrap();
    assert_eq!((meta.id, meta.stack.as_slice()), (IMAGE, [LAYER].as_slice()));
    store.put_durable(IMAGE, &durable(2)).unwrap();
    // Again: it is what it is, with what its member kept since.
    assert_eq!(store.create_replica(&new).unwrap(), meta);
    let kept = || Some(Replica { durable: durable(2) });
    assert_eq!(store.replica(IMAGE), kept());
    for other in [
        NewReplica {
            size: 2 * SIZE,
            ..new.clone()
        },
        NewReplica {
            block_size: 4096,
            ..new.clone()
        },
        NewReplica {
            layer: LayerId(9),
            ..new.clone()
        },
        NewReplica {
            name: "p/other".parse().unwrap(),
            ..new.clone()
        },
    ] {
        refused(store.create_replica(&other), FailureKind::Usage, "take this node out");
    }
    let plain = store.create(&"p/plain".parse().unwrap(), SIZE, BLOCK).unwrap();
    let twin = NewReplica {
        image: ImageId(5),
        layer: LayerId(6),
        ..new.clone()
    };
    refused(store.create_replica(&twin), FailureKind::Conflict, "exists already");
    let named = NewReplica {
        name: "p/new".parse().unwrap(),
        ..twin.clone()
    };
    refused(
        store.create_replica(&NewReplica {
            image: plain.id,
            ..named.clone()
        }),
        FailureKind::Refused,
        "without replicas",
    );
    refused(
        store.create_replica(&NewReplica {
            layer: plain.top(),
            ..named.clone()
        }),
        FailureKind::Usage,
        "another image's",
    );
    refused(
        store.create_replica(&NewReplica {
            block_size: 5000,
            ..named.clone()
        }),
        FailureKind::Usage,
        "power of two",
    );
    assert_eq!(store.images().len(), 2);
    // A directory that a failed creation could not remove is in nobody's way.
    fs::create_dir(dir.path().join("layers").join(LayerId(6).to_string())).unwrap();
    store.create_replica(&named).unwrap();
    let (images, store) = (store.images(), {
        drop(store);
        open(dir.path(), 2, none())
    });
    assert_eq!(store.images(), images, "durable when they were made");
    assert_eq!(store.replica(IMAGE), kept());
    assert_eq!(store.replica(plain.id), None);
    assert_eq!(store.replica(ImageId(5)), Some(Replica { durable: durable(1) }));
}

#[test]
fn a_replica_is_served_changed_and_deleted_only_through_its_members() {
    let dir = fast_dir();
    let store = open(dir.path(), 1, none());
    store
        .create_replica(&new_replica(SIZE, BLOCK, Some(durable(1))))
        .unwrap();
    let says = "by way of its members";
    let attached = Volume::attach(store.clone(), tier(), IMAGE, Epoch(7), LeaseId(7), Arc::new(NoPeers));
    refused(attached, FailureKind::Refused, says);
    refused(
        store.snapshot(IMAGE, &"v1".parse().unwrap()),
        FailureKind::Refused,
        says,
    );
    refused(store.grow(IMAGE, 2 * SIZE), FailureKind::Refused, says);
    refused(store.delete(IMAGE), FailureKind::Refused, says);
    let member = attach_member(&store).unwrap();
    refused(
        member.volume.snapshot(&"v1".parse().unwrap()),
        FailureKind::Refused,
        says,
    );
    refused(member.volume.grow(2 * SIZE), FailureKind::Refused, says);
    refused(attach_member(&store), FailureKind::Refused, "detach it first");
    refused(store.forget_replica(IMAGE), FailureKind::Refused, "detach it first");
    write(&member, 3, 9).unwrap();
    member.volume.detach().unwrap();
    drop(member);

    let plain = store.create(&"p/plain".parse().unwrap(), SIZE, BLOCK).unwrap().id;
    let says = "is here without replicas";
    refused(store.open_replica(plain), FailureKind::Refused, says);
    refused(store.put_durable(plain, &durable(1)), FailureKind::Refused, says);
    refused(store.forget_replica(plain), FailureKind::Refused, says);
    refused(store.open_replica(ImageId(77)), FailureKind::NotFound, "no image");
    store.delete(plain).unwrap();

    store.forget_replica(IMAGE).unwrap();
    assert_eq!((store.images().len(), store.replica(IMAGE)), (0, None));
    assert_eq!(
        entries(&dir.path().join("images")) + entries(&dir.path().join("layers")),
        0
    );
    refused(store.put_durable(IMAGE, &durable(2)), FailureKind::NotFound, "no image");
    refused(store.forget_replica(IMAGE), FailureKind::NotFound, "no image");
    // Made anew, it has nothing of what it was.
    let node = Node {
        member: {
            store.create_replica(&new_replica(SIZE, BLOCK, None)).unwrap();
            attach_member(&store).unwrap()
        },
        store,
    };
    assert!(node.member.marks.found().is_empty() && node.member.durable == Default::default());
    assert!(read_all(&node.member.volume).iter().all(|byte| *byte == 0));
}

#[test]
fn the_metadata_of_an_image_without_replicas_is_as_it_was() {
    let dir = fast_dir();
    let store = open(dir.path(), 1, none());
    let plain = store.create(&"p/plain".parse().unwrap(), SIZE, BLOCK).unwrap();
    let path = |id: ImageId| dir.path().join("images").join(id.to_string()).join("meta");
    let body = |id| {
        let file = fs::read(path(id)).unwrap();
        let at = file.iter().position(|byte| *byte == b'\n').unwrap();
        file[at + 1..].to_vec()
    };
    assert_eq!(body(plain.id), plain.encode());
    assert!(!String::from_utf8(plain.encode()).unwrap().contains("replica"));
    assert_eq!(Replica::decode(Path::new("x"), &plain.encode()).unwrap(), None);
    let replica = store
        .create_replica(&new_replica(SIZE, BLOCK, Some(durable(4))))
        .unwrap();
    assert_eq!(ImageMeta::decode(Path::new("x"), &body(IMAGE)).unwrap(), replica);
    let found = Replica::decode(Path::new("x"), &body(IMAGE)).unwrap();
    assert_eq!(found, Some(Replica { durable: durable(4) }));
    // A record that is not one: the image is damaged, and looked at again once it is restored.
    let good = fs::read(path(IMAGE)).unwrap();
    drop(store);
    fs::write(path(IMAGE), &good[..good.len() / 2]).unwrap();
    let store = open(dir.path(), 1, none());
    refused(store.open_replica(IMAGE), FailureKind::Failed, "is damaged");
    refused(store.put_durable(IMAGE, &durable(5)), FailureKind::Failed, "is damaged");
    refused(
        store.create_replica(&new_replica(SIZE, BLOCK, None)),
        FailureKind::Failed,
        "is damaged",
    );
    fs::write(path(IMAGE), &good).unwrap();
    assert_eq!(attach_member(&store).unwrap().durable, durable(4));
}

/// Opening, closing and notes of failures replace the same file as the record does.
#[test]
fn no_other_change_of_the_metadata_brings_an_older_record_back() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SHAPE, none());
    node.store.put_durable(IMAGE, &durable(1)).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let putter = {
        let (store, stop) = (node.store.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut last = 1;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                last += 1;
                store.put_durable(IMAGE, &durable(last)).unwrap();
            }
            last
        })
    };
    node.member.volume.detach().unwrap();
    for _ in 0..100 {
        let member = attach_member(&node.store).unwrap();
        write(&member, 1, 1).unwrap();
        member.volume.detach().unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let last = putter.join().unwrap();
    assert!(last > 2, "{last} records");
    assert_eq!(node.store.replica(IMAGE), Some(Replica { durable: durable(last) }));
    node.die();
    let node = Node::start(dir.path(), 1, SHAPE, none());
    assert_eq!(node.member.durable, durable(last));
    assert!(!node.member.failed);
}

#[test]
fn a_record_is_replaced_whole_or_the_replica_is_closed() {
    for (site, closes) in [
        (Site::ImageMetaCreate, false),
        (Site::ImageMetaWrite, false),
        (Site::ImageMetaSync, false),
        (Site::ImageMetaRename, false),
        (Site::ImageDirSync, true),
    ] {
        for failure in [Failure::Eio, Failure::Enospc] {
            for attached in [false, true] {
                let what = format!("{site}, {failure:?}, attached: {attached}");
                let dir = fast_dir();
                {
                    let store = open(dir.path(), 1, none());
                    store
                        .create_replica(&new_replica(SIZE, BLOCK, Some(durable(1))))
                        .unwrap();
                }
                // Opening replaces the metadata too.
                let skip = match (attached, site) {
                    (true, Site::ImageMetaWrite | Site::ImageDirSync) => 2,
                    (true, _) => 1,
                    (false, _) => 0,
                };
                let (faults, arm) = armed(site, failure, skip);
                let store = open(dir.path(), 1, faults);
                let member = attached.then(|| attach_member(&store).unwrap());
                store.put_durable(IMAGE, &durable(2)).unwrap_err();
                assert_eq!(arm.fired(), 1, "{what}");
                assert_eq!(store.replica(IMAGE), Some(Replica { durable: durable(1) }), "{what}");
                let again = store.put_durable(IMAGE, &durable(3));
                assert_eq!(again.is_err(), closes, "{what}: {again:?}");
                if let Some(member) = &member {
                    assert_eq!(write(member, 0, 1).is_err(), closes, "{what}");
                }
                drop(member);
                end(store);
                let store = open(dir.path(), 1, none());
                let member = attach_member(&store).unwrap();
                assert_eq!(member.failed, closes, "{what}");
                assert_eq!(member.durable, durable(if closes { 1 } else { 3 }), "{what}");
            }
        }
    }
}

#[test]
fn a_replica_whose_disk_failed_takes_no_writes_until_it_is_forgotten() {
    // How the daemon ends behind the failure, and whether the power fails then.
    for (orderly, power_loss) in [(true, false), (false, false), (true, true)] {
        let dir = fast_dir();
        let (faults, _) = armed(Site::DataSync, Failure::Eio, 3);
        let node = Node::start(dir.path(), 1, SHAPE, faults);
        write(&node.member, 0, 1).unwrap();
        node.member.volume.flush().unwrap();
        node.member.marks.unmark(&[BlockIndex(0)].into());
        write(&node.member, 1, 2).unwrap();
        node.member.volume.flush().unwrap_err();
        assert!(matches!(write(&node.member, 2, 3), Err(DiskError::Poisoned(_))));
        if orderly {
            node.member.volume.detach().unwrap();
        }
        node.die();
        for life in 1..4 {
            let node = Node::start(dir.path(), if power_loss { life } else { 1 }, SHAPE, none());
            assert!(node.member.failed, "orderly: {orderly}, power loss: {power_loss}");
            assert!(node.store.image(IMAGE).is_ok());
            assert!(matches!(write(&node.member, 2, 3), Err(DiskError::Poisoned(_))));
            assert!(matches!(node.member.volume.flush(), Err(DiskError::Poisoned(_))));
            // Its marks tell of a power loss, if there was one.
            let lives: Vec<_> = node.member.marks.found().into_values().collect();
            assert!(lives.len() == 16 && lives.iter().all(|life| life.0 == 1), "{lives:?}");
            refused(
                node.store.put_durable(IMAGE, &durable(9)),
                FailureKind::Failed,
                "add it again once its disk is sound",
            );
            // An end in order repairs nothing.
            node.member.volume.detach().unwrap();
            node.die();
        }
        let store = open(dir.path(), 1, none());
        store.forget_replica(IMAGE).unwrap();
        store.create_replica(&new_replica(SIZE, BLOCK, None)).unwrap();
        let member = attach_member(&store).unwrap();
        assert!(!member.failed && member.marks.found().is_empty());
        write(&member, 0, 4).unwrap();
        member.volume.flush().unwrap();
        member.volume.detach().unwrap();
    }
}

#[test]
fn what_was_promoted_is_valid_for_one_epoch() {
    let dir = fast_dir();
    let node = Node::start(dir.path(), 1, SHAPE, none());
    let volume = &node.member.volume;
    write(&node.member, 0, 5).unwrap();
    let promoted = |epoch| volume.promote(LAYER, &[BlockIndex(0)], Epoch(epoch), u64::MAX);
    assert_eq!(volume.epoch(), Epoch(0));
    assert_eq!(promoted(0).unwrap().done.len(), 1);
    let mut buf = [0; 4096];
    assert!(volume.try_read_ram(0, &mut buf));
    volume.set_epoch(Epoch(3));
    assert_eq!(volume.epoch(), Epoch(3));
    assert!(!volume.try_read_ram(0, &mut buf));
    assert!(promoted(0).unwrap_err().contains("grows under epoch 3"));
    assert_eq!(promoted(3).unwrap().done.len(), 1);
    assert!(volume.try_read_ram(0, &mut buf) && buf == [5; 4096]);
    // The epoch of the record is where it begins.
    node.store.put_durable(IMAGE, &durable(8)).unwrap();
    node.die();
    let node = Node::start(dir.path(), 1, SHAPE, none());
    assert_eq!(node.member.volume.epoch(), Epoch(8));
}

/// The death of the daemon takes nothing, that of the machine what was not flushed; marks tell both apart.
#[test]
fn a_replica_comes_back_from_a_crash_as_an_image_does() {
    for power_loss in [false, true] {
        let dir = fast_dir();
        let node = Node::start(dir.path(), 1, SHAPE, none());
        write(&node.member, 0, 1).unwrap();
        node.member.volume.flush().unwrap();
        node.member.marks.unmark(&[BlockIndex(0)].into());
        write(&node.member, 1, 2).unwrap();
        node.die();
        let node = Node::start(dir.path(), 1 + u128::from(power_loss), SHAPE, none());
        let got = read_all(&node.member.volume);
        assert!(got[..BLOCK as usize].iter().all(|byte| *byte == 1));
        let second = if power_loss { 0 } else { 2 };
        assert!(
            got[BLOCK as usize..2 * BLOCK as usize]
                .iter()
                .all(|byte| *byte == second)
        );
        assert!(node.member.volume.recovery().is_some() && !node.member.failed);
        let lost = node
            .member
            .marks
            .found()
            .values()
            .any(|life| *life != node.member.incarnation);
        assert_eq!(lost, power_loss);
    }
}
