//! Two nodes' data paths with real stores and real sockets, and a log in memory between them: what one owner writes is on
//! both, a dead member is left out, and who is fenced off serves nothing more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use hearth_node::disk::{Begun, Change, Disk, DiskError};
use hearth_node::export::nbd::{ExportEntry, ExportTable, Listener, NbdLimits, NbdServer, PeerDoor, SOCKET_MODE};
use hearth_node::peer::Links;
use hearth_node::replica::image::Around;
use hearth_node::replica::{Notice, Opening, Pool, Replica, Replicas, ReplicatedDisk};
use hearth_node::store::{NewReplica, Store, StoreOptions};
use hearth_node::tier::{RamTier, TierOptions};
use hearth_node::volume::NoPeers;
use hearth_protocol::aggregate::Aggregate;
use hearth_protocol::record::{Extent, Nodes};
use hearth_protocol::{BlockIndex, ImageId, LayerId, LeaseId, NodeId, SetVersion};
use hearth_replication::member::Durable;
use hearth_replication::session::Input;
use tempfile::TempDir;
use tokio::sync::broadcast;

const IMAGE: ImageId = ImageId(7);
const BLOCK: u64 = 64 << 10;
const BLOCKS: u64 = 64;
const PAGE: u64 = 4 << 10;
const WITHIN: Duration = Duration::from_secs(20);

fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

struct Door(Arc<Links>);

impl ExportTable for Door {
    fn find(&self, _name: &str) -> Option<ExportEntry> {
        None
    }

    fn list(&self, _after: &str, _max: usize) -> Vec<String> {
        Vec::new()
    }

    fn peers(&self) -> Option<&dyn PeerDoor> {
        Some(&*self.0)
    }
}

/// One node's data path.
struct Host {
    replicas: Arc<Replicas>,
    runtime: Option<tokio::runtime::Runtime>,
}

type Hosts = Arc<Mutex<BTreeMap<NodeId, Arc<Replicas>>>>;

/// The nodes, and the log between them.
struct Pair {
    dir: TempDir,
    hosts: BTreeMap<NodeId, Host>,
    known: Hosts,
    log: Arc<Mutex<Aggregate>>,
}

impl Pair {
    fn new(members: &[&str]) -> Self {
        let nodes: Nodes = members.iter().map(|name| node(name)).collect();
        let log = Aggregate::new(SetVersion(1), nodes).unwrap();
        let mut pair = Self {
            dir: tempfile::tempdir().unwrap(),
            hosts: BTreeMap::new(),
            known: Hosts::default(),
            log: Arc::new(Mutex::new(log)),
        };
        members.iter().for_each(|name| pair.start(name));
        for name in members {
            let durable = Durable {
                record: Some(pair.log.lock().unwrap().record.clone()),
                sealed: None,
            };
            pair.prepare(name, Some(durable));
        }
        pair
    }

    fn prepare(&self, name: &str, durable: Option<Durable>) {
        let new = NewReplica {
            image: IMAGE,
            name: "appl/vm-1".parse().unwrap(),
            size: BLOCKS * BLOCK,
            block_size: BLOCK,
            layer: LayerId(9),
            durable,
        };
        let replica = self.hosts[&node(name)].replicas.prepare(&new).unwrap();
        replica.step(Input::Rebased(self.log.lock().unwrap().clone()));
    }

    /// Starts a node on what its disk has.
    fn start(&mut self, name: &str) {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let root = self.dir.path().to_owned();
        let address = move |peer: &NodeId| Some(format!("unix:{}", root.join(peer.as_str()).join("nbd").display()));
        let links = Links::new(node(name), address);
        let (notices, mut noticed) = broadcast::channel(1_024);
        let store = Arc::new(Store::open(&dir.join("store"), StoreOptions::default()).unwrap());
        let tier = RamTier::new(TierOptions {
            capacity_bytes: 4 << 20,
            front_percent: 50,
            lock: false,
        })
        .unwrap();
        let around = Around {
            me: node(name),
            store,
            links: links.clone(),
            pool: Arc::new(Pool::start(4).unwrap()),
            notices,
        };
        let opening = Opening {
            tier,
            remote: Arc::new(NoPeers),
        };
        let replicas = Replicas::open(around, opening).unwrap();
        for replica in replicas.all() {
            replica.step(Input::Rebased(self.log.lock().unwrap().clone()));
        }
        let runtime = tokio::runtime::Runtime::new().unwrap();
        serve(&runtime, &dir.join("nbd"), links);
        let (log, known) = (self.log.clone(), self.known.clone());
        runtime.spawn(async move {
            loop {
                match noticed.recv().await {
                    Ok((image, Notice::Publish(change))) => {
                        let mut log = log.lock().unwrap();
                        let _ = log.judge(&change);
                        for replicas in known.lock().unwrap().values() {
                            replicas.logged(image, change.clone());
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        self.known.lock().unwrap().insert(node(name), replicas.clone());
        self.hosts.insert(
            node(name),
            Host {
                replicas,
                runtime: Some(runtime),
            },
        );
    }

    /// Ends a node as a crash would, but for what is in its page cache.
    fn kill(&mut self, name: &str) {
        self.known.lock().unwrap().remove(&node(name));
        let mut host = self.hosts.remove(&node(name)).unwrap();
        host.runtime.take().unwrap().shutdown_timeout(Duration::from_secs(5));
        std::fs::remove_file(self.dir.path().join(name).join("nbd")).ok();
    }

    fn replica(&self, name: &str) -> Arc<Replica> {
        self.hosts[&node(name)].replicas.get(IMAGE).unwrap()
    }

    /// Has a node own the image.
    fn take(&self, name: &str, lease: u128) -> ReplicatedDisk {
        let replica = self.replica(name);
        replica.step(Input::Take { lease: LeaseId(lease) });
        until("the image to open", || replica.look(|session| session.is_open()));
        ReplicatedDisk::new(replica)
    }

    /// What a node's own copy holds.
    fn copy(&self, name: &str, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let copy = self.replica(name).copy().unwrap();
        copy.volume.read(offset, &mut bytes).unwrap();
        bytes
    }

    fn members(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.record.members().iter().map(ToString::to_string).collect()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let names: Vec<String> = self.hosts.keys().map(ToString::to_string).collect();
        names.iter().for_each(|name| self.kill(name));
    }
}

fn serve(runtime: &tokio::runtime::Runtime, socket: &Path, links: Arc<Links>) {
    static LIMITS: OnceLock<NbdLimits> = OnceLock::new();
    let server = NbdServer::new(vec![Listener::unix(socket, SOCKET_MODE).unwrap()]);
    let limits = LIMITS.get_or_init(NbdLimits::default).clone();
    runtime.spawn(server.run(Arc::new(Door(links)), limits, std::future::pending()));
}

fn until(what: &str, mut look: impl FnMut() -> bool) {
    let began = Instant::now();
    while !look() {
        assert!(began.elapsed() < WITHIN, "{what} did not come to be within {WITHIN:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn read(disk: &ReplicatedDisk, offset: u64, length: usize) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; length];
    disk.read(offset, &mut bytes).map(|()| bytes)
}

#[test]
fn what_the_owner_writes_is_on_every_member() {
    let pair = Pair::new(&["a", "b"]);
    let disk = pair.take("a", 1);
    // Parts of blocks, over borders, durable and not, zeros and holes.
    disk.write(4_096, &[1; 4_096], false).unwrap();
    disk.write(BLOCK - 512, &[2; 1_024], true).unwrap();
    disk.write(3 * BLOCK, &vec![3; 2 * BLOCK as usize], false).unwrap();
    disk.trim(4 * BLOCK, BLOCK, false).unwrap();
    disk.write_zeroes(3 * BLOCK + 4_096, 4_096, true, false).unwrap();
    disk.flush().unwrap();
    let whole = (BLOCKS * BLOCK) as usize;
    let seen = read(&disk, 0, whole).unwrap();
    assert_eq!(seen, pair.copy("a", 0, whole));
    assert_eq!(seen, pair.copy("b", 0, whole));
    let mut expect = vec![0; whole];
    expect[4_096..8_192].fill(1);
    expect[BLOCK as usize - 512..BLOCK as usize + 512].fill(2);
    expect[3 * BLOCK as usize..4 * BLOCK as usize].fill(3);
    expect[3 * BLOCK as usize + 4_096..3 * BLOCK as usize + 8_192].fill(0);
    assert_eq!(seen, expect);
    // Past the end nothing is written anywhere.
    assert!(matches!(
        disk.write(BLOCKS * BLOCK - 512, &[9; 1_024], false),
        Err(DiskError::OutOfRange { .. })
    ));
}

#[test]
fn a_dead_member_is_left_out_and_gets_back_what_it_missed() {
    let mut pair = Pair::new(&["a", "b"]);
    let disk = pair.take("a", 1);
    disk.write(0, &[1; 8_192], false).unwrap();
    pair.kill("b");
    let began = Instant::now();
    disk.write(0, &[2; 4_096], false).unwrap();
    println!("a write took {:?} over the death of a member", began.elapsed());
    assert_eq!(pair.members(), ["a"]);
    disk.write(BLOCK, &[3; 4_096], true).unwrap();

    pair.start("b");
    assert_eq!(pair.copy("b", 0, 4_096), [1; 4_096]);
    let join = Input::Join {
        node: node("b"),
        extent: Extent {
            first: BlockIndex(0),
            last: BlockIndex(u64::MAX),
        },
        end: BlockIndex(BLOCKS - 1),
        blocks: 4,
        allowed: None,
    };
    pair.replica("a").step(join);
    until("b to be in sync", || pair.members() == ["a", "b"]);
    disk.write(2 * BLOCK, &[4; 4_096], false).unwrap();
    let whole = (BLOCKS * BLOCK) as usize;
    assert_eq!(pair.copy("b", 0, whole), pair.copy("a", 0, whole));
    assert_eq!(pair.copy("b", 0, 4_096), [2; 4_096]);
}

#[test]
fn who_is_fenced_off_serves_nothing_more() {
    let pair = Pair::new(&["a", "b"]);
    let old = pair.take("a", 1);
    old.write(0, &[1; 4_096], false).unwrap();
    // In RAM there, and answered from it.
    let mut bytes = [0; 4_096];
    until("the block to be in RAM", || {
        read(&old, 0, 4_096).unwrap();
        old.try_read_ram(0, &mut bytes)
    });
    let began = Instant::now();
    let new = pair.take("b", 2);
    println!("taken over within {:?} while the old owner lived", began.elapsed());
    assert!(!old.try_read_ram(0, &mut bytes), "the old owner answers from RAM");
    assert!(read(&old, 0, 4_096).is_err());
    assert!(old.write(0, &[9; 4_096], false).is_err());
    assert!(old.flush().is_err());
    assert_eq!(read(&new, 0, 4_096).unwrap(), [1; 4_096]);
    new.write(0, &[2; 4_096], false).unwrap();
    assert_eq!(pair.copy("a", 0, 4_096), [2; 4_096]);
    // In order, the next one need not wait for leases to end.
    pair.replica("b").seal().unwrap();
    let began = Instant::now();
    let again = pair.take("a", 3);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(read(&again, 0, 4_096).unwrap(), [2; 4_096]);
}

/// What is brought into a member's RAM before a hand-over is true after it, whatever the owner wrote meanwhile.
#[test]
fn what_a_member_has_in_ram_is_what_was_written_last() {
    let pair = Pair::new(&["a", "b"]);
    let old = pair.take("a", 1);
    old.write(0, &vec![1; 3 * BLOCK as usize], false).unwrap();
    let warm = pair.replica("b").copy().unwrap().volume;
    warm.cache(0, 3 * BLOCK).unwrap();
    let mut bytes = vec![0; 3 * BLOCK as usize];
    assert!(warm.try_read_ram(0, &mut bytes), "nothing was brought into RAM");
    old.write(4_096, &[2; 4_096], false).unwrap();
    old.write_zeroes(BLOCK + 4_096, 4_096, true, false).unwrap();
    old.trim(2 * BLOCK, BLOCK, false).unwrap();
    pair.replica("a").seal().unwrap();
    let new = pair.take("b", 2);
    let mut expect = vec![1; 3 * BLOCK as usize];
    expect[4_096..8_192].fill(2);
    expect[BLOCK as usize + 4_096..BLOCK as usize + 8_192].fill(0);
    expect[2 * BLOCK as usize..].fill(0);
    let two = 2 * BLOCK as usize;
    until("read leases", || new.try_read_ram(0, &mut bytes[..two]));
    assert_eq!(bytes[..two], expect[..two], "RAM has what was overwritten");
    assert_eq!(read(&new, 0, expect.len()).unwrap(), expect);
}

#[test]
fn what_was_written_and_not_flushed_is_in_doubt_after_a_crash() {
    let mut pair = Pair::new(&["a", "b"]);
    let disk = pair.take("a", 1);
    disk.write(3 * BLOCK, &[1; 4_096], false).unwrap();
    let doubt = |pair: &Pair, name: &str| pair.replica(name).look(|session| session.standing().unwrap().doubt);
    assert!(doubt(&pair, "b").contains(&BlockIndex(3)));
    pair.kill("b");
    pair.start("b");
    assert!(
        doubt(&pair, "b").contains(&BlockIndex(3)),
        "a crash forgot what may differ"
    );
    // In order, nothing is in doubt.
    disk.flush().unwrap();
    pair.replica("a").seal().unwrap();
    assert_eq!(doubt(&pair, "a"), [].into());
}

/// Begins writes of one page each, `value` in every byte, and says how each ended.
fn begin(disk: &ReplicatedDisk, pages: impl Iterator<Item = u64>, value: u8) -> Vec<Result<(), DiskError>> {
    let (tell, told) = std::sync::mpsc::channel();
    let changes = pages.map(|page| Begun {
        change: Change::Write {
            offset: page * PAGE,
            data: vec![value; PAGE as usize].into(),
            fua: false,
        },
        tell: {
            let tell = tell.clone();
            Box::new(move |ended| tell.send(ended).unwrap())
        },
    });
    disk.begin(changes.collect());
    drop(tell);
    told.iter().collect()
}

#[test]
fn what_clients_begin_together_is_on_every_member() {
    const CLIENTS: u64 = 4;
    let pages = BLOCKS * BLOCK / PAGE;
    let mut pair = Pair::new(&["a", "b"]);
    let disk = pair.take("a", 1);
    // Pages of one block are written by all of them at a time: some follow each other, some do not.
    let round = |value: u8, step: u64| {
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let mine = (0..pages).filter(move |page| page / step % CLIENTS == client);
                let disk = &disk;
                scope.spawn(move || {
                    let ended = begin(disk, mine.clone(), value);
                    assert_eq!(ended.len(), mine.count());
                    assert!(ended.iter().all(Result::is_ok), "{ended:?}");
                });
            }
        });
    };
    let whole = (BLOCKS * BLOCK) as usize;
    for (value, step) in [(1, 1), (2, 3), (3, 16)] {
        round(value, step);
        assert_eq!(pair.copy("a", 0, whole), vec![value; whole]);
        assert_eq!(pair.copy("b", 0, whole), vec![value; whole]);
    }
    // Of what is begun twice without waiting, everybody has the same.
    let twice = (0..pages).chain((0..pages).rev()).chain(0..pages);
    assert_eq!(begin(&disk, twice, 4).len() as u64, 3 * pages);
    assert_eq!(pair.copy("a", 0, whole), pair.copy("b", 0, whole));
    // What a member that died does not answer ends when the set is without it.
    pair.kill("b");
    round(5, 2);
    assert_eq!(pair.members(), ["a"]);
    assert_eq!(pair.copy("a", 0, whole), vec![5; whole]);
}
