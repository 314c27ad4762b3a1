//! Replicas move all the time while guests write across blocks' borders: added, followed, dropped, cancelled half-way, with
//! daemons that die meanwhile. Nothing acknowledged is lost, nothing is stuck, and what was cancelled goes when asked again.
//!
//! One image has clients that know of every byte which versions a read may return (`clients.rs`), and goes from node to node
//! itself; another one has fio, which verifies. `HEARTH_MOVES=500` makes so many moves, else few.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hearth_tests::clients::Clients;
use hearth_tests::fio::{self, Target, Verifying};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(90);
const NODES: usize = 3;
/// The image with clients, and the one with fio.
const IMAGES: [&str; 2] = ["appl/vm-1", "appl/vm-2"];
const IMAGE_BYTES: u64 = 16 << 20;
/// Its last block of 64 KiB.
const LAST: u64 = IMAGE_BYTES / (64 << 10) - 1;
/// What is moved where nobody says how often.
const MOVES: u64 = 24;
/// Bytes per second of a copy that is to be cancelled: it would take two seconds.
const SLOW: &str = "8MiB";
/// The clients go elsewhere in one move of so many, and a daemon dies in one of so many.
const FOLLOW_EVERY: u64 = 20;
const DIE_EVERY: u64 = 12;

/// What was done.
#[derive(Debug, Default)]
struct Done {
    added: u64,
    in_parts: u64,
    cancelled: u64,
    ended_before: u64,
    followed_by_policy: u64,
    followed: u64,
    died: u64,
}

struct Moving {
    cluster: Cluster,
    clients: Clients,
    /// Where each image is attached.
    seats: [usize; 2],
    chance: u64,
    done: Done,
}

/// An image's nodes, from its owner.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    members: BTreeSet<usize>,
    joiners: BTreeSet<usize>,
    /// Whether every member holds every block.
    whole: bool,
}

impl Moving {
    /// A number below `below`, the same in each run.
    fn chance(&mut self, below: u64) -> u64 {
        self.chance = self
            .chance
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.chance >> 33) % below
    }

    fn places(&self, image: usize) -> Result<Places> {
        let node = Cluster::node_id(self.seats[image]);
        let runs = self
            .cluster
            .hearth()
            .json(&["location", "list", IMAGES[image], "--node", &node])?;
        let runs = runs.as_array().context("no runs")?;
        let nodes = |run: &Value, field: &str| -> BTreeSet<usize> {
            let names = run[field].as_array().into_iter().flatten().filter_map(Value::as_str);
            names
                .filter_map(|name| (0..NODES).find(|index| Cluster::node_id(*index) == name))
                .collect()
        };
        let all = |field| runs.iter().flat_map(|run| nodes(run, field)).collect();
        Ok(Places {
            members: all("members"),
            joiners: all("joiners"),
            whole: runs.len() == 1,
        })
    }

    /// Two members that hold everything, and nobody under way: the policies may have moved something, and the image may
    /// be about to serve again after a restart.
    fn quiet(&self, image: usize) -> Result<Places> {
        let mut last = String::new();
        let settled = wait::until("two members in sync", WITHIN, || {
            self.clients.check()?;
            Ok(match self.places(image) {
                Ok(places) if places.members.len() == 2 && places.joiners.is_empty() && places.whole => Some(places),
                Ok(places) => {
                    last = format!("{places:?}");
                    None
                }
                Err(error) => {
                    last = format!("{error:#}");
                    None
                }
            })
        });
        settled.with_context(|| format!("{}: {last}", IMAGES[image]))
    }

    /// Runs a command until it is not in the way of something else any more, such as a change that a policy made.
    fn ask(&self, words: &[&str]) -> Result<String> {
        let began = Instant::now();
        loop {
            match self.cluster.hearth().text(words) {
                Ok(text) => return Ok(text),
                Err(error) if began.elapsed() < WITHIN => {
                    let text = format!("{error:#}");
                    let passes = [
                        "another change",
                        "under way",
                        "does not own",
                        "not attached here",
                        "holds these blocks",
                        "still reading the log",
                        "does not answer",
                    ];
                    let passes = passes.iter().any(|words| text.contains(words));
                    ensure!(passes, "{words:?}: {text}");
                    if text.contains("holds these blocks") {
                        return Ok(text);
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Moves the copy that is not the owner's to the node without one.
    fn replace(&mut self, image: usize) -> Result<()> {
        let places = self.quiet(image)?;
        let (owner, name) = (self.seats[image], IMAGES[image]);
        let Some(from) = places.members.iter().copied().find(|node| *node != owner) else {
            bail!("{name} has no other member: {places:?}");
        };
        let Some(to) = (0..NODES).find(|node| !places.members.contains(node)) else {
            bail!("{name} is everywhere: {places:?}");
        };
        let (from, to) = (Cluster::node_id(from), Cluster::node_id(to));
        match self.chance(4) {
            0 => {
                let (first, last) = (self.chance(LAST), LAST);
                let middle = format!("{}-{}", first / 2, (first / 2 + 7).min(last));
                self.ask(&["location", "add", name, &to, "--blocks", &middle])?;
                self.ask(&["location", "add", name, &to])?;
                self.done.in_parts += 1;
            }
            1 => {
                self.cancel(image, &to)?;
                self.ask(&["location", "add", name, &to, "--pace", "full"])?;
            }
            _ => {
                self.ask(&["location", "add", name, &to, "--pace", "full"])?;
                self.done.added += 1;
            }
        }
        self.ask(&["location", "remove", name, &from])?;
        Ok(())
    }

    /// Begins a copy and cancels it, or has its node die, half-way.
    fn cancel(&mut self, image: usize, to: &str) -> Result<()> {
        let (owner, name) = (Cluster::node_id(self.seats[image]), IMAGES[image]);
        let before = self.quiet(image)?;
        let job = self
            .cluster
            .hearth()
            .json(&["location", "add", name, to, "--pace", SLOW, "--detach"])?;
        let job = job["id"].as_u64().context("a job without an id")?.to_string();
        std::thread::sleep(Duration::from_millis(self.chance(1_500)));
        let cancelled = self.cluster.hearth().text(&["job", "cancel", &job, "--node", &owner]);
        if cancelled.is_err() {
            // Hardly anything but zeros: it was faster.
            self.done.ended_before += 1;
            return Ok(());
        }
        self.done.cancelled += 1;
        wait::until("the copy that was cancelled to be gone", WITHIN, || {
            Ok((self.places(image)? == before).then_some(()))
        })
    }

    /// The clients go to another node, with a copy or without; a replica follows.
    fn follow(&mut self) -> Result<()> {
        let places = self.quiet(0)?;
        let owner = self.seats[0];
        // Two times of three where it has no copy.
        let bare = (0..NODES).find(|node| !places.members.contains(node));
        let other = places.members.iter().copied().find(|node| *node != owner);
        let to = if self.chance(3) == 0 { other } else { bare };
        let to = to.context("no other node")?;
        self.ask(&["image", "detach", IMAGES[0], "--node", &Cluster::node_id(owner)])?;
        self.ask(&["image", "attach", IMAGES[0], "--node", &Cluster::node_id(to)])?;
        self.seats[0] = to;
        self.clients.go_to(&self.cluster.socket(to));
        self.clients.go_on(50, WITHIN)?;
        if places.members.contains(&to) {
            return Ok(());
        }
        if self.done.followed_by_policy == 0 {
            wait::until("a replica to follow", WITHIN, || {
                let places = self.places(0)?;
                Ok((places.members.contains(&to) && places.members.len() == 2).then_some(()))
            })?;
            self.done.followed_by_policy += 1;
        } else {
            // A guest that goes to and fro like this one is left alone by the policy: what is asked for is the same move.
            let from = places.members.iter().copied().find(|node| *node != to);
            let from = Cluster::node_id(from.context("no member")?);
            self.ask(&["location", "add", IMAGES[0], &Cluster::node_id(to)])?;
            self.ask(&["location", "remove", IMAGES[0], &from])?;
            self.done.followed += 1;
        }
        Ok(())
    }

    /// The daemon of a node that gets a copy dies half-way, and comes back.
    fn die(&mut self, image: usize) -> Result<()> {
        let places = self.quiet(image)?;
        let Some(to) = (0..NODES).find(|node| !places.members.contains(node)) else {
            bail!("{} is everywhere: {places:?}", IMAGES[image]);
        };
        let (name, node) = (IMAGES[image], Cluster::node_id(to));
        if self.seats.contains(&to) {
            return Ok(()); // its own image would stand still
        }
        self.cluster
            .hearth()
            .text(&["location", "add", name, &node, "--pace", SLOW, "--detach"])?;
        std::thread::sleep(Duration::from_millis(self.chance(1_500)));
        self.cluster.crash_and_restart_node(to)?;
        self.clients.go_on(20, WITHIN)?;
        wait::until("the half copy to be out of the set", WITHIN, || {
            let places = self.places(image)?;
            Ok((places.joiners.is_empty() && places.members.len() == 2).then_some(()))
        })?;
        self.done.died += 1;
        Ok(())
    }
}

#[test]
fn replicas_move_all_the_time_and_nothing_is_lost_or_stuck() -> Result<()> {
    let spec = ClusterSpec {
        nodes: NODES,
        heat: "export",
        ..ClusterSpec::default()
    };
    let Some(cluster) = hearth_tests::cluster(&spec)? else {
        return Ok(());
    };
    let moves: u64 = match std::env::var("HEARTH_MOVES") {
        Ok(moves) => moves.parse().context("HEARTH_MOVES=500")?,
        Err(_) => MOVES,
    };
    let hearth = cluster.hearth();
    let size = IMAGE_BYTES.to_string();
    for (seat, image) in IMAGES.iter().enumerate() {
        let node = Cluster::node_id(seat);
        hearth.text(&["image", "create", image, &size, "--replicas", "2", "--node", &node])?;
        hearth.text(&["image", "attach", image, "--node", &node])?;
    }
    let clients = Clients::start(&cluster.socket(0), IMAGES[0], IMAGE_BYTES);
    let target = Target::Nbd {
        socket: cluster.socket(1),
        export: IMAGES[1].into(),
    };
    let fio = fio::can_read(&target).then(|| Verifying::start(target, IMAGE_BYTES));
    let mut moving = Moving {
        cluster,
        clients,
        seats: [0, 1],
        chance: 4_711,
        done: Done::default(),
    };
    moving.clients.go_on(100, WITHIN)?;
    let began = Instant::now();
    for step in 1..=moves {
        let image = (step % 2) as usize;
        let what = if step % FOLLOW_EVERY == 0 {
            moving.follow()
        } else if step % DIE_EVERY == 0 {
            moving.die(image)
        } else {
            moving.replace(image)
        };
        if let Err(error) = what {
            moving.cluster.check_running()?;
            return Err(error.context(format!("move {step}, of {}: {:?}", IMAGES[image], moving.done)));
        }
        moving
            .clients
            .go_on(5, WITHIN)
            .with_context(|| format!("after move {step}"))?;
        if step % 50 == 0 {
            eprintln!("{step} moves after {:?}: {:?}", began.elapsed(), moving.done);
        }
    }
    for image in 0..2 {
        moving.quiet(image)?;
    }
    let passes = fio.map(Verifying::stop).transpose()?;
    moving.clients.verify(WITHIN)?;
    let seen = moving.clients.stop()?;
    let mut refused = String::new();
    write!(refused, "{:?}", seen.refused)?;
    eprintln!(
        "{moves} moves in {:?}: {:?}; {} writes acknowledged, {} reads right, {} flushes, errors {refused}; fio passes {passes:?}",
        began.elapsed(),
        moving.done,
        seen.writes,
        seen.reads,
        seen.flushes
    );
    hearth_tests::digests_agree(&moving.cluster)?;
    Ok(())
}
