//! A replica's life with one fault.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use hearth_node::disk::{Disk, DiskError};
use hearth_node::store::fault::{Arm, Failure, Faults, Site};
use hearth_node::store::{Store, StoreError, StoreOptions};
use hearth_node::volume::MemberVolume;
use hearth_protocol::Incarnation;

use super::replica::{IMAGE, attach_member, durable, extent, new_replica, set};
use super::{fast_dir, open};
use hearth_node::store::REGION_BYTES;

const BLOCK: u64 = REGION_BYTES / 2;
const SIZE: u64 = 6 * REGION_BYTES;

/// How far a call came that is all or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Unasked,
    Asked,
    Done,
}

/// What the calls that returned promised.
#[derive(Debug)]
struct Promised {
    made: Call,
    forgotten: Call,
    epochs: BTreeSet<u64>,
    marked: BTreeSet<u64>,
}

fn write(member: &MemberVolume, first: u64, last: u64, promised: &mut Promised) -> Result<(), DiskError> {
    member.marks.before_write(extent(first, last), member.incarnation)?;
    promised.marked.extend(first..=last);
    member.volume.write(first * BLOCK, &[7; 4096], false)
}

fn everywhere(member: &MemberVolume, blocks: &[u64], promised: &mut Promised) -> Result<(), DiskError> {
    member.volume.flush()?;
    member.marks.unmark(&set(blocks.iter().copied()));
    promised.marked.retain(|block| !blocks.contains(block));
    Ok(())
}

fn live(dir: &Path, faults: Faults, promised: &mut Promised) -> Result<(), String> {
    let store_said = |err: StoreError| err.to_string();
    let disk_said = |err: DiskError| err.to_string();
    let options = StoreOptions {
        incarnation: Some(Incarnation(1)),
        faults,
    };
    let store = Arc::new(Store::open(dir, options).map_err(store_said)?);
    promised.made = Call::Asked;
    store
        .create_replica(&new_replica(SIZE, BLOCK, Some(durable(1))))
        .map_err(store_said)?;
    promised.made = Call::Done;
    let member = attach_member(&store).map_err(store_said)?;
    promised.epochs.insert(2);
    store.put_durable(IMAGE, &durable(2)).map_err(store_said)?;
    promised.epochs = [2].into();
    write(&member, 0, 0, promised).map_err(disk_said)?;
    write(&member, 2, 5, promised).map_err(disk_said)?;
    everywhere(&member, &[0, 2, 3, 4], promised).map_err(disk_said)?;
    write(&member, 8, 8, promised).map_err(disk_said)?;
    everywhere(&member, &[8], promised).map_err(disk_said)?;
    member.volume.detach().map_err(disk_said)?;
    drop(member);
    let member = attach_member(&store).map_err(store_said)?;
    write(&member, 10, 10, promised).map_err(disk_said)?;
    drop(member);
    promised.forgotten = Call::Asked;
    store.forget_replica(IMAGE).map_err(store_said)?;
    promised.forgotten = Call::Done;
    Ok(())
}

/// Plays it with one fault. Says whether that was met.
pub fn replicate(site: Site, failure: Failure, skip: u64, for_good: bool) -> bool {
    let what = format!("a replica, {site}, {failure:?} after {skip}, for good: {for_good}");
    let dir = fast_dir();
    let arm = Arc::new(Arm::new(site, failure, skip, for_good));
    let hook = arm.clone();
    let mut promised = Promised {
        made: Call::Unasked,
        forgotten: Call::Unasked,
        epochs: [1].into(),
        marked: BTreeSet::new(),
    };
    let result = live(dir.path(), Faults::hook(move |call| hook.answer(call)), &mut promised);
    if arm.fired() == 0 {
        result.unwrap_or_else(|err| panic!("{what}: failed although nothing did: {err}"));
        return false;
    }
    let silent = failure == Failure::Short || site == Site::Discard;
    assert_eq!(result.is_ok(), silent, "{what}: {result:?}");
    if let (Err(text), Failure::Enospc | Failure::ShortEnospc) = (&result, failure) {
        assert!(
            ["no space", "No space", "takes no more writes"]
                .iter()
                .any(|says| text.contains(says)),
            "{what}: {text}"
        );
    }

    // The daemon or the machine died behind it.
    let power_loss = skip % 2 == 1;
    let store = open(dir.path(), if power_loss { 2 } else { 1 }, Faults::default());
    let member = match attach_member(&store) {
        Ok(member) => member,
        Err(StoreError::NoImage(_)) => {
            let gone = promised.made != Call::Done || promised.forgotten != Call::Unasked;
            assert!(gone, "{what}: it is gone");
            for sub in ["images", "layers"] {
                let left = std::fs::read_dir(dir.path().join(sub)).unwrap().count();
                assert_eq!(left, 0, "{what}: {sub} left over");
            }
            return true;
        }
        Err(err) => panic!("{what}: {err}"),
    };
    assert_ne!(promised.forgotten, Call::Done, "{what}: it came back");
    let has = promised.epochs.iter().any(|epoch| member.durable == durable(*epoch));
    assert!(has, "{what}: it has {:?}, of {:?}", member.durable, promised.epochs);
    let found = member.marks.found();
    for block in &promised.marked {
        assert!(
            found.keys().any(|found| found.0 == *block),
            "{what}: block {block} is not marked any more"
        );
    }
    assert!(found.values().all(|life| *life == Incarnation(1)), "{what}: {found:?}");
    if !power_loss && matches!(site, Site::MarksAppendSync | Site::JournalSync) {
        assert!(member.failed, "{what}: a failed sync is forgotten");
    }
    if !member.failed {
        member.volume.detach().unwrap();
    }
    drop(member);
    store.forget_replica(IMAGE).unwrap();
    true
}
