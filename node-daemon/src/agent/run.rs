//! The daemon's life: data plane first, then NBD, then NATS; and the end in reverse.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hearth_bus::{Bus, NatsOptions, rpc, wall_now};
use hearth_probes::source::{HeatSource, Window};
use hearth_protocol::event::NodeJoined;
use hearth_protocol::heat::{HeatOrigin, HeatReport};
use hearth_protocol::limits::TICK_MS;
use hearth_protocol::{Event, ImageId, Incarnation, subject};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::jobs::Jobs;
use super::link::Link;
use super::node::Node;
use super::reconcile::reconcile;
use super::replicas::{self, Feed};
use super::report::{self, ImageContext};
use super::requests::{self, Requests};
use super::seen::Seen;
use super::{commands, peers::Peers};
use crate::config::NodeConfig;
use crate::disk::Disk as _;
use crate::export::device::prepare_process;
use crate::export::fdstore::FdStore;
use crate::export::nbd::{Listener, NbdHandle, NbdLimits, NbdServer, SOCKET_MODE, listener_from_env};
use crate::store::fault::Faults;
use crate::store::os::replace_note;

/// Name of the NBD listening socket with the descriptor holder.
const LISTENER: &str = "nbd-listener";
/// Pause before NATS is tried again.
pub(super) const RECONNECT: Duration = Duration::from_secs(1);

/// Pause before images that could not be served at the start are tried again.
const RESUME_AGAIN: Duration = Duration::from_secs(2);

/// Runs the daemon until SIGTERM or SIGINT. `faults` are for tests; a daemon in service has none.
///
/// # Errors
/// What kept it from starting, with what to do.
pub fn run(config: NodeConfig, faults: Faults) -> anyhow::Result<()> {
    // A server that is away comes back; an address that is none never will.
    hearth_bus::check_address(&config.nats)?;
    let fdstore = match &config.fd_holder {
        Some(socket) => Some(Arc::new(FdStore::connect(socket)?)),
        None => None,
    };
    for warning in prepare_process(true) {
        tracing::warn!("{warning}");
    }
    let listeners = listeners(&config, fdstore.as_deref())?;
    let seen = Seen::open(config.store_dir.join(super::seen::FILE))?;
    let node = Node::open(config, fdstore, faults)?;
    node.resume()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(node, listeners, seen))
}

/// The listening sockets: inherited from systemd, taken back from the holder, or made.
fn listeners(config: &NodeConfig, fdstore: Option<&FdStore>) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = listener_from_env()?;
    if !listeners.is_empty() {
        tracing::info!(count = listeners.len(), "listening on inherited sockets");
    } else if let Some(kept) = fdstore.map(|store| store.take(LISTENER)).transpose()?.flatten() {
        listeners.push(Listener::from_fd(kept.fd)?);
    } else {
        let mut listener = Listener::unix(&config.socket, SOCKET_MODE)?;
        if let Some(store) = fdstore {
            store.store(LISTENER, listener.duplicate_fd()?.as_fd(), "")?;
            listener.stays();
        }
        listeners.push(listener);
    }
    match config.peer_listen.as_deref() {
        None => {}
        Some(address) => {
            let tcp = address.strip_prefix("tcp:").with_context(|| {
                format!("peer_listen is {address:?}: use tcp:127.0.0.1:PORT, or leave it out to use the unix socket")
            })?;
            let tcp: SocketAddr = tcp
                .parse()
                .with_context(|| format!("peer_listen {address:?} is no address and port"))?;
            listeners.push(Listener::tcp(tcp)?);
        }
    }
    Ok(listeners)
}

async fn serve(node: Arc<Node>, listeners: Vec<Listener>, seen: Seen) -> anyhow::Result<()> {
    let server = NbdServer::new(listeners);
    let connections = server.handle();
    let stop = Arc::new(Notify::new());
    let limits = NbdLimits {
        workers_max: node.config.io_threads,
        workers_per_connection_max: (node.config.io_threads * 3 / 4).max(1),
        ..NbdLimits::default()
    };
    let mut nbd = {
        let (stop, table) = (Arc::clone(&stop), Arc::clone(&node.served));
        tokio::spawn(server.run(table, limits, async move { stop.notified().await }))
    };
    let retry = {
        let node = Arc::clone(&node);
        async move {
            loop {
                tokio::time::sleep(RESUME_AGAIN).await;
                let node = Arc::clone(&node);
                // A panic in there was logged; the next round tries again.
                let _ = tokio::task::spawn_blocking(move || node.resume_waiting()).await;
            }
        }
    };
    tracing::info!(node = %node.config.id, socket = %node.config.socket.display(), heat = node.heat_source(), "serving");
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut agent = Box::pin(agent(Arc::clone(&node), connections, seen));
    tokio::select! {
        () = &mut agent => unreachable!("the agent runs for ever"),
        () = retry => unreachable!("images are waited for for ever"),
        // Without its sockets the daemon serves nobody: better started again than alive and deaf.
        ended = &mut nbd => return ended?.context("the NBD server ended by itself"),
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("stopping: images stay in the list of what is served, and are served again at the next start");
    let ending = async move {
        stop.notify_one();
        nbd.await??;
        let last = move || {
            for (_, served) in node.served.all() {
                // This node's blocks only: the other nodes of an image may be gone.
                if let Err(error) = served.volume.flush() {
                    tracing::error!(image = %served.name, %error, "the last flush failed");
                }
            }
            node.replicas.close();
        };
        Ok(tokio::task::spawn_blocking(last).await?)
    };
    // What is under way may wait for a member that died, and that one leaves the set by way of the log.
    tokio::select! {
        () = &mut agent => unreachable!("the agent runs for ever"),
        ended = ending => ended,
    }
}

/// Everything that needs NATS. Images are served without it.
async fn agent(node: Arc<Node>, connections: NbdHandle, seen: Seen) {
    let bus = connect(&node).await;
    let link = Link::new(node.config.id.clone(), bus.clone(), node.incarnation);
    let wake = Arc::new(Notify::new());
    let feed = Arc::new(Feed::new(link.clone(), Arc::clone(&node)));
    // A log that ends before what this node has seen.
    let freezes = {
        let (link, feed) = (link.clone(), Arc::clone(&feed));
        async move {
            let mut progress = link.progress();
            loop {
                // The sender lives as long as the link.
                let _ = progress.wait_for(|p| p.frozen.is_some()).await;
                tokio::task::block_in_place(|| feed.rolled_back());
                let _ = progress.wait_for(|p| p.frozen.is_none()).await;
                tokio::task::block_in_place(|| feed.read(Vec::new()));
            }
        }
    };
    let follower = {
        let (link, node, wake) = (link.clone(), Arc::clone(&node), Arc::clone(&wake));
        let feed = Arc::clone(&feed);
        async move {
            link.follow(seen, |batch| {
                if batch.anew {
                    feed.rolled_back();
                }
                if batch.places {
                    remember_peers(&link, &node);
                    tokio::task::block_in_place(|| feed.read(batch.changes));
                }
                wake.notify_one();
            })
            .await;
            std::future::pending::<()>().await;
        }
    };
    let requests = Requests {
        node: Arc::clone(&node),
        link: link.clone(),
        connections,
        handing_over: Arc::default(),
        words: Arc::default(),
        jobs: Jobs::open(&node.config.store_dir, node.store.faults().clone()),
    };
    // Joins, and compares store and log; again after each time that another history took the place of the one read.
    let membership = async {
        let mut progress = link.progress();
        loop {
            let history = progress.borrow().histories;
            link.join(&joined(&node)).await;
            remember_incarnation(&node);
            // The sender lives as long as the link.
            let _ = progress.wait_for(|p| p.caught_up() || p.histories != history).await;
            if progress.borrow().histories == history {
                if link.facts().joined() != Some(node.incarnation) {
                    tracing::warn!("the stream lost that this node joined before anybody read it; joining again");
                    continue;
                }
                reconcile(&requests).await;
                tokio::task::block_in_place(|| feed.read(Vec::new()));
                link.reconciled();
                replicas::resume(&requests).await;
                wake.notify_one();
            }
            let _ = progress.wait_for(|p| p.histories != history).await;
        }
    };
    let administration = async {
        let subject = subject::node_rpc(&node.config.id);
        loop {
            let requests = requests.clone();
            let ended = rpc::serve(&bus, subject.clone(), move |asked| requests.clone().answer(asked)).await;
            tracing::warn!(?ended, "the subscription for requests ended; trying again");
            tokio::time::sleep(RECONNECT).await;
        }
    };
    // From the first moment on: also a node that cannot follow the log says what is wrong.
    let health = async {
        loop {
            let requests = requests.clone();
            let answer = move |asked| requests.clone().answer_to_all(asked);
            let ended = rpc::serve(&bus, subject::NODES_RPC, answer).await;
            tracing::warn!(?ended, "the subscription for requests to all nodes ended; trying again");
            tokio::time::sleep(RECONNECT).await;
        }
    };
    tokio::join!(
        follower,
        freezes,
        replicas::attend(&requests),
        membership,
        administration,
        health,
        commands::run(requests.clone(), Arc::clone(&wake)),
        report_heat(Arc::clone(&node), link.clone()),
    );
}

async fn connect(node: &Node) -> Bus {
    let options = NatsOptions::new(node.config.nats.clone(), format!("hearth-node {}", node.config.id));
    loop {
        match Bus::connect(&options).await {
            Ok(bus) => return bus,
            Err(error) => {
                tracing::warn!(%error, "images are served all the same; trying again");
                tokio::time::sleep(RECONNECT).await;
            }
        }
    }
}

fn remember_peers(link: &Link, node: &Node) {
    let wanted: BTreeMap<_, _> = {
        let facts = link.facts();
        let images = node.store.images();
        let remote = images.iter().flat_map(|image| image.stack[1..].iter());
        remote
            .map(|layer| (*layer, facts.addresses_of(*layer, &node.config.id)))
            .filter(|(_, a)| !a.is_empty())
            .collect()
    };
    let nodes = link.facts().addresses().clone();
    let peers: &Peers = &node.peers;
    if let Err(error) = peers.set(wanted, nodes) {
        tracing::warn!(%error, "cannot write down where peers are: after a restart without NATS they are not found");
    }
    node.remote.peers_changed();
}

/// What a process start leaves behind for the next one.
#[derive(Debug, Serialize, Deserialize)]
struct Last {
    incarnation: Incarnation,
    publisher_seq: u64,
}

fn last_path(node: &Node) -> std::path::PathBuf {
    node.config.store_dir.join("last-incarnation")
}

fn remember_incarnation(node: &Node) {
    // The joining event is number 1, and the only one known to be durable by then.
    let last = Last {
        incarnation: node.incarnation,
        publisher_seq: 1,
    };
    let written = serde_json::to_vec(&last)
        .map_err(std::io::Error::other)
        .and_then(|b| replace_note(&last_path(node), &b, node.store.faults()));
    if let Err(error) = written {
        tracing::warn!(%error, "the next process will not know this one");
    }
}

fn joined(node: &Node) -> Event {
    let previous = std::fs::read(last_path(node))
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Last>(&bytes).ok());
    let usage = node.tier.usage();
    Event::NodeJoined(NodeJoined {
        node: node.config.id.clone(),
        incarnation: node.incarnation,
        storage_incarnation: node.store.incarnation(),
        previous: previous.map(|last| (last.incarnation, last.publisher_seq)),
        ram: usage.capacity,
        main: usage.main_capacity,
        fault_domain: node.config.fault_domain.clone(),
        peer_address: requests::peer_address(node),
        layers: node.store.sealed_layers(),
        heat_source: node.heat_source().into(),
    })
}

/// Drains the heat sources once a second and reports, for ever. What cannot be sent shows as a gap.
async fn report_heat(node: Arc<Node>, link: Link) {
    let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = Instant::now();
    let mut hits: BTreeMap<ImageId, (u64, u64)> = BTreeMap::new();
    let mut counters = node.counters.clone();
    let mut untimed_to_tell = 1;
    for report_seq in 1.. {
        ticks.tick().await;
        let window_ms = u64::try_from(last.elapsed().as_millis()).unwrap_or(u64::MAX);
        last = Instant::now();
        let drained = {
            let node = Arc::clone(&node);
            tokio::task::spawn_blocking(move || node.drain_probes())
                .await
                .ok()
                .flatten()
        };
        let untimed = drained.as_ref().map_or(0, |window| window.untimed_total);
        if untimed >= untimed_to_tell {
            tracing::warn!(
                untimed,
                "the kernel did not show the end of some accesses: they count as heat, their latency is not known"
            );
            untimed_to_tell = untimed * 2;
        }
        let exported = counters.drain().unwrap_or_default();
        let report = build(&node, report_seq, window_ms, drained, &exported, &mut hits);
        if let Err(error) = link.bus().publish_heat(&report).await {
            tracing::debug!(%error, report_seq, "a heat report was not sent");
        }
    }
}

fn build(
    node: &Node,
    report_seq: u64,
    window_ms: u64,
    probes: Option<Window>,
    exported: &Window,
    hits: &mut BTreeMap<ImageId, (u64, u64)>,
) -> HeatReport {
    let mut fresh: BTreeMap<ImageId, (u64, u64)> = BTreeMap::new();
    for (image, served) in node.served.all() {
        let counters = served.volume.counters();
        let now = (counters.ram_hits, counters.ram_misses);
        let before = hits.insert(image, now).unwrap_or_default();
        // A new attach counts from nothing.
        let since = if now.0 < before.0 || now.1 < before.1 {
            now
        } else {
            (now.0 - before.0, now.1 - before.1)
        };
        fresh.insert(image, since);
    }
    hits.retain(|image, _| fresh.contains_key(image));
    let probes = probes.unwrap_or_default();
    let mut images = Vec::new();
    for (origin, window) in [(HeatOrigin::Ebpf, &probes), (HeatOrigin::Export, exported)] {
        images.extend(report::images(origin, window, |image| {
            let volume = node.served.get(image.image)?.volume;
            volume.note_heat(image.blocks.iter().map(|b| (b.block, b.bursts)));
            // Told once, beside whichever source comes first.
            let (ram_hits, ram_misses) = fresh.remove(&image.image).unwrap_or_default();
            let top = volume.layers()[0];
            let layer_of = Box::new(move |block| volume.resolve(block).unwrap_or(top));
            Some(ImageContext {
                layer_of,
                ram_hits,
                ram_misses,
            })
        }));
    }
    images.sort_by_key(|image| (image.image, image.origin));
    HeatReport {
        node: node.config.id.clone(),
        incarnation: node.incarnation,
        report_seq,
        time: wall_now(),
        window_ms,
        images,
        tier: node.tier.usage(),
        disks: probes.disks,
        probe_events_total: probes.events_total + exported.events_total,
        probe_lost_total: probes.lost_total + exported.lost_total,
        dropped: node.tier.take_dropped(),
    }
}
