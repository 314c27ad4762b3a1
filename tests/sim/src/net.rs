//! Connections: per image and ordered pair of nodes, from the one that asks (client) to the one that answers (server), one
//! for control and one for the requests of each set version. They break together.
//!
//! In order on a connection, in any order across them. A broken one loses what is under way, but for some first messages to the server, which its old
//! task may still carry out long after; both ends learn of the break, each at its own time. A partition holds messages until
//! it heals or the connection breaks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hearth_replication::request::Request;
use hearth_replication::session::Message;

use crate::disk::Value;

/// A connection: image, client, server, lane.
pub type Key = (usize, usize, usize, u64);

/// The lane of control; requests of a set version have another one.
const CONTROL: u64 = 0;

/// Lanes of requests: two set versions that follow each other never share one.
const LANES: u64 = 3;

/// A message on a connection.
#[derive(Debug, Clone)]
pub struct Letter {
    /// Which connection.
    pub key: Key,
    /// Which of the connections that followed each other.
    pub life: u64,
    /// Towards the server.
    pub to_server: bool,
    /// What.
    pub message: Message,
    /// Its bytes.
    pub values: Vec<Value>,
    /// Left over from a broken connection.
    pub late: bool,
}

impl Letter {
    /// The node it comes from and the one it goes to.
    pub fn ends(&self) -> (usize, usize) {
        let (_, client, server, _) = self.key;
        if self.to_server {
            (client, server)
        } else {
            (server, client)
        }
    }
}

/// One connection.
#[derive(Debug, Default)]
pub struct Connection {
    /// Counts breaks.
    pub life: u64,
    /// When the last message of each direction arrives.
    pub last: [u64; 2],
    /// Held by a partition.
    pub stuck: VecDeque<Letter>,
    /// Of earlier lives: how many messages are still to be carried out, and how much later.
    pub leftovers: BTreeMap<u64, (u64, u64)>,
}

/// All connections, and which directions are cut.
#[derive(Debug, Default)]
pub struct Net {
    /// Connections.
    pub connections: BTreeMap<Key, Connection>,
    /// Between which (image, client, server) all connections broke without the client knowing yet.
    pub broken: BTreeSet<(usize, usize, usize)>,
    /// Directions between two nodes that nothing passes.
    pub cut: BTreeSet<(usize, usize)>,
}

impl Net {
    /// The connection of a message between two nodes.
    pub fn key(image: usize, from: usize, to: usize, message: &Message) -> (Key, bool) {
        let lane = match message {
            Message::Request(Request { stamp, .. }) | Message::Answer { stamp, .. } => 1 + stamp.set_version.0 % LANES,
            _ => CONTROL,
        };
        let answers = matches!(
            message,
            Message::Answer { .. } | Message::Raised(_) | Message::NotRaised { .. } | Message::Told { .. }
        );
        let (client, server) = if answers { (to, from) } else { (from, to) };
        ((image, client, server, lane), !answers)
    }

    /// The connections that break together with one.
    pub fn siblings(&self, key: Key) -> Vec<Key> {
        let same = |other: &&Key| (other.0, other.1, other.2) == (key.0, key.1, key.2);
        self.connections.keys().filter(same).copied().collect()
    }

    /// Whether nothing passes from one node to another.
    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }
}
