//! A network of network namespaces on this machine: one for the control plane and one per node, joined by a bridge, so
//! that real processes can be parted, one way or both ways, and their links slowed down.
//!
//! Nodes speak to each other over loopback addresses only, so each namespace owns one address of 127.0.0.0/8 and takes
//! the others for neighbours. Nothing outside the namespaces is touched; dropping the network removes them, and what a
//! test that was killed has left is removed when the next network is made.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use xtask::cluster::Host;
use xtask::process;
use xtask::step::note;

/// Where the kernel shows named namespaces (ip-netns(8)).
const NAMESPACES: &str = "/run/netns";
/// How names of namespaces begin; the process that made them follows.
const PREFIX: &str = "hearth-test-";

/// Lets addresses of 127.0.0.0/8 in from a link (Documentation/networking/ip-sysctl.rst, `route_localnet`).
const ALLOW_LOOPBACK: &str = "for of in all default; do echo 1 > /proc/sys/net/ipv4/conf/$of/route_localnet; done";

/// Networks that this process made so far.
static MADE: AtomicU32 = AtomicU32::new(0);

/// One end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// nats-server and the scheduler.
    Control,
    /// A node, counted from 0.
    Node(usize),
}

impl Place {
    fn name(self) -> String {
        match self {
            Place::Control => "control".to_owned(),
            Place::Node(index) => format!("node{}", index + 1),
        }
    }

    fn address(self) -> Ipv4Addr {
        match self {
            Place::Control => Ipv4Addr::new(127, 0, 200, 1),
            Place::Node(index) => Ipv4Addr::new(127, 0, u8::try_from(index + 1).expect("a handful of nodes"), 1),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Network {
    name: String,
    places: Vec<Place>,
    /// Where packets are dropped.
    cut: BTreeSet<Place>,
    slowed: BTreeSet<Place>,
}

impl Network {
    /// Makes the namespaces.
    ///
    /// # Errors
    /// A tool is missing, or this process may not make namespaces; what was made is removed.
    pub fn make(nodes: usize) -> Result<Self> {
        for tool in [
            ["ip", "-V"],
            ["tc", "-V"],
            ["nft", "--version"],
            ["nsenter", "--version"],
        ] {
            ensure!(
                process::succeeds(Command::new(tool[0]).arg(tool[1])),
                "{} is not installed (Debian: iproute2, nftables, util-linux)",
                tool[0]
            );
        }
        remove_left_over();
        let number = MADE.fetch_add(1, Ordering::SeqCst);
        let network = Self {
            name: format!("{PREFIX}{}-{number}", std::process::id()),
            places: std::iter::once(Place::Control)
                .chain((0..nodes).map(Place::Node))
                .collect(),
            cut: BTreeSet::new(),
            slowed: BTreeSet::new(),
        };
        let hub = network.hub();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "hub", "up"])?;
        for place in &network.places {
            network
                .add(*place)
                .with_context(|| format!("cannot make the namespace of {place:?}"))?;
        }
        Ok(network)
    }

    fn add(&self, place: Place) -> Result<()> {
        let (hub, name, port) = (self.hub(), self.namespace(place), place.name());
        ip(&["netns", "add", &name])?;
        // Loopback addresses from a wire are dropped as impossible unless a link is told otherwise.
        self.run(place, "sh", &["-c", ALLOW_LOOPBACK])?;
        let peer = ["peer", "name", "eth0", "netns", &name];
        ip(&[&["-n", &hub, "link", "add", &port, "type", "veth"], &peer[..]].concat())?;
        ip(&["-n", &hub, "link", "set", &port, "master", "hub", "up"])?;
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        // With it every loopback address is the namespace's own.
        ip(&["-n", &name, "addr", "del", "127.0.0.1/8", "dev", "lo"])?;
        let own = format!("{}/16", place.address());
        ip(&["-n", &name, "addr", "add", &own, "scope", "global", "dev", "eth0"])?;
        ip(&["-n", &name, "link", "set", "eth0", "up"])
    }

    /// Where nats-server and the scheduler run.
    pub fn control(&self) -> Host {
        self.host(Place::Control)
    }

    /// Where the nodes run.
    pub fn nodes(&self) -> Vec<Host> {
        let nodes = self.places.iter().filter(|place| **place != Place::Control);
        nodes.map(|place| self.host(*place)).collect()
    }

    fn host(&self, place: Place) -> Host {
        Host::in_namespace(&self.file(place), place.address())
    }

    /// From now on no packet of `from` arrives at `to`.
    ///
    /// # Errors
    /// nftables refuses.
    pub fn lose(&mut self, from: Place, to: Place) -> Result<()> {
        self.lose_some(from, to, 100)
    }

    /// From now on so many packets in a hundred of `from` do not arrive at `to`.
    ///
    /// # Errors
    /// nftables refuses.
    pub fn lose_some(&mut self, from: Place, to: Place, percent: u32) -> Result<()> {
        let which = match percent {
            100.. => String::new(),
            some => format!("numgen random mod 100 < {some} "),
        };
        let rules = format!(
            "table ip hearth {{\n chain arriving {{ type filter hook input priority filter; }}\n}}\n\
             add rule ip hearth arriving ip saddr {} {which}counter drop\n",
            from.address()
        );
        let mut nft = self.host(to).command(Path::new("nft"));
        let mut child = nft
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start nft")?;
        child
            .stdin
            .take()
            .context("nft's input was not piped")?
            .write_all(rules.as_bytes())?;
        ensure!(child.wait()?.success(), "nft refuses:\n{rules}");
        self.cut.insert(to);
        Ok(())
    }

    /// From now on these two hear nothing of each other.
    ///
    /// # Errors
    /// nftables refuses.
    pub fn part(&mut self, one: Place, other: Place) -> Result<()> {
        self.lose(one, other)?;
        self.lose(other, one)
    }

    /// Bounds what a place may send and receive per second. More than a tenth of a second's worth that waits is lost.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn slow(&mut self, place: Place, kbit_per_s: u32) -> Result<()> {
        let rate = format!("{kbit_per_s}kbit");
        let shape = ["root", "tbf", "rate", &rate, "burst", "32k", "latency", "100ms"];
        for (namespace, device) in self.ends(place) {
            let at = ["-n", &namespace, "qdisc", "replace", "dev", &device];
            process::output(Command::new("tc").args(at).args(shape))?;
        }
        self.slowed.insert(place);
        Ok(())
    }

    /// Both ends of a place's wire: each bounds what leaves it.
    fn ends(&self, place: Place) -> [(String, String); 2] {
        [(self.namespace(place), "eth0".to_owned()), (self.hub(), place.name())]
    }

    /// Undoes every cut and every bound; says how many packets were dropped by the cuts.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn heal(&mut self) -> Result<u64> {
        let mut dropped = 0;
        for place in std::mem::take(&mut self.cut) {
            let rules = self.run(place, "nft", &["list", "table", "ip", "hearth"])?;
            let counts = rules.split("packets ").skip(1);
            dropped += counts
                .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok())
                .sum::<u64>();
            self.run(place, "nft", &["delete", "table", "ip", "hearth"])?;
        }
        for place in std::mem::take(&mut self.slowed) {
            for (namespace, device) in self.ends(place) {
                process::output(Command::new("tc").args(["-n", &namespace, "qdisc", "del", "dev", &device, "root"]))?;
            }
        }
        Ok(dropped)
    }

    fn run(&self, place: Place, program: &str, words: &[&str]) -> Result<String> {
        process::output(self.host(place).command(Path::new(program)).args(words))
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.name)
    }

    fn namespace(&self, place: Place) -> String {
        format!("{}-{}", self.name, place.name())
    }

    fn file(&self, place: Place) -> PathBuf {
        Path::new(NAMESPACES).join(self.namespace(place))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let places = self.places.iter().map(|place| self.namespace(*place));
        places.chain([self.hub()]).for_each(|name| remove(&name));
    }
}

/// Removes the namespaces of test processes that are no more.
fn remove_left_over() {
    let found = std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    for name in found.filter_map(|entry| entry.file_name().into_string().ok()) {
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if maker.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            remove(&name);
        }
    }
}

fn remove(name: &str) {
    if Path::new(NAMESPACES).join(name).exists()
        && let Err(error) = ip(&["netns", "del", name])
    {
        note(format!("left behind: {error:#}"));
    }
}

fn ip(words: &[&str]) -> Result<()> {
    process::output(Command::new("ip").args(words)).map(drop)
}
