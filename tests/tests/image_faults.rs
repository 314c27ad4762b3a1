//! Faults of nodes, networks, disks and the control plane, on real processes in network namespaces, while clients that
//! know every byte read and write an image with replicas.
//!
//! Each test is a table of faults that are done to one cluster one after the other. `HEARTH_FAULT_ROUNDS` plays it more
//! often than once, and `HEARTH_FAULT_SECONDS` says how long the control plane stays away.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hearth_tests::clients::{Clients, Visit};
use hearth_tests::netns::{Network, Place};
use serde_json::Value;
use xtask::cluster::{Cluster, ClusterSpec};
use xtask::wait;

const WITHIN: Duration = Duration::from_secs(60);
/// Longer than a read lease and the wait of a new owner (3.75 s, `hearth_replication::time`).
const PAST_THE_LEASE: Duration = Duration::from_millis(4_500);
const IMAGE: &str = "appl/vm-1";
const IMAGE_BYTES: u64 = 16 << 20;
/// Acknowledged writes that show that an image goes on.
const GOES_ON: u64 = 100;

/// What faults are done to.
struct Field {
    clients: Clients,
    cluster: Cluster,
    network: Network,
    owner: usize,
    replicas: usize,
}

/// A fault: its name, and what is done and seen.
type Fault = (&'static str, fn(&mut Field) -> Result<()>);

impl Field {
    /// Three nodes, and an image with so many replicas on the first ones, attached on the first.
    fn start(replicas: usize) -> Result<Option<Self>> {
        let Some(network) = hearth_tests::or_skip(Network::make(3)) else {
            return Ok(None);
        };
        let spec = ClusterSpec {
            nodes: 3,
            heat: "export",
            control: network.control(),
            node_hosts: network.nodes(),
            ..ClusterSpec::default()
        };
        let Some(cluster) = hearth_tests::cluster(&spec)? else {
            return Ok(None);
        };
        let hearth = cluster.hearth();
        let (size, count) = (IMAGE_BYTES.to_string(), replicas.to_string());
        hearth.text(&["image", "create", IMAGE, &size, "--replicas", &count, "--node", "node-1"])?;
        hearth.text(&["image", "attach", IMAGE, "--node", "node-1"])?;
        let clients = Clients::start(&cluster.socket(0), IMAGE, IMAGE_BYTES);
        clients.go_on(GOES_ON, WITHIN)?;
        Ok(Some(Self {
            clients,
            cluster,
            network,
            owner: 0,
            replicas,
        }))
    }

    /// Does every fault; between two, all copies come back in sync.
    fn suffer(&mut self, faults: &[Fault]) -> Result<()> {
        let rounds = setting("HEARTH_FAULT_ROUNDS", 1)?;
        for round in 1..=rounds {
            for (name, fault) in faults {
                let (began, before) = (Instant::now(), self.clients.seen());
                let done = fault(self).and_then(|()| self.recover());
                done.with_context(|| format!("{name}, round {round}"))?;
                let seen = self.clients.seen();
                eprintln!(
                    "{name}: {:?}, {} writes, {} reads, {} writes unanswered, errors {:?}",
                    began.elapsed(),
                    seen.writes - before.writes,
                    seen.reads - before.reads,
                    seen.unknown - before.unknown,
                    seen.refused,
                );
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<()> {
        self.network.heal()?;
        self.cluster.wait_ready()?;
        self.in_sync(self.replicas)?;
        self.clients.go_on(GOES_ON, WITHIN)?;
        self.clients.verify(WITHIN)
    }

    /// Ends the clients, and compares the log's two readers.
    fn end(self) -> Result<()> {
        let seen = self.clients.stop()?;
        eprintln!("in all: {seen:?}");
        hearth_tests::digests_agree(&self.cluster)
    }

    fn node(index: usize) -> String {
        Cluster::node_id(index)
    }

    /// A node that holds a copy and is not the owner.
    fn member(&self) -> Result<usize> {
        let members = self.members()?;
        let other = |index: &usize| *index != self.owner && members.contains(&Self::node(*index));
        (0..3).find(other).context("no other member")
    }

    /// The nodes that are in sync, as the owner says.
    fn members(&self) -> Result<Vec<String>> {
        let owner = Self::node(self.owner);
        let runs = self.cluster.hearth().json(&["location", "list", IMAGE, "--node", &owner])?;
        let members = runs[0]["members"].as_array().context("no members")?;
        Ok(members.iter().filter_map(|m| Some(m.as_str()?.to_owned())).collect())
    }

    /// Waits until a node is in the set or out of it.
    fn is_member(&self, node: usize, is: bool) -> Result<()> {
        let what = format!("{} to be {} the set", Self::node(node), if is { "in" } else { "out of" });
        wait::until(&what, WITHIN, || {
            Ok((self.members()?.contains(&Self::node(node)) == is).then_some(()))
        })
    }

    /// Has so many nodes hold the image in sync, unless the repair policy comes before.
    fn in_sync(&self, count: usize) -> Result<()> {
        wait::until(&format!("{count} copies in sync"), WITHIN, || {
            let members = self.members()?;
            if members.len() >= count {
                return Ok(Some(()));
            }
            let out = (0..3).map(Self::node).find(|node| !members.contains(node));
            let node = out.context("all nodes are members")?;
            // Refused while another change is under way.
            let _ = self.cluster.hearth().text(&["location", "add", IMAGE, &node]);
            Ok(None)
        })
    }

    /// Has another node take the image over, and the clients go there.
    fn take_over(&mut self, node: usize) -> Result<()> {
        let name = Self::node(node);
        let words = ["image", "attach", IMAGE, "--node", &name, "--takeover"];
        self.cluster.hearth().text(&words)?;
        self.owner = node;
        self.clients.go_to(&self.cluster.socket(node));
        Ok(())
    }

    fn signal(&mut self, node: usize, signal: libc::c_int) -> Result<()> {
        self.cluster.node(node).signal(signal)
    }

    fn show(&self, node: usize) -> Result<Value> {
        self.cluster
            .hearth()
            .json(&["image", "show", IMAGE, "--node", &Self::node(node)])
    }
}

fn setting(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is {text:?}, not a number")),
        Err(_) => Ok(otherwise),
    }
}

fn met(visits: Vec<JoinHandle<Visit>>) -> Result<Visit> {
    let mut all = Visit::default();
    for visit in visits {
        let Ok(visit) = visit.join() else { bail!("a visitor panicked") };
        all.reads += visit.reads;
        all.writes += visit.writes;
        all.refused += visit.refused;
    }
    Ok(all)
}

fn member_is_killed(field: &mut Field) -> Result<()> {
    let member = field.member()?;
    field.cluster.node(member).kill()?;
    field.clients.go_on(GOES_ON, WITHIN)?;
    field.is_member(member, false)?;
    field.cluster.crash_and_restart_node(member)
}

fn member_is_paused(field: &mut Field) -> Result<()> {
    let member = field.member()?;
    field.signal(member, libc::SIGSTOP)?;
    field.clients.go_on(GOES_ON, WITHIN)?;
    std::thread::sleep(PAST_THE_LEASE);
    field.is_member(member, false)?;
    field.signal(member, libc::SIGCONT)?;
    field.clients.go_on(GOES_ON, WITHIN).map(drop)
}

fn parted(field: &mut Field, cut: fn(&mut Network, Place, Place) -> Result<()>) -> Result<()> {
    let member = field.member()?;
    cut(&mut field.network, Place::Node(field.owner), Place::Node(member))?;
    field.clients.go_on(GOES_ON, WITHIN)?;
    field.is_member(member, false)?;
    let dropped = field.network.heal()?;
    ensure!(dropped > 0, "nothing was sent that could be lost");
    Ok(())
}

fn member_is_parted(field: &mut Field) -> Result<()> {
    parted(field, Network::part)
}

fn member_is_not_heard(field: &mut Field) -> Result<()> {
    parted(field, |network, owner, member| network.lose(member, owner))
}

fn owner_is_not_heard(field: &mut Field) -> Result<()> {
    parted(field, |network, owner, member| network.lose(owner, member))
}

fn owner_is_paused(field: &mut Field) -> Result<()> {
    let (old, new) = (field.owner, field.member()?);
    let visitors = visitors(field, old)?;
    field.signal(old, libc::SIGSTOP)?;
    std::thread::sleep(PAST_THE_LEASE);
    field.take_over(new)?;
    field.clients.go_on(GOES_ON, WITHIN)?;
    // What they ask now waits in the sockets of the old owner, which then goes on as if no time had passed.
    let visits: Vec<_> = visitors.into_iter().map(|v| v.visit(Duration::from_secs(3))).collect();
    field.signal(old, libc::SIGCONT)?;
    let met = met(visits)?;
    ensure!(met.writes == 0, "the old owner acknowledged writes: {met:?}");
    eprintln!("at the old owner: {met:?}");
    ensure!(field.show(old)?["attached"].is_null(), "the old owner serves the image still");
    Ok(())
}

fn visitors(field: &Field, node: usize) -> Result<Vec<hearth_tests::clients::Visitor>> {
    let socket = field.cluster.socket(node);
    (0..3).map(|_| field.clients.visitor(&socket)).collect()
}

const MEMBER: &[Fault] = &[
    ("a member is killed", member_is_killed),
    ("a member is paused past its lease", member_is_paused),
    ("a member and the owner are parted", member_is_parted),
    ("a member is not heard", member_is_not_heard),
    ("the owner is not heard", owner_is_not_heard),
];

const OWNER: &[Fault] = &[("the owner is paused past its lease and goes on", owner_is_paused)];

#[test]
fn an_image_outlives_what_happens_to_a_member() -> Result<()> {
    let Some(mut field) = Field::start(3)? else { return Ok(()) };
    field.suffer(MEMBER)?;
    ensure!(field.clients.seen().refused.is_empty(), "a healthy image answered errors");
    field.end()
}

#[test]
fn an_owner_that_comes_back_late_serves_nothing() -> Result<()> {
    let Some(mut field) = Field::start(2)? else { return Ok(()) };
    field.suffer(OWNER)?;
    field.end()
}
